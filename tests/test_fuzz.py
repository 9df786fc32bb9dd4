"""A few of the inputs that ``tests/fuzz.py`` makes in minutes, the same ones every time, and a test of its rules."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fuzz import Sandbox, Target

#: Inputs for each target; those that take seconds or much memory are for the command.
EXAMPLES = {
    "settings": 60, "config files": 25, "command lines": 30, "safetensors": 40, "pickles": 50, "model folders": 30,
    "tars": 80, "images": 50, "synthetic sets": 50, "checkpoints": 40,
}  # fmt: skip


def test_no_target_is_forgotten() -> None:
    assert EXAMPLES.keys() == {name for name, target in fuzz.TARGETS.items() if target.quick}


@pytest.mark.parametrize("name", EXAMPLES)
def test_hostile_input_is_taken_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    target, sandbox = fuzz.TARGETS[name], Sandbox(tmp_path)

    @settings(
        max_examples=EXAMPLES[name], derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.cases)
    def holds(case: Any) -> None:
        outcome = sandbox.attempt(target, case)
        assert not outcome.broken, f"{outcome.kind}: {outcome.detail}"

    holds()


def _sleep_on(_: Any) -> None:
    try:
        time.sleep(30)
    except Exception:  # what the program might do
        time.sleep(30)


def _refuse(text: str) -> Callable[[Any], None]:
    def act(_: Any) -> None:
        error = FastDFKDError()
        error.args = (text,)  # past its own care
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        (lambda _: None, "accepted", ""),
        (lambda _: Path("here").write_text("x"), "accepted", ""),
        (_refuse("no"), "refused", "no"),
        (lambda _: {}["x"], "raised", "KeyError"),
        (_sleep_on, "hung", "more than"),
        (lambda _: Path("../outside").write_text("x"), "outside", "open"),
        (lambda _: Path("link").write_text("x"), "outside", "link"),
        (lambda _: Path("../decoy").unlink(), "outside", "os.remove"),
        (lambda _: os.rename("here-already", "../outside"), "outside", "os.rename"),
        (lambda _: os.mkdir("../outside"), "outside", "os.mkdir"),
        (lambda _: subprocess.run([sys.executable, "-c", ""], check=True), "outside", "subprocess.Popen"),
        (lambda _: socket.create_connection(("127.0.0.1", 9), 0.1), "raised", "Refused"),
        (_refuse("two\nlines"), "said", "two"),
        (_refuse("a \x1b[31m colour"), "said", "colour"),
        (_refuse("x" * 5000), "said", "xxx"),
        (lambda _: sys.stdout.write("\x1b[2J"), "said", "2J"),
    ],
)
def test_a_broken_rule_is_seen(act: Callable[[Any], Any], kind: str, words: str, tmp_path: Path) -> None:
    def lay(folder: Path, _: Any) -> None:
        (folder / "link").symlink_to("../decoy")
        (folder / "here-already").touch()

    target = Target(name="x", cases=st.none(), lay=lay, act=act, writes=True)
    outcome = Sandbox(tmp_path).attempt(target, None, limit=0.2)
    assert (outcome.kind, outcome.broken) == (kind, kind not in ("accepted", "refused"))
    assert words in outcome.detail
    reading = Target(name="x", cases=st.none(), lay=lay, act=act)
    if (tmp_path / "in" / "here").exists():
        assert Sandbox(tmp_path).attempt(reading, None).kind == "outside", "a target that only reads may write nothing"


def test_a_file_that_changes_without_python_is_seen(tmp_path: Path) -> None:
    """Code outside Python raises no audit event: what is there afterwards is compared."""
    sandbox = Sandbox(tmp_path)

    def act(_: Any) -> None:
        fuzz.watch().folder = None  # as if it were not looking
        (tmp_path / "decoy").write_text("changed")

    outcome = sandbox.attempt(Target(name="x", cases=st.none(), act=act, writes=True), None)
    assert (outcome.kind, outcome.detail) == ("outside", f"changed {tmp_path / 'decoy'}")


def test_a_command_line_that_ends_oddly_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(name="x", cases=st.none(), act=fuzz.run_command)
    for code, said in ((7, ""), (2, ""), (0, "fastdfkd: error: x\n"), (1, "fastdfkd: error: x\nfastdfkd: error: y\n")):

        def main(line: list[str], code: int = code, said: str = said) -> int:
            sys.stderr.write(said)
            return code

        monkeypatch.setattr(fuzz, "command", main)
        outcome = Sandbox(tmp_path).attempt(target, ["recipes"])
        assert outcome.kind == "raised"
        assert f"code {code}" in outcome.detail


def test_the_command_counts_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    tally = fuzz.explore(fuzz.SETTINGS, seconds=30, examples=20, number=0)
    assert tally.inputs == sum(tally.kinds.values()) == 20
    assert not tally.found

    def act(case: int) -> None:
        if case % 2:
            raise UsageError("odd")
        raise KeyError(case)

    tally = fuzz.explore(Target(name="x", cases=st.integers(), act=act), seconds=30, examples=30, number=0)
    assert tally.kinds["refused"] + tally.kinds["raised"] == 30
    assert tally.kinds["raised"] > 0
    (found,) = tally.found.values()
    assert "KeyError" in found
