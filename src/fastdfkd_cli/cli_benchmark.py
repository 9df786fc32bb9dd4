"""``fastdfkd benchmark``: read the options, call the engine, print the table, say whether it came out as expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastdfkd_cli.cli_options import (
    OUTPUT,
    CheckpointEvery,
    Device,
    Json,
    option,
    require_one_process,
)
from fastdfkd_cli.console import Progress, format_seconds, print_columns, print_json, print_line
from fastdfkd_cli.errors import ThresholdError, UsageError
from fastdfkd_cli.settings import parse_interval

MATRIX = "Matrix"
Format = Literal["text", "markdown", "csv", "json"]


def benchmark(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A YAML file, or the name of one that --list shows.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the runs, the tables and the pictures; what is finished in it is kept.",
        ),
    ] = None,
    list_: Annotated[
        bool, option("--list", panel=MATRIX, help="List the benchmarks that come with the package, and stop.")
    ] = False,
    var: Annotated[
        list[str] | None,
        option(
            "--var",
            panel=MATRIX,
            metavar="NAME=VALUE",
            help="A value for a variable of the file, such as a teacher's file or a folder of images; repeatable.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        option(
            "--only",
            panel=MATRIX,
            metavar="PATTERN",
            help="Run these rows, lines or runs alone ('Fast*', 'Fast/5/s0'); repeatable. Default: all.",
        ),
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        option(
            "--reuse",
            panel=MATRIX,
            metavar="DIR",
            help="Copy runs that were finished in another benchmark's --output for the very same request; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        option("--dry-run", panel=OUTPUT, help="List the runs, done or not, and how long the others take, and stop."),
    ] = False,
    form: Annotated[
        Format,
        option("--format", panel=OUTPUT, metavar="NAME", help="text, markdown, csv or json. Default: text."),
    ] = "text",
    json: Json = False,
    checkpoint_every: CheckpointEvery = None,
    device: Device = "auto",
) -> None:
    """Run a matrix of methods, models, settings and seeds, and print the table: did it come out as expected?

    What is finished is kept and what was stopped goes on: give the same command again. Exit code 4 if an expectation
    of the file is missed.

    Example: fastdfkd benchmark digits --output digits-benchmark
    """
    require_one_process("benchmark")
    form = "json" if json else form
    if list_:
        _print_list(form == "json")
        return
    if file is None:
        raise UsageError("Name a benchmark's file, or one that `fastdfkd benchmark --list` shows.")
    if output is None:
        raise UsageError("Name the folder for the runs and the tables with --output DIR.")
    variables = _variables(var or [])
    every = parse_interval(checkpoint_every)
    from fastdfkd_cli.matrix import read_benchmark

    read_benchmark(file, variables).selected(only or [])  # an error in the file shows before torch is loaded

    from fastdfkd_cli import benchmarking
    from fastdfkd_cli.runtime import tune_process

    if dry_run:
        _print_plan(
            benchmarking.plan_benchmark(file, output=output, variables=variables, only=only or [], reuse=reuse or []),
            form == "json",
        )
        return
    tune_process()
    try:
        with Progress() as progress:
            result = benchmarking.benchmark(
                file,
                output=output,
                variables=variables,
                only=only or [],
                reuse=reuse or [],
                checkpoint_every=every,
                device=device,
                on_record=progress.record,
                on_message=progress.message,
            )
    except KeyboardInterrupt:
        _print_tables(benchmarking.read_results(file, output=output, variables=variables), form)
        raise
    _print_tables(result.summary, form)
    if form == "text":
        print_line(result.path)
    if result.failures:
        cell, error = next(iter(result.failures.items()))
        count = len(result.failures)
        raise type(error)(f"{count} run{'s' if count > 1 else ''} failed, the first {cell}: {error}")
    if missed := result.summary["missed"]:
        more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        raise ThresholdError(f"Not as expected: {missed[0]}{more}.")


def _variables(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip() or not value:
            raise UsageError(f"--var takes NAME=VALUE, such as teacher=wrn40_2.safetensors, not {word!r}.")
        found[name.strip()] = value
    return found


def _print_list(as_json: bool) -> None:
    from fastdfkd_cli.matrix import read_benchmark, shipped

    rows = []
    for name in shipped():
        plan = read_benchmark(name)
        rows.append({"name": name, "title": plan.title, "runs": len(plan.cells), "variables": list(plan.variables)})
    if as_json:
        print_json({"benchmarks": rows})
        return
    print_columns(
        ("benchmark", "runs", "title"), [(str(row["name"]), str(row["runs"]), str(row["title"])) for row in rows]
    )


def _print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return

    def said(seconds: float | None) -> str:
        return "" if seconds is None else format_seconds(seconds)

    print_columns(
        ("run", "state", "time"),
        [(cell["cell"], cell["state"], said(cell["seconds"])) for cell in plan["cells"]],
    )
    left = f", about {said(plan['seconds_left'])}" if plan["left"] and plan["seconds_left"] is not None else ""
    print_line(f"{plan['done']} done, {plan['left']} left{left}")
    if plan["variables_missing"]:
        print_line(f"needs {' '.join(f'--var {name}=VALUE' for name in plan['variables_missing'])}")


def _print_tables(summary: Mapping[str, Any], form: Format) -> None:
    from fastdfkd_cli.tables import as_csv, as_markdown, as_text

    if form == "json":
        print_json(summary)
    else:
        print_line({"text": as_text, "markdown": as_markdown, "csv": as_csv}[form](summary))


__all__ = ["benchmark"]
