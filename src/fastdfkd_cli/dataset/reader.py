"""A synthetic set, or plain images, read into memory."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor

from fastdfkd_cli.data.files import (
    DECODE_ERRORS,
    FORMATS,
    IMAGE_MODES,
    ImageFile,
    first_line,
    images_in_folder,
    images_in_tar,
    open_picture,
    pixels,
    quiet,
    tars_in_folder,
)
from fastdfkd_cli.dataset.layout import CLASSES, MANIFEST, check_file, is_dataset, load_manifest, parts_in
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.host import available_memory


@dataclass(frozen=True)
class SyntheticSet:
    """A set in memory.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``; -1 for an image that stands in no class folder.
        logits: the teacher's, ``[N, num_classes]`` float, for the images as they are; None for plain images, and for
            images that were resized.
        manifest: None for plain images.
        class_folders: in index order.
        candidates: how many images these were chosen from; None where they were not chosen.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor | None
    manifest: dict[str, Any] | None
    class_folders: tuple[str, ...]
    candidates: int | None = None

    def __len__(self) -> int:
        return len(self.images)


def read_dataset(
    directory: str | Path,
    *,
    input_size: tuple[int, int, int] | None = None,
    interpolation: str = "bilinear",
) -> SyntheticSet:
    """Read a synthetic set, or plain images, into memory.

    A folder with ``manifest.json`` is checked file by file against it. Without one, ``directory`` may be a folder of
    class folders, a tar of them, or a folder of such tars; the images are converted to ``input_size``'s channels, and
    scaled and cropped at the centre where they have another size.

    Args:
        directory: the set.
        input_size: (C, H, W) to return. A synthetic set may leave it out; plain images need it.
        interpolation: how images of another size are resized: nearest, bilinear, bicubic, ...

    Raises:
        UsageError: ``input_size`` is missing or has other channels than the set.
        UnavailableError: no such folder, no images in it, a file that is missing, truncated, damaged or no image.
        FastDFKDError: the images need more memory than there is.
    """
    path = Path(directory)
    _check_present(path, "--data-dir")
    if _is_whole_set(path, "--data-dir"):
        return _read_synthetic(path, input_size, interpolation)
    if input_size is None:
        raise UsageError(f"--data-dir {path} has no {MANIFEST}: the input size must be given for plain images.")
    return _read_plain(path, input_size, interpolation)


def image_files(directory: str | Path, option: str) -> list[ImageFile]:
    """The images of a folder, a tar, a folder of tars or a synthetic set, found and not yet read, in a fixed order.

    Labels count for nothing here, and :func:`decode_image` reads one at a time: there may be more than memory holds.

    Args:
        directory: where they are.
        option: by which name errors call it.

    Raises:
        UsageError: neither a folder nor a tar.
        UnavailableError: nothing there, no images in it, or a tar that is damaged.
    """
    path = Path(directory)
    _check_present(path, option)
    if not _is_whole_set(path, option):
        return _plain_files(path, option)
    found: list[ImageFile] = []
    for shard in load_manifest(path)["shards"]:
        for name, facts in shard["files"].items():
            check_file(path / name, facts)
            if name.endswith(".tar"):
                found += images_in_tar(path / name)
    if not found:
        raise _no_images(path, option)
    return found


def _check_present(path: Path, option: str) -> None:
    if not path.exists():
        raise UnavailableError(f"{option} {path} does not exist.")


def _is_whole_set(path: Path, option: str) -> bool:
    """Whether this is a synthetic set of ours, and not parts of one."""
    if path.is_dir() and (path / MANIFEST).exists():
        return True
    if parts := parts_in(path):
        count = max(parts)
        raise UnavailableError(
            f"{option} {path} is made in {count} parts, and some are not complete: let fastdfkd synthesize go on "
            "with --resume."
        )
    return False


def _no_images(path: Path, option: str) -> UnavailableError:
    known = ", ".join(sorted(get_img_extensions()))
    return UnavailableError(f"{option} {path} holds no images ({known}), neither in class folders nor in a .tar.")


def _read_synthetic(path: Path, size: tuple[int, int, int] | None, interpolation: str) -> SyntheticSet:
    manifest = load_manifest(path)
    stored: tuple[int, int, int] = tuple(manifest["input_size"])
    size = stored if size is None else size
    if size[0] != stored[0]:
        raise UsageError(f"--data-dir {path} holds images of {stored[0]} channels, and {size[0]} are needed.")
    total = sum(manifest["counts"])
    if not total:
        raise UnavailableError(f"--data-dir {path} holds no images yet: let fastdfkd synthesize go on with --resume.")
    for shard in manifest["shards"]:
        for name, facts in shard["files"].items():
            check_file(path / name, facts)
    require_memory(path, total, size)
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    row = 0
    for shard in manifest["shards"]:
        tensors = next(path / name for name in shard["files"] if not name.endswith(".tar"))
        shard_labels, shard_logits = _read_tensors(tensors, shard["images"], manifest["num_classes"])
        labels.append(shard_labels)
        logits.append(shard_logits)
    try:
        images = torch.empty(total, *size, dtype=torch.uint8)  # so many labels there are
    except RuntimeError as error:  # a limit of the process, which is not the machine's
        raise _too_large(path, total, size, "--data-dir") from error
    for shard, shard_labels in zip(manifest["shards"], labels, strict=True):
        tar = next(path / name for name in shard["files"] if name.endswith(".tar"))
        files = list(images_in_tar(tar))
        for file, label in zip(files, shard_labels.tolist(), strict=False):
            if file.label != manifest["classes"][label]:
                raise UnavailableError(f"{file} stands in another class than its label {label}.")
            images[row] = decode_image(file, size, interpolation, stored=stored)
            row += 1
        if len(files) != shard["images"]:
            raise UnavailableError(f"{tar} holds {len(files)} images, and its manifest says {shard['images']}.")
    soft = torch.cat(logits) if tuple(size) == stored else None
    return SyntheticSet(images, torch.cat(labels), soft, manifest, tuple(manifest["classes"]))


def _too_large(path: Path, count: int, size: tuple[int, int, int], option: str, hint: str = "") -> FastDFKDError:
    return FastDFKDError(
        f"{option} {path} needs {count * math.prod(size) / 2**30:,.1f} GiB of memory for {count:,} images of "
        f"{'x'.join(map(str, size))}, more than there is.{hint}"
    )


def require_memory(
    path: Path, count: int, size: tuple[int, int, int], option: str = "--data-dir", hint: str = ""
) -> None:
    """Refuse a set that does not fit, before it is read: a manifest may state any number of images, of any size."""
    if count * math.prod(size) > available_memory():
        raise _too_large(path, count, size, option, hint)


def _read_tensors(path: Path, images: int, classes: int) -> tuple[Tensor, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UnavailableError(f"{path} cannot be read: {first_line(error)}.") from error
    labels, logits = tensors.get("labels"), tensors.get("logits")
    if labels is None or logits is None or labels.shape != (images,) or logits.shape != (images, classes):
        raise UnavailableError(f"{path} does not hold labels [{images}] and logits [{images}, {classes}].")
    if not logits.is_floating_point() or (images and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise UnavailableError(f"{path} holds labels or logits that are out of range.")
    return labels.to(torch.int64), logits


def decode_image(
    file: ImageFile, size: tuple[int, int, int], interpolation: str, *, stored: tuple[int, int, int] | None = None
) -> Tensor:
    """Return one image as uint8 ``[C, H, W]`` of ``size``; ``stored`` is what it must be as it stands."""
    try:
        formats = FORMATS if stored is None else ("PNG",)
        with quiet(), open_picture(io.BytesIO(file.read()), formats) as picture:
            if stored is not None and (picture.mode, picture.size) != (IMAGE_MODES[stored[0]], (stored[2], stored[1])):
                found = f"{picture.mode} {picture.width}x{picture.height}"
                raise UnavailableError(f"{file} is {found}, not what the manifest states.")
            if picture.mode.startswith(("I", "F")):
                raise UnavailableError(f"{file} has more than 8 bits a channel: convert it first.")
            ready = picture.convert(IMAGE_MODES[size[0]])
    except DECODE_ERRORS as error:
        raise UnavailableError(f"{file} cannot be decoded as an image: {first_line(error)}.") from error
    if ready.size != (size[2], size[1]):
        resampling = getattr(Image.Resampling, interpolation.upper(), Image.Resampling.BILINEAR)
        ready = ImageOps.fit(ready, (size[2], size[1]), method=resampling)
    return pixels(ready)


def _plain_files(path: Path, option: str) -> list[ImageFile]:
    """The images of a folder, a tar or a folder of tars; one at least."""
    if path.is_file():
        if path.suffix != ".tar":
            raise UsageError(f"{option} {path} is neither a folder nor a .tar file.")
        files = list(images_in_tar(path))
    elif tars := tars_in_folder(path):  # a set of ours without its manifest: the pictures beside are for people
        files = [file for tar in tars for file in images_in_tar(tar)]
    else:
        files = sorted(images_in_folder(path), key=lambda file: natural_key(file.name))
    if not files:
        raise _no_images(path, option)
    return files


def check_channels(size: tuple[int, int, int]) -> None:
    """Refuse images that no file holds.

    Raises:
        UsageError: fewer channels than 1, or more than 4.
    """
    if size[0] not in IMAGE_MODES:
        raise UsageError(f"Images of 1 to 4 channels can be read, not of {size[0]}.")


def _read_plain(path: Path, size: tuple[int, int, int], interpolation: str) -> SyntheticSet:
    check_channels(size)
    files = _plain_files(path, "--data-dir")
    require_memory(path, len(files), size)
    order = _class_order(path, {file.label for file in files} - {""})
    index = {name: number for number, name in enumerate(order)}
    images = torch.stack([decode_image(file, size, interpolation) for file in files])
    labels = torch.tensor([index.get(file.label, -1) for file in files])
    return SyntheticSet(images, labels, None, None, order)


def _class_order(path: Path, found: set[str]) -> tuple[str, ...]:
    """The class folders in index order: as our classes.txt beside a shard says, else sorted as timm sorts them."""
    beside = path.parent / CLASSES
    if path.is_file() and beside.is_file() and is_dataset(path.parent):
        listed = tuple(beside.read_text(encoding="utf-8", errors="replace").split())
        if found <= set(listed):
            return listed
    return tuple(sorted(found, key=natural_key))
