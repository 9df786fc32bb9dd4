"""Attention transfer: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017.

A student is brought to look where its teacher looks: the spatial attention maps of pairs of layers are compared
(:func:`fastdfkd_cli.losses.attention_transfer`). Which layers make a pair is found by running both networks once: of
each spatial size that occurs in both, the last layer in either that gives it. In a network of stages that is the
stage's own output, what the papers take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.losses import attention_map, attention_transfer

#: Height and width.
Size = tuple[int, int]


class AttentionPairs:
    """The layers of teacher and student whose attention is compared.

    Args:
        teacher, student: images in [0, 1] -> logits; run once on ``images``, in evaluation mode, and left as they were.
        images: float ``[B, C, H, W]``; two are enough.

    Raises:
        UsageError: the two have no spatial size in common.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, images: Tensor) -> None:
        of_teacher, of_student = last_layers(teacher, images), last_layers(student, images)
        #: Whose layers they are.
        self.networks = teacher, student
        #: From the largest on.
        self.sizes = sorted(of_teacher.keys() & of_student.keys(), reverse=True)
        if not self.sizes:
            raise UsageError(
                f"Teacher and student have no activations of equal height and width ({_listed(of_teacher)}; "
                f"{_listed(of_student)}), which attention transfer compares: --set distillation.attention_weight=0."
            )
        self.teacher = {size: of_teacher[size] for size in self.sizes}
        self.student = {size: of_student[size] for size in self.sizes}

    @contextmanager
    def compared(self) -> Iterator[Callable[[], Tensor]]:
        """Around one pass of each network; what it gives computes the attention transfer of the two.

        Nothing stays on the networks after the block.
        """
        with attention_maps(self.teacher) as of_teacher, attention_maps(self.student) as of_student:
            yield lambda: attention_transfer(
                [of_teacher[size] for size in self.sizes], [of_student[size] for size in self.sizes]
            )


@contextmanager
def attention_maps(layers: Mapping[Size, nn.Module]) -> Iterator[dict[Size, Tensor]]:
    """The attention maps ``[B, H W]`` of a pass that is run within this block, by size.

    Of a layer that runs several times the last counts. Nothing stays on the layers after the block.
    """
    found: dict[Size, Tensor] = {}

    def read(layer: nn.Module, inputs: object, output: object) -> None:
        # A layer may run at several sizes: a shared activation function, for one.
        if (size := _size(output)) is not None and layers.get(size) is layer:
            assert isinstance(output, Tensor)
            found[size] = attention_map(output)

    handles = [layer.register_forward_hook(read) for layer in dict.fromkeys(layers.values())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def last_layers(model: nn.Module, images: Tensor) -> dict[Size, nn.Module]:
    """The last layer of a pass that gives a map of each size: those of ``[B, C, H, W]`` with more than one position.

    Normalisation does not count: what it gives is not an activation yet.
    """
    found: dict[Size, nn.Module] = {}

    def read(layer: nn.Module, inputs: object, output: object) -> None:
        if (size := _size(output)) is not None:
            found[size] = layer

    layers = [layer for layer in model.modules() if layer is not model and not _normalises(layer)]
    modes = [(layer, layer.training) for layer in model.modules()]
    handles = [layer.register_forward_hook(read) for layer in layers]
    model.eval()
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
        for layer, training in modes:
            layer.training = training
    return found


def _size(output: object) -> Size | None:
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[2] * output.shape[3] < 2:
        return None
    return output.shape[2], output.shape[3]


def _normalises(layer: nn.Module) -> bool:
    kept = isinstance(getattr(layer, "running_mean", None), Tensor)
    return kept or isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)


def _listed(layers: Mapping[Size, nn.Module]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in layers) or "none"


__all__ = ["AttentionPairs", "attention_maps", "last_layers"]
