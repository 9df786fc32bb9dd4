"""How a set lies on the disk: names, the manifest, and the checks of both."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdfkd_cli.data.files import IMAGE_MODES, first_line
from fastdfkd_cli.errors import UnavailableError, UsageError, brief
from fastdfkd_cli.output import differences, file_damage, named, plain_json

FORMAT = "synthetic-images"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CLASSES = "classes.txt"
SHARD_FILE = re.compile(r"train-\d{5,}\.(tar|safetensors)")
PART_FOLDER = re.compile(r"part-(?P<number>\d{5,})-of-(?P<count>\d{5,})")
STATE_FILE = re.compile(r"state/(\d{5,}\.(safetensors|json)|\.\d{5,}\.(safetensors|json)\.partial-[0-9a-f]{8})")


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


def set_identity(
    *,
    class_names: Sequence[str] | None,
    num_classes: int,
    input_size: Sequence[int],
    shard_size: int,
    header: Mapping[str, Any],
) -> dict[str, Any]:
    """What a manifest says of a set that never changes: whoever goes on with the set must bring the same."""
    about = {
        "classes": class_folders(num_classes, class_names),
        "class_names": class_names,
        "input_size": input_size,
        "shard_size": shard_size,
        "header": header,
    }
    return dict(plain_json(about))


def require_identity(folder: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any], *, was: str) -> None:
    """Refuse to go on with a set under other settings.

    Args:
        expected: what :func:`set_identity` gives for the present ones.
        was: what those of the manifest were used for: "begun", "made".

    Raises:
        UsageError: the first few differences are named.
    """
    found = differences({key: manifest.get(key) for key in expected}, expected)
    if found:
        shown = named([part.removeprefix("header.") for part in found], most=4, separator="; ")
        raise UsageError(f"{folder} was {was} with other settings: {shown}. Give the same, or another --output.")


def is_dataset(folder: Path) -> bool:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
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
    except (OSError, ValueError, RecursionError) as error:
        raise UnavailableError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UnavailableError(f"{path} was not written by fastdfkd synthesize.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UnavailableError(
            f"{path} has format version {brief(manifest.get('format_version'))}; this fastdfkd reads {FORMAT_VERSION}."
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
    if not listing(size, 3) or not all(whole(side) and side for side in size or []) or size[0] not in IMAGE_MODES:  # type: ignore[index]
        return "input_size is not [C, H, W]"
    if not listing(manifest.get("classes"), classes) or not listing(manifest.get("counts"), classes):
        return "classes or counts do not fit num_classes"
    if not all(isinstance(name, str) for name in manifest["classes"]) or not all(map(whole, manifest["counts"])):
        return "classes or counts hold something else"
    if not listing(manifest.get("shards")):
        return "shards is not a list"
    for shard in manifest["shards"]:
        if not isinstance(shard, dict) or not whole(shard.get("images")) or not files(shard.get("files"), SHARD_FILE):
            return "a shard lacks its images or files"
    if sum(shard["images"] for shard in manifest["shards"]) != sum(manifest["counts"]):
        return "shards and counts do not add up"
    if "state" not in manifest or (manifest["state"] is not None and not files(manifest["state"], STATE_FILE)):
        return "state names something else"
    if not isinstance(manifest.get("header"), dict) or not isinstance(manifest.get("complete"), bool):
        return "header or complete is missing"
    return None


def parts_in(directory: str | Path) -> dict[int, set[int]]:
    """Which parts have a folder in ``directory``: their numbers, by the count that they are of."""
    found: dict[int, set[int]] = {}
    for name in os.listdir(directory) if Path(directory).is_dir() else ():
        if match := PART_FOLDER.fullmatch(name):
            found.setdefault(int(match["count"]), set()).add(int(match["number"]))
    return found


def check_file(path: Path, facts: Mapping[str, Any], *, content: bool = True) -> None:
    """Compare a file's size, and by ``content`` its SHA-256, with what the manifest says.

    Raises:
        UnavailableError: it is missing, not readable or another one.
    """
    damage = file_damage(path, size=facts["bytes"], sha256=facts["sha256"], by="the manifest", content=content)
    if damage:
        raise UnavailableError(f"{damage}. Copy or make it again.")
