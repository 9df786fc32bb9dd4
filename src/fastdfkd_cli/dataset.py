"""A labelled synthetic image set on disk: what ``synthesize`` writes and ``distill --data-dir`` reads.

::

    DIR/
      manifest.json             config, teacher, counts per class, files with sizes and SHA-256
      classes.txt               the class folders in index order, one a line: timm's --class-map
      train-00000.tar           0003_cat/00000012.png ...: lossless, the number is the image's place in the set
      train-00000.safetensors   "logits" [n, classes] of the teacher for the image as stored; "labels" int64 [n];
                                both in the tar's order
      grids/0003_cat.png        a look at each class
      state/                    what the program needs to go on (only for itself)

timm opens a shard as it is, ``create_dataset("", root="DIR/train-00000.tar")``, and all of them with
``ImageDataset(DIR, reader=ReaderImageInTar(DIR))``. It numbers the class folders that it finds, in their order: right
as long as every class has an image in what it opens. ``class_map="DIR/classes.txt"`` makes the numbers right always.
(``create_dataset("", root="DIR")`` looks for image files, not for tars, and would find the pictures in ``grids/``.)

A shard counts once the manifest names it. The manifest is replaced only when the shard's files are whole, under
temporary names (``.train-00000.tar.partial``) that a resumed run completes or drops.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor

from fastdfkd_cli import __version__
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.output import (
    LITTER,
    OWNER_KEY,
    check_replaceable,
    files_below,
    named,
    plain_json,
    sha256_file,
    write_bytes,
    write_json,
    writing,
)
from fastdfkd_cli.pictures import write_grid

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows has no such locks; there two runs into one folder are not told apart
    _fcntl = None

FORMAT = "synthetic-images"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CLASSES = "classes.txt"
#: What the engine may write beside the set.
SIDE_FILES = frozenset({"README.md", "report.json", "metrics.jsonl", "config.yaml", "config.json", "samples.png"})
#: Image modes by channel count. PNG stores each of them without loss.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
#: Pictures per class, and per row, in ``grids/``.
GRID_IMAGES, GRID_COLUMNS = 32, 8

_SHARD = re.compile(r"train-\d{5,}\.(tar|safetensors)")
_PARTIAL = re.compile(
    r"\.train-\d{5,}\.(tar|safetensors)\.partial|\.(manifest\.json|classes\.txt)\.partial-[0-9a-f]{8}"
)
_STATE = re.compile(r"state/(\d{5,}\.(safetensors|json)|\.\d{5,}\.(safetensors|json)\.partial-[0-9a-f]{8})")
_GRID = re.compile(r"grids/(\d{4,}(_[A-Za-z0-9._-]+)?\.png|\.\d{4,}.*\.png\.partial-[0-9a-f]{8})")
_TIMM_CACHE = re.compile(r"_.*_tarinfos\.pickle")
_PNG_COMPRESSION = 3  # half the time of zlib's default for a few per cent more bytes
_PENDING = "pending."


def class_folders(num_classes: int, class_names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the folder of each class: ``0003``, or ``0003_cat`` with the name reduced to letters that any disk takes.

    Sorted, as text or as timm sorts, they stand in the order of the class indices.

    Raises:
        ValueError: there are names, but not one a class.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
    digits = max(4, len(str(num_classes - 1)))
    folders = []
    for index in range(num_classes):
        text = "" if class_names is None else class_names[index]
        ascii_text = unicodedata.normalize("NFKD", str(text)).encode("ascii", "ignore").decode()
        clean = re.sub(r"[^A-Za-z0-9-]+", "_", ascii_text).strip("_-")[:40].rstrip("_-")
        folders.append(f"{index:0{digits}d}_{clean}" if clean else f"{index:0{digits}d}")
    return tuple(folders)


def _png(image: np.ndarray[Any, Any]) -> bytes:
    """Encode one uint8 ``[C, H, W]`` image."""
    pixels = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


def _pixels(picture: Image.Image) -> Tensor:
    """Return a decoded picture as uint8 ``[C, H, W]``."""
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def header_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one text a differing key, ``"config.seed (there 0, now 1)"``, of two nested mappings."""
    before, now = _flatten(plain_json(old)), _flatten(plain_json(new))

    def shown(flat: Mapping[str, Any], key: str) -> str:
        text = json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
        return text if len(text) <= 60 else text[:57] + "..."

    return [
        f"{key} (there {shown(before, key)}, now {shown(now, key)})"
        for key in sorted(before.keys() | now.keys())
        if (key in before, before.get(key)) != (key in now, now.get(key))
    ]


@dataclass(frozen=True)
class ResumeState:
    """What the engine handed over with the last whole shard: tensors (on the CPU) and JSON values, as given."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class DatasetWriter:
    """Writes a set, shard by shard; every shard that the manifest names is whole, whatever happens later.

    Images are buffered by :meth:`add`; :meth:`flush_shard` writes the whole shards among them, keeps the rest with the
    caller's state, and so marks a point from which :meth:`resume` goes on exactly. As a context manager it gives the
    folder up on leaving; after an exception before the first shard it also removes the folder it made.

    Args:
        directory: the set's folder: missing, empty, or (``overwrite``) an earlier set. An earlier set is removed only
            when the first shard of the new one is whole.
        class_names: by class index, or None.
        num_classes: how many classes.
        input_size: (C, H, W) of every image.
        shard_size: images per tar.
        header: everything that decides what the images are, ready for JSON: config, teacher, seed. A resumed run
            must bring the same.
        overwrite: replace an earlier set.

    Raises:
        UsageError: the folder is in use, not writable, or holds files that are not this set's.
        FastDFKDError: later, by any method that writes: the disk is full.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        class_names: Sequence[str] | None,
        num_classes: int,
        input_size: tuple[int, int, int],
        shard_size: int,
        header: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        self._prepare(directory, class_names, num_classes, input_size, shard_size, header)
        try:
            if (self.directory / MANIFEST).exists() or self._foreign():
                if not overwrite:
                    hint = " (to go on with it: --resume)" if _is_dataset(self.directory) else ""
                    raise UsageError(f"--output {self.directory} is not empty{hint}: choose another folder.")
                check_replaceable(self.directory)
                self._replaces = True
            else:
                self._begin()
        except BaseException:
            self.release()
            raise

    @classmethod
    def resume(
        cls,
        directory: str | Path,
        *,
        class_names: Sequence[str] | None,
        num_classes: int,
        input_size: tuple[int, int, int],
        shard_size: int,
        header: Mapping[str, Any],
    ) -> DatasetWriter:
        """Go on after the last whole shard of ``directory``; a missing or empty folder starts a new set.

        What the engine needs is in :attr:`state`, what is done in :attr:`num_images` (with the images that wait for
        their shard).

        Raises:
            UsageError: the set was begun with other settings (named), or the folder holds files that the manifest does
                not know (named).
            UnavailableError: the manifest, a shard or the state is damaged.
        """
        self = cls.__new__(cls)
        self._prepare(directory, class_names, num_classes, input_size, shard_size, header)
        try:
            if (self.directory / MANIFEST).exists():
                self._read_back()
                self._drop_leftovers()
            elif foreign := self._foreign():
                raise UsageError(
                    f"--output {self.directory} holds no set to go on with, but other files ({named(foreign)}): "
                    "choose another folder."
                )
            else:
                self._begin()
        except BaseException:
            self.release()
            raise
        return self

    def _prepare(
        self,
        directory: str | Path,
        class_names: Sequence[str] | None,
        num_classes: int,
        input_size: tuple[int, int, int],
        shard_size: int,
        header: Mapping[str, Any],
    ) -> None:
        if shard_size < 1:
            raise UsageError(f"--shard-size must be 1 or more, not {shard_size}.")
        if input_size[0] not in MODES:
            raise UsageError(f"Images of 1 to 4 channels can be stored, not of {input_size[0]}.")
        self.directory = Path(directory)
        self.folders = class_folders(num_classes, class_names)
        self.num_classes, self.input_size, self.shard_size = num_classes, tuple(input_size), shard_size
        self._identity: dict[str, Any] = plain_json(
            {
                "classes": self.folders,
                "class_names": class_names,
                "input_size": input_size,
                "shard_size": shard_size,
                "header": header,
            }
        )
        self._shards: list[dict[str, Any]] = []
        self._counts = [0] * num_classes
        self._state_files: dict[str, Any] | None = None
        self._state: ResumeState | None = None
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._complete = False
        self._replaces = self._began = False
        self._lock: int | None = None
        self._made = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        if self.directory.exists() and not self.directory.is_dir():
            raise UsageError(f"--output {self.directory} is a file: name a folder.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {self.directory} cannot be made: {error.strerror}.") from error
        if not os.access(self.directory, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.directory} is not writable: choose another folder.")
        self._take_lock()

    def _begin(self) -> None:
        """Mark the folder as a set's, so that a run killed before its first shard can be resumed too."""
        self._drop_leftovers()
        self._began = True
        write_bytes(self.directory / CLASSES, self._class_list())
        write_json(self.directory / MANIFEST, self._manifest([], self._counts, None, False, None))

    def _class_list(self) -> bytes:
        return "".join(f"{name}\n" for name in self.folders).encode()

    def _take_lock(self) -> None:
        """Keep a second run out of the folder; the system frees the lock however this process ends."""
        if _fcntl is None:
            return
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UsageError(f"Another run is writing to {self.directory}: wait for it or choose another.") from error
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        self._lock = descriptor

    # What stands in the folder

    def _known(self) -> set[str]:
        """The files that belong to the set as the manifest has it."""
        known = {MANIFEST, CLASSES, *SIDE_FILES} if (self.directory / MANIFEST).exists() else set()
        for shard in self._shards:
            known |= set(shard["files"])
        if self._state_files is not None:
            known |= set(self._state_files)
        return known

    def _foreign(self) -> list[str]:
        """The files that are neither this set's nor leftovers of its unfinished shard."""
        known = self._known()
        return [
            name
            for name in files_below(self.directory)
            if name not in known
            and name.rsplit("/", 1)[-1] not in LITTER
            and not (_PARTIAL.fullmatch(name) or _STATE.fullmatch(name) or _TIMM_CACHE.fullmatch(name))
            and not (name in ("grids", "state") or (_GRID.fullmatch(name) and (self.directory / MANIFEST).exists()))
        ]

    def _drop_leftovers(self) -> None:
        """Remove what an interrupted shard left: temporary names, and state that no manifest names."""
        known = self._known()
        known |= {_partial(Path(name)).name for name in known if not (self.directory / name).exists()}
        with writing(self.directory):
            for name in files_below(self.directory):
                if name not in known and (
                    _PARTIAL.fullmatch(name) or _STATE.fullmatch(name) or _TIMM_CACHE.fullmatch(name)
                ):
                    path = self.directory / name
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read_back(self) -> None:
        manifest = load_manifest(self.directory)
        differences = header_differences({key: manifest.get(key) for key in self._identity}, self._identity)
        if differences:
            shown = "; ".join(part.removeprefix("header.") for part in differences[:4])
            more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
            raise UsageError(
                f"{self.directory} was begun with other settings: {shown}{more}. Give the same, or another --output."
            )
        self._shards = list(manifest["shards"])
        self._counts = list(manifest["counts"])
        self._state_files = manifest["state"]
        self._complete = bool(manifest["complete"])
        foreign = self._foreign()
        if foreign:
            raise UsageError(
                f"{self.directory} holds files that its manifest does not know ({named(foreign)}): move them away, or "
                "choose another --output."
            )
        for shard in self._shards:
            for name, facts in shard["files"].items():
                self._complete_rename(name, facts)
                _check_size(self.directory / name, facts)
        if self._state_files is not None:
            self._load_state()

    def _complete_rename(self, name: str, facts: Mapping[str, Any]) -> None:
        """Finish what a run that was killed right after writing the manifest had left to do."""
        path, partial = self.directory / name, _partial(self.directory / name)
        if not path.exists() and partial.exists() and sha256_file(partial) == facts["sha256"]:
            with writing(path):
                os.replace(partial, path)

    def _load_state(self) -> None:
        assert self._state_files is not None
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, facts in self._state_files.items():
            path = self.directory / name
            _check_file(path, facts)
            if path.suffix == ".json":
                values = json.loads(path.read_text(encoding="utf-8"))
            else:
                tensors = safetensors.torch.load_file(path)
        self._images = _rows(tensors.pop(f"{_PENDING}images", None))
        self._labels = _rows(tensors.pop(f"{_PENDING}labels", None))
        self._logits = _rows(tensors.pop(f"{_PENDING}logits", None))
        self._state = ResumeState(tensors, values)

    # What the engine sees

    @property
    def state(self) -> ResumeState | None:
        """The state that came with the last whole shard of a resumed set; None for a new one."""
        return self._state

    @property
    def num_images(self) -> int:
        """Images added so far, those of the earlier runs included."""
        return self.num_written + self.num_buffered

    @property
    def num_written(self) -> int:
        """Images in whole shards."""
        return sum(int(shard["images"]) for shard in self._shards)

    @property
    def num_buffered(self) -> int:
        """Images that wait for their shard."""
        return sum(len(part) for part in self._images)

    @property
    def full(self) -> bool:
        """Whether at least one whole shard waits: time for :meth:`flush_shard`."""
        return self.num_buffered >= self.shard_size

    @property
    def complete(self) -> bool:
        """Whether an earlier run closed the set and nothing was added since."""
        return self._complete

    @property
    def counts(self) -> tuple[int, ...]:
        """Images per class in whole shards."""
        return tuple(self._counts)

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Take a batch: uint8 ``[B, C, H, W]``, classes ``[B]``, the teacher's logits ``[B, num_classes]``.

        Logits are kept in float16 if they come in it, else in float32. Everything is copied to the CPU.

        Raises:
            ValueError: a shape, type or label that does not fit the set.
        """
        batch = len(images)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.input_size:
            raise ValueError(f"images must be uint8 [B, {self.input_size}], not {images.dtype} {tuple(images.shape)}")
        if labels.shape != (batch,) or logits.shape != (batch, self.num_classes):
            raise ValueError(f"labels {tuple(labels.shape)} or logits {tuple(logits.shape)} do not fit {batch} images")
        labels = labels.detach().to("cpu", torch.int64, copy=True)
        if batch and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels must be in 0..{self.num_classes - 1}")
        kind = torch.float16 if logits.dtype == torch.float16 else torch.float32
        if self._logits and self._logits[0].dtype != kind:
            raise ValueError(f"logits of {self._logits[0].dtype} before and {kind} now")
        self._images.append(images.detach().to("cpu", copy=True))
        self._labels.append(labels)
        self._logits.append(logits.detach().to("cpu", kind, copy=True))
        self._complete = False

    def flush_shard(self, *, state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None) -> int:
        """Write every whole shard that waits, then ``state`` with the images that still wait; return the shards.

        Args:
            state: tensors (names without the prefix ``pending.``) and JSON values from which the engine can go on
                after the images added so far. Without it a resumed run goes on after the last whole shard, with
                nothing to start from.
        """
        written = self.num_buffered // self.shard_size
        if written or state is not None:
            self._commit([self.shard_size] * written, state)
        return written

    def close(
        self,
        *,
        state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write what still waits as a last, shorter shard, the pictures per class, and the final manifest.

        Args:
            state: as for :meth:`flush_shard`: with it the set can be made larger later.
            summary: what the run wants to say of itself in the manifest (times, versions); no part of the settings.

        Returns:
            The manifest.
        """
        sizes = [self.shard_size] * (self.num_buffered // self.shard_size)
        if self.num_buffered % self.shard_size:
            sizes.append(self.num_buffered % self.shard_size)
        self._commit(sizes, state, complete=True, summary=summary)
        self._write_grids()
        self.release()
        return load_manifest(self.directory)

    def release(self) -> None:
        """Let other runs into the folder again. What was added since the last whole shard is dropped."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds the set
                folder.rmdir()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._replaces:
            self._give_up()
        self.release()

    def _give_up(self) -> None:
        """Leave whole shards alone; without any shard or state, leave nothing."""
        with contextlib.suppress(UnavailableError):
            # The manifest on the disk decides: the interruption may have come right after it was replaced.
            manifest = load_manifest(self.directory)
            self._shards, self._state_files = manifest["shards"], manifest["state"]
        self._drop_leftovers()
        if self._began and not self._shards and self._state_files is None:
            for name in (MANIFEST, CLASSES, *SIDE_FILES):
                (self.directory / name).unlink(missing_ok=True)

    # Writing

    def _commit(
        self,
        sizes: Sequence[int],
        state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None,
        *,
        complete: bool = False,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        if self._replaces and not sizes and not complete:
            return  # nothing is whole yet: the earlier set stays
        images = torch.cat(self._images) if self._images else torch.empty(0, *self.input_size, dtype=torch.uint8)
        labels = torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int64)
        logits = torch.cat(self._logits) if self._logits else torch.empty(0, self.num_classes)
        shards, counts = list(self._shards), list(self._counts)
        start, first = 0, self.num_written
        with writing(self.directory):
            for size in sizes:
                part = slice(start, start + size)
                shards.append(self._write_shard(len(shards), first + start, images[part], labels[part], logits[part]))
                for label, count in zip(*labels[part].unique(return_counts=True), strict=True):
                    counts[int(label)] += int(count)
                start += size
            if self._replaces:
                self._remove_old()
            state_files = None
            if state is not None:
                rest = {"images": images[start:], "labels": labels[start:], "logits": logits[start:]}
                state_files = self._write_state(first + len(labels), state, rest)
            write_bytes(self.directory / CLASSES, self._class_list())
            write_json(self.directory / MANIFEST, self._manifest(shards, counts, state_files, complete, summary))
            for shard in shards[len(self._shards) :]:
                for name in shard["files"]:
                    os.replace(_partial(self.directory / name), self.directory / name)
        self._shards, self._counts, self._state_files, self._complete = shards, counts, state_files, complete
        rest_size = len(labels) - start
        self._images = [images[start:].clone()] if rest_size else []  # a view would keep the whole batch in memory
        self._labels = [labels[start:].clone()] if rest_size else []
        self._logits = [logits[start:].clone()] if rest_size else []
        self._drop_leftovers()

    def _manifest(
        self,
        shards: Sequence[Mapping[str, Any]],
        counts: Sequence[int],
        state_files: Mapping[str, Any] | None,
        complete: bool,
        summary: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            OWNER_KEY: __version__,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": complete,
            "num_images": sum(int(shard["images"]) for shard in shards),
            "num_classes": self.num_classes,
            "counts": list(counts),
            **self._identity,
            "summary": dict(summary or {}),
            "shards": list(shards),
            "state": state_files,
        }

    def _write_shard(self, index: int, first: int, images: Tensor, labels: Tensor, logits: Tensor) -> dict[str, Any]:
        files = {}
        tar_path = self.directory / f"train-{index:05d}.tar"
        with _partial(tar_path).open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for offset, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
                    content = _png(image)
                    # A fresh TarInfo has mtime, uid and gid 0 and no names: the same images give the same bytes.
                    member = tarfile.TarInfo(f"{self.folders[label]}/{first + offset:08d}.png")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        tensor_path = tar_path.with_suffix(".safetensors")
        with _partial(tensor_path).open("wb") as file:
            file.write(safetensors.torch.save({"logits": logits.contiguous(), "labels": labels.contiguous()}))
            file.flush()
            os.fsync(file.fileno())
        for path in (tar_path, tensor_path):
            files[path.name] = {"bytes": _partial(path).stat().st_size, "sha256": sha256_file(_partial(path))}
        return {"images": len(labels), "first": first, "files": files}

    def _write_state(
        self, position: int, state: tuple[Mapping[str, Tensor], Mapping[str, Any]], rest: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        tensors, values = state
        if any(name.startswith(_PENDING) for name in tensors):
            raise ValueError(f"state tensors may not be named {_PENDING}*")
        content = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        content |= {_PENDING + name: tensor.contiguous() for name, tensor in rest.items() if len(tensor)}
        folder = self.directory / "state"
        folder.mkdir(exist_ok=True)
        # Numbered by position: the manifest's replacement decides, in one step, which one counts. The same position
        # is written again only with nothing added in between, and then the two are equally good.
        paths = (folder / f"{position:08d}.safetensors", folder / f"{position:08d}.json")
        write_bytes(paths[0], safetensors.torch.save(content))
        write_json(paths[1], values)
        return {f"state/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}

    def _remove_old(self) -> None:
        """Delete the set that ``overwrite`` replaces; the manifest goes first, so that it never names missing files."""
        check_replaceable(self.directory)
        self._replaces = False
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for name in files_below(self.directory):
            path = self.directory / name
            if not _PARTIAL.fullmatch(name) and path.name not in LITTER and not path.is_dir():
                path.unlink()
        for folder in ("grids", "state"):
            shutil.rmtree(self.directory / folder, ignore_errors=True)

    def _write_grids(self) -> None:
        """Write a picture per class of its first images, read back from the shards."""
        wanted: dict[str, list[Tensor]] = {folder: [] for folder in self.folders}
        missing = {name: min(GRID_IMAGES, count) for name, count in zip(self.folders, self._counts, strict=True)}
        folder = self.directory / "grids"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if _GRID.fullmatch(f"grids/{path.name}"):
                    path.unlink()
            for shard in self._shards:
                if not any(missing.values()):
                    break
                tar_name = next(name for name in shard["files"] if name.endswith(".tar"))
                with tarfile.open(self.directory / tar_name) as tar:
                    for member in tar:
                        name = member.name.split("/", 1)[0]
                        if missing.get(name):
                            missing[name] -= 1
                            content = tar.extractfile(member)
                            assert content is not None
                            wanted[name].append(_pixels(Image.open(content)))
                            if not missing[name]:  # written at once: a thousand classes need not wait in memory
                                write_grid(folder / f"{name}.png", torch.stack(wanted.pop(name)), columns=GRID_COLUMNS)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _rows(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


# Reading


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
    """

    images: Tensor
    labels: Tensor
    logits: Tensor | None
    manifest: dict[str, Any] | None
    class_folders: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def _is_dataset(folder: Path) -> bool:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_manifest(directory: str | Path) -> dict[str, Any]:
    """Read and check ``manifest.json``: types, counts that add up, file names that stay in the folder.

    Raises:
        UnavailableError: it is missing, not this program's, newer than this version, or damaged.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnavailableError(f"{path} is missing: {directory} is not a finished synthetic set.") from error
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UnavailableError(f"{path} was not written by fastdfkd synthesize.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UnavailableError(
            f"{path} has format version {manifest.get('format_version')!r}; this fastdfkd reads {FORMAT_VERSION}."
        )
    damage = _manifest_damage(manifest)
    if damage:
        raise UnavailableError(f"{path} is damaged: {damage}.")
    return manifest


def _manifest_damage(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest, or None."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def listing(value: Any, length: int | None = None) -> bool:
        return isinstance(value, list) and length in (None, len(value))

    def files(value: Any, pattern: re.Pattern[str]) -> bool:
        return (
            isinstance(value, dict)
            and len(value) == 2
            and all(pattern.fullmatch(name) and isinstance(facts, dict) for name, facts in value.items())
            and len({name.rsplit(".", 1)[-1] for name in value}) == 2
            and all(whole(facts.get("bytes")) and isinstance(facts.get("sha256"), str) for facts in value.values())
        )

    classes = manifest.get("num_classes")
    if not whole(classes):
        return "num_classes is not a number"
    size = manifest.get("input_size")
    if not listing(size, 3) or not all(whole(side) and side for side in size or []) or size[0] not in MODES:  # type: ignore[index]
        return "input_size is not [C, H, W]"
    if not listing(manifest.get("classes"), classes) or not listing(manifest.get("counts"), classes):
        return "classes or counts do not fit num_classes"
    if not all(isinstance(name, str) for name in manifest["classes"]) or not all(map(whole, manifest["counts"])):
        return "classes or counts hold something else"
    if not listing(manifest.get("shards")):
        return "shards is not a list"
    for shard in manifest["shards"]:
        if not isinstance(shard, dict) or not whole(shard.get("images")) or not files(shard.get("files"), _SHARD):
            return "a shard lacks its images or files"
    if sum(shard["images"] for shard in manifest["shards"]) != sum(manifest["counts"]):
        return "shards and counts do not add up"
    if manifest.get("state") is not None and not files(manifest["state"], _STATE):
        return "state names something else"
    return None


def _check_size(path: Path, facts: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise UnavailableError(f"{path} is missing, though the manifest names it.") from error
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}.") from error
    if size < facts["bytes"]:
        raise UnavailableError(f"{path} is truncated: {size:,} of {facts['bytes']:,} bytes. Copy or make it again.")
    if size > facts["bytes"]:
        raise UnavailableError(f"{path} is not what was written: {size:,} bytes instead of {facts['bytes']:,}.")


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    _check_size(path, facts)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}.") from error
    if digest != facts["sha256"]:
        raise UnavailableError(f"{path} is damaged: its bytes do not have the SHA-256 that the manifest states.")


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
        UsageError: no such folder, no images in it, ``input_size`` is missing or has other channels than the set.
        UnavailableError: a file is missing, truncated, damaged or not an image (named).
    """
    path = Path(directory)
    if not path.exists():
        raise UsageError(f"--data-dir {path} does not exist.")
    if path.is_dir() and (path / MANIFEST).exists():
        return _read_synthetic(path, input_size, interpolation)
    if input_size is None:
        raise UsageError(f"--data-dir {path} has no {MANIFEST}: the input size must be given for plain images.")
    return _read_plain(path, input_size, interpolation)


def _resampling(name: str) -> Image.Resampling:
    return getattr(Image.Resampling, name.upper(), Image.Resampling.BILINEAR)


def _read_synthetic(path: Path, size: tuple[int, int, int] | None, interpolation: str) -> SyntheticSet:
    manifest = load_manifest(path)
    stored: tuple[int, int, int] = tuple(manifest["input_size"])
    size = stored if size is None else size
    if size[0] != stored[0]:
        raise UsageError(f"--data-dir {path} holds images of {stored[0]} channels, and {size[0]} are needed.")
    total = sum(manifest["counts"])
    if not total:
        raise UsageError(f"--data-dir {path} holds no images yet: let fastdfkd synthesize go on with --resume.")
    for shard in manifest["shards"]:
        for name, facts in shard["files"].items():
            _check_file(path / name, facts)
    images = torch.empty(total, *size, dtype=torch.uint8)
    labels = torch.empty(total, dtype=torch.int64)
    logits: list[Tensor] = []
    index = {name: number for number, name in enumerate(manifest["classes"])}
    start = 0
    for shard in manifest["shards"]:
        names = sorted(shard["files"], reverse=True)  # the tar, then the tensors
        rows = slice(start, start + shard["images"])
        shard_labels, shard_logits = _read_tensors(path / names[1], shard["images"], manifest["num_classes"])
        labels[rows], start = shard_labels, rows.stop
        logits.append(shard_logits)
        row = rows.start
        for folder, where, content in _tar_images(path / names[0], only_png=True):
            if row == rows.stop:
                raise UnavailableError(f"{path / names[0]} holds more images than the manifest's {shard['images']}.")
            if index.get(folder) != int(labels[row]):
                raise UnavailableError(f"{where} stands in another class than its label {int(labels[row])}.")
            images[row] = _decode(content, where, size, interpolation, stored=stored)
            row += 1
        if row != rows.stop:
            raise UnavailableError(f"{path / names[0]} holds {row - rows.start} images, not {shard['images']}.")
    soft = torch.cat(logits) if tuple(size) == stored else None
    return SyntheticSet(images, labels, soft, manifest, tuple(manifest["classes"]))


def _read_tensors(path: Path, images: int, classes: int) -> tuple[Tensor, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnavailableError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    labels, logits = tensors.get("labels"), tensors.get("logits")
    if labels is None or logits is None or labels.shape != (images,) or logits.shape != (images, classes):
        raise UnavailableError(f"{path} does not hold labels [{images}] and logits [{images}, {classes}].")
    if not logits.is_floating_point() or (images and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise UnavailableError(f"{path} holds labels or logits that are out of range.")
    return labels.to(torch.int64), logits


def _tar_images(path: Path, *, only_png: bool = False) -> Iterator[tuple[str, str, IO[bytes]]]:
    """Yield (class folder, printable place, content) for every image of a tar, in its order.

    Nothing is extracted to the disk. Absolute names, ``..``, links and devices have no place in such a tar, and make
    it refused as a whole; so do, in a set of ours, members that are no PNG.
    """
    extensions = get_img_extensions(as_set=True)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                where = f"{path}: {member.name!r}"
                parts = member.name.replace("\\", "/").split("/")
                if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
                    raise UnavailableError(f"{where} points out of the tar; it is refused.")
                if member.isdir():
                    continue
                if not member.isfile():
                    raise UnavailableError(f"{where} is a link or a device; a tar of images has none.")
                suffix = os.path.splitext(parts[-1])[1].lower()
                if suffix not in extensions or (only_png and suffix != ".png"):
                    if only_png:
                        raise UnavailableError(f"{where} is not a PNG image.")
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield (parts[-2] if len(parts) > 1 and parts[-2] != "." else ""), where, content
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(f"{path} cannot be read as a tar: {reason}.") from error


def _decode(
    content: IO[bytes] | Path,
    where: str,
    size: tuple[int, int, int],
    interpolation: str,
    *,
    stored: tuple[int, int, int] | None = None,
) -> Tensor:
    """Return one image as uint8 ``[C, H, W]`` of ``size``; ``stored`` is what it must be as it stands."""
    mode = MODES[size[0]]
    try:
        with Image.open(content) as picture:
            if stored is not None and (picture.mode != MODES[stored[0]] or picture.size != (stored[2], stored[1])):
                found = f"{picture.mode} {picture.width}x{picture.height}"
                raise UnavailableError(f"{where} is {found}, not what the manifest states.")
            if picture.mode.startswith(("I", "F")):
                raise UnavailableError(f"{where} has more than 8 bits a channel: convert it first.")
            ready = picture.convert(mode)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UnavailableError(f"{where} cannot be decoded as an image: {str(error).splitlines()[0]}.") from error
    if ready.size != (size[2], size[1]):
        ready = ImageOps.fit(ready, (size[2], size[1]), method=_resampling(interpolation))
    return _pixels(ready)


def _plain_images(path: Path) -> Iterator[tuple[str, str, IO[bytes] | Path]]:
    """Yield (class folder, printable place, content) for the images of a folder, a tar or a folder of tars."""
    if path.is_file():
        if path.suffix != ".tar":
            raise UsageError(f"--data-dir {path} is neither a folder nor a .tar file.")
        yield from _tar_images(path)
        return
    tars = sorted(path.glob("*.tar"))
    for tar in tars:
        yield from _tar_images(tar)
    if tars:  # a set of ours without its manifest: the pictures beside the tars are for people
        return
    extensions = get_img_extensions(as_set=True)
    for root, folders, files in os.walk(path, followlinks=True):
        folders.sort(key=natural_key)
        folder = "" if Path(root) == path else Path(root).name
        for name in sorted(files, key=natural_key):
            if Path(name).suffix.lower() in extensions:
                yield folder, str(Path(root) / name), Path(root) / name


def _read_plain(path: Path, size: tuple[int, int, int], interpolation: str) -> SyntheticSet:
    if size[0] not in MODES:
        raise UsageError(f"Images of 1 to 4 channels can be read, not of {size[0]}.")
    images: list[Tensor] = []
    folders: list[str] = []
    for folder, where, content in _plain_images(path):
        images.append(_decode(content, where, size, interpolation))
        folders.append(folder)
    if not images:
        known = ", ".join(sorted(get_img_extensions()))
        raise UsageError(f"--data-dir {path} holds no images ({known}), neither in class folders nor in a .tar.")
    order = _class_order(path, folders)
    index = {name: number for number, name in enumerate(order)}
    labels = torch.tensor([index.get(name, -1) for name in folders])
    return SyntheticSet(torch.stack(images), labels, None, None, order)


def _class_order(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The class folders in index order: as our classes.txt beside a shard says, else sorted as timm sorts them."""
    found = set(folders) - {""}
    beside = path.parent / CLASSES
    if path.is_file() and beside.is_file() and _is_dataset(path.parent):
        listed = tuple(beside.read_text(encoding="utf-8").split())
        if found <= set(listed):
            return listed
    return tuple(sorted(found, key=natural_key))


__all__ = [
    "CLASSES",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "DatasetWriter",
    "ResumeState",
    "SyntheticSet",
    "class_folders",
    "header_differences",
    "load_manifest",
    "read_dataset",
]
