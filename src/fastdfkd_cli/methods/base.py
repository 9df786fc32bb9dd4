"""What all methods share: the batch they hand out and the care they take of the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class SyntheticBatch:
    """One synthesised batch."""

    #: uint8 ``[B, C, H, W]``.
    images: Tensor
    #: The classes that were asked for, int64 ``[B]``.
    labels: Tensor
    #: The loss terms of the kept images, unweighted, as zero-dimensional tensors still on the device.
    losses: dict[str, Tensor]


@contextmanager
def frozen(student: nn.Module | None) -> Iterator[None]:
    """Evaluate ``student`` without gradients for its weights, and restore its mode afterwards.

    Gradients still flow through it to the images.
    """
    if student is None:
        yield
        return
    modes = [(module, module.training) for module in student.modules()]
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


__all__ = ["SyntheticBatch", "frozen"]
