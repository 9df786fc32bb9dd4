"""What the benchmarks compare with is the same computation: in float32, our results are the plain version's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plain
from fastdfkd_cli.config import GeneratorConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.generators import Generator
from fastdfkd_cli.methods import build_method
from tiny import CLASSES, SIZE, config, net, teacher

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"image_size": SIZE, "num_classes": CLASSES, "device": CPU}


@pytest.mark.parametrize("kind", ["linear", "map"])
def test_the_two_generators_are_one_function(kind: str) -> None:
    settings = GeneratorConfig(kind=kind, latent_dim=5, width=6, upsamplings=2)  # type: ignore[arg-type]
    ours, theirs = Generator(settings, (3, 9, 13)), plain.PlainGenerator(settings, (3, 9, 13))
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        target.data.copy_(source.data)
    z = torch.randn(4, *ours.latent_shape)
    assert torch.allclose(ours(z), theirs(z), atol=1e-6)


@pytest.mark.parametrize("with_student", [False, True])
@pytest.mark.parametrize("meta_gradient", ["fomaml", "reptile"])
@pytest.mark.parametrize("adversarial", ["jsd", "agreement-kl"])
def test_in_float32_a_batch_is_the_plain_versions(meta_gradient: str, adversarial: str, with_student: bool) -> None:
    settings = config(
        synthesis__meta_gradient=meta_gradient, synthesis__adversarial=adversarial, synthesis__steps=3,
        synthesis__batch_size=8, synthesis__lr_generator=1e-3,
    )  # fmt: skip
    ours = build_method(settings, teacher(), amp=False, **SHAPE)
    theirs = plain.PlainSynthesizer(settings, teacher(), **SHAPE)
    student = net(1) if with_student else None
    for _ in range(3):
        batch = ours.synthesize(student)
        images, labels, terms = theirs.synthesize(student)
        assert torch.equal(batch.labels, labels)
        assert (batch.images.int() - images.int()).abs().max() <= 1
        assert batch.losses.keys() == terms.keys()
        for name, value in terms.items():
            assert batch.losses[name].item() == pytest.approx(value, rel=1e-3, abs=1e-5)
    state = ours.state_dict()
    for name, parameter in theirs.generator.named_parameters():
        if name.startswith("stem"):  # the body's layers are numbered otherwise
            assert torch.allclose(state[f"shared.{name}"], parameter, rtol=1e-3, atol=1e-4)
    ours.close()
    theirs.close()


def test_in_float32_a_run_is_the_plain_versions() -> None:
    settings = config(synthesis__batch_size=8, distillation__batch_size=8, distillation__lr=0.02, seed=3)
    ours, theirs = net(1), net(1)
    method = build_method(settings, teacher(), amp=False, **SHAPE)
    for _ in Distillation(settings, teacher(), ours, synthesizer=method, image_size=SIZE, device=CPU, amp=False):
        pass
    rounds = list(plain.distill(settings, teacher(), theirs, **SHAPE))
    assert [index for index, _ in rounds] == [0, 1, 2, 3]
    start = net(1)
    for name, value in ours.named_parameters():
        moved = (value - start.get_parameter(name)).norm()
        assert moved > 0
        assert (value - theirs.get_parameter(name)).norm() < 0.02 * moved, name


def test_a_pool_of_files_gives_the_images_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    pool = plain.FolderPool(tmp_path / "pool", batch_size=5)
    pool.add(images)
    assert len(list(tmp_path.rglob("*.png"))) == 10
    monkeypatch.setattr(plain, "WORKERS", 0)
    batch = next(pool.batches())
    assert batch.shape == (5, 3, 8, 8)
    assert 0 <= batch.min() < batch.max() <= 1


def test_the_plain_student_wastes_what_the_published_one_wastes() -> None:
    model: nn.Module = teacher()
    synthesizer = plain.PlainSynthesizer(config(), model, **SHAPE)
    synthesizer.synthesize()
    assert all(parameter.grad is not None for parameter in synthesizer.teacher.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
