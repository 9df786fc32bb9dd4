"""A synthetic data set made from a job: in one piece, or in parts that several processes share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdfkd_cli.dataset import DatasetWriter
from fastdfkd_cli.dataset.parts import check_place, part_header, parts_begun, unite
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import Job, OnMessage, OnRecord, accelerated, begun_with, silent, synthesis_plan_of
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.processes import Group, Part
from fastdfkd_cli.runtime import deterministic_algorithms
from fastdfkd_cli.stopping import patiently
from fastdfkd_cli.synthesis import Synthesis, header


def parts_to_make(
    num_images: int, output: str | Path, part: Part | None, group: Group, *, resume: bool, overwrite: bool
) -> tuple[int, list[int]] | None:
    """How many parts the set has, and which of them this process makes; None for a set in one piece.

    Raises:
        UsageError: no such set can be made there.
    """
    if num_images < 1:
        raise UsageError(f"num_images must be 1 or more, not {num_images}.")
    if resume and overwrite:
        raise UsageError("resume and overwrite exclude each other.")
    if part is not None and group.several:
        raise UsageError("Each of several processes takes parts of its own: leave --part out under torchrun.")
    # A set that was begun by another number of processes keeps its parts.
    count = parts_begun(output) if resume and part is None else None
    if count is None:
        count = part.count if part is not None else group.world_size
        if part is None and not group.several:
            return None
    if overwrite:
        raise UsageError(
            "A set in parts replaces nothing: leave --overwrite out, and remove the folder or take another."
        )
    if num_images < count:
        raise UsageError(f"{num_images} images cannot be divided into {count} parts.")
    numbers = [part.number] if part is not None else list(range(group.rank + 1, count + 1, group.world_size))
    check_place(output, count, numbers, resume=resume)
    return count, numbers


@dataclass(frozen=True)
class SetMaker:
    """What :func:`fastdfkd_cli.synthesize` was asked for, for each part."""

    job: Job
    num_images: int
    output: Path
    resume: bool
    overwrite: bool
    shard_size: int
    checkpoint_every: float
    compile: bool
    graphs: bool

    def _settings(self) -> dict[str, Any]:
        """What decides what the images are, as the writer takes it."""
        job = self.job
        student = job.student.describe() if job.student is not None else None
        return {
            "class_names": job.teacher.class_names,
            "num_classes": job.teacher.num_classes,
            "input_size": job.size,
            "shard_size": self.shard_size,
            "header": header(job.config, job.teacher.describe(), student, job.machine.amp),
        }

    def united(self, count: int) -> dict[str, Any] | None:
        """The manifest of the whole set, once all its parts are complete."""
        return unite(self.output, count, self.num_images, **self._settings())

    def make(
        self, part: Part | None, folder: Path, on_record: OnRecord | None, on_message: OnMessage | None
    ) -> dict[str, Any]:
        """Make the set, or a part of it, in ``folder``; returns its manifest."""
        job, say = self.job, on_message or silent
        images = part.range(self.num_images) if part is not None else range(self.num_images)
        net = job.machine.place(job.teacher)
        opponent = job.machine.place(job.student) if job.student is not None else None
        begun = begun_with(folder) if self.resume else None
        # A set that was begun is gone on with as it was, whatever memory is free now.
        plan = synthesis_plan_of(job, net, opponent, len(images)) if begun is None and on_message is not None else None
        acceleration = accelerated(
            job, plan, compiles=self.compile, graphs=self.graphs, say=say, micro_batch=begun or 0
        )
        seed = part.seed(job.config.seed) if part is not None else None
        method = build_method(job.config, net, seed=seed, acceleration=acceleration, **job.keywords())
        settings = self._settings()
        if acceleration.micro_batch:
            settings["header"]["micro_batch"] = acceleration.micro_batch
        if part is not None:
            settings["header"] |= part_header(part, self.num_images)
        with ExitStack() as stack:
            stack.callback(method.close)
            stack.enter_context(deterministic_algorithms(job.config.deterministic))
            writer = stack.enter_context(
                DatasetWriter(
                    folder, **settings, first_image=images.start, resume=self.resume, overwrite=self.overwrite
                )
            )
            if writer.num_images:
                say(f"going on after {writer.num_images} images")
            method.prepare(opponent)
            run = Synthesis(
                job.config,
                method,
                net,
                opponent,
                writer=writer,
                num_images=len(images),
                device=job.machine.device,
                checkpoint_every=self.checkpoint_every,
            )
            with patiently():
                for record in run:
                    if on_record is not None:
                        on_record(record)
        return run.manifest


__all__ = ["SetMaker", "parts_to_make"]
