"""Weight selection: a student begins with a part of its teacher's weights.

Xu et al., "Initializing Models with Larger Ones", ICLR 2024: where teacher and student are of one family, a layer of
the student has its namesake in the teacher, as large or larger, and begins with evenly spaced rows and columns of it.
A dimension of one size has the same places everywhere, so that the channels that are selected belong together. Of
deeper teachers, the layers that a student has too are the first of each stage.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdfkd_cli.models import LoadedModel, LogitsOnly


@torch.no_grad()
def select_weights(student: LoadedModel, teacher: LoadedModel) -> float:
    """Overwrite the student's weights with a selection of the teacher's; the share of its weights that was, 0 to 1.

    A layer is taken whole or not at all: each of its tensors needs one of the same name in the teacher, of as many
    dimensions, none of them smaller. Counters stay as they are.
    """
    source = {name: own for name, layer in _bare(teacher).named_modules() if (own := _own_tensors(layer))}
    taken = total = 0
    for name, layer in _bare(student).named_modules():
        own, other = _own_tensors(layer), source.get(name, {})
        total += sum(tensor.numel() for tensor in own.values())
        if own and all(_fits(tensor, other.get(key)) for key, tensor in own.items()):
            for key, tensor in own.items():
                tensor.copy_(_selected(other[key], tensor.shape))
                taken += tensor.numel()
    return taken / max(total, 1)


def _bare(model: LoadedModel) -> nn.Module:
    return model.module.module if isinstance(model.module, LogitsOnly) else model.module


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's weights and running statistics, without those of the layers within."""
    found = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return {name: tensor.detach() for name, tensor in found if tensor.is_floating_point() and tensor.dim()}


def _fits(tensor: Tensor, source: Tensor | None) -> bool:
    if source is None or source.dim() != tensor.dim():
        return False
    return all(wanted <= there for wanted, there in zip(tensor.shape, source.shape, strict=True))


def _selected(source: Tensor, shape: torch.Size) -> Tensor:
    for dim, (there, wanted) in enumerate(zip(source.shape, shape, strict=True)):
        if wanted < there:
            places = torch.linspace(0, there - 1, wanted, dtype=torch.float64).round().long()
            source = source.index_select(dim, places.to(source.device))
    return source


__all__ = ["select_weights"]
