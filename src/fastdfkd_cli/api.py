"""The Python API: what the commands call, for scripts and notebooks.

Each function takes model references or ``nn.Module`` objects, does one job and returns its result. Nothing is printed:
progress goes to ``on_record`` and remarks to ``on_message``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdfkd_cli import __version__, evaluation
from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.checkpoint import Checkpoints
from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.data import EvaluationData, open_evaluation_data
from fastdfkd_cli.data.files import ImageFile
from fastdfkd_cli.dataset import DatasetWriter, SyntheticSet, read_dataset
from fastdfkd_cli.dataset.parts import check_place, part_folder, part_header, parts_begun, unfinished, unite
from fastdfkd_cli.dataset.reader import check_channels, image_files, require_memory
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.distributed import (
    broadcast_,
    fingerprint,
    joined,
    require_same,
    sum_,
    text_of_leader,
)
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.export import export_student, load_exported, verify_export, write_samples
from fastdfkd_cli.job import (
    Job,
    Machine,
    Model,
    OnMessage,
    accelerated,
    begun_with,
    bounded_pool,
    copied,
    cost_line,
    divided,
    plan_of,
    prepare,
    silent,
    synthesis_plan_of,
    with_names,
)
from fastdfkd_cli.method_config import DFNDConfig
from fastdfkd_cli.methods import build_method, dfnd
from fastdfkd_cli.models import ModelOptions, check_forward, load_teacher
from fastdfkd_cli.output import StagedDirectory, named, write_bytes, write_json
from fastdfkd_cli.plan import model_size
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.processes import ALONE, Group, Part
from fastdfkd_cli.quality import Quality, QualitySignal
from fastdfkd_cli.records import MetricsLog, Record
from fastdfkd_cli.resume import (
    Keeper,
    Unfinished,
    digest_of,
    finished,
    folder_for,
    identity,
    noting,
    open_checkpoints,
)
from fastdfkd_cli.runtime import (
    describe_device,
    deterministic_algorithms,
    peak_memory,
    resolve_device,
    versions,
)
from fastdfkd_cli.settings import CHECKPOINT_EVERY
from fastdfkd_cli.stopping import patiently
from fastdfkd_cli.synced_norm import synced_batch_norm
from fastdfkd_cli.synthesis import Synthesis, header

OnRecord = Callable[[Record], None]
#: Images in samples.png, and on which the export is compared with the student that was trained.
SAMPLES = 80
#: Seconds between two remarks on how many images of an unlabelled set are scored.
SCORED_EVERY = 30.0


@dataclass(frozen=True)
class DistillResult:
    """What :func:`distill` gives back."""

    #: The trained student, in evaluation mode, taking normalised images.
    student: nn.Module
    #: The folder it was exported to; None without ``output``.
    path: Path | None
    #: What ``report.json`` holds; empty in ranks above 0.
    report: dict[str, Any]


@dataclass(frozen=True)
class SynthesizeResult:
    """What :func:`synthesize` gives back."""

    path: Path
    #: What ``manifest.json`` holds.
    manifest: dict[str, Any]


def distill(
    teacher: Model,
    student: Model,
    *,
    teacher_options: ModelOptions | None = None,
    student_options: ModelOptions | None = None,
    recipe: str = "auto",
    config: RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    unlabeled_dir: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    device: str = "auto",
    amp: bool | None = None,
    compile: bool = False,
    graphs: bool = False,
    eval_data: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str = "validation",
    group: Group = ALONE,
    fail: OnMessage | None = None,
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> DistillResult:
    """Train ``student`` from ``teacher`` alone (FastDFKD, Algorithm 1), and export it.

    Args:
        teacher: a model reference, or a module whose input size and class count ``teacher_options`` state.
            A module is copied and left as it is.
        student: the same; a module is trained in place.
        recipe: a recipe's name (see :mod:`fastdfkd_cli.recipes`).
        config: settings instead of a recipe.
        overrides: settings to put on either, by dotted key (``{"synthesis.steps": 2}``), and a budget: ``images`` or
            ``rounds``, which keep the shares of warm-up and final rounds.
        data_dir: distil on these synthetic images instead of making new ones.
        unlabeled_dir: what the method ``dfnd`` chooses its images from.
        output: the folder to export to; None for no export.
        overwrite: replace a folder that an earlier run left there, and the checkpoints of an unfinished one.
        resume: ``auto`` to go on with the run that did not get to write ``output``, if there is one; or a folder of
            checkpoints. An unfinished run is gone on with under its own settings or not at all. One that is complete
            in ``output``, under the same settings, gives its student and report again, without any work.
        checkpoint_every: seconds between two checkpoints, at least; 0: only when the run is asked to stop. They stand
            in ``OUTPUT.checkpoints`` until the run is complete; without ``output`` or ``resume`` there are none.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        amp: bf16 in the networks; None: where the device is made for it.
        compile: compile the networks' passes first (a minute or so); falls back, with a remark.
        graphs: replay a synthesised batch, and a KD step, as one CUDA graph; falls back, with a remark.
        eval_data, eval_dataset, eval_split: real images to judge the finished student on, once.
        group: of several processes, which one this is (:func:`fastdfkd_cli.processes.from_environment`). All of them
            call this with the same arguments; rank 0 alone judges, exports and writes, when the others have returned.
        fail: takes the last line of a process that hangs in a call which does not return, because another is lost.
        on_record: called with every :class:`~fastdfkd_cli.records.Record`.
        on_message: called with one-line remarks.

    Raises:
        UsageError: the request does not make sense.
        UnavailableError: a model or data set is not to be had.
        FastDFKDError: the run failed.
    """
    log = MetricsLog(on_record)
    say = on_message or silent
    kept: list[Path] = []
    with ExitStack() as stack:
        stack.enter_context(noting(kept))
        machine = Machine.choose(device, amp, say, group)
        together = stack.enter_context(ExitStack())
        together.enter_context(joined(group, machine.device, say=fail or silent))
        done = finished(output) if output is not None and group.leads and str(resume) == "auto" else None
        if output is not None and group.leads and done is None:
            StagedDirectory(output, overwrite).check()
        job = prepare(
            teacher,
            student,
            teacher_options or ModelOptions(),
            student_options or ModelOptions(),
            recipe,
            config,
            overrides,
            machine,
            say,
            trains=True,
            given=data_dir is not None,
            unlabelled=unlabeled_dir is not None,
        )
        assert job.student is not None
        judge = _open_judge(eval_data, eval_dataset, eval_split, job) if group.leads else None
        given = _read_given(data_dir, job) if unlabeled_dir is None else _choose(unlabeled_dir, job, say)
        about = identity(job.config, job.teacher, job.student, machine.amp, given)
        require_same(group, "settings", json.dumps(about, sort_keys=True, default=str))
        if done is not None and done["settings_sha256"] != digest_of(about):
            StagedDirectory(output or "", overwrite).check()  # refused, as any folder that holds something
            done = None
        if text_of_leader(group, "complete" if done is not None else ""):
            say("the run is complete: nothing is left to do")
            if done is not None:
                load_exported(Path(output or ""), job.student)
            return DistillResult(job.student.module, Path(output or "") if group.leads else None, done or {})
        folder = folder_for(output, resume)
        checkpoints = None
        if folder is not None and group.leads:
            checkpoints = open_checkpoints(stack, folder, about, output, resume, overwrite, say)
        if folder is not None:
            kept.append(checkpoints.folder if checkpoints is not None else folder)
        latest = Unfinished.told(group, checkpoints)
        stack.enter_context(deterministic_algorithms(job.config.deterministic))
        whole, parts = job.config, divided(job.config, group.world_size)
        job.config = parts
        if group.several:
            say(_shares_line(job, given))
            if latest is not None and latest.processes != group.world_size:
                say(f"the unfinished run had {latest.processes} process{'es' if latest.processes > 1 else ''}")
        if latest is None or latest.processes != group.world_size:
            wanted = on_message is not None and group.leads
            plan = plan_of(job, len(given) if given is not None else None) if wanted else None
            if plan is not None:
                say(cost_line(plan, job.config, group.world_size))
            if given is None:
                job.config = bounded_pool(job, say)
            plan = json.loads(text_of_leader(group, json.dumps(plan))) if group.several else plan
            acceleration = accelerated(job, plan, compiles=compile, graphs=graphs, say=say)
        else:
            # What was decided from the memory that was free then is kept to, so that the rest is the same.
            chosen = dict(latest.values["chosen"])
            job.config = replace(job.config, pool_size=chosen.pop("pool_size"))
            acceleration = accelerated(job, None, compiles=compile, graphs=graphs, say=say, **chosen)
        # Dropout and the like draw from the global state: it follows from the seed while the run lasts.
        cuda = [machine.device] if machine.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(group.seed(job.config.seed))
        keeper_of = None
        if folder is not None:
            keeper_of = _KeeperOf(checkpoints, latest, checkpoint_every)
        run, held = _distil(job, given, acceleration, keeper_of, say, log)
        together.close()  # what is left is rank 0's alone
        if not group.leads:
            return DistillResult(job.student.module, None, {})
        if job.config.pool_size == parts.pool_size:
            job.config = whole
        else:
            job.config = replace(whole, pool_size=job.config.pool_size * group.world_size)
        quality = _quality(job, log)
        scores, failure = None, None
        try:
            scores = _judge(job, judge, say, log)
        except FastDFKDError as error:
            failure = error  # the student is finished: it is not lost to a damaged picture
        held_up = checkpoints.seconds if checkpoints is not None else 0.0
        place = data_dir if unlabeled_dir is None else unlabeled_dir
        report = _report(job, run, given, place, quality, scores, held_up, held, log.elapsed)
        report["settings_sha256"] = digest_of(about)
        if output is not None:
            with StagedDirectory(output, overwrite) as staged:
                write_bytes(staged / "metrics.jsonl", log.content())
                _export(staged, job, run, report, say)
        if checkpoints is not None:
            checkpoints.finish()
    if failure is not None:
        where = f" The student itself is whole, in {output}." if output is not None else ""
        raise type(failure)(f"{failure}{where}") from failure
    return DistillResult(job.student.module, Path(output) if output is not None else None, report)


def _shares_line(job: Job, given: SyntheticSet | None) -> str:
    """What several processes do together, in one line."""
    several, config = job.machine.group.world_size, job.config
    parts = [f"{several} processes; a step is over {several} x {config.distillation.batch_size} images in distillation"]
    if given is None:
        parts.append(f"{several} x {config.synthesis.batch_size} in synthesis")
        if config.schedule.time_budget is None:
            parts.append(f"each process makes {config.synthetic_images:,} images")
    return ", ".join(parts)


@dataclass(frozen=True)
class _KeeperOf:
    """What a run's keeper is made of."""

    checkpoints: Checkpoints | None
    latest: Unfinished | None
    every: float

    def __call__(self, run: Distillation, log: MetricsLog, group: Group) -> Keeper:
        return Keeper(self.checkpoints, run, log, self.every, group)


def _distil(
    job: Job,
    given: SyntheticSet | None,
    acceleration: Acceleration,
    keeper_of: _KeeperOf | None,
    say: OnMessage,
    log: MetricsLog,
) -> tuple[Distillation, int]:
    """Synthesis and distillation: the run that has ended, and how many images all pools hold together."""
    assert job.student is not None
    device, group = job.machine.device, job.machine.group
    teacher, student = job.machine.place(job.teacher), job.machine.place(job.student)
    broadcast_(group, [*student.parameters(), *student.buffers()])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synthesizer, pool = None, None
    if given is None:
        synthesizer = build_method(job.config, teacher, acceleration=acceleration, group=group, **job.keywords())
    else:
        if len(given.images) < group.world_size:
            raise UsageError(f"{len(given.images)} images cannot be divided among {group.world_size} processes.")
        mine = slice(group.rank, None, group.world_size)
        pool = ImagePool.holding(given.images[mine], given.labels[mine], device)
    try:
        with synced_batch_norm(student, group):
            run = Distillation(
                job.config,
                teacher,
                student,
                synthesizer=synthesizer,
                image_size=job.size,
                device=device,
                amp=job.machine.amp,
                pool=pool,
                acceleration=acceleration,
                group=group,
            )
            keeper = keeper_of(run, log, group) if keeper_of is not None else None
            if keeper_of is not None and keeper is not None:
                run.at_border = keeper.at_border
                if keeper_of.latest is not None:
                    keeper.take_up(keeper_of.latest)
                    say(f"going on after {run.images_made:,} images and {run.steps_taken:,} KD steps")
            run.prepare()
            with patiently() if keeper is not None else nullcontext():
                log.drain(run)
                if keeper is not None:
                    keeper.end()
        require_same(group, "student in the end", fingerprint(student.state_dict().values()) if group.several else "")
    finally:
        if synthesizer is not None:
            synthesizer.close()
    held = torch.tensor(len(run.pool))
    sum_(group, [held])
    return run, int(held)


def _quality(job: Job, log: MetricsLog) -> Quality | None:
    """The quality signal, where it is wanted."""
    if not job.config.quality_images:
        return None
    assert job.student is not None
    signal = QualitySignal(job.config, job.machine.place(job.teacher), job.machine.place(job.student), **job.keywords())
    log.drain(signal)
    return signal.result


def _read_given(data_dir: str | Path | None, job: Job) -> SyntheticSet | None:
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


def _candidates(unlabeled_dir: str | Path, job: Job) -> tuple[list[ImageFile], int]:
    """What a method chooses its images from, and how many it keeps."""
    check_channels(job.size)
    files = image_files(unlabeled_dir, "--unlabeled-dir")
    method = job.config.synthesis
    assert isinstance(method, DFNDConfig)
    kept = min(method.images_kept, len(files))
    hint = " Keep fewer of them: synthesis.images_kept."
    require_memory(Path(unlabeled_dir), kept, job.size, "--unlabeled-dir", hint)
    return files, kept


def _choose(unlabeled_dir: str | Path, job: Job, say: OnMessage) -> SyntheticSet:
    """The images that the method keeps of an unlabelled set, with the teacher's answers."""
    files, kept = _candidates(unlabeled_dir, job)
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


def _open_judge(eval_data: str | None, eval_dataset: str | None, eval_split: str, job: Job) -> EvaluationData | None:
    """Open the real images before the run, so that a typing error does not show after it."""
    if eval_data is None and eval_dataset is None:
        return None
    assert job.student is not None
    data = open_evaluation_data(data_dir=eval_data, dataset=eval_dataset, split=eval_split)
    return data.aligned(job.student.num_classes, job.student.class_names)


def _judge(job: Job, data: EvaluationData | None, say: OnMessage, log: MetricsLog) -> dict[str, Any] | None:
    if data is None:
        return None
    assert job.student is not None
    result = evaluation.drain(
        evaluation.evaluate_model(job.student, data, teacher=job.teacher, device=job.machine.device), log
    )
    for note in result.notes:
        say(note)
    return result.row


def _report(
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


def _export(folder: Path, job: Job, run: Distillation, report: dict[str, Any], say: OnMessage) -> None:
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


def synthesize(
    teacher: Model,
    *,
    num_images: int,
    output: str | Path,
    student: Model | None = None,
    teacher_options: ModelOptions | None = None,
    student_options: ModelOptions | None = None,
    recipe: str = "auto",
    config: RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    shard_size: int = 1000,
    part: Part | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    device: str = "auto",
    amp: bool | None = None,
    compile: bool = False,
    graphs: bool = False,
    group: Group = ALONE,
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> SynthesizeResult:
    """Make a labelled synthetic data set from ``teacher``: see :mod:`fastdfkd_cli.dataset` for the folder's layout.

    Args:
        num_images: how many, over all parts.
        output: the folder.
        student: a model for the adversarial term to play against; without one, the term is off.
        resume: go on with an unfinished set in ``output``, made with the same settings.
        overwrite: replace a folder that an earlier run left there; not with parts.
        shard_size: images per tar file.
        part: make this part of the set alone, with a generator of its own. Whoever completes the last one puts all
            together in ``output``.
        checkpoint_every: seconds between two times that images of no whole shard are saved too, at least; 0: only when
            the run is asked to stop.
        group: of several processes, which one this is: each makes a part, or several, one after the other, of a set
            that was begun in more. Rank 0 returns when the set is whole.
        others: as in :func:`distill`.

    Raises:
        As :func:`distill`.
    """
    say = on_message or silent
    mine = _parts_to_make(num_images, output, part, group, resume=resume, overwrite=overwrite)
    job = prepare(
        teacher,
        student,
        teacher_options or ModelOptions(),
        student_options or ModelOptions(),
        recipe,
        config,
        overrides,
        Machine.choose(device, amp, say, group).apart(),
        say,
        trains=False,
    )
    run = _SetMaker(job, num_images, Path(output), resume, overwrite, shard_size, checkpoint_every, compile, graphs)
    if mine is None:
        return SynthesizeResult(Path(output), run.make(None, Path(output), on_record, on_message))
    count, numbers = mine
    if len(numbers) != 1 or group.several:
        say(f"of {count} parts, this process makes {named([str(number) for number in numbers]) or 'none'}")
    manifest: dict[str, Any] = {}
    folder = Path(output)
    for number in numbers:
        if (united := run.united(count)) is not None:
            return SynthesizeResult(Path(output), united)
        if number in unfinished(output, count):
            folder = part_folder(output, Part(number, count))
            manifest = run.make(Part(number, count), folder, on_record, on_message)
    while (united := run.united(count)) is None:
        left = [str(number) for number in unfinished(output, count)]
        if left and not (group.several and group.leads):
            say(f"not complete yet: part{'s' if len(left) > 1 else ''} {named(left)}; the last puts all together")
            return SynthesizeResult(folder, manifest)
        time.sleep(1.0)  # if another process fails, torchrun ends this one
    return SynthesizeResult(Path(output), united)


def _parts_to_make(
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
class _SetMaker:
    """What :func:`synthesize` was asked for, for each part."""

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


def evaluate(
    model: Model,
    *,
    data_dir: str | Path | None = None,
    dataset: str | None = None,
    split: str = "validation",
    options: ModelOptions | None = None,
    teacher: Model | None = None,
    teacher_options: ModelOptions | None = None,
    batch_size: int = 128,
    workers: int = 0,
    img_size: int | None = None,
    crop_pct: float | None = None,
    device: str = "auto",
    amp: bool = False,
    amp_dtype: str = "bfloat16",
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> dict[str, Any]:
    """Judge ``model`` on real images, with timm's validate.py's keys; ``teacher`` beside it adds their agreement.

    See :func:`fastdfkd_cli.evaluation.evaluate_model` and :func:`fastdfkd_cli.data.open_evaluation_data`.
    """
    say = on_message or silent
    data = open_evaluation_data(data_dir=data_dir, dataset=dataset, split=split)
    machine_device = resolve_device(device)
    loaded = load_teacher(copied(model), options or ModelOptions(), role="model")
    check_forward(loaded)
    beside = None
    if teacher is not None:
        beside = load_teacher(copied(teacher), teacher_options or ModelOptions())
        check_forward(beside)
    result = evaluation.drain(
        evaluation.evaluate_model(
            loaded,
            data,
            teacher=beside,
            batch_size=batch_size,
            workers=workers,
            img_size=img_size,
            crop_pct=crop_pct,
            device=machine_device,
            amp=amp,
            amp_dtype=amp_dtype,
        ),
        on_record,
    )
    for note in result.notes:
        say(note)
    return result.row


def plan_distill(
    teacher: Model,
    student: Model,
    *,
    teacher_options: ModelOptions | None = None,
    student_options: ModelOptions | None = None,
    recipe: str = "auto",
    config: RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
    unlabeled_dir: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    amp: bool | None = None,
    eval_data: str | None = None,
    eval_dataset: str | None = None,
    eval_split: str = "validation",
    group: Group = ALONE,
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> dict[str, Any]:
    """What :func:`distill` would do with the same arguments, and what it would cost; nothing is written.

    With several processes, rank 0 alone answers: for each of them, but for ``synthetic_images``, which all make.
    """
    say = on_message or silent
    if output is not None:
        StagedDirectory(output, overwrite).check()
    job = prepare(
        teacher,
        student,
        teacher_options or ModelOptions(),
        student_options or ModelOptions(),
        recipe,
        config,
        overrides,
        replace(Machine.choose(device, amp, say, group), group=ALONE),
        say,
        trains=True,
        given=data_dir is not None,
        unlabelled=unlabeled_dir is not None,
    )
    assert job.student is not None
    _open_judge(eval_data, eval_dataset, eval_split, job)
    pool_images: int | None
    if unlabeled_dir is not None:
        pool_images = _candidates(unlabeled_dir, job)[1]  # which ones makes no difference to the costs
    else:
        given = _read_given(data_dir, job)
        pool_images = len(given) if given is not None else None
    whole, job.config = job.config, divided(job.config, group.world_size)
    plan = plan_of(job, pool_images)
    job.config = whole
    if pool_images is None:
        plan["synthetic_images"] *= group.world_size
    plan["processes"] = group.world_size
    return with_names(plan, job, output)


def plan_synthesize(
    teacher: Model,
    *,
    num_images: int,
    output: str | Path,
    student: Model | None = None,
    teacher_options: ModelOptions | None = None,
    student_options: ModelOptions | None = None,
    recipe: str = "auto",
    config: RunConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    shard_size: int = 1000,
    part: Part | None = None,
    device: str = "auto",
    amp: bool | None = None,
    group: Group = ALONE,
    on_record: OnRecord | None = None,
    on_message: OnMessage | None = None,
) -> dict[str, Any]:
    """What :func:`synthesize` would do with the same arguments, and what it would cost; nothing is written.

    Of a set in parts, this process's, or the one that is named.
    """
    say = on_message or silent
    mine = _parts_to_make(num_images, output, part, group, resume=resume, overwrite=overwrite)
    if not resume and mine is None:
        StagedDirectory(output, overwrite).check()
    job = prepare(
        teacher,
        student,
        teacher_options or ModelOptions(),
        student_options or ModelOptions(),
        recipe,
        config,
        overrides,
        Machine.choose(device, amp, say, group).apart(),
        say,
        trains=False,
    )
    opponent = job.machine.place(job.student) if job.student is not None else None
    count, numbers = mine or (1, [1])
    lengths = [len(Part(number, count).range(num_images)) for number in numbers]
    plan = synthesis_plan_of(job, job.machine.place(job.teacher), opponent, sum(lengths))
    plan["shards"] = sum(-(-length // shard_size) for length in lengths)
    plan["parts"] = [str(Part(number, count)) for number in numbers]
    return with_names(plan, job, output)


__all__ = [
    "DistillResult",
    "SynthesizeResult",
    "distill",
    "evaluate",
    "plan_distill",
    "plan_synthesize",
    "synthesize",
]
