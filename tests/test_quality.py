"""The quality signal: what it says of students whose quality is known."""

from __future__ import annotations

import math
import operator
import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import quality
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.method_config import SETTINGS, DeepInversionConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.quality import Quality, QualitySignal, compare, shared_images, signal_config
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, hooks_on, net, state_of, teacher

KEYWORDS: dict[str, Any] = {
    "image_size": SIZE, "num_classes": CLASSES, "device": torch.device("cpu"), "amp": False,
}  # fmt: skip


class ByBrightness(nn.Module):
    """Sure of the class that an image's first pixel names; ``shift`` makes it name another."""

    def __init__(self, shift: int = 0, confidence: float = 20.0) -> None:
        super().__init__()
        self.shift, self.confidence = shift, confidence

    def forward(self, images: Tensor) -> Tensor:
        named = (images[:, 0, 0, 0] * 255).round().long() + self.shift
        return self.confidence * nn.functional.one_hot(named % CLASSES, CLASSES).float()


class Answers(nn.Module):
    """Gives the row of logits that an image's first pixel names."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[(images[:, 0, 0, 0] * 255).round().long()]


def named(classes: list[int]) -> Tensor:
    return torch.tensor(classes, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *SIZE).contiguous()


def signal(settings: RunConfig, model: nn.Module, student: nn.Module) -> QualitySignal:
    found = QualitySignal(settings, model, student, **KEYWORDS)
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
    assert found.similarity == pytest.approx(1, abs=1e-5)
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
    assert wrong.similarity == pytest.approx(-1 / (CLASSES - 1))  # of the corners of a simplex
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


def test_similarity_by_hand() -> None:
    images = named([0, 1, 2, 3])

    def similarity(one: list[list[float]], other: list[list[float]]) -> float:
        models = (Answers(one), Answers(other))
        return compare(*models, images, torch.zeros(4), num_classes=CLASSES, batch_size=3).similarity

    rng = random.Random(0)
    one, other = ([[rng.gauss(1, 3) for _ in range(CLASSES)] for _ in range(4)] for _ in range(2))
    by_hand = []
    for p, q in zip(one, other, strict=True):
        p, q = ([value - sum(row) / CLASSES for value in row] for row in (p, q))
        by_hand.append(sum(map(operator.mul, p, q)) / (math.hypot(*p) * math.hypot(*q)))
    assert max(by_hand) - min(by_hand) > 0.1  # a mean over images, each for itself
    assert similarity(one, other) == pytest.approx(sum(by_hand) / 4, abs=1e-5)
    # Neither a constant, which no probability tells, nor the scale counts.
    assert similarity(one, [[7 + 0.1 * value for value in row] for row in one]) == pytest.approx(1, abs=1e-5)
    assert similarity(one, [[-value for value in row] for row in one]) == pytest.approx(-1, abs=1e-5)
    assert similarity(one, [[5.0] * CLASSES] * 4) == 0


def images_of(
    settings: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module | None = None,
    student: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """The images that a signal is read from, and the classes that were asked for."""
    given: list[tuple[Tensor, Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr(quality, "compare", lambda t, s, images, labels, **_: given.append((images, labels)))
        signal(settings, model or teacher(), student or net(1))
    ((images, labels),) = given
    return images, labels


def test_the_signal_is_repeatable() -> None:
    settings = config(quality_images=10)
    first, second = (result(signal(settings, teacher(), net(1))) for _ in range(2))
    assert first == second
    assert first.images == 10
    assert result(signal(settings, teacher(), net(2))) != first


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"synthesis__steps": 1, "synthesis__class_weight": 9.0, "generator__width": 6},
        {"schedule__rounds": 9, "schedule__warmup_rounds": 7, "distillation__lr": 0.3},
        {"method": "nayer", "seed": 1},
        {"method": "dfad"},
        {"method": "kd"},
        {"method": "deepinversion", "synthesis__lr_pixels": 0.5, "synthesis__feature_weight": 0.0},
    ],
)
def test_students_of_a_teacher_are_judged_on_the_same_images(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config(quality_images=10)
    other = one
    if "method" in changes:
        other = with_method(one, changes["method"])
    other = from_dict({k.replace("__", "."): v for k, v in changes.items()}, base=other)
    assert other != one
    wanted, labels = images_of(one, monkeypatch)
    images, found = images_of(other, monkeypatch, student=net(2))
    assert torch.equal(images, wanted)
    assert torch.equal(found, labels)


def test_its_images_are_the_teachers_and_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = images_of(config(quality_images=10), monkeypatch)
    assert len(wanted) == 10
    assert not torch.equal(images_of(config(quality_images=10), monkeypatch, teacher(3))[0], wanted)
    assert not torch.equal(images_of(config(quality_images=10, quality_steps=3), monkeypatch)[0], wanted)
    assert not torch.equal(images_of(config(quality_images=10, synthesis__batch_size=5), monkeypatch)[0], wanted)
    # A batch is no larger than what is wanted of it, and two images are the least that have statistics.
    settings = config(quality_images=3, synthesis__batch_size=64)
    assert len(list(QualitySignal(settings, teacher(), net(1), **KEYWORDS))) == 1
    assert len(images_of(settings, monkeypatch)[0]) == 3
    assert len(images_of(config(quality_images=1), monkeypatch)[0]) == 1


def test_its_images_are_deepinversions(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = images_of(config(quality_images=8, quality_steps=7), monkeypatch)
    # As published, but for the steps: another batch size and steps would be another set of images.
    published = RunConfig(method="deepinversion", synthesis=DeepInversionConfig(batch_size=4, steps=7))
    made = build_method(published, teacher(), **KEYWORDS, seed=quality.QUALITY_SEED)
    batches = [made.synthesize() for _ in range(2)]
    assert torch.equal(images, torch.cat([batch.images for batch in batches]))
    assert torch.equal(labels, torch.cat([batch.labels for batch in batches]))
    # A run by the same method has images of its own.
    run = build_method(published, teacher(), **KEYWORDS)
    assert all(not torch.equal(run.synthesize().images, batch.images) for batch in batches)


@pytest.mark.parametrize(("recipe", "mirrors"), [("digits", False), ("quick", True), ("auto", True)])
def test_they_are_mirrored_where_the_recipe_mirrors_whatever_the_method(recipe: str, mirrors: bool) -> None:
    size = (3, 32, 32)
    plain = get_recipe(recipe).config(size)
    found = [signal_config(with_method(plain, method), size) for method in SETTINGS]
    assert found == [found[0]] * len(SETTINGS)
    section = found[0].settings_of(DeepInversionConfig)
    assert section.flip is mirrors
    assert section.steps == plain.quality_steps
    assert section.batch_size == min(plain.synthesis.batch_size, plain.quality_images)


def test_students_of_one_teacher_can_share_the_images() -> None:
    settings = config(quality_images=9)

    def read(student: nn.Module, facts: dict[str, Any] | None, **changes: Any) -> tuple[int, Quality]:
        found = QualitySignal(from_dict(changes, base=settings), teacher(), student, **KEYWORDS, teacher_facts=facts)
        return len(list(found)), result(found)

    facts = {"weights_sha256": "0" * 64, "input": {"mean": [0.5]}}
    apart = [read(net(seed), facts) for seed in (1, 2)]
    with shared_images():
        together = [read(net(seed), facts) for seed in (1, 2)]
        assert [found for _, found in together] == [found for _, found in apart]
        assert [made for made, _ in together] == [3, 0]  # batches
        assert read(net(1), facts, seed=3) == (0, apart[0][1])
        # What could give other images does not share them.
        assert read(net(1), {**facts, "weights_sha256": "1" * 64})[0] == 3
        assert read(net(1), None)[0] == 3
        assert read(net(1), facts, quality_steps=3)[0] == 3
    assert [made for made, _ in apart] == [3, 3]
    with shared_images():
        assert read(net(1), facts)[0] == 3  # another block begins with none


def test_no_batch_is_thrown_away() -> None:
    settings = config(quality_images=9, schedule__rounds=100, schedule__warmup_rounds=50)
    found = QualitySignal(settings, teacher(), net(1), **KEYWORDS)
    records = list(found)
    assert len(records) == records[-1].total == 3  # of 4 images each
    assert [record.step for record in records] == [1, 2, 3]
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
    found = QualitySignal(config(), model, net(1), **KEYWORDS)
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
