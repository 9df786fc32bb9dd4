"""What a run will cost, before it starts: parameters, FLOPs, steps, memory, disk and time.

Time and memory come from a few timed steps on copies of the two models, scaled to the run; nothing is kept of them.
"""

from __future__ import annotations

import copy
import os
import resource
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.labels import label_views, soft_labels
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.base import Method
from fastdfkd_cli.pool import ImagePool, pool_bytes_per_image
from fastdfkd_cli.quality import signal_config
from fastdfkd_cli.runtime import synchronize
from fastdfkd_cli.student import Student

#: Timed steps use at most so many pixels a batch; the time of a larger batch is scaled up.
TIMED_PIXELS = 2**20


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of one model."""

    parameters: int
    #: Floating-point operations of one forward pass of one image (a multiplication and an addition count as two);
    #: None where the model cannot run without data.
    flops: int | None


def model_size(module: nn.Module, image_size: tuple[int, int, int]) -> ModelSize:
    """Count parameters, and FLOPs on torch's meta device (no arithmetic is done)."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            copy.deepcopy(module).to("meta").eval()(torch.empty(1, *image_size, device="meta"))
    except Exception:
        # A user's module may look at values, which meta tensors have none of, and then raises whatever it likes.
        return ModelSize(parameters=parameters, flops=None)
    return ModelSize(parameters=parameters, flops=counter.get_total_flops())


def _resident_memory(device: torch.device) -> int:
    """Bytes in use now: allocated by torch on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak so far is the nearest thing that can be read
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def timed_steps(
    config: RunConfig,
    teacher: nn.Module,
    student: nn.Module | None,
    *,
    image_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    amp: bool,
    synthesises: bool = True,
    trains: bool = True,
    views: int = 0,
) -> dict[str, float]:
    """Time one synthesised batch and one KD step of ``config``.

    Args:
        teacher, student: images in [0, 1] -> logits; the student is copied, the teacher's hooks are taken off again.
        synthesises: whether the run makes its images; grey stands in for images that are given.
        trains: whether the student is trained, or only takes part in the adversarial term.
        views: variations of each image that the teacher labels once; 0: it is asked in each KD step.

    Returns:
        ``synthesis_batch`` and ``kd_step`` in seconds (0 without a student), ``labels`` in seconds an image (0 without
        ``views``), ``synthesis_memory`` and ``kd_memory`` in bytes: the growth while they ran, scaled to the run's
        batches.

    Raises:
        FastDFKDError: there is not enough memory for the smallest timed batch.
    """
    pixels = image_size[1] * image_size[2]
    synthesis, distillation = config.synthesis, config.distillation
    batch = max(2, min(synthesis.batch_size, TIMED_PIXELS // pixels))
    kd_batch = max(2, min(distillation.batch_size, TIMED_PIXELS // pixels))
    learner = copy.deepcopy(student) if student is not None else None
    costs = {"synthesis_batch": 0.0, "kd_step": 0.0, "labels": 0.0, "synthesis_memory": 0.0, "kd_memory": 0.0}
    before = _resident_memory(device)

    def grown() -> int:
        # Off CUDA a process keeps what it once took: what is timed second is charged with the larger of both.
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_memory(device)
        return max(peak - before, 0)

    if learner is not None and trains:
        images = torch.full((kd_batch, *image_size), 128, dtype=torch.uint8, device=device)
        _forget_peak(device)
        seconds, costs["labels"] = _timed_kd_step(config, teacher, learner, images, views, num_classes, device, amp)
        costs["kd_step"] = seconds * distillation.batch_size / kd_batch
        costs["kd_memory"] = grown() * distillation.batch_size / kd_batch
    if synthesises:
        steps = min(synthesis.inner_steps, 2)
        fewer = {"steps": steps} if hasattr(synthesis, "steps") else {}
        probe = replace(config, pool_size=0, synthesis=replace(synthesis, batch_size=batch, **fewer))
        _forget_peak(device)
        method = build_method(
            probe, teacher, image_size=image_size, num_classes=num_classes, device=device, amp=amp, seed=config.seed
        )
        try:
            method.synthesize(learner)  # warms up
            if isinstance(method, Method):
                method.settle()
            began = time.perf_counter()
            method.synthesize(learner)
            synchronize(device)
            seconds = time.perf_counter() - began
        except torch.cuda.OutOfMemoryError:
            raise FastDFKDError(
                f"The device has too little memory for a batch of {batch} images; lower synthesis.batch_size."
            ) from None
        finally:
            method.close()
        costs["synthesis_batch"] = seconds * synthesis.inner_steps / steps * synthesis.batch_size / batch
        costs["synthesis_memory"] = grown() * synthesis.batch_size / batch
    return costs


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _timed_kd_step(
    config: RunConfig,
    teacher: nn.Module,
    learner: nn.Module,
    images: Tensor,
    views: int,
    num_classes: int,
    device: torch.device,
    amp: bool,
) -> tuple[float, float]:
    """Seconds of a KD step on ``images``, and of labelling one of them ``views`` times."""
    settings = config.distillation
    trained = Student(learner, settings, device, amp, num_classes=num_classes)
    rng = torch.Generator().manual_seed(0)
    step_seconds = label_seconds = 0.0
    for _ in range(2):  # the first warms up
        pool = ImagePool.holding(images, torch.zeros(len(images), dtype=torch.int64), device)
        if views:
            began = time.perf_counter()
            pool.label(
                lambda seen: soft_labels(teacher, seen, amp),
                views, settings.augmentation, rng, batch_size=len(images),
            )  # fmt: skip
            synchronize(device)
            label_seconds = (time.perf_counter() - began) / len(images)
        began = time.perf_counter()
        drawn, logits = pool.sample(len(images), rng, settings.augmentation)
        trained.learn(teacher if logits is None else logits, drawn, 0)
        synchronize(device)
        step_seconds = time.perf_counter() - began
    return step_seconds, label_seconds


def distillation_plan(
    config: RunConfig,
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    amp: bool,
    pool_images: int | None = None,
) -> dict[str, Any]:
    """The plan of ``distill``: sizes, steps, bytes and seconds.

    Args:
        pool_images: images of a set made earlier; None where the run synthesises its own.
    """
    before = _resident_memory(device)
    synthesises = pool_images is None
    machine: dict[str, Any] = {
        "image_size": image_size, "num_classes": num_classes, "device": device, "amp": amp,
    }  # fmt: skip
    timed = partial(timed_steps, config, teacher, student, **machine, synthesises=synthesises)
    schedule = config.schedule
    batches = schedule.synthesis_rounds * schedule.batches_per_round if synthesises else 0
    kd_steps = config.kd_steps if synthesises else schedule.rounds * schedule.kd_steps_per_round
    images = pool_images if pool_images is not None else config.synthetic_images
    feeds = synthesises and config.synthesis.feeds
    views = label_views(config.distillation, images=images, kd_steps=kd_steps, feeds=feeds)
    if views and not synthesises and schedule.time_budget is not None:
        # As the run itself does: the budget decides how often an image is drawn, and so whether labels pay.
        costs = timed(views=0)
        steps = int(schedule.time_budget / costs["kd_step"])
        views = label_views(config.distillation, images=images, kd_steps=steps)
        if views:
            costs = {**timed(views=views), "kd_memory": costs["kd_memory"]}
    else:
        costs = timed(views=views)
    synthesis_seconds = batches * costs["synthesis_batch"]
    kd_seconds, label_seconds = kd_steps * costs["kd_step"], images * costs["labels"]
    if schedule.time_budget is not None:
        # The clock decides how much of this is done: the same mixture, for as long as it lasts. Given images are all
        # labelled first.
        first = 0.0 if synthesises else label_seconds
        whole = synthesis_seconds + kd_seconds + label_seconds - first
        share = max(schedule.time_budget - first, 0.0) / max(whole, 1e-9)
        synthesis_seconds, kd_seconds = synthesis_seconds * share, kd_seconds * share
        kd_steps = int(kd_steps * share)
        if synthesises:
            images, label_seconds = int(images * share), label_seconds * share
    kd_seconds += label_seconds
    signal_seconds = 0.0
    if config.quality_images:
        signal = signal_config(config, image_size)
        each = timed_steps(signal, teacher, None, **machine, trains=False)["synthesis_batch"]
        signal_seconds = -(-signal.quality_images // signal.synthesis.batch_size) * each
    kept = images
    if synthesises:
        kept = min(images, config.pool_size or images, config.pooled_images if feeds else images)
    pool_bytes = kept * pool_bytes_per_image(
        image_size,
        views=views,
        num_classes=num_classes,
        augmentation=config.distillation.augmentation,
        amp=amp,
    )
    student_bytes = sum(tensor.numel() * 4 for tensor in student.state_dict().values())
    return {
        "teacher": vars(model_size(teacher, image_size)),
        "student": vars(model_size(student, image_size)),
        "synthetic_images": images,
        "inner_steps": (images // config.synthesis.batch_size) * config.synthesis.inner_steps if synthesises else 0,
        "kd_steps": kd_steps,
        "memory_bytes": int(before + max(costs["synthesis_memory"], costs["kd_memory"]) + pool_bytes),
        "synthesis_memory_bytes": int(before + costs["synthesis_memory"] + pool_bytes) if synthesises else 0,
        "distillation_memory_bytes": int(before + costs["kd_memory"] + pool_bytes),
        "pool_bytes": pool_bytes,
        "disk_bytes": student_bytes + 2**20,
        "seconds": {
            "synthesis_batch": round(costs["synthesis_batch"], 4),
            "kd_step": round(costs["kd_step"], 4),
            "synthesis": round(synthesis_seconds, 1),
            "distillation": round(kd_seconds, 1),
            "quality": round(signal_seconds, 1),
            "total": round(synthesis_seconds + kd_seconds + signal_seconds, 1),
        },
    }


def synthesis_plan(
    config: RunConfig,
    teacher: nn.Module,
    student: nn.Module | None,
    *,
    num_images: int,
    burn_in: int,
    image_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    amp: bool,
) -> dict[str, Any]:
    """The plan of ``synthesize``; ``burn_in`` batches are made and thrown away first.

    Args:
        student: takes part in the adversarial term; None for a run without one.
    """
    before = _resident_memory(device)
    costs = timed_steps(
        config, teacher, student, image_size=image_size, num_classes=num_classes, device=device, amp=amp, trains=False
    )
    batches = burn_in + -(-num_images // config.synthesis.batch_size)
    # Synthetic images are noisy: PNG saves little, and the soft labels come on top.
    bytes_per_image = image_size[0] * image_size[1] * image_size[2] + 4 * num_classes
    seconds = batches * costs["synthesis_batch"]
    return {
        "teacher": vars(model_size(teacher, image_size)),
        **({"student": vars(model_size(student, image_size))} if student is not None else {}),
        "synthetic_images": num_images,
        "burn_in_batches": burn_in,
        "inner_steps": batches * config.synthesis.inner_steps,
        "memory_bytes": int(before + costs["synthesis_memory"]),
        "disk_bytes": num_images * bytes_per_image,
        "seconds": {
            "synthesis_batch": round(costs["synthesis_batch"], 4),
            "synthesis": round(seconds, 1),
            "total": round(seconds, 1),
        },
    }


__all__ = ["ModelSize", "distillation_plan", "model_size", "synthesis_plan", "timed_steps"]
