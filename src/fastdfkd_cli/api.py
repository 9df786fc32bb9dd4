"""The Python API: what the commands call, for scripts and notebooks.

Each function takes model references or ``nn.Module`` objects, does one job and returns its result. Nothing is printed:
progress goes to ``on_record`` and remarks to ``on_message``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdfkd_cli import evaluation
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.data import open_evaluation_data
from fastdfkd_cli.dataset.parts import part_folder, unfinished
from fastdfkd_cli.distill_report import export, quality_signal, report_of
from fastdfkd_cli.distill_run import KeeperOf, distil, settled, shares_line
from fastdfkd_cli.distributed import joined, require_same, text_of_leader
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.export import load_exported
from fastdfkd_cli.given import candidates, choose, read_given
from fastdfkd_cli.job import (
    Machine,
    Model,
    OnMessage,
    OnRecord,
    copied,
    divided,
    plan_of,
    prepare,
    silent,
    synthesis_plan_of,
    with_names,
)
from fastdfkd_cli.judging import judged, open_judge
from fastdfkd_cli.models import ModelOptions, check_forward, load_teacher
from fastdfkd_cli.output import StagedDirectory, named, write_bytes
from fastdfkd_cli.processes import ALONE, Group, Part
from fastdfkd_cli.records import MetricsLog
from fastdfkd_cli.resume import Unfinished, digest_of, finished, folder_for, identity, noting, open_checkpoints
from fastdfkd_cli.runtime import deterministic_algorithms, resolve_device
from fastdfkd_cli.set_maker import SetMaker, parts_to_make
from fastdfkd_cli.settings import CHECKPOINT_EVERY


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
            teacher_options,
            student_options,
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
        judge = open_judge(eval_data, eval_dataset, eval_split, job.student) if group.leads else None
        given = read_given(data_dir, job) if unlabeled_dir is None else choose(unlabeled_dir, job, say)
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
            say(shares_line(job, given))
            if latest is not None and latest.processes != group.world_size:
                say(f"the unfinished run had {latest.processes} process{'es' if latest.processes > 1 else ''}")
        plans = on_message is not None
        acceleration = settled(job, given, latest, compiles=compile, graphs=graphs, plans=plans, say=say)
        # Dropout and the like draw from the global state: it follows from the seed while the run lasts.
        cuda = [machine.device] if machine.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        torch.manual_seed(group.seed(job.config.seed))
        keeper_of = None
        if folder is not None:
            keeper_of = KeeperOf(checkpoints, latest, checkpoint_every)
        run, held = distil(job, given, acceleration, keeper_of, say, log)
        together.close()  # what is left is rank 0's alone
        if not group.leads:
            return DistillResult(job.student.module, None, {})
        if job.config.pool_size == parts.pool_size:
            job.config = whole
        else:
            job.config = replace(whole, pool_size=job.config.pool_size * group.world_size)
        quality = quality_signal(job, log)
        scores, failure = None, None
        try:
            scores = judged(job.student, judge, machine.device, say, log, teacher=job.teacher)
        except FastDFKDError as error:
            failure = error  # the student is finished: it is not lost to a damaged picture
        held_up = checkpoints.seconds if checkpoints is not None else 0.0
        place = data_dir if unlabeled_dir is None else unlabeled_dir
        report = report_of(job, run, given, place, quality, scores, held_up, held, log.elapsed)
        report["settings_sha256"] = digest_of(about)
        if output is not None:
            with StagedDirectory(output, overwrite) as staged:
                write_bytes(staged / "metrics.jsonl", log.content())
                export(staged, job, run, report, say)
        if checkpoints is not None:
            checkpoints.finish()
    if failure is not None:
        where = f" The student itself is whole, in {output}." if output is not None else ""
        raise type(failure)(f"{failure}{where}") from failure
    return DistillResult(job.student.module, Path(output) if output is not None else None, report)


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
    mine = parts_to_make(num_images, output, part, group, resume=resume, overwrite=overwrite)
    job = prepare(
        teacher,
        student,
        teacher_options,
        student_options,
        recipe,
        config,
        overrides,
        Machine.choose(device, amp, say, group).apart(),
        say,
        trains=False,
    )
    run = SetMaker(job, num_images, Path(output), resume, overwrite, shard_size, checkpoint_every, compile, graphs)
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
        teacher_options,
        student_options,
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
    open_judge(eval_data, eval_dataset, eval_split, job.student)
    pool_images: int | None
    if unlabeled_dir is not None:
        pool_images = candidates(unlabeled_dir, job)[1]  # which ones makes no difference to the costs
    else:
        given = read_given(data_dir, job)
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
    mine = parts_to_make(num_images, output, part, group, resume=resume, overwrite=overwrite)
    if not resume and mine is None:
        StagedDirectory(output, overwrite).check()
    job = prepare(
        teacher,
        student,
        teacher_options,
        student_options,
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
