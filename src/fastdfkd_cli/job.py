"""From a request to a job: models loaded, settings resolved, everything checked before any work is done.

:mod:`fastdfkd_cli.api` turns the arguments of its functions into a :class:`Job` here, and hands it to the engines.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdfkd_cli.acceleration import Acceleration, can_checkpoint
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import RunConfig, from_dict, to_dict
from fastdfkd_cli.dataset import load_manifest
from fastdfkd_cli.dataset.layout import is_dataset
from fastdfkd_cli.distillation import DEFAULT_POOL_IMAGES
from fastdfkd_cli.distributed import device_name, first_of_machine, largest
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.initialisation import select_weights
from fastdfkd_cli.labels import label_views
from fastdfkd_cli.models import LoadedModel, ModelOptions, check_forward, load_student, load_teacher
from fastdfkd_cli.models.files import unwrapped
from fastdfkd_cli.plan import distillation_plan, synthesis_plan
from fastdfkd_cli.pool import pool_bytes_per_image
from fastdfkd_cli.processes import ALONE, Group
from fastdfkd_cli.quality import signal_config
from fastdfkd_cli.recipes import get_recipe, with_method
from fastdfkd_cli.records import Record
from fastdfkd_cli.runtime import available_memory, default_amp, describe_device, resolve_device
from fastdfkd_cli.synthesis import burn_in_batches

Model = str | nn.Module
OnMessage = Callable[[str], None]
OnRecord = Callable[[Record], None]


@dataclass
class Machine:
    device: torch.device
    amp: bool
    group: Group = ALONE

    @classmethod
    def choose(cls, device: str, amp: bool | None, say: OnMessage, group: Group = ALONE) -> Machine:
        chosen = resolve_device(device_name(group, device))
        machine = cls(chosen, default_amp(chosen) if amp is None else amp, group)
        if machine.amp and chosen.type == "mps":
            raise UsageError("--amp is not offered on mps: bf16 autocast is incomplete there. Use --no-amp.")
        say(f"device {describe_device(chosen)}, {'bf16' if machine.amp else 'float32'}")
        return machine

    def apart(self) -> Machine:
        """The same machine for a process that has nothing to do with the others but to share it."""
        return replace(self, group=Group(local_rank=self.group.local_rank, local_size=self.group.local_size))

    def available_memory(self) -> int:
        """Bytes that are free for this process now: its part, where others of the run share them."""
        free = available_memory(self.device)
        return free if self.device.type == "cuda" else free // self.group.local_size

    def place(self, model: LoadedModel) -> nn.Module:
        """The model as the engines want it: images in [0, 1] -> logits, channels-last, on the device."""
        return model.normalized().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass
class Job:
    """The two models, the settings and the machine of one run, checked."""

    machine: Machine
    config: RunConfig
    teacher: LoadedModel
    student: LoadedModel | None

    @property
    def size(self) -> tuple[int, int, int]:
        return self.teacher.input.size

    def keywords(self) -> dict[str, Any]:
        return {
            "image_size": self.size,
            "num_classes": self.teacher.num_classes,
            "device": self.machine.device,
            "amp": self.machine.amp,
        }


def prepare(
    teacher: Model,
    student: Model | None,
    teacher_options: ModelOptions | None,
    student_options: ModelOptions | None,
    recipe: str,
    config: RunConfig | None,
    overrides: Mapping[str, Any] | None,
    machine: Machine,
    say: OnMessage,
    *,
    trains: bool,
    given: bool = False,
    unlabelled: bool = False,
) -> Job:
    """Load and check everything that can be wrong before any work is done.

    The machine's group, where there is one, has met.
    """
    if config is None and recipe != "auto":
        get_recipe(recipe)  # a typing error should not wait for a download
    with first_of_machine(machine.group):
        loaded = load_teacher(copied(teacher), teacher_options or ModelOptions())
    if loaded.num_classes < 2:
        raise UsageError(f"{loaded.name} has one output; distillation needs two classes or more.")
    say(f"teacher {loaded.name}{f' at {loaded.revision}' if loaded.revision else ''}")
    check_forward(loaded)
    loaded.module.eval().requires_grad_(False)
    settings = config if config is not None else get_recipe(recipe).config(loaded.input.size)
    settings = override(settings, overrides or {})
    _check_method(settings, machine.group, student is not None, trains, given, unlabelled)
    if given:
        settings = with_method(settings, "kd")
    method = f"method {settings.method}, " if settings.method != "fast" else ""
    say(f"{method}recipe {settings.recipe}, seed {settings.seed}")
    judges = trains and settings.quality_images > 0
    if settings.synthesis.makes_images:
        _check_synthesis(settings, loaded, machine.device, judges=judges)
    if judges:
        _check_signal(signal_config(settings, loaded.input.size), loaded)
    pupil = None
    if student is not None:
        with torch.random.fork_rng(devices=[]), first_of_machine(machine.group):
            # A student from scratch starts the same for the same seed; torch.manual_seed would touch CUDA's states too.
            torch.default_generator.manual_seed(settings.seed)
            if trains:
                pupil = load_student(student, student_options or ModelOptions(), like=loaded)
            else:
                pupil = _opponent(student, student_options or ModelOptions(), loaded)
        selected = ""
        if trains and settings.distillation.init == "weight-selection":
            selected = f", {100 * _selected_share(pupil, loaded):.3g} % of its weights selected from the teacher's"
        say(f"student {pupil.name}{selected}")
        check_forward(pupil)
    return Job(machine, settings, loaded, pupil)


def copied(model: Model) -> Model:
    """A caller's own module is left as it is: evaluation mode, freezing, moving and memory format go to a copy."""
    return copy.deepcopy(unwrapped(model)) if isinstance(model, nn.Module) else model


def _selected_share(student: LoadedModel, teacher: LoadedModel) -> float:
    """Have the student begin with a selection of the teacher's weights; the share of its own that was."""
    otherwise = "--set distillation.init=random"
    if student.pretrained:
        raise UsageError(f"The student {student.name} comes with weights, which would be overwritten: {otherwise}.")
    share = select_weights(student, teacher)
    if not share:
        raise UsageError(
            f"No layer of the student {student.name} has a namesake in the teacher {teacher.name} that is as large, to "
            f"select weights from: {otherwise}."
        )
    return share


def _opponent(student: Model, options: ModelOptions, teacher: LoadedModel) -> LoadedModel:
    """A student that `synthesize` plays against: its own weights if it has any, and the teacher's classes and input."""
    loaded = load_student(copied(student), options, like=teacher)
    loaded.module.requires_grad_(False)
    return loaded


def override(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Put settings on a recipe, then a budget: ``rounds``, or ``images`` for the rounds that make so many.

    A budget is in the recipe's own rounds and images, so that it means the same KD steps with every method.

    Raises:
        UsageError: a setting or the budget makes no sense; ``config`` is of a method, and another one is asked for.
    """
    settings = dict(overrides)
    if "method" in settings:
        other = with_method(config, settings.pop("method"))
        if other.method != config.method and config.method != "fast":
            # A method's definition reaches into distillation and schedule: what it replaced there is not known here.
            raise UsageError(
                f"These are settings of the method {config.method}, and not those of {other.method}: begin with a "
                "recipe's."
            )
        if other.method != config.method and other.synthesis.feeds:
            budget: dict[str, Any] = {key: settings.pop(key) for key in ("rounds", "images") if key in settings}
            if budget:
                settings.pop("schedule.rounds", None)  # of a file, say: a budget stands above it with any method
            other = with_method(override(config, budget), other.method)
        config = other
    images, rounds = settings.pop("images", None), settings.pop("rounds", None)
    before = config
    config = from_dict({k: v for k, v in settings.items() if k != "schedule.rounds"}, base=_loose(config, settings))
    if "schedule.rounds" in settings:
        config = _with_rounds(config, settings["schedule.rounds"], before, stated=settings)
    if images is not None and rounds is not None:
        raise UsageError("images and rounds set the same budget: give one of them.")
    if images is not None:
        if isinstance(images, bool) or not isinstance(images, int | float) or images < 1:
            raise UsageError(f"images must be 1 or more, not {images!r}.")
        per_round = config.synthesis.batch_size * config.schedule.batches_per_round
        synthesis = max(round(images / per_round), 1)
        rounds = round(synthesis * config.schedule.rounds / config.schedule.synthesis_rounds)
        config = _with_rounds(config, rounds, config, stated={})
        # Shares are rounded; the images that were asked for are not.
        exact = {
            "schedule.final_rounds": rounds - synthesis,
            "schedule.warmup_rounds": min(config.schedule.warmup_rounds, synthesis - 1),
        }
        return from_dict(exact, base=config)
    return config if rounds is None else _with_rounds(config, rounds, config, stated={})


def _loose(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Room for ``settings`` that are only consistent with the number of rounds that comes with them."""
    if "schedule.rounds" not in settings:
        return config
    return from_dict({"schedule.rounds": 2**31, "schedule.warmup_rounds": 0, "schedule.final_rounds": 0}, base=config)


def _with_rounds(config: RunConfig, rounds: Any, before: RunConfig, stated: Mapping[str, Any]) -> RunConfig:
    """Another number of rounds: warm-up, final rounds and renewal keep the shares they had in ``before``, unless
    they are stated themselves."""
    values = {
        "schedule.warmup_rounds": (config.schedule.warmup_rounds, before.schedule.warmup_rounds),
        "schedule.final_rounds": (config.schedule.final_rounds, before.schedule.final_rounds),
    }
    if before.synthesis.renewal:
        values["synthesis.generator_reset_after"] = (config.synthesis.renewal, before.synthesis.renewal)
    # Checked as any other value, before it is used as a number.
    probe = {"schedule.rounds": rounds, "schedule.warmup_rounds": 0, "schedule.final_rounds": 0}
    count = from_dict(probe, base=config).schedule.rounds
    scaled = {
        key: now if key in stated else earlier * count // before.schedule.rounds
        for key, (now, earlier) in values.items()
    }
    return from_dict({"schedule.rounds": count, **scaled}, base=config)


def divided(config: RunConfig, processes: int) -> RunConfig:
    """The settings of each of several processes: its batches are those of ``config``, and so there are fewer of them.

    All together make as many images, and show the student as many, as one process would, but for rounding to whole
    rounds, batches and steps. A time budget has no number of rounds to divide.
    """
    schedule = config.schedule
    if processes == 1:
        return config
    pool = max(-(-config.pool_size // processes), config.synthesis.batch_size) if config.pool_size else 0
    if schedule.time_budget is not None:
        return replace(config, pool_size=pool)

    def share(rounds: int) -> int:
        return max(round(rounds / processes), 1)

    synthesis, distillation = share(schedule.synthesis_rounds), share(schedule.kd_rounds)
    rounds = min(max(share(schedule.rounds), synthesis, distillation), synthesis + distillation - 1)
    batches = schedule.synthesis_rounds * schedule.batches_per_round
    steps = schedule.kd_rounds * schedule.kd_steps_per_round
    after = config.synthesis.renewal
    return from_dict(
        {
            "pool_size": pool,
            "schedule.rounds": rounds,
            "schedule.warmup_rounds": rounds - distillation,
            "schedule.final_rounds": rounds - synthesis,
            "schedule.batches_per_round": max(round(batches / processes / synthesis), 1),
            "schedule.kd_steps_per_round": max(round(steps / processes / distillation), 1),
            **({"synthesis.generator_reset_after": share(after)} if after else {}),
        },
        base=config,
    )


def _check_method(
    config: RunConfig, group: Group, has_student: bool, trains: bool, given: bool, unlabelled: bool
) -> None:
    """Refuse what a method cannot do, before the student is loaded."""
    if unlabelled and not config.synthesis.selects:
        raise UsageError(
            "--unlabeled-dir is what --method dfnd chooses its images from: name that method, or distil on all of the "
            "images with --data-dir instead."
        )
    if config.synthesis.selects and trains:
        if given or not unlabelled:
            raise UsageError(
                f"The method {config.method} chooses its images from an unlabelled set: name it with --unlabeled-dir"
                + (", and leave --data-dir out." if given else ".")
            )
        if group.several:
            raise UsageError(f"The method {config.method} works in one process: run it without torchrun.")
        return
    if given:
        # FastDFKD is the method where none is named, and in the settings of earlier runs.
        if config.synthesis.makes_images and config.method != "fast":
            raise UsageError(
                f"The method {config.method} makes its images, and --data-dir gives them: leave --data-dir out, or "
                "distil on it with --method kd."
            )
        return
    if not config.synthesis.makes_images:
        raise UsageError(
            f"The method {config.method} distils on images that are given: "
            + ("name them with --data-dir." if trains else "there are none to synthesise. Use fastdfkd distill.")
        )
    if config.synthesis.needs_student and not (has_student or trains):
        raise UsageError(
            f"The method {config.method} makes its images against a student: name one with --student, whose weights it "
            "has already, or use distill, which trains it meanwhile."
        )
    if group.several and not config.synthesis.scales:
        raise UsageError(f"The method {config.method} works in one process: run it without torchrun.")


def _check_synthesis(config: RunConfig, teacher: LoadedModel, device: torch.device, *, judges: bool) -> None:
    """Refuse what the run's images cannot be made with; ``judges``: whether it ends with the quality signal."""
    augmentation = getattr(config.synthesis, "augmentation", "none")
    if config.deterministic and device.type == "cuda" and augmentation == "resized-crop-flip":
        raise UsageError(
            "--deterministic: torch has no repeatable derivative of a resized crop on CUDA. "
            "Give --set synthesis.augmentation=crop-flip, or run on the CPU."
        )
    if teacher.input.size[0] > 4:
        raise UsageError(f"{teacher.name} takes {teacher.input.size[0]} channels; images of 1 to 4 can be made.")
    if config.synthesis.needs_statistics and not batch_norm_layers(teacher.module):
        # CMI's contrastive term reads the inputs of these layers as well.
        reading = [term for term in ("feature", "contrastive") if getattr(config.synthesis, f"{term}_weight", 0) > 0]
        terms, need = " and the ".join(f"{term} term" for term in reading), "needs" if len(reading) == 1 else "need"
        off = " ".join(f"--set synthesis.{term}_weight=0" for term in reading)
        cost = "images will be poorer"
        if judges:
            off, cost = f"{off} --set quality_images=0", f"{cost}, and there will be no quality signal"
        raise UsageError(
            f"{teacher.name} has no BatchNorm layers, whose statistics the {terms} {need}. "
            f"Choose another teacher, or do without: {off} ({cost})."
        )


def _check_signal(config: RunConfig, teacher: LoadedModel) -> None:
    """Refuse what the quality signal's images cannot be made with."""
    if config.synthesis.needs_statistics and not batch_norm_layers(teacher.module):
        raise UsageError(
            f"{teacher.name} has no BatchNorm layers, and the images that the quality signal is read off follow their "
            "statistics: leave it out with --set quality_images=0."
        )


def bounded_pool(job: Job, say: OnMessage, *, agreed: bool = True) -> RunConfig:
    """Keep the pool to half of the free memory; the oldest images make room, and the user is told.

    Several processes keep as many images as the smallest of them can, unless one asks for itself (``agreed=False``).
    """
    config = job.config
    timed = config.schedule.time_budget is not None and not config.synthesis.feeds
    wanted = config.pool_size or (DEFAULT_POOL_IMAGES if timed else config.pooled_images)
    distillation = config.distillation
    each = pool_bytes_per_image(
        job.size,
        views=label_views(
            distillation, images=config.synthetic_images, kd_steps=config.kd_steps, feeds=config.synthesis.feeds
        ),
        num_classes=job.teacher.num_classes,
        augmentation=distillation.augmentation,
        amp=job.machine.amp,
    )
    fits = job.machine.available_memory() // 2 // each
    fits = max(fits, config.synthesis.batch_size)
    if agreed:
        fits = -int(largest(job.machine.group, -fits)[0])
    if wanted <= fits:
        return config
    where = "each process's pool" if job.machine.group.several else "the pool"
    say(f"{where} is kept to {fits:,} images, half of the free memory: the oldest make room for new ones")
    return replace(config, pool_size=fits)


def plan_of(job: Job, given: int | None) -> dict[str, Any]:
    """What a run costs: on so many images that are given, or on its own."""
    assert job.student is not None
    return distillation_plan(
        job.config if given is not None else bounded_pool(job, silent, agreed=False),
        job.machine.place(job.teacher),
        job.machine.place(job.student),
        pool_images=given,
        **job.keywords(),
    )


def synthesis_plan_of(job: Job, teacher: nn.Module, opponent: nn.Module | None, num_images: int) -> dict[str, Any]:
    return synthesis_plan(
        job.config, teacher, opponent, num_images=num_images, burn_in=burn_in_batches(job.config), **job.keywords()
    )


def begun_with(output: str | Path) -> int | None:
    """The micro-batch that the set in ``output`` was begun with, so that the rest is the same bit for bit.

    None where there is no set yet.
    """
    if not is_dataset(Path(output)):
        return None
    header = load_manifest(output).get("header")
    size = header.get("micro_batch", 0) if isinstance(header, dict) else 0
    return size if type(size) is int else 0  # anything else is refused as another setting


def accelerated(
    job: Job,
    plan: Mapping[str, Any] | None,
    *,
    compiles: bool,
    graphs: bool,
    say: OnMessage,
    micro_batch: int = 0,
    checkpoint: bool = False,
) -> Acceleration:
    """What this run may use to go faster, and how many images at a time fit the memory.

    Args:
        plan: what the run needs, where it is known.
        micro_batch, checkpoint: what to take without a plan.

    Raises:
        UsageError: graphs without a CUDA device.
    """
    if graphs and job.machine.device.type != "cuda":
        raise UsageError("--graphs needs a CUDA device: elsewhere there is nothing to record. Leave it out.")
    if plan is not None:
        # The smallest of all processes decides, so that they do the same.
        available = -largest(job.machine.group, -float(job.machine.available_memory()))[0]
        needed = plan.get("synthesis_memory_bytes", plan["memory_bytes"])
        micro_batch = micro_batch_for(needed, available, job.config.synthesis.batch_size)
        if micro_batch and not job.config.synthesis.splits:
            micro_batch = 0
            say(f"a batch may need {needed / 2**30:.1f} GiB: lower synthesis.batch_size if memory runs out")
        elif micro_batch:
            say(
                f"a whole batch would need {needed / 2**30:.1f} GiB: teacher and student see {micro_batch} images at "
                "a time in synthesis, at the cost of one more pass of the teacher"
            )
        needed = plan.get("distillation_memory_bytes", 0)
        if job.student is not None and micro_batch_for(needed, available, job.config.distillation.batch_size):
            # Attention transfer reads activations that would not be kept.
            checkpoint = can_checkpoint(job.student.module) and not job.config.distillation.attention_weight
            say(
                f"a KD step would need {needed / 2**30:.1f} GiB: the student keeps few activations and computes the "
                "others twice"
                if checkpoint
                else f"a KD step may need {needed / 2**30:.1f} GiB, and {job.student.name} cannot be cut into parts: "
                "lower distillation.batch_size if memory runs out"
            )
    return Acceleration(graphs=graphs, compile=compiles, micro_batch=micro_batch, checkpoint=checkpoint, say=say)


def micro_batch_for(needed: float, available: float, batch_size: int) -> int:
    """Images whose activations fit into four fifths of ``available`` bytes; 0 where the whole batch does.

    Memory grows with the images at a time; that of the weights and the generator, which does not, is in the rest.
    """
    if needed <= 0.8 * available:
        return 0
    return min(max(int(batch_size * 0.8 * available / needed), 1), batch_size)


def cost_line(plan: Mapping[str, Any], config: RunConfig, processes: int = 1) -> str:
    """What a run is about to cost, in one line; ``plan`` is that of each process."""
    seconds = plan["seconds"]["total"]
    expected = f"about {seconds / 3600:.1f} hours" if seconds > 5400 else f"about {max(seconds, 1):.0f} seconds"
    if config.schedule.time_budget is not None:
        expected = f"a time budget of {config.schedule.time_budget:.0f} seconds"
    images = plan["synthetic_images"] * processes
    return (
        f"expecting {expected}: {images:,} images in {plan['inner_steps']:,} synthesis steps, "
        f"{plan['kd_steps']:,} KD steps, {plan['memory_bytes'] / 2**30:.1f} GiB of memory"
        f"{' in each process' if processes > 1 else ''}"
    )


def with_names(plan: dict[str, Any], job: Job, output: str | Path | None) -> dict[str, Any]:
    plan["teacher"] = {**job.teacher.describe(), **plan["teacher"]}
    if job.student is not None:
        plan["student"] = {**job.student.describe(), **plan.get("student", {})}
    where = Path(output) if output is not None else Path.cwd()
    while not where.exists():
        where = where.parent
    return {
        "recipe": job.config.recipe,
        "device": describe_device(job.machine.device),
        "amp": job.machine.amp,
        "output": str(output) if output is not None else None,
        **plan,
        "disk_free_bytes": shutil.disk_usage(where).free,
        "config": to_dict(job.config),
    }


def silent(_: str) -> None:
    """Where nobody listens."""


__all__ = [
    "Job",
    "Machine",
    "Model",
    "OnMessage",
    "OnRecord",
    "accelerated",
    "begun_with",
    "bounded_pool",
    "copied",
    "cost_line",
    "divided",
    "micro_batch_for",
    "override",
    "plan_of",
    "prepare",
    "silent",
    "synthesis_plan_of",
    "with_names",
]
