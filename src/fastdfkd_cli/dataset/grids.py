"""A picture per class of a set's first images, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdfkd_cli.data.files import images_in_tar
from fastdfkd_cli.dataset.reader import decode_image
from fastdfkd_cli.output import writing
from fastdfkd_cli.pictures import write_grid

#: Pictures per class, and per row.
GRID_IMAGES, GRID_COLUMNS = 32, 8
#: What a run writes there, or leaves half-written.
GRID_FILE = re.compile(r"grids/(\d{4,}(_[A-Za-z0-9._-]+)?\.png|\.\d{4,}.*\.png\.partial-[0-9a-f]{8})")


def write_grids(
    directory: Path,
    shards: Sequence[Mapping[str, Any]],
    folders: Sequence[str],
    counts: Sequence[int],
    input_size: tuple[int, int, int],
) -> None:
    """Write ``grids/CLASS.png`` in a set's folder, from images read back from its shards.

    Args:
        shards: as the manifest has them.
        folders, counts: the class folders in index order, and how many images each has.
        input_size: (C, H, W).

    Raises:
        UnavailableError: a shard cannot be read.
        FastDFKDError: a picture cannot be written.
    """
    wanted: dict[str, list[Tensor]] = {folder: [] for folder in folders}
    missing = {name: min(GRID_IMAGES, count) for name, count in zip(folders, counts, strict=True)}
    home = directory / "grids"
    with writing(home):
        home.mkdir(exist_ok=True)
        for path in home.iterdir():
            if GRID_FILE.fullmatch(f"grids/{path.name}"):
                path.unlink()
        for shard in shards:
            if not any(missing.values()):
                break
            tar_name = next(name for name in shard["files"] if name.endswith(".tar"))
            for file in images_in_tar(directory / tar_name):
                name = file.label
                if missing.get(name):
                    missing[name] -= 1
                    wanted[name].append(decode_image(file, input_size, "nearest", stored=input_size))
                    if not missing[name]:  # written at once: a thousand classes need not wait in memory
                        write_grid(home / f"{name}.png", torch.stack(wanted.pop(name)), columns=GRID_COLUMNS)


__all__ = ["GRID_COLUMNS", "GRID_FILE", "GRID_IMAGES", "write_grids"]
