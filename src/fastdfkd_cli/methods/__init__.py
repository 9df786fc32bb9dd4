"""The methods: one paper, one file. A method makes images; it imports no other method.

What an engine asks of a method is the :class:`Synthesizer` protocol and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdfkd_cli.acceleration import EAGER, Acceleration
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.methods.base import SyntheticBatch
from fastdfkd_cli.methods.cmi import CMI
from fastdfkd_cli.methods.dafl import DAFL
from fastdfkd_cli.methods.deepinversion import DeepInversion
from fastdfkd_cli.methods.dfad import DFAD
from fastdfkd_cli.methods.dfq import DFQ
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.methods.generative_dfd import GenerativeDFD
from fastdfkd_cli.methods.nayer import NAYER
from fastdfkd_cli.methods.zskt import ZSKT
from fastdfkd_cli.processes import ALONE, Group


class Synthesizer(Protocol):
    """Produces batches of images for a teacher, and can be stored and taken up again."""

    @property
    def micro_batch(self) -> int:
        """Images that the teacher sees at a time; 0: the whole batch. It falls where memory runs out."""
        ...

    def prepare(self, student: nn.Module | None = None) -> None:
        """Make ready for batches with ``student``, or without one: compile, reserve. No result depends on it."""
        ...

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Make one batch; with a student (images in [0, 1] -> logits), the adversarial term takes part."""
        ...

    def renew(self) -> None:
        """The schedule's one-time renewal of diversity (``synthesis.generator_reset_after``)."""
        ...

    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates, for a run whose images broke; part of the state."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that the next batch depends on, random states included."""
        ...

    def is_own(self, name: str) -> bool:
        """Whether an entry of :meth:`state_dict` is this process's alone; the others are alike in all of several."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave.

        Where another number of processes gave it, what :meth:`is_own` is missing, and is drawn anew.
        """
        ...

    def close(self) -> None:
        """Take everything off the teacher again."""
        ...


class Feeder(Synthesizer, Protocol):
    """A method whose settings say that it ``feeds`` the student, which then learns from no pool."""

    def follow(self, done: float) -> None:
        """Take the rate that belongs to the share ``done`` of the distillation, 0 to 1, for the next batch."""
        ...

    def training_batch(self, count: int) -> Tensor:
        """Images ``[count, C, H, W]`` in [0, 1] for one KD step, made now."""
        ...


METHODS: dict[str, Callable[..., Synthesizer]] = {
    "fast": FastMeta,
    "deepinversion": DeepInversion,
    "cmi": CMI,
    "dafl": DAFL,
    "zskt": ZSKT,
    "dfq": DFQ,
    "dfad": DFAD,
    "nayer": NAYER,
    "generative-dfd": GenerativeDFD,
}


def build_method(
    config: RunConfig,
    teacher: nn.Module,
    *,
    image_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    amp: bool,
    seed: int | None = None,
    acceleration: Acceleration = EAGER,
    group: Group = ALONE,
) -> Synthesizer:
    """Build the method that ``config.method`` names.

    Args:
        config: the run's settings.
        teacher: takes ``[B, C, H, W]`` in [0, 1] and returns logits; frozen, in evaluation mode, on ``device``.
        image_size: C, H, W.
        num_classes: classes to draw labels from.
        device: where to work.
        amp: bf16 autocast in the networks (losses and statistics stay in float32).
        seed: instead of ``config.seed``.
        acceleration: graphs, compilation and micro-batches; none unless it is given.
        group: the processes that make each batch together.
    """
    keywords: dict[str, Any] = {"image_size": image_size, "num_classes": num_classes, "device": device, "amp": amp}
    keywords |= {"acceleration": acceleration, "group": group}
    return METHODS[config.method](config, teacher, seed=config.seed if seed is None else seed, **keywords)


__all__ = ["METHODS", "Feeder", "SyntheticBatch", "Synthesizer", "build_method"]
