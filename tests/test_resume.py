"""A run that is stopped, killed or refused its disk goes on from its last border to the same student, bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdfkd_cli import api, checkpoint, distill_report, distillation, stopping
from fastdfkd_cli.checkpoint import Checkpoints
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.resume import checkpoint_folder
from fastdfkd_cli.stopping import Stopped
from fastdfkd_cli.student import Student
from test_distillation import FakeTime
from tiny import CLASSES, SIZE, config, net, teacher

CPU = torch.device("cpu")


class Border(Exception):
    """Where a run is left."""


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    assert not stopping.asked()


# The engine's state


def engine(settings: RunConfig, given: bool = False) -> Distillation:
    model, pupil = teacher(), net(1, dropout=0.3)
    shape: dict[str, Any] = {"image_size": SIZE, "device": CPU, "amp": False}
    pool, method = None, None
    if given:
        images = torch.randint(0, 256, (10, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
        pool = ImagePool.holding(images, torch.arange(10) % CLASSES, CPU)
    else:
        method = build_method(settings, model, num_classes=CLASSES, **shape)
    return Distillation(settings, model, pupil, synthesizer=method, pool=pool, **shape)


def finished(run: Distillation) -> dict[str, Tensor]:
    list(run)
    return {**run.student.net.state_dict(), "pool": run.pool.images, "labels": run.pool.labels}


def left_at(run: Distillation, border: int) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] | None:
    """Run up to a border, and take copies of everything as a file would hold it. None: there is no such border."""
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        if seen == border:
            raise Border

    run.at_border = stop
    try:
        list(run)
    except Border:
        tensors, values = run.state()
        parts = run.pool.parts([], images=run.synthesizer is not None)
        return copy.deepcopy(tensors), json.loads(json.dumps(values)), copy.deepcopy(parts)
    return None


VARIANTS: list[dict[str, Any]] = [
    {},
    {"distillation__average": "ema", "distillation__lr_warmup": 0.3},
    {"distillation__augmentation": "none", "schedule__kd_steps_per_round": 7},
    {"distillation__augmentation": "crop-flip", "distillation__label_views": 2, "schedule__kd_steps_per_round": 12},
    {"pool_size": 6, "schedule__rounds": 6, "schedule__batches_per_round": 2},
    {"synthesis__latent": "meta", "synthesis__latent_reset_every": 2, "synthesis__meta_gradient": "reptile"},
    {"synthesis__reuse": "none", "schedule__final_rounds": 1},
    {"synthesis__generator_reset_after": 1, "schedule__warmup_rounds": 2, "schedule__rounds": 5},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("given", [False, True])
def test_a_run_goes_on_from_any_border_to_the_same_student(variant: dict[str, Any], given: bool) -> None:
    settings = config(**variant)
    torch.manual_seed(0)
    whole = finished(engine(settings, given))
    borders = 0
    for border in range(1, 100, 3):
        torch.manual_seed(0)
        kept = left_at(engine(settings, given), border)
        if kept is None:
            break
        borders += 1
        torch.manual_seed(1)  # another process
        run = engine(settings, given)
        run.take_up(*kept)
        found = finished(run)
        assert found.keys() == whole.keys()
        assert all(torch.equal(whole[name], found[name]) for name in whole), border
    assert borders > 2


def test_a_time_budget_counts_the_time_that_was_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    for module in ("clock", "distillation"):
        monkeypatch.setattr(f"fastdfkd_cli.{module}.time", clock)

    def slow(fast: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            clock.now += seconds
            return fast(*given, **more)

        return timed

    monkeypatch.setattr(Student, "learn", slow(Student.learn, 0.1))
    monkeypatch.setattr(Distillation, "synthesize_batch", slow(Distillation.synthesize_batch, 0.001))
    settings = config(schedule__time_budget=3.0)
    kept = left_at(engine(settings), 12)
    assert kept is not None
    clock.now += 1000
    run = engine(settings)
    run.take_up(*kept)
    before = run.steps_taken
    list(run)
    assert before > 0
    assert 25 <= run.steps_taken <= 27  # and three that were timed, and the batches
    assert 3.0 <= run.clock.elapsed < 3.15


def test_a_part_of_the_pool_is_stored_once_and_dropped_with_its_images() -> None:
    pool = ImagePool(SIZE, 6, CPU)
    rows = torch.randint(0, 256, (20, *SIZE), dtype=torch.uint8)
    stored: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for start in range(0, 20, 4):
        pool.add(rows[start : start + 4], torch.arange(start, start + 4))
        parts = pool.parts(stored)
        assert sum(part is not None for part in parts.values()) == 1
        kept |= {name: part for name, part in parts.items() if part is not None}
        stored = parts
        again = ImagePool(SIZE, 6, CPU)
        again.restore({name: kept[name] for name in parts}, pool.added, pool.unlabelled, "none")
        assert torch.equal(again.images, pool.images)
        assert torch.equal(again.labels, pool.labels)
        assert again.newest == pool.newest
    assert list(stored) == ["images-12-16", "images-16-20"]


def test_another_student_s_state_is_refused() -> None:
    run, other = engine(config()), engine(config(distillation__average="ema"))
    with pytest.raises(ValueError, match="another student's"):
        run.student.load_state_dict(other.student.state_dict())


# The public function


def request(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "teacher_options": ModelOptions(input_size=SIZE, num_classes=CLASSES),
        "config": config(distillation__average="ema"), "output": path, "device": "cpu", "amp": False, **more,
    }  # fmt: skip


def assert_same_student(*paths: Path) -> None:
    one, other = (load_file(path / "model.safetensors") for path in paths)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def asking_at(border: int, monkeypatch: pytest.MonkeyPatch, signum: int = signal.SIGTERM) -> None:
    """Have a signal come before the border of that number."""
    seen = 0
    step = Distillation.kd_step

    def kd_step(self: Distillation) -> None:
        nonlocal seen
        seen += 1
        if seen == border:
            assert stopping.ask(signum)
            assert not stopping.ask(signum)  # the second one is the handler's
        step(self)

    monkeypatch.setattr(Distillation, "kd_step", kd_step)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.distill(teacher(), net(1), **request(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        asking_at(5, patch)
        with pytest.raises(Stopped) as stopped:
            api.distill(teacher(), net(1), **request(tmp_path / "parts"))
    folder = checkpoint_folder(tmp_path / "parts")
    assert stopped.value.signum == signal.SIGTERM
    assert stopped.value.__notes__ == [
        f"12 images and 5 KD steps are kept in {folder}: the same command with --resume auto goes on"
    ]
    assert not (tmp_path / "parts").exists()
    said: list[str] = []
    # The student of another process: its weights are those of the checkpoint.
    result = api.distill(teacher(), net(2), **request(tmp_path / "parts", resume="auto", on_message=said.append))
    assert "going on after 12 images and 5 KD steps" in said
    assert not folder.exists()
    assert_same_student(tmp_path / "whole", tmp_path / "parts")
    metrics = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["progress"] == 1
    assert [line["elapsed"] for line in metrics] == sorted(line["elapsed"] for line in metrics)
    assert result.report["kd_steps"] == 9
    assert result.report["images"] == 16


def test_a_disk_that_is_full_from_the_start_keeps_nothing_and_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    with pytest.raises(FastDFKDError, match="No space left on device") as error:
        api.distill(teacher(), net(1), **request(tmp_path / "s", checkpoint_every=1e-9))
    assert "--resume" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_unfinished_is_not_begun_anew_by_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    with monkeypatch.context() as patch:
        asking_at(2, patch)
        with pytest.raises(Stopped):
            api.distill(teacher(), net(1), **request(path))
    with pytest.raises(UsageError, match=r"--resume auto.*--overwrite"):
        api.distill(teacher(), net(1), **request(path))
    with pytest.raises(UsageError, match=r"config\.seed"):
        api.distill(teacher(), net(1), **request(path, resume="auto", overrides={"seed": 1}))
    with pytest.raises(UsageError, match="amp"):
        api.distill(teacher(), net(1), **request(path, resume="auto", amp=True))
    said: list[str] = []
    api.distill(teacher(), net(1), **request(path, overwrite=True, on_message=said.append))
    assert not any("going on" in line for line in said)
    assert not checkpoint_folder(path).exists()


def test_resume_auto_begins_where_there_is_nothing(tmp_path: Path) -> None:
    api.distill(teacher(), net(1), **request(tmp_path / "student", resume="auto"))
    assert (tmp_path / "student" / "model.safetensors").exists()
    with pytest.raises(UsageError, match="holds no checkpoint"):
        api.distill(teacher(), net(1), **request(tmp_path / "other", resume=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="name it"):
        api.distill(teacher(), net(1), **{**request(tmp_path), "output": None, "resume": "auto"})


def test_a_run_that_is_complete_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "student"
    made = api.distill(teacher(), net(1), **request(path))
    monkeypatch.setattr(api, "distil", lambda *_: pytest.fail("work was done"))
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    said: list[str] = []
    again = api.distill(teacher(), net(2), **request(path, resume="auto", on_message=said.append))
    assert said[-1] == "the run is complete: nothing is left to do"
    assert again.path == path
    assert again.report == json.loads((path / "report.json").read_text())
    for name, tensor in made.student.state_dict().items():
        assert torch.equal(tensor, again.student.state_dict()[name]), name
    assert not again.student.training
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    # Nothing but the very same run is taken for it, and a checkpoint's folder by name is none that is complete.
    for changes in ({"resume": "auto", "overrides": {"seed": 1}}, {"resume": checkpoint_folder(path)}, {}):
        with pytest.raises(UsageError, match="is not empty"):
            api.distill(teacher(), net(1), **request(path, **changes))
    (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UnavailableError, match=r"model\.safetensors cannot be read"):
        api.distill(teacher(), net(1), **request(path, resume="auto"))


def test_a_finished_student_survives_what_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.distill(teacher(), net(1), **request(tmp_path / "whole"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(distill_report, "export_student", full)
        with pytest.raises(FastDFKDError, match="No space left"):
            api.distill(teacher(), net(1), **request(tmp_path / "parts"))
    with monkeypatch.context() as patch:  # nothing is trained again
        patch.setattr(Distillation, "kd_step", full)
        patch.setattr(Distillation, "synthesize_batch", full)
        api.distill(teacher(), net(1), **request(tmp_path / "parts", resume="auto"))
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_checkpoints_come_in_time_and_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []
    save = Checkpoints.save

    def counted(self: Checkpoints, *given: Any, **more: Any) -> None:
        saves.append(1)
        save(self, *given, **more)

    monkeypatch.setattr(Checkpoints, "save", counted)
    found = {}
    for every in (0, 1e-9, 1e9):
        saves.clear()
        api.distill(teacher(), net(1), **request(tmp_path / f"{every}", checkpoint_every=every))
        found[every] = len(saves)
    assert found[0] == found[1e9] == 1  # the finished student
    assert found[1e-9] > 1


def test_a_broken_run_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "RECORD_EVERY", 1e9)
    path = tmp_path / "student"
    with pytest.raises(FastDFKDError, match="not finite|stopped being finite"):
        api.distill(
            teacher(), net(1), **request(path, overrides={"distillation.lr": 1e30, "rounds": 8}, checkpoint_every=1e-9)
        )
    with pytest.raises((UsageError, UnavailableError)):
        api.distill(teacher(), net(1), **request(path, resume=checkpoint_folder(path)))


def stopped_run(path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Path:
    with monkeypatch.context() as patch:
        asking_at(4, patch)
        with pytest.raises(Stopped):
            api.distill(teacher(), net(1), **request(path, **more))
    return checkpoint_folder(path)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    api.distill(teacher(), net(1), **request(tmp_path / "whole"))
    folder = stopped_run(tmp_path / "parts", monkeypatch, checkpoint_every=1e-9)
    newest = sorted(folder.glob("checkpoint-*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flipped" else content[:-7])
    said: list[str] = []
    api.distill(teacher(), net(1), **request(tmp_path / "parts", resume="auto", on_message=said.append))
    words = "damaged" if damage == "flipped" else "truncated"
    assert any(newest.name in line and words in line and "going on from checkpoint" in line for line in said), said
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("key", ["position", "parts", "clock", "tensor"])
def test_a_checkpoint_that_somebody_else_wrote_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    folder = stopped_run(tmp_path / "s", monkeypatch)
    take_up = Distillation.take_up

    def other(self: Distillation, tensors: Any, values: Any, parts: Any) -> None:
        if key == "tensor":
            tensors = {**tensors, "student.net.fc.weight": torch.zeros(1)}
        elif key == "parts":
            parts = {"images-x-y": {}}
        else:
            values = {**values, key: {"surprise": 1}}
        take_up(self, tensors, values, parts)

    monkeypatch.setattr(Distillation, "take_up", other)
    with pytest.raises(UnavailableError, match="does not fit this run") as error:
        api.distill(teacher(), net(1), **request(tmp_path / "s", resume="auto"))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run.position.round", [1]), ("run.position.kd_steps", -1), ("run.clock.kd_steps_per_round", 0),
        ("run.clock.elapsed", "long"), ("run.rate", None), ("run.pool.added", 10**30), ("run.retries", 3),
        ("run.costs.synthesis", [0.5]), ("chosen", None), ("chosen.pool_size", -1), ("parts", "images"),
        ("elapsed", True), ("run", 7), ("run.clock.rounds", 10**9),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    folder = stopped_run(tmp_path / "s", monkeypatch)
    path = max(folder.glob("checkpoint-*.json"))
    stated = json.loads(path.read_bytes())
    del stated["sha256"], stated["bytes"]
    *steps, last = name.split(".")
    owner = stated["values"]
    for step in steps:
        owner = owner[step]
    owner[last] = value
    rest = json.dumps(stated)[1:].encode()
    path.write_bytes(f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", "bytes": {len(rest)},\n'.encode() + rest)
    with pytest.raises(UnavailableError, match=rf"was not written by this program \({name}|its rounds is"):
        api.distill(teacher(), net(1), **request(tmp_path / "s", resume="auto"))


COMMAND = [
    sys.executable, "-m", "fastdfkd_cli", "distill", "--teacher", "builtin/digits", "--student", "cifar/wrn10_1",
    "--recipe", "digits", "--images", "512", "--set", "quality_images=0", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_the_command_saves_when_it_is_asked_to_stop(tmp_path: Path, signum: int, code: int, name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*COMMAND, "--output", str(tmp_path / "s")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        read = []
        for line in process.stderr:
            read.append(line)
            if "%]" in line:  # the first line of progress
                process.send_signal(signum)
                break
        out, rest = process.communicate(timeout=60)
    assert process.returncode == code, "".join(read) + rest
    assert out == ""
    assert "finishing the step and saving; once more to stop at once" in rest
    last = rest.splitlines()[-1]
    assert last.startswith(f"fastdfkd: interrupted: stopped by {name}; ")
    assert last.endswith(f"are kept in {tmp_path / 's.checkpoints'}: the same command with --resume auto goes on.")
    again = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert again.returncode == 2
    assert "--resume auto" in again.stderr.splitlines()[-1]


def test_what_memory_decided_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: Callable[..., int] = lambda *_: 2  # noqa: E731
    monkeypatch.setattr("fastdfkd_cli.job.micro_batch_for", sizes)
    say: list[str] = []
    api.distill(teacher(), net(1), **request(tmp_path / "whole", on_message=say.append))
    with monkeypatch.context() as patch:
        asking_at(4, patch)
        with pytest.raises(Stopped):
            api.distill(teacher(), net(1), **request(tmp_path / "parts", on_message=say.append))
    monkeypatch.setattr("fastdfkd_cli.job.micro_batch_for", lambda *_: 0)
    api.distill(teacher(), net(1), **request(tmp_path / "parts", on_message=say.append, resume="auto"))
    assert_same_student(tmp_path / "whole", tmp_path / "parts")


def test_a_teacher_that_changed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        asking_at(2, patch)
        with pytest.raises(Stopped):
            api.distill(
                "builtin/digits",
                "cifar/wrn10_1",
                output=tmp_path / "s",
                recipe="digits",
                device="cpu",
                overrides={"rounds": 4},
            )
    with pytest.raises(UsageError, match="teacher"):
        api.distill(
            "builtin/digits", "cifar/wrn10_1", output=tmp_path / "s", recipe="digits", device="cpu", resume="auto",
            overrides={"rounds": 4}, teacher_options=ModelOptions(mean=(0.1,), std=(0.2,)),
        )  # fmt: skip
