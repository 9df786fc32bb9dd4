"""When a distillation run is saved, what stands in a checkpoint beside its tensors, and how it is gone on with.

:mod:`fastdfkd_cli.checkpoint` knows files and nothing of runs, :mod:`fastdfkd_cli.distillation` runs and nothing of
files; this is what connects them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdfkd_cli import stopping
from fastdfkd_cli.checkpoint import Checkpoints, Loaded
from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.dataset import SyntheticSet
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.distributed import (
    dealt,
    gathered,
    largest,
    of_leader,
    tensors_of_leader,
    text_of_leader,
    wait_for_all,
)
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError, brief
from fastdfkd_cli.models import LoadedModel
from fastdfkd_cli.output import StagedDirectory, is_own_folder, plain_json
from fastdfkd_cli.pool import StoredPool, redealt
from fastdfkd_cli.processes import ALONE, Group
from fastdfkd_cli.records import MetricsLog

#: What of a clock follows from the settings, where there is no time budget.
_SCHEDULE = ("rounds", "warmup_rounds", "final_rounds", "batches_per_round", "kd_steps_per_round", "renewal")
#: Most of a run's time that may go into checkpoints: they come less often where they cost more.
SHARE = 0.01


def identity(
    config: RunConfig, teacher: LoadedModel, student: LoadedModel, amp: bool, given: SyntheticSet | None
) -> dict[str, Any]:
    """Everything that decides what a run computes. It is only ever gone on with under the same one."""

    def of(model: LoadedModel) -> dict[str, Any]:
        about = model.describe()
        return {name: about[name] for name in ("name", "revision", "weights_sha256", "num_classes", "input")}

    data = None
    if given is not None:
        digest = hashlib.sha256(given.images.contiguous().numpy().data)
        digest.update(given.labels.contiguous().numpy().data)
        data = {"images": len(given.images), "sha256": digest.hexdigest()}
    return {"config": to_dict(config), "teacher": of(teacher), "student": of(student), "amp": amp, "data": data}


def digest_of(identity: Mapping[str, Any]) -> str:
    """The SHA-256 of what :func:`identity` gave, by which a finished run is known again."""
    text = json.dumps(plain_json(identity), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def finished(output: str | Path) -> dict[str, Any] | None:
    """The report of the run that is complete in ``output``; None if there is none, or one is unfinished beside it."""
    folder = Path(output)
    if any(checkpoint_folder(folder).glob("checkpoint-*.json")) or not is_own_folder(folder):
        return None
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(report, dict) and isinstance(report.get("seconds"), dict) and "images" in report
    return report if whole and isinstance(report.get("settings_sha256"), str) else None


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """The run that is gone on with, as all processes know of it."""

    number: int
    folder: str
    #: How many processes it had.
    processes: int
    values: Mapping[str, Any]
    #: In rank 0, which reads it.
    loaded: Loaded | None

    @classmethod
    def told(cls, group: Group, checkpoints: Checkpoints | None) -> Unfinished | None:
        """What rank 0 has found, said to all; None: nothing."""
        latest = checkpoints.latest if checkpoints is not None else None
        text = ""
        if latest is not None:
            text = json.dumps([latest.number, str(latest.folder), latest.values])
        text = text_of_leader(group, text)
        if not text:
            return None
        number, folder, values = json.loads(text)
        processes = values.get("processes", 1)
        if type(processes) is not int or not 1 <= processes < 2**20:
            raise UnavailableError(f"Checkpoint {number} in {folder} is of no number of processes.")
        if (odd := _oddity(values)) is not None:
            raise UnavailableError(
                f"Checkpoint {number} in {folder} was not written by this program ({odd}): give --overwrite to begin "
                "anew."
            )
        return cls(number=number, folder=folder, processes=processes, values=values, loaded=latest)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


#: What the values of a checkpoint are. Checksums tell damage, and not what somebody else wrote.
_FORM: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("run.position.round", "run.position.batches", "run.position.kd_steps"), _count),
    **dict.fromkeys(("run.clock.warmup_rounds", "run.clock.final_rounds", "run.clock.renewal"), _count),
    **dict.fromkeys(
        ("run.clock.rounds", "run.clock.batches_per_round", "run.clock.kd_steps_per_round"),
        lambda value: _count(value) and value > 0,
    ),
    **dict.fromkeys(("run.clock.final_seconds", "run.clock.elapsed", "elapsed"), _number),
    **dict.fromkeys(("run.clock.budget", "run.clock.distillation_started"), _maybe(_number)),
    **dict.fromkeys(("run.clock.fitted", "chosen.checkpoint"), lambda value: isinstance(value, bool)),
    **dict.fromkeys(("run.costs.synthesis", "run.costs.distillation", "run.rate"), _number),
    **dict.fromkeys(("run.images_made", "run.steps_taken"), _count),
    **dict.fromkeys(("run.pool.added", "run.pool.unlabelled", "run.pool.held"), _count),
    **dict.fromkeys(("chosen.pool_size", "chosen.micro_batch", "run.label_views"), _size),
    "run.retries": lambda value: isinstance(value, list),
    "parts": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}


def _oddity(values: Mapping[str, Any]) -> str | None:
    """Which of a checkpoint's values is not what :meth:`Keeper.save` writes; None where all of them are."""
    for name, check in _FORM.items():
        found: Any = values
        for step in name.split("."):
            found = found.get(step) if isinstance(found, dict) else None
        if not check(found):
            return f"{name} is {brief(found)}"
    return None


class Keeper:
    """Saves a run at its borders: now and then, when it is asked to stop, and when it has ended.

    Of several processes each has one. Rank 0 writes what is common to all, and gathers from each what is its own.

    Args:
        checkpoints: where to; None in ranks above 0.
        run: what.
        log: the metrics so far are part of it.
        every: seconds between two checkpoints at least; 0: only when the run is asked to stop, or has ended.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        run: Distillation,
        log: MetricsLog,
        every: float,
        group: Group = ALONE,
    ) -> None:
        self.checkpoints = checkpoints
        self.run = run
        self.log = log
        self.every = every
        self.group = group
        self._parts: set[str] = set()
        self._due = run.clock.now() + every

    def take_up(self, latest: Unfinished) -> None:
        """Put the run and its metrics where ``latest`` was saved, by as many processes or by others.

        Raises:
            UnavailableError: what it holds does not fit the run, checksums or not: somebody else wrote it.
        """
        try:
            values = dict(latest.values["run"])
            if latest.processes == self.group.world_size:
                self._require_schedule(values["clock"], values["label_views"])
            if not self.group.several and latest.processes == 1:
                assert latest.loaded is not None
                tensors: Mapping[str, Tensor] = latest.loaded.tensors
                parts: Mapping[str, Mapping[str, Tensor]] = {
                    name: latest.loaded.segment(name) for name in latest.values["parts"]
                }
                self._parts = set(parts)
            else:
                tensors, parts, counts = self._share(latest)
                values["pool"] = dict(zip(("added", "unlabelled"), counts, strict=True))
                if latest.processes == self.group.world_size:
                    self._parts = set(parts)
            self.run.take_up(tensors, values, parts)
            if self.group.leads:
                self.log.restore(tensors["metrics"].numpy().tobytes(), float(latest.values["elapsed"]))
            self._due = self.run.clock.now() + self.every
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UnavailableError(
                f"Checkpoint {latest.number} in {latest.folder} does not fit this run ({error}): give --overwrite to "
                "begin anew."
            ) from error

    def _require_schedule(self, clock: Mapping[str, Any], label_views: int) -> None:
        """Settings decide how long a run is: what a checkpoint says of it is theirs, unless a time budget fits it."""
        if label_views > max(self.run.config.distillation.label_views, 1):
            raise ValueError(f"its label_views is {label_views}")
        own = self.run.clock.to_dict()
        fitted = own["budget"] is not None
        for name in ("budget",) if fitted else ("budget", *_SCHEDULE):
            if clock[name] != own[name]:
                raise ValueError(f"its {name} is {brief(clock[name])}")

    def _share(self, latest: Unfinished) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], list[int]]:
        """From rank 0: what is common to all, and what is this process's own: tensors, parts and counts of the pool."""
        common: dict[str, Tensor] = {}
        if latest.loaded is not None:
            common = {
                name: tensor
                for name, tensor in latest.loaded.tensors.items()
                if not name.startswith("rank") and not self.run.is_own(name)
            }
        common = tensors_of_leader(self.group, common)
        mine = dealt(self.group, _shares(latest, self.group.world_size) if latest.loaded is not None else ())
        tensors, parts = dict(common), dict[str, dict[str, Tensor]]()
        for name, tensor in mine.items():
            kind, _, rest = name.partition("/")
            if kind == "part":
                part, _, key = rest.partition("/")
                parts.setdefault(part, {})[key] = tensor
            elif kind == "own":
                tensors[rest] = tensor
        return tensors, parts, mine["pool"].tolist()

    def at_border(self) -> None:
        """Save if it is time, or if the run is asked to stop; then stop it. All processes come here at one border.

        Raises:
            Stopped: it was asked to.
            SystemExit: in ranks above 0 instead.
            FastDFKDError: the run has broken, or the checkpoint cannot be written.
        """
        if self.run.asked_to_stop:
            self.save(wait=True)
            self._stop()
        elif self.every and self.run.clock.now() >= self._due:
            self.save()

    def end(self) -> None:
        """Save the run that has ended: a finished student is not lost to what comes after it."""
        self.save()
        (request,) = largest(self.group, stopping.request())
        if self.group.several and request:
            stopping.ask(int(request))
            self._stop()

    def _stop(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        wait_for_all(self.group)  # nobody leaves before it is written
        if not self.group.leads:
            raise SystemExit(128 + stopping.request())  # rank 0 says it
        stopping.raise_if_asked(f"{self.kept()}: the same command with --resume auto goes on")

    def save(self, *, wait: bool = False) -> None:
        """Save the run as it stands, unless it is broken."""
        self.run.check()
        tensors, values = self.run.state()
        parts: Mapping[str, Mapping[str, Tensor] | None]
        parts = self.run.pool.parts(self._parts, images=self.run.synthesizer is not None)
        self._parts = set(parts)
        if self.group.several:
            tensors, parts = self._gathered(tensors, parts)
        cost = 0.0
        if self.checkpoints is not None:
            metrics = bytearray(self.log.content())
            tensors["metrics"] = torch.frombuffer(metrics, dtype=torch.uint8) if metrics else torch.empty(0).byte()
            chosen = {"pool_size": self.run.config.pool_size, **self.run.chosen}
            values = {"run": values, "parts": [*parts], "chosen": chosen, "elapsed": self.log.elapsed}
            if self.group.several:
                values["processes"] = self.group.world_size
            self.checkpoints.save(tensors, values, parts, wait=wait)
            cost = self.checkpoints.last_cost
        (cost,) = of_leader(self.group, cost)
        self._due = self.run.clock.now() + max(self.every, cost / SHARE)

    def _gathered(
        self, tensors: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor] | None]
    ) -> tuple[dict[str, Tensor], dict[str, Mapping[str, Tensor] | None]]:
        """In rank 0, what :meth:`save` writes: each process's own tensors and parts by its rank."""
        pool = self.run.pool
        mine = {f"own/{name}": tensor for name, tensor in tensors.items() if self.run.is_own(name)}
        mine["pool"] = torch.tensor([pool.added, pool.unlabelled, len(pool)])
        for part, content in parts.items():
            if content is None:
                mine[f"kept/{part}"] = torch.empty(0)
            else:
                mine |= {f"part/{part}/{key}": tensor for key, tensor in content.items()}
        found = {name: tensor for name, tensor in tensors.items() if not self.run.is_own(name)}
        segments: dict[str, Mapping[str, Tensor] | None] = {}
        for rank, share in enumerate(gathered(self.group, mine)):
            of_part: dict[str, dict[str, Tensor]] = {}
            for name, tensor in share.items():
                kind, _, rest = name.partition("/")
                if kind == "part":
                    part, _, key = rest.partition("/")
                    of_part.setdefault(f"rank{rank}-{part}", {})[key] = tensor
                elif kind == "kept":
                    segments[f"rank{rank}-{rest}"] = None
                else:
                    found[f"rank{rank}.{rest or kind}"] = tensor
            segments |= of_part
        return found, segments

    def kept(self) -> str:
        """What there is to go on from, for a message."""
        assert self.checkpoints is not None
        made, taken = self.run.images_made, self.run.steps_taken
        return f"{made:,} images and {taken:,} KD steps are kept in {self.checkpoints.folder}"


def _shares(latest: Unfinished, processes: int) -> Iterator[dict[str, Tensor]]:
    """What each process is sent of a checkpoint: its own of as many, or a part of the pool of others."""
    assert latest.loaded is not None
    if latest.processes == processes:
        for rank in range(processes):
            share = {f"own/{name}": tensor for name, tensor in _of_rank(latest.loaded.tensors, rank)}
            share["pool"] = share.pop("own/pool")[:2]
            yield share | _flat(_stored(latest, rank).parts)
        return
    for pool in redealt([_stored(latest, rank) for rank in range(latest.processes)], processes):
        yield {"pool": torch.tensor([pool.added, pool.unlabelled])} | _flat(pool.parts)


def _of_rank(tensors: Mapping[str, Tensor], rank: int) -> Iterable[tuple[str, Tensor]]:
    prefix = f"rank{rank}."
    return [(name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix)]


def _stored(latest: Unfinished, rank: int) -> StoredPool:
    """The pool of one of the processes that saved the checkpoint."""
    assert latest.loaded is not None
    prefix = f"rank{rank}-" if latest.processes > 1 else ""
    names = [name for name in latest.values["parts"] if name.startswith(prefix)]
    parts = {name.removeprefix(prefix): latest.loaded.segment(name) for name in names}
    if latest.processes == 1:
        counts = latest.values["run"]["pool"]
        return StoredPool(parts, counts["added"], counts["unlabelled"], counts["held"])
    added, unlabelled, held = latest.loaded.tensors[f"rank{rank}.pool"].tolist()
    return StoredPool(parts, added, unlabelled, held)


def _flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"part/{part}/{key}": tensor for part, content in parts.items() for key, tensor in content.items()}


def checkpoint_folder(output: str | Path) -> Path:
    """Where the checkpoints of a run stand that will end in ``output``: beside it."""
    output = Path(output)
    return output.with_name(f"{output.resolve().name}.checkpoints")


def folder_for(output: str | Path | None, resume: str | Path | None) -> Path | None:
    """Where the run is saved; None: nowhere."""
    if resume is not None and str(resume) != "auto":
        return Path(resume)
    if output is not None:
        return checkpoint_folder(output)
    if resume is not None:
        raise UsageError("resume='auto' goes on with the run of an output: name it, or the folder of checkpoints.")
    return None


def open_checkpoints(
    stack: ExitStack,
    folder: Path,
    about: Mapping[str, Any],
    output: str | Path | None,
    resume: str | Path | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> Checkpoints:
    """The checkpoints of the run, and of the unfinished one that it goes on with, if any."""
    found = stack.enter_context(
        Checkpoints.open(folder, about, resume=resume is not None, begin_anew=overwrite and resume is None, say=say)
    )
    if output is not None:
        StagedDirectory(output, overwrite).drop_abandoned()
    if resume is not None and str(resume) != "auto" and found.latest is None:
        raise UsageError(f"{folder} holds no checkpoint: check the path, or leave --resume out.")
    return found


@contextmanager
def noting(kept: list[Path]) -> Iterator[None]:
    """Say of an end before the end what there is to go on from.

    Args:
        kept: the folder of checkpoints, once it is known.
    """
    try:
        yield
    except (KeyboardInterrupt, FastDFKDError) as end:
        for folder in kept:
            if any(folder.glob("checkpoint-*.json")) and "--resume" not in str(end):  # there is a whole one
                note = f"the last checkpoint is kept in {folder}: --resume auto goes on with it"
                if isinstance(end, FastDFKDError):
                    end.args = FastDFKDError(f"{end} {note[0].upper()}{note[1:]}.").args
                elif not getattr(end, "__notes__", None):
                    end.add_note(note)
        raise


__all__ = [
    "Keeper",
    "Unfinished",
    "checkpoint_folder",
    "digest_of",
    "finished",
    "folder_for",
    "identity",
    "noting",
    "open_checkpoints",
]
