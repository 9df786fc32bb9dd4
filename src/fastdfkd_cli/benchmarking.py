"""The engine behind ``fastdfkd benchmark``: every cell of a matrix is one run, made once and kept.

::

    OUTPUT/benchmark.json            all figures; with benchmark.md, benchmark.csv, benchmark.txt and the pictures
    OUTPUT/runs/CELL/                what `fastdfkd distill` leaves, or `fastdfkd train`
    OUTPUT/runs/CELL.json            what the run was asked for: another request is refused, not mixed in
    OUTPUT/runs/CELL.checkpoints/    of a run that is not finished

A run that was stopped goes on from its checkpoint (:mod:`fastdfkd_cli.resume`), bit for bit on the CPU; one that is
finished is read and never made again. One that another benchmark finished, in a folder that is named, is copied: tables
share rows, and machines share a table.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdfkd_cli import __version__, api, api_train
from fastdfkd_cli.errors import FastDFKDError, UsageError, brief, is_out_of_memory
from fastdfkd_cli.job import OnMessage, override, silent
from fastdfkd_cli.matrix import Benchmark, Cell, Line, read_benchmark
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.output import (
    OWNER_KEY,
    StagedDirectory,
    differences,
    lock_folder,
    named,
    plain_json,
    unlock_folder,
    write_bytes,
    write_json,
    writing,
)
from fastdfkd_cli.plots import draw_all
from fastdfkd_cli.quality import shared_images
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.records import Record
from fastdfkd_cli.resume import checkpoint_folder, finished
from fastdfkd_cli.settings import CHECKPOINT_EVERY
from fastdfkd_cli.tables import as_csv, as_markdown, as_text, summarise
from fastdfkd_cli.training_config import from_values

#: Settings are checked for an input of this size before the first run; each run checks them for its teacher's.
_PROBE = (3, 32, 32)
_RESULTS = "benchmark.json"


@dataclass(frozen=True)
class BenchmarkResult:
    """What :func:`benchmark` gives back."""

    path: Path
    #: What ``benchmark.json`` holds.
    summary: dict[str, Any]
    #: By a cell's name, why its run failed.
    failures: dict[str, FastDFKDError]
    #: The charts and the grid of samples that were drawn.
    pictures: list[Path]


def benchmark(
    source: str | Path,
    *,
    output: str | Path,
    variables: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    reuse: Sequence[str | Path] = (),
    checkpoint_every: float = CHECKPOINT_EVERY,
    device: str = "auto",
    on_record: Callable[[Record], None] | None = None,
    on_message: OnMessage | None = None,
) -> BenchmarkResult:
    """Make the runs of a benchmark that are missing, go on with the unfinished, and put all figures together.

    A run that fails does not hold up the others. When it is stopped, the tables of what is finished are written first.

    Args:
        source: a YAML file (:mod:`fastdfkd_cli.matrix`), or the name of one that comes with the package.
        output: the folder; one that an earlier call left is gone on with.
        variables: values for the file's variables.
        only: patterns of cells, lines or rows to run (``Fast*``, ``Fast/5/s0``); the table shows all that is finished.
        reuse: folders of other benchmarks. A run that was finished there, under whatever name, for the very same
            request, is copied and not made again.
        others: as in :func:`fastdfkd_cli.api.distill`.

    Raises:
        UsageError: the file does not make sense; a folder is not a benchmark's; a run was made for another request.
    """
    say = on_message or silent
    plan = read_benchmark(source, variables)
    cells = _possible(plan, plan.selected(only), say)
    folder = Path(output)
    # Everything that can be said before the first run is said before it.
    requests = {cell.name: _checked(plan, cell) for cell in cells}
    _require_own(folder)
    elsewhere = _finished_in(reuse)
    for cell in cells:
        _require_same(folder, cell, requests[cell.name])
    failures: dict[str, FastDFKDError] = {}
    with _locked(folder), shared_images():
        (folder / "runs").mkdir(exist_ok=True)
        write_results(plan, folder, {})
        left = [cell for cell in cells if _done(folder, cell) is None]
        if len(left) < len(cells):
            say(f"{len(cells) - len(left)} of {len(cells)} runs are finished already")
        for cell in list(left):
            if (run := elsewhere.get(_key(requests[cell.name]))) is not None:
                _copy(folder, cell, requests[cell.name], run)
                say(f"run {cell.name}: copied from {run}")
                left.remove(cell)
        try:
            for index, cell in enumerate(left):
                say(f"run {index + 1} of {len(left)}: {cell.name}")
                try:
                    _run(
                        folder,
                        cell,
                        requests[cell.name],
                        device=device,
                        checkpoint_every=checkpoint_every,
                        on_record=_of_all(on_record, index, len(left)),
                        on_message=say,
                    )
                except (FastDFKDError, RuntimeError, MemoryError) as error:
                    if not isinstance(error, FastDFKDError):
                        if not is_out_of_memory(error):
                            raise
                        error = FastDFKDError("The device is out of memory; lower the batch sizes.")
                    failures[cell.name] = error
                    say(f"run {cell.name} failed: {error}")
                write_results(plan, folder, failures)  # whatever happens next, this is kept
        except KeyboardInterrupt as stop:
            done = sum(_done(folder, cell) is not None for cell in cells)
            stop.__notes__ = [
                f"{done} of {len(cells)} runs are finished and kept in {folder}: the same command goes on"
            ]
            raise
        summary = write_results(plan, folder, failures)
        pictures = draw_all(summary, folder, say)
    return BenchmarkResult(folder, summary, failures, pictures)


def plan_benchmark(
    source: str | Path,
    *,
    output: str | Path,
    variables: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    reuse: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """What :func:`benchmark` would do: each cell's state, and how long what is left takes, by what is finished.

    Nothing is loaded or written; variables without a value are no hindrance.
    """
    plan = read_benchmark(source, variables)
    folder = Path(output)
    cells = plan.selected(only)
    _require_own(folder)
    elsewhere = _finished_in(reuse)
    states = _states(plan, folder, {})
    for cell in cells:
        complete = states[cell.name] != "done" and not plan.lacking(cell)
        if complete and (run := elsewhere.get(_key(_checked(plan, cell)))) is not None:
            states[cell.name] = f"done in {run}"
    seconds = {cell.name: _seconds(report) for cell in plan.cells if (report := _done(folder, cell)) is not None}
    left = [cell for cell in cells if not states[cell.name].startswith("done") and not _left_out(plan, cell)]
    guesses = {cell.name: _guess(plan, cell, seconds) for cell in left}
    known = [guess for guess in guesses.values() if guess is not None]
    return {
        "source": plan.source,
        "title": plan.title,
        "output": str(folder),
        "cells": [
            {"cell": cell.name, "state": states[cell.name], "seconds": seconds.get(cell.name, guesses.get(cell.name))}
            for cell in cells
        ],
        "done": sum(states[cell.name].startswith("done") for cell in cells),
        "left": len(left),
        # An unfinished run counts as a whole one: what is left of it is not more than that.
        "seconds_left": sum(known) if len(known) == len(left) else None,
        "variables_missing": sorted({name for cell in left for name in plan.lacking(cell)}),
    }


def read_results(
    source: str | Path, *, output: str | Path, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The summary of what is finished in ``output``, without running or writing anything."""
    plan = read_benchmark(source, variables)
    _require_own(Path(output))
    return _summary(plan, Path(output), {})


def write_results(plan: Benchmark, folder: Path, failures: Mapping[str, FastDFKDError]) -> dict[str, Any]:
    """Write the tables of what is finished, and return the summary."""
    summary = _summary(plan, folder, failures)
    for name, written in (("md", as_markdown), ("csv", as_csv), ("txt", as_text)):
        write_bytes(folder / f"benchmark.{name}", f"{written(summary)}\n".encode("utf-8", "backslashreplace"))
    write_json(folder / _RESULTS, summary)
    return summary


# -- one cell ----------------------------------------------------------------------------------------------------


def _run(folder: Path, cell: Cell, request: Mapping[str, Any], **keywords: Any) -> None:
    """Make one run, or what is left of it. What it was asked for is noted before it begins."""
    write_json(_request_file(folder, cell), {OWNER_KEY: __version__, "cell": cell.name, "request": request})
    arguments = dict(request) | {"output": folder / "runs" / cell.folder, "resume": "auto"} | keywords
    if arguments.pop("run", None) == "train":
        for key in ("input_size", "mean", "std"):
            if arguments.get(key) is not None:
                arguments[key] = tuple(arguments[key])
        api_train.train(**arguments)
        return
    for key in ("teacher_options", "student_options"):
        arguments[key] = _options(request[key])
    api.distill(**arguments)


def _key(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True)


def _finished_in(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The runs that other benchmarks finished, by what they were asked for.

    Raises:
        UsageError: one of the folders holds no benchmark.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not (folder / _RESULTS).is_file():
            raise UsageError(f"--reuse {folder} holds no benchmark: name the --output of another one.")
        for path in sorted((folder / "runs").glob("*.json")):
            request = _request_in(path)
            if request is not None and finished(path.with_suffix("")) is not None:
                found.setdefault(_key(request), path.with_suffix(""))
    return found


def _copy(folder: Path, cell: Cell, request: Mapping[str, Any], run: Path) -> None:
    """Have a cell's run from another benchmark's folder."""
    write_json(_request_file(folder, cell), {OWNER_KEY: __version__, "cell": cell.name, "request": request})
    staged = StagedDirectory(folder / "runs" / cell.folder)
    staged.drop_abandoned()
    with staged as staging:
        shutil.copytree(run, staging, dirs_exist_ok=True)


def _left_out(plan: Benchmark, cell: Cell) -> list[str]:
    """The variables for want of which a cell is not run, and nobody is told to give them."""
    return plan.lacking(cell) if cell.optional else []


def _possible(plan: Benchmark, cells: Sequence[Cell], say: OnMessage) -> list[Cell]:
    """The cells that are run; of each row that is left out, its variable is named once."""
    missing: dict[tuple[str, str], int] = {}
    for cell in cells:
        for name in _left_out(plan, cell)[-1:]:
            missing[cell.row, name] = missing.get((cell.row, name), 0) + 1
    for (row, name), count in missing.items():
        say(f"row {row}: {count} run{'s' if count > 1 else ''} left out: --var {name}=VALUE is not given")
    return [cell for cell in cells if not _left_out(plan, cell)]


def _request_file(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / f"{cell.folder}.json"


def _request_in(path: Path) -> dict[str, Any] | None:
    """What a run was asked for; None where none was begun."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: remove it and {path.with_suffix('')}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("request"), dict):
        raise UsageError(f"{path} was not written by this program: choose another --output.")
    return dict(content["request"])


def _require_same(folder: Path, cell: Cell, request: Mapping[str, Any]) -> None:
    """Refuse a cell that was run, or begun, for another request: its figures would stand in the wrong line."""
    noted = _request_in(_request_file(folder, cell))
    if noted is not None and (changed := differences(noted, request)):
        run = folder / "runs" / cell.folder
        raise UsageError(
            f"The run of {cell.name} in {run} was made for other settings: {named(changed)}. Rename the row, choose "
            f"another --output, or remove {run} and {run}.json."
        )


def _done(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The report of a cell's finished run; None where there is none, or nobody noted what it was made for."""
    return finished(folder / "runs" / cell.folder) if _request_file(folder, cell).is_file() else None


def _checked(plan: Benchmark, cell: Cell) -> dict[str, Any]:
    """A cell's request with its variables put in, looked at before any run."""
    request = plan.resolved(cell)
    try:
        if request.get("run") == "train":
            _options({key: request[key] for key in ("num_classes", "input_size", "mean", "std") if key in request})
            from_values(request["overrides"])
        else:
            for key in ("teacher_options", "student_options"):
                _options(request[key])
            override(get_recipe(request["recipe"]).config(_PROBE), request["overrides"])
    except UsageError as error:
        raise UsageError(f"{plan.source}, row {cell.row}: {error}") from error
    return dict(plain_json(request))


def _options(values: Mapping[str, Any]) -> ModelOptions:
    """What a file says of a model beside its reference."""
    said = dict(values)
    for name in ("input_size", "mean", "std"):
        value = said.get(name)
        if value is None:
            continue
        number = int if name == "input_size" else (int, float)
        if not isinstance(value, list) or not all(isinstance(x, number) and not isinstance(x, bool) for x in value):
            raise UsageError(f"{name} must be a list of numbers, not {brief(value)}.")
        said[name] = tuple(value)
    for name in ("arch", "weights"):
        if not isinstance(said.get(name), str | None):
            raise UsageError(f"{name} must be text, not {brief(said[name])}.")
    if said.get("num_classes") is not None and type(said["num_classes"]) is not int:
        raise UsageError(f"num_classes must be a whole number, not {brief(said['num_classes'])}.")
    return ModelOptions(**said)


def _of_all(on_record: Callable[[Record], None] | None, index: int, count: int) -> Callable[[Record], None] | None:
    """Records of one run as a share of all."""
    if on_record is None:
        return None
    return lambda record: on_record(replace(record, progress=(index + record.progress) / count))


# -- all of them -------------------------------------------------------------------------------------------------


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds something else."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output {folder} is a file: name a folder.")
        if folder.is_dir() and not (folder / _RESULTS).is_file() and any(folder.iterdir()):
            raise UsageError(f"--output {folder} is not empty and holds no benchmark: choose another folder.")
    except OSError as error:
        raise UsageError(f"--output {folder} cannot be read: {error.strerror}.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One benchmark at a time in a folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        yield
    finally:
        if lock is not None:
            unlock_folder(lock)


def _states(plan: Benchmark, folder: Path, failures: Mapping[str, FastDFKDError]) -> dict[str, str]:
    states = {}
    for cell in plan.cells:
        run = folder / "runs" / cell.folder
        if cell.name in failures:
            states[cell.name] = f"failed: {failures[cell.name]}"
        elif _done(folder, cell) is not None:
            states[cell.name] = "done"
        elif lacking := _left_out(plan, cell):
            states[cell.name] = f"left out: no {lacking[-1]}"
        else:
            begun = any(checkpoint_folder(run).glob("checkpoint-*.json"))
            states[cell.name] = "unfinished" if begun else "missing"
    return states


def _summary(plan: Benchmark, folder: Path, failures: Mapping[str, FastDFKDError]) -> dict[str, Any]:
    reports = {cell.name: report for cell in plan.cells if (report := _done(folder, cell)) is not None}
    return {OWNER_KEY: __version__, **summarise(plan, reports, _states(plan, folder, failures))}


def _seconds(report: Mapping[str, Any]) -> float | None:
    total = report["seconds"].get("total")
    return float(total) if isinstance(total, int | float) else None


def _guess(plan: Benchmark, cell: Cell, seconds: Mapping[str, float | None]) -> float | None:
    """Seconds that a run will take: as the others of its line, or of its row, or of all."""

    def median(lines: Sequence[Line]) -> float | None:
        known = [value for line in lines for other in line.cells if (value := seconds.get(other.name)) is not None]
        return statistics.median(known) if known else None

    own = [line for line in plan.lines if cell in line.cells]
    row = [line for line in plan.lines if line.row == cell.row]
    for lines in (own, row, list(plan.lines)):
        if (guess := median(lines)) is not None:
            return guess
    return None


__all__ = ["BenchmarkResult", "benchmark", "plan_benchmark", "read_results", "write_results"]
