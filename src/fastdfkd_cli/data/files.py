"""Image files in folders and in uncompressed tars: found, labelled by their folder, and read where they lie.

Nothing is extracted to the disk, so that a name in a tar can point nowhere. Both tars and images may come from
anybody: what their headers claim is believed only as far as the file goes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor

from fastdfkd_cli.errors import UnavailableError

#: How PIL calls an image of so many channels. PNG stores each of them without loss.
IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
#: What PIL raises for a file that is not the image it claims to be.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
#: What images are read from, whatever they are called. PIL knows forty more formats, and hands one of them,
#: PostScript, to an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: How damaged tars show in Python's reader, which hands some things on as they come.
_TAR_ERRORS = (
    tarfile.TarError, EOFError, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """One image file: whole (``size`` None) or a stretch of an uncompressed tar.

    Attributes:
        path: the file to open.
        name: relative to the folder, or as the tar has it.
        label: the innermost folder that it lies in; empty for none.
    """

    path: str
    name: str
    label: str
    offset: int = 0
    size: int | None = None

    def __str__(self) -> str:
        return self.path if self.size is None else f"{self.path}: {self.name!r}"

    def read(self) -> bytes:
        """Open the file anew each time, so that worker processes share no position."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    # "._NAME" are what macOS leaves beside the files of an archive: they end like images and are none.
    return os.path.splitext(base)[1].lower() in get_img_extensions(as_set=True) and not base.startswith("._")


def images_in_folder(root: Path) -> Iterator[ImageFile]:
    """Yield the images below ``root`` in no order; hidden folders are passed over, links followed, but not upwards."""
    above = {os.fspath(root): {os.path.realpath(root)}}
    for folder, below, files in os.walk(root, followlinks=True):
        here = above.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in below if not name.startswith(".")}
        below[:] = [name for name in real if real[name] not in here]
        above |= {os.path.join(folder, name): here | {real[name]} for name in below}
        relative = os.path.relpath(folder, root)
        label = "" if relative == os.curdir else os.path.basename(relative)
        for name in filter(_is_image, files):
            yield ImageFile(os.path.join(folder, name), os.path.normpath(os.path.join(relative, name)), label)


def tars_in_folder(root: Path) -> list[Path]:
    """The tars in ``root`` itself. Hidden ones are what an interrupted writer leaves."""
    return sorted(path for path in root.glob("*.tar") if not path.name.startswith("."))


def images_in_tar(path: Path, *, prefix: str = "") -> Iterator[ImageFile]:
    """Yield the images in a tar, and in the tars within it, in its order.

    Args:
        path: the tar.
        prefix: the label of what lies in no folder of it.

    Raises:
        UnavailableError: it is damaged, compressed or no tar, or an image in it is only a link.
    """
    try:
        with _Bounded(path) as file:
            yield from _images_in_archive(file, path, prefix=prefix, start=0)
    except _TAR_ERRORS as error:
        raise UnavailableError(f"{path} cannot be read as an uncompressed tar: {first_line(error)}.") from None


class _Bounded(io.BufferedReader):
    """A file that is asked for no more than it has: a header may claim any size, and its memory is taken first."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None else min(size, left))


def _images_in_archive(file: IO[bytes], path: Path, *, prefix: str, start: int) -> Iterator[ImageFile]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        position = -1
        for member in archive:
            if member.size < 0 or member.offset <= position:  # Python's older readers would go round in circles
                raise tarfile.ReadError("a header leads backwards")
            position = member.offset
            if member.issparse():  # its contents are not one stretch of the file
                raise UnavailableError(f"{path}: {member.name!r} is a sparse file: pack the images as they are.")
            stem, extension = os.path.splitext(os.path.basename(member.name))
            if member.isfile() and extension.lower() == ".tar" and not stem.startswith("._"):
                inner = archive.extractfile(member)
                assert inner is not None  # a regular file has contents
                yield from _images_in_archive(inner, path, prefix=f"{prefix}/{stem}", start=start + member.offset_data)
            elif not member.isdir() and _is_image(member.name):
                if not member.isfile():
                    raise UnavailableError(f"{path}: {member.name!r} is a link or a device, not an image.")
                label = f"{prefix}/{os.path.dirname(member.name)}".strip("/.").rpartition("/")[2]
                yield ImageFile(str(path), member.name, label, start + member.offset_data, member.size)


def open_picture(file: Any, formats: Sequence[str] = FORMATS) -> Image.Image:
    """``Image.open`` for some formats only, by what is in the file and not by its name. Nothing is decoded yet.

    Raises:
        DECODE_ERRORS: it is none of them.
    """
    return Image.open(file, formats=_installed(tuple(formats)))


@functools.cache
def _installed(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``formats`` that this PIL was built with."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PIL's remarks on odd metadata, transparent palettes and 90 megapixels: what is wrong is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pixels(picture: Image.Image) -> Tensor:
    """Return a decoded picture as uint8 ``[C, H, W]``."""
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def first_line(error: BaseException) -> str:
    """Return what ``error`` says in one line without a full stop; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
