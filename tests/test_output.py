"""A folder is either whole or not there, and nobody else's files are ever deleted."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fastdfkd_cli import output
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.output import (
    StagedDirectory,
    is_own_folder,
    safe_code,
    safe_text,
    sha256_file,
    user_path,
    write_bytes,
    write_json,
)


def own_folder(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    write_json(path / "report.json", {"fastdfkd": "0.1.0"})
    (path / "config.json").write_text(text)
    return path


def fill(
    path: str | Path, files: dict[str, str], *, overwrite: bool = False, error: BaseException | None = None
) -> Path:
    """A run in short: write ``files`` and end well, or with ``error``. Returns where it wrote."""
    with StagedDirectory(path, overwrite) as staging:
        for name, text in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)
        if error is not None:
            raise error
    return staging


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_new_folder_and_its_parents_appear_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "student"
    with StagedDirectory(target) as staging:
        assert staging.parent == target.parent
        assert not target.exists()
        assert staging.name.startswith(".student.partial-")
        (staging / "inner").mkdir()
        (staging / "inner" / "x").write_text("1")
    assert entries(target.parent) == ["student"]
    assert (target / "inner" / "x").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill(tmp_path / "a" / "student", {"half": "1"}, error=error())
    assert entries(tmp_path) == []


def test_an_existing_empty_folder_is_used_and_a_full_one_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with StagedDirectory(target) as staging:
        (staging / "x").write_text("1")
    assert entries(target) == ["x"]
    with pytest.raises(UsageError, match="is not empty"):
        StagedDirectory(target)


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = own_folder(tmp_path / "out")
    with pytest.raises(UsageError, match="give --overwrite"):
        StagedDirectory(target)
    with pytest.raises(KeyboardInterrupt):
        fill(target, {"config.json": "new"}, overwrite=True, error=KeyboardInterrupt())
    assert (target / "config.json").read_text() == "old"
    assert entries(tmp_path) == ["out"]
    with StagedDirectory(target, overwrite=True) as staging:
        assert (target / "config.json").read_text() == "old"
        (staging / "config.json").write_text("new")
    assert entries(target) == ["config.json"]
    assert entries(tmp_path) == ["out"]


def test_the_old_folder_returns_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = own_folder(tmp_path / "out")
    rename = os.rename

    def failing(source: str | Path, goal: str | Path) -> None:
        if ".partial-" in str(source):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, goal)

    monkeypatch.setattr(output.os, "rename", failing)
    with pytest.raises(FastDFKDError, match="No space left"):
        fill(target, {"config.json": "new"}, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_overwrite_never_deletes_a_strangers_files(tmp_path: Path) -> None:
    strange = tmp_path / "photos"
    strange.mkdir()
    (strange / "report.json").write_text('{"title": "mine"}')
    with pytest.raises(UsageError, match="was not written by fastdfkd"):
        StagedDirectory(strange, overwrite=True)
    (strange / "report.json").write_text("[not json")
    with pytest.raises(UsageError, match="was not written by fastdfkd"):
        StagedDirectory(strange, overwrite=True)

    mixed = own_folder(tmp_path / "student")
    (mixed / ".DS_Store").write_text("litter")
    StagedDirectory(mixed, overwrite=True)
    (mixed / "notes").mkdir()
    (mixed / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"notes/thesis.txt.*--overwrite would delete"):
        StagedDirectory(mixed, overwrite=True)
    assert (mixed / "notes" / "thesis.txt").exists()


def test_a_deeper_file_does_not_pass_for_a_runs_own(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "student")
    (folder / "grids" / "holiday").mkdir(parents=True)
    (folder / "grids" / "holiday" / "me.png").write_text("x")
    with pytest.raises(UsageError, match="holiday/me.png"):
        StagedDirectory(folder, overwrite=True)


def test_a_file_or_the_root_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        StagedDirectory(tmp_path / "file")
    with pytest.raises(UsageError, match="file is a file"):
        StagedDirectory(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match="root folder"):
        StagedDirectory("/", overwrite=True)


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path: Path) -> None:
    real = own_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    with StagedDirectory(tmp_path / "link", overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (real / "config.json").read_text() == "new"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError), StagedDirectory(tmp_path / "loop"):
        pass


def test_the_current_directory_is_filled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with pytest.raises(KeyboardInterrupt):
        fill(".", {"config.json": "half"}, error=KeyboardInterrupt())
    assert entries(tmp_path) == []
    with StagedDirectory(".") as staging:
        (staging / "config.json").write_text("first")
        write_json(staging / "report.json", {"fastdfkd": "1"})
    with pytest.raises(UsageError, match="is not empty"):
        StagedDirectory(".")
    with StagedDirectory(".", overwrite=True) as staging:
        (staging / "model.safetensors").write_text("second")
    assert entries(tmp_path) == ["model.safetensors"]
    assert tmp_path.stat().st_ino == before
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(UsageError, match="contains the current directory"):
        StagedDirectory("..", overwrite=True)


def test_a_swap_that_fails_in_place_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = own_folder(tmp_path / "out")
    monkeypatch.chdir(target)
    rename = os.rename

    def failing(source: str | Path, goal: str | Path) -> None:
        if Path(source).name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, goal)

    monkeypatch.setattr(output.os, "rename", failing)
    with pytest.raises(FastDFKDError, match="Input/output"):
        fill(".", {"README.md": "new", "model.safetensors": "new"}, overwrite=True)
    assert entries(target) == ["config.json", "report.json"]


def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The suite may run as root, to whom every folder is writable: so the question itself is answered with no.
    monkeypatch.setattr(output.os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="not writable"):
        StagedDirectory(tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="not writable"):
        StagedDirectory(tmp_path / "there")


def test_a_full_disk_is_one_line_and_other_os_errors_keep_their_traceback(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FastDFKDError, match=r"No space left on device.*MiB are free.*make room") as caught:
        fill(tmp_path / "out", {}, error=full)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    with pytest.raises(FileNotFoundError):
        fill(tmp_path / "out", {}, error=FileNotFoundError(errno.ENOENT, "a bug"))
    assert entries(tmp_path) == []


def test_a_result_is_kept_when_something_else_took_its_place(tmp_path: Path) -> None:
    staged = StagedDirectory(tmp_path / "out")
    staging = staged.__enter__()
    (staging / "x").write_text("hours of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(FastDFKDError, match="its result is kept in") as caught:
        staged.__exit__(None, None, None)
    assert entries(tmp_path / "out") == ["theirs"]
    assert (staging / "x").read_text() == "hours of work"
    assert str(staging) in str(caught.value)


def test_write_json_is_strict_atomic_and_knows_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_json(
        path, {"loss": float("nan"), "path": Path("a"), "t": (1, 2), "name": "Zürich", "inner": {1: float("inf")}}
    )
    assert json.loads(path.read_text()) == {
        "loss": None, "path": "a", "t": [1, 2], "name": "Zürich", "inner": {"1": None}
    }  # fmt: skip
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(FastDFKDError, match="No space left"):
        write_json(path, {"new": 1})
    assert "new" not in json.loads(path.read_text())
    assert entries(tmp_path) == ["report.json"]


def test_sha256_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_text_from_elsewhere_stays_text_in_markdown() -> None:
    assert safe_text("# Title\n<script>[a](b)") == r"\# Title \<script\>\[a\](b)"
    assert safe_text("- item") == r"\- item"
    assert safe_text("1. item-2") == r"1\. item-2"
    assert safe_text("cat\x1b[31m\u202e\x00 dog") == r"cat \[31m dog"
    assert safe_text("naïve 猫 1.5") == "naïve 猫 1.5"
    assert safe_code("a\nb") == "`a b`"
    assert safe_code("x `rm` y") == "`` x `rm` y ``"


def test_an_address_does_not_become_a_link() -> None:
    assert safe_text("see https://example.org/a.b") == r"see https\://example.org/a.b"
    assert safe_text("www.example.org") == r"www\.example.org"
    assert safe_text("hf-hub:owner/repo v1.2") == "hf-hub:owner/repo v1.2"


def test_json_files_hold_nothing_that_acts_on_a_terminal(tmp_path: Path) -> None:
    values = {"name": "na\u00efve \u732b \x1b[2J \x9b2J \u202e \x7f", "file": "not UTF-8: \udcff"}
    write_json(tmp_path / "report.json", values)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == values
    assert "na\u00efve \u732b" in text
    assert all(char == "\n" or char.isprintable() for char in text)


@pytest.mark.parametrize("name", ["grids", "state"])
def test_a_link_in_a_runs_folder_is_nobodys(tmp_path: Path, name: str) -> None:
    """What the next run writes into it would land elsewhere."""
    folder = own_folder(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    (folder / name).symlink_to("../elsewhere")
    with pytest.raises(UsageError, match=f"files that no fastdfkd run wrote \\({name}\\)"):
        StagedDirectory(folder, overwrite=True)


def test_json_without_end_marks_no_folder(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[" * 100_000)
    assert not is_own_folder(tmp_path)


def test_a_home_that_nobody_has_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/x.pth") == Path("/home/me/x.pth")
    assert user_path("~no-such-user/x.pth") == Path("~no-such-user/x.pth")
