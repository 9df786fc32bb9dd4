"""A distillation carried out from its job: what it takes of the machine, its engine, its checkpoints."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from fastdfkd_cli.acceleration import Acceleration
from fastdfkd_cli.checkpoint import Checkpoints
from fastdfkd_cli.dataset import SyntheticSet
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.distributed import broadcast_, fingerprint, require_same, sum_, text_of_leader
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import Job, OnMessage, accelerated, bounded_pool, cost_line, plan_of
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.processes import Group
from fastdfkd_cli.records import MetricsLog
from fastdfkd_cli.resume import Keeper, Unfinished
from fastdfkd_cli.stopping import patiently
from fastdfkd_cli.synced_norm import synced_batch_norm


def shares_line(job: Job, given: SyntheticSet | None) -> str:
    """What several processes do together, in one line."""
    several, config = job.machine.group.world_size, job.config
    parts = [f"{several} processes; a step is over {several} x {config.distillation.batch_size} images in distillation"]
    if given is None:
        parts.append(f"{several} x {config.synthesis.batch_size} in synthesis")
        if config.schedule.time_budget is None:
            parts.append(f"each process makes {config.synthetic_images:,} images")
    return ", ".join(parts)


def settled(
    job: Job,
    given: SyntheticSet | None,
    latest: Unfinished | None,
    *,
    compiles: bool,
    graphs: bool,
    plans: bool,
    say: OnMessage,
) -> Acceleration:
    """Decide from the memory that is free now how large the run's pool is, and how it may go faster.

    What an unfinished run of as many processes decided is kept to, so that the rest is the same.

    Args:
        job: its ``config`` gets the pool's size.
        plans: whether somebody wants to know first what the run will cost; decided by rank 0.
    """
    group = job.machine.group
    if latest is not None and latest.processes == group.world_size:
        chosen = dict(latest.values["chosen"])
        job.config = replace(job.config, pool_size=chosen.pop("pool_size"))
        return accelerated(job, None, compiles=compiles, graphs=graphs, say=say, **chosen)
    plan = plan_of(job, len(given) if given is not None else None) if plans and group.leads else None
    if plan is not None:
        say(cost_line(plan, job.config, group.world_size))
    if given is None:
        job.config = bounded_pool(job, say)
    plan = json.loads(text_of_leader(group, json.dumps(plan))) if group.several else plan
    return accelerated(job, plan, compiles=compiles, graphs=graphs, say=say)


@dataclass(frozen=True)
class KeeperOf:
    """What a run's keeper is made of."""

    checkpoints: Checkpoints | None
    latest: Unfinished | None
    every: float

    def __call__(self, run: Distillation, log: MetricsLog, group: Group) -> Keeper:
        return Keeper(self.checkpoints, run, log, self.every, group)


def distil(
    job: Job,
    given: SyntheticSet | None,
    acceleration: Acceleration,
    keeper_of: KeeperOf | None,
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


__all__ = ["KeeperOf", "distil", "settled", "shares_line"]
