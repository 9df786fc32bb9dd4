"""What a person sees: progress, messages and tables on stderr; results, for people and for programs, on stdout.

Results are written with plain ``print``: Rich colours and wraps as it sees fit (it forces colour under some CI
systems), and a program that reads stdout wants neither. Names of models, classes and files come from elsewhere:
whatever is printed, nothing in it acts on the terminal (:func:`fastdfkd_cli.errors.printable`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastdfkd_cli.errors import printable
from fastdfkd_cli.records import Record

#: Seconds between two plain lines of progress.
PLAIN_INTERVAL = 5.0


# -- results on stdout -------------------------------------------------------------------------------------------


def _print(line: str, file: TextIO | None = None) -> None:
    """Print a line on stdout, or ``file``, whatever it holds and whatever letters the stream knows."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    line = printable(line).encode(encoding, "backslashreplace").decode(encoding)
    print(line, file=file, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinities, which JSON does not have, become null."""
    # ASCII alone: what is not stands in JSON's own escapes.
    print(json.dumps(_finite(result), indent=2, allow_nan=False).replace("\x7f", "\\u007f"), flush=True)


def print_values(result: Mapping[str, Any]) -> None:
    """Print ``key value`` lines on stdout, nested keys dotted; nothing is printed for an absent (None) value."""
    for key, value in flatten(result):
        _print(f"{key} {format_value(value)}")


def print_line(text: object) -> None:
    """Print a line on stdout, or several that the text is made of."""
    for line in str(text).split("\n"):
        _print(line)


def print_columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print left-aligned columns on stdout; the last one is as long as it likes."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:-1], widths, strict=True)]
        _print("  ".join([*cells, line[-1]]).rstrip())


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping under dotted keys, without the absent (None) ones."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def format_value(value: Any) -> str:
    """Format a figure for reading: six significant digits at most, lists joined by spaces."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 or not math.isfinite(value) else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return " ".join(map(format_value, value))
    return " ".join(str(value).split())


def format_seconds(seconds: float) -> str:
    """Format a duration: ``8s``, ``3m20s``, ``2h05m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- progress on stderr ------------------------------------------------------------------------------------------


class Progress:
    """Shows a run's records while it works: a live display on a terminal, a plain line every few seconds elsewhere.

    A context manager; :meth:`record` and :meth:`message` are what :mod:`fastdfkd_cli.api` calls back.

    Args:
        live: redraw in place; default: stderr is a terminal that can. (FORCE_COLOR may make Rich take a log file
            for a terminal, so Rich is not asked.)
        interval: seconds between plain lines.
    """

    def __init__(self, *, live: bool | None = None, interval: float = PLAIN_INTERVAL) -> None:
        if live is None:
            live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._console = Console(stderr=True, highlight=False, force_terminal=live or None)
        self._interval = interval
        self._latest: dict[str, Record] = {}
        self._last: Record | None = None
        self._printed: Record | None = None
        self._printed_at = -math.inf
        self._live: Live | None = None
        if live:
            # stdout stays itself: Live would send what is printed there to stderr.
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=False,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None:
            self._catch_up()

    def record(self, record: Record) -> None:
        """Take note of a record; cheap enough for every step."""
        first = record.phase not in self._latest
        if first:
            self._catch_up()
        self._latest[record.phase] = self._last = record
        if self._live is None and (first or time.monotonic() - self._printed_at >= self._interval):
            self._print(record)

    def message(self, text: str) -> None:
        """Print a line on stderr, above a live display."""
        self._catch_up()
        self._write(text)

    def _print(self, record: Record) -> None:
        self._printed, self._printed_at = record, time.monotonic()
        parts = [f"[{record.progress:4.0%}] {record.phase} {_position(record)}", _rate(record), _values(record)]
        if record.remaining is not None:
            parts.append(f"{format_seconds(record.remaining)} left")
        self._write(", ".join(part for part in parts if part))

    def _write(self, text: str) -> None:
        self._console.print(printable(text), markup=False, soft_wrap=True)

    def _catch_up(self) -> None:
        """In a log, say how far it went before something else is said; a live display shows it anyway."""
        if self._live is None and self._last is not None and self._last is not self._printed:
            self._print(self._last)

    def _render(self) -> RenderableType:
        # Called from Live's own thread: copy what the run's thread may be changing.
        latest, last = dict(self._latest), self._last
        if last is None:
            return Text("starting ...", style="dim")
        overall = Table.grid(padding=(0, 1))
        left = "" if last.remaining is None else f"{format_seconds(last.remaining)} left"
        overall.add_row(
            ProgressBar(total=1.0, completed=min(1.0, last.progress), width=40),
            Text(f"{last.progress:4.0%}", style="bold"),
            Text(f"{format_seconds(last.elapsed)} elapsed"),
            Text(left, style="cyan"),
        )
        # The losses take what room is left; without a ratio Rich would shorten every column alike.
        phases = Table.grid(padding=(0, 2), expand=True)
        phases.add_column(no_wrap=True)
        phases.add_column(no_wrap=True, justify="right")
        phases.add_column(no_wrap=True, justify="right")
        phases.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        for phase, record in latest.items():
            style = "bold" if record is last else "dim"
            row = (phase, _position(record), _rate(record), _values(record))
            phases.add_row(*(Text(cell, style=style) for cell in row))
        return Group(overall, phases)


def _position(record: Record) -> str:
    total = "" if record.total is None else f"/{record.total:,}"
    return f"{record.step:,}{total} {record.unit}"


def _rate(record: Record) -> str:
    if record.rate is None:
        return ""
    return f"{record.rate:,.0f} {record.unit}/s" if record.rate >= 10 else f"{record.rate:.2g} {record.unit}/s"


def _values(record: Record) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in record.values.items())


# -- summaries on stderr -----------------------------------------------------------------------------------------


def print_summary(title: str, place: str, figures: Mapping[str, Any], *, as_json: Mapping[str, Any] | None) -> None:
    """End a run: a table for a person at a terminal; ``key value`` lines where stdout or stderr is read elsewhere.

    Args:
        title: the table's.
        place: the result's path: the last line on stdout.
        figures: what to show.
        as_json: the one object to print on stdout instead of lines; None for lines.
    """
    watched = sys.stderr.isatty()
    if watched:
        print_table(title, {"path": place, **figures})
    if as_json is not None:
        print_json(as_json)
        return
    if not (watched and sys.stdout.isatty()):
        print_values(figures)
    print_line(place)


def print_table(title: str, rows: Mapping[str, Any]) -> None:
    """Print a short two-column table on stderr, without the absent (None) values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in flatten(rows):
        table.add_row(Text(printable(key)), Text(printable(format_value(value))))
    Console(stderr=True, highlight=False).print(table)


def print_error(text: str, *, kind: str = "error") -> None:
    """Print one line ``fastdfkd: error: ...`` on stderr, whatever ``text`` holds."""
    _print(f"fastdfkd: {kind}: {' '.join(text.split())}", sys.stderr)


__all__ = [
    "Progress",
    "flatten",
    "format_seconds",
    "format_value",
    "print_columns",
    "print_error",
    "print_json",
    "print_line",
    "print_summary",
    "print_table",
    "print_values",
]
