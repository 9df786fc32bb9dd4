"""The file of a benchmark: rows, what is varied over them, and the cells (one run each) that follow.

::

    title: Two methods on the built-in digits
    variables: {teacher: builtin/digits}          # ${teacher} below; --var teacher=FILE gives another
    defaults: {teacher: "${teacher}", student: cifar/wrn10_1, recipe: digits}
    matrix: {steps: [2, 5], seed: [0, 1, 2]}      # for each row
    rows:
      - {name: Fast, method: fast, expect: {top1: {at_least: 60}}, paper: {"2": {top1: 88.36}}}

A row's keys are put on the defaults', an axis's on the row's. Seeds are repeats of one line of the table; every other
axis makes lines. Nothing here reads a model or imports torch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdfkd_cli.config import full_key
from fastdfkd_cli.errors import UsageError, brief, did_you_mean
from fastdfkd_cli.settings import parse_duration, plain_value, read_mapping
from fastdfkd_cli.training_config import TrainingConfig

#: Where the files that come with the package stand, and those of the paper among them.
SHIPPED = Path(__file__).parent / "benchmarks"
#: What of a run's figures can be expected, or quoted from a paper.
FIGURES = ("top1", "top5", "agreement", "synthesis_seconds", "total_seconds", "speed_up", "images", "kd_steps")
PAPER_FIGURES = ("top1", "synthesis_hours", "speed_up", "images")
#: How a row comes to its figures: a run of ``distill`` or of ``train``, or the paper alone.
RUNS = ("distill", "train", "paper")
MOST_CELLS = 10_000

_BUDGETS = ("rounds", "images", "time_budget")
_TRAIN_DATA = ("train_data", "train_dataset", "train_split")
_TEXTS = (
    *("teacher", "student", "method", "recipe", "data_dir", "unlabeled_dir", *_TRAIN_DATA),
    *("eval_data", "eval_dataset", "eval_split", "note", "run"),
)
_MAPPINGS = ("set", "train", "teacher_options", "student_options", "paper", "expect")
_SWITCHES = ("amp", "optional")
_ROW_KEYS = (*_TEXTS, *_MAPPINGS, *_BUDGETS, *_SWITCHES, "steps", "seed")
#: Keys that mean something to one kind of run alone. In ``defaults`` they stand for the rows of that kind.
_OF_RUN = {
    "distill": (
        "teacher",
        "teacher_options",
        "method",
        "recipe",
        "data_dir",
        "unlabeled_dir",
        "set",
        "steps",
        *_BUDGETS,
    ),
    "train": ("train", *_TRAIN_DATA),
}
_TOP_KEYS = ("title", "variables", "defaults", "matrix", "rows", "speed_up_against")
_MODEL_KEYS = ("arch", "weights", "num_classes", "input_size", "mean", "std")
_TRAINED_KEYS = ("num_classes", "input_size", "mean", "std")
_DEMANDS = ("at_least", "at_most", "near", "within", "above")
_VARIABLE = re.compile(r"\$\{([^${}]+)\}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a line of the table under one seed."""

    row: str
    #: Axis -> label, without the seed.
    labels: Mapping[str, str]
    seed: int
    #: What the run is asked for, in the words of :func:`fastdfkd_cli.api.distill`, or with ``run: train`` in those of
    #: :func:`fastdfkd_cli.api_train.train`; variables are still in it.
    request: Mapping[str, Any]
    #: Whether it is left out where a variable of it has no value.
    optional: bool = False

    @property
    def name(self) -> str:
        """What ``--only`` matches, and messages say: ``Fast/2/s0``."""
        return "/".join([self.row, *self.labels.values(), f"s{self.seed}"])

    @property
    def folder(self) -> str:
        """The name of its folder below ``runs``."""
        return re.sub(r"[^\w.+-]+", "-", self.name).strip("-.").lower() or "cell"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: a row of the file under one choice of each axis but the seed."""

    row: str
    labels: Mapping[str, str]
    method: str
    cells: Sequence[Cell]
    paper: Mapping[str, float]
    #: Figure -> demand -> number (``above``: the names of other rows).
    expect: Mapping[str, Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A file, expanded."""

    source: str
    title: str
    lines: Sequence[Line]
    #: The row whose synthesis time the others' is divided by; empty: none.
    speed_up_against: str = ""
    #: Names that may stand as ``${NAME}``, with their values; None: to be given.
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        return [cell for line in self.lines for cell in line.cells]

    def selected(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells whose name, or that of whose row or line, matches one of the patterns; all without any.

        Raises:
            UsageError: a pattern matches nothing.
        """
        for pattern in patterns:
            if not any(_matches(cell, pattern) for cell in self.cells):
                near = did_you_mean(pattern, sorted({line.row for line in self.lines}))
                raise UsageError(f"--only {pattern} matches no cell of {self.source}.{near} --dry-run lists them.")
        return [cell for cell in self.cells if not patterns or any(_matches(cell, pattern) for pattern in patterns)]

    def resolved(self, cell: Cell) -> dict[str, Any]:
        """A cell's request with every variable put in.

        Raises:
            UsageError: one has no value.
        """
        request, lacking = self._put(cell)
        if lacking:
            name = lacking[0]
            raise UsageError(
                f"{self.source}, row {cell.row}: the variable {name} has no value: give --var {name}=VALUE."
            )
        return request

    def lacking(self, cell: Cell) -> list[str]:
        """The variables of a cell's request that have no value."""
        return self._put(cell)[1]

    def _put(self, cell: Cell) -> tuple[dict[str, Any], list[str]]:
        values = {**self.variables, **cell.labels, "seed": str(cell.seed)}
        lacking: list[str] = []

        def put(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: put(item) for key, item in value.items()}
            if isinstance(value, list):
                return [put(item) for item in value]
            return self._expanded(value, values, cell, lacking) if isinstance(value, str) else value

        return {key: put(value) for key, value in cell.request.items()}, list(dict.fromkeys(lacking))

    def _expanded(self, text: str, values: Mapping[str, Any], cell: Cell, lacking: list[str]) -> str:
        for _ in range(5):  # a name may be put together from others; none goes on for ever
            found = _VARIABLE.search(text)
            if found is None:
                return text

            def value_of(match: re.Match[str]) -> str:
                name = match[1]
                if name not in values:
                    raise UsageError(
                        f"{self.source}, row {cell.row}: unknown variable ${{{name}}}.{did_you_mean(name, values)}"
                    )
                if values[name] is None:
                    lacking.append(name)
                    return ""
                return str(values[name])

            text = _VARIABLE.sub(value_of, text)
        return text


def _matches(cell: Cell, pattern: str) -> bool:
    line = cell.name.rpartition("/")[0]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (cell.row, line, cell.name))


def shipped() -> dict[str, Path]:
    """The files that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def read_benchmark(source: str | Path, variables: Mapping[str, str] | None = None) -> Benchmark:
    """Read and expand a benchmark's file, or one that comes with the package, by its name.

    Args:
        variables: values for the file's variables.

    Raises:
        UsageError: it cannot be read, or says what makes no sense; the file, the row and the key are named.
    """
    text = str(source)
    path = shipped().get(text)
    if path is None and not Path(text).exists() and text != "-" and "/" not in text and "." not in text:
        raise UsageError(f"There is no benchmark {text!r}.{did_you_mean(text, shipped())} `--list` shows them.")
    name = text if path is not None else Path(text).name
    return _Reader(name).read(read_mapping(str(path or text)), variables or {})


class _Reader:
    """Checks and expands; knows the file's name, for its messages."""

    def __init__(self, source: str) -> None:
        self.source = source

    def _refuse(self, where: str, what: str) -> UsageError:
        return UsageError(f"{self.source}{f', {where}' if where else ''}: {what}")

    def _mapping(self, value: Any, where: str, key: str) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._refuse(where, f"{key} must hold key: value, not {brief(value)}.")
        return {str(name): item for name, item in value.items()}

    def _known(self, keys: Iterable[str], known: Sequence[str], where: str, what: str = "key") -> None:
        for key in keys:
            if key not in known:
                hint = did_you_mean(key, known) or f" There are {', '.join(known)}."
                raise self._refuse(where, f"unknown {what} {brief(key)}.{hint}")

    def read(self, content: Mapping[Any, Any], given: Mapping[str, str]) -> Benchmark:
        top = self._mapping(content, "", "the file")
        self._known(top, _TOP_KEYS, "")
        variables = self._mapping(top.get("variables"), "", "variables")
        for name, value in variables.items():
            if isinstance(value, Mapping | list):
                raise self._refuse("variables", f"{name} must be one value, not {brief(value)}.")
        self._known(given, list(variables), "", "variable")
        title = top.get("title", self.source)
        if not isinstance(title, str):
            raise self._refuse("", f"title must be text, not {brief(title)}.")
        defaults = self._keys(self._mapping(top.get("defaults"), "", "defaults"), "defaults")
        axes = self._axes(top.get("matrix"), "matrix")
        rows = top.get("rows")
        if not isinstance(rows, list) or not rows:
            raise self._refuse("", f"rows must be a list of at least one row, not {brief(rows)}.")
        lines: list[Line] = []
        names: set[str] = set()
        for index, row in enumerate(rows, 1):
            where = f"row {index}"
            keys = self._mapping(row, where, where)
            name = keys.pop("name", None)
            if not isinstance(name, str) or not name.strip():
                raise self._refuse(where, f"name must be text, not {brief(name)}.")
            where = f"row {name}"
            if name in names:
                raise self._refuse(where, "there are two rows of this name.")
            names.add(name)
            own = self._axes(keys.pop("matrix", None), where)
            stated = self._keys(keys, where)
            merged = _merged(defaults, stated)
            run = merged.get("run") or "distill"
            self._of_this_run([stated, *(keys for choices in own.values() for keys in choices.values())], run, where)
            # An axis of the whole file gives way to what a row says itself of the same key.
            shared = {axis: choices for axis, choices in axes.items() if axis not in keys or axis == "seed"}
            if run == "train":  # nor is a training repeated for what is of distillation alone
                shared = {
                    axis: choices
                    for axis, choices in shared.items()
                    if f"${{{axis}}}" in str(merged)
                    or not all(set(of) <= set(_OF_RUN["distill"]) for of in choices.values())
                }
            if "seed" in keys:
                shared.pop("seed", None)
            lines += self._lines(name, merged, {**shared, **own}, where)
            if sum(len(line.cells) for line in lines) > MOST_CELLS:
                raise self._refuse(where, f"there are more than {MOST_CELLS:,} cells.")
        against = top.get("speed_up_against", "")
        if against and against not in names:
            raise self._refuse(
                "", f"speed_up_against names no row: {brief(against)}.{did_you_mean(str(against), names)}"
            )
        for line in lines:
            for figure, demand in line.expect.items():
                for other in demand.get("above", ()):
                    if other not in names:
                        raise self._refuse(f"row {line.row}", f"expect.{figure}.above names no row: {brief(other)}.")
        folders: dict[str, Cell] = {}
        for line in lines:
            for cell in line.cells:
                other = folders.setdefault(cell.folder, cell)
                if other is not cell:
                    raise self._refuse(
                        f"row {cell.row}", f"{cell.name} and {other.name} would share a folder: rename one of them."
                    )
        values = {**variables, **given}
        return Benchmark(source=self.source, title=title, lines=lines, speed_up_against=against, variables=values)

    def _axes(self, value: Any, where: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Axis -> label -> the keys that it stands for."""
        axes: dict[str, dict[str, dict[str, Any]]] = {}
        for axis, choices in self._mapping(value, where, "matrix").items():
            inside = f"{where}, matrix.{axis}" if where != "matrix" else f"matrix.{axis}"
            if not isinstance(choices, Mapping | list) or not choices:
                raise self._refuse(inside, f"must be a list of values, or names with keys, not {brief(choices)}.")
            if isinstance(choices, Mapping):
                axes[axis] = {
                    str(label): self._keys(self._mapping(keys, inside, str(label)), inside)
                    for label, keys in choices.items()
                }
            else:
                if any(isinstance(choice, Mapping | list) for choice in choices):
                    raise self._refuse(inside, "a list holds plain values; write names with keys instead.")
                axes[axis] = {str(choice): self._keys({axis: choice}, inside) for choice in choices}
                if len(axes[axis]) < len(choices):
                    raise self._refuse(inside, "a value stands there twice.")
            if axis == "seed" and isinstance(choices, Mapping):
                raise self._refuse(inside, "must be a list of whole numbers.")
        return axes

    def _of_this_run(self, stated: Iterable[Mapping[str, Any]], run: str, where: str) -> None:
        """Refuse what a row says itself, and what would do nothing in its kind of run."""
        for other, keys in _OF_RUN.items():
            useless = [key for said in stated for key in said if key in keys] if run in _OF_RUN and other != run else []
            if useless:
                raise self._refuse(where, f"{useless[0]} says nothing to run: {run}.")

    def _keys(self, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Keys of a row, each checked by itself; a dotted one is a setting."""
        checked: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for key, value in keys.items():
            if "." in key:
                settings[key] = value
                continue
            self._known([key], _ROW_KEYS, where)
            if key in _TEXTS and not isinstance(value, str) and value is not None:
                raise self._refuse(where, f"{key} must be text, not {brief(value)}.")
            if key in _MAPPINGS:
                value = self._mapping(value, where, key)
            elif key in _SWITCHES and not isinstance(value, bool) and value is not None:
                raise self._refuse(where, f"{key} must be true or false, not {brief(value)}.")
            elif key in ("steps", "seed", "rounds", "images"):
                least = 0 if key == "seed" else 1
                if type(value) is not int or not least <= value < 2**63:
                    raise self._refuse(where, f"{key} must be a whole number, {least} or more, not {brief(value)}.")
            elif key == "time_budget":
                value = self._seconds(value, where)
            checked[key] = value
        run = checked.get("run")
        if run is not None:
            self._known([run], RUNS, where, "run")
        for key in ("teacher_options", "student_options"):
            self._known(checked.get(key, {}), _MODEL_KEYS, f"{where}, {key}")
        if "train" in checked:
            known = [item.name for item in dataclasses.fields(TrainingConfig) if item.name != "seed"]
            self._known(checked["train"], known, f"{where}, train", "setting")
            checked["train"] = {key: plain_value(value) for key, value in checked["train"].items()}
        settings = checked.get("set", {}) | settings
        if settings:
            checked["set"] = {}
            for key, value in settings.items():
                try:
                    full = full_key(key)
                except UsageError as error:
                    raise self._refuse(where, str(error)) from error
                if full in ("recipe", "method", "seed"):
                    raise self._refuse(where, f"{full} is a key of the row itself.")
                checked["set"][full] = plain_value(value, full)
        return checked

    def _seconds(self, value: Any, where: str) -> float:
        if isinstance(value, str):
            try:
                return parse_duration(value)
            except UsageError as error:
                raise self._refuse(where, f"time_budget: {error}") from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._refuse(where, f"time_budget must be a duration, not {brief(value)}.")
        return float(value)

    def _lines(
        self, name: str, keys: dict[str, Any], axes: dict[str, dict[str, dict[str, Any]]], where: str
    ) -> Iterator[Line]:
        seeds = axes.pop("seed", None)
        per_line = {key: keys.pop(key, {}) for key in ("paper", "expect")}
        all_labels = [labels for choices in axes.values() for labels in choices]
        full = ["/".join(combination) for combination in itertools.product(*axes.values())]
        used = {key: self._by_label(per_line[key], key, {*all_labels, *full}, where) for key in per_line}
        for combination in itertools.product(*(choices.items() for choices in axes.values())):
            labels = dict(zip(axes, (label for label, _ in combination), strict=True))
            merged = keys
            for _, more in combination:
                merged = _merged(merged, more)
            names = [*labels.values(), "/".join(labels.values())]
            paper = _chosen(used["paper"], merged.get("paper", {}), names)
            expect = _chosen(used["expect"], merged.get("expect", {}), names)
            cells = []
            run = merged.get("run") or "distill"
            if run != "paper":
                numbers = [choice["seed"] for choice in seeds.values()] if seeds else [merged.get("seed", 0)]
                self._require_whole(merged, run, where)
                request = _request if run == "distill" else _train_request
                optional = bool(merged.get("optional"))
                cells = [
                    Cell(row=name, labels=labels, seed=seed, request=request(merged, seed), optional=optional)
                    for seed in numbers
                ]
            yield Line(
                row=name,
                labels=labels,
                method={"distill": merged.get("method") or "fast", "train": "train"}.get(run, ""),
                cells=cells,
                paper=self._numbers(paper, where),
                expect=self._expectations(expect, where),
                note=merged.get("note") or "",
            )

    def _require_whole(self, keys: Mapping[str, Any], run: str, where: str) -> None:
        """Refuse a line whose run would lack something."""
        for key in ("teacher", "student") if run == "distill" else ("student",):
            if not keys.get(key):
                raise self._refuse(where, f"{key} is not named, here or in defaults.")
        if run == "train":
            if not keys.get("train_data") and not keys.get("train_dataset"):
                raise self._refuse(where, "no images to train on: name them with train_data, train_dataset or both.")
            self._known(keys.get("student_options", {}), _TRAINED_KEYS, f"{where}, student_options of run: train")
        elif keys.get("method") == "kd" and not keys.get("data_dir"):
            raise self._refuse(where, "method kd distils on images that are given: name them with data_dir.")
        elif keys.get("method") != "kd" and keys.get("data_dir"):
            raise self._refuse(where, "data_dir goes with method: kd alone.")
        elif (keys.get("method") == "dfnd") != bool(keys.get("unlabeled_dir")):
            raise self._refuse(where, "method dfnd and unlabeled_dir, the images that it chooses from, go together.")

    def _by_label(self, values: Mapping[str, Any], key: str, labels: set[str], where: str) -> dict[str, Any]:
        """``paper`` and ``expect`` hold figures, or labels (an axis's, or all joined by /) of lines with theirs."""
        known = PAPER_FIGURES if key == "paper" else FIGURES
        for name in values:
            if name not in known and name not in labels:
                hint = did_you_mean(name, [*known, *labels]) or f" There are {', '.join(known)}, and the axes' labels."
                raise self._refuse(where, f"{key} has an unknown figure or label {brief(name)}.{hint}")
            if name in labels and name not in known:
                self._known(
                    self._mapping(values[name], where, f"{key}.{name}"), known, f"{where}, {key}.{name}", "figure"
                )
        return dict(values)

    def _numbers(self, values: Mapping[str, Any], where: str) -> dict[str, float]:
        for figure, value in values.items():
            self._known([figure], PAPER_FIGURES, f"{where}, paper", "figure")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._refuse(where, f"paper.{figure} must be a number, not {brief(value)}.")
        return dict(values)

    def _expectations(self, values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
        checked = {}
        for figure, value in values.items():
            inside = f"{where}, expect.{figure}"
            self._known([figure], FIGURES, f"{where}, expect", "figure")
            demands = self._mapping(value, where, f"expect.{figure}")
            self._known(demands, _DEMANDS, inside, "demand")
            if not demands or ("near" in demands) != ("within" in demands):
                raise self._refuse(inside, "say at_least, at_most, above: ROW, or near with within.")
            for name, number in demands.items():
                if name == "above":
                    others = number if isinstance(number, list) else [number]
                    if not others or not all(isinstance(other, str) for other in others):
                        raise self._refuse(inside, f"above must name a row, or a list of rows, not {brief(number)}.")
                    demands[name] = others
                elif isinstance(number, bool) or not isinstance(number, int | float):
                    raise self._refuse(inside, f"{name} must be a number, not {brief(number)}.")
            checked[figure] = demands
        return checked


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` put on ``under``: sections key by key, and one budget in the place of another."""
    result = dict(under)
    if any(key in over for key in _BUDGETS):
        for key in _BUDGETS:
            result.pop(key, None)
    for key, value in over.items():
        result[key] = {**result.get(key, {}), **value} if key in _MAPPINGS else value
    return result


def _chosen(values: Mapping[str, Any], more: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is said of a line: for all of the row's, then by its labels, then by all of them together."""
    chosen = {key: value for key, value in values.items() if key in FIGURES or key in PAPER_FIGURES}
    for name in names:
        if name in values and name not in chosen:
            chosen |= {str(key): value for key, value in values[name].items()}
    return chosen | dict(more)


def _request(keys: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A run's arguments, in plain values."""
    overrides: dict[str, Any] = dict(keys.get("set", {}))
    if keys.get("method"):
        overrides["method"] = keys["method"]
    if keys.get("steps") is not None:
        overrides["synthesis.steps"] = keys["steps"]
    overrides["seed"] = seed
    for key in ("rounds", "images"):
        if keys.get(key) is not None:
            overrides |= {key: keys[key], "schedule.time_budget": None}
    if keys.get("time_budget") is not None:
        overrides["schedule.time_budget"] = keys["time_budget"]
    request = {
        "teacher": keys["teacher"],
        "student": keys["student"],
        "teacher_options": dict(keys.get("teacher_options", {})),
        "student_options": dict(keys.get("student_options", {})),
        "recipe": keys.get("recipe") or "auto",
        "overrides": overrides,
        **_judgement(keys),
    }
    # Only where it says something: a run that was made before there was the key is still known by its request.
    return request | {name: keys[name] for name in ("data_dir", "unlabeled_dir") if keys.get(name)}


def _train_request(keys: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A training's arguments, in plain values."""
    return {
        "run": "train",
        "model": keys["student"],
        "data_dir": keys.get("train_data"),
        "dataset": keys.get("train_dataset"),
        "split": keys.get("train_split"),
        "overrides": {**keys.get("train", {}), "seed": seed},
        **keys.get("student_options", {}),
        **_judgement(keys),
    }


def _judgement(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "amp": keys.get("amp"),
        "eval_data": keys.get("eval_data"),
        "eval_dataset": keys.get("eval_dataset"),
        "eval_split": keys.get("eval_split") or "validation",
    }


__all__ = ["FIGURES", "PAPER_FIGURES", "Benchmark", "Cell", "Line", "read_benchmark", "shipped"]
