"""BatchNorm in training over the batches of several processes, so that they normalise as one process would.

torch's ``SyncBatchNorm`` has no CPU path and is another module. Here the user's own layers stay where they are, with
their weights, names and hooks; for a while they only compute in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastdfkd_cli.bn_stats import add_line_, channel_moments
from fastdfkd_cli.distributed import mean_, merged_moments
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.processes import Group

#: Layers whose forward pass is known: a layer that overrides it may compute anything.
_KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)


class _NormOfAll(torch.autograd.Function):
    """BatchNorm by the statistics of all processes' batches, of one size: one message forward, one backward.

    With x^ = (x - mean) / std over all N numbers of a channel, and g the loss's derivative in the output, that in x is
    ``weight / std * (g - sum(g) / N - x^ sum(g x^) / N)``. The library computes it with this process's sums; the
    difference to all processes' is a line in x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = merged_moments(group, *channel_moments(x))
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        scale = rstd if weight is None else rstd * weight
        factors = torch.ones_like(mean) if weight is None else weight
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        grad_x, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(memory_format=layout) if x.dim() == 4 else grads[0].contiguous(),
            x, factors, None, None, mean, rstd, True, ctx.eps, [True, True, True],
        )  # fmt: skip
        found = torch.stack([sum_g, sum_gx])
        shared = found.clone()
        mean_(ctx.group, [shared])
        apart, apart_x = (found - shared) * (x.shape[1] / x.numel()) * scale
        slope = apart_x * rstd
        grad_x = add_line_(grad_x, x, apart - slope * mean, slope)
        return grad_x, None if weight is None else sum_gx, None if weight is None else sum_g, None, None


class _Synced:
    """What a layer's class is preceded by while it normalises over all processes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)  # type: ignore[misc]
        output = _normalised(self, x)
        return self.act(self.drop(output)) if isinstance(self, BatchNormAct2d) else output


# A compiler cannot look through a message.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _normalised(layer: Any, x: Tensor) -> Tensor:
    layer._check_input_dim(x)
    group: Group = layer._group
    output, mean, var = _NormOfAll.apply(x, layer.weight, layer.bias, layer.eps, group)
    if layer.training and layer.running_mean is not None:
        layer.num_batches_tracked.add_(1)
        share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        count = group.world_size * x.numel() // x.shape[1]
        with torch.no_grad():
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
            layer.running_var.lerp_((var * (count / (count - 1))).to(layer.running_var.dtype), share)
    return output


_synced_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _synced_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _synced_classes:
        _synced_classes[kind] = type(f"Synced{kind.__name__}", (_Synced, kind), {})
    return _synced_classes[kind]


def _to_sync(model: nn.Module) -> list[nn.Module]:
    """The layers that normalise by the batch in training.

    Raises:
        UsageError: one of them does it in a way of its own.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        if type(layer).forward not in [known.forward for known in (*_KNOWN, _Synced)] or "forward" in vars(layer):
            raise UsageError(
                f"The student's {type(layer).__name__} layers normalise in a way of their own, which several processes "
                "cannot share: run in one process, or use torch's BatchNorm."
            )
    return layers


def sync_batch_norm(model: nn.Module, group: Group) -> None:
    """Have the BatchNorm layers of ``model`` normalise over the batches of all processes, in training.

    Names, weights and buffers stay what they are; :func:`unsync_batch_norm` takes it back. Each process must show the
    model batches of one size, in one order. In evaluation mode nothing changes.

    Raises:
        UsageError: the model has BatchNorm layers of its own kind.
    """
    for layer in _to_sync(model) if group.several else ():
        if not isinstance(layer, _Synced):
            layer.__class__ = _synced_class(type(layer))
        layer._group = group  # type: ignore[assignment]


def unsync_batch_norm(model: nn.Module) -> None:
    """Undo :func:`sync_batch_norm`."""
    for layer in model.modules():
        if isinstance(layer, _Synced):
            layer.__class__ = type(layer).__bases__[1]
            del layer._group


@contextmanager
def synced_batch_norm(model: nn.Module, group: Group) -> Iterator[None]:
    """:func:`sync_batch_norm` while the block runs."""
    sync_batch_norm(model, group)
    try:
        yield
    finally:
        unsync_batch_norm(model)


__all__ = ["sync_batch_norm", "synced_batch_norm", "unsync_batch_norm"]
