"""Crops and flips drawn per image and applied to a whole batch at once.

torchvision draws one decision for a batch; here each image has its own. Shifted crops and flips only move pixels,
so their derivative moves gradients back the same way: no interpolation, and deterministic on every device.
Sizes follow the published runs (4 pixels of padding at 32, scale 0.75 to 1 at 224; see docs/recipes.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdfkd_cli.config import Augmentation


def _moved(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Gather ``images[b, :, rows[b, i], columns[b, j]]``, with 0 where an index lies outside.

    ``[B, C, H, W]`` with ``rows`` ``[B, H]`` and ``columns`` ``[B, W]``; the result is channels-last.
    """
    height, width = images.shape[-2:]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    r, c = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    moved = images.permute(0, 2, 3, 1)[batch, r[:, :, None], c[:, None, :]]
    outside = ((rows != r)[:, :, None] | (columns != c)[:, None, :]).unsqueeze(-1)
    return moved.masked_fill_(outside, 0).permute(0, 3, 1, 2)


class _Move(torch.autograd.Function):
    """Shift by (dy, dx) with zero padding after an optional flip; the derivative is the opposite move."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(dy, dx, flip)
        rows = torch.arange(images.shape[2], device=images.device) + dy[:, None]
        columns = torch.arange(images.shape[3], device=images.device) + dx[:, None]
        columns = torch.where(flip[:, None], images.shape[3] - 1 - columns, columns)
        return _moved(images, rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        dy, dx, flip = ctx.saved_tensors
        width = grad.shape[3]
        rows = torch.arange(grad.shape[2], device=grad.device) - dy[:, None]
        columns = torch.arange(width, device=grad.device)[None, :]
        columns = torch.where(flip[:, None], width - 1 - columns, columns) - dx[:, None]
        return _moved(grad, rows, columns), None, None, None


def crop_flip(images: Tensor, rng: torch.Generator, *, padding: int, flip: bool = True) -> Tensor:
    """Zero-pad by ``padding`` pixels, crop back to size at a random place, flip left-right with probability 1/2.

    Args:
        images: ``[B, C, H, W]``, uint8 or float; differentiable for floats.
        rng: source of the draws (one per image).
        padding: the largest shift, in pixels.
        flip: whether to flip; digits and text should not be.
    """
    size, device = len(images), rng.device
    dy = torch.randint(-padding, padding + 1, (size,), generator=rng, device=device)
    dx = torch.randint(-padding, padding + 1, (size,), generator=rng, device=device)
    flips = torch.rand(size, generator=rng, device=device) < (0.5 if flip else 0.0)
    return _Move.apply(images, *(draw.to(images.device, non_blocking=True) for draw in (dy, dx, flips)))


def resized_crop_flip(images: Tensor, rng: torch.Generator, *, scale: tuple[float, float] = (0.75, 1.0)) -> Tensor:
    """Crop a random share ``scale`` of the area (ratio 3/4 to 4/3), resize it back, flip with probability 1/2.

    Args:
        images: ``[B, C, H, W]``, uint8 or float; differentiable for floats. The result is float for float input and
            uint8, rounded, for uint8 input.
        rng: source of the draws (one per image).
        scale: smallest and largest share of the area.
    """
    size, device = len(images), rng.device
    draw = torch.rand(5, size, generator=rng, device=device).to(images.device, non_blocking=True)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = torch.exp((draw[1] - 0.5) * 2 * math.log(4 / 3))
    wide = (area * aspect).sqrt().clamp(max=1)
    high = (area / aspect).sqrt().clamp(max=1)
    sign = torch.where(draw[4] < 0.5, -1.0, 1.0)
    theta = torch.zeros(size, 2, 3, device=images.device)
    theta[:, 0, 0] = wide * sign
    theta[:, 1, 1] = high
    theta[:, 0, 2] = (1 - wide) * (2 * draw[2] - 1)
    theta[:, 1, 2] = (1 - high) * (2 * draw[3] - 1)
    # Under autocast the grid would be bf16: positions up to half a pixel off at 224.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if images.dtype == torch.uint8:
        return out.round().to(torch.uint8)
    return out.to(images.dtype)


def augment(images: Tensor, rng: torch.Generator, kind: Augmentation) -> Tensor:
    """Apply the augmentation that a config names; the padding is an eighth of the shorter side (4 at 32x32)."""
    if kind == "none":
        return images
    if kind == "resized-crop-flip":
        return resized_crop_flip(images, rng)
    padding = max(1, min(images.shape[-2:]) // 8)
    return crop_flip(images, rng, padding=padding, flip=kind == "crop-flip")


__all__ = ["augment", "crop_flip", "resized_crop_flip"]
