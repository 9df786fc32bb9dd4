"""Crops, flips and mixtures drawn per image and applied to a whole batch at once.

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

from fastdfkd_cli.method_config import Augmentation


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
    return _crop_flip(images, _draw_crop_flip(len(images), rng, padding, flip).to(images.device))


def _draw_crop_flip(count: int, rng: torch.Generator, padding: int, flip: bool) -> Tensor:
    dy = torch.randint(-padding, padding + 1, (count,), generator=rng, device=rng.device)
    dx = torch.randint(-padding, padding + 1, (count,), generator=rng, device=rng.device)
    flips = torch.rand(count, generator=rng, device=rng.device) < (0.5 if flip else 0.0)
    return torch.stack([dy, dx, flips]).float()


def _crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    dy, dx, flips = draws
    return _Move.apply(images, dy.long(), dx.long(), flips > 0)


def resized_crop_flip(images: Tensor, rng: torch.Generator, *, scale: tuple[float, float] = (0.75, 1.0)) -> Tensor:
    """Crop a random share ``scale`` of the area (ratio 3/4 to 4/3), resize it back, flip with probability 1/2.

    Args:
        images: ``[B, C, H, W]``, uint8 or float; differentiable for floats. The result is float for float input and
            uint8, rounded, for uint8 input.
        rng: source of the draws (one per image).
        scale: smallest and largest share of the area.
    """
    return _resized_crop_flip(images, _draw_resized_crop_flip(len(images), rng, scale).to(images.device))


def _draw_resized_crop_flip(
    count: int, rng: torch.Generator, scale: tuple[float, float] = (0.75, 1.0), *, flip: bool = True
) -> Tensor:
    """Height and width of the crop, its centre, and the direction, all in grid_sample's units."""
    draw = torch.rand(5, count, generator=rng, device=rng.device)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = torch.exp((draw[1] - 0.5) * 2 * math.log(4 / 3))
    wide = (area * aspect).sqrt().clamp(max=1)
    high = (area / aspect).sqrt().clamp(max=1)
    sign = torch.where(draw[4] < (0.5 if flip else 0.0), -1.0, 1.0)
    return torch.stack([high, wide * sign, (1 - wide) * (2 * draw[2] - 1), (1 - high) * (2 * draw[3] - 1)])


def _resized_crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    high, wide, x, y = draws
    zero = torch.zeros_like(high)
    theta = torch.stack([torch.stack([wide, zero, x], dim=1), torch.stack([zero, high, y], dim=1)], dim=1)
    # Under autocast the grid would be bf16: positions up to half a pixel off at 224.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    if images.dtype == torch.uint8:
        return out.round().to(torch.uint8)
    return out.to(images.dtype)


def draw_augmentation(
    kind: Augmentation,
    count: int,
    image_size: tuple[int, int, int],
    rng: torch.Generator,
    *,
    scale: tuple[float, float] = (0.75, 1.0),
    flip: bool = True,
) -> Tensor:
    """Draw how ``count`` images are varied: float32 ``[D, count]`` on ``rng``'s device, for :func:`apply_augmentation`.

    One small tensor, so that it reaches another device in one copy, and can be kept and used again. D is 0 for
    ``none``. The padding is an eighth of the shorter side (4 at 32x32). ``scale`` and ``flip`` are those of
    ``resized-crop-flip``: the share of the area, and False for crops that are not mirrored.
    """
    if kind == "none":
        return torch.empty(0, count, device=rng.device)
    if kind == "resized-crop-flip":
        return _draw_resized_crop_flip(count, rng, scale, flip=flip)
    padding = max(1, min(image_size[1:]) // 8)
    return _draw_crop_flip(count, rng, padding, flip=kind == "crop-flip")


def apply_augmentation(images: Tensor, kind: Augmentation, draws: Tensor) -> Tensor:
    """Vary images ``[B, C, H, W]`` as ``draws`` (``[D, B]``, on their device) say; differentiable for floats."""
    if kind == "none":
        return images
    return _resized_crop_flip(images, draws) if kind == "resized-crop-flip" else _crop_flip(images, draws)


def augment(images: Tensor, rng: torch.Generator, kind: Augmentation) -> Tensor:
    """Apply the augmentation that a config names, drawn from ``rng``."""
    channels, height, width = images.shape[1:]
    draws = draw_augmentation(kind, len(images), (channels, height, width), rng)
    return apply_augmentation(images, kind, draws.to(images.device))


def mix(images: Tensor, rng: torch.Generator, *, mixup: float, cutmix: float) -> Tensor:
    """Blend images with others of the batch (mixup), or paste rectangles of others into them (CutMix).

    The other is the next one of the batch, which has to be in random order. How much of an image stays is drawn
    uniformly from [0, 1] for each: the Beta(1, 1) of both papers. Labels are not mixed: the teacher sees the mixture.

    Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun et al., CutMix, ICCV 2019 (the rectangle has
    the same shape as the image, a random centre, and is cut off at the border).

    Args:
        images: ``[B, C, H, W]``, uint8 (rounded) or float.
        rng: source of the draws.
        mixup: probability that an image is blended.
        cutmix: probability that it gets a rectangle instead; at most ``1 - mixup``.
    """
    count, _, height, width = images.shape
    which, stays, centre_y, centre_x = torch.rand(4, count, generator=rng, device=rng.device).to(images.device)
    # Half the sides, as shares: the rectangle covers 1 - stays of the area, before the border cuts it off.
    half = (1 - stays).sqrt() / 2
    y = (torch.arange(height, device=images.device) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    inside = ((y - centre_y[:, None]).abs() < half[:, None])[:, :, None] & (
        (x - centre_x[:, None]).abs() < half[:, None]
    )[:, None, :]
    kept = torch.where(which[:, None, None] < mixup, stays[:, None, None], (~inside).float())
    kept = torch.where(which[:, None, None] < mixup + cutmix, kept, 1.0).unsqueeze(1)
    own, other = images.float(), images.roll(-1, 0).float()
    mixed = torch.lerp(other, own, kept)
    return mixed.round().to(torch.uint8) if images.dtype == torch.uint8 else mixed.to(images.dtype)


__all__ = ["apply_augmentation", "augment", "crop_flip", "draw_augmentation", "mix", "resized_crop_flip"]
