"""Graphs and compilation: the same results, the rules of a recording, and the way back where one cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fastdfkd_cli import acceleration, api, distill_run, distillation, job
from fastdfkd_cli.acceleration import EAGER, WARM_UP, Acceleration, Captured, require_compiler, to_device
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import DistillationConfig, RunConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import micro_batch_for
from fastdfkd_cli.labels import soft_labels
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.base import SyntheticBatch
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.student import Student
from recording import TapedRecording
from tiny import CLASSES, SIZE, config, net, teacher

CPU = torch.device("cpu")


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[TapedRecording]:
    """Recordings on the CPU, in the order in which they were made."""
    made: list[TapedRecording] = []

    def recorder(_: Captured[Any]) -> TapedRecording:
        tape = TapedRecording()
        made.append(tape)
        return tape

    monkeypatch.setattr(Captured, "_recorder", recorder)
    return made


def method(settings: RunConfig, how: Acceleration = EAGER, model: nn.Module | None = None) -> FastMeta:
    found = build_method(
        settings, model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, acceleration=how
    )
    assert isinstance(found, FastMeta)
    return found


# A recording


def test_the_first_calls_run_as_they_are_and_the_others_are_replayed(tapes: list[TapedRecording]) -> None:
    calls = []
    x, total = torch.zeros(3), torch.zeros(3)

    def function() -> Tensor:
        calls.append(1)
        total.add_(x)
        return total * 2

    captured = Captured(function, "adding")
    results = []
    for value in range(7):
        x.fill_(value)
        results.append(captured().clone())
    assert [int(r[0]) for r in results] == [2 * sum(range(value + 1)) for value in range(7)]
    assert len(calls) == WARM_UP + 1  # the last of them recorded
    assert captured.replays
    assert tapes[-1].replays == 7 - WARM_UP


def test_without_it_a_function_is_called_as_it_is(tapes: list[TapedRecording]) -> None:
    captured = EAGER.captured(lambda: torch.ones(1), "one")
    for _ in range(WARM_UP + 3):
        captured()
    assert not captured.replays
    assert not tapes


@pytest.mark.parametrize("question", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.sum() > 0)])
def test_what_cannot_be_recorded_runs_as_it_is_and_is_said(tapes: list[TapedRecording], question: Any) -> None:
    said: list[str] = []
    x, total = torch.ones(2), torch.zeros(2)

    def function() -> Tensor:
        total.add_(x)
        question(x)
        return total

    captured = Acceleration(graphs=True, say=said.append).captured(function, "asking")
    for _ in range(6):
        captured()
    assert not captured.replays
    assert len(said) == 1
    assert said[0].startswith("asking cannot be captured as a CUDA graph and runs kernel by kernel (operation not")


# A whole batch of the method


def run(found: FastMeta, students: list[nn.Module | None]) -> tuple[list[SyntheticBatch], list[Tensor]]:
    batches = [found.synthesize(student) for student in students]
    return batches, [p.detach().clone() for p in found.shared.parameters()]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"synthesis__meta_gradient": "reptile", "synthesis__latent": "meta", "synthesis__latent_reset_every": 3},
    {"synthesis__reuse": "sequential", "synthesis__keep": "last"},
    {"synthesis__reuse": "none", "synthesis__adversarial": "jsd"},
    {"synthesis__images": "pixel", "synthesis__augmentation": "none"},
    {"synthesis__feature_weight": 0, "synthesis__augmentation": "resized-crop-flip"},
    {"generator__kind": "map", "synthesis__feature_momentum": 0},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_batches_are_the_batches(tapes: list[TapedRecording], variant: dict[str, Any]) -> None:
    settings = config(**variant)
    student = net(1)
    # Warm-up rounds without a student, then the others with one, which is trained meanwhile.
    students: list[nn.Module | None] = [None] * 6 + [student] * 6
    plain = method(settings)
    replayed = method(settings, Acceleration(graphs=True))
    expected = []
    for current in students:
        expected.append(plain.synthesize(current))
        _train(student)
    student.load_state_dict(net(1).state_dict())
    found = []
    for current in students:
        found.append(replayed.synthesize(current))
        _train(student)
    assert [tape.replays for tape in tapes if tape.replays] == [6 - WARM_UP] * 2
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert {k: v.item() for k, v in one.losses.items()} == {k: v.item() for k, v in other.losses.items()}
    assert len({batch.images.sum().item() for batch in found}) == 12
    state, replayed_state = plain.state_dict(), replayed.state_dict()
    assert state.keys() == replayed_state.keys()
    assert all(torch.equal(state[name], replayed_state[name]) for name in state)


def _train(student: nn.Module) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.99)


def test_a_state_taken_up_is_not_replayed_from_an_earlier_recording(tapes: list[TapedRecording]) -> None:
    settings = config()
    plain = method(settings)
    for _ in range(2):
        plain.synthesize()
    state = plain.state_dict()
    replayed = method(settings, Acceleration(graphs=True))
    for _ in range(WARM_UP + 2):
        replayed.synthesize()
    replayed.load_state_dict(state)
    for _ in range(WARM_UP + 2):
        assert torch.equal(plain.synthesize().images, replayed.synthesize().images)


# KD steps


def labels_of(model: nn.Module, images: Tensor) -> Tensor:
    return soft_labels(model, to_float(images), amp=False)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("average", ["none", "ema"])
def test_replayed_kd_steps_are_the_steps(tapes: list[TapedRecording], kept: bool, average: Any) -> None:
    model, settings = teacher(), DistillationConfig(lr=0.1, average=average)
    plain = Student(net(1), settings, CPU, False)
    replayed = Student(net(1), settings, CPU, False, Acceleration(graphs=True))
    for step in range(8):
        images = torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8)
        asked = labels_of(model, images) if kept else model
        figures = []
        for student in (plain, replayed):
            student.set_learning_rate(step / 8)
            figures.append([value.item() for value in student.learn(asked, images, step)])
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert [tape.replays for tape in tapes if tape.replays] == [8 - WARM_UP]
    for student in (plain, replayed):
        student.finish()
    for (name, one), other in zip(plain.net.state_dict().items(), replayed.net.state_dict().values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name


def test_a_batch_of_another_kind_is_recorded_anew(tapes: list[TapedRecording]) -> None:
    model = teacher()
    plain = Student(net(1), DistillationConfig(), CPU, False)
    replayed = Student(net(1), DistillationConfig(), CPU, False, Acceleration(graphs=True))
    for count, kept in [(6, False)] * 5 + [(4, False)] * 5 + [(4, True)] * 5:
        images = torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8)
        asked = labels_of(model, images) if kept else model
        one, other = (student.learn(asked, images, 0)[0].item() for student in (plain, replayed))
        assert one == pytest.approx(other, rel=1e-5)
    assert [tape.replays for tape in tapes if tape.replays] == [5 - WARM_UP] * 3


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
@pytest.mark.parametrize("graphs", [False, True])
def test_timing_a_step_changes_nothing(
    tapes: list[TapedRecording], monkeypatch: pytest.MonkeyPatch, augmentation: str, graphs: bool
) -> None:
    monkeypatch.setattr(distillation, "RECORD_EVERY", 0.0)
    settings = config(
        distillation__augmentation=augmentation, distillation__average="ema", schedule__kd_steps_per_round=8
    )
    found = []
    for timed in (False, True):
        model, pupil = teacher(), net(1, dropout=0.0 if graphs else 0.5)
        made = method(settings, model=model)
        run = Distillation(
            settings, model, pupil, synthesizer=made, image_size=SIZE, device=CPU, amp=False,
            acceleration=Acceleration(graphs=graphs),
        )  # fmt: skip
        torch.manual_seed(0)
        for record in run:
            if timed and record.phase == "distillation" and record.step in (2, 11):
                assert run.time_kd_step() > 0
        made.close()
        found.append({name: tensor.clone() for name, tensor in pupil.state_dict().items()})
    assert any(tape.replays for tape in tapes) == graphs
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-5, atol=1e-6), name


# Micro-batches


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[1], VARIANTS[4], VARIANTS[5], VARIANTS[6]])
@pytest.mark.parametrize("with_student", [False, True])
def test_micro_batches_come_to_the_same(size: int, variant: dict[str, Any], with_student: bool) -> None:
    settings = config(**variant, synthesis__batch_size=6)
    student = net(1) if with_student else None
    whole, parts = method(settings), method(settings, Acceleration(micro_batch=size))
    for _ in range(3):
        one, other = whole.synthesize(student), parts.synthesize(student)
        assert (one.images.int() - other.images.int()).abs().max() <= 1
        assert one.losses.keys() == other.losses.keys()
        for name, value in one.losses.items():
            assert other.losses[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    for a, b in zip(whole.shared.parameters(), parts.shared.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-4)


def test_the_gradients_of_micro_batches_are_those_of_the_batch() -> None:
    settings = config(synthesis__batch_size=6)
    student = net(1).eval().requires_grad_(False)
    found = []
    for size in (0, 4):
        made = method(settings, Acceleration(micro_batch=size))
        made.synthesize(student)  # Eq. 14's statistics are there from now on
        made._draw()
        made._descend(made.draws[0], student)
        found.append([made.z.grad, *(parameter.grad for parameter in made.adapted.parameters())])
    for whole, parts in zip(*found, strict=True):
        assert whole is not None
        assert parts is not None
        assert (whole - parts).norm() <= 1e-3 * whole.norm() + 1e-7


def test_teacher_and_student_see_a_micro_batch_at_a_time() -> None:
    found, student = method(config(synthesis__batch_size=10), Acceleration(micro_batch=4)), net(1)
    seen: dict[str, list[int]] = {"teacher": [], "student": []}
    found.teacher.register_forward_hook(lambda _, args, __: seen["teacher"].append(len(args[0])))
    student.register_forward_hook(lambda _, args, __: seen["student"].append(len(args[0])))
    found.synthesize(student)
    # The teacher twice: for the statistics of the whole batch, and for their gradient.
    assert seen == {"teacher": [4, 4, 2] * 4, "student": [4, 4, 2] * 2}


@pytest.mark.parametrize(
    ("needed", "available", "expected"), [(70, 100, 0), (100, 100, 8), (1000, 100, 1), (81, 100, 9)]
)
def test_micro_batches_are_as_large_as_memory_allows(needed: float, available: float, expected: int) -> None:
    assert micro_batch_for(needed, available, 10) == expected


def test_a_run_in_too_little_memory_is_split_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "micro_batch_for", lambda *_: 2)
    options = ModelOptions(input_size=SIZE, num_classes=CLASSES)
    said: list[str] = []
    keywords: dict[str, Any] = {"teacher_options": options, "device": "cpu", "amp": False}
    whole = api.distill(teacher(), net(1), config=config(), **keywords)
    parts = api.distill(teacher(), net(1), config=config(), on_message=said.append, **keywords)
    assert any("teacher and student see 2 images at a time in synthesis" in line for line in said)
    assert parts.report["images"] == whole.report["images"]


def test_a_set_is_gone_on_with_in_the_parts_it_was_begun_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make(name: str, images: int, size: int, resume: bool = False) -> dict[str, Any]:
        monkeypatch.setattr(job, "micro_batch_for", lambda *_: size)
        return api.synthesize(
            teacher(), teacher_options=ModelOptions(input_size=SIZE, num_classes=CLASSES), config=config(),
            num_images=images, shard_size=8, output=tmp_path / name, resume=resume, device="cpu", amp=False,
            on_message=lambda _: None,
        ).manifest  # fmt: skip

    make("parts", 8, 2)
    parts, whole = make("parts", 24, 0, resume=True), make("whole", 24, 2)
    assert parts["header"]["micro_batch"] == 2
    assert parts["shards"] == whole["shards"]
    assert "micro_batch" not in make("unsplit", 8, 0)["header"]


# Checkpoints in a student


class Kept:
    """Bytes that autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_student_in_parts_learns_the_same_and_keeps_less(momentum: float | None) -> None:
    results, kept = [], []
    for how in (EAGER, Acceleration(checkpoint=True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            learner = timm.create_model("resnet10t", num_classes=CLASSES, drop_rate=0.3)
            for layer in batch_norm_layers(learner).values():
                layer.momentum = momentum  # type: ignore[assignment]
            student, model = Student(learner, DistillationConfig(lr=0.01), CPU, False, how), teacher()
            found = Kept()
            with torch.autograd.graph.saved_tensors_hooks(found, lambda tensor: tensor):
                for step in range(2):
                    student.learn(model, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), step)
        results.append(learner.state_dict())
        kept.append(found.bytes)
        assert {layer.momentum for layer in batch_norm_layers(learner).values()} == {momentum}
        assert not any(getattr(module, "grad_checkpointing", False) for module in learner.modules())
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize(
    ("name", "said"),
    [("resnet10t", "the student keeps few activations"), ("cifar/wrn10_1", "cifar/wrn10_1 cannot be cut into parts")],
)
def test_a_kd_step_in_too_little_memory_is_cut_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    plan_of = distill_run.plan_of
    monkeypatch.setattr(distill_run, "plan_of", lambda *given: {**plan_of(*given), "distillation_memory_bytes": 2**50})
    seen: list[Acceleration] = []
    learn = Student.learn
    monkeypatch.setattr(Student, "learn", lambda self, *given: (seen.append(self.acceleration), learn(self, *given))[1])
    lines: list[str] = []
    api.distill(
        teacher(), name, teacher_options=ModelOptions(input_size=SIZE, num_classes=CLASSES), config=config(),
        device="cpu", amp=False, on_message=lines.append,
    )  # fmt: skip
    assert any(said in line for line in lines), lines
    assert seen[-1].checkpoint == (name == "resnet10t")
    assert seen[-1].micro_batch == 0


def test_graphs_want_a_cuda_device() -> None:
    with pytest.raises(UsageError, match="--graphs needs a CUDA device"):
        api.distill(
            teacher(), net(1), teacher_options=ModelOptions(input_size=SIZE, num_classes=CLASSES), config=config(),
            device="cpu", graphs=True,
        )  # fmt: skip


# Compilation


def test_no_compiler_is_said_and_the_function_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    said: list[str] = []

    def double(x: Tensor) -> Tensor:
        return 2 * x

    how = Acceleration(compile=True, say=said.append)
    assert how.compiled(double, "doubling", torch.ones(1)) is double
    assert said == ["doubling cannot be compiled and runs as it is (no C++ compiler: g++ is not installed)"]
    monkeypatch.setenv("CXX", "my-compiler")
    with pytest.raises(RuntimeError, match="my-compiler is not installed"):
        require_compiler()


def test_what_a_compiler_cannot_do_is_said_and_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def failing(*_: Any, **__: Any) -> Any:
        def raising(*_: Tensor) -> Tensor:
            raise NotImplementedError("no lowering for this\nand a long story")

        return raising

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(acceleration, "require_compiler", lambda: None)
    found = method(config(), Acceleration(compile=True, say=said.append))
    student = net(1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found.prepare(student)
    assert len(said) == 2
    assert said[0] == "the teacher's pass in synthesis cannot be compiled and runs as it is (no lowering for this)"
    plain = method(config())
    assert torch.equal(found.synthesize(student).images, plain.synthesize(student).images)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_a_trial_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(acceleration, "require_compiler", lambda: None)
    model = net(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.rand(4, *SIZE)
    random = torch.get_rng_state()
    Acceleration(compile=True).compiled(model, "training", x, modules=[model])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_batches_are_the_batches_within_rounding() -> None:
    settings = config(synthesis__steps=2)
    student, said = net(1), []
    plain, compiled = method(settings), method(settings, Acceleration(compile=True, say=said.append))
    compiled.prepare(student)
    assert all("compiled in" in line for line in said), said
    assert len(said) == 2
    for current in (None, student, student):
        one, other = plain.synthesize(current), compiled.synthesize(current)
        assert (one.images.int() - other.images.int()).abs().max() <= 2
        for name, value in one.losses.items():
            assert other.losses[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
def test_a_compiled_run_is_the_run_within_rounding() -> None:
    found = []
    for how in (EAGER, Acceleration(compile=True, say=(said := []).append)):
        settings, model, pupil = config(), teacher(), net(1)
        made = method(settings, model=model)
        run = Distillation(
            settings, model, pupil, synthesizer=made, image_size=SIZE, device=CPU, amp=False, acceleration=how
        )
        run.prepare()
        list(run)
        made.close()
        found.append(pupil.state_dict())
    assert [line.split(" compiled in")[0] for line in said] == [
        "the student's pass in distillation",
        "the teacher's pass in distillation",
    ]
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-3, atol=1e-4), name


def test_tensors_stay_where_they_are_on_one_device() -> None:
    x = torch.ones(2)
    assert to_device(x, CPU) is x
