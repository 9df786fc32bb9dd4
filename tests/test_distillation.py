"""The engine of `distill`: schedules, budgets, what it changes and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import distillation, divergence
from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.config import DistillationConfig, RunConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.labels import label_views
from fastdfkd_cli.methods import SyntheticBatch, build_method
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")


class FakeTime:
    """Stands where the module ``time`` stands: it moves only where a test says so, on a busy machine too."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """A clock on which a KD step takes 0.01 seconds, and a batch of :class:`Noise` what it is told to."""
    fake = FakeTime()
    for module in ("clock", "distillation"):
        monkeypatch.setattr(f"fastdfkd_cli.{module}.time", fake)
    learn = Student.learn

    def timed(self: Student, *arguments: Any) -> Any:
        fake.now += 0.01
        return learn(self, *arguments)

    monkeypatch.setattr(Student, "learn", timed)
    return fake


class Noise:
    """Stands where a method stands, and notes what it is asked for."""

    def __init__(
        self, batch_size: int = 4, loss: float = 1.0, seconds: float = 0.0, clock: FakeTime | None = None
    ) -> None:
        self.batch_size, self.loss, self.seconds, self.clock = batch_size, loss, seconds, clock
        self.rng = torch.Generator().manual_seed(0)
        self.calls: list[str] = []

    def prepare(self, student: nn.Module | None = None) -> None:
        self.calls.append("prepare")

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        self.calls.append("warm-up" if student is None else "student")
        if self.clock is not None:
            self.clock.now += self.seconds
        images = torch.randint(0, 256, (self.batch_size, *SIZE), dtype=torch.uint8, generator=self.rng)
        labels = torch.randint(CLASSES, (self.batch_size,), generator=self.rng)
        return SyntheticBatch(images, labels, {"feature": torch.tensor(self.loss), "total": torch.tensor(2.0)})

    def renew(self) -> None:
        self.calls.append("renew")

    @property
    def micro_batch(self) -> int:
        return 0

    def slow_down(self, factor: float) -> None:
        self.calls.append(f"slower by {factor}")

    def state_dict(self) -> dict[str, Tensor]:
        return {"rng": self.rng.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.rng.set_state(state["rng"])

    def close(self) -> None:
        self.calls.append("close")


def engine(settings: RunConfig, *, student: nn.Module | None = None, **keywords: Any) -> Distillation:
    keywords = {"synthesizer": Noise(settings.synthesis.batch_size), "amp": False, **keywords}
    return Distillation(settings, teacher(), student or net(1), image_size=SIZE, device=CPU, **keywords)


def rates_of(run: Distillation) -> list[float]:
    """Every learning rate that a run will set, as it sets it."""
    rates: list[float] = []
    setter = run.student.set_learning_rate
    run.student.set_learning_rate = lambda done: (rates.append(setter(done)), rates[-1])[1]  # type: ignore[method-assign]
    return rates


@pytest.fixture
def every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "RECORD_EVERY", 0.0)


# What it leaves alone


@pytest.mark.parametrize("amp", [False, True])
def test_the_teacher_stays_as_it_is_and_the_student_learns(amp: bool) -> None:
    settings = config()
    model, student = teacher(), net(1)
    before, weights = state_of(model), {k: v.clone() for k, v in student.state_dict().items()}
    method = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=amp)
    run = Distillation(settings, model, student, synthesizer=method, image_size=SIZE, device=CPU, amp=amp)
    list(run)
    method.close()
    assert_same_state(before, state_of(model))
    assert run.student.net is student
    assert not student.training
    assert all(not torch.equal(weights[name], value) for name, value in student.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())


def test_a_run_needs_images_from_somewhere() -> None:
    for pool in (None, ImagePool(SIZE, 4, CPU)):
        with pytest.raises(ValueError, match="needs a synthesizer or a pool"):
            engine(config(), synthesizer=None, pool=pool)


# How long it goes on


@pytest.mark.parametrize(
    ("schedule", "images", "steps"),
    [
        ({"rounds": 5, "warmup_rounds": 2, "kd_steps_per_round": 3}, 20, 9),
        ({"rounds": 5, "warmup_rounds": 0, "kd_steps_per_round": 2, "batches_per_round": 3}, 60, 10),
        ({"rounds": 6, "warmup_rounds": 1, "kd_steps_per_round": 2, "final_rounds": 3}, 12, 10),
        ({"rounds": 1, "warmup_rounds": 0, "kd_steps_per_round": 1}, 4, 1),
    ],
)
@pytest.mark.usefixtures("every_record")
def test_a_budget_of_rounds_is_kept_exactly(schedule: dict[str, int], images: int, steps: int) -> None:
    settings = config(**{f"schedule__{name}": value for name, value in schedule.items()})
    run = engine(settings)
    records = list(run)
    assert (run.images_made, run.steps_taken) == (images, steps)
    assert (settings.synthetic_images, settings.kd_steps) == (images, steps)
    assert len(run.pool) == images
    last = {record.phase: record for record in records}
    assert (last["synthesis"].step, last["synthesis"].total) == (images, images)
    assert (last["distillation"].step, last["distillation"].total) == (steps, steps)
    assert records[-1].progress == 1
    assert records[-1].remaining == pytest.approx(0, abs=1e-6)
    assert run.costs.synthesis > 0
    assert run.costs.distillation > 0


def test_rounds_interleave_and_the_adversarial_term_waits_for_the_student() -> None:
    settings = config(
        schedule__rounds=6, schedule__warmup_rounds=2, schedule__final_rounds=1, synthesis__generator_reset_after=2
    )
    method = Noise()
    list(engine(settings, synthesizer=method))
    # Renewal: two rounds after the warm-up; the last round only distils.
    assert method.calls == ["warm-up", "warm-up", "student", "student", "renew", "student"]


def test_without_a_synthesizer_all_rounds_distil_on_the_pool() -> None:
    settings = config(schedule__rounds=4, schedule__warmup_rounds=2, schedule__kd_steps_per_round=3)
    pool = ImagePool(SIZE, 6, CPU)
    pool.add(torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
    run = engine(settings, synthesizer=None, pool=pool)
    records = list(run)
    assert run.steps_taken == 12
    assert run.images_made == 0
    assert {record.phase for record in records} == {"distillation"}
    assert records[-1].progress == 1


def test_the_pool_can_be_smaller_than_the_run() -> None:
    run = engine(config(pool_size=6))
    list(run)
    assert (run.images_made, len(run.pool)) == (16, 6)


@pytest.mark.usefixtures("every_record")
def test_records_count_up() -> None:
    records = list(engine(config(schedule__rounds=6)))
    for phase in ("synthesis", "distillation"):
        steps = [record.step for record in records if record.phase == phase]
        assert steps == sorted(steps)
        assert len(set(steps)) >= 5
    assert all(a.elapsed <= b.elapsed for a, b in itertools.pairwise(records))
    assert all(0 <= record.progress <= 1 for record in records)
    assert all(record.rate is not None and record.rate > 0 for record in records)
    first = next(record for record in records if record.phase == "distillation")
    assert set(first.values) == {"loss", "agreement", "lr"}
    assert all(isinstance(value, float) for record in records for value in record.values.values())


def test_a_short_run_still_says_how_it_ended() -> None:
    # Figures are read once a second at most; the last ones are always.
    run = engine(config())
    last = list(run)[-1]
    assert (last.phase, last.step, last.progress) == ("distillation", 9, 1.0)
    assert math.isfinite(last.values["loss"])


# The clock


@pytest.mark.parametrize("final_rounds", [0, 2])
def test_a_time_budget_is_kept_and_its_cosine_reaches_the_end(final_rounds: int, clock: FakeTime) -> None:
    settings = config(
        schedule__time_budget=1.2, schedule__rounds=10, schedule__warmup_rounds=2, schedule__final_rounds=final_rounds
    )
    method = Noise(seconds=0.02, clock=clock)
    run = engine(settings, synthesizer=method)
    rates = rates_of(run)
    began = clock.now
    records = list(run)
    assert 1.2 <= clock.now - began < 1.2 + 0.02 + 0.01  # over by what had begun
    assert records[-1].progress == 1
    assert records[-1].remaining == 0
    assert all(record.total is None for record in records)
    assert rates[0] == pytest.approx(0.05, rel=0.05)
    assert rates[-1] < 0.1 * 0.05
    assert run.steps_taken == len(rates) > 10
    kinds = [kind for kind in method.calls if kind != "renew"]
    # Warm-up first, and about as large a share as in the rounds (the number of rounds is an estimate).
    assert kinds == sorted(kinds, reverse=True)
    assert 0.02 < kinds.count("warm-up") / len(kinds) < 0.6


def test_final_rounds_under_a_time_budget_end_synthesis_early(clock: FakeTime) -> None:
    def images(final_rounds: int) -> int:
        settings = config(schedule__time_budget=0.8, schedule__rounds=10, schedule__final_rounds=final_rounds)
        run = engine(settings, synthesizer=Noise(seconds=0.02, clock=clock))
        list(run)
        return run.images_made

    assert images(8) < 0.7 * images(0)


def test_a_time_budget_for_given_images(clock: FakeTime) -> None:
    pool = ImagePool(SIZE, 4, CPU)
    pool.add(torch.randint(0, 256, (4, *SIZE), dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    run = engine(config(schedule__time_budget=0.5), synthesizer=None, pool=pool)
    rates = rates_of(run)
    list(run)
    assert run.steps_taken in (50, 51)
    assert rates[-1] < 0.1 * 0.05


def test_a_budget_too_short_for_anything_still_takes_a_step(clock: FakeTime) -> None:
    run = engine(config(schedule__time_budget=1e-3), synthesizer=Noise(seconds=0.02, clock=clock))
    list(run)
    assert run.steps_taken == 1
    assert run.images_made == 4


def test_a_time_budget_shorter_than_a_round_keeps_the_mixture(clock: FakeTime) -> None:
    settings = config(
        schedule__time_budget=2.0, schedule__rounds=50, schedule__batches_per_round=1000,
        schedule__kd_steps_per_round=2000, schedule__warmup_rounds=0,
    )  # fmt: skip
    run = engine(settings, synthesizer=Noise(seconds=0.02, clock=clock))
    list(run)
    # 20 seconds of synthesis and 20 of KD a round, as configured: half the time goes to each.
    assert 2.0 <= run.clock.elapsed < 2.05
    assert 0.8 < run.costs.synthesis < 1.2
    assert 0.8 < run.costs.distillation < 1.2
    assert run.images_made > 4 * 4


def test_timing_a_step_leaves_the_student_alone() -> None:
    run = engine(config())
    run.pool.add(torch.zeros(4, *SIZE, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    before, state = state_of(run.student.net), run.rng.get_state()
    assert run.time_kd_step() > 0
    assert_same_state(before, state_of(run.student.net))
    assert torch.equal(run.rng.get_state(), state)


# How the student learns


def test_a_run_follows_the_cosine_to_its_end() -> None:
    run = engine(config(schedule__rounds=11, schedule__kd_steps_per_round=10, distillation__lr_min=1e-3))
    rates = rates_of(run)
    list(run)
    expected = [1e-3 + (0.05 - 1e-3) * (1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    assert rates == pytest.approx(expected)


def test_the_average_is_what_is_exported() -> None:
    run = engine(config(distillation__average="ema", distillation__average_decay=0.9))
    steps: list[dict[str, Tensor]] = []
    learn = run.student.learn

    def noted(*arguments: Any) -> Any:
        result = learn(*arguments)
        steps.append(copy.deepcopy(run.student.net.state_dict()))
        return result

    run.student.learn = noted  # type: ignore[method-assign]
    list(run)
    final = run.student.net.state_dict()
    assert not torch.equal(final["conv1.weight"], steps[-1]["conv1.weight"])
    # Between all the weights that were taken, and their running statistics with them.
    for name in ("conv1.weight", "bn1.running_mean", "bn2.running_var"):
        stacked = torch.stack([step[name] for step in steps])
        first = net(1).state_dict()[name]
        low, high = torch.minimum(stacked.amin(0), first), torch.maximum(stacked.amax(0), first)
        assert ((final[name] >= low - 1e-6) & (final[name] <= high + 1e-6)).all()
    plain = engine(config())
    list(plain)
    assert torch.equal(plain.student.net.state_dict()["conv1.weight"], steps[-1]["conv1.weight"])


def test_what_the_student_sees_is_augmented(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    run = engine(config(distillation__augmentation="crop", schedule__rounds=2))
    model, learn = run.teacher, run.student.learn
    run.student.learn = lambda t, images, step: (seen.append(images), learn(t, images, step))[1]  # type: ignore[method-assign]
    list(run)
    assert model is run.teacher
    pool = run.pool.images.float() / 255
    images = torch.cat(seen) / 255
    untouched = (images[:, None] == pool[None]).flatten(2).all(2).any(1)
    assert not untouched.all()


# Soft labels that are used again


class Counting(nn.Module):
    """A teacher that notes how many images it is shown, and takes its time."""

    def __init__(self, clock: FakeTime | None = None, seconds: float = 0.0) -> None:
        super().__init__()
        self.net, self.clock, self.seconds, self.batches = teacher(), clock, seconds, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        if self.clock is not None:
            self.clock.now += self.seconds
        return self.net(images)


def counting(settings: RunConfig, *, model: Counting | None = None, **keywords: Any) -> tuple[Distillation, Counting]:
    model = model or Counting()
    keywords = {"synthesizer": Noise(settings.synthesis.batch_size), "amp": False, **keywords}
    return Distillation(settings, model, net(1), image_size=SIZE, device=CPU, **keywords), model


def given(count: int) -> ImagePool:
    images = torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImagePool.holding(images, torch.zeros(count, dtype=torch.int64), CPU)


@pytest.mark.parametrize("pool_size", [0, 6])
@pytest.mark.parametrize("amp", [False, True])
def test_without_augmentation_labels_are_used_again_and_nothing_changes(pool_size: int, amp: bool) -> None:
    settings = config(distillation__augmentation="none", pool_size=pool_size)
    once, model = counting(settings, amp=amp)
    anew, other = counting(settings, amp=amp)
    anew.label_views = 0
    list(once)
    list(anew)
    assert other.batches == [4] * 9  # every step
    # Every image once; in a pool of 6, two of the first batch had made room before there was a step.
    assert sum(model.batches) <= 16
    assert max(model.batches) <= 4
    assert torch.equal(once.pool.images, anew.pool.images)
    # Not bit for bit: an image's logits may be rounded otherwise beside other images.
    tolerance = 1e-2 if amp else 1e-6
    for (name, a), b in zip(once.student.net.state_dict().items(), anew.student.net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("mixed", [{"distillation__mixup": 1.0}, {"distillation__cutmix": 1.0}])
def test_the_teacher_labels_mixtures_and_the_student_learns_from_the_same(mixed: dict[str, float]) -> None:
    run, model = counting(config(distillation__augmentation="none", **mixed))
    shown: list[tuple[Tensor, Tensor]] = []
    answer, learn = model.forward, run.student.learn

    def noted(teacher: Any, images: Tensor, step: int) -> Any:
        answers: list[Tensor] = []
        model.forward = lambda given: answers.append(given) or answer(given)  # type: ignore[method-assign,func-returns-value]
        result = learn(teacher, images, step)
        shown.append((images, answers[0]))
        return result

    run.student.learn = noted  # type: ignore[method-assign]
    list(run)
    assert run.label_views == 0  # kept labels would be those of other images
    assert len(shown) == run.steps_taken > 0
    stored = {tuple(image.flatten().tolist()) for image in run.pool.images}
    new = 0
    for images, answered in shown:
        assert torch.equal(images.float() / 255, answered)
        new += sum(tuple(image.flatten().tolist()) not in stored for image in images)
    assert new > len(shown)


def test_images_that_made_room_before_the_first_step_are_never_labelled() -> None:
    settings = config(
        distillation__augmentation="none", pool_size=4, schedule__rounds=5, schedule__warmup_rounds=4,
        schedule__kd_steps_per_round=50,
    )  # fmt: skip
    run, model = counting(settings)
    list(run)
    assert run.images_made == 20
    assert model.batches == [4]


@pytest.mark.parametrize("augmentation", ["crop-flip", "resized-crop-flip", "crop"])
def test_the_student_gets_the_logits_of_the_variation_it_sees(augmentation: str) -> None:
    settings = config(
        distillation__augmentation=augmentation, distillation__label_views=2, pool_size=10,
        schedule__kd_steps_per_round=6,
    )  # fmt: skip
    run, model = counting(settings)
    learn, compared = run.student.learn, []

    def checked(logits: nn.Module | Tensor, images: Tensor, step: int) -> Any:
        assert isinstance(logits, Tensor)
        with torch.no_grad():
            expected = model.net(images / 255)
        compared.append(torch.allclose(logits, expected, atol=1e-5))
        return learn(logits, images, step)

    run.student.learn = checked  # type: ignore[method-assign]
    list(run)
    assert compared == [True] * 18
    assert sum(model.batches) == 2 * 16
    assert len(torch.cat(model_inputs(run)).flatten(1).unique(dim=0)) <= 2 * 10


def model_inputs(run: Distillation) -> list[Tensor]:
    """What many more steps would show to the student."""
    return [run.pool.sample(4, run.rng, run.config.distillation.augmentation)[0] for _ in range(100)]


def test_runs_with_kept_labels_are_repeatable() -> None:
    ends = []
    for seed in (0, 0, 1):
        run, _ = counting(config(distillation__label_views=2, seed=seed))
        list(run)
        ends.append(run.student.net.state_dict()["conv1.weight"].clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("views", "images", "kd_steps", "augmentation", "kept"),
    [
        (0, 10, 1000, "crop", 0),  # nobody asked
        (4, 10, 11, "crop", 4),  # 44 draws of 40 variations
        (4, 10, 10, "crop", 0),
        (0, 10, 3, "none", 1),
        (1, 10, 3, "none", 1),
        (0, 10, 2, "none", 0),
    ],
)
def test_labels_are_kept_where_that_saves_labelling(
    views: int, images: int, kd_steps: int, augmentation: Any, kept: int
) -> None:
    settings = DistillationConfig(batch_size=4, label_views=views, augmentation=augmentation)
    assert label_views(settings, images=images, kd_steps=kd_steps) == kept


@pytest.mark.parametrize(("images", "shown"), [(6, 6), (47, 47), (60, 12 * 4)])
def test_given_images_are_labelled_at_the_start_if_that_pays(images: int, shown: int) -> None:
    settings = config(distillation__augmentation="none", schedule__kd_steps_per_round=3)
    run, model = counting(settings, synthesizer=None, pool=given(images))
    list(run)
    assert run.steps_taken == 12
    assert sum(model.batches) == shown


def test_a_time_budget_is_not_spent_on_labels_that_nobody_draws(clock: FakeTime) -> None:
    # The schedule's rounds would draw each image often; the clock leaves time for about 8 steps of 4.
    settings = config(
        distillation__augmentation="none", schedule__time_budget=0.5, schedule__kd_steps_per_round=1000
    )  # fmt: skip
    model = Counting(clock, seconds=0.05)
    run, _ = counting(settings, model=model, synthesizer=None, pool=given(200))
    list(run)
    assert run.clock.elapsed < 0.5 + 0.06
    assert 3 <= run.steps_taken <= 8
    few, _ = counting(settings, model=Counting(clock, seconds=0.05), synthesizer=None, pool=given(8))
    list(few)
    assert few.label_views == 1
    assert few.steps_taken > 20


def test_labelling_counts_as_distillation_and_in_a_time_budget(clock: FakeTime) -> None:
    settings = config(
        distillation__label_views=2, schedule__time_budget=4.0, schedule__rounds=20, schedule__warmup_rounds=0,
        schedule__kd_steps_per_round=5,
    )  # fmt: skip
    model = Counting(clock, seconds=0.05)
    run, _ = counting(settings, model=model, synthesizer=Noise(seconds=0.02, clock=clock))
    list(run)
    rounds = run.images_made // 4
    assert len(model.batches) == 2 * rounds
    assert run.costs.synthesis == pytest.approx(0.02 * rounds)
    assert run.costs.distillation == pytest.approx(0.01 * run.steps_taken + 0.05 * 2 * rounds)
    # 0.17 seconds a round: what was estimated is what came.
    assert rounds == pytest.approx(4.0 / 0.17, abs=1)
    assert run.clock.rounds == pytest.approx(rounds, abs=1)


# What goes wrong


def test_a_kd_loss_that_is_not_finite_ends_the_run() -> None:
    student = net(1)
    with torch.no_grad():
        student.fc.bias.fill_(torch.nan)
    with pytest.raises(FastDFKDError, match=r"distillation loss stopped being finite at step \d+ \(loss\)") as caught:
        list(engine(config(), student=student))
    assert "distillation.lr" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_synthesis_loss_that_is_not_finite_ends_the_run_and_is_named(loss: float) -> None:
    with pytest.raises(FastDFKDError, match=r"synthesis loss stopped being finite at image 4 \(feature\)") as caught:
        list(engine(config(), synthesizer=Noise(loss=loss)))
    assert "synthesis.lr_generator" in str(caught.value)


def test_a_synthesis_loss_that_breaks_between_two_records_is_found_at_the_end() -> None:
    class Breaks(Noise):
        def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
            self.loss = 1.0 if not self.calls else math.nan
            return super().synthesize(student)

    with pytest.raises(FastDFKDError, match=r"synthesis loss stopped being finite .*\(feature\)"):
        list(engine(config(), synthesizer=Breaks()))


def test_a_student_that_diverges_is_refused() -> None:
    with pytest.raises(FastDFKDError, match="not finite|stopped being finite"):
        list(engine(config(distillation__lr=1e30, schedule__rounds=8)))


# What breaks once


def breaking(run: Distillation, *steps: int) -> list[str]:
    """Have the student's weights break before steps of these numbers, counted as they are tried; what is said."""
    descend, said, tried = run.student.descend, [], 0

    def broken(*given: Any) -> Any:
        nonlocal tried
        tried += 1
        if tried in steps:
            with torch.no_grad():
                run.student.net.fc.weight.fill_(torch.nan)
        return descend(*given)

    run.student.descend = broken  # type: ignore[method-assign]
    run.acceleration = Acceleration(say=said.append)
    return said


@pytest.mark.parametrize("records", [0.0, 1e9])
def test_a_run_that_breaks_goes_back_to_its_last_round_and_on_at_a_lower_rate(
    records: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "RECORD_EVERY", records)
    settings = config(distillation__average="ema", schedule__rounds=5)
    run = engine(settings)
    said, rates = breaking(run, 5), rates_of(run)
    found = list(run)
    assert run.steps_taken == 12
    assert run.images_made == 20
    assert len(run.pool) == 20
    assert [retry["round"] for retry in run.retries] == [2]
    (line,) = said
    assert line == (
        f"The distillation loss stopped being finite at step {5 if not records else 6} (loss): back to round 2 with a "
        "quarter of distillation.lr (1 of 3 times)"
    )
    assert math.isfinite(found[-1].values["loss"])
    schedule = rates_of_schedule(settings)
    assert rates[:3] == schedule[:3]
    assert rates[-9:] == [rate / 4 for rate in schedule[3:]]
    again = engine(settings)
    breaking(again, 5)
    list(again)
    assert_same_state(state_of(run.student.net), state_of(again.student.net))


def rates_of_schedule(settings: RunConfig) -> list[float]:
    run = engine(settings)
    rates = rates_of(run)
    list(run)
    return rates


def test_weights_that_break_behind_a_fine_loss_are_neither_kept_nor_gone_back_to() -> None:
    run = engine(config(schedule__rounds=5))
    learn, tried, said = run.student.learn, 0, []
    run.acceleration = Acceleration(say=said.append)

    def broken(*given: Any) -> Any:
        nonlocal tried
        tried += 1
        figures = learn(*given)
        if tried == 6:  # the last step of a round: no loss is computed from it any more
            with torch.no_grad():
                run.student.net.fc.weight.fill_(torch.inf)
        return figures

    run.student.learn = broken  # type: ignore[method-assign]
    list(run)
    assert [retry["round"] for retry in run.retries] == [2]
    assert said[0].startswith("The student's fc.weight is not finite: back to round 2")
    assert run.steps_taken == 12


def test_images_that_break_slow_the_method_down() -> None:
    class Breaks(Noise):
        def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
            batch = super().synthesize(student)
            if len(self.calls) == 3:
                batch.losses["feature"].fill_(math.nan)
            return batch

    noise = Breaks()
    run = engine(config(), synthesizer=noise)
    list(run)
    assert noise.calls.count("slower by 0.25") == 1
    assert run.student.rate == 1
    assert run.images_made == len(run.pool) == 16
    whole = engine(config())
    list(whole)
    assert torch.equal(run.pool.images, whole.pool.images)


def test_a_run_that_keeps_breaking_ends() -> None:
    run = engine(config())
    said = breaking(run, *range(1, 1000))
    with pytest.raises(
        FastDFKDError, match=r"\(loss\), after 3 returns to an earlier round with a lower rate each"
    ) as error:
        list(run)
    assert "Lower distillation.lr" in str(error.value)
    assert len(said) == 3


def test_a_loss_that_explodes_is_as_bad_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "EXPLODED", 1e-9)
    with pytest.raises(FastDFKDError, match="distillation loss exploded at step"):
        list(engine(config()))


# Too little memory


class Small(nn.Module):
    """A network on a device that holds activations of so many images."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most
        self.grad_checkpointing = False
        self.tried = 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        self.tried += 1
        logits = self.net(x)
        if len(x) > self.most and not self.grad_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
        return logits


def test_a_batch_that_does_not_fit_is_made_in_parts() -> None:
    settings, said = config(synthesis__batch_size=6), []
    shape: dict[str, Any] = {"image_size": SIZE, "num_classes": CLASSES, "device": CPU, "amp": False}
    whole = build_method(settings, teacher(), **shape)
    parts = build_method(settings, Small(teacher(), 2).eval(), **shape, acceleration=Acceleration(say=said.append))
    for _ in range(2):
        one, other = whole.synthesize(), parts.synthesize()
        assert torch.equal(one.labels, other.labels)
        assert (one.images.int() - other.images.int()).abs().max() <= 1
    assert parts.micro_batch == 2
    assert [line.split(":")[0] for line in said] == [
        "out of memory with 6 images at a time",
        "out of memory with 3 images at a time",
    ]
    with pytest.raises(torch.OutOfMemoryError):
        build_method(settings, Small(teacher(), 0).eval(), **shape).synthesize()


def test_a_kd_step_that_does_not_fit_keeps_less_and_learns_the_same() -> None:
    whole, said = engine(config()), []
    run = engine(config(), student=Small(net(1), 2), acceleration=Acceleration(say=said.append))
    list(whole)
    list(run)
    assert said == [
        "out of memory in a KD step: back to round 1; the student keeps few activations and computes the others twice "
        "from here"
    ]
    assert run.chosen == {"micro_batch": 0, "checkpoint": True}
    assert_same_state(state_of(whole.student.net), state_of(run.student.net.net))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):
        student = Small(net(1), 2)
        student.set_grad_checkpointing = lambda enable=True: None  # type: ignore[method-assign]
        list(engine(config(), student=student))


@pytest.mark.usefixtures("every_record")
def test_progress_knows_the_cost_of_a_step_within_the_first_round(clock: FakeTime) -> None:
    # One warm-up round, then one long round of slow steps: it is those that the bar has to count.
    settings = config(schedule__rounds=2, schedule__kd_steps_per_round=10)
    run = engine(settings, synthesizer=Noise(seconds=0.001, clock=clock))
    found = {record.step: record.progress for record in run if record.phase == "distillation"}
    assert found[1] < 0.4
    assert 0.3 < found[5] < 0.7


@pytest.mark.parametrize("records", [0.0, 1e9])
def test_a_student_that_breaks_is_named_before_the_images_it_breaks(
    records: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "RECORD_EVERY", records)
    settings, model = config(distillation__lr=1e30, schedule__rounds=8, schedule__kd_steps_per_round=1), teacher()
    method = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    run = Distillation(settings, model, net(1), synthesizer=method, image_size=SIZE, device=CPU, amp=False)
    with pytest.raises(FastDFKDError, match=r"Lower distillation\.lr"):
        list(run)
    method.close()
