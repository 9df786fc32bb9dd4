"""The benchmark: from a file to cells, from runs to a table, and what a stop, a change or a hostile name does to it."""

from __future__ import annotations

import csv
import inspect
import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastdfkd_cli import api_train, benchmarking
from fastdfkd_cli.__main__ import main
from fastdfkd_cli.benchmarking import benchmark, plan_benchmark
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.job import override
from fastdfkd_cli.matrix import read_benchmark, shipped
from fastdfkd_cli.plots import NO_MATPLOTLIB, draw_all
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.records import Record
from fastdfkd_cli.tables import as_csv, as_markdown, as_text, correlations, pearson, spearman
from test_training import paint

SMALL = """
title: Small
defaults: {teacher: builtin/digits, student: cifar/wrn10_1, recipe: digits, rounds: 10, set: {lr: 0.05}}
matrix: {seed: [0, 1, 2]}
speed_up_against: Slow
rows:
  - {name: Quick, method: fast, matrix: {steps: [2, 5]}, paper: {2: {top1: 88.36}, 5: {top1: 88.9}}}
  - {name: Slow, method: dfad, seed: 7}
"""
#: Top-1 by cell, and seconds of synthesis by row, that the runs below give.
TOP1 = {"Quick/2/s0": 60.0, "Quick/2/s1": 62.0, "Quick/2/s2": 67.0, "Slow/s7": 50.0}
SECONDS = {"Quick": 4.0, "Slow": 10.0}


class Runs:
    """Stands for ``distill``: notes each call, and leaves what a run leaves."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.asked: dict[str, Mapping[str, Any]] = {}
        #: Called before a run is written; may raise.
        self.before: Callable[[str], None] = lambda name: None

    def __call__(self, teacher: str, student: str, *, output: Path, **more: Any) -> None:
        request = json.loads(output.with_name(f"{output.name}.json").read_text(encoding="utf-8"))
        name = request["cell"]
        self.before(name)
        self.made.append(name)
        self.asked[name] = {"teacher": teacher, "student": student, **more}
        output.mkdir()
        top1 = TOP1.get(name, 70.0)
        report = {
            "fastdfkd": "0",
            "settings_sha256": "0",
            "teacher": {"name": teacher},
            "images": 1280,
            "kd_steps": 40,
            "seconds": {"synthesis": SECONDS.get(name.partition("/")[0], 1.0), "total": 20.0},
            "evaluation": {"top1": top1},
            "quality": {"agreement": top1 / 100, "divergence": -top1, "recognised": 1.0},
        }
        (output / "report.json").write_text(json.dumps(report), encoding="utf-8")
        Image.new("RGB", (90, 60), "red").save(output / "samples.png")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(benchmarking.api, "distill", found)
    monkeypatch.setattr(benchmarking, "draw_all", lambda *_: [])
    return found


@pytest.fixture
def pictures(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "draw_all", draw_all)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def to_file(text: str) -> Path:
        (tmp_path / "small.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "small.yaml"

    return to_file


# -- the file ----------------------------------------------------------------------------------------------------


def test_matrix_is_expanded_and_merged(write: Callable[[str], Path]) -> None:
    plan = read_benchmark(write(SMALL))
    expected = [f"Quick/{steps}/s{seed}" for steps in (2, 5) for seed in (0, 1, 2)]
    assert [cell.name for cell in plan.cells] == [*expected, "Slow/s7"]
    first = plan.resolved(plan.cells[4])
    assert first["teacher"] == "builtin/digits"
    assert first["overrides"] == {
        "distillation.lr": 0.05,
        "method": "fast",
        "synthesis.steps": 5,
        "seed": 1,
        "rounds": 10,
        "schedule.time_budget": None,
    }
    assert [line.paper for line in plan.lines] == [{"top1": 88.36}, {"top1": 88.9}, {}]
    assert [cell.name for cell in plan.selected(["Quick/2"])] == expected[:3]
    assert [cell.name for cell in plan.selected(["*/s2", "Slow"])] == [expected[2], expected[5], "Slow/s7"]


def test_named_axes_variables_and_budgets(write: Callable[[str], Path]) -> None:
    source = write("""
variables: {data: null, wrn-cifar10: a.pth}
defaults: {rounds: 10, teacher: cifar/wrn40_2, eval_data: "${data}/${set}"}
matrix:
  set:
    cifar10: {teacher_options: {weights: "${wrn-${set}}", num_classes: 10}}
  pair:
    small: {student: cifar/wrn16_1, teacher_options: {std: [1, 1, 1]}}
rows:
  - {name: Timed, time_budget: 2m, expect: {cifar10/small: {top1: {at_least: 5}}}, synthesis.steps: 3}
""")
    plan = read_benchmark(source, {"data": "D"})
    (cell,) = plan.cells
    request = plan.resolved(cell)
    assert request["teacher_options"] == {"weights": "a.pth", "num_classes": 10, "std": [1, 1, 1]}
    assert request["eval_data"] == "D/cifar10"
    assert request["overrides"] == {"synthesis.steps": 3, "seed": 0, "schedule.time_budget": 120.0}  # no rounds left
    assert plan.lines[0].expect == {"top1": {"at_least": 5}}
    unset = read_benchmark(source)
    with pytest.raises(UsageError, match=r"small.yaml, row Timed: the variable data has no value: give --var data="):
        unset.resolved(unset.cells[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("method: fast", "methud: fast"), r"small.yaml, row Quick: unknown key 'methud'. Did you mean method"),
        (("{lr: 0.05}", "{stepps: 1}"), r"small.yaml, defaults: Unknown setting 'stepps'"),
        (("steps: [2, 5]", "steps: [2, 2]"), r"row Quick, matrix.steps: a value stands there twice"),
        (("steps: [2, 5]", "steps: []"), r"row Quick, matrix.steps: must be a list"),
        (("steps: [2, 5]", "steps: [2, x]"), r"row Quick, matrix.steps: steps must be a whole number, 1 or more"),
        (("name: Slow", "name: Quick"), r"row Quick: there are two rows of this name"),
        (("name: Slow", "name: 7"), r"row 2: name must be text, not 7"),
        (("against: Slow", "against: Slaw"), r"speed_up_against names no row: 'Slaw'. Did you mean Slow"),
        (("5: {top1: 88.9}", "6: {top1: 88.9}"), r"row Quick: paper has an unknown figure or label '6'"),
        (("top1: 88.9}", "top2: 88.9}"), r"row Quick, paper.5: unknown figure 'top2'"),
        (("seed: 7", "expect: {top1: {least: 3}}"), r"row Slow, expect.top1: unknown demand 'least'"),
        (("seed: 7", "expect: {top1: {near: 3}}"), r"row Slow, expect.top1: say at_least"),
        (("seed: 7", "expect: {top1: {above: [Slow, Slaw]}}"), r"row Slow: expect.top1.above names no row: 'Slaw'"),
        (("seed: 7", "expect: {top1: {above: []}}"), r"above must name a row, or a list of rows, not \[\]"),
        (("teacher: builtin/digits,", ""), r"row Quick: teacher is not named"),
        (("method: dfad", "run: train, train_data: d, method: dfad"), r"row Slow: method says nothing to run: train"),
        (("method: dfad", "run: train"), r"row Slow: no images to train on: name them with train_data, train_dataset"),
        (("method: dfad", "run: train, train: {epoch: 3}"), r"row Slow, train: unknown setting 'epoch'. Did you mean"),
        (("method: dfad", "train_data: d"), r"row Slow: train_data says nothing to run: distill"),
        (("method: dfad", "method: kd"), r"row Slow: method kd distils on images that are given: name them with data"),
        (("method: dfad", "method: dfad, data_dir: d"), r"row Slow: data_dir goes with method: kd alone"),
        (("method: dfad", "method: dfnd"), r"row Slow: method dfnd and unlabeled_dir, .* go together"),
        (("method: dfad", "method: dfad, unlabeled_dir: d"), r"row Slow: method dfnd and unlabeled_dir"),
        (("method: dfad", "optional: 1"), r"row Slow: optional must be true or false, not 1"),
        (("rows:", "rows:\n  - {name: quick/2}"), r"would share a folder"),
        (("rows:", "rows: ["), r"neither YAML nor JSON \(line"),
    ],
)
def test_errors_name_file_row_and_key(write: Callable[[str], Path], change: tuple[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says) as found:
        read_benchmark(write(SMALL.replace(*change)))
    assert "small.yaml" in str(found.value)


def test_settings_of_a_method_are_checked_before_the_first_run(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path
) -> None:
    source = write(SMALL.replace("seed: 7", "synthesis.feature_weight: 3"))
    with pytest.raises(UsageError, match=r"small.yaml, row Slow: synthesis.feature_weight is no setting"):
        benchmark(source, output=tmp_path / "out")
    with pytest.raises(UsageError, match="Unknown method 'dfat'"):
        benchmark(write(SMALL.replace("dfad", "dfat")), output=tmp_path / "out")
    assert not runs.made
    assert not (tmp_path / "out").exists()
    # A row that is not asked for holds nothing up.
    benchmark(source, output=tmp_path / "out", only=["Quick/2/s0"])
    assert runs.made == ["Quick/2/s0"]


TRAINED = """
variables: {data: null, teacher: t.pth}
defaults: {teacher: "${teacher}", student: cifar/wrn10_1, recipe: digits, set: {lr: 0.05}, eval_data: held}
matrix: {rounds: [2, 5], split: {a: {eval_split: a}, b: {eval_split: b}}, seed: [0, 1]}
rows:
  - name: Teacher
    run: train
    optional: true
    student: cifar/wrn16_2
    student_options: {mean: [0.5]}
    train_data: ${data}
    train: {epochs: 3, lr: 1e-2}
  - {name: KD, method: kd, data_dir: "${data}", optional: true, rounds: 5}
  - {name: Wild, method: dfnd, unlabeled_dir: "${data}", optional: true, rounds: 5}
  - {name: Fast}
"""


def test_a_row_trains_or_distils_on_given_images(
    write: Callable[[str], Path], runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: dict[str, Mapping[str, Any]] = {}

    def train(model: str, *, output: Path, **more: Any) -> None:
        inspect.signature(api_train.plan_train).bind_partial(
            model, **{key: value for key, value in more.items() if key not in ("resume", "checkpoint_every")}
        )
        trained[output.name] = {"model": model, **more}
        output.mkdir()
        report = {
            "fastdfkd": "0",
            "settings_sha256": "0",
            "images": 9,
            "seconds": {"total": 3.0},
            "evaluation": {"top1": 80.0},
        }
        (output / "report.json").write_text(json.dumps(report), encoding="utf-8")

    monkeypatch.setattr(benchmarking.api_train, "train", train)
    source, out = write(TRAINED), tmp_path / "out"
    result = benchmark(source, output=out, variables={"data": "D"})
    # Not once for each number of rounds.
    assert sorted(trained) == [f"teacher-{split}-s{seed}" for split in "ab" for seed in (0, 1)]
    asked = trained["teacher-b-s1"]
    assert asked["model"] == "cifar/wrn16_2"
    assert asked["data_dir"] == "D"
    assert asked["overrides"] == {"epochs": 3, "lr": 0.01, "seed": 1}
    assert (asked["mean"], asked["eval_data"], asked["eval_split"], asked["resume"]) == ((0.5,), "held", "b", "auto")
    assert runs.asked["KD/a/s0"]["data_dir"] == "D"
    assert runs.asked["Wild/a/s0"]["unlabeled_dir"] == "D"
    assert "data_dir" not in runs.asked["Fast/2/a/s0"]
    line = result.summary["lines"][0]
    assert (line["method"], line["figures"]["top1"]["mean"], line["figures"]["total_seconds"]["mean"]) == (
        "train",
        80.0,
        3.0,
    )
    assert {entry["teacher"] for entry in result.summary["quality"]} == {None}  # a training is no second teacher
    assert sum(run["figures"] is not None for line in result.summary["lines"] for run in line["runs"]) == 20
    benchmark(source, output=out, variables={"data": "D"})
    assert len(trained) == 4
    pytest.importorskip("matplotlib")
    assert out / "accuracy-time.png" in draw_all(result.summary, out, print)


def test_without_its_images_a_row_is_left_out_and_named(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(TRAINED), tmp_path / "out"
    plan = plan_benchmark(source, output=out)
    states = {cell["cell"]: cell["state"] for cell in plan["cells"]}
    assert states["Teacher/a/s0"] == states["KD/b/s1"] == "left out: no data"
    assert (plan["left"], plan["variables_missing"]) == (8, [])
    assert main(["benchmark", str(source), "--output", str(out)]) == 0
    said = capsys.readouterr().err
    assert "row Teacher: 4 runs left out: --var data=VALUE is not given" in said
    assert "row KD: 4 runs left out" in said
    assert {name.partition("/")[0] for name in runs.made} == {"Fast"}
    # A row that is not optional is still refused, and so are training settings that make no sense.
    needed = write(TRAINED.replace("    optional: true\n", ""))
    with pytest.raises(UsageError, match="row Teacher: the variable data has no value"):
        benchmark(needed, output=out)
    with pytest.raises(UsageError, match=r"row Teacher: epochs must be"):
        benchmark(write(TRAINED.replace("epochs: 3", "epochs: 0")), output=out, variables={"data": "D"})


def test_real_rows_on_given_images(write: Callable[[str], Path], tmp_path: Path) -> None:
    paint(tmp_path / "data", 6)
    source = write("""
defaults: {student: cifar/wrn10_1, eval_data: "${data}"}
variables: {data: null}
rows:
  - {name: Student, run: train, train_data: "${data}", train: {epochs: 1, batch_size: 4}, student_options: {std: [1]}}
  - name: KD
    method: kd
    teacher: builtin/digits
    recipe: digits
    rounds: 2
    data_dir: ${data}
    eval_data: null
    set: {quality_images: 0, distillation.batch_size: 4, schedule.kd_steps_per_round: 2}
""")
    result = benchmark(source, output=tmp_path / "out", variables={"data": str(tmp_path / "data")}, device="cpu")
    trained, taught = result.summary["lines"]
    assert trained["finished"] == taught["finished"] == 1
    assert 0 <= trained["figures"]["top1"]["mean"] <= 100
    assert taught["figures"]["kd_steps"]["mean"] == 4
    said = (tmp_path / "out" / "runs" / "student-s0" / "report.json").read_text(encoding="utf-8")
    assert json.loads(said)["model"]["input"]["std"] == [1.0] * json.loads(said)["model"]["input"]["size"][0]
    assert "Student" in as_text(result.summary)


def test_shipped_files_hold_the_papers_figures() -> None:
    found = {name: read_benchmark(name) for name in shipped()}
    assert set(found) >= {"digits", "methods-small", "table1", "table2", "table4", "table5"}
    of = {(name, line.row, *line.labels.values()): line.paper for name, plan in found.items() for line in plan.lines}
    assert of["table1", "Fast5", "cifar10", "wrn402-wrn162"] == {
        "speed_up": 247.1,
        "top1": 91.96,
        "synthesis_hours": 0.08,
    }
    assert of["table1", "DeepInv2k", "cifar100", "vgg11-resnet18"]["synthesis_hours"] == 20.1
    assert of["table1", "KD", "cifar100", "wrn402-wrn401"] == {"top1": 68.58}
    assert of["table1", "Teacher", "cifar10", "wrn402-wrn401"] == {"top1": 94.87}
    assert of["table2", "Fast50", "mobilenetv2"]["top1"] == 43.02
    assert of["table4", "CMI", "10"] == {"top1": 32.43, "synthesis_hours": 0.22}
    assert of["table5", "Seq. + Pixel", "cifar100"] == {"top1": 10.93}
    assert sum(len(figures) > 0 for (name, *_), figures in of.items() if name == "table1") == 110
    plan = found["table1"]
    fast = next(cell for cell in plan.cells if cell.name == "Fast5/cifar100/vgg11-resnet18/s0")
    plan = read_benchmark("table1", {name: f"{name}.pth" for name in plan.variables})
    request = plan.resolved(fast)
    assert request["recipe"] == "cifar100-vgg11-resnet18-k5"
    assert request["teacher_options"]["weights"] == "vgg11-cifar100.pth"


@pytest.mark.parametrize("name", shipped())
def test_shipped_rows_are_settings_that_exist(name: str) -> None:
    plan = read_benchmark(name)
    plan = read_benchmark(name, dict.fromkeys(plan.variables, "x"))
    assert plan.cells
    for cell in plan.cells:
        assert benchmarking._checked(plan, cell)


def test_shipped_rows_on_original_images() -> None:
    """Trained once for each network, on the set that the line names, and left out where nobody brought the images."""
    bare, plan = read_benchmark("table1"), read_benchmark("table1", {"data": "D", "images-cifar100": "I"})
    trained = {cell.name: cell for cell in plan.cells if cell.request.get("run") == "train"}
    assert [name for name in trained if name.startswith("Teacher/cifar10/")] == [
        f"Teacher/cifar10/{pair}/s0" for pair in ("resnet34-resnet18", "vgg11-resnet18", "wrn402-wrn161")
    ]
    request = plan.resolved(trained["Teacher/cifar100/vgg11-resnet18/s0"])
    assert {key: request[key] for key in ("model", "data_dir", "dataset", "eval_data", "eval_dataset")} == {
        "model": "cifar/vgg11",
        "data_dir": "D",
        "dataset": "torch/cifar100",
        "eval_data": "D",
        "eval_dataset": "torch/cifar100",
    }
    assert all(cell.optional and bare.lacking(cell) == ["data"] for cell in trained.values())
    kd = [cell for cell in plan.cells if cell.row == "KD"]
    assert all(cell.request["overrides"]["method"] == "kd" and cell.optional for cell in kd)
    assert {cell.labels["dataset"] for cell in kd if "images-cifar10" in plan.lacking(cell)} == {"cifar10"}


def test_small_tables_compare_at_equal_kd_steps() -> None:
    """What stands side by side in one of them takes the same KD steps."""
    for name in ("methods-small", "table4-small", "table5-small", "digits"):
        plan = read_benchmark(name)
        plan = read_benchmark(name, dict.fromkeys(plan.variables, "x"))
        steps = {}
        for cell in plan.cells:
            request = plan.resolved(cell)
            config = override(get_recipe(request["recipe"]).config((3, 32, 32)), request["overrides"])
            steps[cell.name] = config.kd_steps
        fewest = min(steps.values())
        # Methods that take turns have whole turns.
        assert max(steps.values()) - fewest <= 10, (name, steps)
        assert fewest >= 700
        assert {cell.seed for cell in plan.cells} == {0, 1, 2}


# -- runs --------------------------------------------------------------------------------------------------------


def test_table_is_what_one_computes_by_hand(write: Callable[[str], Path], runs: Runs, tmp_path: Path) -> None:
    result = benchmark(write(SMALL), output=tmp_path / "out")
    two, five, slow = result.summary["lines"]
    assert two["figures"]["top1"] == {
        "n": 3,
        "mean": 63.0,
        "spread": 7.0,
        "deviation": pytest.approx(((9 + 1 + 16) / 2) ** 0.5),
        "values": [60.0, 62.0, 67.0],
    }
    assert two["speed_up"] == five["speed_up"] == 2.5
    assert slow["figures"]["top1"]["deviation"] is None
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text())["lines"] == result.summary["lines"]
    text = as_text(result.summary).splitlines()
    assert text[3].split() == ["Quick", "2", "3/3", "63.00", "(7.00)", "4.0s", "20.0s", "2.5x", "88.36"]
    row = list(csv.DictReader(io.StringIO(as_csv(result.summary))))[0]
    assert (row["row"], row["steps"], row["top1_mean"], row["top1_spread"]) == ("Quick", "2", "63.0", "7.0")
    assert (row["speed_up"], row["paper_top1"]) == ("2.5", "88.36")
    assert "| Quick | 2 | 3/3 | 63.00 (7.00) |" in as_markdown(result.summary)
    assert runs.asked["Slow/s7"]["overrides"]["method"] == "dfad"
    assert runs.asked["Slow/s7"]["resume"] == "auto"


def test_stopped_in_the_middle_it_repeats_nothing(write: Callable[[str], Path], runs: Runs, tmp_path: Path) -> None:
    source, out = write(SMALL), tmp_path / "out"

    def stop(name: str) -> None:
        if name == "Quick/5/s0":
            raise KeyboardInterrupt

    runs.before = stop
    with pytest.raises(KeyboardInterrupt) as stopped:
        benchmark(source, output=out)
    assert stopped.value.__notes__ == [f"3 of 7 runs are finished and kept in {out}: the same command goes on"]
    assert "63.00 (7.00)" in (out / "benchmark.txt").read_text(encoding="utf-8")  # what is finished is told
    first = list(runs.made)
    plan = plan_benchmark(source, output=out)
    assert (plan["done"], plan["left"], plan["seconds_left"]) == (3, 4, 80.0)
    runs.before = lambda name: None
    benchmark(source, output=out)
    assert runs.made[: len(first)] == first
    assert sorted(runs.made) == sorted(set(runs.made)) == sorted(cell.name for cell in read_benchmark(source).cells)
    benchmark(source, output=out)
    assert len(runs.made) == 7


def test_runs_that_another_benchmark_finished_are_copied(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path
) -> None:
    benchmark(write(SMALL), output=tmp_path / "a", only=["*/s0"])
    benchmark(write(SMALL), output=tmp_path / "b", only=["*/s1"])
    assert runs.made == ["Quick/2/s0", "Quick/5/s0", "Quick/2/s1", "Quick/5/s1"]
    # Under another name, and in another order; the rest is made.
    source = write(SMALL.replace("steps: [2, 5]", "steps: [5, 2]").replace("name: Quick", "name: Fast"))
    both = [tmp_path / "a", tmp_path / "b"]
    plan = plan_benchmark(source, output=tmp_path / "out", reuse=both)
    assert (plan["done"], plan["left"]) == (4, 3)
    assert plan["cells"][0]["state"] == f"done in {tmp_path / 'a' / 'runs' / 'quick-5-s0'}"
    said: list[str] = []
    result = benchmark(source, output=tmp_path / "out", reuse=both, on_message=said.append)
    assert runs.made[4:] == ["Fast/5/s2", "Fast/2/s2", "Slow/s7"]
    assert f"run Fast/2/s1: copied from {tmp_path / 'b' / 'runs' / 'quick-2-s1'}" in said
    assert result.summary["lines"][1]["figures"]["top1"]["values"] == [60.0, 62.0, 70.0]
    # What is there is there: neither the folders nor the option are needed any more, and there is nothing to do.
    for folder in both:
        shutil.rmtree(folder)
    benchmark(source, output=tmp_path / "out")
    assert len(runs.made) == 7


def test_only_a_finished_run_of_the_same_request_is_copied(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path
) -> None:
    benchmark(write(SMALL), output=tmp_path / "a")
    (tmp_path / "a" / "runs" / "quick-2-s0" / "report.json").unlink()
    source = write(SMALL.replace("method: dfad", "method: dfad, rounds: 11"))
    benchmark(source, output=tmp_path / "out", reuse=[tmp_path / "a"])
    assert runs.made[7:] == ["Quick/2/s0", "Slow/s7"]
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UsageError, match="--reuse .*thesis holds no benchmark"):
        benchmark(source, output=tmp_path / "other", reuse=[tmp_path / "thesis"])
    assert not (tmp_path / "other").exists()


def test_another_request_is_refused_by_name(write: Callable[[str], Path], runs: Runs, tmp_path: Path) -> None:
    benchmark(write(SMALL), output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"run of Quick/2/s0 in .* other settings: overrides.rounds \(there 10, now 9"):
        benchmark(write(SMALL.replace("rounds: 10", "rounds: 9")), output=tmp_path / "out")
    # A seed more, and another expectation, change no run that is there.
    benchmark(write(SMALL.replace("[0, 1, 2]", "[0, 1, 2, 3]")), output=tmp_path / "out")
    assert runs.made[7:] == ["Quick/2/s3", "Quick/5/s3"]


def test_a_folder_of_something_else_is_left_alone(write: Callable[[str], Path], runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no benchmark"):
        benchmark(write(SMALL), output=tmp_path / "out")
    assert not runs.made


def test_a_run_that_fails_holds_up_no_other(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        if name == "Quick/2/s1":
            raise FastDFKDError("The loss is not finite.")

    runs.before = fail
    code = main(["benchmark", str(write(SMALL)), "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 1
    assert said.err.splitlines()[-1] == "fastdfkd: error: 1 run failed, the first Quick/2/s1: The loss is not finite."
    assert len(runs.made) == 6
    assert "2/3" in said.out


@pytest.mark.parametrize(
    ("demand", "missed"),
    [
        ("{top1: {at_least: 63}}", None),
        ("{top1: {at_least: 63.1}}", "Quick/2: top1 is 63.00, expected at least 63.1"),
        ("{top1: {near: 64, within: 1}}", None),
        ("{top1: {near: 64, within: 0.9}}", "Quick/2: top1 is 63.00, expected 64 ± 0.9"),
        ("{synthesis_seconds: {at_most: 3}}", "Quick/2: synthesis_seconds is 4.00, expected at most 3"),
        ("{speed_up: {at_least: 2.5}}", None),
        ("{top1: {above: Slow}}", None),
        ("{top1: {above: [Slow, Quick]}}", "Quick/2: top1 is 63.00, expected above Quick (63.00)"),
        ("{top5: {at_least: 1}}", "Quick/2: top5 is not measured, expected at least 1"),
    ],
)
def test_exit_code_says_whether_it_was_reproduced(
    write: Callable[[str], Path],
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    demand: str,
    missed: str | None,
) -> None:
    source = write(SMALL.replace("paper: {2: {top1: 88.36}, 5: {top1: 88.9}}", f"expect: {{2: {demand}}}"))
    words = ["benchmark", str(source), "--output", str(tmp_path / "out")]
    # Not before all of its runs are there.
    assert main([*words, "--only", "Quick/2/s0"]) == 0
    assert main(words) == (4 if missed else 0)
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"fastdfkd: error: Not as expected: {missed}." or missed is None
    assert (f"missed: {missed}" in said.out) == (missed is not None)


def test_stopped_the_command_prints_what_is_finished(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(name: str) -> None:
        if name == "Quick/5/s0":
            raise KeyboardInterrupt

    runs.before = stop
    code = main(["benchmark", str(write(SMALL)), "--output", str(tmp_path / "out"), "--json"])
    said = capsys.readouterr()
    assert code == 130
    lines = json.loads(said.out)["lines"]
    assert [line["finished"] for line in lines] == [3, 0, 0]
    assert "3 of 7 runs are finished and kept" in said.err


def test_dry_run_and_list(
    write: Callable[[str], Path], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(write(SMALL)), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 done, 7 left"
    assert main(["benchmark", "table4", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "needs --var data=VALUE --var wrn402-cifar100=VALUE"
    assert main(["benchmark", "--list", "--json"]) == 0
    assert "table5" in [row["name"] for row in json.loads(capsys.readouterr().out)["benchmarks"]]
    assert not runs.made
    assert not (tmp_path / "out").exists()
    assert main(["benchmark", "tabel1", "--output", "x"]) == 2
    assert "Did you mean table1" in capsys.readouterr().err


# -- how it is written -------------------------------------------------------------------------------------------

HOSTILE = '=cmd|" \\|\x1b[2J<script>`'


def test_hostile_names_act_nowhere(write: Callable[[str], Path], pictures: None, tmp_path: Path) -> None:
    source = write(
        SMALL.replace("name: Slow", f"name: {json.dumps(HOSTILE)}").replace("against: Slow", "against: Quick")
    )
    result = benchmark(source, output=tmp_path / "out")
    assert all(not set(written(result.summary)) & {"\x1b"} for written in (as_text, as_markdown, as_csv))
    rows = list(csv.reader(io.StringIO(as_csv(result.summary))))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[3][0].startswith("'=cmd|")
    markdown = [line for line in as_markdown(result.summary).splitlines() if "cmd" in line]
    assert len(markdown) == 1
    assert "\\<script\\>" in markdown[0]
    assert "\\|" in markdown[0]
    assert (tmp_path / "out" / "samples.png").is_file()


def test_correlations_against_hand_computed() -> None:
    # Ranks of y with the tie shared: 1, 2.5, 2.5, 4; deviations (-1.5, 0, 0, 1.5) against (-1.5, -.5, .5, 1.5).
    assert spearman([1, 2, 3, 4], [10, 20, 20, 90]) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert spearman([1, 2, 3], [1, 10, 11]) == pytest.approx(1)
    assert pearson([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert pearson([1, 2, 3], [2, 2, 2]) is None
    assert pearson([1, 2], [2, 3]) is None
    points = [
        {"row": "a", "teacher": teacher, "top1": top1, "quality": {"agreement": agreement, "coverage": None}}
        for teacher, top1, agreement in [("s", 1, 1), ("s", 2, 2), ("s", 3, 3), ("t", 9, 0), ("t", None, 5)]
    ]
    found = {(entry["figure"], entry["teacher"]): entry for entry in correlations(points)}
    assert found["agreement", "s"]["spearman"] == pytest.approx(1)
    assert found["agreement", None]["n"] == 4
    assert found["agreement", None]["spearman"] == pytest.approx(-0.2)
    assert found["agreement", "t"]["pearson"] is None
    assert found["coverage", None]["n"] == 0


def test_pictures(
    write: Callable[[str], Path], pictures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    result = benchmark(
        write(SMALL.replace("name: Slow", 'name: "_$Slow"').replace("t: Slow", "t: _$Slow")), output=tmp_path / "out"
    )
    assert sorted(path.name for path in result.pictures) == ["accuracy-time.png", "quality.png", "samples.png"]
    for path in result.pictures:
        with Image.open(path) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 5
    with Image.open(tmp_path / "out" / "samples.png") as sheet:  # three lines, each with its own samples
        red = sum(count for count, colour in sheet.convert("RGB").getcolors(1 << 20) if colour == (255, 0, 0))
        assert red == pytest.approx(3 * 420 * 280, rel=0.01)
    # Without matplotlib the tables and the samples stand, and it is said.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    drawn = draw_all(result.summary, tmp_path / "out", said.append)
    assert [path.name for path in drawn] == ["samples.png"]
    assert said == [NO_MATPLOTLIB]


def test_one_real_run(write: Callable[[str], Path], tmp_path: Path) -> None:
    source = write("""
defaults: {teacher: builtin/digits, student: cifar/wrn10_1, recipe: digits, eval_dataset: builtin/digits, rounds: 2}
rows:
  - name: Fast
    set: {quality_images: 16, synthesis.batch_size: 16, synthesis.steps: 1, distillation.batch_size: 8,
          schedule.kd_steps_per_round: 2, generator.width: 8}
""")
    result = benchmark(source, output=tmp_path / "out", device="cpu")
    (line,) = result.summary["lines"]
    assert line["finished"] == 1
    assert line["figures"]["images"]["mean"] == 32
    assert 0 <= line["figures"]["top1"]["mean"] <= 100
    assert not list((tmp_path / "out" / "runs").glob("*.checkpoints"))
    before = (tmp_path / "out" / "runs" / "fast-s0" / "report.json").stat().st_mtime_ns
    assert benchmark(source, output=tmp_path / "out", device="cpu").summary["lines"] == result.summary["lines"]
    assert (tmp_path / "out" / "runs" / "fast-s0" / "report.json").stat().st_mtime_ns == before


def test_its_runs_share_what_the_signal_is_read_off(write: Callable[[str], Path], tmp_path: Path) -> None:
    source = write("""
defaults: {teacher: builtin/digits, student: cifar/wrn10_1, recipe: digits, rounds: 2}
rows:
  - name: Fast
    matrix: {seed: [0, 1]}
    set: {quality_images: 16, quality_steps: 2, synthesis.batch_size: 16, synthesis.steps: 1,
          distillation.batch_size: 8, schedule.kd_steps_per_round: 2, generator.width: 8}
""")
    made: list[Record] = []
    benchmark(source, output=tmp_path / "out", device="cpu", on_record=made.append)
    assert len([record for record in made if record.phase == "quality"]) == 1  # one batch, for both
    runs = tmp_path / "out" / "runs"
    first, second = (json.loads((runs / f"fast-s{seed}" / "report.json").read_bytes())["quality"] for seed in (0, 1))
    assert first["images"] == second["images"] == 16
    assert first["recognised"] == second["recognised"]  # the teacher's of the same images
    assert first["similarity"] != second["similarity"]
    # A student is judged as it would be alone.
    benchmark(source, output=tmp_path / "alone", device="cpu", only=["Fast/s1"])
    alone = json.loads((tmp_path / "alone" / "runs" / "fast-s1" / "report.json").read_bytes())["quality"]
    assert alone == second
