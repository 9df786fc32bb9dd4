"""What reaches stdout and stderr while a run works and when it ends."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from fastdfkd_cli import console
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.records import Phase, Record


def record(phase: Phase = "synthesis", step: int = 512, **changes: object) -> Record:
    values: dict[str, object] = {
        "phase": phase,
        "step": step,
        "total": 1024,
        "unit": "images",
        "progress": 0.25,
        "elapsed": 10.0,
        "remaining": 200.0,
        "rate": 51.2,
        "values": {"feature": 3.25, "class": 0.125},
    }
    return Record(**(values | changes))  # type: ignore[arg-type]


class FakeClock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("fastdfkd_cli.console.time.monotonic", lambda: self.now)


def test_a_plain_line_says_where_the_run_is(capfd: pytest.CaptureFixture[str]) -> None:
    with console.Progress(live=False) as progress:
        progress.record(record())
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "[ 25%] synthesis 512/1,024 images, 51 images/s, feature 3.25 class 0.125, 3m20s left\n"


def test_unknown_figures_are_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with console.Progress(live=False) as progress:
        progress.record(record(total=None, rate=None, remaining=None, values={}))
    assert capfd.readouterr().err == "[ 25%] synthesis 512 images\n"


def test_plain_lines_are_seconds_apart(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock(monkeypatch)
    with console.Progress(live=False, interval=5.0) as progress:
        for step in range(100):
            clock.now += 0.125
            progress.record(record(step=step))
        # A phase is announced when it begins, however soon that is.
        progress.record(record(phase="distillation", step=1))
        progress.record(record(phase="distillation", step=2))
    lines = capfd.readouterr().err.splitlines()
    # After 0, 5 and 10 s; where the phase ended; the new phase; and the last record, where the run ended.
    assert [line.split()[2:4] for line in lines] == [
        ["synthesis", "0/1,024"],
        ["synthesis", "40/1,024"],
        ["synthesis", "80/1,024"],
        ["synthesis", "99/1,024"],
        ["distillation", "1/1,024"],
        ["distillation", "2/1,024"],
    ]


def test_a_failed_run_does_not_print_its_last_step(capfd: pytest.CaptureFixture[str]) -> None:
    progress = console.Progress(live=False)
    with pytest.raises(ZeroDivisionError), progress:
        progress.record(record(step=1))
        progress.record(record(step=2))
        raise ZeroDivisionError
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_long_lines_and_brackets_survive(capfd: pytest.CaptureFixture[str]) -> None:
    text = "[red]not markup[/red] " + "x" * 300
    with console.Progress(live=False) as progress:
        progress.message(text)
    assert capfd.readouterr().err == text + "\n"


def test_a_log_file_gets_no_live_display_even_with_forced_colour(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.Progress() as progress:
        progress.record(record())
    assert "\x1b[2K" not in capfd.readouterr().err


def test_the_live_display_shows_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    progress = console.Progress(live=True)
    with progress:
        progress.record(record())
        progress.record(record(phase="distillation", unit="steps", values={"loss": 1.5}))
        progress.message("a message")
    shown = screen.getvalue()
    for expected in ("synthesis", "distillation", "512/1,024 images", "loss 1.5", "25%", "3m20s left", "a message"):
        assert expected in shown


def test_a_narrow_terminal_cuts_the_losses_not_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with console.Progress(live=True) as progress:
        progress.record(record(values={"a long name": 1.0, "another long name": 2.0}))
    assert "synthesis" in screen.getvalue()
    assert "512/1,024 images" in screen.getvalue()
    assert "51 images/s" in screen.getvalue()
    assert "…" in screen.getvalue()


def test_json_is_one_plain_object(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.print_json({"top1": 93.5, "path": Path("a/b"), "nested": {"loss": math.nan, "rates": (1, math.inf)}})
    out = capfd.readouterr().out
    assert json.loads(out) == {"top1": 93.5, "path": "a/b", "nested": {"loss": None, "rates": [1, None]}}
    assert "\x1b" not in out


def test_json_refuses_what_it_cannot_say() -> None:
    with pytest.raises(TypeError):
        console.print_json({"tensor": object()})


def test_values_are_dotted_and_absent_ones_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    console.print_values({"images": 14080, "seconds": {"synthesis": 12.3456789, "other": None}, "size": (3, 32, 32)})
    assert capfd.readouterr().out == "images 14080\nseconds.synthesis 12.3457\nsize 3 32 32\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (0.1 + 0.2, "0.3"),
        (12_345_678.0, "12345678"),
        (math.inf, "inf"),
        ("a\nb", "a b"),
        ([1, 2.5], "1 2.5"),
    ],
)
def test_format_value(value: object, text: str) -> None:
    assert console.format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (7502, "2h05m"), (-1, "0s")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert console.format_seconds(seconds) == text


def test_columns_line_up(capfd: pytest.CaptureFixture[str]) -> None:
    console.print_columns(("recipe", "about"), [("a-long-name", "x" * 200), ("b", "")])
    assert capfd.readouterr().out == f"recipe       about\na-long-name  {'x' * 200}\nb\n"


def test_an_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    console.print_error("first\n  second")
    assert capfd.readouterr() == ("", "fastdfkd: error: first second\n")


def test_the_table_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    console.print_table("Student", {"path": "[a]/" + "b" * 120, "top1": 95.25, "absent": None})
    out, err = capfd.readouterr()
    assert out == ""
    assert "".join(err.split()).endswith("[a]/" + "b" * 120 + "top195.25")
    assert "absent" not in err


@pytest.mark.parametrize(
    ("stdout", "stderr", "table", "lines"),
    [(True, True, True, False), (False, True, True, True), (True, False, False, True), (False, False, False, True)],
)
def test_a_summary_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdout: bool,
    stderr: bool,
    table: bool,
    lines: bool,
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: stdout)
    monkeypatch.setattr("sys.stderr.isatty", lambda: stderr)
    console.print_summary("Student", "out", {"top1": 95.0}, as_json=None)
    out, err = capsys.readouterr()
    assert ("top1" in err) == table
    assert out == ("top1 95\nout\n" if lines else "out\n")


def test_a_summary_as_json_is_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_summary("Student", "out", {"top1": 95.0}, as_json={"path": "out"})
    assert json.loads(capsys.readouterr().out) == {"path": "out"}


def test_messages_come_after_what_led_to_them(capfd: pytest.CaptureFixture[str]) -> None:
    with console.Progress(live=False) as progress:
        progress.record(record(step=1))
        progress.record(record(step=2))
        progress.message("done")
    assert [line.split()[-1] for line in capfd.readouterr().err.splitlines()] == ["left", "left", "done"]


#: Colours, a title, an erased screen (also with the 8-bit introducer), a changed direction, half a character.
HOSTILE = "a\x1b[31mb\x1b]0;owned\x07c\x9b2Jd\u202ee\udcfff\x7fg"
SHOWN = "a\\x1b[31mb\\x1b]0;owned\\x07c\\x9b2Jd\\u202ee\\udcfff\\x7fg"


@pytest.mark.parametrize("live", [False, True])
def test_nothing_that_is_printed_acts_on_the_terminal(
    live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # so that Rich, too, acts on nothing
    console.print_error(HOSTILE)
    console.print_line(HOSTILE)
    console.print_values({"teacher": {"name": HOSTILE}, HOSTILE: [HOSTILE]})
    console.print_columns(("name", "about"), [(HOSTILE, HOSTILE)])
    console.print_table("Student", {HOSTILE: HOSTILE})
    monkeypatch.setattr("sys.stderr.isatty", lambda: live)
    console.print_summary("Student", HOSTILE, {"model": HOSTILE}, as_json=None)
    console.Progress(live=False).message(HOSTILE)
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 8
    assert "".join(err.split()).count(SHOWN) == 4 + 2 * live
    assert all(char == "\n" or char.isprintable() for char in out + err)


def test_json_holds_nothing_that_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"name": HOSTILE})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": HOSTILE}
    assert all(char == "\n" or char.isprintable() for char in out)


def test_letters_that_a_stream_does_not_know_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    console.print_line("na\u00efve")
    screen.seek(0)
    assert screen.read() == "na\\xefve\n"


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    assert str(UsageError(f"a\n  b {HOSTILE}")) == f"a b {SHOWN}"
    long = str(UsageError("The name " + "x" * 10_000 + " is too long: choose a shorter one."))
    assert len(long) < 1000
    assert long.endswith(" is too long: choose a shorter one.")
