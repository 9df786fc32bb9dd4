"""Where real images come from: a folder, a tar, the built-in digits, or a data set that timm opens by name."""

from __future__ import annotations

import contextlib
import importlib.resources
import importlib.util
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from safetensors import safe_open
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from fastdfkd_cli.data.files import (
    ImageFile,
    first_line,
    images_in_folder,
    images_in_tar,
    open_picture,
    quiet,
    tars_in_folder,
)
from fastdfkd_cli.data.sets import EvaluationData
from fastdfkd_cli.errors import UnavailableError, UsageError, did_you_mean
from fastdfkd_cli.hub import is_offline, refuse_offline

BUILTIN_DIGITS = "builtin/digits"
TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "eval", "evaluation")
_ALL_SPLITS = frozenset((*TRAIN_SPLITS, *VALIDATION_SPLITS, "test", "testing"))
#: What timm opens by name, and the package that each kind of name needs.
_OPTIONAL_PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
#: torchvision's sets that are small enough to be fetched without being asked twice, and those that are not.
_TORCH_FETCHED = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_TORCH_LOCAL = ("imagenet", "places365", "inaturalist")


def open_evaluation_data(
    *, data_dir: str | os.PathLike[str] | None = None, dataset: str | None = None, split: str = "validation"
) -> EvaluationData:
    """Open labelled images.

    Args:
        data_dir: a folder of class folders (or of splits with class folders), a ``.tar`` of class folders, a folder
            of such tars (one that ``fastdfkd synthesize`` wrote, for one), or ``builtin/digits``. With ``dataset``:
            where that set lies.
        dataset: ``builtin/digits``, or a name of timm's: ``torch/cifar10``, ``torch/imagenet``, ``hfds/NAME``,
            ``hfids/NAME``, ``tfds/NAME``, ``wds/NAME``. torchvision's small sets are fetched where no ``data_dir``
            is given.
        split: which part; ``validation`` also finds ``val``, ``valid`` and ``eval``, and the test images of sets that
            only have those.

    Raises:
        UsageError: neither or unknown names, a split that is not there.
        UnavailableError: nothing there, no images, a damaged file, a package that is not installed.
    """
    if dataset is None and data_dir is None:
        raise UsageError("No real images to evaluate on: give --data-dir or --dataset (builtin/digits needs no files).")
    if dataset == BUILTIN_DIGITS or (dataset is None and str(data_dir) == BUILTIN_DIGITS):
        return _open_digits(split)
    if dataset is None:
        return _open_path(Path(str(data_dir)), split)
    return _open_named(dataset, None if data_dir is None else str(data_dir), split)


def open_training_data(
    *, data_dir: str | os.PathLike[str] | None = None, dataset: str | None = None, split: str | None = None
) -> EvaluationData:
    """Open labelled images to train on: whatever :func:`open_evaluation_data` opens, but for ``builtin/digits``.

    Args:
        split: which part; None: the training images, or all of a folder that is not divided.

    Raises:
        As :func:`open_evaluation_data`.
    """
    if dataset is None and data_dir is None:
        raise UsageError("No images to train on: give --data-dir DIR, --dataset NAME or both.")
    if BUILTIN_DIGITS in (dataset, str(data_dir)):
        raise UsageError(f"{BUILTIN_DIGITS} holds only its test images, to be judged on: train on other images.")
    if dataset is None and split is None:
        return _open_path(Path(str(data_dir)), TRAIN_SPLITS[0], whole=True)
    return open_evaluation_data(data_dir=data_dir, dataset=dataset, split=split or TRAIN_SPLITS[0])


def _open_digits(split: str) -> EvaluationData:
    if split not in (*VALIDATION_SPLITS, "test"):
        raise UsageError(f"{BUILTIN_DIGITS} holds only its test images: --split test, not {split!r}.")
    asset = importlib.resources.files("fastdfkd_cli") / "assets" / "digits-test.safetensors"
    with importlib.resources.as_file(asset) as path, safe_open(path, framework="pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
        classes = tuple(json.loads(file.metadata()["classes"]))
    pictures = [(Image.fromarray(image.numpy()), label) for image, label in zip(images[:, 0], labels, strict=True)]
    return EvaluationData(name=BUILTIN_DIGITS, split="test", class_names=classes, source=_DecodedSource(pictures))


@dataclass(frozen=True)
class _FileSource:
    """Image files, or stretches of tars."""

    files: Sequence[ImageFile]
    class_to_index: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> tuple[IO[bytes], int]:
        file = self.files[index]
        return io.BytesIO(file.read()), self.class_to_index[file.label]

    def filename(self, index: int) -> str:
        return self.files[index].name


def _open_path(path: Path, split: str, *, whole: bool = False) -> EvaluationData:
    """Open a folder or a tar; with ``whole``, a folder without splits is taken whole, whatever the split."""
    if not path.exists():
        raise UnavailableError(f"There is no folder or file {path}.")
    found: str | None = None
    listed: dict[str, str] | None = None
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise UsageError(f"{path} is neither a folder nor a .tar (a compressed archive must be unpacked first).")
        files = list(images_in_tar(path))
    elif not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a .tar file.")
    else:
        root, found = _split_folder(path, split, whole=whole)
        shards = tars_in_folder(root)
        listed = _manifest_classes(root / "manifest.json") if shards else None
        # A synthetic set keeps grids of its images beside the shards: they are not of the set.
        files = [] if listed else list(images_in_folder(root))
        if not files and shards:
            if found is None:
                shards, found = _split_shards(path, shards, split)
            files = [file for shard in shards for file in images_in_tar(shard, prefix=shard.stem)]
    if not files:
        raise UnavailableError(f"{path} holds no images ({', '.join(get_img_extensions())}).")
    loose = [file.name for file in files if not file.label]
    if loose:
        raise UnavailableError(
            f"{path}: {len(loose)} of {len(files)} images ({loose[0]}, ...) are in no class folder: "
            "put each under the name of its class."
        )
    present = {file.label for file in files}
    if listed is None or not present <= listed.keys():
        listed = {folder: folder for folder in sorted(present, key=natural_key)}
    files.sort(key=lambda file: natural_key(file.name))
    source = _FileSource(files, {folder: index for index, folder in enumerate(listed)})
    return EvaluationData(name=str(path), split=found, class_names=tuple(listed.values()), source=source)


def _split_names(split: str) -> tuple[str, ...]:
    """The names under which a split may be found, the one asked for first."""
    for synonyms in (TRAIN_SPLITS, VALIDATION_SPLITS):
        if split in synonyms:
            return (split, *(name for name in synonyms if name != split))
    return (split,)


def _split_folder(root: Path, split: str, *, whole: bool) -> tuple[Path, str | None]:
    """Find the split's folder under ``root``; a folder without splits is taken whole."""
    for name in _split_names(split):
        if (root / name).is_dir():
            return root / name, name
    folders = sorted(item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
    if folders and all(name.lower() in _ALL_SPLITS for name in folders):
        raise UsageError(f"{root} has no split {split!r}: it has {', '.join(folders)} (--split {folders[0]}).")
    if not whole and split not in VALIDATION_SPLITS and folders:
        raise UsageError(f"{root} has no folder {split!r}: leave --split out to take all of it.")
    return root, None


def _split_shards(root: Path, shards: list[Path], split: str) -> tuple[list[Path], str | None]:
    """Choose the tars of one split by how their names begin (``train-00000.tar``), where all of them say so."""
    prefixes = {shard: shard.name.replace("_", "-").replace(".", "-").split("-")[0].lower() for shard in shards}
    splits = sorted(set(prefixes.values()))
    if not all(name in _ALL_SPLITS for name in splits):
        return shards, None
    if len(splits) == 1:
        return shards, splits[0]
    for name in _split_names(split):
        if name in splits:
            return [shard for shard in shards if prefixes[shard] == name], name
    raise UsageError(f"{root} has no split {split!r}: its tars are of {', '.join(splits)} (--split {splits[0]}).")


def _manifest_classes(path: Path) -> dict[str, str] | None:
    """Read the classes from a synthetic set's manifest; None where there is none, or somebody else's.

    Returns:
        Folder -> the teacher's name for it (the folder again where it has none), in the teacher's order. Some of them
        may have no image in the set.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnavailableError(f"{path} is no readable manifest: {first_line(error)}.") from None
    folders = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        return None
    names = content.get("class_names")
    if not isinstance(names, list) or len(names) != len(folders):
        names = folders
    return dict(zip(folders, map(str, names), strict=True))


@dataclass(frozen=True)
class _TimmSource:
    """A map-style timm reader."""

    reader: Any

    def __len__(self) -> int:
        return len(self.reader)

    def open(self, index: int) -> tuple[IO[bytes], int | None]:
        file, target = self.reader[index][:2]
        return file, target

    def filename(self, index: int) -> str:
        # Readers of tables may know no file name.
        return self.reader.filename(index) or f"image {index}"


@dataclass(frozen=True)
class _DecodedSource:
    """A torchvision data set, which decodes by itself, or a list of pictures with their classes."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> tuple[Image.Image, int]:
        picture, target = self.dataset[index]
        return picture, int(target)

    def filename(self, index: int) -> str:
        samples = getattr(self.dataset, "samples", None) or getattr(self.dataset, "imgs", None)
        return str(samples[index][0]) if samples else f"image {index}"


def _open_named(dataset: str, root: str | None, split: str) -> EvaluationData:
    kind, _, name = dataset.partition("/")
    kind = kind.lower()
    known = ("torch", *_OPTIONAL_PACKAGES, "builtin")
    if not name or kind not in known:
        torch_name = f" Did you mean torch/{dataset}?" if dataset in (*_TORCH_FETCHED, *_TORCH_LOCAL) else ""
        raise UsageError(
            f"Unknown data set {dataset!r}: write builtin/digits, torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or "
            f"wds/NAME.{torch_name or did_you_mean(kind, known)}"
        )
    if kind == "builtin":
        raise UsageError(f"Unknown data set {dataset!r}: the built-in one is {BUILTIN_DIGITS}.")
    if kind == "torch":
        return _open_torchvision(dataset, name.lower(), root, split)
    module, package = _OPTIONAL_PACKAGES[kind]
    # timm's readers print their hint to stdout and raise ImportError.
    if importlib.util.find_spec(module) is None:
        raise UnavailableError(f"{dataset} needs a package that is not installed: pip install {package}")
    if kind == "wds" and (root is None or not os.path.isdir(root)):
        # Anything else webdataset takes for an address, or for a command to run.
        raise UsageError(f"{dataset} needs --data-dir, the folder of its shards.")
    if kind == "wds" and ":" in split:
        raise UsageError(f"{dataset} has no split {split!r}.")
    if kind == "tfds":  # it asks its server about sets that are on the disk too
        refuse_offline(dataset)
    opened = _created(dataset, root, split, download=kind == "tfds" and root is None)
    reader = opened.reader
    names = _ordered_names(getattr(reader, "class_to_idx", None))
    source = _TimmSource(reader) if kind == "hfds" else opened
    return EvaluationData(name=dataset, split=split, class_names=names, source=source)


def _open_torchvision(dataset: str, name: str, root: str | None, split: str) -> EvaluationData:
    if name not in (*_TORCH_FETCHED, *_TORCH_LOCAL):
        raise UsageError(
            f"Unknown data set {dataset!r}: torchvision's are {', '.join((*_TORCH_FETCHED, *_TORCH_LOCAL))}."
            f"{did_you_mean(name, (*_TORCH_FETCHED, *_TORCH_LOCAL))}"
        )
    if split not in (*TRAIN_SPLITS, *VALIDATION_SPLITS, "test"):
        raise UsageError(f"{dataset} has no split {split!r}: train or validation.")
    if root is not None and not os.path.isdir(root):
        raise UnavailableError(f"{dataset}: there is no folder {root} (--data-dir).")
    if name in _TORCH_LOCAL:
        if root is None:
            raise UsageError(f"{dataset} needs --data-dir, the folder that holds it: it is too large to be fetched.")
        found = split if name == "inaturalist" else ("train" if split in TRAIN_SPLITS else "validation")
        opened = _created(dataset, root, found)
    else:
        # Where torch keeps what it fetches; TORCH_HOME moves it.
        folder = root or str(Path(torch.hub.get_dir()).parent / "datasets")
        found = "train" if split in TRAIN_SPLITS else "test"
        try:
            opened = _created(dataset, folder, found, download=root is None and not is_offline())
        except UnavailableError:
            if root is None:
                refuse_offline(dataset)
            raise
    classes = getattr(opened, "classes", None)
    names = tuple(str(item[0] if isinstance(item, tuple) else item) for item in classes) if classes else None
    if names is not None and len(set(names)) < len(names):  # ImageNet's two "crane" and two "maillot"
        names = tuple(str(item) for item in opened.wnids)
    return EvaluationData(name=dataset, split=found, class_names=names, source=_DecodedSource(opened))


def _created(dataset: str, root: str | None, split: str, *, download: bool = False) -> Any:
    """``timm.data.create_dataset`` with what it prints on stderr and what it raises in one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr), _extraction_inside():
            opened = create_dataset(dataset, root=root, split=split, download=download, input_img_mode="RGB")
        if hasattr(opened, "loader"):  # torchvision's own takes any format
            opened.loader = _load_rgb
        return opened
    except ImportError as error:
        raise UnavailableError(f"{dataset} needs a package that is not installed: {first_line(error)}") from None
    except (OSError, RuntimeError, tarfile.TarError) as error:
        place = f" in {root}" if root else ""
        raise UnavailableError(f"{dataset} cannot be opened{place}: {first_line(error)}") from None
    except ValueError as error:  # an unknown split or configuration, in the words of the library that has them
        raise UsageError(f"{dataset}: {first_line(error)}") from None


@contextlib.contextmanager
def _extraction_inside() -> Iterator[None]:
    """Keep what torchvision unpacks (its own archives, by their checksums) within the folder, whatever its version."""
    previous = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = previous


def _load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """What torchvision's data sets read an image with."""
    with quiet(), open(path, "rb") as file:
        return open_picture(file).convert("RGB")


def _ordered_names(class_to_index: Any) -> tuple[str, ...] | None:
    """Class names by index, if they are numbered from 0 without a gap."""
    if not class_to_index:
        return None
    by_index = {index: str(name) for name, index in class_to_index.items()}
    if sorted(by_index) != list(range(len(class_to_index))):
        return None
    return tuple(by_index[index] for index in range(len(by_index)))
