"""The settings of a training, and which source of them wins."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.training_config import TrainingConfig, from_values, resolve_training


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0), ("lr", 0.0), ("lr_min", 1.0), ("lr_warmup", 1.0), ("momentum", 1.0), ("weight_decay", -1.0),
        ("label_smoothing", 1.0), ("batch_size", 1), ("seed", -1), ("validation", 1.0), ("average_decay", -0.1),
        ("epochs", 2**40),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=key):
        from_values({key: value})


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("epochs", 2.5, "a whole number"),
        ("deterministic", "maybe", "true or false"),
        ("optimizer", "sdg", "Did you mean sgd"),
        ("label_smooth", 0.1, "Did you mean label_smoothing"),
        ("momentum", 0.0, "nesterov must be off without momentum"),
    ],
)
def test_a_value_of_another_kind_is_named(key: str, value: Any, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        from_values({key: value})


def test_adamw_brings_its_own_rate_and_decay() -> None:
    assert (from_values({"optimizer": "adamw"}).lr, from_values({"optimizer": "adamw"}).weight_decay) == (1e-3, 0.05)
    assert from_values({"optimizer": "adamw", "lr": 0.01}).lr == 0.01
    chosen = TrainingConfig(optimizer="adamw", lr=0.003)
    assert from_values({"optimizer": "adamw"}, base=chosen) == chosen


def test_options_win_over_assignments_over_the_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 3\nlr: 1e-2\nseed: 4\nbatch_size: 8\n")
    found = resolve_training(
        config=str(file),
        environment={"seed": 5},
        assignments=["lr=0.02", "batch_size=16", "average=none"],
        options={"batch_size": 32, "lr": None},
    )
    assert (found.epochs, found.lr, found.seed, found.batch_size) == (3, 0.02, 5, 32)


def test_a_report_gives_its_settings_again(tmp_path: Path) -> None:
    settings = TrainingConfig(optimizer="adamw", lr=0.5, average="ema")
    (tmp_path / "report.json").write_text(json.dumps({"config": asdict(settings), "images": 3}))
    config = str(tmp_path / "report.json")
    assert resolve_training(config=config, environment={}, assignments=[], options={}) == settings
    (tmp_path / "report.json").write_text(json.dumps({"config": {"synthesis": {"steps": 3}}}))
    with pytest.raises(UsageError, match="Unknown setting 'synthesis' of train"):
        resolve_training(config=config, environment={}, assignments=[], options={})
    with pytest.raises(UsageError, match="key=value"):
        resolve_training(config=None, environment={}, assignments=["lr"], options={})
