"""From the reports of a benchmark's runs to its table: means, spreads, speed-ups, expectations, and how it is written.

:func:`summarise` gives plain values, which the tables here and the pictures of :mod:`fastdfkd_cli.plots` show.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastdfkd_cli.console import format_seconds
from fastdfkd_cli.errors import printable
from fastdfkd_cli.matrix import Benchmark, Line
from fastdfkd_cli.output import safe_text

#: The quality signal's figures (:class:`fastdfkd_cli.quality.Quality`) that are compared with accuracy.
QUALITY = (
    "agreement",
    "divergence",
    "similarity",
    "recognised",
    "coverage",
    "teacher_confidence",
    "student_confidence",
    "statistics_distance",
)
#: Fewest runs that a correlation is stated of.
FEWEST = 3
Point = Mapping[str, Any]


# -- figures of a run --------------------------------------------------------------------------------------------


def figures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of one run's report; None for what it does not hold."""
    judged = report.get("evaluation") or {}
    seconds = report.get("seconds") or {}
    return {
        "top1": _number(judged.get("top1")),
        "top5": _number(judged.get("top5")),
        "agreement": _number(judged.get("agreement")),
        "synthesis_seconds": _number(seconds.get("synthesis")),
        "total_seconds": _number(seconds.get("total")),
        "images": _number(report.get("images")),
        "kd_steps": _number(report.get("kd_steps")),
    }


def _number(value: Any) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


def statistics_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, spread (largest minus smallest) and sample deviation of what was measured; None where nothing was."""
    found = [value for value in values if value is not None]
    return {
        "n": len(found),
        "mean": statistics.fmean(found) if found else None,
        "spread": max(found) - min(found) if found else None,
        "deviation": statistics.stdev(found) if len(found) > 1 else None,
        "values": list(values),
    }


# -- correlation -------------------------------------------------------------------------------------------------


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None where it is not defined: fewer than three pairs, or one side is constant."""
    if len(x) < FEWEST or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return max(-1.0, min(1.0, statistics.correlation(x, y)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's correlation, that of the ranks; equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2
        start = end + 1
    return ranks


def correlations(points: Sequence[Point]) -> list[dict[str, Any]]:
    """How each quality figure follows top-1, over all runs and, where there are several teachers, under each.

    Args:
        points: of each finished run, ``teacher``, ``top1`` and ``quality``.
    """
    found = []
    teachers = list(dict.fromkeys(point["teacher"] for point in points))
    for teacher in [None, *(teachers if len(teachers) > 1 else [])]:
        for figure in QUALITY:
            pairs = [
                (value, point["top1"])
                for point in points
                if (teacher is None or point["teacher"] == teacher)
                and (value := _number((point["quality"] or {}).get(figure))) is not None
                and point["top1"] is not None
            ]
            x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            found.append(
                {
                    "figure": figure,
                    "teacher": teacher,
                    "n": len(pairs),
                    "spearman": spearman(x, y),
                    "pearson": pearson(x, y),
                }
            )
    return found


# -- the summary -------------------------------------------------------------------------------------------------


def summarise(
    benchmark: Benchmark, reports: Mapping[str, Mapping[str, Any]], states: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that is known of a benchmark, in plain values.

    Args:
        reports: by a cell's name, what its finished run reports.
        states: by a cell's name, ``done``, ``unfinished``, ``missing``, or why it failed or was left out.
    """
    lines: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for line in benchmark.lines:
        runs: list[dict[str, Any]] = []
        for cell in line.cells:
            report = reports.get(cell.name)
            figures = figures_of(report) if report is not None else None
            quality = (report or {}).get("quality")
            runs.append(
                {
                    "cell": cell.name,
                    "folder": f"runs/{cell.folder}",
                    "seed": cell.seed,
                    "state": states.get(cell.name, "missing"),
                    "figures": figures,
                    "quality": quality,
                }
            )
            # A training has no teacher, and its quality is measured on real images alone.
            if report is not None and figures is not None and report.get("teacher"):
                teacher = report["teacher"].get("name", "")
                points.append(
                    {"row": line.row, "teacher": teacher, "top1": figures["top1"], "quality": quality, **line.labels}
                )
        done: list[dict[str, Any]] = [run["figures"] for run in runs if run["figures"] is not None]
        names = ("top1", "top5", "agreement", "synthesis_seconds", "total_seconds", "images", "kd_steps")
        lines.append(
            {
                "row": line.row,
                "labels": dict(line.labels),
                "method": line.method,
                "note": line.note,
                "finished": len(done),
                "runs": runs,
                "figures": {name: statistics_of([figures[name] for figures in done]) for name in names},
                "speed_up": None,
                "paper": dict(line.paper),
            }
        )
    for summary in lines:
        summary["speed_up"] = _speed_up(benchmark, lines, summary)
    for line, summary in zip(benchmark.lines, lines, strict=True):
        summary["expectations"] = _expectations(line, summary, lines)
    return {
        "title": benchmark.title,
        "source": benchmark.source,
        "speed_up_against": benchmark.speed_up_against or None,
        "lines": lines,
        "quality": correlations(points),
        "points": points,
        "missed": [said["says"] for summary in lines for said in summary["expectations"] if said["met"] is False],
        "open": sum(said["met"] is None for summary in lines for said in summary["expectations"]),
    }


def _counterpart(lines: Sequence[dict[str, Any]], row: str, labels: Mapping[str, str]) -> dict[str, Any] | None:
    """The line of another row that agrees with ``labels`` wherever both have an axis; None if there is not just one."""
    found = [
        line
        for line in lines
        if line["row"] == row and all(line["labels"].get(axis, label) == label for axis, label in labels.items())
    ]
    return found[0] if len(found) == 1 else None


def _speed_up(benchmark: Benchmark, lines: Sequence[dict[str, Any]], summary: dict[str, Any]) -> float | None:
    """How many times shorter the synthesis is than that of the row that the file names."""
    if not benchmark.speed_up_against:
        return None
    reference = _counterpart(lines, benchmark.speed_up_against, summary["labels"])
    if reference is None:
        return None
    theirs, own = (line["figures"]["synthesis_seconds"]["mean"] for line in (reference, summary))
    return theirs / own if theirs and own else None


def _value(summary: Mapping[str, Any], figure: str) -> float | None:
    return summary["speed_up"] if figure == "speed_up" else summary["figures"][figure]["mean"]


def _expectations(line: Line, summary: Mapping[str, Any], lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each thing that is expected of a line's mean: met, missed, or open while runs of it are not finished."""
    said = []
    name = "/".join([line.row, *line.labels.values()])
    whole = summary["finished"] == len(line.cells) and line.cells
    for figure, demands in line.expect.items():
        value = _value(summary, figure)
        stated = [
            (demand, bound)
            for demand, bounds in demands.items()
            if demand != "within"  # it goes with near
            for bound in (bounds if demand == "above" else [bounds])
        ]
        for demand, bound in stated:
            met: bool | None
            if demand == "above":
                other = _counterpart(lines, bound, line.labels)
                theirs = _value(other, figure) if other is not None else None
                ready = whole and other is not None and other["finished"] == len(other["runs"]) > 0
                met = value is not None and theirs is not None and value > theirs if ready else None
                wants = f"above {bound}" + (f" ({theirs:.2f})" if theirs is not None else "")
            else:
                tolerance = demands.get("within", 0)
                met = None
                if whole:
                    met = value is not None and _holds(demand, value, bound, tolerance)
                wants = {
                    "at_least": f"at least {bound:g}" if demand == "at_least" else "",
                    "at_most": f"at most {bound:g}" if demand == "at_most" else "",
                    "near": f"{bound:g} ± {tolerance:g}" if demand == "near" else "",
                }[demand]
            measured = "not measured" if value is None else f"{value:.2f}"
            said.append(
                {
                    "figure": figure,
                    "demand": demand,
                    "bound": bound,
                    "value": value,
                    "met": met,
                    "says": f"{name}: {figure} is {measured}, expected {wants}",
                }
            )
    return said


def _holds(demand: str, value: float, bound: float, tolerance: float) -> bool:
    if demand == "at_least":
        return value >= bound
    if demand == "at_most":
        return value <= bound
    return abs(value - bound) <= tolerance


# -- tables ------------------------------------------------------------------------------------------------------


def columns_of(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table that people read: one line for each line of the benchmark."""
    lines = summary["lines"]
    axes = list(dict.fromkeys(axis for line in lines for axis in line["labels"]))
    against = summary["speed_up_against"]
    quoted = [name for name in ("top1", "synthesis_hours", "speed_up") if any(name in line["paper"] for line in lines)]
    expects = any(line["expectations"] for line in lines)
    header = ["row", *axes, "runs", "top-1 %", "synthesis", "total"]
    header += ["speed-up"] if against else []
    header += [
        {"top1": "paper top-1 %", "synthesis_hours": "paper synthesis", "speed_up": "paper speed-up"}[q] for q in quoted
    ]
    header += ["expected"] if expects else []
    rows = []
    for line in lines:
        figures, paper = line["figures"], line["paper"]
        cells = [line["row"], *(line["labels"].get(axis, "") for axis in axes)]
        cells.append(f"{line['finished']}/{len(line['runs'])}" if line["runs"] else "")
        cells.append(_accuracy(figures["top1"]))
        cells += [_seconds(figures[name]["mean"]) for name in ("synthesis_seconds", "total_seconds")]
        if against:
            cells.append(f"{line['speed_up']:.1f}x" if line["speed_up"] is not None else "")
        for name in quoted:
            value = paper.get(name)
            unit = {"top1": "{:.2f}", "synthesis_hours": "{:g}h", "speed_up": "{:g}x"}[name]
            cells.append(unit.format(value) if value is not None else "")
        if expects:
            words = {True: "met", False: "MISSED", None: "open"}
            cells.append(", ".join(words[said["met"]] for said in line["expectations"]))
        rows.append(cells)
    return header, rows


def _accuracy(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return ""
    return f"{figure['mean']:.2f}" + (f" ({figure['spread']:.2f})" if figure["n"] > 1 else "")


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}s" if value < 60 else format_seconds(value)


def _correlation_columns(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            entry["figure"],
            entry["teacher"] if entry["teacher"] is not None else "all",
            str(entry["n"]),
            *("" if entry[kind] is None else f"{entry[kind]:+.2f}" for kind in ("spearman", "pearson")),
        ]
        for entry in summary["quality"]
        if entry["n"] >= FEWEST
    ]
    return ["quality signal", "teacher", "runs", "Spearman with top-1", "Pearson"], rows


#: Below every table.
NOTE = "Means over the seeds; in brackets the spread, largest minus smallest. Synthesis and total are wall-clock time."


def as_text(summary: Mapping[str, Any]) -> str:
    """The tables in columns, for a terminal."""
    parts = [printable(summary["title"]), "", _aligned(*columns_of(summary)), "", NOTE]
    header, rows = _correlation_columns(summary)
    if rows:
        parts += ["", _aligned(header, rows)]
    parts += [f"missed: {printable(said)}" for said in summary["missed"]]
    return "\n".join(parts)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_markdown(summary: Mapping[str, Any]) -> str:
    """The tables as GitHub shows them; names are text, whatever they hold."""
    parts = [f"# {safe_text(summary['title'])}", "", _piped(*columns_of(summary)), "", NOTE]
    header, rows = _correlation_columns(summary)
    if rows:
        parts += ["", _piped(header, rows)]
    if summary["missed"]:
        parts += ["", *(f"- missed: {safe_text(said)}" for said in summary["missed"])]
    return "\n".join(parts)


def _piped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *([safe_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(summary: Mapping[str, Any]) -> str:
    """A line for each line of the benchmark, figures in full: seconds, per cent, and both measures of spread."""
    lines = summary["lines"]
    axes = list(dict.fromkeys(axis for line in lines for axis in line["labels"]))
    figures = ("top1", "synthesis_seconds", "total_seconds", "images", "kd_steps")
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    measures = [f"{figure}_{measure}" for figure in figures for measure in ("mean", "spread", "deviation")]
    paper = [f"paper_{name}" for name in ("top1", "synthesis_hours", "speed_up", "images")]
    head = ["row", *axes, "method", "finished", "runs", *measures, "speed_up", *paper, "expectations_missed"]
    writer.writerow(_plain(cell) for cell in head)
    for line in lines:
        row: list[Any] = [line["row"], *(line["labels"].get(axis, "") for axis in axes), line["method"]]
        row += [line["finished"], len(line["runs"])]
        row += [line["figures"][figure][measure] for figure in figures for measure in ("mean", "spread", "deviation")]
        row += [line["speed_up"], *(line["paper"].get(name.removeprefix("paper_")) for name in paper)]
        row.append(sum(said["met"] is False for said in line["expectations"]))
        writer.writerow("" if cell is None else _plain(cell) if isinstance(cell, str) else cell for cell in row)
    return table.getvalue().rstrip("\n")


def _plain(text: str) -> str:
    """A name as no spreadsheet takes it for a formula, and no terminal for a command."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


__all__ = [
    "QUALITY",
    "as_csv",
    "as_markdown",
    "as_text",
    "columns_of",
    "correlations",
    "figures_of",
    "pearson",
    "spearman",
    "statistics_of",
    "summarise",
]
