"""Generative DFD: its loss, one generator for each class, and where they are kept."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api
from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import GenerativeDFDConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.generative_dfd import GenerativeDFD
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, config, net, state_of, teacher

CPU = torch.device("cpu")


def settings(**changes: Any) -> RunConfig:
    small = {"method": "generative-dfd", "synthesis.batch_size": 6, "synthesis.steps": 2}
    return from_dict({**small, **{key.replace("__", "."): value for key, value in changes.items()}}, base=config())


MADE: list[GenerativeDFD] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Take every method's folder away."""
    yield
    while MADE:
        MADE.pop().close()


def method(run: RunConfig | None = None, seed: int = 0, **keywords: Any) -> GenerativeDFD:
    made = build_method(
        run or settings(), teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed, **keywords
    )
    assert isinstance(made, GenerativeDFD)
    MADE.append(made)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_the_loss_is_feature_statistics_and_class() -> None:
    """In float64, and its gradient in the images."""
    model = teacher().double()
    images = torch.rand(6, *SIZE, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    with torch.enable_grad():
        first = model.conv1(images)
        second = model.conv2(torch.relu(model.bn1(first)))
        answers = model.fc(torch.relu(model.bn2(second)).mean((2, 3)))
        wanted = -3 * answers.log_softmax(1)[:, 2].mean()
        for norm, x in ((model.bn1, first), (model.bn2, second)):
            wanted = wanted + 7 * (x.mean((0, 2, 3)) - norm.running_mean).norm()
            wanted = wanted + 7 * (x.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
        (gradient,) = torch.autograd.grad(wanted, images)
    ours = method(settings(synthesis__feature_weight=7.0, synthesis__class_weight=3.0))
    varied = images.detach().float().requires_grad_()
    terms = ours.terms(varied, torch.full((6,), 2))
    terms["total"].backward()
    assert float(terms["total"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-3, atol=1e-6)


def test_each_class_has_its_turn_and_a_generator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = method()
    batches = [ours.synthesize(net(1)) for _ in range(2 * CLASSES)]
    classes = [batch.labels.unique().tolist() for batch in batches]
    assert sorted(classes[:CLASSES]) == sorted(classes[CLASSES:]) == [[0], [1], [2], [3]]
    assert sorted(ours.store.held) == [0, 1, 2, 3]
    first, second = (ours.store.held[label]["body.1.weight"] for label in (0, 1))
    assert not torch.equal(first, second)
    monkeypatch.setattr(ours, "adam", lambda *_: pytest.fail("a generator was trained twice"))
    again = ours.synthesize()
    before = next(batch for batch in batches if torch.equal(batch.labels, again.labels))
    assert not torch.equal(before.images, again.images)  # new images of it


def test_a_batch_can_be_of_some_classes() -> None:
    batch = method(settings(synthesis__classes_per_batch=3)).synthesize()
    assert batch.labels.bincount().sort().values.tolist()[-3:] == [2, 2, 2]
    assert batch.images.shape == (6, *SIZE)


def test_training_brings_the_loss_down() -> None:
    def after(steps: int) -> float:
        run = settings(synthesis__steps=steps, synthesis__batch_size=16, synthesis__lr_generator=0.01)
        run = from_dict({"synthesis.feature_weight": 10.0, "synthesis.class_weight": 1.0}, base=run)
        return float(method(run).synthesize().losses["total"])

    assert after(60) < after(1) - 1.5


def test_a_generator_follows_from_seed_and_class_alone() -> None:
    a, b, other = method(), method(), method(seed=1)
    a.generator_of(0)
    for label in (2, 0):
        b.generator_of(label)
    first, second = a.store.held[0], b.store.held[0]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other.generator_of(0)
    assert not torch.equal(first["body.1.weight"], other.store.held[0]["body.1.weight"])


@pytest.mark.parametrize("memory_mib", [0, 256])
def test_one_seed_is_one_run_and_a_state_goes_on_with_it(memory_mib: int, folder: Path) -> None:
    run = settings(synthesis__memory_mib=memory_mib)
    first, second = method(run), method(run)
    for _ in range(CLASSES + 1):
        x, y = first.synthesize(), second.synthesize()
        assert torch.equal(x.images, y.images)
    third = method(run, seed=5)
    third.load_state_dict(first.state_dict())
    for _ in range(CLASSES):
        x, y = first.synthesize(), third.synthesize()
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
        assert x.losses == y.losses
    assert bool(first.store.held) == (memory_mib > 0)


def test_what_does_not_fit_the_memory_goes_to_a_folder_and_is_removed(folder: Path) -> None:
    in_memory, on_disk = method(), method(settings(synthesis__memory_mib=0))
    for _ in range(2 * CLASSES):
        assert torch.equal(in_memory.synthesize().images, on_disk.synthesize().images)
    assert len(list(folder.rglob("*.safetensors"))) == CLASSES
    assert not any("generators" in name for name in on_disk.state_dict())
    on_disk.close()
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_cleared_or_full_costs_time_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    run = settings(synthesis__memory_mib=0)
    whole, cleared, full = method(run), method(run), method(run, acceleration=Acceleration(say=said.append))

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for _ in range(CLASSES + 1):
        wanted = whole.synthesize().images
        assert torch.equal(wanted, cleared.synthesize().images)
        for path in Path(cleared.store._folder.name).iterdir():  # type: ignore[union-attr]
            path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", refuse)
            assert torch.equal(wanted, full.synthesize().images)
    assert len(said) == 1
    assert "trained again each time" in said[0]


def test_a_lower_rate_makes_other_generators() -> None:
    ours = method()
    ours.generator_of(0)
    before = ours.store.held[0]["body.1.weight"]
    ours.slow_down(0.25)
    ours.generator_of(0)
    assert not torch.equal(before, ours.store.held[0]["body.1.weight"])


def test_a_whole_run_and_a_set(tmp_path: Path, folder: Path) -> None:
    call: dict[str, Any] = {
        "teacher_options": ModelOptions(input_size=SIZE), "device": "cpu", "amp": False,
        "config": settings(synthesis__memory_mib=0),
    }  # fmt: skip
    student: nn.Module = net(1)
    before: dict[str, Tensor] = state_of(student)["tensors"]
    report = api.distill(net(), student, output=tmp_path / "student", **call).report
    assert report["config"]["method"] == "generative-dfd"
    assert report["images"] == 4 * 6
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert "by Generative DFD (Luo" in (tmp_path / "student" / "README.md").read_text()
    assert api.synthesize(net(), num_images=9, output=tmp_path / "set", **call).manifest["num_images"] == 9
    assert list(folder.iterdir()) == []


def test_settings() -> None:
    digits = with_method(get_recipe("digits").config((1, 8, 8)), "generative-dfd")
    assert isinstance(digits.synthesis, GenerativeDFDConfig)
    assert digits.synthesis.augmentation == "crop"
    for changes in (
        {"steps": 0}, {"classes_per_batch": 129}, {"memory_mib": -1}, {"beta2": 1.0},
        {"feature_weight": 0, "class_weight": 0},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            GenerativeDFDConfig(**changes)
