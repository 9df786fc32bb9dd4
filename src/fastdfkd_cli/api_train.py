"""The Python API of ``fastdfkd train``: a network from scratch on labelled images, exported as students are."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdfkd_cli import __version__, stopping
from fastdfkd_cli.checkpoint import Checkpoints
from fastdfkd_cli.data import EvaluationData, open_training_data, picture_size
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.export import export_student, load_exported, verify_export
from fastdfkd_cli.job import Machine, Model, OnMessage, OnRecord, silent
from fastdfkd_cli.judging import judged, open_judge
from fastdfkd_cli.models import InputSpec, LoadedModel, check_forward, load_untrained, usual_size
from fastdfkd_cli.output import StagedDirectory, write_bytes, write_json
from fastdfkd_cli.plan import model_size
from fastdfkd_cli.records import MetricsLog
from fastdfkd_cli.resume import SHARE, digest_of, finished, folder_for, noting, open_checkpoints
from fastdfkd_cli.runtime import describe_device, deterministic_algorithms, peak_memory, synchronize, versions
from fastdfkd_cli.settings import CHECKPOINT_EVERY
from fastdfkd_cli.stopping import patiently
from fastdfkd_cli.training import Reading, Training, channel_statistics
from fastdfkd_cli.training_config import TrainingConfig, from_values

#: Pictures up to this many pixels a side are taken as they are, unless another input size is stated.
SMALL_IMAGE = 64
#: Images on which the export is compared with the network that was trained.
COMPARED = 64


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` gives back."""

    #: The trained network, in evaluation mode, taking normalised images.
    model: nn.Module
    #: The folder it was exported to; None without ``output``.
    path: Path | None
    #: What ``report.json`` holds.
    report: dict[str, Any]


@dataclass
class _Job:
    """What a training works with, checked before any image is read."""

    machine: Machine
    config: TrainingConfig
    data: EvaluationData
    model: LoadedModel
    #: Whether the images decide mean and deviation.
    measures: tuple[bool, bool]

    @property
    def pool_bytes(self) -> int | None:
        """Bytes of all images; None where nobody knows how many there are."""
        channels, height, width = self.model.input.size
        return None if self.data.size is None else self.data.size * (channels * height * width + 8)


def train(
    model: Model,
    *,
    data_dir: str | Path | None = None,
    dataset: str | None = None,
    split: str | None = None,
    config: TrainingConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    device: str = "auto",
    amp: bool | None = None,
    workers: int = 0,
    eval_data: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str = "validation",
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> TrainResult:
    """Train ``model`` from scratch on labelled images, and export its last weights (or their average).

    Args:
        model: an architecture's reference, or a module, which is trained in place as it is.
        data_dir, dataset, split: see :func:`fastdfkd_cli.data.open_training_data`.
        config: the settings; default: :class:`~fastdfkd_cli.training_config.TrainingConfig`'s.
        overrides: settings to put on them, by name.
        num_classes: where the images do not say how many classes there are.
        input_size: C, H, W. Default: that of the first picture where it is small, or the architecture's usual one.
        mean, std: the normalisation, per channel, of images in [0, 1]; default: the images' own.
        output, overwrite, resume, checkpoint_every, device, amp: as in :func:`fastdfkd_cli.distill`.
        workers: processes that read images (0: this one).
        eval_data, eval_dataset, eval_split: real images to judge the finished network on, once.
        on_record: called with every :class:`~fastdfkd_cli.records.Record`.
        on_message: called with one-line remarks.

    Raises:
        UsageError: the request does not make sense.
        UnavailableError: a data set is not to be had.
        FastDFKDError: the run failed.
    """
    log = MetricsLog(on_record)
    say = on_message or silent
    kept: list[Path] = []
    with ExitStack() as stack:
        stack.enter_context(noting(kept))
        done = finished(output) if output is not None and str(resume) == "auto" else None
        if output is not None and done is None:
            StagedDirectory(output, overwrite).check()
        folder = folder_for(output, resume)
        job = _prepare(
            model, data_dir, dataset, split, config, overrides, num_classes, input_size, mean, std, device, amp, say
        )
        judge = open_judge(eval_data, eval_dataset, eval_split, job.model)
        began = time.perf_counter()
        images, labels = _read(job, workers, log)
        reading = time.perf_counter() - began
        _normalise(job, images, say)
        about = _identity(job, images, labels)
        if done is not None and done["settings_sha256"] == digest_of(about):
            say("the run is complete: nothing is left to do")
            load_exported(Path(output or ""), job.model)
            return TrainResult(job.model.module, Path(output or ""), done)
        if output is not None:
            StagedDirectory(output, overwrite).check()
        checkpoints = None
        if folder is not None:
            checkpoints = open_checkpoints(stack, folder, about, output, resume, overwrite, say)
            kept.append(checkpoints.folder)
        stack.enter_context(deterministic_algorithms(job.config.deterministic))
        run = _trained(stack, job, images, labels, checkpoints, checkpoint_every, say, log)
        scores, failure = None, None
        try:
            scores = judged(job.model, judge, job.machine.device, say, log)
        except FastDFKDError as error:
            failure = error  # the network is finished: it is not lost to a damaged picture
        held_up = checkpoints.seconds if checkpoints is not None else 0.0
        report = _report(job, run, reading, scores, held_up, log.elapsed)
        report["settings_sha256"] = digest_of(about)
        if output is not None:
            with StagedDirectory(output, overwrite) as staged:
                write_bytes(staged / "metrics.jsonl", log.content())
                # No samples.png: these images are somebody's, and not the network's own.
                export_student(job.model, staged, teacher=None, report=report)
                difference = verify_export(staged, job.model, images[:COMPARED])
                report["export"] = {"largest_logit_difference": difference}
                write_json(staged / "report.json", report)
                say("the export was loaded back and gives the same logits")
        if checkpoints is not None:
            checkpoints.finish()
    if failure is not None:
        where = f" The network itself is whole, in {output}." if output is not None else ""
        raise type(failure)(f"{failure}{where}") from failure
    return TrainResult(job.model.module, Path(output) if output is not None else None, report)


def plan_train(
    model: Model,
    *,
    data_dir: str | Path | None = None,
    dataset: str | None = None,
    split: str | None = None,
    config: TrainingConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    amp: bool | None = None,
    workers: int = 0,
    eval_data: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str = "validation",
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> dict[str, Any]:
    """What :func:`train` would do with the same arguments, and what it would cost; no image is decoded but the first.

    Time comes from two timed steps on a copy of the network; it, and the steps, are None for a stream of images.
    """
    if output is not None:
        StagedDirectory(output, overwrite).check()
    say = on_message or silent
    job = _prepare(
        model, data_dir, dataset, split, config, overrides, num_classes, input_size, mean, std, device, amp, say
    )
    open_judge(eval_data, eval_dataset, eval_split, job.model)
    learned = steps = None
    if job.data.size is not None:
        learned = job.data.size - round(job.config.validation * job.data.size)
        steps = job.config.epochs * max(learned // job.config.batch_size, 1)
    seconds = _step_seconds(job, min(job.config.batch_size, learned or job.config.batch_size))
    about = job.model.describe()
    for name, measured in zip(("mean", "std"), job.measures, strict=True):
        if measured:  # of images that nobody has read yet
            about["input"][name] = None
    return {
        "model": {**about, **asdict(model_size(job.model.module, job.model.input.size))},
        "device": describe_device(job.machine.device),
        "amp": job.machine.amp,
        "output": str(output) if output is not None else None,
        "dataset": job.data.name,
        "split": job.data.split,
        "images": job.data.size,
        "images_learned": learned,
        "steps": steps,
        "pool_bytes": job.pool_bytes,
        "seconds": {
            "step": round(seconds, 4),
            "training": round(seconds * steps, 1) if steps is not None else None,
        },
        "config": asdict(job.config),
    }


def _prepare(
    model: Model,
    data_dir: str | Path | None,
    dataset: str | None,
    split: str | None,
    config: TrainingConfig | None,
    overrides: Mapping[str, Any] | None,
    num_classes: int | None,
    input_size: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    device: str,
    amp: bool | None,
    say: OnMessage,
) -> _Job:
    """Open and check everything that can be wrong before the images are read."""
    settings = from_values(overrides or {}, base=config)
    machine = Machine.choose(device, amp, say)
    if settings.deterministic and machine.device.type == "cuda" and settings.augmentation == "resized-crop-flip":
        raise UsageError("deterministic: use augmentation=crop-flip on CUDA, or run on the CPU.")
    usual = usual_size(model)
    data = open_training_data(data_dir=data_dir, dataset=dataset, split=split)
    classes = num_classes if num_classes is not None else len(data.class_names or ())
    if not classes:
        raise UsageError(f"{data.name} does not say what its classes are: give --num-classes N.")
    if classes < 2:
        raise UsageError(
            f"{data.name} has one class ({(data.class_names or ('',))[0]}): there is nothing to tell apart."
        )
    names = data.class_names if data.class_names is not None and len(data.class_names) == classes else None
    data = data.aligned(classes, names)
    size = _input_size(data, input_size, usual)
    spec = InputSpec(
        size=size, mean=_per_channel("mean", mean, size[0], 0.0), std=_per_channel("std", std, size[0], 1.0)
    )
    if not all(0 < each < float("inf") for each in spec.std):
        raise UsageError(f"--std must be above 0 in every channel, not {spec.std}.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # the same start for the same seed
        loaded = load_untrained(model, spec, classes, names)
    check_forward(loaded)
    job = _Job(machine, settings, data, loaded, (mean is None, std is None))
    count = "images as they come" if data.size is None else f"{data.size:,} images"
    say(f"{loaded.name}, input {'x'.join(map(str, size))}, on {count} of {classes} classes ({data.name})")
    _require_room(job)
    return job


def _input_size(
    data: EvaluationData, stated: tuple[int, int, int] | None, usual: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    if stated is not None:
        return stated
    first = picture_size(data)
    if first is not None and max(first[1:]) <= SMALL_IMAGE:
        return first
    if usual is None:
        seen = f", and the first picture is {first[2]} x {first[1]} pixels" if first is not None else ""
        raise UsageError(f"The network states no input size{seen}: give --input-size C H W.")
    return usual


def _per_channel(name: str, values: tuple[float, ...] | None, channels: int, neutral: float) -> tuple[float, ...]:
    values = (neutral,) if values is None else tuple(values)
    if len(values) not in (1, channels):
        raise UsageError(f"--{name} has {len(values)} values for {channels} channels: give one per channel, or one.")
    return values * channels if len(values) == 1 else values


def _require_room(job: _Job) -> None:
    """Refuse images that do not fit half of the memory that is free, before the first of them is read."""
    needed = job.pool_bytes
    if needed is None:
        return
    free = {"the device": job.machine.available_memory()}
    free["this machine"] = Machine(torch.device("cpu"), False).available_memory()
    for where, available in free.items():
        if needed > available // 2:
            raise UsageError(
                f"{job.data.size:,} images of {'x'.join(map(str, job.model.input.size))} take {needed / 2**30:.1f} "
                f"GiB, and {where} has {available / 2**30:.1f} GiB free, of which half may be taken: lower "
                "--input-size, or train on fewer images."
            )


def _read(job: _Job, workers: int, log: MetricsLog) -> tuple[Tensor, Tensor]:
    reading = Reading(job.data, job.model.input, job.model.num_classes, workers=workers)
    log.drain(reading)
    return reading.images, reading.labels


def _normalise(job: _Job, images: Tensor, say: OnMessage) -> None:
    """Put in the images' own mean and deviation, where none are stated."""
    if not any(job.measures):
        return
    mean, std = channel_statistics(images)
    spec = job.model.input
    job.model.input = replace(
        spec, mean=mean if job.measures[0] else spec.mean, std=std if job.measures[1] else spec.std
    )
    say(f"mean {job.model.input.mean}, deviation {job.model.input.std}, of images in 0 to 1")


def _identity(job: _Job, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Everything that decides what a run computes. It is only ever gone on with under the same one."""
    digest = hashlib.sha256(images.numpy().data)
    digest.update(labels.numpy().data)
    about = job.model.describe()
    return {
        "command": "train",
        "config": asdict(job.config),
        "model": {name: about[name] for name in ("name", "num_classes", "input")},
        "classes": list(job.model.class_names or ()),
        "amp": job.machine.amp,
        "data": {"images": len(images), "sha256": digest.hexdigest()},
    }


class _Keeper:
    """Saves a training at its borders: now and then, when it is asked to stop, and when it has ended."""

    def __init__(self, checkpoints: Checkpoints, run: Training, log: MetricsLog, every: float) -> None:
        self.checkpoints = checkpoints
        self.run = run
        self.log = log
        self.every = every
        self._due = time.perf_counter() + every

    def take_up(self) -> None:
        """Put the run and its metrics where the unfinished one was saved.

        Raises:
            UnavailableError: what it holds does not fit the run: somebody else wrote it.
        """
        latest = self.checkpoints.latest
        assert latest is not None
        try:
            elapsed = float(latest.values["elapsed"])
            if not 0 <= elapsed < 1e300:
                raise ValueError(f"its elapsed is {elapsed}")
            self.run.take_up(latest.tensors, latest.values["run"])
            self.log.restore(latest.tensors["metrics"].numpy().tobytes(), elapsed)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UnavailableError(
                f"Checkpoint {latest.number} in {latest.folder} does not fit this run ({error}): give --overwrite to "
                "begin anew."
            ) from error

    def at_border(self) -> None:
        """Save if it is time, or if the run is asked to stop; then stop it."""
        if stopping.asked():
            self.save(wait=True)
            stopping.raise_if_asked(
                f"{self.run.steps_taken:,} steps are kept in {self.checkpoints.folder}: the same command with "
                "--resume auto goes on"
            )
        elif self.every and time.perf_counter() >= self._due:
            self.save()

    def save(self, *, wait: bool = False) -> None:
        """Save the run as it stands, unless it is broken."""
        self.run.check()
        tensors, values = self.run.state()
        metrics = bytearray(self.log.content())
        tensors["metrics"] = torch.frombuffer(metrics, dtype=torch.uint8) if metrics else torch.empty(0).byte()
        self.checkpoints.save(tensors, {"run": values, "elapsed": self.log.elapsed}, {}, wait=wait)
        self._due = time.perf_counter() + max(self.every, self.checkpoints.last_cost / SHARE)


def _trained(
    stack: ExitStack,
    job: _Job,
    images: Tensor,
    labels: Tensor,
    checkpoints: Checkpoints | None,
    every: float,
    say: OnMessage,
    log: MetricsLog,
) -> Training:
    """The run that has ended."""
    device = job.machine.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Dropout and the like draw from the global state: it follows from the seed while the run lasts.
    stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
    torch.manual_seed(job.config.seed)
    net = job.machine.place(job.model)
    run = Training(job.config, net, images, labels, device=device, amp=job.machine.amp, say=say)
    keeper = None
    if checkpoints is not None:
        keeper = _Keeper(checkpoints, run, log, every)
        run.at_border = keeper.at_border
        if checkpoints.latest is not None:
            keeper.take_up()
            say(f"going on after {run.steps_taken:,} steps")
    with patiently() if keeper is not None else nullcontext():
        log.drain(run)
        if keeper is not None:
            keeper.save()
    return run


def _report(
    job: _Job, run: Training, reading: float, scores: dict[str, Any] | None, held_up: float, total: float
) -> dict[str, Any]:
    """Everything that a table or a plot needs, in plain values."""
    validation = None
    if run.validation_top1 is not None:
        validation = {"top1": round(run.validation_top1, 4), "n_samples": len(run.held_out)}
    return {
        "fastdfkd": __version__,
        "command": "train",
        "config": asdict(job.config),
        "model": {**job.model.describe(), **asdict(model_size(job.machine.place(job.model), job.model.input.size))},
        "device": describe_device(job.machine.device),
        "amp": job.machine.amp,
        "seconds": {
            "reading": round(reading, 2),
            "training": round(run.seconds, 2),
            "checkpoints": round(held_up, 2),
            "total": round(total, 2),
        },
        "images": len(run.learned),
        "data": {"path": job.data.name, "split": job.data.split, "synthetic": False},
        "steps": run.steps_taken,
        "retries": run.retries,
        "peak_memory_bytes": peak_memory(job.machine.device),
        "validation": validation,
        "evaluation": scores,
        "versions": versions(),
    }


def _step_seconds(job: _Job, batch_size: int) -> float:
    """Seconds of one step, timed on a copy of the network and on noise."""
    batch_size = max(batch_size, 2)
    device = job.machine.device
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, *job.model.input.size), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, job.model.num_classes, (batch_size,), generator=rng)
    settings = replace(job.config, batch_size=batch_size, validation=0.0)
    net = job.machine.place(replace(job.model, module=copy.deepcopy(job.model.module)))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = Training(settings, net, images, labels, device=device, amp=job.machine.amp)
        seconds = 0.0
        for _ in range(2):  # the first warms up
            run.step = 0
            began = time.perf_counter()
            run.learn()
            synchronize(device)
            seconds = time.perf_counter() - began
    return seconds


__all__ = ["TrainResult", "plan_train", "train"]
