"""A run whose figures stopped being numbers: how that is found, and what to lower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fastdfkd_cli.errors import FastDFKDError

#: A KD loss beyond this is as good as not finite.
EXPLODED = 1e6


class Diverged(FastDFKDError):
    """A figure stopped being finite, and what to lower."""

    def __init__(self, what: str, section: Literal["distillation.lr", "synthesis.lr_generator"]) -> None:
        super().__init__(f"{what}; nothing was exported. Lower {section}, or use --no-amp.")
        self.what = what
        self.section = section


def finite(phase: str, step: int, figures: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Read figures off the device, and refuse those that stopped being numbers.

    Args:
        phase: ``synthesis`` or ``distillation``.
        step: what it has come to, in images or KD steps, for the message.

    Raises:
        Diverged: one of them is not finite, or the KD loss is as good as that.
    """
    values = {name: float(value) for name, value in figures.items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    unit = "image" if phase == "synthesis" else "step"
    if broken:
        # An adversarial term that breaks alone is the student's doing.
        student = phase == "distillation" or set(broken) == {"adversarial", "total"}
        raise Diverged(
            f"The {phase} loss stopped being finite at {unit} {step} ({', '.join(broken)})",
            "distillation.lr" if student else "synthesis.lr_generator",
        )
    if phase == "distillation" and values.get("loss", 0.0) > EXPLODED:
        raise Diverged(f"The {phase} loss exploded at {unit} {step} ({values['loss']:.3g})", "distillation.lr")
    return values


def broken_weight(net: nn.Module) -> str | None:
    """The first weight or statistic that is not finite, by name: a last update can break it behind a good loss."""
    state = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    # One wait for the device, not one for each tensor.
    fine = torch.stack([torch.isfinite(tensor).all() for tensor in state.values()]).tolist()
    return next((name for name, whole in zip(state, fine, strict=True) if not whole), None)


__all__ = ["Diverged", "broken_weight", "finite"]
