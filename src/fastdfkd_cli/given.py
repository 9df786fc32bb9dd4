"""Images that a distillation is given instead of making them: a set, or what DFND keeps of an unlabelled one."""

from __future__ import annotations

import math
import time
from pathlib import Path

from fastdfkd_cli.data.files import ImageFile
from fastdfkd_cli.dataset import SyntheticSet, read_dataset
from fastdfkd_cli.dataset.reader import check_channels, image_files, require_memory
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import Job, OnMessage
from fastdfkd_cli.method_config import DFNDConfig
from fastdfkd_cli.methods import dfnd

#: Seconds between two remarks on how many images of an unlabelled set are scored.
SCORED_EVERY = 30.0


def read_given(data_dir: str | Path | None, job: Job) -> SyntheticSet | None:
    """The images of ``data_dir`` in the teacher's input size; None where there is none.

    Raises:
        As :func:`fastdfkd_cli.dataset.read_dataset`, and UsageError where they belong to another teacher.
    """
    if data_dir is None:
        return None
    given = read_dataset(data_dir, input_size=job.size, interpolation=job.teacher.input.interpolation)
    classes = len(given.class_folders)
    if given.manifest is not None and classes != job.teacher.num_classes:
        raise UsageError(
            f"--data-dir {data_dir} has {classes} classes and the teacher {job.teacher.name} "
            f"{job.teacher.num_classes}: they do not belong together."
        )
    return given


def candidates(unlabeled_dir: str | Path, job: Job) -> tuple[list[ImageFile], int]:
    """What a method chooses its images from, and how many it keeps."""
    check_channels(job.size)
    files = image_files(unlabeled_dir, "--unlabeled-dir")
    method = job.config.synthesis
    assert isinstance(method, DFNDConfig)
    kept = min(method.images_kept, len(files))
    hint = " Keep fewer of them: synthesis.images_kept."
    require_memory(Path(unlabeled_dir), kept, job.size, "--unlabeled-dir", hint)
    return files, kept


def choose(unlabeled_dir: str | Path, job: Job, say: OnMessage) -> SyntheticSet:
    """The images that the method keeps of an unlabelled set, with the teacher's answers."""
    files, kept = candidates(unlabeled_dir, job)
    say(f"the teacher scores {len(files):,} images of {unlabeled_dir}")
    said = time.monotonic()

    def scored(count: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SCORED_EVERY:
            said = time.monotonic()
            say(f"{count:,} of {len(files):,} images are scored")

    chosen = dfnd.choose(
        job.machine.place(job.teacher),
        files,
        keep=kept,
        image_size=job.size,
        interpolation=job.teacher.input.interpolation,
        batch_size=job.config.synthesis.batch_size,
        device=job.machine.device,
        on_scored=scored,
    )
    least = math.exp(-float(chosen.scores.max()))
    say(f"{kept:,} of {len(files):,} images are kept; the teacher is {least:.1%} sure of them at least")
    return SyntheticSet(chosen.images, chosen.labels, None, None, (), candidates=len(files))


__all__ = ["candidates", "choose", "read_given"]
