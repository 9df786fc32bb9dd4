"""When a distillation run is saved, what stands in a checkpoint beside its tensors, and how it is gone on with.

:mod:`fastdfkd_cli.checkpoint` knows files and nothing of runs, :mod:`fastdfkd_cli.distillation` runs and nothing of
files; this is what connects them.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from fastdfkd_cli import stopping
from fastdfkd_cli.checkpoint import Checkpoints, Loaded
from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.dataset import SyntheticSet
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import UnavailableError
from fastdfkd_cli.models import LoadedModel
from fastdfkd_cli.records import MetricsLog

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


class Keeper:
    """Saves a run at its borders: now and then, when it is asked to stop, and when it has ended.

    Args:
        checkpoints: where to.
        run: what.
        log: the metrics so far are part of it.
        every: seconds between two checkpoints at least; 0: only when the run is asked to stop, or has ended.
    """

    def __init__(self, checkpoints: Checkpoints, run: Distillation, log: MetricsLog, every: float) -> None:
        self.checkpoints = checkpoints
        self.run = run
        self.log = log
        self.every = every
        self._parts: set[str] = set()
        self._due = time.perf_counter() + every

    def take_up(self, latest: Loaded) -> None:
        """Put the run and its metrics where ``latest`` was saved.

        Raises:
            UnavailableError: what it holds does not fit the run, checksums or not: somebody else wrote it.
        """
        try:
            names = latest.values["parts"]
            self.run.take_up(latest.tensors, latest.values["run"], {name: latest.segment(name) for name in names})
            self.log.restore(latest.tensors["metrics"].numpy().tobytes(), float(latest.values["elapsed"]))
            self._parts = set(names)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UnavailableError(
                f"Checkpoint {latest.number} in {self.checkpoints.folder} does not fit this run ({error}): give "
                "--overwrite to begin anew."
            ) from error

    def at_border(self) -> None:
        """Save if it is time, or if the run is asked to stop; then stop it.

        Raises:
            Stopped: it was asked to.
            FastDFKDError: the run has broken, or the checkpoint cannot be written.
        """
        if stopping.asked():
            self.save(wait=True)
            stopping.raise_if_asked(f"{self.kept()}: the same command with --resume auto goes on")
        elif self.every and time.perf_counter() >= self._due:
            self.save()

    def save(self, *, wait: bool = False) -> None:
        """Save the run as it stands, unless it is broken."""
        self.run.check()
        tensors, values = self.run.state()
        parts = self.run.pool.parts(self._parts, images=self.run.synthesizer is not None)
        metrics = bytearray(self.log.content())
        tensors["metrics"] = torch.frombuffer(metrics, dtype=torch.uint8) if metrics else torch.empty(0).byte()
        chosen = {"pool_size": self.run.config.pool_size, **self.run.chosen}
        values = {"run": values, "parts": [*parts], "chosen": chosen, "elapsed": self.log.elapsed}
        self.checkpoints.save(tensors, values, parts, wait=wait)
        self._parts = set(parts)
        self._due = time.perf_counter() + max(self.every, self.checkpoints.last_cost / SHARE)

    def kept(self) -> str:
        """What there is to go on from, for a message."""
        made, taken = self.run.images_made, self.run.steps_taken
        return f"{made:,} images and {taken:,} KD steps are kept in {self.checkpoints.folder}"


def checkpoint_folder(output: str | Path) -> Path:
    """Where the checkpoints of a run stand that will end in ``output``: beside it."""
    output = Path(output)
    return output.with_name(f"{output.resolve().name}.checkpoints")


__all__ = ["Keeper", "checkpoint_folder", "identity"]
