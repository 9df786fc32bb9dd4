"""What only a CUDA device can show: graphs, compilation, copies that nobody waits for. Skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastdfkd_cli import api, stopping
from fastdfkd_cli.acceleration import EAGER, WARM_UP, Acceleration
from fastdfkd_cli.background import HostCopy
from fastdfkd_cli.config import DistillationConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.stopping import Stopped
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, config, net, teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
FORM: dict[str, Any] = {"device": CUDA, "memory_format": torch.channels_last}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"synthesis__meta_gradient": "reptile", "synthesis__latent": "meta", "synthesis__latent_reset_every": 3},
    {"synthesis__reuse": "none", "synthesis__adversarial": "jsd"},
    {"synthesis__images": "pixel", "synthesis__augmentation": "none"},
]


def method(how: Acceleration = EAGER, amp: bool = False, **changes: Any) -> FastMeta:
    made = build_method(
        config(**changes), teacher().to(**FORM), image_size=SIZE, num_classes=CLASSES, device=CUDA, amp=amp,
        acceleration=how,
    )  # fmt: skip
    assert isinstance(made, FastMeta)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("amp", [False, True])
def test_a_graph_s_batches_are_the_batches(variant: dict[str, Any], amp: bool) -> None:
    said: list[str] = []
    student = net(1).to(**FORM)
    plain, replayed = method(amp=amp, **variant), method(Acceleration(graphs=True, say=said.append), amp=amp, **variant)
    for index in range(2 * (WARM_UP + 3)):
        current = student if index >= WARM_UP + 3 else None
        one, other = plain.synthesize(current), replayed.synthesize(current)
        assert torch.equal(one.labels, other.labels)
        assert (one.images.int() - other.images.int()).abs().float().mean() < 2
    assert replayed._run.replays, said


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_a_graph_s_kd_steps_are_the_steps(kept: bool, amp: bool) -> None:
    said: list[str] = []
    model = teacher().to(**FORM)
    plain = Student(net(1).to(**FORM), DistillationConfig(lr=0.1), CUDA, amp)
    replayed = Student(
        net(1).to(**FORM), DistillationConfig(lr=0.1), CUDA, amp, Acceleration(graphs=True, say=said.append)
    )
    for step in range(WARM_UP + 5):
        images = torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8, device=CUDA)
        with torch.no_grad():
            asked = model(images / 255) if kept else model
        losses = []
        for student in (plain, replayed):
            student.set_learning_rate(step / 10)
            losses.append(student.learn(asked, images, step)[0].item())
        assert losses[0] == pytest.approx(losses[1], rel=0.1 if amp else 1e-3)
    assert not said
    for (name, one), other in zip(plain.net.state_dict().items(), replayed.net.state_dict().values(), strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-1 if amp else 1e-2, atol=1e-2 if amp else 1e-4), name


def test_compiled_passes_on_the_device() -> None:
    said: list[str] = []
    student = net(1).to(**FORM)
    plain, compiled = method(), method(Acceleration(compile=True, say=said.append))
    compiled.prepare(student)
    assert len(said) == 2
    assert all("compiled in" in line for line in said), said
    one, other = plain.synthesize(student), compiled.synthesize(student)
    assert (one.images.int() - other.images.int()).abs().float().mean() < 2


def test_copies_are_those_of_the_moment() -> None:
    source = torch.arange(2**20, device=CUDA)
    copies = []
    for _ in range(20):
        copies.append((HostCopy.of(source), len(copies)))
        source += 1
    for copy, offset in copies:
        assert torch.equal(copy.wait()[0], torch.arange(2**20) + offset)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_stopped_run_goes_on_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool) -> None:
    request: dict[str, Any] = {
        "teacher_options": ModelOptions(input_size=SIZE, num_classes=CLASSES), "device": "cuda", "graphs": graphs,
        "config": config(schedule__kd_steps_per_round=8), "output": tmp_path / "s",
    }  # fmt: skip
    step, seen = Distillation.kd_step, 0

    def kd_step(self: Distillation) -> None:
        nonlocal seen
        seen += 1
        if seen == 9:
            stopping.ask(15)
        step(self)

    monkeypatch.setattr(Distillation, "kd_step", kd_step)
    with pytest.raises(Stopped):
        api.distill(teacher(), net(1), **request)
    result = api.distill(teacher(), net(2), **request, resume="auto")
    assert result.report["kd_steps"] == 24
    assert (tmp_path / "s" / "model.safetensors").exists()
