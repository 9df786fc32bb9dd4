"""The feature term: how far a batch's statistics are from those a teacher's BatchNorm layers remember.

:class:`BatchNormStatistics` is a context manager that reads the inputs of all BatchNorm layers while a model runs,
and takes everything off the model again on leaving. Eq. 13 to 15 of Fang et al., AAAI 2022; the term is Yin et al.'s
(DeepInversion, CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdfkd_cli.distributed import merged_moments
from fastdfkd_cli.processes import Group


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of ``model`` that keep running statistics, by name.

    Told by their buffers rather than by their class, so that frozen and fused variants (torchvision's
    ``FrozenBatchNorm2d``, timm's ``BatchNormAct2d``) count too. Layers over anything but ``[B, C, ...]`` do not exist
    in torch.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    }


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel of ``[B, C, ...]``, in float32 at least, without a derivative.

    ``torch.var_mean`` over a channels-last activation takes ten times as long on a CPU as the fused kernel that
    BatchNorm uses in training, and wants a float32 copy of a bf16 one.
    """
    if x.device.type in ("cpu", "cuda") and x.dim() >= 3 and x.dtype in (torch.float32, torch.bfloat16):
        # Float32 running buffers make the kernel accumulate and answer in float32 for a bf16 input too.
        scratch = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
        mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
        return mean.float(), var.float()
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(wide, dim=dims, correction=0)
    return mean, var


def _gradient_line(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and slope ``[C]`` of the moments' gradient in x: ``d mean/dx = 1/N``, ``d var/dx = 2 (x - mean)/N``."""
    count = x.numel() // x.shape[1]
    slope = 2.0 / count * grad_var
    return grad_mean / count - slope * mean, slope


#: Entries that a vector per channel is repeated to: a kernel's inner loop over 16 channels is mostly overhead.
_ROW = 512


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A channels-last ``[B, C, H, W]`` as a matrix that holds each channel several times in a row; how often.

    Anything else comes back as it is, with 0.
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return x, 0
    pixels, channels = x.numel() // x.shape[1], x.shape[1]
    times = 1
    while times * channels < _ROW and pixels % (2 * times) == 0:
        times *= 2
    return x.permute(0, 2, 3, 1).reshape(pixels // times, times * channels), times


def _along(x: Tensor, times: int, vector: Tensor) -> Tensor:
    """A ``vector`` ``[C]`` in the shape in which it meets what :func:`_rows` made of x."""
    vector = vector.to(x.dtype)
    return vector.repeat(times) if times else vector.view(1, -1, *([1] * (x.dim() - 2)))


class _ChannelMoments(torch.autograd.Function):
    """:func:`_moments` with their derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        offset, slope = _gradient_line(x, mean, *grads)
        rows, times = _rows(x)
        result = torch.addcmul(_along(x, times, offset), rows, _along(x, times, slope))
        return _as(x, result, times)


class _ObservedNorm(torch.autograd.Function):
    """A frozen BatchNorm's output and the moments of its input, with both gradients in two passes.

    Apart, they take three operations: the library's derivative, which also sums what the gradients of the layer's own
    weights would need, the moments' one, and their sum.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found_mean, found_var = _moments(x)
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, found_mean, scale if weight is None else scale * weight)
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), found_mean, found_var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        grad_output, grad_mean, grad_var = grads
        x, mean, scale = ctx.saved_tensors
        offset, slope = _gradient_line(x, mean, grad_mean, grad_var)
        rows, times = _rows(x)
        result = torch.addcmul(_along(x, times, offset), rows, _along(x, times, slope))
        if times:
            grad_output, _ = _rows(grad_output.contiguous(memory_format=torch.channels_last))
        result.addcmul_(grad_output, _along(x, times, scale))
        return _as(x, result, times), None, None, None, None, None


def _as(x: Tensor, result: Tensor, times: int) -> Tensor:
    """Undo :func:`_rows`."""
    if not times:
        return result
    batch, channels, height, width = x.shape
    return result.view(batch, height, width, channels).permute(0, 3, 1, 2)


def add_line_(target: Tensor, x: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """``target + offset + slope * x`` with an offset and a slope ``[C]`` per channel: ``target`` itself, changed.

    Both tensors are ``[B, C, ...]``, of one memory format.
    """
    rows, times = _rows(x)
    if not times:
        return target.addcmul_(x, _along(x, 0, slope)).add_(_along(x, 0, offset))
    result, _ = _rows(target.contiguous(memory_format=torch.channels_last))
    result.addcmul_(rows, _along(x, times, slope)).add_(_along(x, times, offset))
    return _as(x, result, times)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of ``x`` ``[B, C, ...]`` per channel, over all other dimensions: two ``[C]``.

    Computed in float32 (in float64 for a float64 input).
    """
    return _ChannelMoments.apply(x)


def shifted_moments(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`channel_moments` in plain operations, which a compiler fuses with what comes before and after them.

    One pass needs ``E[x^2] - E[x]^2``, which cancels where the mean is large; taken about ``centre`` ``[C]``, a guess
    at the mean, it does not.
    """
    shape = (1, -1, *([1] * (x.dim() - 2)))
    dims = [d for d in range(x.dim()) if d != 1]
    shifted = x.float() - centre.float().view(shape)
    mean = shifted.mean(dims)
    return mean + centre, (shifted * shifted).mean(dims) - mean * mean


class _MomentsOfAll(torch.autograd.Function):
    """:func:`moments_of_all` with its derivative."""

    @staticmethod
    def forward(ctx: Any, moments: Tensor, group: Group) -> Tensor:
        mean, var = moments.chunk(2)
        merged_mean, merged_var = merged_moments(group, mean, var)
        ctx.save_for_backward(mean - merged_mean)
        return torch.cat([merged_mean, merged_var])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (apart,) = ctx.saved_tensors
        grad_mean, grad_var = grads[0].chunk(2)
        return torch.cat([grad_mean + 2 * apart * grad_var, grad_var]), None


def moments_of_all(group: Group, moments: Tensor) -> Tensor:
    """The moments ``[2 S]`` of the batches of all processes together, from those of each, by one message.

    The derivative is that of the *mean over processes* of their losses, each of which counts what it computes from the
    result once: the factor 1/R of this process's part meets R equal terms. So each of R processes divides its loss by
    R, and the gradients in the images (in z) are those of one process with the whole batch.
    """
    return _MomentsOfAll.apply(moments, group) if group.several else moments


@dataclass(frozen=True)
class _Layout:
    """What a vector of moments is compared with, and where each entry stands in a table with a row for each norm."""

    targets: Tensor
    positions: Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> _Layout:
        remembered = [
            tensor.detach().float()
            for tensor in [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
            if isinstance(tensor, Tensor)
        ]
        sizes = [tensor.numel() for tensor in remembered]
        rows = [torch.arange(size) + row * max(sizes) for row, size in enumerate(sizes)]
        targets = torch.cat(remembered)
        return cls(targets, torch.cat(rows).to(targets.device), len(sizes), max(sizes))


class BatchNormStatistics:
    """Feature regularisation over all BatchNorm layers of ``model``, with or without momentum.

    Used as a context manager around the model's calls::

        with BatchNormStatistics(teacher, momentum=0.9) as statistics:
            logits, moments = statistics.observe(x)
            loss = statistics.loss(moments)
            ...
            statistics.accumulate(moments)      # once per batch, after the last inner step

    The moments of all layers travel as one vector ``[2 S]``, S being the number of channels of all layers together:
    first all means, then all variances. A teacher of fifty layers then costs a handful of small operations instead of
    a thousand.

    Args:
        model: a model with BatchNorm layers; nothing stays on it after the ``with`` block.
        momentum: the weight of the accumulated statistics in Eq. 15 (the paper's ``1 - m``); 0 gives Eq. 13.

    Raises:
        ValueError: ``model`` keeps no running statistics.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.0) -> None:
        self.model = model
        self.layers = batch_norm_layers(model)
        if not self.layers:
            raise ValueError("the model has no layer with running statistics")
        self.momentum = momentum
        self._latest: list[tuple[str, Tensor, Tensor]] | None = None  # only while a call is observed
        self._layout: _Layout | None = None
        # Eq. 14's statistics [2 S], and their weight in Eq. 15: 0 until there are some.
        self._accumulated: tuple[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []

    def __enter__(self) -> BatchNormStatistics:
        for name, layer in self.layers.items():
            if type(layer) is nn.BatchNorm2d and "forward" not in vars(layer):
                layer.forward = self._forward(name, layer)  # type: ignore[method-assign, assignment]
                self._replaced.append(layer)
            else:
                self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._replaced:
            del self._replaced.pop().forward

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Only an observed call is of interest: KD's teacher pass must not pay for this.
            if self._latest is None:
                return
            if torch.compiler.is_compiling():
                mean, var = shifted_moments(inputs[0], layer.running_mean)  # type: ignore[arg-type]
            else:
                mean, var = channel_moments(inputs[0])
            self._latest.append((name, mean, var))

        return read

    def _forward(self, name: str, layer: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
        """What stands in for a plain layer's own ``forward``, so that reading its input costs less."""
        read = self._hook(name)

        def forward(x: Tensor) -> Tensor:
            frozen = not layer.training and not any(p.requires_grad for p in layer.parameters(recurse=False))
            mean, var = layer.running_mean, layer.running_var
            if self._latest is None or torch.compiler.is_compiling() or not frozen or mean is None or var is None:
                read(layer, (x,))
                return type(layer).forward(layer, x)
            output, *moments = _ObservedNorm.apply(x, mean, var, layer.weight, layer.bias, layer.eps)
            self._latest.append((name, *moments))
            return output

        return forward

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on ``x``: its output, and the moments ``[2 S]`` of its BatchNorm layers' inputs."""
        self._latest = []
        try:
            output = self.model(x)
            latest = self._latest
        finally:
            self._latest = None
        if not latest:
            raise RuntimeError("no BatchNorm layer of the model ran")
        if self._layout is None:
            self._layout = _Layout.of([self.layers[name] for name, _, _ in latest])
            self._check_accumulated(self._layout)
        return output, torch.cat([mean for _, mean, _ in latest] + [var for _, _, var in latest])

    def _check_accumulated(self, layout: _Layout) -> None:
        targets = layout.targets
        if self._accumulated is None:
            self._accumulated = torch.zeros_like(targets), torch.zeros((), device=targets.device)
        elif self._accumulated[0].shape != targets.shape:
            raise ValueError("these statistics are another model's")

    def loss(self, moments: Tensor) -> Tensor:
        """Sum over layers of ``||mean - running mean|| + ||var - running var||`` (Eq. 13, or Eq. 15 with momentum).

        Variances, not deviations, are compared, as in DeepInversion and the published runs.
        """
        layout = self._layout
        assert layout is not None, "observe comes first"
        distances = self._mixed(moments) - layout.targets.to(moments.dtype)
        table = distances.new_zeros(layout.rows * layout.columns).index_copy(0, layout.positions, distances)
        return torch.linalg.vector_norm(table.view(layout.rows, layout.columns), dim=1).sum()

    def _mixed(self, moments: Tensor) -> Tensor:
        """Eq. 15: the batch's moments and the accumulated ones; the batch's alone before there are any."""
        if self.momentum == 0:
            return moments
        assert self._accumulated is not None, "observe comes first"
        accumulated, weight = self._accumulated
        return weight * accumulated + (1 - weight) * moments

    @torch.no_grad()
    def accumulate(self, moments: Tensor) -> None:
        """Eq. 14: move the accumulated statistics towards a batch's, in place. Without momentum, nothing is kept."""
        if self.momentum == 0:
            return
        assert self._accumulated is not None, "observe comes first"
        accumulated, weight = self._accumulated
        accumulated.copy_(self._mixed(moments))
        weight.fill_(self.momentum)

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulated statistics and their weight; empty before the first observed call."""
        if self._accumulated is None:
            return {}
        return {"accumulated": self._accumulated[0], "weight": self._accumulated[1]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave for the same model.

        Raises:
            ValueError: it is another model's (told at the first observed call of a new object).
        """
        if not state:
            return
        self._accumulated = state["accumulated"].clone(), state["weight"].clone()
        if self._layout is not None:
            self._check_accumulated(self._layout)


__all__ = [
    "BatchNormStatistics",
    "add_line_",
    "batch_norm_layers",
    "channel_moments",
    "moments_of_all",
    "shifted_moments",
]
