"""What an engine reports while it works. Engines yield records and never draw; the console and the log read them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Phase = Literal["plan", "reading", "synthesis", "distillation", "training", "evaluation", "quality", "export"]


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


class MetricsLog:
    """Hands records on, and remembers them for ``metrics.jsonl``.

    Each engine counts its own progress and time; what is said of the whole run never goes back.

    Args:
        on_record: takes each record as the whole run sees it.
    """

    def __init__(self, on_record: Callable[[Record], None] | None = None) -> None:
        self.on_record = on_record
        self._lines: list[str] = []
        self._progress = 0.0
        self._started = time.perf_counter()

    def __call__(self, record: Record) -> None:
        self._progress = max(self._progress, record.progress)
        record = replace(record, progress=self._progress, elapsed=self.elapsed)
        self._lines.append(json.dumps({**vars(record), "values": dict(record.values)}) + "\n")
        if self.on_record is not None:
            self.on_record(record)

    def drain(self, records: Iterable[Record]) -> None:
        for record in records:
            self(record)

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run, earlier parts of an interrupted one included."""
        return time.perf_counter() - self._started

    def content(self) -> bytes:
        """What ``metrics.jsonl`` holds: a JSON object a line."""
        return "".join(self._lines).encode()

    def restore(self, content: bytes, elapsed: float) -> None:
        """Go on from an earlier :meth:`content`, which took so many seconds."""
        self._lines = content.decode().splitlines(keepends=True)
        if self._lines:
            self._progress = json.loads(self._lines[-1])["progress"]
        self._started -= elapsed


__all__ = ["MetricsLog", "Phase", "Record"]
