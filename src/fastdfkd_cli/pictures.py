"""Synthetic images as pictures for people: grids of enlarged tiles, with labelled rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from fastdfkd_cli.output import one_line, write_bytes

#: The shorter side that a tile is enlarged to, in pixels, and the longer side that it is reduced to.
MIN_TILE, MAX_TILE = 64, 224
_PADDING = 2
_LABEL_SIZE = 14
_LABEL_WIDTH = 150


def as_rgb(images: Tensor) -> Tensor:
    """Return ``[N, C, H, W]`` images (C 1 to 4) as ``[N, 3, H, W]`` ones that a person can look at.

    Grey is repeated; of two channels the first is shown red and the second cyan, so that equal ones look grey; of
    four the first three are shown (the fourth need not mean transparency to a network).

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    order = {1: (0, 0, 0), 2: (0, 1, 1), 3: (0, 1, 2), 4: (0, 1, 2)}.get(channels)
    if order is None:
        raise ValueError(f"images of 1 to 4 channels can be shown, not {channels}")
    return images[:, order]


def tiles(images: Tensor) -> Tensor:
    """Return uint8 ``[N, C, H, W]`` images as RGB tiles of a readable size: small ones enlarged without smoothing."""
    rgb = as_rgb(images.detach().cpu())
    height, width = rgb.shape[2:]
    factor = -(-MIN_TILE // min(height, width))
    if max(height, width) * factor > MAX_TILE:  # a long, narrow image must not become a huge one
        factor = max(1, MAX_TILE // max(height, width))
    if factor > 1:
        return rgb.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    if max(height, width) > MAX_TILE:
        scale = MAX_TILE / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return F.interpolate(rgb.float(), size=size, mode="area").round().to(torch.uint8)
    return rgb


def _save_png(path: str | Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def _grid(images: Tensor, columns: int) -> Image.Image:
    grid = make_grid(images, nrow=columns, padding=_PADDING, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())


def write_grid(path: str | Path, images: Tensor, *, columns: int = 8) -> None:
    """Write uint8 images ``[N, C, H, W]`` (N at least 1) as one PNG picture of ``columns`` tiles a row.

    Raises:
        FastDFKDError: the disk is full or the place not writable.
    """
    _save_png(path, _grid(tiles(images), min(columns, len(images))))


def _label(label: int, class_names: Sequence[str] | None, font: Any) -> str:
    """A class's number and name, cut to the margin's greatest width."""
    text = str(label)
    if class_names is not None and 0 <= label < len(class_names) and class_names[label] != text:
        text += f" {class_names[label]}"
    text = one_line(text).encode("latin-1", "replace").decode("latin-1")  # what the built-in font can draw
    if font.getlength(text) <= _LABEL_WIDTH:
        return text
    while font.getlength(text + "...") > _LABEL_WIDTH:
        text = text[:-1]
    return text + "..."


def write_samples(
    path: str | Path,
    images: Tensor,
    labels: Tensor | Sequence[int],
    class_names: Sequence[str] | None = None,
    *,
    rows: int = 16,
    columns: int = 8,
) -> None:
    """Write a PNG picture of the images' classes: one row a class, its name or number on the left.

    Args:
        path: the picture's file.
        images: uint8 ``[N, C, H, W]``, N at least 1.
        labels: the class of each.
        class_names: by class index; without them, and for an index beyond them, the number stands there.
        rows: at most so many classes, spread evenly over those that have images.
        columns: at most so many images a class, the latest ones.

    Raises:
        FastDFKDError: the disk is full or the place not writable.
    """
    of = torch.as_tensor(labels).cpu()
    present = of.unique().tolist()
    if len(present) > rows:
        present = [present[index * (len(present) - 1) // max(1, rows - 1)] for index in range(rows)]
    chosen = [(of == label).nonzero().flatten()[-columns:] for label in present]
    width = max(len(indices) for indices in chosen)
    shown = tiles(images[torch.cat(chosen).to(images.device)])
    table = shown.new_full((len(chosen), width, *shown.shape[1:]), 255)
    for row, part in enumerate(shown.split([len(indices) for indices in chosen])):
        table[row, : len(part)] = part
    grid = _grid(table.flatten(0, 1), width)
    font = ImageFont.load_default(size=_LABEL_SIZE)
    texts = [_label(label, class_names, font) for label in present]
    margin = round(max(font.getlength(text) for text in texts)) + 12
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(texts):
        top = _PADDING + row * (shown.shape[2] + _PADDING) + (shown.shape[2] - _LABEL_SIZE) // 2
        draw.text((6, top), text, fill="black", font=font)
    _save_png(path, picture)


__all__ = ["as_rgb", "tiles", "write_grid", "write_samples"]
