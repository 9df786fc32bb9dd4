"""How far a distillation run is and how long it is: in rounds, or by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdfkd_cli.config import RunConfig, ScheduleConfig

#: Fewest rounds that a time budget is divided into.
MIN_ROUNDS = 10


@dataclass
class Costs:
    """Seconds by what they were spent on; distillation includes augmentation and the teacher's passes."""

    synthesis: float = 0.0
    distillation: float = 0.0


@dataclass
class Position:
    """Where a run stands: what is done of the round it is in."""

    round: int = 0
    batches: int = 0
    kd_steps: int = 0


def _now() -> float:
    return time.perf_counter()


@dataclass
class Clock:
    """How far a run is, by rounds or by the wall clock.

    With a time budget, the numbers of warm-up and final rounds keep their shares of the rounds that will fit; how many
    fit is measured (see :meth:`fit`).
    """

    budget: float | None
    rounds: int
    warmup_rounds: int
    final_rounds: int
    batches_per_round: int
    kd_steps_per_round: int
    #: Rounds after the warm-up until the generator's one renewal (0: never).
    renewal: int = 0
    #: Whether the rounds that fit a time budget are known.
    fitted: bool = False
    final_seconds: float = 0.0
    distillation_started: float | None = None
    #: Seconds since some moment: where several processes decide by them, what they have agreed on.
    now: Callable[[], float] = _now
    started: float = field(default_factory=_now)

    @classmethod
    def of(cls, config: RunConfig, now: Callable[[], float] = _now) -> Clock:
        """The clock of a run with these settings."""
        schedule = config.schedule
        return cls(
            schedule.time_budget,
            schedule.rounds,
            schedule.warmup_rounds,
            schedule.final_rounds,
            schedule.batches_per_round,
            schedule.kd_steps_per_round,
            config.synthesis.renewal,
            now=now,
        )

    def start(self, elapsed: float = 0.0) -> None:
        """Count from here on, from ``elapsed``."""
        self.started = self.now() - elapsed

    @property
    def elapsed(self) -> float:
        return self.now() - self.started

    def to_dict(self) -> dict[str, Any]:
        """All of it, with the time that has passed instead of the time of day."""
        values = {name: value for name, value in vars(self).items() if name not in ("started", "now")}
        return values | {"elapsed": self.elapsed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], now: Callable[[], float] = _now) -> Clock:
        """A clock that goes on from where :meth:`to_dict` was asked."""
        values = dict(values)
        elapsed = values.pop("elapsed")
        clock = cls(**values, now=now)
        clock.start(elapsed)
        return clock

    @property
    def out_of_time(self) -> bool:
        return self.budget is not None and self.elapsed >= self.budget

    def is_final(self, round_index: int) -> bool:
        """Whether a round comes after the last synthesis."""
        if self.budget is not None:
            return self.final_rounds > 0 and self.elapsed >= self.budget - self.final_seconds
        return round_index >= self.rounds - self.final_rounds

    def distilled(self, step: int, total_steps: int) -> float:
        """Share of the distillation that is done, 0 to 1: by steps, or by the clock under a time budget."""
        if self.budget is None:
            return step / total_steps
        begin = self.distillation_started or 0.0
        return min((self.elapsed - begin) / max(self.budget - begin, 1e-9), 1.0)

    def fit(self, schedule: ScheduleConfig, batch_seconds: float, step_seconds: float) -> None:
        """Take as many rounds as fit the time budget.

        Where fewer than ``MIN_ROUNDS`` fit, rounds are made smaller, batches and KD steps alike: a student that is
        trained between few, long syntheses would hardly take part in them.

        Args:
            schedule: the rounds of the settings, whose shares are kept.
            batch_seconds: of a synthesised batch and its labels.
            step_seconds: of a KD step.
        """
        assert self.budget is not None
        budget = self.budget
        warmup = schedule.warmup_rounds / schedule.rounds
        final = schedule.final_rounds / schedule.rounds

        def rounds_that_fit() -> float:
            synthesis = self.batches_per_round * batch_seconds * (1 - final)
            return budget / (synthesis + self.kd_steps_per_round * step_seconds * (1 - warmup))

        shrink = min(rounds_that_fit() / MIN_ROUNDS, 1.0)
        self.batches_per_round = max(round(self.batches_per_round * shrink), 1)
        self.kd_steps_per_round = max(round(self.kd_steps_per_round * shrink), 1)
        self.rounds = max(int(rounds_that_fit()), 1)
        self.warmup_rounds = round(warmup * self.rounds)
        self.renewal = round(self.renewal / schedule.rounds * self.rounds)
        self.final_seconds = final * self.rounds * self.kd_steps_per_round * step_seconds
        self.fitted = True

    def in_own_rounds(self, values: Mapping[str, Any], *, synthesises: bool) -> dict[str, Any]:
        """The state of a run of so many rounds, with its clock, position and steps in the rounds that this one has.

        Args:
            values: as an engine's ``state()`` gives them.
            synthesises: whether rounds of the warm-up take no KD steps.
        """
        before, position = Clock.from_dict(values["clock"]), Position(**values["position"])
        clock = self.to_dict() | {"elapsed": values["clock"]["elapsed"]}
        if before.distillation_started is not None:
            clock["distillation_started"] = before.distillation_started
        done = position.round + position.kd_steps / before.kd_steps_per_round
        round_now = min(int(done / before.rounds * self.rounds + 1e-9), self.rounds)
        if synthesises and position.round >= before.warmup_rounds:
            round_now = max(round_now, self.warmup_rounds)
        if position.round >= before.rounds:
            round_now = self.rounds
        without_steps = self.warmup_rounds if synthesises else 0
        steps = max(round_now - without_steps, 0) * self.kd_steps_per_round
        now = vars(Position(round=round_now))
        return {**values, "clock": clock, "position": now, "steps_taken": steps}


__all__ = ["Clock", "Costs", "Position"]
