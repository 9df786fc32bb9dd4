"""What an engine reports while it works. Engines yield records and never draw; the console and the log read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["plan", "synthesis", "distillation", "evaluation", "quality", "export"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of progress."""

    phase: Phase
    #: Position and end of the phase, in ``unit``; an open end is None.
    step: int
    total: int | None
    unit: Literal["images", "steps", "batches"]
    #: Share of the whole run that is done, 0 to 1.
    progress: float
    #: Seconds since the run started.
    elapsed: float
    #: Seconds the run is expected to go on.
    remaining: float | None = None
    #: Units per second, of late.
    rate: float | None = None
    #: Losses, learning rates and the like, as plain floats.
    values: Mapping[str, float] = field(default_factory=dict)


__all__ = ["Phase", "Record"]
