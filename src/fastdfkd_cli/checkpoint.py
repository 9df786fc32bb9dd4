"""What a killed run needs to go on: tensors as safetensors, everything else as JSON, and never half of either.

::

    DIR/
      checkpoint-00000007.json              values, settings, size and SHA-256 of each file; its first line: of itself
      checkpoint-00000007.safetensors       what is another with every checkpoint
      segment-00000006-NAME.safetensors     what never changes: written with checkpoint 6, named by those that hold it

A checkpoint is there once its JSON is, which is renamed into place when everything that it names is on the disk. The
one before is kept beside it, with all its files: a newer one can be lost to a bad disk or a copy cut short. No name is
ever used twice, so that nothing whole is written over.

A folder may come from elsewhere: whatever stands in it is read as data, names that lead out of it are not followed,
and what is not as it should be is told in one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdfkd_cli import __version__
from fastdfkd_cli.background import Background, HostCopy
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.output import (
    LITTER,
    OWNER_KEY,
    differences,
    disk_error,
    file_damage,
    lock_folder,
    named,
    nearest_existing,
    one_line,
    plain_json,
    replacing,
    sync,
    unlock_folder,
)

FORMAT = "checkpoint"
FORMAT_VERSION = 1
#: What a segment may be called; it becomes part of a file's name.
SEGMENT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")

_NUMBER = "([0-9]{8}|[1-9][0-9]{8,17})"
_JSON = re.compile(rf"checkpoint-{_NUMBER}\.json")
_TENSORS = re.compile(rf"checkpoint-{_NUMBER}\.safetensors")
_SEGMENT = re.compile(rf"segment-{_NUMBER}-({SEGMENT_NAME.pattern})\.safetensors")
_PARTIAL = re.compile(rf"\.(?:{_JSON.pattern}|{_TENSORS.pattern}|{_SEGMENT.pattern})\.partial-[0-9a-f]{{8}}")
#: The first line of a checkpoint's JSON: checksum and length of the lines behind it.
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "bytes": ([0-9]{1,9}),\n')
_LONGEST_HEAD = 98
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: No JSON of ours comes near; more is not read.
_MOST_JSON_BYTES = 16 * 2**20
#: Written and hashed at a time: what the processor's cache holds.
_CHUNK = 2**20
#: How safetensors calls them.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
#: What safetensors and torch raise for a header that does not make sense.
_NOT_TENSORS = (SafetensorError, OSError, ValueError, TypeError, LookupError, OverflowError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file of a checkpoint, as its JSON has it."""

    name: str
    size: int
    sha256: str

    def facts(self) -> dict[str, Any]:
        return {"file": self.name, "bytes": self.size, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What a checkpoint's JSON says."""

    number: int
    written: datetime
    identity: Mapping[str, Any]
    values: Mapping[str, Any]
    tensors: _File
    segments: Mapping[str, _File]

    @property
    def name(self) -> str:
        return f"checkpoint-{self.number:08d}.json"

    @property
    def files(self) -> list[_File]:
        return [self.tensors, *self.segments.values()]

    def content(self) -> bytes:
        """The JSON file: a first line that tells whether the others are whole, and is part of the same object."""
        text = json.dumps(
            {
                OWNER_KEY: __version__,
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "number": self.number,
                "written": self.written.isoformat(),
                "identity": self.identity,
                "values": self.values,
                "tensors": self.tensors.facts(),
                "segments": {name: file.facts() for name, file in self.segments.items()},
            },
            indent=1,
            allow_nan=False,
        )
        rest = text.removeprefix("{\n").encode() + b"\n"
        return f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", "bytes": {len(rest)},\n'.encode() + rest


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a checkpoint cost: bytes that were new, and seconds from the call to the end of its thread's work."""

    number: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that is whole.

    Attributes:
        number: counted from 1.
        written: when, in UTC.
        tensors: as they were given, on the CPU and contiguous.
        values: as JSON gives them back: tuples as lists, keys as text.
    """

    folder: Path
    number: int
    written: datetime
    tensors: dict[str, Tensor] = field(repr=False)
    values: dict[str, Any] = field(repr=False)
    _segments: Mapping[str, _File] = field(repr=False)

    @property
    def segments(self) -> tuple[str, ...]:
        """The names for :meth:`segment`."""
        return tuple(self._segments)

    def segment(self, name: str) -> dict[str, Tensor]:
        """Read a segment, onto the CPU. To be called before the next checkpoint is saved.

        Raises:
            UnavailableError: the checkpoint has none of this name, or its file is gone or unreadable by now.
        """
        if name not in self._segments:
            raise UnavailableError(f"{self.folder}: checkpoint {self.number} holds no {one_line(name)[:80]!r}.")
        return _read_tensors(self.folder / self._segments[name].name)


class Checkpoints:
    """A run's checkpoints, in a folder of their own that nothing else writes to.

    Tensors are copied when :meth:`save` is called and written in a thread, one checkpoint at a time. What cannot be
    written is raised by the next :meth:`save` or :meth:`wait`, or on leaving, and by every one after it; the
    checkpoints before stay valid.

    As a context manager it waits on leaving for what is being written, and gives the folder up; the checkpoints stay
    unless :meth:`finish` was called.

    Attributes:
        folder: where they stand; not there before the first :meth:`save`.
        latest: the checkpoint to go on from; None for a new run, and once the first is saved.
        seconds: how long the caller was held up by saving.
        last: what the last whole checkpoint of this run cost; None before the first.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Use :meth:`open`."""
        self.folder = folder
        self.latest: Loaded | None = None
        self.seconds = 0.0
        self.last: Written | None = None
        self._identity: dict[str, Any] = plain_json(identity)
        self._say = say
        self._background = Background()
        # While it has a job, the folder, `_kept` and `last` are the thread's.
        self._kept: list[_Record] = []  # the whole ones, oldest first: two at most
        self._next = 1
        self._lock: int | None = None
        self._made: list[Path] = []
        self._claimed = self._closed = False

    @classmethod
    def open(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        say: Callable[[str], None],
        begin_anew: bool = False,
    ) -> Checkpoints:
        """Look into ``folder``, keep others out of it, and find what there is to go on from. Nothing is made yet.

        Args:
            folder: missing, empty, or with checkpoints of an earlier run and nothing else. A link is followed.
            identity: everything that decides what the run computes, ready for JSON. It is only gone on with under the
                same.
            resume: go on from the newest checkpoint that is whole; without any, begin.
            say: is told of every checkpoint that is passed over, and why.
            begin_anew: without ``resume``: remove the checkpoints that are there.

        Raises:
            UsageError: the folder is in use, not writable, or holds something else; there are checkpoints, but neither
                ``resume`` nor ``begin_anew``; or they are another run's (the differences are named).
            UnavailableError: there are checkpoints, and none of them is whole; it says what is wrong with each.
        """
        path = Path(folder)
        try:
            self = cls(path.resolve() if path.is_symlink() else path, identity, say)
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
            raise UsageError(f"{path} cannot hold checkpoints ({one_line(error)}).") from error
        try:
            self._start(resume, begin_anew)
        except OSError as error:
            self._release()
            raise UsageError(f"{self.folder} cannot hold checkpoints ({error.strerror}).") from error
        except BaseException:
            self._release()
            raise
        return self

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            failure = self._background.failure()
        finally:  # also when a second Ctrl-C cuts the waiting short: then the lock goes with the thread's last write
            self._release()
        if error is None and failure is not None:
            raise failure

    @property
    def last_cost(self) -> float:
        """Seconds that the last whole checkpoint took, the thread's work included; 0 before the first."""
        return 0.0 if self.last is None else self.last.seconds

    def save(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        segments: Mapping[str, Mapping[str, Tensor] | None],
        *,
        wait: bool = False,
    ) -> None:
        """Copy everything that is given, and have it written as the next checkpoint.

        Waits for the checkpoint before, if that is still being written.

        Args:
            tensors: of any shape, memory format and type that safetensors has, on the CPU or one CUDA device.
            values: what JSON can hold, without NaN and infinities.
            segments: groups of tensors that never change (names as :data:`SEGMENT_NAME` has them), all that belong to
                this checkpoint; None for one that stands in a checkpoint already, this run's or the one that it goes
                on from. Those that no kept checkpoint names are deleted.
            wait: return when it is on the disk.

        Raises:
            ValueError: a value is not finite, or a name is none.
            UsageError: another run has begun in the folder since.
            FastDFKDError: this checkpoint (by ``wait``) or one before could not be written.
        """
        began = time.perf_counter()
        if self._closed:
            raise RuntimeError("the folder of checkpoints was given up")
        plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
        try:
            self._background.wait()
            asked = time.perf_counter()
            stored = {name: file for record in self._kept for name, file in record.segments.items()}
            new = {name: group for name, group in segments.items() if group is not None}
            _check_names(segments, stored.keys() | new.keys())
            # The checkpoint's own file first, then one a new segment: name of the file, names of its tensors.
            groups = {None: tensors} | dict[str | None, Mapping[str, Tensor]](new)
            copies = HostCopy.of(*(_checked(name, each) for group in groups.values() for name, each in group.items()))
            names = {segment: tuple(group) for segment, group in groups.items()}
            held = {name: stored[name] for name in segments if name not in new}
            self._claim()
            number, self._next = self._next, self._next + 1
            self.latest = None
            self._background.start(partial(self._write, number, plain, names, copies, held, asked))
            if wait:
                self._background.wait()
        finally:
            self.seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Wait until everything that was saved is on the disk.

        Raises:
            FastDFKDError: it could not be written.
        """
        began = time.perf_counter()
        try:
            self._background.wait()
        finally:
            self.seconds += time.perf_counter() - began

    def finish(self) -> None:
        """The run is complete: remove its checkpoints, and the folder. What cannot be removed is only remarked on."""
        self._background.failure()  # of a checkpoint that nobody needs any more
        self._background = Background()
        try:
            if self._claimed:
                self._remove(self._entries()[0])
                for name in LITTER:
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            self._say(f"the run is complete, but {self.folder} could not be removed ({error.strerror}): do it yourself")
        finally:
            self._release()

    # The folder

    def _start(self, resume: bool, begin_anew: bool) -> None:
        nearest = nearest_existing(self.folder)
        if not nearest.is_dir():
            raise UsageError(f"{self.folder} cannot hold checkpoints: {nearest} is a file.")
        if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"{self.folder} cannot hold checkpoints: {nearest} is not writable.")
        if nearest != self.folder:
            return
        self._take()
        own, strange = self._entries()
        if strange:
            raise UsageError(
                f"{self.folder} holds files that are no checkpoints ({named([one_line(name) for name in strange])}): "
                "move them away, or choose another folder."
            )
        numbers = sorted((int(match[1]) for name in own if (match := _JSON.fullmatch(name))), reverse=True)
        self._next = 1 + max((_number(name) for name in own), default=0)
        if resume and numbers:
            self._choose(numbers, own)
        elif numbers and not begin_anew:
            raise UsageError(
                f"{self.folder} holds the checkpoints of a run that did not end: give --resume auto to go on with it, "
                "or --overwrite to begin anew."
            )
        else:
            self._remove(own)

    def _take(self) -> None:
        """Lock the folder that is there."""
        self._lock = lock_folder(self.folder)
        if self._lock is not None and os.fstat(self._lock).st_ino != self.folder.stat().st_ino:
            raise UsageError(f"Another run has just ended in {self.folder}: try again.")
        self._claimed = True

    def _claim(self) -> None:
        """Make the folder, if it was not there to be locked, and lock it."""
        if self._claimed:
            return
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
            for folder in made:
                sync(folder.parent)
            if any(self._entries()):
                self._claimed = False
                raise UsageError(f"Another run has begun in {self.folder} since this one did: choose another --output.")
        except OSError as error:
            raise disk_error(self.folder, error) from error
        finally:
            self._made = made

    def _release(self) -> None:
        """Let other runs into the folder again, once what was saved is written."""
        self._closed = True
        lock, self._lock = self._lock, None
        made, self._made = self._made, []

        def leave() -> None:
            for folder in made:
                with contextlib.suppress(OSError):  # it holds checkpoints, or is gone
                    folder.rmdir()
            if lock is not None:
                unlock_folder(lock)

        self._background.afterwards(leave)

    def _entries(self) -> tuple[list[str], list[str]]:
        """The files that this module wrote, and those that it did not."""
        own, strange = [], []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                is_file = entry.is_file(follow_symlinks=False)
                if is_file and any(each.fullmatch(entry.name) for each in (_JSON, _TENSORS, _SEGMENT, _PARTIAL)):
                    own.append(entry.name)
                elif not is_file or entry.name not in LITTER:
                    strange.append(entry.name)
        return own, sorted(strange)

    def _remove(self, names: Sequence[str]) -> None:
        """Remove files; a checkpoint's JSON before what it names."""
        for name in sorted(names, key=_rank):
            (self.folder / name).unlink(missing_ok=True)

    # Reading

    def _choose(self, numbers: Sequence[int], own: Sequence[str]) -> None:
        """Find the newest checkpoint that is whole, and remove what a killed write left."""
        found = [self._read(number) for number in numbers]
        damages: list[str] = []
        for record in found:
            if isinstance(record, _Record):
                self._require_same(record)
                loaded = self._load(record)
                if isinstance(loaded, Loaded):
                    self.latest, self._kept = loaded, [record]
                    break
                damages.append(loaded)
            else:
                damages.append(record)
        if self.latest is None:
            raise UnavailableError(
                f"No checkpoint in {self.folder} is whole: {'; '.join(damages)}. Copy the folder again from where it "
                "came, or give --overwrite to begin anew."
            )
        for damage in damages:
            self._say(f"{damage}; going on from checkpoint {self.latest.number}, of {self.latest.written}")
        # What is damaged stays until the next checkpoint is whole; what belongs to a JSON that cannot be read, too.
        known = {name for name in own if _JSON.fullmatch(name)}
        if all(isinstance(record, _Record) for record in found):
            known |= {file.name for record in found if isinstance(record, _Record) for file in record.files}
        else:
            known |= {name for name in own if not _PARTIAL.fullmatch(name)}
        self._remove([name for name in own if name not in known])

    def _require_same(self, record: _Record) -> None:
        try:
            found = differences(record.identity, self._identity)
        except RecursionError:
            found = ["settings nested without end"]
        if found:
            shown = named([one_line(each) for each in found], most=4, separator="; ")
            raise UsageError(
                f"{self.folder} holds the checkpoints of a run under other settings: {shown}. Give the same to go on "
                "with it, or --overwrite to begin anew."
            )

    def _read(self, number: int) -> _Record | str:
        """Read a checkpoint's JSON; return what is wrong with it as a sentence without its full stop."""
        name = f"checkpoint-{number:08d}.json"
        path = self.folder / name
        try:
            if path.stat().st_size > _MOST_JSON_BYTES:
                return f"{path} is not what was written: it is too large"
            content = path.read_bytes()
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        head = _HEAD.match(content)
        if head is None:
            if len(content) <= _LONGEST_HEAD:
                return f"{path} is truncated: {len(content):,} bytes are left"
            return f"{path} is damaged: its first line is not as it was written"
        rest, size = content[head.end() :], int(head[2])
        if hashlib.sha256(rest).hexdigest() != head[1].decode():
            if len(rest) < size:
                return f"{path} is truncated: {len(content):,} of {head.end() + size:,} bytes"
            return f"{path} is damaged: its bytes do not have the SHA-256 that its first line states"
        try:
            stated = json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            return f"{path} is damaged: it is not JSON ({one_line(error)[:80]})"
        version = stated.get("format_version")
        if stated.get("format") == FORMAT and type(version) is int and version > FORMAT_VERSION:
            raise UsageError(
                f"{path} was written by a later fastdfkd ({one_line(stated.get(OWNER_KEY))[:20]}): go on with that, or "
                "give --overwrite to begin anew."
            )
        if len(rest) != size or version != FORMAT_VERSION or stated.get("number") != number:
            return f"{path} is damaged: its length, format or number is another"
        record = _record(stated)
        return record if isinstance(record, _Record) else f"{path} is damaged: {record}"

    def _load(self, record: _Record) -> Loaded | str:
        """Check all files of a checkpoint, and read its tensors; or return what is wrong, as above."""
        for file in record.files:
            path = self.folder / file.name
            damage = file_damage(path, size=file.size, sha256=file.sha256, by=record.name) or _header_damage(path)
            if damage:
                return damage
        try:
            tensors = _read_tensors(self.folder / record.tensors.name)
        except UnavailableError as error:
            return str(error).removesuffix(".")
        return Loaded(
            folder=self.folder,
            number=record.number,
            written=record.written,
            tensors=tensors,
            values=dict(record.values),
            _segments=record.segments,
        )

    # Writing, in the thread

    def _write(
        self,
        number: int,
        values: Mapping[str, Any],
        names: Mapping[str | None, Sequence[str]],
        copies: HostCopy,
        held: Mapping[str, _File],
        asked: float,
    ) -> None:
        """Write a checkpoint, and remove the one before the last.

        Args:
            names: by new segment (None is the checkpoint's own file), those of its tensors; the copies in this order.
            held: the segments that stand already.
            asked: when.
        """
        made: dict[str | None, _File] = {}
        try:
            for file in held.values():
                damage = file_damage(
                    self.folder / file.name,
                    size=file.size,
                    sha256=file.sha256,
                    by="the checkpoint before",
                    content=False,
                )
                if damage:
                    raise FastDFKDError(f"{damage}. Nothing but the run may change {self.folder}.")
            tensors = iter(copies.wait())
            for segment, each in names.items():
                name = f"checkpoint-{number:08d}" if segment is None else f"segment-{number:08d}-{segment}"
                path = self.folder / f"{name}.safetensors"
                made[segment] = _write_tensors(path, {key: next(tensors) for key in each})
            own, new = made[None], {name: file for name, file in made.items() if name is not None}
            record = _Record(
                number=number,
                written=datetime.now(UTC).replace(microsecond=0),
                identity=self._identity,
                values=values,
                tensors=own,
                segments={**held, **new},
            )
            sync(self.folder)
            content = record.content()
            if len(content) > _MOST_JSON_BYTES:
                raise ValueError(f"{len(content):,} bytes of values and identity, which nobody would read back")
            with replacing(self.folder / record.name) as stream:
                stream.write(content)
        except BaseException as error:
            for file in made.values():
                with contextlib.suppress(OSError):
                    (self.folder / file.name).unlink()
            if isinstance(error, OSError):
                raise self._disk_error(error, number) from error
            raise
        with contextlib.suppress(OSError):  # it is whole; whether it outlives a power cut is the system's affair
            sync(self.folder)
        self._kept = [*self._kept[-1:], record]
        with contextlib.suppress(OSError):  # the next one tries again
            kept = {name for each in self._kept for name in (each.name, *(file.name for file in each.files))}
            self._remove([name for name in self._entries()[0] if name not in kept])
        self.last = Written(
            number=number,
            bytes=len(content) + sum(file.size for file in made.values()),
            seconds=time.perf_counter() - asked,
        )

    def _disk_error(self, error: OSError, number: int) -> FastDFKDError:
        if not self._kept:
            return disk_error(self.folder, error)
        last = self._kept[-1].number
        return disk_error(
            self.folder, error, room=f"make room, then go on from the checkpoint before ({last}) with --resume auto"
        )


def _check_names(segments: Iterable[str], known: Container[str]) -> None:
    unknown = [name for name in segments if name not in known]
    if unknown:
        raise ValueError(f"segments of no checkpoint: {named(unknown)}")
    for name in segments:
        if not SEGMENT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a segment")


def _checked(name: str, tensor: Tensor) -> Tensor:
    """Refuse what safetensors cannot hold."""
    if name == "__metadata__" or tensor.dtype not in _DTYPES:
        raise ValueError(f"safetensors cannot hold {name!r} of {tensor.dtype}")
    return tensor


def _number(name: str) -> int:
    """The number in one of our files' names."""
    match = re.search(_NUMBER, name)
    assert match is not None
    return int(match[1])


def _rank(name: str) -> tuple[bool, int, str]:
    """The order in which files may be removed, so that no JSON ever names what is gone: JSON first, older first."""
    return not _JSON.fullmatch(name), _number(name), name


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> _File:
    """Write contiguous tensors on the CPU as safetensors.

    safetensors' own function would make the file in memory first, with the interpreter stopped for all the others.
    """
    # The widest types first, so that each tensor stands at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(path) as stream:
        for piece in (memoryview(len(text).to_bytes(8, "little") + text), *(_raw(tensors[name]) for name in ordered)):
            for start in range(0, len(piece), _CHUNK):
                part = piece[start : start + _CHUNK]
                stream.write(part)
                digest.update(part)
    return _File(name=path.name, size=8 + len(text) + end, sha256=digest.hexdigest())


def _raw(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, little-endian as safetensors has them."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        flat = flat.reshape(-1, tensor.element_size())[:, ::-1].copy().reshape(-1)
    return flat.data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory of its own, so that nobody minds when it is removed.

    Raises:
        UnavailableError: it is not there or not such a file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except _NOT_TENSORS as error:
        raise UnavailableError(f"{path} cannot be read ({one_line(error)[:80]}).") from error


def _header_damage(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt", device="cpu"):
            return None
    except _NOT_TENSORS as error:
        return f"{path} is damaged: it is no safetensors file ({one_line(error)[:80]})"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _record(stated: Mapping[str, Any]) -> _Record | str:
    """Check the content of a checkpoint's JSON: every type, and that each name is one of ours; or say what is wrong."""
    number = stated["number"]

    def mapping(value: Any) -> bool:
        return isinstance(value, dict)

    def file(value: Any, pattern: re.Pattern[str], segment: str | None) -> _File | None:
        if not mapping(value) or not isinstance(value.get("file"), str) or not isinstance(value.get("sha256"), str):
            return None
        match = pattern.fullmatch(value["file"])
        if match is None or int(match[1]) > number or (match[2] if segment is not None else None) != segment:
            return None
        size = value.get("bytes")
        if type(size) is not int or not 0 <= size < 2**63 or not _SHA256.fullmatch(value["sha256"]):
            return None
        return _File(name=value["file"], size=size, sha256=value["sha256"])

    if type(number) is not int or not mapping(stated.get("identity")) or not mapping(stated.get("values")):
        return "its settings or values are none"
    try:
        written = datetime.fromisoformat(stated.get("written"))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "its time is none"
    tensors = file(stated.get("tensors"), _TENSORS, None)
    if tensors is None or not mapping(stated.get("segments")):
        return "it names no file of its own"
    segments = {name: file(value, _SEGMENT, name) for name, value in stated["segments"].items()}
    if any(each is None for each in segments.values()):
        return "it names files that are no segments"
    return _Record(
        number=number,
        written=written,
        identity=stated["identity"],
        values=stated["values"],
        tensors=tensors,
        segments={name: each for name, each in segments.items() if each is not None},
    )


__all__ = ["SEGMENT_NAME", "Checkpoints", "Loaded", "Written"]
