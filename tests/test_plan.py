"""What a run will cost, against numbers counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import plan
from fastdfkd_cli.augment import draw_augmentation
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.plan import distillation_plan, model_size, synthesis_plan, timed_steps
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")
KEYWORDS: dict[str, Any] = {"image_size": SIZE, "num_classes": CLASSES, "device": CPU, "amp": False}
#: tiny.TinyNet on 3x8x8: weights of two convolutions, two BatchNorms and a linear layer.
PARAMETERS = 4 * 3 * 9 + 8 * 4 * 9 + 2 * 4 + 2 * 8 + (8 * 4 + 4)
#: Multiplications and additions: 4 channels at 8x8, 8 channels at 4x4, and the classifier.
FLOPS = 2 * (4 * 3 * 9 * 64 + 8 * 4 * 9 * 16 + 8 * 4)
#: An image's pixels and its label.
IMAGE_BYTES = 3 * 8 * 8 + 8


def test_parameters_and_flops_counted_by_hand() -> None:
    found = model_size(net(), SIZE)
    assert (found.parameters, found.flops) == (PARAMETERS, FLOPS) == (456, 23104)
    assert model_size(net(), (3, 16, 16)).flops == FLOPS + 3 * 2 * (4 * 3 * 9 * 64 + 8 * 4 * 9 * 16)


def test_a_model_that_looks_at_values_is_counted_as_far_as_possible() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 64, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) if float(x.sum()) > 0 else self.fc(-x.flatten(1))

    found = model_size(Looks(), SIZE)
    assert (found.parameters, found.flops) == (3 * 64 * 5 + 5, None)


def test_counting_changes_nothing() -> None:
    model = net()
    before = state_of(model)
    model_size(model, SIZE)
    assert_same_state(before, state_of(model))
    assert next(model.parameters()).device == CPU


def distils(settings: RunConfig, **keywords: Any) -> dict[str, Any]:
    return distillation_plan(settings, teacher(), net(1), **KEYWORDS, **keywords)


def test_the_plan_of_distill() -> None:
    settings = config(
        schedule__rounds=7, schedule__warmup_rounds=2, schedule__final_rounds=1, schedule__batches_per_round=2
    )
    found = distils(settings)
    assert found["teacher"] == found["student"] == {"parameters": PARAMETERS, "flops": FLOPS}
    assert found["synthetic_images"] == 6 * 2 * 4 == settings.synthetic_images
    assert found["inner_steps"] == 6 * 2 * 2
    assert found["kd_steps"] == 5 * 3 == settings.kd_steps
    assert found["pool_bytes"] == 48 * IMAGE_BYTES
    assert found["disk_bytes"] > 4 * PARAMETERS
    assert found["memory_bytes"] > found["pool_bytes"]
    seconds = found["seconds"]
    assert seconds["synthesis"] == pytest.approx(12 * seconds["synthesis_batch"], abs=0.06)
    assert seconds["distillation"] == pytest.approx(15 * seconds["kd_step"], abs=0.06)
    parts = (seconds[name] for name in ("synthesis", "distillation", "quality"))
    assert seconds["total"] == pytest.approx(sum(parts), abs=0.16)
    assert seconds["synthesis_batch"] > 0
    assert seconds["kd_step"] > 0


def test_a_bounded_pool_is_all_that_is_kept() -> None:
    assert distils(config(pool_size=5))["pool_bytes"] == 5 * IMAGE_BYTES
    assert distils(config(pool_size=5), pool_images=30)["pool_bytes"] == 30 * IMAGE_BYTES  # given images are all held


@pytest.mark.parametrize(("steps", "kept"), [(3, True), (2, False)])
def test_soft_labels_count_where_they_are_kept(steps: int, kept: bool) -> None:
    # 16 images in two variations; three rounds of steps draw 4 images each.
    settings = config(
        distillation__augmentation="crop-flip", distillation__label_views=2, schedule__kd_steps_per_round=steps
    )
    numbers = len(draw_augmentation("crop-flip", 1, SIZE, torch.Generator()))
    each = IMAGE_BYTES + kept * 2 * (4 * numbers + 4 * CLASSES)
    assert distils(settings)["pool_bytes"] == 16 * each


def test_a_plan_for_given_images_has_no_synthesis() -> None:
    found = distils(config(schedule__rounds=5, schedule__warmup_rounds=2), pool_images=30)
    assert found["synthetic_images"] == 30
    assert found["inner_steps"] == 0
    assert found["seconds"]["synthesis"] == 0
    assert found["kd_steps"] == 5 * 3  # as there is nothing to warm up, all rounds distil
    assert found["pool_bytes"] == 30 * IMAGE_BYTES


def test_a_time_budget_is_filled_with_the_same_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"synthesis_batch": 0.5, "kd_step": 0.1, "labels": 0.0, "synthesis_memory": 0.0, "kd_memory": 0.0}
    monkeypatch.setattr(plan, "timed_steps", lambda *_, **__: costs)
    # 4 batches and 9 steps take 2.9 seconds; ten times that is 40 batches and 90 steps.
    found = distils(config(schedule__time_budget=29, quality_images=0))
    assert found["synthetic_images"] == pytest.approx(160, abs=1)
    assert found["kd_steps"] == pytest.approx(90, abs=1)
    assert found["seconds"]["total"] == 29
    assert found["seconds"]["synthesis"] == 20
    # What comes after the student is none of the clock's: nine images in batches of four.
    seconds = distils(config(schedule__time_budget=29, quality_images=9))["seconds"]
    assert (seconds["quality"], seconds["total"]) == (1.5, 30.5)


def test_the_signal_costs_its_own_steps_and_not_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.time, "perf_counter", iter(range(1000)).__next__)

    def of(**changes: Any) -> float:
        seconds: float = distils(config(synthesis__steps=20, **changes), pool_images=30)["seconds"]["quality"]
        return seconds

    # One second by this clock, of 2 steps.
    assert of(quality_images=9, quality_steps=2) == 3
    assert of(quality_images=9, quality_steps=50) == 75
    assert of(quality_images=16, quality_steps=50) == 100
    assert of(quality_images=0) == 0


def test_what_the_teacher_labels_once_is_not_asked_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(views: int) -> list[int]:
        model, seen = teacher(), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        settings = config(distillation__augmentation="crop-flip", distillation__batch_size=3)
        found = timed_steps(settings, model, net(1), **KEYWORDS, synthesises=False, views=views)
        assert (found["labels"] > 0) == (views > 0)
        assert found["kd_step"] > 0
        return seen

    assert asked(0) == [3, 3]  # two steps
    assert asked(2) == [3, 3, 3, 3]  # three images in two variations, twice
    monkeypatch.setattr(plan.time, "perf_counter", iter(range(100)).__next__)
    found = timed_steps(config(), teacher(), net(1), **KEYWORDS, synthesises=False, views=1)
    assert (found["kd_step"], found["labels"]) == (1, 1 / 4)


def test_labels_made_once_are_part_of_the_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(*_: Any, views: int = 0, **__: Any) -> dict[str, float]:
        # A step of 0.3 seconds, two thirds of which are the teacher's.
        return {
            "synthesis_batch": 0.5,
            "kd_step": 0.1 if views else 0.3,
            "labels": 0.05 * views,
            "synthesis_memory": 0.0,
            "kd_memory": 0.0,
        }

    monkeypatch.setattr(plan, "timed_steps", costs)
    exact: dict[str, Any] = {
        "distillation__augmentation": "none", "schedule__kd_steps_per_round": 10, "quality_images": 0,
    }  # fmt: skip
    found = distils(config(**exact))
    assert found["seconds"]["distillation"] == pytest.approx(30 * 0.1 + 16 * 0.05)
    # Twice as long, twice as much of each.
    found = distils(config(**exact, schedule__time_budget=2 * (4 * 0.5 + 3 + 0.8)))
    assert (found["synthetic_images"], found["kd_steps"]) == (32, 60)
    # Given images are all labelled, however short the budget: 50 of them in 2.5 seconds, and what is left for steps.
    found = distils(config(**exact, schedule__time_budget=10), pool_images=50)
    assert found["kd_steps"] == pytest.approx(75, abs=1)
    assert found["seconds"]["total"] == 10
    # In 3 seconds, 10 steps of 4 images would be drawn: fewer than there are to label.
    found = distils(config(**exact, schedule__time_budget=3), pool_images=50)
    assert found["kd_steps"] == pytest.approx(10, abs=1)
    assert found["pool_bytes"] == 50 * IMAGE_BYTES


def test_seconds_and_memory_are_scaled_from_the_timed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # At most two images of 8x8 in the timed steps, of a batch of 64 in 50 inner steps.
    monkeypatch.setattr(plan, "TIMED_PIXELS", 128)
    asked = []
    build = plan.build_method
    monkeypatch.setattr(plan, "build_method", lambda c, *a, **k: (asked.append(c.synthesis), build(c, *a, **k))[1])
    settings = config(synthesis__batch_size=64, synthesis__steps=50, pool_size=64)
    found = timed_steps(settings, teacher(), net(1), **KEYWORDS)
    assert (asked[0].batch_size, asked[0].steps) == (2, 2)
    assert found["synthesis_batch"] > 0
    monkeypatch.setattr(plan.time, "perf_counter", iter(range(100)).__next__)
    scaled = timed_steps(settings, teacher(), net(1), **KEYWORDS)
    assert scaled["synthesis_batch"] == 1 * 25 * 32  # one second by this clock, of 2 of 50 steps, of 2 of 64 images
    assert scaled["kd_step"] == 2  # one second, of 2 of 4 images


def test_the_plan_of_synthesize() -> None:
    found = synthesis_plan(config(), teacher(), None, num_images=50, burn_in=3, **KEYWORDS)
    assert found["teacher"] == {"parameters": PARAMETERS, "flops": FLOPS}
    assert found["synthetic_images"] == 50
    assert found["burn_in_batches"] == 3
    assert found["inner_steps"] == (3 + 13) * 2
    assert found["disk_bytes"] == 50 * (3 * 64 + 4 * CLASSES)
    assert found["seconds"]["total"] == pytest.approx(16 * found["seconds"]["synthesis_batch"], abs=0.06)


@pytest.mark.parametrize("broken", [False, True])
def test_a_plan_leaves_both_models_as_they_are(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, student = teacher(), net(1)
    before = state_of(model), state_of(student)
    if broken:
        monkeypatch.setattr(plan.ImagePool, "sample", lambda *_: (torch.zeros(1, 99, 2, 2), None))
        with pytest.raises(RuntimeError):
            distillation_plan(config(), model, student, **KEYWORDS)
    else:
        distillation_plan(config(), model, student, **KEYWORDS)
        synthesis_plan(config(), model, None, num_images=5, burn_in=0, **KEYWORDS)
    assert_same_state(before[0], state_of(model))
    assert_same_state(before[1], state_of(student))
