"""How the command line, the environment and a config file become settings."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdfkd_cli.config import RunConfig, from_dict, to_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.job import override
from fastdfkd_cli.recipes import get_recipe, with_method
from fastdfkd_cli.settings import (
    join_number_lists,
    parse_assignments,
    parse_duration,
    parse_input_size,
    parse_numbers,
    read_config,
    resolve,
)
from hostile import yaml_bomb


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1H", 3600), ("1.5h", 5400), ("2m5", 125), (" 5s ", 5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 minutes", "-5m", "1d", "m", "30m1h", "0", "0h0m", "nan", "1e3"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UsageError, match="1h30m"):
        parse_duration(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(1, 59))
def test_durations_add_up(hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize("text", ["0.5,0.25,1", "0.5 0.25 1", "0.5, 0.25, 1.0"])
def test_numbers(text: str) -> None:
    assert parse_numbers("--mean", text) == (0.5, 0.25, 1.0)


@pytest.mark.parametrize("text", ["", "a", "0.5;0.5", "nan", "0.5 inf"])
def test_bad_numbers_name_the_option(text: str) -> None:
    with pytest.raises(UsageError, match="--teacher-mean must be"):
        parse_numbers("--teacher-mean", text)


@pytest.mark.parametrize("text", ["3 32 48", "3,32,48", "3x32x48", "3, 32, 48"])
def test_input_sizes(text: str) -> None:
    assert parse_input_size("--input-size", text) == (3, 32, 48)


@pytest.mark.parametrize("text", ["", "32", "3 32", "3 32 32 32", "3 0 32", "3 -1 32", "3 3.2 32", "a b c"])
def test_bad_input_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--input-size must be channels, height and width"):
        parse_input_size("--input-size", text)


def test_number_lists_end_where_the_numbers_do() -> None:
    words = ["--mean", "0.5", "-.1", "1e-3", "model", "--teacher-input-size", "3", "32", "32", "--seed", "3"]
    assert join_number_lists(words) == ["--mean=0.5,-.1,1e-3", "model", "--teacher-input-size=3,32,32", "--seed", "3"]


def test_number_lists_leave_other_words_alone() -> None:
    words = ["--mean=0.5", "0.5", "--student-std", "a", "--student-std", "0.1 0.2", "--", "--mean", "1", "2"]
    assert join_number_lists(words) == words


def test_assignments() -> None:
    assert parse_assignments(["steps=2", "schedule.time_budget=10m", "distillation.lr=1e-3", "seed=1", "seed=2"]) == {
        "synthesis.steps": 2,
        "schedule.time_budget": 600,
        "distillation.lr": 0.001,
        "seed": 2,
    }


def test_none_is_a_choice_or_no_value() -> None:
    assert parse_assignments(["synthesis.reuse=none", "average=None", "schedule.time_budget=none"]) == {
        "synthesis.reuse": "none",
        "distillation.average": "none",
        "schedule.time_budget": None,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("synthesis.steps", "key=value"),
        ("=3", "key=value"),
        ("synthesis.setps=3", "Did you mean synthesis.steps"),
        ("tempratur=3", "Did you mean temperature"),
        ("batch_size=3", "synthesis.batch_size or distillation.batch_size"),
        ("recipe=smoke", "--recipe"),
    ],
)
def test_bad_assignments(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_assignments([word])


def test_a_config_file_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: smoke\nsynthesis:\n  steps: 2\n  lr_latent: 1e-3\nschedule: {time_budget: 1h}\nseed: 7\n")
    recipe, settings = read_config(str(path))
    assert recipe == "smoke"
    # YAML 1.1 reads 1e-3 as text; a learning rate written so must not be refused.
    assert settings == {"synthesis.steps": 2, "synthesis.lr_latent": 0.001, "schedule.time_budget": 3600, "seed": 7}


@pytest.mark.parametrize("wrap", [lambda config: config, lambda config: {"seconds": {}, "config": config}])
def test_a_whole_config_comes_back_from_json(tmp_path: Path, wrap: object) -> None:
    config = from_dict({"synthesis.steps": 3, "distillation.average": "ema", "recipe": "quick"})
    path = tmp_path / "report.json"
    path.write_text(json.dumps(wrap(to_dict(config))))  # type: ignore[operator]
    recipe, settings = read_config(str(path))
    assert recipe == "quick"
    assert from_dict(settings, base=RunConfig(recipe="quick")) == config


def test_a_config_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"synthesis": {"steps": 9}, "recipe": "custom"}'))
    # "custom" is what a config without a recipe is called: nothing to look up.
    assert read_config("-") == (None, {"synthesis.steps": 9})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("synthesis: [", "neither YAML nor JSON \\(line"),
        ("- a\n- b\n", "must hold settings as key: value, not list"),
        ("synthesis:\n  setps: 3\n", "Did you mean synthesis.steps"),
        ("recipe: 3\n", "must be a name"),
        ("a: !!python/object/apply:os.getcwd []\n", "neither YAML nor JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("seed: 2026-13-40\n", "a value that cannot be read"),
        ("seed: " + "[" * 5000, "a value that cannot be read"),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message) as caught:
        read_config(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.yaml: No such file"):
        read_config(str(tmp_path / "nowhere.yaml"))


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\nsynthesis: {}\n")
    assert read_config(str(path)) == (None, {})


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("recipe: smoke\nseed: 1\nsynthesis: {steps: 1, lr_latent: 0.1}\nschedule: {rounds: 1}\n")
    name, settings = resolve(
        recipe=None,
        config=str(path),
        environment={"seed": 2},
        assignments=["synthesis.steps=3", "schedule.rounds=3"],
        options={"schedule.rounds": 4, "deterministic": None},
    )
    assert name == "smoke"
    assert settings == {"synthesis.lr_latent": 0.1, "seed": 2, "synthesis.steps": 3, "schedule.rounds": 4}
    again, settings = resolve(
        recipe="quick", config=str(path), environment={"seed": 2}, assignments=["seed=3"], options={}
    )
    assert (again, settings["seed"]) == ("quick", 3)
    assert resolve(recipe=None, config=None, environment={}, assignments=[], options={}) == ("auto", {})


@pytest.mark.parametrize(
    "content",
    ["seed: !!int", "seed: !!bool x", "seed: !!timestamp x", "seed: !!float ''", "seed: 9999-99-99", "? {a: b}\n: 1"],
)
def test_values_that_yaml_itself_trips_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"run\.yaml (has a value that cannot be read|is neither YAML nor JSON)"):
        read_config(str(path))


@pytest.mark.parametrize("kind", ["aliases", "merge"])
def test_a_few_lines_do_not_become_a_billion_values(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml_bomb(kind))
    with pytest.raises(UsageError, match=r"run\.yaml has an alias of a section or list \(line 2\)"):
        read_config(str(path))


def test_an_alias_of_a_value_is_that_value(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("synthesis: {lr_generator: &rate 0.25, lr_latent: *rate}\n")
    assert read_config(str(path)) == (None, {"synthesis.lr_generator": 0.25, "synthesis.lr_latent": 0.25})


@pytest.mark.parametrize("written", ["zskt", "fast"])
def test_a_report_of_one_method_is_not_anothers_settings(tmp_path: Path, written: str) -> None:
    made = with_method(get_recipe("digits").config((1, 8, 8)), written)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"config": to_dict(made)}))
    kept: dict[str, Any] = {"recipe": None, "config": str(path), "environment": {}}
    # dfq has all keys of zskt's: nothing else would say that the student kept zskt's attention transfer.
    for assignments, options in (((), {"method": "dfq"}), (["method=dfq"], {})):
        with pytest.raises(UsageError, match=f"has the settings of the method '{written}', not those of 'dfq': give"):
            resolve(**kept, assignments=assignments, options=options)
    name, settings = resolve(**kept, assignments=["seed=2"], options={"method": written})
    assert override(get_recipe(name).config((1, 8, 8)), settings) == replace(made, seed=2)
    # A few settings of one's own are what they say, with any method.
    path.write_text("{method: zskt, distillation: {lr: 0.3}}")
    _, settings = resolve(**kept, assignments=(), options={"method": "dfq"})
    assert override(get_recipe("digits").config((1, 8, 8)), settings).distillation.attention_weight == 0
