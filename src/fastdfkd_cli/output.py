"""Files that are either whole or not there: staged folders, atomic JSON, checksums, text safe to print in Markdown.

A run takes minutes to hours and ends in a folder. :class:`StagedDirectory` lets it write beside that folder and
puts the result in place in one rename, so that nobody ever opens half a student, and a failed or interrupted run
leaves what was there before. It never replaces a folder that this program did not write.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

from fastdfkd_cli.errors import FastDFKDError, UsageError

_fcntl: ModuleType | None
try:
    import fcntl as _fcntl
except ImportError:  # Windows has no such locks; there two runs into one folder are not told apart
    _fcntl = None

#: The key that every JSON file which marks a folder as this program's has at its top (value: the version).
OWNER_KEY = "fastdfkd"
#: The files that mark a folder as this program's when they carry :data:`OWNER_KEY`.
MARKER_FILES = ("report.json", "manifest.json")
#: Everything a run may leave, relative to its folder. ``overwrite`` deletes these and nothing else.
RUN_FILES = (
    "model.safetensors", "config.json", "README.md", "report.json", "metrics.jsonl", "samples.png",
    "manifest.json", "classes.txt", "train-*.tar", "train-*.safetensors", "grids/*.png", "state/*.safetensors",
    "state/*.json", ".train-*.partial", ".*.partial-????????", "*/.*.partial-????????", "_*_tarinfos.pickle",
)  # fmt: skip
#: What file managers drop into any folder they show; it is nobody's work.
LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", ".directory"})

#: Descriptors of the locks that this process holds.
_LOCKS: set[int] = set()

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK = (*_FULL, errno.EROFS, errno.EIO)


def disk_error(path: Path, error: OSError, *, room: str = "make room or choose another --output") -> FastDFKDError:
    """Return the one-line error for a write below ``path`` that the system refused.

    Args:
        room: what to do where it is full.
    """
    reason = error.strerror or str(error)
    hint = ""
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            hint = f" ({shutil.disk_usage(nearest_existing(path)).free / 2**20:,.0f} MiB are free there)"
        hint += f"; {room}"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "; choose an --output that you may write to"
    return FastDFKDError(f"Cannot write {path}: {reason}{hint}.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` of the statements inside, which write ``path``, into a one-line FastDFKDError."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def nearest_existing(path: Path) -> Path:
    """Return ``path`` or its nearest ancestor that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[str]:
    """Return every file, link and empty folder below ``folder``, as sorted POSIX paths relative to it."""
    found = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        found += [(here / name).relative_to(folder).as_posix() for name in files]
        for name in folders:
            inner = here / name
            if inner.is_symlink() or not any(inner.iterdir()):
                found.append(inner.relative_to(folder).as_posix())
    return sorted(found)


def named(files: Sequence[str], *, most: int = 3, separator: str = ", ") -> str:
    """Return ``"a, b, c and 4 more"``."""
    shown = separator.join(files[:most])
    return f"{shown} and {len(files) - most} more" if len(files) > most else shown


def is_own_folder(folder: Path) -> bool:
    """Tell whether a run of this program wrote ``folder``: a report or a manifest in it says so."""
    for name in MARKER_FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and OWNER_KEY in content:
            return True
    return False


def strange_files(folder: Path, *, but: str | None = None) -> list[str]:
    """Return the files below ``folder`` that no run of this program leaves behind, without those in ``but``.

    A link in the place of one of a run's folders is such a file: what is written into it would land elsewhere.
    """
    return [
        name
        for name in files_below(folder)
        if name.rsplit("/", 1)[-1] not in LITTER
        and name.split("/", 1)[0] != but
        and (name not in ("grids", "state") or (folder / name).is_symlink())
        and not any(name.count("/") == known.count("/") and fnmatch.fnmatch(name, known) for known in RUN_FILES)
    ]


def check_replaceable(folder: Path, *, but: str | None = None) -> None:
    """Refuse to replace a non-empty ``folder`` unless a run of this program wrote all of it.

    Args:
        folder: an existing folder.
        but: the name of an entry that does not count (the caller's own work in progress).

    Raises:
        UsageError: the folder is somebody else's, or holds files that no run leaves.
    """
    if not any(entry.name != but for entry in folder.iterdir()):
        return
    if not is_own_folder(folder):
        raise UsageError(
            f"{folder} was not written by fastdfkd (no report.json or manifest.json of its), so --overwrite leaves it "
            "alone: choose another --output, or empty the folder yourself."
        )
    strange = strange_files(folder, but=but)
    if strange:
        raise UsageError(
            f"{folder} also holds files that no fastdfkd run wrote ({named(strange)}), and --overwrite would delete "
            "them: move them away or choose another --output."
        )


class StagedDirectory:
    """Context manager: yields an empty folder to write into, which becomes ``path`` when the block ends well.

    The folder in the making stands beside ``path`` as ``.NAME.partial-XXXXXXXX``. On success its files are synced
    and it is renamed into place; on any exception, Ctrl-C included, it is removed, with the parents it needed.
    A link is followed: the folder it points to is replaced, the link stays. Where ``path`` itself cannot be renamed
    (a mount point, the current directory, a parent that is not writable) the folder in the making stands inside it.

    Args:
        path: the folder to make; its parents are made too.
        overwrite: replace a folder that an earlier run of this program wrote. The old one stays until the new one
            is whole.

    Raises:
        UsageError: when made or entered: ``path`` is a file, is in use, or may not be replaced or written.
        FastDFKDError: on leaving: the disk is full or gone. If something else filled ``path`` in the meantime,
            the finished folder is kept under its temporary name, which the message gives.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self._staging: Path | None = None
        self._made_parents: list[Path] = []
        self.check()

    def check(self) -> None:
        """Raise what entering would raise, without touching anything."""
        target = self._target()
        if target == target.parent:
            raise UsageError(f"--output {self.path} is the root folder: name a folder in it.")
        if target.exists() and not target.is_dir():
            raise UsageError(f"--output {self.path} is a file: name a folder.")
        if target in Path.cwd().parents:
            raise UsageError(f"--output {self.path} contains the current directory: choose another folder.")
        nearest = nearest_existing(target)
        if not nearest.is_dir():
            raise UsageError(f"--output {self.path} cannot be made: {nearest} is a file.")
        if target.is_dir():
            self._check_content(target)
            if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
                raise UsageError(f"--output {self.path} is not writable: choose another folder.")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.path} cannot be made: {nearest} is not writable.")

    def drop_abandoned(self) -> None:
        """Remove folders in the making that killed runs left, and nothing that a run does not write.

        For a caller that knows that no other run is making this one.
        """
        target = self._target()
        for home in (target.parent, target):
            for left in home.glob(f".{glob.escape(target.name)}.partial-????????"):
                if left.is_dir() and not left.is_symlink() and not strange_files(left):
                    shutil.rmtree(left, ignore_errors=True)

    def _target(self) -> Path:
        try:
            return self.path.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, before Python 3.13
            raise UsageError(f"--output {self.path} leads nowhere ({error}): choose another folder.") from error

    def _check_content(self, target: Path) -> None:
        try:
            own = None if self._staging is None else self._staging.name
            empty = not any(entry.name != own for entry in target.iterdir())
            if not empty and not self.overwrite:
                hint = " or give --overwrite" if is_own_folder(target) else ""
                raise UsageError(f"--output {self.path} is not empty: choose another folder{hint}.")
            if not empty:
                check_replaceable(target, but=own)
        except OSError as error:
            raise UsageError(f"--output {self.path} cannot be read: {error.strerror}.") from error

    def __enter__(self) -> Path:
        self.check()
        target = self._target()
        inside = target.is_dir() and (
            os.path.ismount(target) or target == Path.cwd() or not os.access(target.parent, os.W_OK | os.X_OK)
        )
        home = target if inside else target.parent
        staging = home / f".{target.name}.partial-{secrets.token_hex(4)}"
        parent = home
        while not parent.exists():
            self._made_parents.append(parent)
            parent = parent.parent
        try:
            home.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        except OSError as error:
            self._drop_parents()
            raise UsageError(f"--output {self.path} cannot be written: {error.strerror}.") from error
        self._staging = staging
        return staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._staging is not None
        if error is not None:
            self._discard()
            if isinstance(error, OSError) and error.errno in _DISK:
                raise disk_error(self.path, error) from error
            return
        try:
            for name in files_below(self._staging):
                sync(self._staging / name)
            sync(self._staging)
            self._put_in_place(self._staging, self._target())
        except OSError as failure:
            self._discard()
            raise disk_error(self.path, failure) from failure
        except FastDFKDError:
            raise
        except BaseException:
            self._discard()
            raise
        self._staging = None

    def _put_in_place(self, staging: Path, target: Path) -> None:
        if target.exists():
            try:
                if not target.is_dir():
                    raise UsageError(f"{self.path} is a file now")
                self._check_content(target)
            except UsageError as error:
                raise FastDFKDError(
                    f"{self.path} was filled by something else while the run went on; its result is kept in {staging}."
                ) from error
        if staging.parent == target:
            self._swap_inside(staging, target)
        elif target.exists() and any(target.iterdir()):
            old = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
            os.rename(target, old)
            try:
                os.rename(staging, target)
            except BaseException:
                if not target.exists():
                    os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            if target.exists() and os.name == "nt":
                target.rmdir()
            os.rename(staging, target)
        sync(target.parent)

    def _swap_inside(self, staging: Path, target: Path) -> None:
        old = staging / f".replaced-{secrets.token_hex(4)}"
        new = sorted(staging.iterdir(), key=lambda entry: entry.name in MARKER_FILES)  # what marks it comes last
        previous = [entry for entry in target.iterdir() if entry != staging]
        moved: list[tuple[Path, Path]] = []
        try:
            old.mkdir()
            for source, goal in [(e, old / e.name) for e in previous] + [(e, target / e.name) for e in new]:
                os.rename(source, goal)
                moved.append((source, goal))
        except BaseException:
            for source, goal in reversed(moved):
                os.rename(goal, source)
            raise
        shutil.rmtree(staging, ignore_errors=True)

    def _discard(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self._drop_parents()

    def _drop_parents(self) -> None:
        for parent in self._made_parents:
            with contextlib.suppress(OSError):  # somebody else put something there: then it stays
                parent.rmdir()
        self._made_parents = []


def plain_json(value: Any) -> Any:
    """Return ``value`` as strict JSON can hold it: paths as text, tuples as lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path``, whole and on the disk, if the block ends well.

    Until then it stands beside it as ``.NAME.partial-XXXXXXXX``; on any exception it is removed.

    Raises:
        OSError: the disk is full or the place not writable.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``path`` whole or not at all: beside it first, synced, then renamed over it.

    Raises:
        FastDFKDError: the disk is full or the place not writable.
    """
    path = Path(path)
    with writing(path), replacing(path) as file:
        file.write(content)


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented UTF-8 JSON, whole or not at all. Numbers that are not finite become null.

    Letters of every script stay as they are; what a terminal would act on is written as JSON's own escapes.

    Raises:
        FastDFKDError: the disk is full or the place not writable.
        TypeError: ``obj`` holds something JSON cannot.
    """
    text = json.dumps(plain_json(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode("utf-8"))


def user_path(text: str | Path) -> Path:
    """Return a path as a user writes it: ``~`` is their home, and a name like any other where nobody has that one."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_damage(path: Path, *, size: int, sha256: str, by: str, content: bool = True) -> str | None:
    """Return how a file differs from what is said of it, or None: a sentence without its full stop.

    Args:
        size: its bytes.
        sha256: of its content, which is read only by ``content``.
        by: who says so.
    """
    try:
        found = path.stat().st_size
        digest = sha256_file(path) if content and found == size else sha256
    except FileNotFoundError:
        return f"{path} is missing, though {by} names it"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found < size:
        return f"{path} is truncated: {found:,} of {size:,} bytes"
    if found > size:
        return f"{path} is not what was written: {found:,} bytes instead of {size:,}"
    if digest != sha256:
        return f"{path} is damaged: its bytes do not have the SHA-256 that {by} states"
    return None


def lock_folder(folder: Path, *, wait: bool = False) -> int | None:
    """Keep other runs out of an existing folder; the system frees the lock however this process ends.

    Args:
        wait: for a run that holds it.

    Returns:
        For :func:`unlock_folder`; None where the system or its file system knows no locks.

    Raises:
        UsageError: another run holds it.
        OSError: the folder cannot be opened.
    """
    if _fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise UsageError(f"Another run is writing to {folder}: wait for it or choose another.") from error
        return None
    _LOCKS.add(descriptor)
    return descriptor


def unlock_folder(descriptor: int) -> None:
    """Let other runs in again; nothing in a process that only inherited the lock."""
    if descriptor in _LOCKS:
        _LOCKS.remove(descriptor)
        os.close(descriptor)


def _inherit_no_locks() -> None:
    """A forked worker outlives a killed parent by seconds, and would keep the next run out so long."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit_no_locks)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
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


#: What JSON lets stand in a text although a terminal acts on it, or no file can hold it.
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
#: What Markdown acts on; the last two make a link of an address that only stands there.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>!|~&$]|^[#+=-]|(?<=^\d)[.)](?= )|:(?=//)|(?<=[Ww]{3})\.)")


def one_line(text: object) -> str:
    """Return ``text`` with every run of white space and control characters made one space."""
    spaced = "".join(char if char.isprintable() else " " for char in str(text))
    return " ".join(spaced.split())


def safe_text(text: object) -> str:
    """Return ``text`` as one line that Markdown shows as it is: no markup, no HTML, no control characters.

    Names of models, classes and files come from elsewhere; in a model card they must not become a heading, a link
    or a script.
    """
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def safe_code(text: object) -> str:
    """Return ``text`` as one line in a Markdown code span, whatever backticks it holds itself."""
    line = one_line(text)
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{line}{pad}{fence}"


__all__ = [
    "LITTER",
    "MARKER_FILES",
    "OWNER_KEY",
    "RUN_FILES",
    "StagedDirectory",
    "check_replaceable",
    "differences",
    "disk_error",
    "file_damage",
    "files_below",
    "is_own_folder",
    "lock_folder",
    "named",
    "nearest_existing",
    "one_line",
    "plain_json",
    "replacing",
    "safe_code",
    "safe_text",
    "sha256_file",
    "strange_files",
    "sync",
    "user_path",
    "unlock_folder",
    "write_bytes",
    "write_json",
    "writing",
]
