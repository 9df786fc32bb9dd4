"""How good a model is on labelled images: the engine behind ``fastdfkd evaluate`` and ``--eval-data``.

The figures are those of timm's ``validate.py``, under its names; the teacher beside the model sees the same images,
each of the two in the preprocessing that it states for itself. Counts are whole numbers and losses are summed in double
precision, image by image, so that no figure depends on the batch size beyond what the network's own kernels do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli.data import EvaluationData, evaluation_input
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.models import LoadedModel, check_forward
from fastdfkd_cli.records import Record

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Seconds between two records, and between two waits for the device.
RECORD_EVERY = 0.5

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was counted on ``n_samples`` images; accuracies and agreement in per cent, unrounded."""

    n_samples: int
    top1: float
    #: The true class is among the first five (or among all of them, where there are fewer).
    top5: float
    #: Mean cross-entropy in nats.
    loss: float
    images_per_sec: float
    teacher_top1: float | None = None
    #: Images on which model and teacher predict the same class, right or wrong.
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of :func:`evaluate_model`: scores, the row that is printed and stored, remarks for the user."""

    scores: Scores
    row: dict[str, Any]
    notes: tuple[str, ...]


def drain(records: Generator[Record, None, Result], on_record: Callable[[Record], None] | None = None) -> Result:
    """Run an engine to its end, hand its records to ``on_record``, and return its result."""
    while True:
        try:
            record = next(records)
        except StopIteration as end:
            return end.value
        if on_record is not None:
            on_record(record)


def evaluate_model(
    model: LoadedModel,
    data: EvaluationData,
    *,
    teacher: LoadedModel | None = None,
    batch_size: int = 128,
    workers: int = 0,
    img_size: int | None = None,
    crop_pct: float | None = None,
    device: torch.device | str = "cpu",
    amp: bool = False,
    amp_dtype: str = "bfloat16",
) -> Generator[Record, None, Evaluation]:
    """Evaluate ``model``, and ``teacher`` beside it, on real images. Both are left on ``device``.

    Args:
        model: what is evaluated.
        data: the images.
        teacher: a second model with the same classes.
        batch_size: images per forward pass.
        workers: processes that read images (0: this one).
        img_size: another image size, in pixels, for both models.
        crop_pct: another share of the image that the centre crop keeps, for both models.
        device: where to compute.
        amp: compute in ``amp_dtype`` where torch.autocast does.
        amp_dtype: ``bfloat16`` or ``float16``.

    Raises:
        UsageError: classes that do not match, values out of range, an image size that a model cannot take.
        UnavailableError: no images, or one that cannot be read.
        FastDFKDError: logits of the wrong shape, or not finite.
    """
    if teacher is not None and teacher.num_classes != model.num_classes:
        raise UsageError(
            f"{teacher.name} has {teacher.num_classes} classes and {model.name} {model.num_classes}: "
            "they can be compared only on the same ones."
        )
    device = torch.device(device)
    data = data.aligned(model.num_classes, model.class_names)
    spec = evaluation_input(model.input, img_size=img_size, crop_pct=crop_pct)
    inputs = [spec]
    if teacher is not None:
        inputs.append(evaluation_input(teacher.input, img_size=img_size, crop_pct=crop_pct))
    for each, fed in zip((model, teacher), inputs, strict=False):
        if each is not None and fed.size != each.input.size:  # a model's own size was tried when it was loaded
            check_forward(dataclasses.replace(each, input=fed))
    scores = yield from score(
        model.normalized().to(device),
        data.batches(inputs, batch_size=batch_size, workers=workers, pin_memory=device.type == "cuda"),
        num_classes=model.num_classes,
        teacher=None if teacher is None else teacher.normalized().to(device),
        device=device,
        amp=amp,
        amp_dtype=amp_dtype,
        total=data.size,
        name=model.name,
    )
    height, width = spec.size[1:]
    row: dict[str, Any] = {
        "model": model.name,
        "top1": round(scores.top1, 4),
        "top1_err": round(100 - scores.top1, 4),
        "top5": round(scores.top5, 4),
        "top5_err": round(100 - scores.top5, 4),
        # In millions, as timm gives it.
        "param_count": round(sum(parameter.numel() for parameter in model.module.parameters()) / 1e6, 2),
        "img_size": width if height == width else [height, width],
        "crop_pct": spec.crop_pct,
        "interpolation": spec.interpolation,
        "loss": round(scores.loss, 4),
        "n_samples": scores.n_samples,
        "dataset": data.name,
        "split": data.split,
        "revision": model.revision,
        "weights_sha256": model.weights_sha256,
        "images_per_sec": round(scores.images_per_sec, 2),
    }
    if teacher is not None and scores.teacher_top1 is not None and scores.agreement is not None:
        row["teacher"] = teacher.name
        row["teacher_top1"] = round(scores.teacher_top1, 4)
        row["agreement"] = round(scores.agreement, 4)
    return Evaluation(scores=scores, row=row, notes=data.notes)


def score(
    model: nn.Module,
    batches: Iterable[tuple[Sequence[Tensor], Tensor]],
    *,
    num_classes: int,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    amp: bool = False,
    amp_dtype: str = "bfloat16",
    total: int | None = None,
    name: str = "the model",
) -> Generator[Record, None, Scores]:
    """Score ``model`` on batches that come from anywhere.

    Args:
        model: images in [0, 1] -> logits ``[B, num_classes]``; in evaluation mode while this runs, and afterwards in
            the mode it was in.
        batches: (views, labels): the model is fed ``views[0]`` and the teacher ``views[-1]``, uint8 or float in
            [0, 1], ``[B, C, H, W]``; labels int64 ``[B]``.
        num_classes: classes of the model, and of the teacher.
        teacher: a second model, for its accuracy and the agreement of the two.
        device: where both models are.
        amp: compute in ``amp_dtype`` where torch.autocast does.
        amp_dtype: ``bfloat16`` or ``float16``.
        total: number of images, if known, for the records.
        name: the model in messages.

    Raises:
        UsageError: an unknown ``amp_dtype``; a label that is no class of the model.
        UnavailableError: there are no images.
        FastDFKDError: logits of the wrong shape, or not finite.
    """
    if amp_dtype not in AMP_DTYPES:
        raise UsageError(f"--amp-dtype must be {' or '.join(AMP_DTYPES)}, not {amp_dtype!r}.")
    device = torch.device(device)
    precision = AMP_DTYPES[amp_dtype] if amp else None
    tally = _Tally(name)
    started = reported = time.perf_counter()
    # The modes are set around each batch: between two of them the models are the caller's.
    for views, labels in batches:
        if len(labels) == 0:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise UsageError(
                f"The images have the class number {high if high >= num_classes else low}, "
                f"and {name} the classes 0 to {num_classes - 1}: they must be the same classes."
            )
        tally.add(*_judge(model, teacher, views, labels, num_classes, device, precision, name))
        now = time.perf_counter()
        if now - reported >= RECORD_EVERY:
            reported = now
            yield tally.record(total, now - started)
    if tally.seen == 0:
        raise UnavailableError("There are no images to evaluate on.")
    tally.settle()
    elapsed = time.perf_counter() - started
    yield tally.record(tally.seen, elapsed)
    return tally.scores(elapsed, with_teacher=teacher is not None)


@contextmanager
def evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put every layer into evaluation mode while the block runs, and back into its own mode afterwards."""
    layers = [layer for model in models if model is not None for layer in model.modules()]
    modes = [layer.training for layer in layers]
    for model in models:
        if model is not None:
            model.eval()
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


def _judge(
    model: nn.Module,
    teacher: nn.Module | None,
    views: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    device: torch.device,
    precision: torch.dtype | None,
    name: str,
) -> tuple[int, Tensor, Tensor]:
    """Return the number of images, their losses ``[B]``, and ``[4, B]``: top 1, top 5, teacher's top 1, agreement."""

    def logits_of(network: nn.Module, images: Tensor, who: str) -> Tensor:
        images = images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().div(255)
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            logits = network(images)
        if logits.shape != (len(images), num_classes):
            raise FastDFKDError(
                f"{who} gives an output of shape {list(logits.shape)} for {len(images)} images, not logits "
                f"[{len(images)}, {num_classes}]."
            )
        return logits.float()

    with evaluation_mode(model, teacher), torch.no_grad():
        labels = labels.to(device, non_blocking=True)
        logits = logits_of(model, views[0], name)
        ranked = logits.topk(min(5, num_classes), dim=1).indices
        hits = ranked == labels[:, None]
        verdicts = [hits[:, 0], hits.any(dim=1)]
        if teacher is None:
            verdicts += [torch.zeros_like(verdicts[0])] * 2
        else:
            expected = logits_of(teacher, views[-1], "The teacher").argmax(dim=1)
            verdicts += [expected == labels, expected == ranked[:, 0]]
        return len(labels), F.cross_entropy(logits, labels, reduction="none"), torch.stack(verdicts)


class _Tally:
    """Counts and sums. Each batch's results stay on the device until :meth:`settle` waits for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = 0
        self.settled = 0
        self.loss = 0.0
        self.counts = [0, 0, 0, 0]
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, count: int, losses: Tensor, verdicts: Tensor) -> None:
        self.seen += count
        self._waiting.append((losses, verdicts))

    def settle(self) -> None:
        """Read what waits on the device (this is where the CPU waits for it)."""
        if not self._waiting:
            return
        losses = torch.cat([losses for losses, _ in self._waiting]).cpu().double()
        verdicts = torch.cat([verdicts for _, verdicts in self._waiting], dim=1).cpu().sum(dim=1)
        self._waiting.clear()
        if not bool(losses.isfinite().all()):
            index = self.settled + int((~losses.isfinite()).nonzero()[0])
            raise FastDFKDError(
                f"{self.name} gives a loss that is not finite on image {index}: its weights are damaged, or the "
                "precision too low (try without --amp)."
            )
        self.settled = self.seen
        self.loss += float(losses.sum())
        self.counts = [count + int(more) for count, more in zip(self.counts, verdicts, strict=True)]

    def record(self, total: int | None, elapsed: float) -> Record:
        self.settle()
        rate = self.seen / elapsed if elapsed > 0 else None
        progress = min(1.0, self.seen / total) if total else 0.0
        return Record(
            phase="evaluation",
            step=self.seen,
            total=total,
            unit="images",
            progress=progress,
            elapsed=elapsed,
            remaining=max(0, total - self.seen) / rate if total and rate else None,
            rate=rate,
            values={"top1": 100 * self.counts[0] / self.seen, "loss": self.loss / self.seen},
        )

    def scores(self, elapsed: float, *, with_teacher: bool) -> Scores:
        top1, top5, teacher_top1, agreement = (100 * count / self.seen for count in self.counts)
        return Scores(
            n_samples=self.seen,
            top1=top1,
            top5=top5,
            loss=self.loss / self.seen,
            images_per_sec=self.seen / elapsed,
            teacher_top1=teacher_top1 if with_teacher else None,
            agreement=agreement if with_teacher else None,
        )


__all__ = ["Evaluation", "Scores", "drain", "evaluate_model", "evaluation_mode", "score"]
