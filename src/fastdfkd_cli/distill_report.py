"""What a distillation leaves: the quality signal, the report, and the student's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdfkd_cli import __version__
from fastdfkd_cli.config import to_dict
from fastdfkd_cli.dataset import SyntheticSet
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.export import export_student, verify_export, write_samples
from fastdfkd_cli.job import Job, OnMessage
from fastdfkd_cli.output import write_json
from fastdfkd_cli.plan import model_size
from fastdfkd_cli.quality import Quality, QualitySignal
from fastdfkd_cli.records import MetricsLog
from fastdfkd_cli.runtime import describe_device, peak_memory, versions

#: Images in samples.png, and on which the export is compared with the student that was trained.
SAMPLES = 80


def quality_signal(job: Job, log: MetricsLog) -> Quality | None:
    """The quality signal, where it is wanted."""
    if not job.config.quality_images:
        return None
    assert job.student is not None
    signal = QualitySignal(
        job.config,
        job.machine.place(job.teacher),
        job.machine.place(job.student),
        teacher_facts=None if job.teacher.weights_sha256 is None else job.teacher.describe(),
        **job.keywords(),
    )
    log.drain(signal)
    return signal.result


def report_of(
    job: Job,
    run: Distillation,
    given: SyntheticSet | None,
    data_dir: str | Path | None,
    quality: Quality | None,
    scores: dict[str, Any] | None,
    held_up: float,
    held: int,
    total: float,
) -> dict[str, Any]:
    """Everything that a table or a plot needs, in plain values.

    Args:
        held: images in the pools of all processes.
        held_up: seconds that the run waited for its checkpoints, which are part of synthesis and distillation.
        total: seconds of the whole run.
    """
    assert job.student is not None
    synthesis, distillation = run.costs.synthesis, run.costs.distillation
    return {
        "fastdfkd": __version__,
        "config": to_dict(job.config),
        "teacher": {**job.teacher.describe(), **vars(model_size(job.machine.place(job.teacher), job.size))},
        "student": {**job.student.describe(), **vars(model_size(job.machine.place(job.student), job.size))},
        "device": describe_device(job.machine.device),
        "amp": job.machine.amp,
        "processes": job.machine.group.world_size,
        "global_batch": {
            "synthesis": job.config.synthesis.batch_size * job.machine.group.world_size,
            "distillation": job.config.distillation.batch_size * job.machine.group.world_size,
        },
        "seconds": {
            "synthesis": round(synthesis, 2),
            "distillation": round(distillation, 2),
            "checkpoints": round(held_up, 2),
            "other": round(total - synthesis - distillation, 2),
            "total": round(total, 2),
        },
        "images": run.images_made if given is None else len(given.images),
        "data": _data(given, data_dir),
        "pool": held,
        "kd_steps": run.steps_taken,
        "retries": run.retries,
        "peak_memory_bytes": peak_memory(job.machine.device),
        "quality": quality.to_dict() if quality is not None else None,
        "evaluation": scores,
        "versions": versions(),
    }


def _data(given: SyntheticSet | None, data_dir: str | Path | None) -> dict[str, Any] | None:
    """Where the images came from; None for a run that made its own."""
    if given is None:
        return None
    made_by = given.manifest["header"] if given.manifest is not None else None
    about = {"path": str(data_dir), "synthetic": given.manifest is not None, "header": made_by}
    return about if given.candidates is None else {**about, "candidates": given.candidates}


def export(folder: Path, job: Job, run: Distillation, report: dict[str, Any], say: OnMessage) -> None:
    """Write the student's folder, then open it as a stranger would and compare."""
    assert job.student is not None
    count = min(SAMPLES, len(run.pool))
    # The latest images: what the teacher "remembers" once the generator has learned to ask.
    newest = (torch.arange(run.pool.newest - count, run.pool.newest) % len(run.pool)).to(run.pool.images.device)
    images, labels = run.pool.images[newest].cpu(), run.pool.labels[newest].cpu()
    export_student(job.student, folder, teacher=job.teacher, report=report)
    difference = verify_export(folder, job.student, images)
    report["export"] = {"largest_logit_difference": difference}
    write_samples(folder / "samples.png", images, labels, job.teacher.class_names)
    write_json(folder / "report.json", report)
    say("the export was loaded back and gives the same logits")


__all__ = ["export", "quality_signal", "report_of"]
