"""What the benchmarks compare with is the same computation: in float32, our results are the plain version's."""

from __future__ import annotations

import mmap
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import contestants
import measure
import plain
import speed
from contestants import Setup, contestant
from fastdfkd_cli.config import GeneratorConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import UsageError
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


# How speed is measured


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(plain, "WORKERS", 0)
    monkeypatch.setattr(contestants, "tune_process", lambda: None)  # it would hold for all tests
    overrides = {"synthesis.batch_size": 8, "synthesis.steps": 2, "distillation.batch_size": 8, "generator.width": 8}
    return Setup(
        teacher="builtin/digits", student="cifar/wrn10_1", recipe="digits", device="cpu", overrides=overrides,
        pool_images=24, folder=tmp_path / "pool",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "float32"])
def test_both_sides_make_batches_into_a_pool_that_keeps_its_size(name: str, setup: Setup) -> None:
    side = contestant(name, setup)
    side.fill()
    before = next(side.student.parameters()).clone()
    assert side.synthesize(batches=2) > 0
    taken = side.distil(steps=4)  # more than the pool's 3 batches: the loader begins anew
    assert taken["seconds"] > taken["loader"] >= 0
    assert not torch.equal(before, next(side.student.parameters()))
    held = len(list(setup.folder.iterdir())) if name == "plain" else len(side.run.pool)
    assert held == 24
    assert side.describe()["precision"] == "float32"


def test_operations_grow_with_what_is_computed(setup: Setup) -> None:
    ours, theirs = contestant("float32", setup).flops(), contestant("plain", setup).flops()
    # Weight gradients of the teacher that nobody uses, and convolutions of doubled maps.
    assert 1.2 * ours["inner_step"] < theirs["inner_step"]
    assert ours["kd_step"] == theirs["kd_step"] > 0


def test_a_matrix_product_is_counted_and_a_peak_is_the_fastest() -> None:
    a = torch.ones(3, 5)
    assert measure.flops(lambda: a @ a.T) == 2 * 3 * 5 * 3
    assert measure.best_peaks({"x": 1.0, "y": 2.5}, {"x": 3.0, "y": 1.0}) == {"x": 3.0, "y": 2.5}
    assert measure.spread([4.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_memory_that_was_taken_and_given_back_is_seen() -> None:
    growth = measure.MemoryGrowth(CPU)
    with mmap.mmap(-1, 64 * 2**20) as fresh:  # no allocator can have it at hand
        fresh.write(b"1" * 2**20 * 64)
    assert growth.read()["growth_bytes"] > 60 * 2**20
    assert measure.MemoryGrowth(CPU).read()["growth_bytes"] < 20 * 2**20  # what was there before is not seen


def test_the_published_pool_costs_what_its_bytes_cost(setup: Setup) -> None:
    found = contestant("pool", setup).memory(images=20_000, batch=256)
    assert found["payload_bytes"] == 20_000 * 3 * 32 * 32
    assert found["growth_bytes"] < 1.1 * found["payload_bytes"]


def test_ratios_are_taken_turn_by_turn() -> None:
    seconds = {"synthesis": [4.0, 10.0, 6.0], "kd": [1.0, 1.0, 1.0], "kd_without_loader": [0.5, 0.5, 0.5]}
    ours = {"synthesis": [1.0, 5.0, 2.0], "kd": [0.5, 0.5, 0.5], "kd_without_loader": [0.5, 0.5, 0.5]}
    found = speed.ratios({"plain": seconds, "ours": ours}, "ours")
    assert found["synthesis"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert found["kd"]["median"] == 2.0
    assert found["kd_without_loader"]["median"] == 1.0


def test_a_published_run_keeps_its_recipe_unless_something_is_asked_for(tmp_path: Path) -> None:
    assert speed.setup_of(speed.parse(["--published"]), tmp_path).overrides == {}
    asked = speed.setup_of(speed.parse(["--published", "--steps", "2"]), tmp_path)
    assert asked.overrides == {"synthesis.steps": 2}
    # What a figure is computed from is always stated.
    large = speed.setup_of(speed.parse(["--large"]), tmp_path).overrides
    assert (large["synthesis.batch_size"], large["synthesis.steps"]) == (100, 50)


def test_a_random_teacher_gives_finite_logits(setup: Setup) -> None:
    random = replace(setup, teacher="random:fastdfkd_wrn16_1", recipe="smoke", num_classes=5)
    side = contestant("float32", random)
    logits = side.teacher(torch.rand(4, 3, 32, 32))
    assert logits.shape == (4, 5)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_a_side_that_cannot_start_says_why_in_the_process_that_asked(setup: Setup) -> None:
    here, there = Pipe()
    contestants._serve(there, "ours", replace(setup, recipe="quik"))
    with pytest.raises(UsageError, match="Did you mean quick"):
        raise here.recv()
