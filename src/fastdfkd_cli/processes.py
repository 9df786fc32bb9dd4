"""Which of several processes this is, as torchrun says it in the environment. Nothing heavy is loaded.

What the processes say to one another is in :mod:`fastdfkd_cli.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastdfkd_cli.errors import UsageError

#: Between the seeds of two processes. Not 1: ``seed + 1`` and the like are what other parts of one run draw from. Of a
#: seed, torch's generator on the CPU takes the lower 32 bits alone.
_SEED_STRIDE = 1_000_003
#: What torchrun sets for each process of several.
_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes that carry out one run together, and which of them this is.

    Without arguments: this one alone.
    """

    #: 0 to ``world_size - 1``. Rank 0 speaks, downloads and saves.
    rank: int = 0
    world_size: int = 1
    #: The rank among the processes of the same machine, which decides the GPU.
    local_rank: int = 0
    #: How many processes share the machine, and its memory.
    local_size: int = 1

    @property
    def several(self) -> bool:
        """Whether there is anyone else."""
        return self.world_size > 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks, downloads and saves."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """The seed of what this process alone draws, where ``seed`` is the run's; the same for one process alone."""
        return (seed + _SEED_STRIDE * (self.rank + 1)) % 2**63 if self.several else seed

    def share(self, total: int) -> int:
        """How many of ``total`` pieces of work are this process's: they differ by one at most, and add up."""
        each, left = divmod(total, self.world_size)
        return each + (self.rank < left)


@dataclass(frozen=True)
class Part:
    """One part of a job that is divided among processes or jobs which send one another nothing.

    Args:
        number: which, from 1 on.
        count: of how many.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def range(self, total: int) -> range:
        """Its own of ``total`` numbered things; the parts differ in length by one at most."""
        return range(total * (self.number - 1) // self.count, total * self.number // self.count)

    def seed(self, seed: int) -> int:
        """The seed of what this part draws, where ``seed`` is the whole job's."""
        return Group(rank=self.number - 1, world_size=self.count).seed(seed)


#: One process by itself: nothing is said to anyone, and nothing computed that would not be without a group.
ALONE = Group()


_joined = False


def note_joined() -> None:
    """From here on the processes agree on who says what went wrong."""
    global _joined
    _joined = True


def leads(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is rank 0, or alone, as far as an environment that nobody has checked yet says."""
    return environment.get("WORLD_SIZE", "1") in ("", "1") or environment.get("RANK", "0") in ("", "0")


def speaks_first() -> bool:
    """Whether this process says what ends it at once: rank 0, or any once they have agreed who does.

    Before, they most likely all have the same to say.
    """
    return _joined or leads()


def from_environment(environment: Mapping[str, str] = os.environ) -> Group:
    """Read what torchrun (or a launcher that sets the same variables) says of this process.

    Raises:
        UsageError: the variables are incomplete or do not go together.
    """
    told = [name for name in ("WORLD_SIZE", "RANK") if environment.get(name)]
    if not told:
        return ALONE
    missing = [name for name in _REQUIRED if not environment.get(name)]
    if missing and environment.get("WORLD_SIZE") != "1":  # 1: alone, whoever started it
        raise UsageError(
            f"{told[0]} is set in the environment, but not {' and '.join(missing)}: start several processes with "
            f"torchrun, which sets them all, or unset {told[0]}."
        )
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0)
    local_rank = _number(environment, "LOCAL_RANK", 0)
    if world_size > 1:
        _number(environment, "MASTER_PORT", 0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else world_size
    if rank >= world_size:
        raise UsageError(f"RANK={rank} in the environment is not below WORLD_SIZE={world_size}: start with torchrun.")
    if local_rank >= local_size or local_size > world_size:
        raise UsageError(
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} in the environment do not go with "
            f"WORLD_SIZE={world_size}: start with torchrun."
        )
    return Group(rank=rank, world_size=world_size, local_rank=local_rank, local_size=local_size)


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, str(least))
    # Not int() alone: it takes "1_000" and " 1" as well.
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < least:
        raise UsageError(f"{name} in the environment must be a whole number from {least} on, not {text!r}.")
    return int(text)


__all__ = ["ALONE", "Group", "Part", "from_environment", "leads", "note_joined", "speaks_first"]
