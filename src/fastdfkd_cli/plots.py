"""The pictures of a benchmark: accuracy against synthesis time (the paper's Figure 1), a grid of samples for each
method (its Figure 3), and the quality signal against accuracy.

Charts need matplotlib, ``pip install "fastdfkd[plots]"``; the grid of samples does not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fastdfkd_cli.errors import printable
from fastdfkd_cli.output import write_bytes
from fastdfkd_cli.tables import FEWEST, QUALITY

NO_MATPLOTLIB = 'no charts without matplotlib: pip install "fastdfkd[plots]"'
#: Width in pixels that each run's samples are reduced to, and what stands between them.
_COLUMN, _GAP, _TITLE = 420, 16, 22
#: Axes whose values make lines of one curve rather than panels of their own.
_CURVES = ("steps", "rounds", "images", "time_budget")
_MOST_PANELS = 24


def draw_all(summary: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Draw what there are figures for, below ``folder``, and return the files.

    Args:
        folder: the benchmark's, where the runs are.
        say: is told why something is not drawn.
    """
    drawn = []
    if write_sample_grid(summary, folder, folder / "samples.png"):
        drawn.append(folder / "samples.png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        say(NO_MATPLOTLIB)
        return drawn
    for name, draw in (("accuracy-time.png", write_accuracy_time), ("quality.png", write_quality)):
        if draw(summary, folder / name):
            drawn.append(folder / name)
    return drawn


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, without the state and the windows of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3 if panels != 4 else 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in found[panels:]:
        axes.remove()
    return figure, found[:panels]


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes(path, buffer.getvalue())


def _style(index: int) -> tuple[str, str]:
    """Colour and marker of a row; 100 rows look different."""
    return f"C{index % 10}", "osD^vP*X<>"[(index + index // 10) % 10]


def _legend(axes: Any) -> None:
    """Beside the axes: within them it would cover points."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _literal(text: str) -> str:
    """A name as matplotlib draws it letter by letter: no mathematics, no hidden legend entry."""
    text = printable(text).encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def write_accuracy_time(summary: Mapping[str, Any], path: Path) -> bool:
    """Top-1 against seconds of synthesis, on a logarithmic axis: a curve for each row, its runs as small points.

    A panel for each teacher and student. Rows without synthesis are broken lines across.

    Returns:
        Whether there was anything to draw.
    """
    panels: dict[str, dict[str, list[tuple[float, float, Mapping[str, Any]]]]] = {}
    for line in summary["lines"]:
        accuracy, seconds = (line["figures"][name]["mean"] for name in ("top1", "synthesis_seconds"))
        if line["method"] == "train":
            seconds = 0.0
        if accuracy is None or seconds is None:
            continue
        place = ", ".join(label for axis, label in line["labels"].items() if axis not in _CURVES and "." not in axis)
        panels.setdefault(place, {}).setdefault(line["row"], []).append((seconds, accuracy, line))
    panels = dict(list(panels.items())[:_MOST_PANELS])
    if not panels:
        return False
    figure, all_axes = _figure(len(panels))
    rows = list(dict.fromkeys(row for place in panels.values() for row in place))
    for axes, (place, of_rows) in zip(all_axes, panels.items(), strict=True):
        for row, points in of_rows.items():
            colour, marker = _style(rows.index(row))
            timed = sorted((point for point in points if point[0] > 0), key=lambda point: point[0])
            for _, accuracy, _ in (point for point in points if point[0] <= 0):
                axes.axhline(accuracy, color=colour, linestyle="--", linewidth=1, label=_literal(row))
            if not timed:
                continue
            axes.plot(
                [point[0] for point in timed],
                [point[1] for point in timed],
                color=colour,
                marker=marker,
                markersize=8,
                linewidth=1,
                label=_literal(row),
            )
            runs = [run["figures"] for point in timed for run in point[2]["runs"] if run["figures"] is not None]
            runs = [run for run in runs if run["top1"] is not None and run["synthesis_seconds"]]
            axes.plot(
                [run["synthesis_seconds"] for run in runs],
                [run["top1"] for run in runs],
                color=colour,
                marker=".",
                linestyle="",
                alpha=0.5,
            )
        axes.set_xscale("log", subs=(1.5, 2, 3, 4, 5, 6, 8))  # all nine would run into one another
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(lambda seconds, _: f"{seconds:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.set_xlabel("seconds of synthesis")
        axes.set_ylabel("top-1 (%)")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.set_title(_literal(place or summary["title"]), fontsize=10)
        _legend(axes)
    _save(figure, path)
    return True


def write_quality(summary: Mapping[str, Any], path: Path) -> bool:
    """Each figure of the quality signal that varies against top-1, a point for each run, with both correlations.

    Returns:
        Whether there was anything to draw.
    """
    of_all = {entry["figure"]: entry for entry in summary["quality"] if entry["teacher"] is None}
    # What the teacher says to one set of images is the same for all its students.
    shown = [name for name in QUALITY if of_all[name]["n"] >= FEWEST and of_all[name]["spearman"] is not None]
    if not shown:
        return False
    figure, all_axes = _figure(len(shown))
    rows = list(dict.fromkeys(point["row"] for point in summary["points"]))
    for axes, name in zip(all_axes, shown, strict=True):
        for index, row in enumerate(rows):
            pairs = [
                (point["quality"][name], point["top1"])
                for point in summary["points"]
                if point["row"] == row and point["top1"] is not None and (point["quality"] or {}).get(name) is not None
            ]
            axes.plot(
                [pair[0] for pair in pairs],
                [pair[1] for pair in pairs],
                color=_style(index)[0],
                marker=_style(index)[1],
                linestyle="",
                label=_literal(row),
            )
        entry = of_all[name]
        said = [f"{word} {entry[kind]:+.2f}" for word, kind in (("Spearman", "spearman"), ("Pearson", "pearson"))]
        axes.set_title(", ".join(said), fontsize=9)
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel("top-1 (%)")
        axes.grid(visible=True, alpha=0.2)
    _legend(all_axes[-1])
    _save(figure, path)
    return True


def write_sample_grid(summary: Mapping[str, Any], folder: Path, path: Path) -> bool:
    """The samples of each line's first finished run, side by side under its name.

    Returns:
        Whether there was anything to draw.
    """
    found: list[tuple[str, Image.Image]] = []
    for line in summary["lines"]:
        for run in line["runs"]:
            if run["figures"] is None:
                continue
            picture = _opened(folder / run["folder"] / "samples.png")
            if picture is not None:
                found.append((" ".join([line["row"], *line["labels"].values()]), picture))
                break
    if not found:
        return False
    return _tile(found[:_MOST_PANELS], path)


def _opened(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as picture:
            wide = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None  # a run without a picture, or somebody's other file: the others are shown
    height = max(1, min(4 * _COLUMN, round(wide.height * _COLUMN / wide.width)))
    return wide.resize((_COLUMN, height), Image.Resampling.LANCZOS)


def _tile(found: Sequence[tuple[str, Image.Image]], path: Path) -> bool:
    columns = min(len(found), 3, math.ceil(math.sqrt(len(found))))
    rows = [found[start : start + columns] for start in range(0, len(found), columns)]
    heights = [max(picture.height for _, picture in row) + _TITLE + _GAP for row in rows]
    size = (columns * (_COLUMN + _GAP) + _GAP, sum(heights) + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            left = _GAP + column * (_COLUMN + _GAP)
            text = printable(title).encode("latin-1", "replace").decode("latin-1")
            while len(text) > 1 and font.getlength(text) > _COLUMN:
                text = text[:-1]
            draw.text((left, top), text, fill="black", font=font)
            sheet.paste(picture, (left, top + _TITLE))
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
    return True


__all__ = ["NO_MATPLOTLIB", "draw_all", "write_accuracy_time", "write_quality", "write_sample_grid"]
