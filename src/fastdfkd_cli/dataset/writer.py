"""Writes a synthetic set shard by shard, so that an interruption costs no whole shard and a later run can go on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from fastdfkd_cli import __version__
from fastdfkd_cli.background import Background, HostCopy
from fastdfkd_cli.data.files import IMAGE_MODES, first_line
from fastdfkd_cli.dataset.grids import GRID_FILE, write_grids
from fastdfkd_cli.dataset.layout import (
    CLASSES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    STATE_FILE,
    check_file,
    class_folders,
    is_dataset,
    load_manifest,
    require_identity,
    set_identity,
)
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.output import (
    LITTER,
    OWNER_KEY,
    check_replaceable,
    files_below,
    lock_folder,
    named,
    plain_json,
    sha256_file,
    unlock_folder,
    write_bytes,
    write_json,
    writing,
)

#: What the engine may write beside the set.
SIDE_FILES = frozenset({"README.md", "report.json", "metrics.jsonl", "config.json", "samples.png"})
_PARTIAL = re.compile(
    r"\.train-\d{5,}\.(tar|safetensors)\.partial|\.(manifest\.json|classes\.txt)\.partial-[0-9a-f]{8}"
)
_TIMM_CACHE = re.compile(r"_.*_tarinfos\.pickle")
_PNG_COMPRESSION = 3  # half the time of zlib's default for a few per cent more bytes
#: What the engine goes on from: tensors and JSON values.
State = tuple[Mapping[str, Tensor], Mapping[str, Any]]
_PENDING = ("pending.images", "pending.labels", "pending.logits")


@dataclass(frozen=True)
class _Snapshot:
    """A :data:`State` that stays as it was while the engine goes on: the thread's own copies."""

    names: tuple[str, ...]
    tensors: HostCopy
    values: Mapping[str, Any]

    @classmethod
    def of(cls, state: State | None) -> _Snapshot | None:
        if state is None:
            return None
        tensors, values = state
        if any(name.startswith("pending.") for name in tensors):
            raise ValueError("state tensors may not be named pending.*")
        return cls(tuple(tensors), HostCopy.of(*tensors.values()), plain_json(values))


def _png(image: np.ndarray[Any, Any]) -> bytes:
    """Encode one uint8 ``[C, H, W]`` image."""
    pixels = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=_PNG_COMPRESSION)
    return buffer.getvalue()


@dataclass(frozen=True)
class ResumeState:
    """What the engine handed over with the last whole shard: tensors (on the CPU) and JSON values, as given."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


#: Between the numbers of two states at one position.
_ANOTHER = 10**9


class DatasetWriter:
    """Writes a set, shard by shard; every shard that the manifest names is whole, whatever happens later.

    Images are buffered by :meth:`add`; :meth:`flush_shard` writes the whole shards among them, keeps the rest with the
    caller's state, and so marks a point from which :meth:`resume` goes on exactly.

    All writing happens in a thread, one flush at a time: the caller fills the next shard meanwhile, and waits at its
    flush if the disk is the slower one. What cannot be written is raised by the next :meth:`add`, :meth:`flush_shard`
    or :meth:`close`, and by every one after it. As a context manager the writer finishes on leaving what was flushed,
    whatever the reason, and gives the folder up; after an exception before the first shard it also removes the folder
    it made.

    Args:
        directory: the set's folder: missing, empty, or (``overwrite``) an earlier set. An earlier set is removed only
            when the first shard of the new one is whole.
        class_names: by class index, or None.
        num_classes: how many classes.
        input_size: (C, H, W) of every image.
        shard_size: images per tar.
        header: everything that decides what the images are, ready for JSON: config, teacher, seed. A resumed run
            must bring the same.
        first_image: the number that the first image has, for a part of a larger set.
        overwrite: replace an earlier set.
        resume: go on with an earlier set: what :meth:`resume` is short for.

    Attributes:
        state: what came with the last whole shard of a resumed set; None for a new one.
        complete: whether an earlier run closed the set and nothing was added since.

    Raises:
        UsageError: the folder is in use, not writable, or holds files that are not this set's.
        FastDFKDError: later, as above: the disk is full.
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
        first_image: int = 0,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if shard_size < 1:
            raise UsageError(f"--shard-size must be 1 or more, not {shard_size}.")
        if input_size[0] not in IMAGE_MODES:
            raise UsageError(f"Images of 1 to 4 channels can be stored, not of {input_size[0]}.")
        self.directory = Path(directory)
        self.folders = class_folders(num_classes, class_names)
        self.num_classes, self.input_size, self.shard_size = num_classes, input_size, shard_size
        self.first_image = first_image
        self._identity = set_identity(
            class_names=class_names,
            num_classes=num_classes,
            input_size=input_size,
            shard_size=shard_size,
            header=header,
        )
        self._shards: list[dict[str, Any]] = []
        self._counts = [0] * num_classes
        self._state_files: dict[str, Any] | None = None
        self.state: ResumeState | None = None
        self._waiting: list[HostCopy] = []  # images, labels, logits of no shard yet
        # While it has a job, the folder, what stands in it (the shards, counts and state above) and `complete` are
        # the thread's.
        self._background = Background()
        self.complete = False
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
        self._lock = lock_folder(self.directory)
        try:
            self._start(overwrite, resume)
        except BaseException:
            self.release()
            raise
        self._num_images = self.num_written + self.num_buffered

    @classmethod
    def resume(cls, directory: str | Path, **settings: Any) -> DatasetWriter:
        """Go on after the last whole shard of ``directory``; a missing or empty folder starts a new set.

        What the engine needs is in :attr:`state`, what is done in :attr:`num_images` (with the images that wait for
        their shard). The settings are those of a new set.

        Raises:
            UsageError: the set was begun with other settings (named), or the folder holds files that the manifest does
                not know (named).
            UnavailableError: the manifest, a shard or the state is damaged.
        """
        return cls(directory, **settings, resume=True)

    def _start(self, overwrite: bool, resume: bool) -> None:
        has_manifest = (self.directory / MANIFEST).exists()
        if resume and has_manifest:
            self._read_back()
            self._drop_leftovers()
            return
        foreign = self._foreign()
        if not foreign and not has_manifest:
            # Marked as a set's, so that a run killed before its first shard can be resumed too.
            self._drop_leftovers()
            self._began = True
            self._write_manifest([], self._counts, None, False, None)
        elif resume:
            raise UsageError(
                f"--output {self.directory} holds no set to go on with, but other files ({named(foreign)}): "
                "choose another folder."
            )
        elif not overwrite:
            hint = " (to go on with it: --resume)" if is_dataset(self.directory) else ""
            raise UsageError(f"--output {self.directory} is not empty{hint}: choose another folder.")
        else:
            check_replaceable(self.directory)
            self._replaces = True

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
            and not _is_leftover(name)
            # A link in the place of a folder would have what is written into it land elsewhere.
            and not (name in ("grids", "state") and not (self.directory / name).is_symlink())
            and not (GRID_FILE.fullmatch(name) and (self.directory / MANIFEST).exists())
        ]

    def _drop_leftovers(self) -> None:
        """Remove what an interrupted shard left: temporary names, and state that no manifest names."""
        known = self._known()
        known |= {_partial(Path(name)).name for name in known if not (self.directory / name).exists()}
        with writing(self.directory):
            for name in files_below(self.directory):
                if name not in known and _is_leftover(name):
                    path = self.directory / name
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        with contextlib.suppress(OSError):  # it is not empty, or not there
            (self.directory / "state").rmdir()

    def _read_back(self) -> None:
        manifest = load_manifest(self.directory)
        require_identity(self.directory, manifest, self._identity, was="begun")
        self._shards = list(manifest["shards"])
        self._counts = list(manifest["counts"])
        self._state_files = manifest["state"]
        self.complete = bool(manifest["complete"])
        foreign = self._foreign()
        if foreign:
            raise UsageError(
                f"{self.directory} holds files that its manifest does not know ({named(foreign)}): move them away, or "
                "choose another --output."
            )
        for shard in self._shards:
            for name, facts in shard["files"].items():
                self._complete_rename(name, facts)
                check_file(self.directory / name, facts, content=False)
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
            check_file(path, facts)
            try:
                if path.suffix == ".json":
                    values = json.loads(path.read_text(encoding="utf-8"))
                else:
                    tensors = safetensors.torch.load_file(path)
            except (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
                raise UnavailableError(f"{path} cannot be read: {first_line(error)}.") from error
        waiting = [tensors.pop(name, None) for name in _PENDING]
        if not isinstance(values, dict) or not self._fit(waiting):
            raise UnavailableError(f"{self.directory / 'state'} is damaged: it holds something else than a state.")
        if waiting[0] is not None:
            self._waiting = [HostCopy([each for each in waiting if each is not None])]
        self.state = ResumeState(tensors, values)

    def _fit(self, waiting: Sequence[Tensor | None]) -> bool:
        """Whether images, labels and logits are of this set, or none of them is there."""
        images, labels, logits = waiting
        if images is None or labels is None or logits is None:
            return images is labels is logits is None
        return (
            (images.dtype, tuple(images.shape[1:])) == (torch.uint8, self.input_size)
            and (labels.dtype, labels.shape) == (torch.int64, (len(images),))
            and logits.dtype in (torch.float16, torch.float32)
            and logits.shape == (len(images), self.num_classes)
            and (not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes)
        )

    # What the engine sees

    @property
    def num_images(self) -> int:
        """Images added so far, written or not, those of the earlier runs included."""
        return self._num_images

    @property
    def num_written(self) -> int:
        """Images in whole shards on the disk."""
        return sum(int(shard["images"]) for shard in self._shards)

    @property
    def num_buffered(self) -> int:
        """Images that wait for a flush."""
        return sum(len(copy) for copy in self._waiting)

    @property
    def replaces(self) -> bool:
        """Whether an earlier set still stands in the folder, until the first shard is whole."""
        return self._replaces

    @property
    def full(self) -> bool:
        """Whether at least one whole shard waits: time for :meth:`flush_shard`."""
        return self.num_buffered >= self.shard_size

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Take a batch: uint8 ``[B, C, H, W]``, classes ``[B]``, the teacher's logits ``[B, num_classes]``.

        Logits are kept in float16 if they come in it, else in float32. Everything is copied to the CPU; from a CUDA
        device without waiting for it, so that there a class that the set does not have is found by the thread.

        Raises:
            ValueError: a shape, type or label that does not fit the set.
            FastDFKDError: an earlier flush failed.
        """
        self._background.check()
        batch = len(images)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.input_size:
            raise ValueError(f"images must be uint8 [B, {self.input_size}], not {images.dtype} {tuple(images.shape)}")
        if labels.shape != (batch,) or logits.shape != (batch, self.num_classes):
            raise ValueError(f"labels {tuple(labels.shape)} or logits {tuple(logits.shape)} do not fit {batch} images")
        kind = torch.float16 if logits.dtype == torch.float16 else torch.float32
        if self._waiting and self._waiting[0].dtypes[2] != kind:
            raise ValueError(f"logits of {self._waiting[0].dtypes[2]} before and {kind} now")
        if labels.device.type != "cuda":
            self._check_labels(labels)
        self._waiting.append(HostCopy.of(images, labels.to(torch.int64), logits.to(kind)))
        self._num_images += batch
        self.complete = False

    def _check_labels(self, labels: Tensor) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels must be in 0..{self.num_classes - 1}")

    def flush_shard(self, *, state: State | None = None, check: Callable[[], None] | None = None) -> None:
        """Have every whole shard that waits written, then ``state`` with the images that still wait.

        Args:
            state: tensors (names without the prefix ``pending.``) and JSON values from which the engine can go on
                after the images added so far; both are copied. Without it a resumed run goes on after the last whole
                shard, with nothing to start from.
            check: called in the thread before anything is written: what it raises keeps all that was added since the
                last flush out of the set, and ends the run as a failure to write does.

        Raises:
            FastDFKDError: an earlier flush failed.
        """
        written = self.num_buffered // self.shard_size
        if written or state is not None:
            self._begin([self.shard_size] * written, state, check)

    def close(
        self,
        *,
        state: State | None = None,
        check: Callable[[], None] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write what still waits as a last, shorter shard, the pictures per class, and the final manifest.

        Args:
            state: as for :meth:`flush_shard`: with it the set can be made larger later.
            check: as for :meth:`flush_shard`.
            summary: what the run wants to say of itself in the manifest (times, versions); no part of the settings.

        Returns:
            The manifest.
        """
        whole, rest = divmod(self.num_buffered, self.shard_size)
        self._begin([self.shard_size] * whole + [rest] * (rest > 0), state, check, complete=True, summary=summary)
        self.wait()
        self.release()
        return load_manifest(self.directory)

    def wait(self) -> None:
        """Wait until everything that was flushed is on the disk.

        Raises:
            FastDFKDError: it could not be written.
        """
        self._background.wait()

    def release(self) -> None:
        """Let other runs into the folder again, once what was flushed is written; drop what was added since."""
        try:
            self._background.failure()
        finally:  # also when a second Ctrl-C cuts the waiting short: then the lock goes with the thread's last write
            if self._lock is not None:
                self._background.afterwards(partial(unlock_folder, self._lock))
                self._lock = None
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds the set
                folder.rmdir()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            failure = self._background.failure()
            if error is not None or failure is not None:
                self._drop_partials() if self._replaces else self._give_up()
        finally:
            self.release()
        if error is None and failure is not None:
            raise failure

    def _drop_partials(self) -> None:
        """Remove the shard that was begun beside the earlier set, and nothing of that set."""
        for name in files_below(self.directory):
            if _PARTIAL.fullmatch(name):
                (self.directory / name).unlink(missing_ok=True)

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

    def _begin(
        self,
        sizes: Sequence[int],
        state: State | None,
        check: Callable[[], None] | None,
        *,
        complete: bool = False,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Hand shards of these ``sizes`` and everything behind them to the thread."""
        self.wait()
        snapshot, waiting = _Snapshot.of(state), list(self._waiting)

        def job() -> None:
            if check is not None:
                check()
            self._commit(waiting, sizes, snapshot, complete=complete, summary=summary)
            if complete:
                write_grids(self.directory, self._shards, self.folders, self._counts, self.input_size)

        self._background.start(job)
        if sizes:
            self._waiting = _behind(self._waiting, sum(sizes))

    def _commit(
        self,
        waiting: list[HostCopy],
        sizes: Sequence[int],
        state: _Snapshot | None,
        *,
        complete: bool,
        summary: Mapping[str, Any] | None,
    ) -> None:
        """Write shards from the first images of ``waiting``, which is emptied, and keep the rest with the state."""
        if self._replaces and not sizes and not complete:
            return  # nothing is whole yet: the earlier set stays
        images, labels, logits = _joined(waiting)
        self._check_labels(labels)
        shards, counts = list(self._shards), list(self._counts)
        start, first = 0, self.first_image + self.num_written
        with writing(self.directory):
            for size in sizes:
                part = slice(start, start + size)
                shards.append(self._write_shard(len(shards), first + start, images[part], labels[part], logits[part]))
                for label, count in enumerate(np.bincount(labels[part].numpy(), minlength=self.num_classes)):
                    counts[label] += int(count)
                start += size
            if self._replaces:
                self._remove_old()
            state_files = None
            if state is not None:
                state_files = self._write_state(
                    self.num_written + len(labels), state, (images[start:], labels[start:], logits[start:])
                )
            self._write_manifest(shards, counts, state_files, complete, summary)
            for shard in shards[len(self._shards) :]:
                for name in shard["files"]:
                    os.replace(_partial(self.directory / name), self.directory / name)
        self._shards, self._counts, self._state_files, self.complete = shards, counts, state_files, complete
        self._drop_leftovers()

    def _write_manifest(
        self,
        shards: Sequence[Mapping[str, Any]],
        counts: Sequence[int],
        state_files: Mapping[str, Any] | None,
        complete: bool,
        summary: Mapping[str, Any] | None,
    ) -> None:
        manifest = {
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
        write_bytes(self.directory / CLASSES, "".join(f"{name}\n" for name in self.folders).encode())
        write_json(self.directory / MANIFEST, manifest)

    def _write_shard(self, index: int, first: int, images: Tensor, labels: Tensor, logits: Tensor) -> dict[str, Any]:
        tar_path = self.directory / f"train-{index:05d}.tar"
        with (
            _synced(_partial(tar_path)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for offset, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
                content = _png(image)
                # A fresh TarInfo has mtime, uid and gid 0 and no names: the same images give the same bytes.
                member = tarfile.TarInfo(f"{self.folders[label]}/{first + offset:08d}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tensor_path = tar_path.with_suffix(".safetensors")
        with _synced(_partial(tensor_path)) as file:
            file.write(safetensors.torch.save({"logits": logits.contiguous(), "labels": labels.contiguous()}))
        files = {path.name: _facts(_partial(path)) for path in (tar_path, tensor_path)}
        return {"images": len(labels), "first": first, "files": files}

    def _write_state(self, position: int, state: _Snapshot, rest: Sequence[Tensor]) -> dict[str, Any]:
        content = dict(zip(state.names, state.tensors.wait(), strict=True))
        content |= {name: tensor for name, tensor in zip(_PENDING, rest, strict=True) if len(tensor)}
        folder = self.directory / "state"
        folder.mkdir(exist_ok=True)
        # Numbered by position: the manifest's replacement decides, in one step, which one counts. What it names now is
        # never written over, also where no image was added since (batches that are thrown away change the state too).
        while f"state/{position:08d}.json" in (self._state_files or {}):
            position += _ANOTHER
        paths = (folder / f"{position:08d}.safetensors", folder / f"{position:08d}.json")
        write_bytes(paths[0], safetensors.torch.save(content))
        write_json(paths[1], state.values)
        return {f"state/{path.name}": _facts(path) for path in paths}

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


def _facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that is on the disk when the block ends."""
    path.unlink(missing_ok=True)  # what a killed run left; a link would be written through
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _behind(copies: Sequence[HostCopy], count: int) -> list[HostCopy]:
    """What comes after the first ``count`` images: a view of the batch that is cut, and the batches behind it."""
    left = []
    for copy in copies:
        skipped = min(count, len(copy))
        count -= skipped
        if skipped < len(copy):
            left.append(copy.behind(skipped))
    return left


def _joined(copies: list[HostCopy]) -> list[Tensor]:
    """Images, labels and logits, each in one piece; ``copies`` is emptied, so that they are not held twice for long."""
    if not copies:
        return [torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0)]
    # With NumPy, in this one thread: torch would start another team of threads beside the computation's.
    columns = zip(*(copy.wait() for copy in copies), strict=True)
    joined = [torch.from_numpy(np.concatenate([tensor.numpy() for tensor in column])) for column in columns]
    copies.clear()
    return joined


def _is_leftover(name: str) -> bool:
    """Whether an interrupted shard leaves such a file, or timm, whose cache is stale once the set grows."""
    return any(pattern.fullmatch(name) for pattern in (_PARTIAL, STATE_FILE, _TIMM_CACHE))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
