"""Real images for evaluation: where they lie, what their classes are, and how a model is fed with them.

What timm's ``validate.py`` opens, this opens, with the same preprocessing (``timm.data.create_transform``), the same
natural order of class folders (``class2`` before ``class10``) and the same search for a split's folder. It is stricter
where timm goes on in silence: an image that cannot be read is an error and not replaced by its neighbour, a folder of
splits is never read as one, and the data's classes must be the model's.

Images leave here as uint8 ``[B, C, H, W]``; the model's own wrapper normalises them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import importlib.util
import io
import itertools
import json
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from safetensors import safe_open
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastdfkd_cli.errors import UnavailableError, UsageError, did_you_mean

if TYPE_CHECKING:
    from fastdfkd_cli.models import InputSpec

BUILTIN_DIGITS = "builtin/digits"
#: How PIL calls an image of so many channels.
IMAGE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("validation", "val", "valid", "eval", "evaluation")
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
#: What PIL raises for a file that is not the image it claims to be.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Source(Protocol):
    """Pictures with class indices, read one at a time, from any process."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> tuple[Image.Image | IO[bytes], int | None]:
        """Return the picture, decoded or as a file that PIL can open, and its class (None: not known)."""
        ...

    def filename(self, index: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """A set of real, labelled images.

    Attributes:
        name: the folder, file or data set, as it was asked for.
        split: the split that was found; None where the set has none.
        class_names: the classes in index order; None where the set does not say.
        source: the images, or an iterable of (PIL image, class index) for the streamed kinds of data set.
        label_map: class index of the data -> class index of the model; None: they are the same.
        notes: what a user should be told about the way the set was read.
    """

    name: str
    split: str | None
    class_names: tuple[str, ...] | None
    source: Source | Iterable[tuple[Image.Image, int]]
    label_map: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        """Number of images; None for a stream of unknown length."""
        length = getattr(self.source, "__len__", None)
        return (length() or None) if length is not None else None

    def aligned(self, num_classes: int, class_names: Sequence[str] | None = None) -> EvaluationData:
        """Return the same images with their classes numbered as a model with these classes numbers them.

        Where every class name of the data is also one of the model's, classes are matched by name, and the data may
        lack some of them. Otherwise they are matched by position.

        Raises:
            UsageError: the numbers of classes differ.
        """
        names = self.class_names
        if names is None:
            return self
        known = {name: index for index, name in enumerate(class_names or ())}
        if all(name in known for name in names):
            label_map = tuple(known[name] for name in names)
            if label_map == tuple(range(num_classes)):
                return self
            missing = num_classes - len(names)
            note = f"{self.name}: classes are matched to the model's by name" + (
                f"; {missing} of the model's {num_classes} classes have no images." if missing else "."
            )
            return dataclasses.replace(self, label_map=label_map, notes=self._notes_with(note))
        if len(names) != num_classes:
            raise UsageError(
                f"{self.name} has {len(names)} classes ({_shortened(names)}) and the model {num_classes}: "
                "they must be the same classes."
            )
        numbers = all(name.isdecimal() and int(name) == index for index, name in enumerate(names))
        if known and not numbers:  # folders called 0, 1, 2, ... say by themselves that the position counts
            note = (
                f"{self.name}: its class names ({_shortened(names)}) are not the model's "
                f"({_shortened(tuple(known))}); classes are matched by position."
            )
            return dataclasses.replace(self, notes=self._notes_with(note))
        return self

    def _notes_with(self, note: str) -> tuple[str, ...]:
        """Aligning twice with the same model says so once."""
        return self.notes if note in self.notes else (*self.notes, note)

    def batches(
        self, inputs: Sequence[InputSpec], *, batch_size: int, workers: int = 0, pin_memory: bool = False
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield (images, labels): for each of ``inputs`` its own uint8 ``[B, C, H, W]``, and int64 ``[B]``.

        Each picture is read once, whatever the number of ``inputs``; equal ones share a tensor.

        Raises:
            UsageError: ``batch_size`` or ``workers`` is out of range, or an input has more than 4 channels.
            UnavailableError: an image cannot be read, or has no label.
        """
        if batch_size < 1:
            raise UsageError(f"The batch size must be 1 or more, not {batch_size}.")
        if workers < 0:
            raise UsageError(f"The number of workers must be 0 or more, not {workers}.")
        geometries = [_geometry(spec) for spec in inputs]
        distinct = list(dict.fromkeys(geometries))
        pipelines = [_Pipeline(inputs[geometries.index(geometry)]) for geometry in distinct]
        views: Dataset[Any] | IterableDataset[Any]
        if hasattr(self.source, "open"):
            views = _Views(self.source, pipelines, self.label_map)
        else:
            # Streamed readers share shards out between workers and pad them to equal lengths: with one process
            # each image is counted once.
            views, workers = _StreamedViews(self.source, pipelines, self.label_map), 0
        loader = DataLoader(
            views, batch_size=batch_size, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory
        )
        for batch in loader:
            if isinstance(batch, _Unreadable):
                raise UnavailableError(f"{self.name}: {batch.filename}: {batch.reason}")
            images, labels = batch
            yield [images[distinct.index(geometry)] for geometry in geometries], labels


def evaluation_input(spec: InputSpec, *, img_size: int | None = None, crop_pct: float | None = None) -> InputSpec:
    """Return ``spec`` as it is evaluated: at the size and crop that the weights' authors test with, unless asked.

    Args:
        spec: a model's input.
        img_size: another, square image size.
        crop_pct: another share of the image that the crop keeps.

    Raises:
        UsageError: a value is out of range.
    """
    size, share = spec.test_size or spec.size, spec.test_crop_pct or spec.crop_pct
    if img_size is not None:
        if img_size < 1:
            raise UsageError(f"--img-size must be 1 or more, not {img_size}.")
        size = (size[0], img_size, img_size)
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise UsageError(f"--crop-pct must be above 0 and at most 1, not {crop_pct}.")
        share = crop_pct
    return dataclasses.replace(spec, size=size, crop_pct=share, test_size=None, test_crop_pct=None)


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


# ---------------------------------------------------------------------------------------------- the built-in digits


class _TensorSource:
    """Images that lie in memory, uint8 ``[N, 1, H, W]``."""

    def __init__(self, name: str, images: Tensor, labels: Tensor) -> None:
        self.name = name
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index, 0].numpy()), int(self.labels[index])

    def filename(self, index: int) -> str:
        return f"{self.name}[{index}]"


def _open_digits(split: str) -> EvaluationData:
    if split not in (*VALIDATION_SPLITS, "test"):
        raise UsageError(f"{BUILTIN_DIGITS} holds only its test images: --split test, not {split!r}.")
    asset = importlib.resources.files("fastdfkd_cli") / "assets" / "digits-test.safetensors"
    with importlib.resources.as_file(asset) as path, safe_open(path, framework="pt") as file:
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
        classes = tuple(json.loads(file.metadata()["classes"]))
    source = _TensorSource(BUILTIN_DIGITS, images, labels)
    return EvaluationData(name=BUILTIN_DIGITS, split="test", class_names=classes, source=source)


# ------------------------------------------------------------------------------------------------ folders and tars


@dataclass(frozen=True)
class _Entry:
    """One image file: whole (``size`` None) or a stretch of an uncompressed tar."""

    path: str
    name: str
    label: str
    offset: int = 0
    size: int | None = None


class _FileSource:
    """Image files, or stretches of tars. Each read opens its file anew, so that worker processes share no position."""

    def __init__(self, entries: Sequence[_Entry], class_names: Sequence[str]) -> None:
        self.entries = entries
        self.class_to_index = {name: index for index, name in enumerate(class_names)}

    def __len__(self) -> int:
        return len(self.entries)

    def open(self, index: int) -> tuple[IO[bytes], int]:
        entry = self.entries[index]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            return io.BytesIO(file.read(-1 if entry.size is None else entry.size)), self.class_to_index[entry.label]

    def filename(self, index: int) -> str:
        return self.entries[index].name


def _open_path(path: Path, split: str) -> EvaluationData:
    if not path.exists():
        raise UnavailableError(f"There is no folder or file {path}.")
    found: str | None = None
    manifest: _Manifest | None = None
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise UsageError(f"{path} is neither a folder nor a .tar (a compressed archive must be unpacked first).")
        entries = list(_tar_entries(path, prefix=""))
    else:
        root, found = _split_folder(path, split)
        # Hidden ones are what an interrupted writer leaves.
        shards = [shard for shard in root.glob("*.tar") if not shard.name.startswith(".")]
        manifest = _read_manifest(root / "manifest.json") if shards else None
        # A synthetic set keeps grids of its images beside the shards: they are not of the set.
        entries = [] if manifest else list(_folder_entries(root))
        if not entries and shards:
            if found is None:
                shards, found = _split_shards(path, shards, split)
            entries = [entry for shard in shards for entry in _tar_entries(shard, prefix=shard.stem)]
    if not entries:
        raise UnavailableError(f"{path} holds no images ({', '.join(get_img_extensions())}).")
    loose = [entry.name for entry in entries if not entry.label]
    if loose:
        raise UnavailableError(
            f"{path}: {len(loose)} of {len(entries)} images ({loose[0]}, ...) are in no class folder: "
            "put each under the name of its class."
        )
    present = sorted({entry.label for entry in entries}, key=natural_key)
    folders = names = tuple(present)
    if manifest is not None and set(present) <= set(manifest.folders):
        folders, names = manifest.folders, manifest.names
    entries.sort(key=lambda entry: natural_key(entry.name))
    return EvaluationData(name=str(path), split=found, class_names=names, source=_FileSource(entries, folders))


def _split_names(split: str) -> tuple[str, ...]:
    """The names under which a split may be found, the one asked for first."""
    for synonyms in (TRAIN_SPLITS, VALIDATION_SPLITS):
        if split in synonyms:
            return (split, *(name for name in synonyms if name != split))
    return (split,)


_ALL_SPLITS = frozenset((*TRAIN_SPLITS, *VALIDATION_SPLITS, "test", "testing"))


def _split_folder(root: Path, split: str) -> tuple[Path, str | None]:
    """Find the split's folder under ``root``; a folder without splits is taken whole."""
    for name in _split_names(split):
        if (root / name).is_dir():
            return root / name, name
    folders = sorted(item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith("."))
    if folders and all(name.lower() in _ALL_SPLITS for name in folders):
        raise UsageError(f"{root} has no split {split!r}: it has {', '.join(folders)} (--split {folders[0]}).")
    if split not in VALIDATION_SPLITS and folders:
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


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    # "._NAME" are what macOS leaves beside the files of an archive: they end like images and are none.
    return os.path.splitext(base)[1].lower() in get_img_extensions(as_set=True) and not base.startswith("._")


def _folder_entries(root: Path) -> Iterator[_Entry]:
    """Images below ``root``, labelled by the folder they lie in; hidden folders are passed over."""
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        label = "" if relative == os.curdir else os.path.basename(relative)
        for name in filter(_is_image, files):
            yield _Entry(
                path=os.path.join(folder, name), name=os.path.normpath(os.path.join(relative, name)), label=label
            )


def _tar_entries(path: Path, *, prefix: str) -> Iterator[_Entry]:
    """Images in a tar, or in the tars within it, labelled by the innermost folder (or tar) they lie in."""
    try:
        with open(path, "rb") as file:
            yield from _archive_entries(file, path, prefix=prefix, start=0)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UnavailableError(f"{path} cannot be read as an uncompressed tar: {_first_line(error)}.") from None


def _archive_entries(file: IO[bytes], path: Path, *, prefix: str, start: int) -> Iterator[_Entry]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            offset = start + member.offset_data
            stem, extension = os.path.splitext(os.path.basename(member.name))
            if extension.lower() == ".tar" and not stem.startswith("._"):
                inner = archive.extractfile(member)
                assert inner is not None  # a regular file has contents
                yield from _archive_entries(inner, path, prefix=f"{prefix}/{stem}", start=offset)
            elif _is_image(member.name):
                label = f"{prefix}/{os.path.dirname(member.name)}".strip("/.").rpartition("/")[2]
                yield _Entry(path=str(path), name=member.name, label=label, offset=offset, size=member.size)


@dataclass(frozen=True)
class _Manifest:
    """The classes of a synthetic set, in the teacher's order; some of them may have no image in it."""

    folders: tuple[str, ...]
    #: As the teacher calls them; the folders where it does not name them.
    names: tuple[str, ...]


def _read_manifest(path: Path) -> _Manifest | None:
    """Read the classes from a synthetic set's manifest; None where there is none, or somebody else's."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{path} is no readable manifest: {_first_line(error)}.") from None
    folders = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        return None
    names = content.get("class_names")
    if not isinstance(names, list) or len(names) != len(folders):
        names = folders
    return _Manifest(tuple(folders), tuple(str(name) for name in names))


# ------------------------------------------------------------------------------------------------ data sets by name


class _TimmSource:
    """A map-style timm reader."""

    def __init__(self, name: str, reader: Any) -> None:
        self.name = name
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def open(self, index: int) -> tuple[IO[bytes], int | None]:
        file, target = self.reader[index][:2]
        return file, target

    def filename(self, index: int) -> str:
        # Readers of tables may know no file name.
        return self.reader.filename(index) or f"image {index}"


class _TorchvisionSource:
    """A torchvision data set, which decodes by itself."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset

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
    if kind == "wds" and root is None:
        raise UsageError(f"{dataset} needs --data-dir, the folder of its shards.")
    opened = _created(dataset, root, split, download=kind == "tfds" and root is None)
    reader = opened.reader
    names = _ordered_names(getattr(reader, "class_to_idx", None))
    if kind == "hfds":
        return EvaluationData(name=dataset, split=split, class_names=names, source=_TimmSource(dataset, reader))
    return EvaluationData(name=dataset, split=split, class_names=names, source=opened)


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
        opened = _created(dataset, folder, found, download=root is None)
    classes = getattr(opened, "classes", None)
    names = tuple(str(item[0] if isinstance(item, tuple) else item) for item in classes) if classes else None
    if names is not None and len(set(names)) < len(names):  # ImageNet's two "crane" and two "maillot"
        names = tuple(str(item) for item in opened.wnids)
    return EvaluationData(name=dataset, split=found, class_names=names, source=_TorchvisionSource(dataset, opened))


def _created(dataset: str, root: str | None, split: str, *, download: bool = False) -> Any:
    """``timm.data.create_dataset`` with what it prints on stderr and what it raises in one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(dataset, root=root, split=split, download=download, input_img_mode="RGB")
    except ImportError as error:
        raise UnavailableError(f"{dataset} needs a package that is not installed: {_first_line(error)}") from None
    except (OSError, RuntimeError) as error:
        place = f" in {root}" if root else ""
        raise UnavailableError(f"{dataset} cannot be opened{place}: {_first_line(error)}") from None
    except ValueError as error:  # an unknown split or configuration, in the words of the library that has them
        raise UsageError(f"{dataset}: {_first_line(error)}") from None


def _ordered_names(class_to_index: Any) -> tuple[str, ...] | None:
    """Class names by index, if they are numbered from 0 without a gap."""
    if not class_to_index:
        return None
    by_index = {index: str(name) for name, index in class_to_index.items()}
    if sorted(by_index) != list(range(len(class_to_index))):
        return None
    return tuple(by_index[index] for index in range(len(by_index)))


# -------------------------------------------------------------------------------------------- from picture to batch


@dataclass(frozen=True)
class _Unreadable:
    """An image that failed, handed through the loader as a value: an exception raised in a worker process arrives as
    a page of traceback."""

    filename: str
    reason: str


class _Views(Dataset[Any]):
    def __init__(self, source: Any, pipelines: Sequence[_Pipeline], label_map: tuple[int, ...] | None) -> None:
        self.source = source
        self.pipelines = pipelines
        self.label_map = label_map

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int] | _Unreadable:
        try:
            picture, label = self.source.open(index)
            if not isinstance(picture, Image.Image):
                with picture as file:
                    picture = Image.open(file)
                    picture.load()
        except _DECODE_ERRORS as error:
            return _Unreadable(self.source.filename(index), f"not a readable image ({_first_line(error)}).")
        wanted = _model_label(label, self.label_map)
        if wanted is None:
            return _Unreadable(self.source.filename(index), _no_label(label))
        return [pipeline(picture) for pipeline in self.pipelines], wanted


class _StreamedViews(IterableDataset[Any]):
    def __init__(self, source: Any, pipelines: Sequence[_Pipeline], label_map: tuple[int, ...] | None) -> None:
        self.source = source
        self.pipelines = pipelines
        self.label_map = label_map

    def __iter__(self) -> Iterator[tuple[list[Tensor], int] | _Unreadable]:
        images = iter(self.source)
        for index in itertools.count():
            try:
                picture, label = next(images)
            except StopIteration:
                return
            except _DECODE_ERRORS as error:
                yield _Unreadable(f"image {index}", f"cannot be read ({_first_line(error)}).")
                return
            wanted = _model_label(label, self.label_map)
            if wanted is None:
                yield _Unreadable(f"image {index}", _no_label(label))
                return
            yield [pipeline(picture) for pipeline in self.pipelines], wanted


def _model_label(label: int | None, label_map: tuple[int, ...] | None) -> int | None:
    """The model's number of a class of the data; None where the image has no class (test sets are often so)."""
    if label is None or label < 0 or (label_map is not None and label >= len(label_map)):
        return None
    return int(label) if label_map is None else label_map[int(label)]


def _no_label(label: int | None) -> str:
    return f"its label is {label}: this split has no usable labels."


def _collate(samples: list[Any]) -> tuple[list[Tensor], Tensor] | _Unreadable:
    for sample in samples:
        if isinstance(sample, _Unreadable):
            return sample
    views = [torch.stack(images) for images in zip(*(images for images, _ in samples), strict=True)]
    return views, torch.tensor([label for _, label in samples], dtype=torch.int64)


def _geometry(spec: InputSpec) -> tuple[Any, ...]:
    """What of an input decides the pixels (the mean does where borders are filled with it)."""
    fill = spec.mean if spec.crop_mode == "border" else None
    return spec.size, spec.interpolation, spec.crop_pct, spec.crop_mode, fill


class _Pipeline:
    """timm's evaluation transform for an input, up to the uint8 tensor. Worker processes get it pickled."""

    def __init__(self, spec: InputSpec) -> None:
        channels = spec.size[0]
        if channels not in IMAGE_MODES:
            raise UsageError(f"Image files have 1 to 4 channels; the model takes {channels}.")
        self.mode = IMAGE_MODES[channels]
        # PIL resizes LA and RGBA with the colours multiplied by the last channel. For a network that channel is one
        # like the others: such images are resized band by band.
        self.by_band = channels in (2, 4)
        means = [(mean,) for mean in spec.mean] if self.by_band else [tuple(spec.mean)]
        self.transforms = [
            create_transform(
                input_size=spec.size,
                is_training=False,
                interpolation=spec.interpolation,
                crop_pct=spec.crop_pct,
                crop_mode=spec.crop_mode,
                mean=mean,
                normalize=False,
            )
            for mean in means
        ]

    def __call__(self, picture: Image.Image) -> Tensor:
        picture = picture.convert(self.mode)
        parts = picture.split() if self.by_band else (picture,)
        return torch.cat([transform(part) for transform, part in zip(self.transforms, parts, strict=True)])


def _shortened(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


__all__ = ["BUILTIN_DIGITS", "EvaluationData", "Source", "evaluation_input", "open_evaluation_data"]
