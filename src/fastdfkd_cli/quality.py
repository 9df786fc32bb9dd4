"""A quality signal without data: what can be known of a student when there is no test set.

The images it is read from are DeepInversion's, whose pixels are optimised batch by batch, whatever method the run made
its own by; none of them was shown to the student, and all students of a teacher are judged on the same ones. They are
the teacher's idea of its domain, not the domain itself: the signal tells a good student of a teacher from a poor one,
does not order students that are close, and does not replace an accuracy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli.bn_stats import batch_norm_layers, channel_moments
from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.losses import jensen_shannon
from fastdfkd_cli.method_config import DeepInversionConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.recipes import RECIPES, ImageSize, with_method
from fastdfkd_cli.records import Record

#: The signal's images come from this seed and not from the run's: runs that differ in theirs share the images.
QUALITY_SEED = 7_919

#: The images of the signals that were read in a block of :func:`shared_images`, and the classes that were asked for, by
#: all that they follow from. None outside such a block.
_shared: ContextVar[dict[str, tuple[Tensor, Tensor]] | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_images() -> Iterator[None]:
    """In this block, the signals of students of one teacher are read from images that are made once."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The signal. Shares are between 0 and 1."""

    #: Fresh images that it was read from.
    images: int
    #: Share of images on which student and teacher predict the same class.
    agreement: float
    #: Mean Jensen-Shannon divergence between the two outputs, in nats (0: equal, ln 2 = 0.693: disjoint).
    divergence: float
    #: Mean cosine similarity of the two networks' logits, each image's less their mean (-1 to 1; 1: equal up to scale).
    similarity: float
    #: Share of images that the teacher recognises as the class asked for.
    recognised: float
    #: Share of classes that the teacher predicts for at least one image.
    coverage: float
    #: Mean of the teacher's largest probability.
    teacher_confidence: float
    #: Mean of the student's largest probability.
    student_confidence: float
    #: Mean over BatchNorm layers of ||batch mean - running mean|| / ||running deviation||; None without such layers.
    statistics_distance: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values, rounded to what they can carry."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def signal_config(config: RunConfig, image_size: ImageSize) -> RunConfig:
    """The settings by which the signal's images are made: DeepInversion's, with its published weights.

    Of the run's own they take ``quality_images``, ``quality_steps`` and the batch size, and from its recipe whether the
    teacher sees them mirrored: no seed, no method and none of its settings. So the signals of several runs can be
    compared.
    """
    recipe = RECIPES[config.recipe].config(image_size) if config.recipe in RECIPES else config
    return RunConfig(
        recipe=config.recipe,
        method="deepinversion",
        seed=QUALITY_SEED,
        quality_images=config.quality_images,
        quality_steps=config.quality_steps,
        synthesis=DeepInversionConfig(
            batch_size=max(min(config.synthesis.batch_size, config.quality_images), 2),
            steps=config.quality_steps,
            flip=with_method(recipe, "deepinversion").settings_of(DeepInversionConfig).flip,
        ),
    )


class QualitySignal:
    """Make fresh images and compare the two networks on them; iterate, then read :attr:`result`.

    Args:
        config: the run's settings; ``quality_images`` says how many images, ``quality_steps`` in how many steps.
        teacher, student: images in [0, 1] -> logits, on ``device``; neither is changed.
        image_size: C, H, W.
        num_classes: classes to draw labels from.
        teacher_facts: what makes the teacher this one and no other, as JSON values, its weights' checksum among them.
            Signals of the same teacher share their images within :func:`shared_images`; None: made for this one.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        student: nn.Module,
        *,
        image_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        amp: bool,
        teacher_facts: dict[str, Any] | None = None,
    ) -> None:
        config = signal_config(config, image_size)
        self.config = config
        self.teacher = teacher
        self.student = student
        self.num_classes = num_classes
        self.device = device
        self.amp = amp
        self.image_size = image_size
        self.teacher_facts = teacher_facts
        self.result: Quality | None = None

    def __iter__(self) -> Iterator[Record]:
        shared = _shared.get()
        if shared is None or self.teacher_facts is None:
            images, labels = yield from self._make()
        else:
            machine = [str(self.device), self.amp, torch.get_num_threads()]  # which rounds in a way of its own
            facts = [self.teacher_facts, to_dict(self.config), self.image_size, self.num_classes, machine]
            key = json.dumps(facts, sort_keys=True)
            if key not in shared:
                shared[key] = yield from self._make()
            images, labels = shared[key]
        self.result = compare(
            self.teacher,
            self.student,
            images,
            labels,
            num_classes=self.num_classes,
            batch_size=self.config.synthesis.batch_size,
        )

    def _make(self) -> Generator[Record, None, tuple[Tensor, Tensor]]:
        """The images, uint8 ``[N, C, H, W]``, and the classes that were asked for, int64 ``[N]``."""
        method = build_method(
            self.config,
            self.teacher,
            image_size=self.image_size,
            num_classes=self.num_classes,
            device=self.device,
            amp=self.amp,
        )
        began = time.perf_counter()
        wanted = self.config.quality_images
        batches = -(-wanted // self.config.synthesis.batch_size)
        images: list[Tensor] = []
        labels: list[Tensor] = []
        try:
            for index in range(batches):
                batch = method.synthesize()
                images.append(batch.images)
                labels.append(batch.labels)
                elapsed = time.perf_counter() - began
                yield Record(
                    phase="quality",
                    step=index + 1,
                    total=batches,
                    unit="batches",
                    progress=1.0,
                    elapsed=elapsed,
                    remaining=elapsed / (index + 1) * (batches - index - 1),
                    rate=(index + 1) / elapsed,
                )
        finally:
            method.close()
        return torch.cat(images)[:wanted], torch.cat(labels)[:wanted]


@torch.no_grad()
def compare(
    teacher: nn.Module, student: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, batch_size: int
) -> Quality:
    """Compare two networks on labelled synthetic images (uint8 ``[N, C, H, W]``, int64 ``[N]``), in float32.

    The models run in evaluation mode and are left in it.
    """
    teacher.eval()
    student.eval()
    teacher_logits, student_logits = [], []
    moments: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in batch_norm_layers(teacher)}
    handles = []
    for name, layer in batch_norm_layers(teacher).items():

        def read(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            moments[name].append((channel_moments(inputs[0])[0], len(inputs[0])))

        handles.append(layer.register_forward_pre_hook(read))
    try:
        for chunk in images.split(batch_size):
            floats = to_float(chunk)
            teacher_logits.append(teacher(floats).float())
            student_logits.append(student(floats).float())
    finally:
        for handle in handles:
            handle.remove()
    teacher_all, student_all = torch.cat(teacher_logits), torch.cat(student_logits)
    predicted = teacher_all.argmax(1)
    distances = []
    for name, layer in batch_norm_layers(teacher).items():
        if moments[name]:
            total = sum(count for _, count in moments[name])
            mean = torch.stack([value * (count / total) for value, count in moments[name]]).sum(0)
            running_mean: Tensor = layer.running_mean  # type: ignore[assignment]
            running_var: Tensor = layer.running_var  # type: ignore[assignment]
            scale = running_var.clamp_min(0).sqrt().norm().clamp_min(1e-12)
            distances.append(float((mean - running_mean).norm() / scale))
    return Quality(
        images=len(images),
        agreement=float((predicted == student_all.argmax(1)).float().mean()),
        divergence=float(jensen_shannon(teacher_all, student_all).mean()),
        similarity=float(F.cosine_similarity(_centred(teacher_all), _centred(student_all), dim=1).mean()),
        recognised=float((predicted == labels).float().mean()),
        coverage=len(predicted.unique()) / num_classes,
        teacher_confidence=float(teacher_all.softmax(1).amax(1).mean()),
        student_confidence=float(student_all.softmax(1).amax(1).mean()),
        statistics_distance=sum(distances) / len(distances) if distances else None,
    )


def _centred(logits: Tensor) -> Tensor:
    """``[N, classes]`` less each row's mean, which no softmax can tell."""
    return logits - logits.mean(1, keepdim=True)


__all__ = ["QUALITY_SEED", "Quality", "QualitySignal", "compare", "shared_images", "signal_config"]
