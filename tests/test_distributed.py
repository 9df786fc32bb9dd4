"""Several processes against one, on gloo and a CPU: equal results, and a common end."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from fastdfkd_cli import distributed
from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.job import divided
from fastdfkd_cli.pool import StoredPool, redealt
from fastdfkd_cli.processes import ALONE, Group, from_environment
from fastdfkd_cli.recipes import RECIPES, get_recipe
from fastdfkd_cli.synced_norm import sync_batch_norm, synced_batch_norm
from tiny import TinyNet, assert_same_state, config, net, state_of

SIZES = (2, 4)
ENDINGS = ("killed", "leader_killed", "hanging", "failing", "all_failing", "interrupted")
#: Runs that are left by so many processes, and those that go on with what the others left.
RESUMED = (("left", 2), ("left", 1), ("taken", 1), ("taken", 3), ("taken", 2))


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """Everything that takes several processes, in one go: what each returned, wrote and exited with."""
    words = [word for size in SIZES for word in ("equal", str(size))]
    words += [word for name in ENDINGS for word in (name, "3")]
    words += [word for name, size in RESUMED for word in (name, str(size))]
    script = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), *words],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **ranks.ENVIRONMENT},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=SIZES)
def equal(ran: dict[str, Any], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found = ran[f"equal {request.param}"]
    assert found["codes"] == [0] * request.param, "\n".join(found["stderr"])
    assert found["stderr"] == [""] * request.param
    return found["results"]


# Equal to one process


def test_synced_norms_are_those_of_one_process_with_the_whole_batch(equal: list[dict[str, Any]]) -> None:
    for result in equal:
        assert len(result["norms"]) == 12
        for name, difference in result["norms"].items():
            assert difference < {"float32": 5e-6, "bf16": 2e-2}.get(name, 1e-12), name


def test_the_feature_term_has_the_gradient_of_the_whole_batch(equal: list[dict[str, Any]]) -> None:
    # Moments travel from float32 targets; all else is float64.
    assert max(result["moments"] for result in equal) < 1e-12


def test_synthesis_is_that_of_one_process_with_the_whole_batch(equal: list[dict[str, Any]]) -> None:
    for result in equal:
        assert len(result["synthesis"]) == (7 if len(equal) == 2 else 2)
        for name, found in result["synthesis"].items():
            assert found["pixels"] <= 1, name  # a rounded half
            assert found["losses"] < 1e-5, name
            assert found["gradients"] < 1e-3, name
            assert found["statistics"] < 1e-5, name
            assert found["latent"] < 1e-5, name
            assert found["weights"] < 2e-4, name  # a full step of Adam is 3e-3


def test_processes_share_a_generator_and_make_images_of_their_own(equal: list[dict[str, Any]]) -> None:
    for name in equal[0]["synthesis"]:
        assert len({result["synthesis"][name]["same"] for result in equal}) == 1, name
        assert len({result["synthesis"][name]["images"] for result in equal}) == len(equal), name


def test_training_is_that_of_one_process_with_the_whole_batch(equal: list[dict[str, Any]]) -> None:
    assert len({result["training"]["same"] for result in equal}) == 1
    assert max(result["training"]["difference"] for result in equal) < 1e-6  # the loss is formed in float32


def test_a_run_is_that_of_one_process_with_the_whole_batch(equal: list[dict[str, Any]]) -> None:
    size = len(equal)
    for name in ("plain", "labelled"):
        assert len({result["run"][name]["same"] for result in equal}) == 1, name  # bit for bit
        for result in equal:
            found = result["run"][name]
            assert found["difference"] < 5e-3 * found["moved"], name
            assert found["pixels"] <= 1, name
            in_pool, made, wanted = found["images"]
            assert made == wanted == 32
            assert in_pool == wanted / size  # each makes its part
            assert found["steps"] == [9, 9]
            progress, loss, expected = found["last"]
            assert progress == 1
            assert loss == pytest.approx(expected, rel=1e-3)


def test_what_clocks_and_figures_decide_is_decided_alike(equal: list[dict[str, Any]]) -> None:
    timed = [result["together"]["timed"] for result in equal]
    assert all(each == timed[0] for each in timed)  # students, steps, fitted rounds, and the time that has passed
    assert timed[0]["steps"] > 0
    assert timed[0]["elapsed"] >= 1.0
    broken = [result["together"]["broken"] for result in equal]
    assert len({each["same"] for each in broken}) == 1
    assert {each["retries"] for each in broken} == {1}
    assert {each["steps"] for each in broken} == {9}


# Messages


def test_reductions(equal: list[dict[str, Any]]) -> None:
    size = len(equal)
    ranks = sum(range(size))
    for result in equal:
        found = result["reductions"]
        assert found["sum"] == [[ranks + size] * 6, [ranks]]
        assert found["kept"] == ["torch.float32", "torch.float64", True]
        assert found["image"] == ranks
        assert found["mean"] == [ranks / size, 1.0]
        assert found["sent"] == [[0.0, 0.0], 7, [True, True]]
        assert found["moments"] < 1e-10  # of numbers around 100: a float32 sum of squares would be at 1e-3


def test_all_stop_at_the_step_at_which_one_was_asked(equal: list[dict[str, Any]]) -> None:
    for result in equal:
        assert result["reductions"]["stops"] == [0, 0, 0, 15, 0]


def test_with_fewer_messages_all_still_stop_at_the_same_step_and_share_a_clock(equal: list[dict[str, Any]]) -> None:
    first = equal[0]["reductions"]
    assert all(result["reductions"]["answers"] == first["answers"] for result in equal)
    assert all(result["reductions"]["clocks"] == first["clocks"] for result in equal)
    assert set(first["answers"][:11]) == {0}
    assert first["answers"][-1] == 2
    assert 2 < len(set(first["clocks"])) < 40
    assert first["clocks"] == sorted(first["clocks"])


def test_different_settings_are_refused_in_all_processes(equal: list[dict[str, Any]]) -> None:
    for result in equal:
        assert result["reductions"]["refused"] == (
            "Process 1 has another recipe than process 0: start all of them alike."
        )


def test_the_first_process_of_a_machine_goes_first(equal: list[dict[str, Any]]) -> None:
    assert all(result["reductions"]["seen"] for result in equal)


def test_work_is_divided(equal: list[dict[str, Any]]) -> None:
    shares = [result["reductions"]["share"] for result in equal]
    assert sum(shares) == 10
    assert max(shares) - min(shares) <= 1


def test_what_is_sent_is_what_the_documentation_counts() -> None:
    import scaling

    setting = scaling.SETTINGS[0]
    _, student = scaling.networks(setting)
    widths = [layer.num_features for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = sum(parameter.numel() for parameter in student.parameters())
    sent = scaling.messages(setting)
    statistics, derivatives = [16 * width for width in widths], [8 * width for width in reversed(widths)]
    # The gradients travel with the loss and the agreement.
    assert sorted(sent["KD step"]) == sorted([*statistics, *derivatives, 4 * (weights + 2)])
    assert len(sent["KD step"]) == 27
    assert (len(sent["inner step"]), sum(sent["inner step"])) == (8, 9_366_556)


# A common end


def lines(found: dict[str, Any]) -> list[str]:
    return [line for text in found["stderr"] for line in text.splitlines()]


@pytest.mark.parametrize(("name", "victim"), [("killed", 1), ("leader_killed", 0)])
def test_a_killed_process_ends_the_others_soon(ran: dict[str, Any], name: str, victim: int) -> None:
    found = ran[f"{name} 3"]
    assert found["codes"] == [-9 if rank == victim else 1 for rank in range(3)]
    # A second of this is the work before.
    assert max(found["seconds"]) < 30
    said = lines(found)
    assert set(said) == {
        f"error: Process {victim} of 3 ended or stopped answering without a word (killed, or out of memory?). "
        "The others end with it."
    }
    # Without rank 0 and its table, the others cannot agree on who says it.
    assert len(said) == (1 if victim else 2)


def test_a_process_that_hangs_ends_the_others(ran: dict[str, Any]) -> None:
    found = ran["hanging 3"]
    assert found["codes"] == [1, -9, 1]
    assert max(found["seconds"][0], found["seconds"][2]) < found["seconds"][1]  # it was killed after they had ended
    assert lines(found) == [
        "said: Process 1 of 3 ended or stopped answering without a word (killed, or out of memory?). "
        "The others end with it."
    ]


def test_one_process_fails_and_says_why_and_the_others_end_silently(ran: dict[str, Any]) -> None:
    found = ran["failing 3"]
    assert found["codes"] == [1, 3, 1]
    assert lines(found) == ["error: the file is gone"]
    assert max(found["seconds"]) < 30


def test_what_all_processes_fail_with_is_said_once(ran: dict[str, Any]) -> None:
    found = ran["all_failing 3"]
    assert found["codes"] == [2, 2, 2]
    assert lines(found) == ["error: that cannot be done"]


def test_an_agreed_stop_is_said_once(ran: dict[str, Any]) -> None:
    found = ran["interrupted 3"]
    assert found["codes"] == [130] * 3
    assert lines(found) == ["interrupted"]


# Stopped and gone on with


def test_a_stopped_run_goes_on_to_the_same_student(ran: dict[str, Any]) -> None:
    for size in (2, 1):
        found = ran[f"left {size}"]
        assert found["codes"] == [0] * size, "\n".join(found["stderr"])
        for name in ("made", "latent", "given"):
            results = [result[name] for result in found["results"]]
            students = {student for result in results for student in result["students"]}
            assert len(students) == 1, name  # whole and stopped, in all processes, bit for bit
            assert [result["ended"] for result in results] == ["Stopped", "SystemExit: 143"][:size]
            assert results[0]["notes"] == [
                f"{results[0]['at']} are kept in {results[0]['folder']}: the same command with --resume auto goes on"
            ]
            assert not results[0]["left_behind"]


def test_another_number_of_processes_goes_on(ran: dict[str, Any]) -> None:
    for size, sources in ((1, (2,)), (3, (2,)), (2, (1,))):
        found = ran[f"taken {size}"]
        assert found["codes"] == [0] * size, "\n".join(found["stderr"])
        for source in sources:
            for name in ("made", "latent", "given"):
                results = [result[f"{name} {source}"] for result in found["results"]]
                assert len({result["student"] for result in results}) == 1
                report = results[0]["report"]
                assert report["processes"] == size
                assert report["global_batch"] == {"synthesis": 4 * size, "distillation": 4 * size}
                # The images of before are dealt, each once, and evenly; and those that were to come are made.
                # When the processes agree on the stop is a matter of time: the small pool may be full by then, or not.
                taken_up, before = results[0]["found"]
                assert taken_up == {"made": before, "latent": min(before, 24), "given": 24}[name]
                pools = [result["pool"] for result in results]
                assert sum(pools) == report["pool"] >= 24
                assert max(pools) - min(pools) <= 1
                assert report["images"] >= report["pool"]
                assert report["kd_steps"] > 0


def test_a_pool_is_dealt_anew_with_its_labels() -> None:
    """Ages keep their order, each image its soft labels, and what has none comes last."""
    pools = []
    for rank, (added, held, unlabelled) in enumerate(((10, 6, 2), (9, 5, 2), (9, 5, 2))):
        rows = torch.arange(added) * 10 + rank
        soft = rows[: added - unlabelled].float()
        parts = {
            "images-0-5": {"images": rows[:5], "labels": rows[:5]},
            f"images-5-{added}": {"images": rows[5:], "labels": rows[5:]},
            f"soft-2-{added - unlabelled}": {"draws": soft[2:], "logits": soft[2:]},
        }
        pools.append(StoredPool(parts, added, unlabelled, held))
    for processes in (1, 2, 4):
        found = redealt(pools, processes)
        rows = [pool.rows("images")["images"].tolist() for pool in found]
        kept = [*range(40, 100, 10), *range(41, 91, 10), *range(42, 92, 10)]
        assert sorted(row for each in rows for row in each) == sorted(kept)
        for pool, each in zip(found, rows, strict=True):
            assert [row // 10 for row in each] == sorted(row // 10 for row in each)
            assert pool.added == pool.held == len(each)
            assert pool.rows("images")["labels"].tolist() == each
            assert pool.rows("soft")["logits"].tolist() == each[: pool.held - pool.unlabelled]
        assert sum(pool.held - pool.unlabelled for pool in found) == 10


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_rounds_are_divided_and_the_work_is_kept(processes: int) -> None:
    for name in RECIPES:
        whole = get_recipe(name).config((3, 32, 32))
        each = divided(whole, processes)
        assert each.synthesis.batch_size == whole.synthesis.batch_size
        # To a batch of all, to a step of each round.
        batch, steps = whole.synthesis.batch_size * processes, each.schedule.kd_rounds * processes
        assert processes * each.synthetic_images == pytest.approx(whole.synthetic_images, rel=0.1, abs=batch), name
        assert processes * each.kd_steps == pytest.approx(whole.kd_steps, rel=0.01, abs=steps / 2), name
        assert divided(whole, 1) is whole
    timed = config(schedule__time_budget=5.0, pool_size=16)
    assert divided(timed, processes).schedule == timed.schedule
    assert divided(timed, processes).pool_size == max(-(-16 // processes), 4)


# The environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_torchruns_environment_is_read() -> None:
    assert from_environment(TORCHRUN) == Group(rank=3, world_size=8, local_rank=1, local_size=4)
    without = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}
    assert from_environment(without).local_size == 8  # as many as may share the memory
    assert from_environment({}) is ALONE
    assert from_environment({"RANK": "", "WORLD_SIZE": ""}) is ALONE
    alone = from_environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert not alone.several
    assert alone.leads


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "RANK is set in the environment, but not WORLD_SIZE"),
        ({"RANK": None, "LOCAL_RANK": None}, "WORLD_SIZE is set in the environment, but not RANK and LOCAL_RANK"),
        ({"MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({"RANK": "-1"}, "RANK in the environment must be a whole number from 0 on, not '-1'"),
        ({"RANK": "1_0"}, "not '1_0'"),
        ({"RANK": "٣"}, "RANK in the environment must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be a whole number from 1 on"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE in the environment must be a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT in the environment must be a whole number"),
        ({"RANK": "8"}, "RANK=8 in the environment is not below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4 in the environment do not go with WORLD_SIZE=8"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 in the environment do not go with WORLD_SIZE=8"),
    ],
)
def test_a_bad_environment_is_one_line(changes: dict[str, str | None], words: str) -> None:
    environment = {key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(UsageError) as caught:
        from_environment(environment)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_draw_from_seeds_of_their_own() -> None:
    groups = [Group(rank=rank, world_size=64) for rank in range(64)]
    seeds = {group.seed(seed) & 0xFFFFFFFF for group in groups for seed in range(20)}  # what torch's generator keeps
    assert len(seeds) == 64 * 20
    assert not seeds & set(range(100_000))  # what one process, and the networks of several, draw from
    assert ALONE.seed(7) == 7
    assert groups[1].seed(2**63 - 1) < 2**63


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(rank=5, world_size=8, local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device_name(group, "auto") == "cpu"
    assert distributed.device_name(group, "cuda") == "cuda"  # refused where devices are resolved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.device_name(group, "auto") == "cuda:1"
    assert distributed.device_name(group, "cuda") == "cuda:1"
    assert distributed.device_name(group, "cpu") == "cpu"
    assert distributed.device_name(ALONE, "auto") == "auto"
    assert distributed.device_name(ALONE, "cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="--device cuda:1 names one device for 8 processes"):
        distributed.device_name(group, "cuda:1")
    with pytest.raises(UsageError, match="Process 5 has local rank 2, and this machine shows it 2 CUDA devices"):
        distributed.device_name(Group(rank=5, world_size=8, local_rank=2), "cuda")


# One process


def test_one_process_sends_nothing_and_changes_nothing() -> None:
    assert not torch.distributed.is_initialized()
    given = [torch.rand(3)]
    before = given[0].clone()
    model = net()
    state = state_of(model)
    kinds = [type(layer) for layer in model.modules()]
    with distributed.joined(ALONE, torch.device("cpu"), say=lambda _: pytest.fail("nothing to say")):
        distributed.sum_(ALONE, given)
        distributed.mean_(ALONE, given)
        distributed.broadcast_(ALONE, given)
        distributed.require_same(ALONE, "recipe", "a")
        distributed.wait_for_all(ALONE)
        sync_batch_norm(model, ALONE)
        with distributed.first_of_machine(ALONE):
            pass
        assert not torch.distributed.is_initialized()
    assert torch.equal(given[0], before)
    assert [type(layer) for layer in model.modules()] == kinds
    assert_same_state(state, state_of(model))
    agreement = distributed.Agreement(ALONE)
    assert agreement(0)[0] == 0
    assert agreement(15)[0] == 15


def test_a_group_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", distributed.timedelta(seconds=1))
    with (
        pytest.raises(FastDFKDError, match=r"Process 1 cannot reach the other 1 through 127.0.0.1:1 \(") as caught,
        distributed.joined(Group(rank=1, world_size=2), torch.device("cpu"), say=print),
    ):
        pass
    assert "\n" not in str(caught.value)


class _Own(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class _Renamed(nn.BatchNorm2d):
    pass


def test_layers_that_normalise_in_their_own_way_are_refused() -> None:
    group = Group(rank=0, world_size=2)
    with pytest.raises(UsageError, match="_Own layers normalise in a way of their own"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm2d(2), _Own(2)), group)
    model = nn.Sequential(_Renamed(2), nn.GroupNorm(1, 2))
    with synced_batch_norm(model, group):
        assert isinstance(model[0], _Renamed)
        assert type(model[0]) is not _Renamed
    assert type(model[0]) is _Renamed


def test_a_synced_model_evaluates_and_is_copied_as_before() -> None:
    model = TinyNet()
    images = torch.rand(4, 3, 8, 8)
    expected = model.eval()(images)
    state = state_of(model)
    with synced_batch_norm(model, Group(rank=0, world_size=2)):
        average = copy.deepcopy(model)
        assert torch.equal(model.eval()(images), expected)  # no message: nobody is there to answer
        assert torch.equal(average(images), expected)
        assert [*average.state_dict()] == [*model.state_dict()]
    assert_same_state(state, state_of(model))


def test_the_environment_is_read_without_torch() -> None:
    code = "import sys; import fastdfkd_cli.processes as p; p.from_environment(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_memory_that_runs_out_in_one_process_of_several_is_not_tried_again() -> None:
    """The others are waiting further on, in the next message."""
    from fastdfkd_cli.methods.fast_meta import FastMeta
    from tiny import CLASSES, SIZE, teacher

    method = FastMeta(
        config(), teacher(), image_size=SIZE, num_classes=CLASSES, device=torch.device("cpu"), amp=False, seed=0,
        group=Group(rank=0, world_size=2), acceleration=Acceleration(),
    )  # fmt: skip
    tries = []

    def run() -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("out of memory")

    method._run = run  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        method.synthesize()
    assert len(tries) == 1
