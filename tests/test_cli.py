"""The commands: what they hand to the API, what they print, and how they end.

The engines are replaced by fakes here; the requests are bound to the real API's signatures all the same.
"""

from __future__ import annotations

import csv
import errno
import inspect
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastdfkd_cli import __version__, cli, cli_options
from fastdfkd_cli.errors import FastDFKDError, ThresholdError, UsageError
from fastdfkd_cli.records import Record

REPORT = {
    "images": 768,
    "seconds": {"synthesis": 1.5, "distillation": 2.25},
    "quality": {"agreement": 97.5},
    "evaluation": {"top1": 95.0, "crop_pct": 0.875},
    "config": {"seed": 0},
}
PLAN = {"batches": 4, "teacher": {"parameters": 5}, "config": {"seed": 0}}
ROW = {"model": "m", "top1": 93.5, "top1_err": 6.5, "loss": 0.25, "n_samples": 360}


class FakeApi:
    """Records each request and answers like the API."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def answer(self, name: str, result: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            kwargs["on_message"](f"{name} begins")
            kwargs["on_record"](
                Record(phase="synthesis", step=1, total=2, unit="images", progress=0.5, elapsed=1.0, remaining=1.0)
            )
            return result(kwargs) if callable(result) else result

        return call

    def request(self) -> dict[str, Any]:
        """The one request made, by parameter name, as the real function would receive it."""
        from fastdfkd_cli import models

        ((name, args, kwargs),) = self.calls
        with pytest.MonkeyPatch.context() as patch:
            # The fake stands in sys.modules: look at the real module beside it.
            patch.delitem(sys.modules, "fastdfkd_cli.api")
            patch.delattr("fastdfkd_cli.api", raising=False)
            import fastdfkd_cli.api as real

            bound = inspect.signature(getattr(real, name)).bind(*args, **kwargs).arguments
        assert all(isinstance(v, models.ModelOptions) for k, v in bound.items() if k.endswith("options"))
        return dict(bound)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake, module = FakeApi(), types.ModuleType("fastdfkd_cli.api")
    answers: dict[str, Any] = {
        "distill": lambda kwargs: types.SimpleNamespace(path=kwargs["output"], report=REPORT),
        "synthesize": lambda kwargs: types.SimpleNamespace(path=kwargs["output"], manifest={"count": 10}),
        "evaluate": ROW,
        "plan_distill": PLAN,
        "plan_synthesize": PLAN,
    }
    for name, answer in answers.items():
        setattr(module, name, fake.answer(name, answer))
    monkeypatch.setitem(sys.modules, "fastdfkd_cli.api", module)
    monkeypatch.setattr("fastdfkd_cli.api", module, raising=False)
    for name in ("DEVICE", "OUTPUT", "RECIPE", "SEED"):
        monkeypatch.delenv(f"FASTDFKD_{name}", raising=False)
    return fake


def invoke(*words: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(cli.app, list(words), env=env)


def succeed(*words: str, env: dict[str, str] | None = None) -> Any:
    result = invoke(*words, env=env)
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result


DISTILL = ("distill", "--teacher", "timm/resnet50", "--student", "mobilenetv2_100")


# -- what is handed on -------------------------------------------------------------------------------------------


def test_distill_with_nothing_but_its_models(api: FakeApi) -> None:
    succeed(*DISTILL)
    request = api.request()
    assert (request["teacher"], request["student"]) == ("timm/resnet50", "mobilenetv2_100")
    assert request["output"] == Path("mobilenetv2_100-from-resnet50")
    assert (request["recipe"], dict(request["overrides"]), request["device"], request["amp"]) == (
        "auto",
        {},
        "auto",
        None,
    )
    assert request["data_dir"] is request["eval_data"] is request["eval_dataset"] is None
    assert request["overwrite"] is False


def test_distill_hands_every_option_on(api: FakeApi) -> None:
    from fastdfkd_cli.models import ModelOptions

    succeed(
        *DISTILL, "--output", "out", "--overwrite", "--rounds", "7", "--recipe", "smoke",
        "--set", "distillation.temperature=4", "--steps", "2", "--seed", "5", "--deterministic", "--data-dir", "set",
        "--unlabeled-dir", "wild",
        "--eval-data", "real", "--eval-dataset", "torch/cifar10", "--eval-split", "test", "--device", "cpu",
        "--compile", "--graphs", "--resume", "auto", "--checkpoint-every", "1m30s",
        "--no-amp", "--teacher-arch", "resnet18", "--teacher-weights", "t.pth", "--teacher-num-classes", "10",
        "--teacher-input-size", "3", "32", "48", "--teacher-mean", "0.5", "0.4", "0.3", "--teacher-std", "0.1 0.2 0.3",
        "--student-arch", "resnet26", "--student-weights", "s.pth", "--student-num-classes", "10",
        "--student-input-size", "3x32x48", "--student-mean", "0,0,0", "--student-std", "1", "1", "1",
    )  # fmt: skip
    request = api.request()
    del request["on_record"], request["on_message"]
    assert request == {
        "teacher": "timm/resnet50",
        "student": "mobilenetv2_100",
        "teacher_options": ModelOptions(
            arch="resnet18", weights="t.pth", num_classes=10, input_size=(3, 32, 48), mean=(0.5, 0.4, 0.3),
            std=(0.1, 0.2, 0.3),
        ),
        "student_options": ModelOptions(
            arch="resnet26", weights="s.pth", num_classes=10, input_size=(3, 32, 48), mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        ),
        "recipe": "smoke",
        "overrides": {
            "distillation.temperature": 4,
            "synthesis.steps": 2,
            "seed": 5,
            "deterministic": True,
            "rounds": 7,
            "schedule.time_budget": None,
        },
        "data_dir": "set",
        "unlabeled_dir": "wild",
        "output": Path("out"),
        "overwrite": True,
        "device": "cpu",
        "amp": False,
        "compile": True,
        "graphs": True,
        "resume": "auto",
        "checkpoint_every": 90.0,
        "eval_data": "real",
        "eval_dataset": "torch/cifar10",
        "eval_split": "test",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (("--images", "5000"), "images", 5000),
        (("--time-budget", "1h30m"), "schedule.time_budget", 5400.0),
        (("--rounds", "3"), "rounds", 3),
    ],
)
def test_budgets(api: FakeApi, words: tuple[str, ...], key: str, value: float) -> None:
    succeed(*DISTILL, *words)
    overrides = dict(api.request()["overrides"])
    if key != "schedule.time_budget":
        # A budget of a config file gives way to the one that is typed.
        assert overrides.pop("schedule.time_budget") is None
    assert overrides == {key: value}


def test_environment_variables_stand_in_for_options(api: FakeApi) -> None:
    env = {"FASTDFKD_DEVICE": "cpu", "FASTDFKD_OUTPUT": "here", "FASTDFKD_RECIPE": "smoke", "FASTDFKD_SEED": "3"}
    succeed(*DISTILL, env=env)
    request = api.request()
    assert (request["device"], request["output"], request["recipe"]) == ("cpu", Path("here"), "smoke")
    assert request["overrides"] == {"seed": 3}


@pytest.mark.parametrize(
    ("words", "seed"),
    [((), 2), (("--set", "seed=3"), 3), (("--seed", "4"), 4), (("--set", "seed=3", "--seed", "4"), 4)],
)
def test_command_line_over_environment_over_file(
    api: FakeApi, tmp_path: Path, words: tuple[str, ...], seed: int
) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nrecipe: smoke\n")
    succeed(*DISTILL, "--config", str(tmp_path / "run.yaml"), *words, env={"FASTDFKD_SEED": "2"})
    request = api.request()
    assert (request["recipe"], dict(request["overrides"])) == ("smoke", {"seed": seed})


def test_a_recipe_printed_is_a_config_file(api: FakeApi, tmp_path: Path) -> None:
    from fastdfkd_cli.config import from_dict
    from fastdfkd_cli.recipes import get_recipe

    (tmp_path / "run.yaml").write_text(succeed("recipes", "--show", "smoke", "--input-size", "1", "8", "8").stdout)
    succeed(*DISTILL, "--config", str(tmp_path / "run.yaml"))
    request = api.request()
    assert request["recipe"] == "smoke"
    assert from_dict({**request["overrides"], "recipe": "smoke"}) == get_recipe("smoke").config((1, 8, 8))


def test_synthesize_hands_its_options_on(api: FakeApi) -> None:
    result = succeed(
        "synthesize", "-t", "resnet50", "-n", "100", "-o", "set", "--student", "resnet18", "--shard-size", "10",
        "--resume", "--steps", "3", "--student-arch", "a",
    )  # fmt: skip
    request = api.request()
    assert (request["teacher"], request["num_images"], request["output"]) == ("resnet50", 100, Path("set"))
    assert (request["student"], request["shard_size"], request["resume"]) == ("resnet18", 10, True)
    assert dict(request["overrides"]) == {"synthesis.steps": 3}
    assert result.stdout == "set\n"


def test_evaluate_hands_its_options_on(api: FakeApi) -> None:
    succeed(
        "evaluate", "--mean", "0.5", "0.5", "0.5", "student", "--input-size", "3", "32", "32", "--dataset",
        "torch/cifar10", "--data-dir", "d", "--split", "test", "-b", "7", "-j", "2", "--img-size", "40", "--crop-pct",
        "0.9", "--amp", "--amp-dtype", "float16", "--teacher", "t", "--teacher-arch", "resnet18", "--device", "cpu",
    )  # fmt: skip
    request = api.request()
    assert (request["model"], request["options"].mean, request["options"].input_size) == (
        "student",
        (0.5, 0.5, 0.5),
        (3, 32, 32),
    )
    assert (request["dataset"], request["data_dir"], request["split"]) == ("torch/cifar10", "d", "test")
    assert (request["batch_size"], request["workers"], request["img_size"], request["crop_pct"]) == (7, 2, 40, 0.9)
    assert (request["amp"], request["amp_dtype"], request["device"]) == (True, "float16", "cpu")
    assert (request["teacher"], request["teacher_options"].arch) == ("t", "resnet18")


@pytest.mark.parametrize(
    ("reference", "slug"),
    [
        ("timm/resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("../teachers/wrn16_2-cifar10.safetensors", "wrn16_2-cifar10"),
        ("hf-hub:owner/repo@main", "repo-main"),
        ("nets.py:make_net", "make_net"),
        ("builtin/digits", "digits"),
        ("folder/", "folder"),
        ("..", "model"),
        ("a b/c d", "c-d"),
    ],
)
def test_folder_names_from_references(reference: str, slug: str) -> None:
    assert cli_options.slug(reference) == slug


# -- what is printed ---------------------------------------------------------------------------------------------


def test_distill_ends_with_the_path(api: FakeApi) -> None:
    result = succeed(*DISTILL, "-o", "out")
    lines = result.stdout.splitlines()
    assert lines[-1] == "out"
    assert "quality.agreement 97.5" in lines
    assert "evaluation.top1 95" in lines
    assert "seconds.synthesis 1.5" in lines
    assert not [line for line in lines if "config" in line or "crop" in line]
    assert "distill begins" in result.stderr
    assert "[ 50%] synthesis 1/2 images" in result.stderr


def test_json_is_all_there_is_on_stdout(api: FakeApi) -> None:
    result = succeed(*DISTILL, "-o", "out", "--json")
    assert json.loads(result.stdout) == {"path": "out", **REPORT}
    result = succeed("synthesize", "-t", "t", "-n", "1", "-o", "set", "--json")
    assert json.loads(result.stdout) == {"path": "set", "count": 10}
    result = succeed("evaluate", "m", "--data-dir", "d", "--json")
    assert json.loads(result.stdout) == ROW


@pytest.mark.parametrize("command", [DISTILL, ("synthesize", "-t", "t", "-n", "4", "-o", "set")])
def test_a_dry_run_only_plans(api: FakeApi, command: tuple[str, ...]) -> None:
    plan = json.loads(succeed(*command, "--dry-run", "--json").stdout)
    assert api.calls[0][0] == f"plan_{command[0]}"
    api.request()
    lines = succeed(*command, "--dry-run").stdout.splitlines()
    # For reading, without the settings: `recipes --show` lists those.
    assert lines == [f"batches {plan['batches']}", f"teacher.parameters {plan['teacher']['parameters']}"]
    assert "config" in plan
    assert {name for name, _, _ in api.calls} == {f"plan_{command[0]}"}


def test_evaluate_prints_key_value_lines(api: FakeApi) -> None:
    assert "top1 93.5\n" in succeed("evaluate", "m", "--data-dir", "d").stdout


def test_a_missed_threshold_fails_after_the_results_are_written(api: FakeApi, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    result = invoke("evaluate", "m", "--data-dir", "d", "--min-top1", "94", "--results-file", str(path), "--json")
    assert isinstance(result.exception, ThresholdError)
    assert result.exception.exit_code == 4
    assert json.loads(result.stdout) == ROW
    assert json.loads(path.read_text()) == ROW


def test_a_threshold_that_is_met(api: FakeApi, tmp_path: Path) -> None:
    path = tmp_path / "row.csv"
    succeed("evaluate", "m", "--data-dir", "d", "--min-top1", "93.5", "--results-file", str(path))
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in ROW.items()}]


@pytest.mark.parametrize("name", ["row.csv", "row.json"])
def test_names_in_a_results_file_act_on_no_terminal(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    row = {**ROW, "model": "x \x1b[2J \x9b2J not UTF-8: \udcff"}
    monkeypatch.setattr(sys.modules["fastdfkd_cli.api"], "evaluate", lambda *a, **k: row)
    succeed("evaluate", "m", "--data-dir", "d", "--results-file", str(tmp_path / name))
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert all(char == "\n" or char.isprintable() for char in text)
    assert "not UTF-8: \\udcff" in text


def test_a_results_file_that_cannot_be_written_whole_stays_as_it_was(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "row.csv"
    path.write_text("earlier")
    monkeypatch.setattr("fastdfkd_cli.output.os.fsync", full)
    result = invoke("evaluate", "m", "--data-dir", "d", "--results-file", str(path))
    assert isinstance(result.exception, FastDFKDError)
    assert [each.name for each in tmp_path.iterdir()] == ["row.csv"]
    assert path.read_text() == "earlier"


def test_recipes() -> None:
    lines = succeed("recipes").stdout.splitlines()
    assert lines[0].split() == ["recipe", "source", "description"]
    listed = json.loads(succeed("recipes", "--json").stdout)["recipes"]
    assert [line.split()[0] for line in lines[1:]] == [row["name"] for row in listed]
    assert "cifar10-wrn402-wrn162-k5" in {row["name"] for row in listed}
    shown = json.loads(succeed("recipes", "--show", "cifar10-wrn402-wrn162-k5", "--json").stdout)
    assert shown["config"]["synthesis"]["steps"] == 5


def test_version() -> None:
    assert succeed("--version").stdout == f"fastdfkd {__version__}\n"


@pytest.mark.parametrize("command", ["distill", "synthesize", "evaluate", "recipes"])
def test_help_names_every_option(command: str) -> None:
    text = succeed(command, "--help", env={"COLUMNS": "200"}).stdout
    for parameter in inspect.signature(getattr(cli, command)).parameters:
        word = {"ctx": "--help", "assignments": "--set", "model": "MODEL"}.get(parameter, parameter.replace("_", "-"))
        assert word in text


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*DISTILL, "--recipe", "somke"), "Did you mean smoke"),
        ((*DISTILL, "--set", "synthesis.setps=2"), "Did you mean synthesis.steps"),
        ((*DISTILL, "--set", "steps"), "key=value"),
        ((*DISTILL, "--time-budget", "soon"), "not a duration"),
        ((*DISTILL, "--time-budget", "5m", "--images", "9"), "--images and --time-budget"),
        ((*DISTILL, "--config", "nowhere.yaml"), "nowhere.yaml"),
        ((*DISTILL, "--teacher-input-size", "32"), "--teacher-input-size must be channels"),
        ((*DISTILL, "--student-mean", "a"), "--student-mean must be"),
        ((*DISTILL, "--teacher-input-size", "3", "8", "8", "--teacher-std", "1", "1"), "2 values for 3 channels"),
        (("synthesize", "-t", "t", "-n", "1", "-o", "o", "--resume", "--overwrite"), "give one of them"),
        (("synthesize", "-t", "t", "-n", "1", "-o", "o", "--student-arch", "a"), "name it with --student"),
        (("evaluate", "m"), "--data-dir DIR, --dataset NAME"),
        (("evaluate", "m", "--data-dir", "d", "--amp-dtype", "int8"), "bfloat16 or float16"),
        (("evaluate", "m", "--data-dir", "d", "--results-file", "row.txt"), ".json or .csv"),
        (("evaluate", "m", "--data-dir", "d", "--results-file", "nowhere/row.csv"), "does not exist"),
        (("evaluate", "m", "--data-dir", "d", "--teacher-arch", "a"), "name it with --teacher"),
        (("recipes", "--show", "somke"), "Did you mean smoke"),
        (("recipes", "--input-size", "3", "8", "8"), "goes with --show"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(api: FakeApi, words: tuple[str, ...], message: str) -> None:
    result = invoke(*words)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not api.calls
    assert result.stdout == ""


def test_an_interrupted_synthesis_says_how_to_go_on(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fastdfkd_cli.__main__ import main

    def stopped(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sys.modules["fastdfkd_cli.api"], "synthesize", stopped)
    assert main(["synthesize", "-t", "t", "-n", "4", "-o", "set"]) == 143
    err = capfd.readouterr().err
    assert err.startswith("fastdfkd: interrupted: stopped by SIGTERM; whole shards stay")
    assert "--resume" in err
    assert len(err.splitlines()) == 1


# -- the error boundary, in processes of their own ---------------------------------------------------------------

DRIVER = """
import errno, sys, time, types
from pathlib import Path
from fastdfkd_cli.errors import *
from fastdfkd_cli.records import Record

def act(kind, output, on_message, on_record):
    if kind == "UsageError": raise UsageError("bad\\nrequest")
    if kind == "UnavailableError": raise UnavailableError("no such model")
    if kind == "FastDFKDError": raise FastDFKDError("not finite")
    if kind == "ENOSPC": raise OSError(errno.ENOSPC, "No space left on device", "pool.bin")
    if kind == "EACCES": raise PermissionError(errno.EACCES, "Permission denied", "secret")
    if kind == "ENOTDIR": raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "x")
    if kind == "EIO": raise OSError(errno.EIO, "Input/output error", "pool.bin")
    if kind == "ENAMETOOLONG": raise OSError(errno.ENAMETOOLONG, "File name too long", "aaa")
    if kind == "MemoryError": raise MemoryError
    if kind == "cpu memory": raise RuntimeError("DefaultCPUAllocator: can't allocate memory:\\nyou tried")
    if kind == "cpu memory 2": raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried")
    if kind == "RuntimeError": raise RuntimeError("shapes")
    if kind == "memory": raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA\\nout of memory")
    if kind == "bug": raise KeyError("bug")
    if kind in ("wait", "hang"):
        from fastdfkd_cli.output import StagedDirectory
        try:
            with StagedDirectory(output) as folder:
                (Path(folder) / "half").write_text("written")
                print("ready", file=sys.stderr, flush=True)
                time.sleep(30)
        finally:
            if kind == "hang":
                print("cleaning", file=sys.stderr, flush=True)
                time.sleep(30)
    on_message("hello")
    on_record(Record(phase="synthesis", step=1, total=2, unit="images", progress=0.5, elapsed=1.0))
    report = {"images": 3, "seconds": {"total": 1.5}, "loss": float("nan")}
    return types.SimpleNamespace(path=output, report=report)

api, models = types.ModuleType("fastdfkd_cli.api"), types.ModuleType("fastdfkd_cli.models")
models.ModelOptions = lambda **options: options
def distill(teacher, student, *, output, on_message, on_record, **_):
    return act(teacher, output, on_message, on_record)
api.distill = distill
sys.modules |= {"fastdfkd_cli.api": api, "fastdfkd_cli.models": models}
from fastdfkd_cli.__main__ import main
sys.exit(main())
"""


def driver(kind: str, *words: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, "distill", "--teacher", kind, "--student", "s", *words]


def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("UsageError", 2, "fastdfkd: error: bad request"),
        ("UnavailableError", 3, "fastdfkd: error: no such model"),
        ("FastDFKDError", 1, "fastdfkd: error: not finite"),
        ("ENOSPC", 1, "fastdfkd: error: No space is left for pool.bin; "),
        ("EACCES", 1, "fastdfkd: error: Permission was refused for secret; choose what you may read"),
        ("EIO", 1, "fastdfkd: error: Reading or writing failed for pool.bin; "),
        ("ENAMETOOLONG", 1, "fastdfkd: error: The name is too long for aaa; "),
        ("MemoryError", 1, "fastdfkd: error: The device is out of memory; "),
        ("cpu memory", 1, "fastdfkd: error: The device is out of memory; "),
        ("cpu memory 2", 1, "fastdfkd: error: The device is out of memory; "),
        ("memory", 1, "fastdfkd: error: The device is out of memory; "),
    ],
)
def test_known_errors_are_one_line(kind: str, code: int, line: str) -> None:
    done = run(driver(kind))
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name"), [("bug", "KeyError"), ("ENOTDIR", "NotADirectoryError"), ("RuntimeError", "RuntimeError")]
)
def test_a_bug_keeps_its_traceback(kind: str, name: str) -> None:
    done = run(driver(kind))
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert name in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill"], "Missing option '--teacher'"),
        (["distill", "--teacher"], "requires an argument"),
        (["distil"], "Did you mean 'distill'? "),
        (["distill", "--teachr", "a"], "--teacher"),
        (["distill", "-t", "a", "-s", "b", "--rounds", "many"], "--rounds"),
        (["distill", "-t", "a", "-s", "b", "--rounds", "0"], "--rounds"),
        (["evaluate", "m", "--min-top1", "101"], "--min-top1"),
        (["synthesize", "-t", "a", "-n", "3"], "--output"),
    ],
)
def test_typing_errors_are_one_line(words: list[str], message: str) -> None:
    done = run([sys.executable, "-m", "fastdfkd_cli", *words])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("fastdfkd: error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_cleans_up(tmp_path: Path, signum: int, code: int, name: str) -> None:
    with subprocess.Popen(
        driver("wait", "-o", str(tmp_path / "out")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        assert list(tmp_path.iterdir()), "nothing was staged: there would be nothing to clean up"
        process.send_signal(signum)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert err == f"fastdfkd: interrupted: stopped by {name}; nothing unfinished was kept.\n"
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        driver("hang", "-o", str(tmp_path / "out")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "cleaning\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_json_stays_plain_where_colour_is_forced() -> None:
    env = os.environ | {"FORCE_COLOR": "1", "CI": "true", "GITHUB_ACTIONS": "true", "TERM": "xterm-256color"}
    done = run(driver("fine", "--json", "-o", "out"), env=env)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"path": "out", "images": 3, "seconds": {"total": 1.5}, "loss": None}
    assert "\x1b" not in done.stdout
    assert "hello" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastdfkd_cli", "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    # As nohup and background jobs of a script do with Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv[0:1] = ['x']\n" + DRIVER
    words = [sys.executable, "-c", code, *driver("wait", "-o", str(tmp_path / "out"))[3:]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 143


def test_main_returns_codes_and_leaves_the_handlers_alone(capfd: pytest.CaptureFixture[str]) -> None:
    from fastdfkd_cli.__main__ import main

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert main(["recipes", "--show", "nothing-like-it"]) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().out == f"fastdfkd {__version__}\n"
    assert issubclass(UsageError, FastDFKDError)
