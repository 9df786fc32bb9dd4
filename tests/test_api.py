"""The Python API: one call does the whole job, on the caller's own modules, and leaves nothing half-done."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from fastdfkd_cli import api, distill, distill_report, evaluate, plan_distill, plan_synthesize, synthesize
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.job import override
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.records import Record
from tiny import CLASSES, SIZE, TinyNet, assert_same_state, config, net, state_of

FED = ModelOptions(input_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
Call = dict[str, Any]


def run(teacher: nn.Module | None = None, student: nn.Module | None = None, **changes: Any) -> api.DistillResult:
    call: Call = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False, **changes}
    return distill(teacher or net(), student or net(1), **call)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# The caller's modules


@pytest.mark.parametrize("training", [True, False])
def test_a_teacher_module_is_left_exactly_as_it_was(training: bool, tmp_path: Path) -> None:
    model, student = net().train(training), net(1)
    model.bn2.eval()
    model.conv2.weight.requires_grad_(False)
    model.fc(torch.ones(1, 8)).sum().backward()  # a gradient that the caller still needs
    before, gradient = state_of(model), model.fc.weight.grad.clone()  # type: ignore[union-attr]
    strides = model.conv1.weight.stride()
    run(model, student)
    plan_distill(model, net(1), teacher_options=FED, config=config(), device="cpu", amp=False)
    synthesize(model, num_images=4, output=tmp_path / "set", teacher_options=FED, config=config(), device="cpu")
    assert_same_state(before, state_of(model))
    assert torch.equal(model.fc.weight.grad, gradient)  # type: ignore[arg-type]
    assert model.conv1.weight.stride() == strides


def test_a_student_module_is_trained_in_place_and_returned() -> None:
    student, untouched = net(1), net(1)
    result = run(student=student)
    assert result.student is student
    assert not student.training
    assert not same(student, untouched)
    assert result.path is None
    assert all(p.requires_grad for p in student.parameters())


def test_a_student_to_play_against_is_left_as_it_was(tmp_path: Path) -> None:
    opponent = net(1).eval()
    before = state_of(opponent)
    synthesize(
        net(), num_images=8, output=tmp_path / "set", student=opponent, teacher_options=FED, config=config(), amp=False
    )
    assert_same_state(before, state_of(opponent))


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 6, 13), (2, 12, 8), (4, 9, 9)])
def test_any_channels_and_shape(size: tuple[int, int, int], tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    student = net(1, size=size)
    student.conv1.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[1:])))
    result = run(net(size=size), student, teacher_options=ModelOptions(input_size=size), output=tmp_path / "out")
    assert set(seen) == {size}
    assert result.report["student"]["input"]["size"] == list(size)
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert min(picture.size) > 0


class Remembers(nn.Module):
    """Notes the mean and spread of what it is fed, around a network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.means: list[float] = []
        self.lows: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.means.append(float(x.detach().mean()))
        self.lows.append(float(x.detach().min()))
        return self.inner(x)


def test_teacher_and_student_normalise_for_themselves() -> None:
    size = (1, 8, 8)
    student = Remembers(net(1, size=size))
    given = ModelOptions(mean=(-7.0,), std=(0.1,))
    result = run(net(size=size), student, teacher_options=ModelOptions(input_size=size), student_options=given)
    # Images in [0, 1] become (x + 7) / 0.1: 70 to 80 for the student alone; the first call is check_forward's noise.
    assert min(student.lows) > 70 - 1e-3
    assert max(student.means) < 80 + 1e-3
    assert len(student.means) > 9
    assert result.report["teacher"]["input"]["mean"] == [0.0]
    assert result.report["student"]["input"]["mean"] == [-7.0]
    assert result.report["student"]["input"]["std"] == [0.1]


def test_the_student_has_the_teachers_normalisation_unless_it_says_otherwise() -> None:
    report = run().report
    assert report["student"]["input"]["mean"] == report["teacher"]["input"]["mean"] == [0.5, 0.4, 0.3]


def test_a_teacher_without_batch_norm() -> None:
    off = r"--set synthesis.feature_weight=0 --set quality_images=0 \(.* no quality signal\)"
    with pytest.raises(UsageError, match=rf"TinyNet has no BatchNorm .*{off}"):
        run(net(norm=False))
    with pytest.raises(UsageError, match=r"the quality signal .*leave it out with --set quality_images=0"):
        run(net(norm=False), overrides={"synthesis.feature_weight": 0})
    result = run(net(norm=False), overrides={"synthesis.feature_weight": 0, "quality_images": 0})
    assert result.report["quality"] is None
    assert result.report["images"] == 16


def test_classes_that_differ() -> None:
    with pytest.raises(UsageError, match="5 classes"):
        run(student=net(1, classes=5))


# Seeds


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", ["crop-flip", "resized-crop-flip"])
def test_one_seed_makes_one_student_bit_for_bit(amp: bool, kind: str) -> None:
    settings = config(
        deterministic=True, seed=3, synthesis__augmentation=kind, distillation__augmentation=kind,
        synthesis__latent="meta", synthesis__latent_reset_every=2, distillation__average="ema",
    )  # fmt: skip
    students = []
    for noise, listener in ((1, None), (2, lambda _: None)):
        torch.manual_seed(noise)  # whatever the caller has drawn before, and whether or not somebody listens
        # A network with dropout draws while it learns, from torch's global state.
        students.append(run(student=net(1, dropout=0.3), config=settings, amp=amp, on_message=listener).student)
    assert same(*students)
    assert not torch.are_deterministic_algorithms_enabled()
    other = run(student=net(1, dropout=0.3), config=settings, amp=amp, overrides={"seed": 4}).student
    assert not same(students[0], other)


def test_a_student_from_scratch_follows_the_seed() -> None:
    def student(seed: int) -> nn.Module:
        settings = config(seed=seed, quality_images=0)
        return run(student="cifar/wrn10_1", config=settings).student  # type: ignore[arg-type]

    first = student(0)
    assert same(first, student(0))
    assert not same(first, student(1))


def test_the_callers_random_state_stays() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(student=net(1, dropout=0.5))
    assert torch.equal(torch.get_rng_state(), state)


# Budgets


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, (220, 20, 0, 120)),
        ({"schedule.rounds": 22}, (22, 2, 0, 12)),
        ({"rounds": 22}, (22, 2, 0, 12)),
        ({"schedule.rounds": 5}, (5, 0, 0, 2)),
        ({"schedule.rounds": 22, "schedule.warmup_rounds": 7}, (22, 7, 0, 12)),
        ({"schedule.rounds": 500, "schedule.warmup_rounds": 300}, (500, 300, 0, 272)),
        ({"schedule.rounds": 22, "synthesis.generator_reset_after": 3}, (22, 2, 0, 3)),
        ({"images": 2560}, (10, 0, 0, 5)),
        ({"images": 2560, "synthesis.batch_size": 128}, (20, 1, 0, 10)),
        ({"images": 1}, (1, 0, 0, 0)),
        ({"images": 2560, "schedule.batches_per_round": 5}, (2, 0, 0, 1)),
    ],
)
def test_budgets_keep_the_shares(overrides: dict[str, Any], expected: tuple[int, ...]) -> None:
    found = override(get_recipe("cifar10-wrn402-wrn162-k5").config(SIZE), overrides)
    schedule = found.schedule
    assert (
        schedule.rounds, schedule.warmup_rounds, schedule.final_rounds, found.synthesis.generator_reset_after
    ) == expected  # fmt: skip


@pytest.mark.parametrize("images", [1000, 3000, 10_000, 50_000, 140_000])
def test_a_budget_of_images_is_exact_with_final_rounds_too(images: int) -> None:
    found = override(get_recipe("imagenet-resnet50-resnet18-k50").config((3, 224, 224)), {"images": images})
    assert found.synthetic_images == images
    assert found.schedule.final_rounds / found.schedule.rounds == pytest.approx(260 / 400, abs=0.1)


@pytest.mark.parametrize("images", [1, 300, 1100, 56_320, 99_999])
def test_a_budget_of_images_is_kept_to_half_a_batch(images: int) -> None:
    found = override(get_recipe("auto").config(SIZE), {"images": images})
    assert abs(found.synthetic_images - max(images, 256)) <= 128


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"images": 0}, "images must be 1 or more, not 0"),
        ({"images": "many"}, "images must be 1 or more, not 'many'"),
        ({"images": 10, "rounds": 3}, "images and rounds set the same budget"),
        ({"rounds": 0}, "schedule.rounds must be greater than 0"),
        ({"schedule.rounds": "ten"}, "schedule.rounds must be a whole number"),
        ({"schedule.rounds": 10, "schedule.warmup_rounds": 10}, "less than schedule.rounds"),
        ({"schedule.runds": 10}, "Did you mean schedule.rounds"),
    ],
)
def test_budgets_that_make_no_sense(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override(RunConfig(), overrides)


def test_a_run_makes_exactly_what_it_was_asked_for() -> None:
    report = run(overrides={"images": 24}).report
    assert report["images"] == report["pool"] == 24
    assert report["config"]["schedule"]["rounds"] == 6
    assert report["kd_steps"] == 5 * 3


# What a run says


def test_progress_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("distillation", "evaluation"):
        monkeypatch.setattr(f"fastdfkd_cli.{engine}.RECORD_EVERY", 0.0, raising=engine == "distillation")
    records: list[Record] = []
    model = net(classes=10, size=(1, 8, 8))
    run(
        model, net(1, classes=10, size=(1, 8, 8)), teacher_options=ModelOptions(input_size=(1, 8, 8)),
        eval_dataset="builtin/digits", on_record=records.append, output=tmp_path / "out",
    )  # fmt: skip
    phases = list(dict.fromkeys(record.phase for record in records))
    assert phases == ["synthesis", "distillation", "quality", "evaluation"]
    for name in ("progress", "elapsed"):
        values = [getattr(record, name) for record in records]
        assert values == sorted(values), name
    assert records[-1].progress == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(records)
    assert [line["progress"] for line in lines] == [record.progress for record in records]
    assert {"loss", "agreement", "lr"} <= set(next(line for line in lines if line["phase"] == "distillation")["values"])


def test_messages_name_what_is_used() -> None:
    said: list[str] = []
    run(on_message=said.append)
    text = "\n".join(said)
    assert "teacher TinyNet" in text
    assert "student TinyNet" in text
    assert "float32" in text
    assert "16 images" in text
    assert all("\n" not in line for line in said)


# What a run leaves


def test_the_folder(tmp_path: Path) -> None:
    result = run(student="cifar/wrn10_1", output=tmp_path / "out")  # type: ignore[arg-type]
    folder = tmp_path / "out"
    assert result.path == folder
    names = {"README.md", "config.json", "metrics.jsonl", "model.safetensors", "report.json", "samples.png"}
    assert names <= {item.name for item in folder.iterdir()}
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    trained = result.student.state_dict()
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name]) for name in stored)
    report = json.loads((folder / "report.json").read_text())
    assert report["export"]["largest_logit_difference"] <= 1e-6
    assert report["images"] == 16
    assert report["kd_steps"] == 9
    assert report["config"]["synthesis"]["steps"] == 2
    assert report["evaluation"] is None
    assert 0 <= report["quality"]["agreement"] <= 1
    seconds = report["seconds"]
    parts = seconds["synthesis"] + seconds["distillation"] + seconds["other"]
    assert parts == pytest.approx(seconds["total"], abs=0.03)
    assert seconds["synthesis"] > 0
    assert report["peak_memory_bytes"] > 0
    assert report["versions"]["torch"]
    config_json = json.loads((folder / "config.json").read_text())
    assert config_json["architecture"] == "fastdfkd_wrn10_1"


def test_the_last_student_is_exported_not_the_one_before_averaging(tmp_path: Path) -> None:
    result = run(config=config(distillation__average="ema"), output=tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["conv1.weight"], result.student.state_dict()["conv1.weight"])
    assert not torch.equal(stored["conv1.weight"], run().student.state_dict()["conv1.weight"])


@pytest.mark.parametrize("when", ["synthesis", "export", "interrupt"])
def test_a_run_that_fails_leaves_nothing_behind(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if when == "interrupt" else FastDFKDError("no more")

    if when == "export":
        monkeypatch.setattr(distill_report, "verify_export", fail)
    else:
        monkeypatch.setattr(FastMeta, "synthesize", fail)
    model = net()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt if when == "interrupt" else FastDFKDError) as error:
        run(model, output=tmp_path / "out")
    if when == "export":  # what was trained is not lost
        assert "The last checkpoint is kept in" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
        return
    assert list(tmp_path.iterdir()) == []
    assert_same_state(before, state_of(model))


def test_a_failed_evaluation_does_not_lose_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UnavailableError("5.png cannot be read.")

    monkeypatch.setattr(api, "judged", fail)
    with pytest.raises(UnavailableError, match=r"5\.png cannot be read\. The student itself is whole, in"):
        run(output=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["evaluation"] is None
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 0


def test_a_teacher_with_one_output_is_refused() -> None:
    with pytest.raises(UsageError, match="one output"):
        distill(TinyNet(classes=1), net(), teacher_options=ModelOptions(input_size=SIZE), config=config())


def test_a_student_that_diverges_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(FastDFKDError, match=r"finite.*distillation.lr"):
        run(config=config(distillation__lr=1e30, schedule__rounds=8), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastMeta, "synthesize", lambda *_: pytest.fail("work was done"))
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="overwrite|empty"):
        run(output=tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    run(output=tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(UsageError):
        run(output=tmp_path / "out", overrides={"seed": 1})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first
    run(output=tmp_path / "out", overrides={"seed": 1}, overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first


# Images made earlier


def test_one_set_serves_a_student_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call: Call = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False}
    made = synthesize(net(), num_images=12, output=tmp_path / "set", **call)
    assert made.path == tmp_path / "set"
    assert made.manifest["complete"]
    monkeypatch.setattr("fastdfkd_cli.distill_run.build_method", lambda *_, **__: pytest.fail("images were made"))
    settings = config(quality_images=0)
    students = [run(config=settings, data_dir=tmp_path / "set", output=tmp_path / str(i)) for i in range(2)]
    report = students[0].report
    assert report["images"] == report["pool"] == 12
    assert report["kd_steps"] == 4 * 3  # nothing to warm up: every round distils
    assert report["data"]["synthetic"]
    assert report["data"]["header"]["teacher"]["num_classes"] == CLASSES
    assert report["seconds"]["synthesis"] == 0
    assert report["quality"] is None
    assert same(students[0].student, students[1].student)
    assert not same(students[0].student, net(1))
    # Without synthesis, a teacher needs no BatchNorm.
    run(net(norm=False), config=settings, data_dir=tmp_path / "set")


def test_a_set_of_another_teacher_is_refused(tmp_path: Path) -> None:
    call: Call = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False}
    synthesize(net(), num_images=8, output=tmp_path / "set", **call)
    with pytest.raises(UsageError, match="4 classes and the teacher TinyNet 5"):
        run(net(classes=5), net(1, classes=5), data_dir=tmp_path / "set")


# Real images


def test_evaluation_data_is_looked_at_once_and_reported() -> None:
    size = (1, 8, 8)
    options = ModelOptions(input_size=size)
    report = run(
        net(classes=10, size=size), net(1, classes=10, size=size), teacher_options=options,
        eval_dataset="builtin/digits",
    ).report  # fmt: skip
    row = report["evaluation"]
    assert 0 <= row["top1"] <= 100
    assert "teacher_top1" in row or "agreement" in json.dumps(row)
    with pytest.raises(FastDFKDError):
        run(eval_dataset="builtin/nothing")


def test_evaluation_data_of_other_classes_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastMeta, "synthesize", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="10"):
        run(eval_dataset="builtin/digits")


def test_evaluate_leaves_a_module_as_it_was() -> None:
    model = net(classes=10, size=(1, 8, 8)).train()
    before = state_of(model)
    row = evaluate(model, dataset="builtin/digits", options=ModelOptions(input_size=(1, 8, 8)), device="cpu")
    assert 0 <= row["top1"] <= 100
    assert_same_state(before, state_of(model))


# Plans


def test_a_plan_writes_and_changes_nothing(tmp_path: Path) -> None:
    model, student = net(), net(1)
    before = state_of(model), {name: tensor.clone() for name, tensor in student.state_dict().items()}
    call: Call = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False}
    plan = plan_distill(model, student, output=tmp_path / "a" / "b", overrides={"images": 24}, **call)
    made = plan_synthesize(model, num_images=10, output=tmp_path / "c", shard_size=4, **call)
    assert list(tmp_path.iterdir()) == []
    assert_same_state(before[0], state_of(model))
    assert all(torch.equal(before[1][name], tensor) for name, tensor in student.state_dict().items())
    assert plan["synthetic_images"] == 24
    assert plan["kd_steps"] == 15
    assert plan["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert plan["disk_free_bytes"] > 0
    assert made["synthetic_images"] == 10
    assert made["shards"] == 3
    json.dumps([plan, made])
    run(model, student, overrides={"images": 24})  # what was planned can be done


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    call: Call = {"teacher_options": FED, "config": config(), "amp": False}
    with pytest.raises(UsageError, match="num_images must be 1 or more, not 0"):
        synthesize(net(), num_images=0, output=tmp_path / "set", **call)
    with pytest.raises(UsageError, match="exclude each other"):
        synthesize(net(), num_images=1, output=tmp_path / "set", resume=True, overwrite=True, **call)
    with pytest.raises(UsageError, match="Did you mean smoke"):
        distill("timm/resnet18", "timm/resnet18", recipe="smoek")
    with pytest.raises(UsageError, match="nine"):
        run(device="nine")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_by_name_runs_a_module() -> None:
    result = run(config=None, recipe="smoke", overrides={"rounds": 3, "quality_images": 4, "synthesis.batch_size": 4})
    assert result.report["config"]["recipe"] == "smoke"
    assert result.report["images"] == 12
    assert all(math.isfinite(p.abs().sum().item()) for p in result.student.parameters())


def test_a_module_is_given_with_what_it_is_fed() -> None:
    with pytest.raises(UsageError, match="input_size"):
        distill(TinyNet(), TinyNet(), config=config())
    assert run(teacher_options=ModelOptions(input_size=SIZE, num_classes=CLASSES)).report["teacher"]["num_classes"] == 4
