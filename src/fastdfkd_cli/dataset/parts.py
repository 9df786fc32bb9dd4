"""One set made in parts, by processes or jobs that send one another nothing, and put together by whoever ends last.

::

    DIR/
      part-00001-of-00004/      a set of its own, in the layout of the package, with the first quarter of the images
      part-00002-of-00004/      ... and with the second, numbered from where the first one ends
      ...

As soon as all parts are complete their shards are renamed into DIR, which then is a set like any other, and the parts
are gone. Nothing is copied. Until DIR has its manifest, those of the parts say what there is, also where a kill left
some shards under their new names; :func:`unite` goes on from there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdfkd_cli import __version__
from fastdfkd_cli.dataset.grids import GRID_FILE, write_grids
from fastdfkd_cli.dataset.layout import (
    CLASSES,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PART_FOLDER,
    SHARD_FILE,
    check_file,
    is_dataset,
    load_manifest,
    parts_in,
    require_identity,
    set_identity,
)
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.output import (
    LITTER,
    OWNER_KEY,
    files_below,
    lock_folder,
    named,
    strange_files,
    sync,
    unlock_folder,
    write_bytes,
    write_json,
    writing,
)
from fastdfkd_cli.processes import Part

#: What stands in DIR where a kill came between the first renaming and the manifest.
_BEGUN = re.compile(
    rf"{SHARD_FILE.pattern}|classes\.txt|grids|{GRID_FILE.pattern}|\.(classes\.txt|manifest\.json)\.partial-.{{8}}"
)
#: What a header may say differently in each part of one set: which it is, and what the machine's memory decided.
_OWN = ("part", "micro_batch")


def part_folder(directory: str | Path, part: Part) -> Path:
    return Path(directory) / f"part-{part.number:05d}-of-{part.count:05d}"


def part_header(part: Part, total: int) -> dict[str, Any]:
    """What the header of a part says of it; ``total``: the images of all parts."""
    return {"part": {"number": part.number, "count": part.count, "images_of_all": total}}


def parts_begun(directory: str | Path) -> int | None:
    """In how many parts the set in ``directory`` was begun; None if there is none, or it is in one piece."""
    if found := parts_in(directory):
        return max(found)
    if not is_dataset(Path(directory)):
        return None
    parts = load_manifest(directory)["header"].get("parts")
    count = parts.get("count") if isinstance(parts, dict) else None
    return count if type(count) is int and count > 0 else None


def check_place(directory: str | Path, count: int, numbers: Sequence[int], *, resume: bool) -> None:
    """Refuse a folder in which parts ``numbers`` of ``count`` cannot be made; nothing is touched.

    Raises:
        UsageError: it is a file, holds parts of another count, or something else; without ``resume``, also one of the
            parts.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder} is a file: name a folder.")
    if others := sorted(parts_in(folder).keys() - {count}):
        raise UsageError(
            f"--output {folder} holds a set that is made in {others[0]} parts, not in {count}: go on with those, or "
            "choose another folder."
        )
    beside = [
        name
        for name in files_below(folder)
        if not PART_FOLDER.fullmatch(name.split("/", 1)[0]) and name.rsplit("/", 1)[-1] not in LITTER
    ]
    if resume and (is_dataset(folder) or all(_BEGUN.fullmatch(name) for name in beside)):
        return
    if is_dataset(folder):
        raise UsageError(
            f"--output {folder} holds a set, which parts do not replace (to go on with its own parts: --resume): "
            "choose another folder, or remove it."
        )
    if beside:
        raise UsageError(f"--output {folder} is not empty ({named(beside)}): choose another folder.")
    begun = sorted(parts_in(folder).get(count, set()).intersection(numbers))
    if begun and not resume:
        raise UsageError(
            f"--output {folder} is not empty: part {Part(begun[0], count)} is there (--resume goes on with it). Choose "
            "another folder."
        )


def unfinished(directory: str | Path, count: int) -> list[int]:
    """The numbers of the parts that are not complete yet."""
    return [number for number in range(1, count + 1) if _complete(part_folder(directory, Part(number, count))) is None]


def unite(
    directory: str | Path,
    count: int,
    total: int,
    *,
    class_names: Sequence[str] | None,
    num_classes: int,
    input_size: tuple[int, int, int],
    shard_size: int,
    header: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Put the parts together, if all of them are complete. Another process that does so is waited for.

    Args:
        directory: where the parts' folders stand.
        count, total: parts, and images of all of them.
        class_names, num_classes, input_size, shard_size, header: as a part's writer has them.

    Returns:
        The manifest of the whole set; None if a part is not complete yet.

    Raises:
        UsageError: a part, or the set that is there already, was made with other settings.
        UnavailableError: a manifest or a shard is damaged.
        FastDFKDError: a file cannot be renamed or written.
    """
    folder = Path(directory)
    shared = {key: value for key, value in header.items() if key not in _OWN}
    expected = set_identity(
        class_names=class_names,
        num_classes=num_classes,
        input_size=input_size,
        shard_size=shard_size,
        header={**shared, "parts": {"count": count, "images": total}},
    )
    if not folder.is_dir():
        return None
    lock = lock_folder(folder, wait=True)
    try:
        if is_dataset(folder):
            manifest = load_manifest(folder)
            require_identity(folder, manifest, expected, was="made")
        else:
            parts = [_complete(part_folder(folder, Part(number, count))) for number in range(1, count + 1)]
            for number, part in enumerate(parts, start=1):
                if part is not None:
                    _check_part(folder, part, Part(number, count), expected)
            whole = [part for part in parts if part is not None]
            if len(whole) < count:
                return None
            manifest = _put_together(folder, whole, expected)
        for number in range(1, count + 1):
            _drop(part_folder(folder, Part(number, count)))
        return manifest
    finally:
        if lock is not None:
            unlock_folder(lock)


def _complete(folder: Path) -> dict[str, Any] | None:
    """The manifest of a part that is complete, else None."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = load_manifest(folder)
    return manifest if manifest["complete"] else None


def _check_part(folder: Path, manifest: Mapping[str, Any], part: Part, expected: Mapping[str, Any]) -> None:
    """Refuse a part that does not belong to the set."""
    home, parts = part_folder(folder, part), expected["header"]["parts"]
    about = {key: value for key, value in manifest["header"].items() if key not in _OWN}
    its_own = part_header(part, parts["images"])["part"]
    same = {**manifest, "header": {**about, "parts": parts, "part": manifest["header"].get("part")}}
    require_identity(home, same, {**expected, "header": {**expected["header"], "part": its_own}}, was="made")
    if (images := sum(manifest["counts"])) != len(part.range(parts["images"])):
        raise UnavailableError(f"{home / MANIFEST} is damaged: it calls itself complete with {images} images.")


def _put_together(folder: Path, parts: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the shards of all parts into ``folder``, and write what says that they are one set."""
    shards: list[dict[str, Any]] = []
    moves: list[tuple[Path, Path, Mapping[str, Any]]] = []
    for number, part in enumerate(parts, start=1):
        home = part_folder(folder, Part(number, len(parts)))
        for shard in part["shards"]:
            files = {}
            for name, facts in shard["files"].items():
                moved = f"train-{len(shards):05d}{Path(name).suffix}"
                files[moved] = facts
                moves.append((home / name, folder / moved, facts))
            shards.append({**shard, "files": files})
    for source, goal, facts in moves:  # all is there, before anything is touched
        check_file(source if source.exists() else goal, facts, content=False)
    counts = [sum(each) for each in zip(*(part["counts"] for part in parts), strict=True)]
    manifest = {
        OWNER_KEY: __version__,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": True,
        "num_images": sum(counts),
        "num_classes": parts[0]["num_classes"],
        "counts": counts,
        **expected,
        "summary": {"fastdfkd": __version__, "parts": [part.get("summary") for part in parts]},
        "shards": shards,
        "state": None,
    }
    with writing(folder):
        for source, goal, _ in moves:
            if source.exists():
                os.replace(source, goal)
        sync(folder)
        write_grids(folder, shards, expected["classes"], counts, tuple(expected["input_size"]))
        write_bytes(folder / CLASSES, "".join(f"{name}\n" for name in expected["classes"]).encode())
        write_json(folder / MANIFEST, manifest)
    return manifest


def _drop(folder: Path) -> None:
    """Remove what is left of a part whose shards have moved, unless somebody put something else there."""
    if folder.is_dir() and not folder.is_symlink() and not strange_files(folder):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


__all__ = ["check_place", "part_folder", "part_header", "parts_begun", "unfinished", "unite"]
