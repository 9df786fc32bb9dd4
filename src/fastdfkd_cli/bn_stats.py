"""The feature term: how far a batch's statistics are from those a teacher's BatchNorm layers remember.

:class:`BatchNormStatistics` is a context manager that reads the inputs of all BatchNorm layers while a model runs,
and takes its hooks away again on leaving. Eq. 13 to 15 of Fang et al., AAAI 2022; the term is Yin et al.'s
(DeepInversion, CVPR 2020).
"""

from __future__ import annotations

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

    ``torch.var_mean`` over a channels-last activation takes ten times as long as the fused kernel that BatchNorm
    uses in training; that kernel has no derivative of its own, so it stands here:
    ``d mean / dx = 1/N`` and ``d var / dx = 2 (x - mean) / N``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type == "cpu" and x.dim() >= 3 and x.dtype in (torch.float32, torch.bfloat16):
            # Float32 running buffers make the kernel accumulate and answer in float32 for a bf16 input too.
            scratch = torch.zeros(2, x.shape[1], dtype=torch.float32)
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


class BatchNormStatistics:
    """Feature regularisation over all BatchNorm layers of ``model``, with or without momentum.

    Used as a context manager around the model's calls::

        with BatchNormStatistics(teacher, momentum=0.9) as statistics:
            logits = teacher(x)
            loss = statistics.loss()     # of the latest call
            ...
            statistics.accumulate()      # once per batch, after the last inner step

    Args:
        model: a model with BatchNorm layers; nothing stays on it after the ``with`` block.
        momentum: the weight of the accumulated statistics in Eq. 15 (the paper's ``1 - m``); 0 gives Eq. 13.

    Raises:
        ValueError: ``model`` keeps no running statistics.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.0) -> None:
        self.layers = batch_norm_layers(model)
        if not self.layers:
            raise ValueError("the model has no layer with running statistics")
        self.momentum = momentum
        self._latest: list[tuple[str, Tensor, Tensor]] = []
        self._accumulated: dict[str, tuple[Tensor, Tensor]] = {}
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
        self._latest.clear()

    def _hook(self, name: str) -> Any:
        def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Only a call that will be differentiated is of interest: KD's teacher pass must not pay for this.
            if torch.is_grad_enabled():
                self._latest.append((name, *channel_moments(inputs[0])))

        return read

    def reset(self) -> None:
        """Forget the latest call's statistics; to be called before each forward pass."""
        self._latest.clear()

    def loss(self) -> Tensor:
        """Sum over layers of ``||mean - running mean|| + ||var - running var||`` (Eq. 13, or Eq. 15 with momentum).

        Variances, not deviations, are compared, as in DeepInversion and the published runs.
        """
        total = None
        for name, mean, var in self._latest:
            layer = self.layers[name]
            if name in self._accumulated:
                mean_a, var_a = self._accumulated[name]
                mean = self.momentum * mean_a + (1 - self.momentum) * mean
                var = self.momentum * var_a + (1 - self.momentum) * var
            running_mean: Tensor = layer.running_mean  # type: ignore[assignment]
            running_var: Tensor = layer.running_var  # type: ignore[assignment]
            term = torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(var - running_var)
            total = term if total is None else total + term
        if total is None:
            raise RuntimeError("no BatchNorm layer ran since the last reset")
        return total

    def accumulate(self) -> None:
        """Eq. 14: move the accumulated statistics towards the latest batch's. Without momentum, nothing is kept."""
        if self.momentum == 0:
            return
        for name, mean, var in self._latest:
            mean, var = mean.detach(), var.detach()
            if name in self._accumulated:
                mean_a, var_a = self._accumulated[name]
                mean = self.momentum * mean_a + (1 - self.momentum) * mean
                var = self.momentum * var_a + (1 - self.momentum) * var
            self._accumulated[name] = (mean, var)

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulated statistics, as ``NAME.mean`` and ``NAME.var``."""
        state = {}
        for name, (mean, var) in self._accumulated.items():
            state[f"{name}.mean"], state[f"{name}.var"] = mean, var
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the accumulated statistics that :meth:`state_dict` gave."""
        names = {key.rpartition(".")[0] for key in state}
        unknown = names - set(self.layers)
        if unknown:
            raise ValueError(f"statistics of unknown layers: {', '.join(sorted(unknown))}")
        self._accumulated = {name: (state[f"{name}.mean"], state[f"{name}.var"]) for name in names}


__all__ = ["BatchNormStatistics", "batch_norm_layers", "channel_moments"]
