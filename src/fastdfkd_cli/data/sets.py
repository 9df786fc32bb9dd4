"""A set of real, labelled images: its classes, matched with a model's, and its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from fastdfkd_cli.data.files import DECODE_ERRORS, first_line, open_picture, quiet
from fastdfkd_cli.data.views import Source, load_batches
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.models import InputSpec


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
        return load_batches(self.name, self.source, self.label_map, inputs, batch_size, workers, pin_memory)


def picture_size(data: EvaluationData) -> tuple[int, int, int] | None:
    """Channels (1 for grey, 3 for anything else), height and width of the first picture; None for a stream.

    Raises:
        UnavailableError: it cannot be read.
    """
    source: Any = data.source
    if not hasattr(source, "open"):
        return None
    try:
        picture, _ = source.open(0)
        if not isinstance(picture, Image.Image):
            with quiet(), picture as file:
                picture = open_picture(file)
    except DECODE_ERRORS as error:
        reason = first_line(error)
        raise UnavailableError(f"{data.name}: {source.filename(0)}: not a readable image ({reason}).") from None
    return (1 if picture.mode in ("1", "L") else 3), picture.height, picture.width


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


def _shortened(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
