"""``fastdfkd train``: what it hands to the API, what it prints, and how it ends."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastdfkd_cli import api_train, cli
from fastdfkd_cli.__main__ import main
from test_training import paint

REPORT = {"images": 9, "steps": 3, "seconds": {"training": 1.5}, "validation": None, "evaluation": {"top1": 95.0}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the API, by the names of its parameters."""
    found: list[dict[str, Any]] = []
    for name in ("train", "plan_train"):
        real = inspect.signature(getattr(api_train, name))

        def call(*args: Any, _name: str = name, _real: inspect.Signature = real, **kwargs: Any) -> Any:
            found.append({"function": _name, **_real.bind(*args, **kwargs).arguments})
            if _name == "plan_train":
                return {"steps": 4, "config": {}}
            return types.SimpleNamespace(path=kwargs["output"], report=REPORT)

        monkeypatch.setattr(api_train, name, call)
    for name in ("DEVICE", "OUTPUT", "SEED"):
        monkeypatch.delenv(f"FASTDFKD_{name}", raising=False)
    return found


def invoke(*words: str, env: dict[str, str] | None = None) -> Any:
    result = CliRunner().invoke(cli.app, ["train", *words], env=env)
    if result.exception is not None:
        raise result.exception
    return result


def test_every_option_is_handed_on(calls: list[dict[str, Any]]) -> None:
    invoke(
        "cifar/wrn16_2", "--data-dir", "d", "--dataset", "torch/cifar10", "--split", "train", "-j", "3",
        "--validation", "0.1", "--eval-data", "e", "--eval-dataset", "torch/cifar10", "--eval-split", "test",
        "-o", "out", "--resume", "auto", "--overwrite", "--checkpoint-every", "90s", "--epochs", "7", "-b", "64",
        "--optimizer", "adamw", "--lr", "0.01", "--label-smoothing", "0.2", "--set", "average=ema", "--seed", "5",
        "--deterministic", "--num-classes", "10", "--input-size", "3", "32", "32", "--mean", "0.5", "--std", "0.2",
        "0.3", "0.4", "--device", "cpu", "--no-amp",
    )  # fmt: skip
    (call,) = calls
    config = call.pop("config")
    expected = {
        "epochs": 7, "batch_size": 64, "optimizer": "adamw", "lr": 0.01, "label_smoothing": 0.2, "average": "ema",
        "seed": 5, "deterministic": True, "validation": 0.1, "weight_decay": 0.05,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert {name: value for name, value in call.items() if not name.startswith("on_")} == {
        "function": "train", "model": "cifar/wrn16_2", "data_dir": "d", "dataset": "torch/cifar10", "split": "train",
        "num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5,), "std": (0.2, 0.3, 0.4), "output": Path("out"),
        "overwrite": True, "resume": "auto", "checkpoint_every": 90.0, "device": "cpu", "amp": False, "workers": 3,
        "eval_data": "e", "eval_dataset": "torch/cifar10", "eval_split": "test",
    }  # fmt: skip


def test_the_folder_is_named_after_the_model_and_stands_last(calls: list[dict[str, Any]]) -> None:
    result = invoke("cifar/wrn16_2", "--data-dir", "d", env={"FASTDFKD_SEED": "8"})
    assert calls[0]["output"] == Path("wrn16_2-trained")
    assert calls[0]["config"].seed == 8
    assert result.stdout.splitlines()[-1] == "wrn16_2-trained"
    assert "evaluation.top1 95" in result.stdout


def test_a_dry_run_only_plans(calls: list[dict[str, Any]]) -> None:
    result = invoke("cifar/wrn16_2", "--data-dir", "d", "--dry-run", "--json")
    assert [call["function"] for call in calls] == ["plan_train"]
    assert json.loads(result.stdout) == {"steps": 4, "config": {}}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "No images to train on"),
        (("--data-dir", "d", "--set", "epoch=3"), "Did you mean epochs"),
        (("--data-dir", "d", "--lr", "0"), "lr must be greater than 0"),
        (("--data-dir", "d", "--mean", "x"), "--mean must be one number per channel"),
        (("--data-dir", "d", "--checkpoint-every", "soon"), "not a duration"),
    ],
)
def test_typing_errors_are_one_line(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cifar/wrn10_1", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastdfkd: error: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**values, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "cifar/wrn10_1", "--data-dir", "d"]) == 2
    assert "train works in one process" in capsys.readouterr().err


def test_a_teacher_is_made_and_judged_from_the_command_line(tmp_path: Path) -> None:
    paint(tmp_path / "images", 8)
    done = subprocess.run(
        [sys.executable, "-m", "fastdfkd_cli", "train", "cifar/wrn10_1", "--data-dir", "images", "--epochs", "2",
         "--batch-size", "8", "--device", "cpu", "--output", "teacher", "--eval-data", "images", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["steps"], report["config"]["epochs"]) == ("teacher", 6, 2)
    assert report["evaluation"]["n_samples"] == 24
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
