"""The quality signal: what it says of students whose quality is known."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import quality
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.quality import Quality, QualitySignal, compare
from tiny import CLASSES, SIZE, assert_same_state, config, hooks_on, net, state_of, teacher

CPU = torch.device("cpu")


class ByBrightness(nn.Module):
    """Sure of the class that an image's first pixel names; ``shift`` makes it name another."""

    def __init__(self, shift: int = 0, confidence: float = 20.0) -> None:
        super().__init__()
        self.shift, self.confidence = shift, confidence

    def forward(self, images: Tensor) -> Tensor:
        named = (images[:, 0, 0, 0] * 255).round().long() + self.shift
        return self.confidence * nn.functional.one_hot(named % CLASSES, CLASSES).float()


def named(classes: list[int]) -> Tensor:
    return torch.tensor(classes, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *SIZE).contiguous()


def signal(settings: RunConfig, model: nn.Module, student: nn.Module) -> QualitySignal:
    found = QualitySignal(settings, model, student, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    list(found)
    return found


def result(found: QualitySignal) -> Quality:
    assert found.result is not None
    return found.result


def test_a_perfect_student() -> None:
    images = torch.randint(0, 256, (10, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = compare(teacher(), teacher(), images, torch.zeros(10), num_classes=CLASSES, batch_size=4)
    assert found.images == 10
    assert found.agreement == 1
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.student_confidence == found.teacher_confidence


def test_a_student_of_which_everything_is_known() -> None:
    images = named([0, 0, 1, 1, 2])
    labels = torch.tensor([0, 1, 1, 1, 3])
    found = compare(ByBrightness(), ByBrightness(), images, labels, num_classes=CLASSES, batch_size=2)
    assert found.recognised == pytest.approx(3 / 5)
    assert found.coverage == pytest.approx(3 / 4)
    assert found.agreement == 1
    assert found.statistics_distance is None  # nothing remembers statistics here
    wrong = compare(ByBrightness(), ByBrightness(1), images, labels, num_classes=CLASSES, batch_size=2)
    assert wrong.agreement == 0
    assert wrong.divergence == pytest.approx(math.log(2), abs=1e-4)
    assert wrong.recognised == found.recognised
    unsure = compare(ByBrightness(), ByBrightness(confidence=0), images, labels, num_classes=CLASSES, batch_size=2)
    assert unsure.student_confidence == pytest.approx(1 / CLASSES)
    assert unsure.teacher_confidence == pytest.approx(1, abs=1e-6)


def test_images_like_those_a_teacher_was_trained_on_have_its_statistics() -> None:
    model = teacher()
    images = torch.randint(0, 256, (12, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = images.float() / 255
    means: list[Tensor] = []
    for layer in batch_norm_layers(model).values():
        handle = layer.register_forward_pre_hook(lambda _, args: means.append(args[0].mean((0, 2, 3))))
        model(floats)
        handle.remove()
        layer.running_mean.copy_(means[-1])  # type: ignore[operator, union-attr]
    near = compare(model, net(1), images, torch.zeros(12), num_classes=CLASSES, batch_size=5)
    assert near.statistics_distance == pytest.approx(0, abs=1e-5)
    # One running deviation away in each channel of the first layer, which has half of the say.
    layer = model.bn1
    layer.running_mean += layer.running_var.sqrt()  # type: ignore[union-attr, operator]
    far = compare(model, net(1), images, torch.zeros(12), num_classes=CLASSES, batch_size=5)
    assert far.statistics_distance is not None
    assert far.statistics_distance > 0.5 - 1e-4


def test_the_order_and_size_of_batches_do_not_matter() -> None:
    images = torch.randint(0, 256, (12, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % CLASSES
    found = [
        compare(teacher(), net(1), images, labels, num_classes=CLASSES, batch_size=size).to_dict()
        for size in (1, 5, 12)
    ]
    assert found[0] == found[1] == found[2]


def test_the_signal_is_repeatable_and_of_its_own_images() -> None:
    settings = config(quality_images=10)
    first, second = (result(signal(settings, teacher(), net(1))) for _ in range(2))
    assert first == second
    assert first.images == 10
    assert result(signal(config(quality_images=10, seed=1), teacher(), net(1))) != first


def test_its_images_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not one of the images that the run with the same seed trains on, and none of the first, shapeless ones.
    settings = config(quality_images=8, schedule__rounds=6, schedule__warmup_rounds=2)
    given: list[Tensor] = []
    monkeypatch.setattr(quality, "compare", lambda t, s, images, labels, **_: given.append(images))
    signal(settings, teacher(), net(1))
    model = teacher()
    run, fresh = (
        build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed)
        for seed in (settings.seed, settings.seed + quality.QUALITY_SEED)
    )
    assert all(not torch.equal(run.synthesize().images, given[0][:4]) for _ in range(6))
    made = [fresh.synthesize().images for _ in range(4)]
    assert torch.equal(given[0], torch.cat(made[2:]))


def test_no_more_is_thrown_away_than_needed() -> None:
    settings = config(quality_images=4, schedule__rounds=100, schedule__warmup_rounds=50)
    found = QualitySignal(settings, teacher(), net(1), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    records = list(found)
    assert len(records) == records[-1].total == quality.BURN_IN + 1
    assert [record.step for record in records] == list(range(1, len(records) + 1))
    assert {record.phase for record in records} == {"quality"}


def test_neither_model_is_changed() -> None:
    model, student = teacher(), net(1).eval()
    before = state_of(model), state_of(student)
    signal(config(), model, student)
    assert_same_state(before[0], state_of(model))
    assert_same_state(before[1], state_of(student))


def test_nothing_stays_on_a_teacher_that_fails() -> None:
    model = teacher()
    with pytest.raises(RuntimeError):
        compare(model, net(1, size=(1, 8, 8)), named([0, 1]), torch.zeros(2), num_classes=4, batch_size=2)
    assert hooks_on(model) == 0
    with pytest.raises(RuntimeError):
        compare(net(1, size=(1, 8, 8)), model, named([0, 1]), torch.zeros(2), num_classes=4, batch_size=2)
    found = QualitySignal(config(), model, net(1), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    steps = iter(found)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert hooks_on(model) == 0


def test_as_plain_values() -> None:
    values = {item.name: 0.123456 for item in fields(Quality)} | {"images": 7, "statistics_distance": None}
    found = Quality(**values).to_dict()  # type: ignore[arg-type]
    assert found["agreement"] == 0.1235
    assert found["images"] == 7
    assert found["statistics_distance"] is None
