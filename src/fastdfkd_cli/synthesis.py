"""The engine behind ``fastdfkd synthesize``: a labelled synthetic data set as a thing of its own.

A new generator's first batches look like noise. A distillation run learns from them all the same (the paper's pool
holds every batch); a data set is better without them, so as many batches as the recipe's warm-up are made and thrown
away before the first image is kept.

The loop asks the device for nothing: images, logits, state and whether they are numbers go to the writer's thread,
which looks at them before it stores any. Only a record, once a second, waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdfkd_cli import __version__, stopping
from fastdfkd_cli.background import HostCopy
from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.dataset import DatasetWriter, load_manifest
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.methods import Synthesizer
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.records import Record
from fastdfkd_cli.runtime import describe_device, versions

#: Seconds between two records.
RECORD_EVERY = 1.0


def burn_in_batches(config: RunConfig) -> int:
    """Batches that are made and thrown away first: the recipe's warm-up, or what the method asks for."""
    return config.schedule.warmup_rounds * config.schedule.batches_per_round or config.synthesis.burn_in


def header(
    config: RunConfig, teacher: Mapping[str, Any], student: Mapping[str, Any] | None, amp: bool
) -> dict[str, Any]:
    """Everything that decides what the images are. A set is only ever continued under the same one."""
    settings = to_dict(config)
    # The student's training and the run's length do not touch a single image of a set.
    for name in ("distillation", "pool_size", "quality_images", "quality_steps"):
        del settings[name]
    settings["schedule"] = {"burn_in_batches": burn_in_batches(config)}

    def identity(model: Mapping[str, Any]) -> dict[str, Any]:
        return {name: model[name] for name in ("name", "revision", "weights_sha256", "num_classes", "input")}

    return {
        "config": settings,
        "teacher": identity(teacher),
        "student": identity(student) if student is not None else None,
        "amp": amp,
    }


class Synthesis:
    """One run that fills a folder; iterate to carry it out, then read :attr:`manifest`.

    The state of the method goes into the folder with every shard, so that a stopped run goes on exactly where its last
    whole shard ended.

    Args:
        config: the run's settings.
        method: makes the images.
        teacher: frozen; images in [0, 1] -> logits. Its logits for each stored image are stored beside it.
        student: for the adversarial term, or None.
        writer: the folder, new or taken up again.
        num_images: images that the folder shall hold at the end.
        checkpoint_every: seconds between two times that what belongs to no whole shard is saved; 0: only when the run
            is asked to stop.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Synthesizer,
        teacher: nn.Module,
        student: nn.Module | None,
        *,
        writer: DatasetWriter,
        num_images: int,
        device: torch.device,
        checkpoint_every: float = 0.0,
    ) -> None:
        self.config = config
        self.method = method
        self.teacher = teacher
        self.student = student
        self.writer = writer
        self.num_images = num_images
        self.device = device
        self.checkpoint_every = checkpoint_every
        self._due = time.perf_counter() + checkpoint_every
        self.manifest: dict[str, Any] = {}
        self._burned = 0
        #: Batches that nobody has looked at: images before each, and which of its loss terms and logits are finite.
        self._unseen: list[tuple[int, Tensor]] = []
        self._terms: tuple[str, ...] = ()
        if writer.state is not None:
            self.method.load_state_dict(writer.state.tensors)
            self._burned = int(writer.state.values["burned"])
        self._burned_before = self._burned

    def __iter__(self) -> Iterator[Record]:
        started = reported = time.perf_counter()
        made_before = self.writer.num_images
        if self.writer.complete and made_before >= self.num_images:
            # Nothing to do: the folder holds what was asked for, and stays as it is.
            self.writer.release()
            self.manifest = load_manifest(self.writer.directory)
            return
        burn_in = burn_in_batches(self.config)
        while self.writer.num_images < self.num_images:
            batch = self.method.synthesize(self.student)
            if self._burned < burn_in:
                self._watch(batch.losses)
                self._burned += 1
            else:
                room = self.num_images - self.writer.num_images
                images = batch.images[:room]
                logits = self._soft_labels(images)
                self._watch(batch.losses, logits)
                self.writer.add(images, batch.labels[:room], logits)
                if self.writer.full:
                    self._flush()
            now = time.perf_counter()
            if stopping.asked():
                self._stop()
            if self.checkpoint_every and now >= self._due:
                self._flush()
            if now - reported >= RECORD_EVERY:
                reported = now
                self._check()()
                values = torch.stack(list(batch.losses.values())).tolist()
                yield self._record(made_before, now - started, dict(zip(batch.losses, values, strict=True)))
        seconds = time.perf_counter() - started
        summary = {
            "fastdfkd": __version__,
            "device": describe_device(self.device),
            "seconds": round(seconds, 2),
            "images_this_run": self.writer.num_images - made_before,
            "versions": versions(),
        }
        self.manifest = self.writer.close(state=self._state(), check=self._check(), summary=summary)
        yield self._record(made_before, seconds, {})

    def _flush(self) -> None:
        """Have whole shards written, and with them, or without any, from where to go on."""
        self.writer.flush_shard(state=self._state(), check=self._check())
        self._due = time.perf_counter() + self.checkpoint_every

    def _stop(self) -> None:
        """Keep what there is, and end the run as a signal has asked for."""
        self._flush()
        self.writer.wait()
        made, folder = self.writer.num_images, self.writer.directory
        if self.writer.replaces:
            stopping.raise_if_asked(f"no shard was whole yet, and the earlier set stays in {folder}")
        stopping.raise_if_asked(f"{made:,} images are kept in {folder}: the same command with --resume goes on")

    def _watch(self, losses: Mapping[str, Tensor], logits: Tensor | None = None) -> None:
        """Have the device note whether a batch's figures are numbers; :meth:`_check` reads the note.

        Pixels that are not numbers are rounded to some grey, so the images alone would not tell.
        """
        self._terms = tuple(losses)
        finite = [torch.isfinite(value) for value in losses.values()]
        finite.append(torch.ones_like(finite[0]) if logits is None else torch.isfinite(logits).all())
        self._unseen.append((self.writer.num_images, torch.stack(finite)))

    def _check(self) -> Callable[[], None]:
        """Return what raises a FastDFKDError if a batch since the last check was broken."""
        if not self._unseen:
            return lambda: None
        counts = [count for count, _ in self._unseen]
        notes = HostCopy.of(torch.stack([note for _, note in self._unseen]))
        self._unseen = []
        return partial(_require_finite, counts, self._terms, notes)

    @torch.no_grad()
    def _soft_labels(self, images: Tensor) -> Tensor:
        """The teacher's logits for the images as they are stored: rounded, not augmented, in float32."""
        return self.teacher(to_float(images)).float()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.method.state_dict(), {"burned": self._burned}

    def _record(self, made_before: int, elapsed: float, values: dict[str, float]) -> Record:
        made = self.writer.num_images
        batch = self.config.synthesis.batch_size
        todo = max(burn_in_batches(self.config) - self._burned, 0) * batch + self.num_images - made
        done = made - made_before + (self._burned - self._burned_before) * batch
        rate = done / elapsed if elapsed > 0 else None
        return Record(
            phase="synthesis",
            step=made,
            total=self.num_images,
            unit="images",
            progress=done / (done + todo) if done + todo else 1.0,
            elapsed=elapsed,
            remaining=todo / rate if rate else None,
            rate=rate,
            values=values,
        )


def _require_finite(counts: Sequence[int], terms: Sequence[str], notes: HostCopy) -> None:
    """End the run at the first batch of which a loss term, or else the teacher's logits, were not finite."""
    (rows,) = notes.wait()
    for count, (*of_terms, of_logits) in zip(counts, rows.tolist(), strict=True):
        broken = ", ".join(name for name, finite in zip(terms, of_terms, strict=True) if not finite)
        if broken:
            raise FastDFKDError(
                f"The synthesis loss stopped being finite after {count} images ({broken}). "
                "Lower synthesis.lr_generator, or use --no-amp."
            )
        if not of_logits:
            raise FastDFKDError("The teacher's outputs stopped being finite; lower synthesis.lr_generator.")


__all__ = ["Synthesis", "burn_in_batches", "header"]
