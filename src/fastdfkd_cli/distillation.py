"""The engine behind ``fastdfkd distill``: synthesis and distillation, interleaved (the paper's Algorithm 1).

It takes models that are already loaded, yields :class:`~fastdfkd_cli.records.Record` while it works, and draws and
writes nothing.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdfkd_cli import stopping
from fastdfkd_cli.acceleration import EAGER, WARM_UP, Acceleration, can_checkpoint
from fastdfkd_cli.augment import augment, mix
from fastdfkd_cli.clock import Clock, Costs, Position
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.distributed import Agreement, largest, of_leader
from fastdfkd_cli.divergence import Diverged, finite
from fastdfkd_cli.errors import FastDFKDError, is_out_of_memory
from fastdfkd_cli.labels import label_views, soft_labels
from fastdfkd_cli.methods import Feeder, Synthesizer
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.processes import ALONE, Group
from fastdfkd_cli.records import Phase, Record
from fastdfkd_cli.runtime import synchronize
from fastdfkd_cli.student import Student

#: Images that a run bounded only by the clock may hold before the oldest make room.
DEFAULT_POOL_IMAGES = 100_000
#: Seconds between two records of a phase.
RECORD_EVERY = 1.0
#: How often a run whose figures stopped being finite is put back to an earlier round, and what the rate falls to.
RETRIES = 3
SLOWER = 0.25
#: KD steps between two looks at the figures, at least, where a method takes turns of a few: a round's border costs a
#: copy of the student and the method, and makes the device wait.
CHECK_EVERY = 50


def _nothing() -> None:
    """Where nobody waits for a border."""


class Distillation:
    """One run. Iterate over it to carry it out::

        run = Distillation(config, teacher, student, synthesizer=..., pool=..., device=..., amp=...)
        for record in run:
            ...
        run.student.net, run.pool, run.costs

    Args:
        config: the run's settings.
        teacher: frozen, in evaluation mode; images in [0, 1] -> logits.
        student: images in [0, 1] -> logits; trained in place.
        synthesizer: makes the images; None to distil on ``pool`` as it stands.
        image_size: C, H, W of the images.
        pool: images made earlier, for a run without synthesis.
        acceleration: how KD steps may be made faster; synthesis has its own from its method.
        group: the processes that carry it out together. ``config``'s batches and rounds are those of each, the pool is
            its own, and the student and all that is decided are the same in all.

    Raises:
        FastDFKDError: a loss or a weight stopped being finite, again and again at lower rates.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        student: nn.Module,
        *,
        synthesizer: Synthesizer | None,
        image_size: tuple[int, int, int],
        device: torch.device,
        amp: bool,
        pool: ImagePool | None = None,
        acceleration: Acceleration = EAGER,
        group: Group = ALONE,
    ) -> None:
        if synthesizer is None and (pool is None or not len(pool)):
            raise ValueError("a run needs a synthesizer or a pool with images")
        self.config = config
        self.teacher = teacher
        self.synthesizer = synthesizer
        self.device = device
        self.amp = amp
        self.group = group
        classes = 0
        if config.distillation.noise_weight:
            classes = soft_labels(teacher, torch.full((1, *image_size), 0.5, device=device), amp).shape[1]
        self.student = Student(student, config.distillation, device, amp, acceleration, group, classes)
        self.pool = pool if pool is not None else self._new_pool(image_size)
        self.rng = torch.Generator().manual_seed(group.seed(config.seed + 1))
        self.costs = Costs()
        self.images_made = 0  #: By all processes.
        self.steps_taken = 0
        self.position = Position()
        #: Called at every border at which the run can be saved and gone on with: after each batch and each KD step.
        self.at_border: Callable[[], None] = _nothing
        #: The returns to an earlier round: why, what was lowered, and the round.
        self.retries: list[dict[str, Any]] = []
        self.acceleration = acceleration
        self._taken_up = self._distilling = False
        self._agreement = Agreement(group)
        self._request, self._seconds = 0, 0.0  # what was agreed on last
        self.clock = Clock.of(config, self._now)
        self._given = int(largest(group, len(self.pool))[0])  # parts of a set may differ by an image
        made = config.synthetic_images if synthesizer is not None else self._given
        #: Variations of each pool image that are labelled once; 0: what is drawn is labelled.
        self.label_views = label_views(
            config.distillation,
            images=made,
            kd_steps=self._total_steps,
            feeds=synthesizer is not None and config.synthesis.feeds,
        )
        self._last_record = -math.inf if group.several else 0.0
        self._batch_losses: dict[str, Tensor] = {}
        self._step_figures: dict[str, Tensor | float] = {}

    def _now(self) -> float:
        return self._seconds if self.group.several else time.perf_counter()

    def prepare(self) -> None:
        """Compile what the run will compute, where that is wanted; no result depends on it."""
        if self.synthesizer is not None:
            self.synthesizer.prepare(self.student.net)
        self.student.prepare(None if self.label_views else self.teacher, self.pool.image_size)

    def _new_pool(self, image_size: tuple[int, int, int]) -> ImagePool:
        timed = self.config.schedule.time_budget is not None and not self.config.synthesis.feeds
        wanted = DEFAULT_POOL_IMAGES if timed else self.config.pooled_images
        capacity = self.config.pool_size or max(wanted, self.config.synthesis.batch_size)
        pool = ImagePool(image_size, capacity, self.device)
        if not timed:
            pool.reserve(capacity)
        return pool

    def __iter__(self) -> Iterator[Record]:
        self._agreement = Agreement(self.group)  # its clock starts here
        if not self._taken_up:
            self.clock.start()
            if self.synthesizer is None and self.clock.budget is not None and self.label_views:
                # Rounds have no end under a time budget: here it decides how often an image is drawn.
                steps = int(self.clock.budget / self.time_kd_step())
                self.label_views = label_views(self.config.distillation, images=self._given, kd_steps=steps)
        self._remember()
        while True:
            try:
                yield from self._rounds()
                # Most figures are never read (see _record_is_due); the last ones are, so that nothing broken is handed
                # out.
                losses_then = self.check()
                self.student.finish()
                break
            except Diverged as error:
                self._slow_down(error)
            except Exception as error:
                if not is_out_of_memory(error) or not self._keep_less():
                    raise
        if self.synthesizer is not None:
            rate = self.images_made / max(self.costs.synthesis, 1e-9)
            yield self._synthesis_record(rate=rate, values=losses_then)
        yield self._distillation_record(rate=self.steps_taken / max(self.costs.distillation, 1e-9))

    def _rounds(self) -> Iterator[Record]:
        """Algorithm 1's outer loop, from where the run stands."""
        position = self.position
        while not self._finished():
            distils = self._is_distilled(position.round)
            # A run that is taken up within a round's KD steps has its batches.
            if self.synthesizer is not None and not position.kd_steps and not self._synthesis_is_over():
                if not position.batches and self._renews(position.round):
                    self.synthesizer.renew()
                yield from self._synthesize(distils)
                # A time budget decides in the first round how long the warm-up is.
                distils = distils or self._is_distilled(position.round)
            if distils:
                yield from self._distil()
            position.round, position.batches, position.kd_steps = position.round + 1, 0, 0
            if position.round % self._rounds_between_checks == 0:
                self.check()
                self._remember()

    @property
    def _rounds_between_checks(self) -> int:
        """Rounds that may be lost to a figure that is not finite: one, or as many as make ``CHECK_EVERY`` KD steps."""
        if self.synthesizer is None or not self.config.synthesis.feeds:
            return 1
        return -(-CHECK_EVERY // self.clock.kd_steps_per_round)

    def _finished(self) -> bool:
        if self.clock.budget is not None:
            return self.clock.out_of_time and self.steps_taken > 0
        return self.position.round >= self.clock.rounds

    def _is_distilled(self, round_index: int) -> bool:
        return self.synthesizer is None or round_index >= self.clock.warmup_rounds or self.clock.out_of_time

    def _synthesis_is_over(self) -> bool:
        return self.clock.is_final(self.position.round) or self.clock.out_of_time

    def _renews(self, round_index: int) -> bool:
        after = self.clock.renewal
        return after > 0 and round_index == self.clock.warmup_rounds + after

    def _synthesize(self, distils: bool) -> Iterator[Record]:
        """A round's batches. The adversarial term counts only once the student is being trained."""
        position = self.position
        # Not a range: under a time budget the first batch decides how many a round has.
        while position.batches < self.clock.batches_per_round and not (position.batches and self.clock.out_of_time):
            began = time.perf_counter()
            count = self.synthesize_batch(with_student=distils)
            synchronize(self.device)
            seconds = time.perf_counter() - began
            self.costs.synthesis += seconds
            position.batches += 1
            if self.clock.budget is not None and not self.clock.fitted:
                self._fit_schedule()
            self._border()
            if self._record_is_due():
                yield self._synthesis_record(rate=count / seconds, values=self.check())

    def _border(self) -> None:
        if self.group.several:
            self._request, self._seconds = self._agreement(stopping.request())
            if self._request:
                stopping.ask(self._request)  # also where the signal did not come
        self.at_border()

    @property
    def asked_to_stop(self) -> bool:
        """Whether this border is the one to stop at; the same for all processes."""
        return self._request != 0 if self.group.several else stopping.asked()

    def synthesize_batch(self, with_student: bool) -> int:
        """Make one batch and put it into the pool; the number of its images. The device may still be at work on it.

        Args:
            with_student: whether the student takes part (the adversarial term).
        """
        assert self.synthesizer is not None
        self._distilling = False
        if self.config.synthesis.feeds:
            done = self.clock.distilled(self.steps_taken, self._total_steps)
            cast(Feeder, self.synthesizer).follow(done)
        batch = self.synthesizer.synthesize(self.student.net if with_student else None)
        self.pool.add(batch.images, batch.labels)
        self.images_made += len(batch.images) * self.group.world_size
        self._batch_losses = batch.losses
        return len(batch.images)

    def _distil(self) -> Iterator[Record]:
        """A round's KD steps (Algorithm 1, lines 17 to 20)."""
        if self.clock.distillation_started is None:
            self.clock.distillation_started = self.clock.elapsed
        position = self.position
        began, steps_then, spent = time.perf_counter(), self.steps_taken, self.costs.distillation
        while position.kd_steps < self.clock.kd_steps_per_round and not (self.clock.out_of_time and self.steps_taken):
            self.kd_step()
            position.kd_steps += 1
            seconds = time.perf_counter() - began
            self.costs.distillation = spent + seconds  # a round can take minutes, and progress is weighed by cost
            self._border()
            if self._record_is_due():
                yield self._distillation_record(rate=(self.steps_taken - steps_then) / seconds)
        synchronize(self.device)
        self.costs.distillation = spent + time.perf_counter() - began

    def kd_step(self) -> None:
        """Take one KD step on a batch drawn from the pool (lines 18 and 19); the device may still be at work on it."""
        self._distilling = True
        self._label_new_images()
        lr = self.student.set_learning_rate(self.clock.distilled(self.steps_taken, self._total_steps))
        images, logits = self._training_batch(self.rng)
        teacher = self.teacher if logits is None else logits
        loss, agreement = self.student.learn(teacher, images, self.steps_taken)
        self.steps_taken += 1
        self._step_figures = {"loss": loss, "agreement": agreement, "lr": lr}

    def _training_batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Images for a KD step: the method's own, or some of the pool with their soft labels where those are kept."""
        config = self.config.distillation
        if self.synthesizer is not None and self.config.synthesis.feeds:
            made = cast(Feeder, self.synthesizer).training_batch(config.batch_size)
            images, logits = augment(made, rng, config.augmentation), None
        else:
            images, logits = self.pool.sample(config.batch_size, rng, config.augmentation)
        if config.mixes:
            images = mix(images, rng, mixup=config.mixup, cutmix=config.cutmix)
        return images, logits

    def _label_new_images(self) -> None:
        """Have the teacher label what came into the pool since the last time, where its labels are kept.

        Before a KD step and not before: images that make room for others in a warm-up are never labelled.
        """
        if self.label_views:
            config = self.config.distillation
            self.pool.label(
                lambda images: soft_labels(self.teacher, images, self.amp),
                self.label_views, config.augmentation, self.rng, batch_size=config.batch_size,
            )  # fmt: skip

    @property
    def _total_images(self) -> int:
        return self.config.synthetic_images * self.group.world_size

    @property
    def _total_steps(self) -> int:
        rounds = self.clock.rounds if self.synthesizer is None else self.clock.rounds - self.clock.warmup_rounds
        return rounds * self.clock.kd_steps_per_round

    def _fit_schedule(self) -> None:
        """Under a time budget: how many rounds fit, from the first batch, its labels and a few KD steps on a copy."""
        schedule, clock = self.config.schedule, self.clock
        began = time.perf_counter()
        self._label_new_images()
        synchronize(self.device)
        label_seconds = time.perf_counter() - began
        self.costs.distillation += label_seconds
        step_seconds = self.time_kd_step()
        (batch_seconds,) = of_leader(self.group, self.costs.synthesis + label_seconds)
        clock.fit(schedule, batch_seconds, step_seconds)
        # About as many images as will come, so that the pool need not grow step by step, a copy each time.
        final_rounds = round(schedule.final_rounds / schedule.rounds * clock.rounds)
        batches = (clock.rounds - final_rounds) * clock.batches_per_round
        self.pool.reserve(batches * self.config.synthesis.batch_size)

    def time_kd_step(self) -> float:
        """Seconds of one KD step, measured on steps that are taken back."""
        rng = torch.Generator().manual_seed(0)
        seconds = math.inf
        with self.student.tried():
            for _ in range(3 + (WARM_UP + 1 if self.student.acceleration.graphs else 0)):
                began = time.perf_counter()
                images, logits = self._training_batch(rng)
                self.student.learn(self.teacher if logits is None else logits, images, 0)
                synchronize(self.device)
                seconds = min(seconds, time.perf_counter() - began)
        return of_leader(self.group, seconds)[0]

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the rest of the run depends on but the pool's images and soft labels, at a border.

        The tensors are the run's own: they have to be copied before it goes on.
        """
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        if self.synthesizer is not None:
            tensors |= {f"method.{name}": tensor for name, tensor in self.synthesizer.state_dict().items()}
        tensors["rng.draws"] = self.rng.get_state()
        tensors["rng.cpu"] = torch.get_rng_state()  # dropout and the like
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        values = {
            "position": vars(self.position),
            "clock": self.clock.to_dict(),
            "costs": vars(self.costs),
            "images_made": self.images_made,
            "steps_taken": self.steps_taken,
            "label_views": self.label_views,
            "pool": {"added": self.pool.added, "unlabelled": self.pool.unlabelled, "held": len(self.pool)},
            "rate": self.student.rate,
            "retries": self.retries,
        }
        return tensors, values

    def take_up(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Go on from what :meth:`state` and the pool's :meth:`~fastdfkd_cli.pool.ImagePool.parts` gave.

        Where another number of processes gave it, what :meth:`is_own` is missing: then the run goes on from the last
        border between rounds that it has reached by now, with draws that follow from its seed.
        """
        others = "rng.draws" not in tensors
        if others and self.clock.budget is None:
            values = self.clock.in_own_rounds(values, synthesises=self.synthesizer is not None)
        self.clock = Clock.from_dict(values["clock"], self._now)
        self.costs = Costs(**values["costs"])
        self.label_views = values["label_views"]
        self.retries = list(values["retries"])
        added, unlabelled = values["pool"]["added"], values["pool"]["unlabelled"]
        self.pool.restore(parts, added, unlabelled, self.config.distillation.augmentation)
        self._put_back(tensors, values)
        self._taken_up = True

    def is_own(self, name: str) -> bool:
        """Whether an entry of :meth:`state` is this process's alone; the others are alike in all of several."""
        if name.startswith("method."):
            return self.synthesizer is not None and self.synthesizer.is_own(name.removeprefix("method."))
        return name in ("rng.draws", "rng.cpu", "rng.cuda")

    def _put_back(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Networks, position and random states as :meth:`state` gave them."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.student.load_state_dict(part("student."))
        self.student.rate = values["rate"]
        if self.synthesizer is not None:
            self.synthesizer.load_state_dict(part("method."))
        self.position = Position(**values["position"])
        self.images_made, self.steps_taken = values["images_made"], values["steps_taken"]
        if "rng.draws" not in tensors:
            seed = self.config.seed + 1 + self.position.round + self.steps_taken
            self.rng.manual_seed(self.group.seed(seed))
            torch.manual_seed(self.group.seed(seed + 1))
            return
        self.rng.set_state(tensors["rng.draws"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)

    def _remember(self) -> None:
        """Note where to go back to if the next round breaks: at rounds, so that it does not depend on the clock."""
        tensors, values = self.state()
        self._good = {name: tensor.detach().clone() for name, tensor in tensors.items()}, copy.deepcopy(values)

    def _go_back(self) -> None:
        """Put the run back to its last good round."""
        tensors, values = self._good
        self._put_back(tensors, values)
        self.pool.forget(values["pool"]["added"], values["pool"]["unlabelled"])
        self._batch_losses, self._step_figures = {}, {}

    def _slow_down(self, error: Diverged) -> None:
        """Go back to the last good round, and on from there at a lower rate.

        Raises:
            FastDFKDError: that has been done often enough.
        """
        if len(self.retries) >= RETRIES:
            raise FastDFKDError(
                f"{error.what}, after {RETRIES} returns to an earlier round with a lower rate each; nothing was "
                f"exported. Lower {error.section}, or use --no-amp."
            ) from error
        self._go_back()
        if error.section == "distillation.lr" or self.synthesizer is None:
            self.student.rate *= SLOWER
        else:
            self.synthesizer.slow_down(SLOWER)
        self.retries.append({"reason": error.what, "section": error.section, "round": self.position.round})
        self.acceleration.say(
            f"{error.what}: back to round {self.position.round} with a quarter of {error.section} "
            f"({len(self.retries)} of {RETRIES} times)"
        )
        self._remember()

    def _keep_less(self) -> bool:
        """After a KD step ran out of memory: have the student keep fewer activations; whether that was possible."""
        # A batch of images that does not fit is the method's own affair. And where there are several processes, the
        # others are waiting further on.
        if (
            self.group.several
            or not self._distilling
            or self.config.distillation.attention_weight  # reads activations that would not be kept
            or self.student.acceleration.checkpoint
            or not can_checkpoint(self.student.net)
        ):
            return False
        # What half a step did to the running statistics is undone with the rest of the round.
        self._go_back()
        self.student.acceleration = replace(self.student.acceleration, checkpoint=True)
        self.acceleration.say(
            f"out of memory in a KD step: back to round {self.position.round}; the student keeps few activations and "
            "computes the others twice from here"
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    @property
    def chosen(self) -> dict[str, Any]:
        """What the memory decided."""
        return {
            "micro_batch": self.synthesizer.micro_batch if self.synthesizer is not None else 0,
            "checkpoint": self.student.acceleration.checkpoint,
        }

    # -- records ------------------------------------------------------------------------------------------------

    def _record_is_due(self) -> bool:
        """Once a second at most: reading figures makes the device wait."""
        now = self.clock.now()
        if now - self._last_record < RECORD_EVERY:
            return False
        self._last_record = now
        return True

    def _synthesis_record(self, *, rate: float, values: dict[str, float]) -> Record:
        total = None if self.clock.budget is not None else self._total_images
        return self._record("synthesis", self.images_made, total, rate=rate, values=values)

    def _distillation_record(self, *, rate: float) -> Record:
        values = finite("distillation", self.steps_taken, self._step_figures)
        total = None if self.clock.budget is not None else self._total_steps
        return self._record("distillation", self.steps_taken, total, rate=rate, values=values)

    def _record(self, phase: Phase, step: int, total: int | None, *, rate: float, values: dict[str, float]) -> Record:
        progress = self._progress()
        elapsed = self.clock.elapsed
        remaining = elapsed * (1 - progress) / progress if progress > 0.01 else None
        if self.clock.budget is not None:
            remaining = max(self.clock.budget - elapsed, 0.0)
        return Record(
            phase=phase,
            step=step,
            total=total,
            unit="images" if phase == "synthesis" else "steps",
            progress=progress,
            elapsed=elapsed,
            remaining=remaining,
            rate=rate,
            values=values,
        )

    def _progress(self) -> float:
        """Share of the run that is done, each phase weighted by what it has cost so far."""
        if self.clock.budget is not None:
            return min(self.clock.elapsed / self.clock.budget, 1.0)
        distilled = self.steps_taken / self._total_steps
        if self.synthesizer is None:
            return distilled
        made = self.images_made / self._total_images
        if not self.steps_taken:
            # Nothing is known of a KD step's cost yet: count images, as if they were all there is.
            return min(made, 0.99) * self.clock.warmup_rounds / self.clock.rounds
        per_image = self.costs.synthesis / max(self.images_made, 1)
        per_step = max(self.costs.distillation, 1e-9) / self.steps_taken
        whole = per_image * self._total_images + per_step * self._total_steps
        return min((per_image * self.images_made + per_step * self.steps_taken) / whole, 1.0)

    def check(self) -> dict[str, float]:
        """Read the latest figures off the device, and return those of synthesis; look at the student too.

        Raises:
            Diverged: one of them stopped being a number.
        """
        # A student that broke breaks the adversarial term too: name the cause before its effect.
        finite("distillation", self.steps_taken, self._step_figures)
        if self.steps_taken:
            self.student.check()
        return finite("synthesis", self.images_made, self._batch_losses)


__all__ = ["DEFAULT_POOL_IMAGES", "Distillation"]
