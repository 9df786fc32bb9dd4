"""From picture to batch: timm's evaluation preprocessing for one or more models, in this process or in workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastdfkd_cli.data.files import DECODE_ERRORS, IMAGE_MODES, first_line, open_picture, quiet
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.models import InputSpec


class Source(Protocol):
    """Pictures with class indices, read one at a time, from any process."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> tuple[Image.Image | IO[bytes], int | None]:
        """Return the picture, decoded or as a file that PIL can open, and its class (None: not known)."""
        ...

    def filename(self, index: int) -> str: ...


@dataclass(frozen=True)
class _Unreadable:
    """An image that failed, handed through the loader as a value: an exception raised in a worker process arrives as
    a page of traceback."""

    filename: str
    reason: str


@dataclass(frozen=True)
class _Views(Dataset[Any]):
    source: Any
    pipelines: Sequence[_Pipeline]
    label_map: tuple[int, ...] | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int] | _Unreadable:
        try:
            picture, label = self.source.open(index)
            if not isinstance(picture, Image.Image):
                with quiet(), picture as file:
                    picture = open_picture(file)
                    picture.load()
        except DECODE_ERRORS as error:
            return _Unreadable(self.source.filename(index), f"not a readable image ({first_line(error)}).")
        wanted = _model_label(label, self.label_map)
        if wanted is None:
            return _Unreadable(self.source.filename(index), f"its label is {label}: this split has no usable labels.")
        return [pipeline(picture) for pipeline in self.pipelines], wanted


@dataclass(frozen=True)
class _StreamedViews(IterableDataset[Any]):
    source: Any
    pipelines: Sequence[_Pipeline]
    label_map: tuple[int, ...] | None

    def __iter__(self) -> Iterator[tuple[list[Tensor], int] | _Unreadable]:
        images = iter(self.source)
        for index in itertools.count():
            try:
                picture, label = next(images)
            except StopIteration:
                return
            except DECODE_ERRORS as error:
                yield _Unreadable(f"image {index}", f"cannot be read ({first_line(error)}).")
                return
            wanted = _model_label(label, self.label_map)
            if wanted is None:
                yield _Unreadable(f"image {index}", f"its label is {label}: this split has no usable labels.")
                return
            yield [pipeline(picture) for pipeline in self.pipelines], wanted


def _model_label(label: int | None, label_map: tuple[int, ...] | None) -> int | None:
    """The model's number of a class of the data; None where the image has no class (test sets are often so)."""
    if label is None or label < 0 or (label_map is not None and label >= len(label_map)):
        return None
    return int(label) if label_map is None else label_map[int(label)]


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
        with quiet():
            picture = picture.convert(self.mode)
        parts = picture.split() if self.by_band else (picture,)
        return torch.cat([transform(part) for transform, part in zip(self.transforms, parts, strict=True)])


def load_batches(
    name: str,
    source: Source | Iterable[tuple[Image.Image, int]],
    label_map: tuple[int, ...] | None,
    inputs: Sequence[InputSpec],
    batch_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield what :meth:`fastdfkd_cli.data.EvaluationData.batches` says; ``name`` is for its errors."""
    if batch_size < 1:
        raise UsageError(f"The batch size must be 1 or more, not {batch_size}.")
    if workers < 0:
        raise UsageError(f"The number of workers must be 0 or more, not {workers}.")
    geometries = [_geometry(spec) for spec in inputs]
    distinct = list(dict.fromkeys(geometries))
    pipelines = [_Pipeline(inputs[geometries.index(geometry)]) for geometry in distinct]
    views: Dataset[Any] | IterableDataset[Any]
    if hasattr(source, "open"):
        views = _Views(source, pipelines, label_map)
    else:
        # Streamed readers share shards out between workers and pad them to equal lengths: with one process
        # each image is counted once.
        views, workers = _StreamedViews(source, pipelines, label_map), 0
    loader = DataLoader(views, batch_size=batch_size, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory)
    for batch in loader:
        if isinstance(batch, _Unreadable):
            raise UnavailableError(f"{name}: {batch.filename}: {batch.reason}")
        images, labels = batch
        yield [images[distinct.index(geometry)] for geometry in geometries], labels
