"""The feature term: how far a batch's statistics are from those a teacher's BatchNorm layers remember.

:class:`BatchNormStatistics` is a context manager that reads the inputs of all BatchNorm layers while a model runs,
and takes its hooks away again on leaving. Eq. 13 to 15 of Fang et al., AAAI 2022; the term is Yin et al.'s
(DeepInversion, CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance per channel of ``[B, C, ...]``, in float32, in one pass over the input.

    ``torch.var_mean`` over a channels-last activation takes ten times as long on a CPU as the fused kernel that
    BatchNorm uses in training, and wants a float32 copy of a bf16 one; that kernel has no derivative of its own, so it
    stands here: ``d mean / dx = 1/N`` and ``d var / dx = 2 (x - mean) / N``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type in ("cpu", "cuda") and x.dim() >= 3 and x.dtype in (torch.float32, torch.bfloat16):
            # Float32 running buffers make the kernel accumulate and answer in float32 for a bf16 input too.
            scratch = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
            mean, var = torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
            mean, var = mean.float(), var.float()
        else:
            dims = [d for d in range(x.dim()) if d != 1]
            wide = x if x.dtype == torch.float64 else x.float()
            var, mean = torch.var_mean(wide, dim=dims, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_mean, grad_var = grads
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = 2.0 / count * grad_var
        offset = grad_mean / count - slope * mean
        shape = (1, -1, *([1] * (x.dim() - 2)))
        return torch.addcmul(offset.to(x.dtype).view(shape), x, slope.to(x.dtype).view(shape))


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

    def __enter__(self) -> BatchNormStatistics:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str) -> Any:
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


__all__ = ["BatchNormStatistics", "batch_norm_layers", "channel_moments", "shifted_moments"]
