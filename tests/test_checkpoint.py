"""A checkpoint is whole or not there, the one before is kept, and nothing in a folder is believed unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdfkd_cli import checkpoint
from fastdfkd_cli.background import Background
from fastdfkd_cli.checkpoint import Checkpoints, Loaded
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError

IDENTITY = {"config": {"seed": 0, "synthesis": {"steps": 5}}, "teacher": "tiny"}
Says = list[str]


def opened(
    folder: Path,
    *,
    resume: bool = True,
    begin_anew: bool = False,
    identity: Mapping[str, Any] = IDENTITY,
    says: Says | None = None,
) -> Checkpoints:
    return Checkpoints.open(
        folder, identity, resume=resume, begin_anew=begin_anew, say=(says if says is not None else []).append
    )


def state(number: int) -> dict[str, Tensor]:
    return {"weights": torch.full((64, 32), float(number)), "steps": torch.tensor(number)}


def part(number: int) -> dict[str, Tensor]:
    return {"images": torch.full((8, 3, 4, 4), number, dtype=torch.uint8)}


def fill(folder: Path, count: int = 2) -> None:
    """Checkpoints 1 to ``count``, each with a segment of its own and all those before."""
    with opened(folder) as checkpoints:
        for number in range(1, count + 1):
            segments: dict[str, dict[str, Tensor] | None] = {f"part-{each}": None for each in range(1, number)}
            checkpoints.save(state(number), {"number": number}, {**segments, f"part-{number}": part(number)}, wait=True)


def require(latest: Loaded | None, number: int) -> None:
    """``latest`` is what :func:`fill` saved as ``number``, in every tensor."""
    assert latest is not None
    assert (latest.number, latest.values) == (number, {"number": number})
    for name, tensor in state(number).items():
        assert torch.equal(latest.tensors[name], tensor)
    assert latest.segments == tuple(f"part-{each}" for each in range(1, number + 1))
    for each in range(1, number + 1):
        assert torch.equal(latest.segment(f"part-{each}")["images"], part(each)["images"])


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder)}


def files(number: int, *segments: int) -> list[str]:
    """The files of a checkpoint, of those segments among them that it wrote."""
    own = [f"checkpoint-{number:08d}.json", f"checkpoint-{number:08d}.safetensors"]
    return own + [f"segment-{each:08d}-part-{each}.safetensors" for each in segments]


def sealed(content: Mapping[str, Any]) -> bytes:
    """A checkpoint's JSON with a right first line, whatever the others say."""
    rest = json.dumps(content, indent=1).removeprefix("{\n").encode() + b"\n"
    return f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", "bytes": {len(rest)},\n'.encode() + rest


def content_of(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    return {key: value for key, value in content.items() if key not in ("sha256", "bytes")}


# What goes in comes out


def test_tensors_and_values_come_back_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4, 3, 5, 6, generator=generator)
    tensors = {
        "channels last": real.contiguous(memory_format=torch.channels_last),
        "transposed": real.transpose(0, 3),
        "every other": real[::2, :, 1::2],
        "expanded": torch.arange(3).expand(4, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 7, dtype=torch.uint8),
        "wants a gradient": torch.ones(2, requires_grad=True),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    for dtype in checkpoint._DTYPES:
        tensors[str(dtype)] = torch.tensor([0, 1, 3]).to(dtype)
    values = {"int": 2**70, "float": 0.1 + 0.2, "text": "Häher \ud800", "none": None, "list": [1, [True, {}]]}
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(tensors, values, {"pool-0": {"images": real}})
    with opened(tmp_path / "c") as checkpoints:
        latest = checkpoints.latest
        assert latest is not None
        assert latest.values == values
        assert latest.segment("pool-0")["images"].equal(real)
        with pytest.raises(UnavailableError, match="holds no 'pool-1'"):
            latest.segment("pool-1")
    assert latest.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = latest.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        same = found.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name
    # A stranger reads them with nothing but safetensors and json.
    by_others = load_file(tmp_path / "c" / "checkpoint-00000001.safetensors")
    assert torch.equal(by_others["channels last"], real)
    assert json.loads((tmp_path / "c" / "checkpoint-00000001.json").read_bytes())["values"] == values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_json_does_not_have_is_refused_before_anything_is_written(tmp_path: Path, value: float) -> None:
    with opened(tmp_path / "c") as checkpoints:
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save({}, {"best": [value]}, {})
        with pytest.raises(ValueError, match="complex128"):
            checkpoints.save({"z": torch.zeros(1, dtype=torch.complex128)}, {}, {})
        for name in ("", "..", "a/b", "a.b", "A", "x" * 65, "a\n"):
            with pytest.raises(ValueError, match="no name of a segment"):
                checkpoints.save({}, {}, {name: part(1)})
        with pytest.raises(ValueError, match="of no checkpoint: part-1"):
            checkpoints.save({}, {}, {"part-1": None})
    assert listing(tmp_path) == []


def test_what_the_caller_changes_after_saving_is_not_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_to_write, write = threading.Semaphore(0), checkpoint._write_tensors

    def slow(*arguments: Any) -> Any:
        assert files_to_write.acquire(timeout=20)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_tensors", slow)
    tensors, values, images = state(1), {"number": 1}, part(1)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(tensors, values, {"part-1": images})
        assert checkpoints.last is None  # the caller goes on while it is written
        tensors["weights"].fill_(7)
        images["images"].fill_(7)
        values["number"] = 7
        held = checkpoints.seconds
        threading.Timer(0.05, files_to_write.release, (2,)).start()  # the first's; the second's waits
        checkpoints.save(state(2), {"number": 2}, {"part-1": None})  # waits for the one before
        assert checkpoints.seconds - held > 0.04
        assert checkpoints.last is not None
        assert (checkpoints.last.number, checkpoints.last_cost) == (1, checkpoints.last.seconds)
        assert checkpoints.last.bytes == sum(len(content) for content in snapshot(tmp_path / "c").values())
        files_to_write.release()
    (tmp_path / "c" / "checkpoint-00000002.json").unlink()
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 1)


# What stands in the folder


def test_nothing_is_made_before_the_first_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "c"
    with opened(folder, resume=False) as checkpoints:
        assert (checkpoints.latest, checkpoints.last_cost) == (None, 0)
    assert listing(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), opened(folder) as checkpoints:
        checkpoints.save(state(1), {"number": 1}, {"part-1": part(1)})
        raise KeyboardInterrupt
    assert listing(folder) == files(1, 1)


def test_the_checkpoint_before_is_kept_until_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "c", 2)
    before = snapshot(tmp_path / "c")
    assert sorted(before) == sorted({*files(1, 1), *files(2, 2)})
    seen: list[bool] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        now = snapshot(tmp_path / "c")
        seen.append(all(now.get(name) == content for name, content in before.items()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state(3), {"number": 3}, {"part-2": None, "part-3": part(3)})
        checkpoints.wait()
        assert seen == [True] * 3  # the tensors, the segment, the JSON
        assert listing(tmp_path / "c") == sorted({*files(2, 1, 2), *files(3, 3)})  # part-1 is checkpoint 2's
        checkpoints.save(state(4), {"number": 4}, {"part-3": None}, wait=True)
        assert listing(tmp_path / "c") == sorted({*files(3, 2, 3), *files(4)})
        checkpoints.save(state(5), {"number": 5}, {}, wait=True)
        checkpoints.save(state(6), {"number": 6}, {}, wait=True)
        assert listing(tmp_path / "c") == sorted({*files(5), *files(6)})
        with pytest.raises(ValueError, match="part-3"):
            checkpoints.save(state(7), {"number": 7}, {"part-3": None})


def test_a_segment_is_written_once(tmp_path: Path) -> None:
    fill(tmp_path / "c", 1)
    segment = tmp_path / "c" / files(1, 1)[-1]
    then = segment.stat()
    with opened(tmp_path / "c") as checkpoints:
        for number in (2, 3, 4):
            checkpoints.save(state(number), {}, {"part-1": None}, wait=True)
        assert checkpoints.last is not None
        assert checkpoints.last.bytes == sum((tmp_path / "c" / name).stat().st_size for name in files(4))
    assert (segment.stat().st_ino, segment.stat().st_mtime_ns) == (then.st_ino, then.st_mtime_ns)


def test_a_finished_run_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "runs" / "c", resume=False) as checkpoints:
        checkpoints.save(state(1), {}, {"part-1": part(1)})
        checkpoints.save(state(2), {}, {"part-1": None})
        checkpoints.finish()
        with pytest.raises(RuntimeError, match="given up"):
            checkpoints.save(state(3), {}, {})
    assert listing(tmp_path) == []
    says: Says = []
    with opened(tmp_path / "c", says=says) as checkpoints:
        checkpoints.save(state(1), {}, {}, wait=True)
        (tmp_path / "c" / "notes.txt").write_text("mine")
        checkpoints.finish()
    assert snapshot(tmp_path / "c") == {"notes.txt": b"mine"}
    assert len(says) == 1
    assert "could not be removed" in says[0]


def test_a_run_does_not_silently_begin_over_an_unfinished_one(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    before = snapshot(tmp_path / "c")
    with pytest.raises(UsageError, match="--resume auto to go on with it, or --overwrite"):
        opened(tmp_path / "c", resume=False)
    assert snapshot(tmp_path / "c") == before
    with opened(tmp_path / "c", resume=False, begin_anew=True) as checkpoints:
        assert checkpoints.latest is None
        assert listing(tmp_path / "c") == []
    with opened(tmp_path / "c", resume=False) as checkpoints:
        assert checkpoints.latest is None


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    before = snapshot(tmp_path / "c")
    other = {"config": {"seed": 1, "synthesis": {"steps": 5}, "amp": True}, "teacher": "tiny"}
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "c", identity=other)
    assert "config.seed (there 0, now 1)" in str(caught.value)
    assert "config.amp (there not set, now true)" in str(caught.value)
    assert "steps" not in str(caught.value)
    assert snapshot(tmp_path / "c") == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "name",
    ["notes.txt", "checkpoint-1.json", "checkpoint-00000001.json.bak", "link", "folder"],
)
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path, name: str, resume: bool) -> None:
    fill(tmp_path / "c")
    strange = Path(os.path.normpath(tmp_path / "c" / name))
    if name == "link":
        (tmp_path / "mine").write_text("mine")
        strange = tmp_path / "c" / "checkpoint-00000009.json"
        strange.symlink_to(tmp_path / "mine")
    elif name == "folder":
        strange = tmp_path / "c" / "segment-00000009-a.safetensors"
        strange.mkdir()
    else:
        strange.write_text("mine")
    before = listing(tmp_path / "c")
    with pytest.raises(UsageError, match=rf"no checkpoints \({strange.name}\)"):
        opened(tmp_path / "c", resume=resume, begin_anew=not resume)
    assert listing(tmp_path / "c") == before


def test_what_a_file_manager_leaves_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c" / ".DS_Store").write_text("")
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 2)
        checkpoints.finish()
    assert listing(tmp_path) == []


def test_places_that_cannot_hold_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "c", tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="checkpoints"):
            opened(place)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError), opened(tmp_path / "loop") as checkpoints:
        checkpoints.save({}, {}, {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    fill(tmp_path / "link")
    with opened(tmp_path / "elsewhere") as checkpoints:
        require(checkpoints.latest, 2)


# One run at a time


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with opened(tmp_path / "c"), pytest.raises(UsageError, match="Another run is writing"):
        opened(tmp_path / "c")
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 2)


def test_of_two_runs_that_begin_together_the_first_to_save_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as first, opened(tmp_path / "c") as second:
        first.save(state(1), {"number": 1}, {"part-1": part(1)}, wait=True)
        with pytest.raises(UsageError, match="Another run is writing"):
            second.save(state(8), {}, {})
    with opened(tmp_path / "d") as second:
        fill(tmp_path / "d")
        with pytest.raises(UsageError, match="since this one did"):
            second.save(state(8), {}, {})
        second.finish()
    for name, number in (("c", 1), ("d", 2)):
        with opened(tmp_path / name) as checkpoints:
            require(checkpoints.latest, number)


def test_the_folder_stays_locked_while_anything_is_written_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), checkpoint._write_tensors

    def slow(*arguments: Any) -> Any:
        assert gate.wait(20)
        return write(*arguments)

    def impatient(self: Background) -> None:
        raise KeyboardInterrupt  # Ctrl-C again while the first waits for the thread

    monkeypatch.setattr(checkpoint, "_write_tensors", slow)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state(1), {"number": 1}, {"part-1": part(1)})
        patch.setattr(Background, "failure", impatient)
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="Another run"):
        opened(tmp_path / "c")
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "fastdfkd-writer":
            thread.join(20)
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_that_outlives_a_run_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (begun, begins), (over, ends) = os.pipe(), os.pipe()
    with opened(tmp_path / "c"):
        worker = os.fork()
        if not worker:
            os.close(ends)
            os.write(begins, b"x")
            os.read(over, 1)
            os._exit(0)
        os.read(begun, 1)
    try:
        with opened(tmp_path / "c") as checkpoints:
            require(checkpoints.latest, 2)
    finally:
        for each in (begun, begins, over, ends):
            os.close(each)
        os.waitpid(worker, 0)


# Damage


def flip(content: bytes) -> bytes:
    middle = len(content) * 2 // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "flipped": (flip, "is damaged: its bytes do not have the SHA-256"),
    "cut": (lambda content: content[:-3], "is truncated: "),
    "cut to nothing": (lambda content: b"", "is truncated: "),
    "zeros": (lambda content: bytes(len(content)), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", files(2, 2))
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    fill(tmp_path / "c")
    path = tmp_path / "c" / name
    change, told = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    says: Says = []
    with opened(tmp_path / "c", says=says) as checkpoints:
        require(checkpoints.latest, 1)
        assert len(says) == 1
        assert f"{path} {told}" in says[0]
        assert "going on from checkpoint 1, of 20" in says[0]
        assert path.exists()  # until there is a better one
        checkpoints.save(state(2), {"number": 2}, {"part-1": None, "part-2": part(2)}, wait=True)
    assert not path.exists()
    with opened(tmp_path / "c", says=says) as checkpoints:
        assert checkpoints.latest is not None
        assert checkpoints.latest.number == 3  # no name is used twice
        assert checkpoints.latest.values == {"number": 2}
    assert len(says) == 1


@pytest.mark.parametrize("name", files(2, 2)[1:])
def test_a_missing_file_is_named_and_the_older_checkpoint_used(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    says: Says = []
    with opened(tmp_path / "c", says=says) as checkpoints:
        require(checkpoints.latest, 1)
    assert f"{name} is missing, though checkpoint-00000002.json names it" in says[0]


def test_any_byte_of_the_json_counts(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    path = tmp_path / "c" / "checkpoint-00000002.json"
    whole = path.read_bytes()
    for place in [*range(100), *range(100, len(whole), 23)]:
        flipped = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]
        for content, told in ((flipped, "is damaged"), (whole[:place], "is truncated")):
            path.write_bytes(content)
            says: Says = []
            with opened(tmp_path / "c", says=says) as checkpoints:
                require(checkpoints.latest, 1)
            assert f"{path} {told}" in says[0], place


def test_without_a_whole_checkpoint_every_damage_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    shared = tmp_path / "c" / "segment-00000001-part-1.safetensors"
    shared.write_bytes(flip(shared.read_bytes()))
    newest = tmp_path / "c" / "checkpoint-00000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = snapshot(tmp_path / "c")
    with pytest.raises(UnavailableError) as caught:
        opened(tmp_path / "c")
    message = str(caught.value)
    assert f"{newest} is truncated" in message
    assert f"{shared} is damaged" in message
    assert "--overwrite to begin anew" in message
    assert "\n" not in message
    assert snapshot(tmp_path / "c") == before


def test_a_later_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    path = tmp_path / "c" / "checkpoint-00000002.json"
    path.write_bytes(sealed({**content_of(path), "format_version": 2, "fastdfkd": "9.0"}))
    with pytest.raises(UsageError, match=r"later fastdfkd \(9.0\)"):
        opened(tmp_path / "c")


# A disk that fills, and other refusals


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond ``size`` bytes of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("then", ["save", "wait", "leave"])
def test_a_file_that_cannot_be_written_whole_is_told_once_and_removed(tmp_path: Path, then: str) -> None:
    fill(tmp_path / "c")
    before = snapshot(tmp_path / "c")
    with pytest.raises(FastDFKDError) as caught, opened(tmp_path / "c") as checkpoints:
        with largest_file(2**16):
            checkpoints.save({"big": torch.zeros(2**20)}, {}, {"part-3": part(3)})
            checkpoints._background.failure()
        if then == "save":
            checkpoints.save(state(4), {}, {})
        elif then == "wait":
            checkpoints.wait()
    message = str(caught.value)
    assert message.startswith(f"Cannot write {tmp_path / 'c'}: File too large (")
    assert message.endswith("make room, then go on from the checkpoint before (2) with --resume auto.")
    assert snapshot(tmp_path / "c") == before
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 2)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_at_any_moment_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(tmp_path / "c", 1)
    before = snapshot(tmp_path / "c")
    original = getattr(os, name)
    told: list[str] = []
    for moment in range(20):
        calls = iter(range(100))

        def refused(*arguments: Any, calls: Iterator[int] = calls, moment: int = moment) -> None:
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, refused)
            try:
                with opened(tmp_path / "c") as checkpoints:
                    require(checkpoints.latest, 1)
                    checkpoints.save(state(2), {"number": 2}, {"part-1": None, "part-2": part(2)}, wait=True)
                break
            except FastDFKDError as error:
                told.append(str(error))
        assert snapshot(tmp_path / "c") == before
    assert len(told) == {"fsync": 4, "replace": 3}[name]  # each file, and the folder before the JSON is in it
    assert all("No space left on device" in text and "\n" not in text for text in told)
    with opened(tmp_path / "c") as checkpoints:
        require(checkpoints.latest, 2)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(FastDFKDError, match="make room or choose another --output"),
        largest_file(100),
        opened(tmp_path / "runs" / "c") as checkpoints,
    ):
        checkpoints.save(state(1), {}, {}, wait=True)
    assert listing(tmp_path) == []


def test_a_segment_that_somebody_removed_is_noticed_before_the_good_ones_go(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    with pytest.raises(FastDFKDError, match="part-1.safetensors is missing"), opened(tmp_path / "c") as checkpoints:
        (tmp_path / "c" / "segment-00000001-part-1.safetensors").unlink()
        checkpoints.save(state(3), {}, {"part-1": None}, wait=True)
    assert listing(tmp_path / "c") == sorted({*files(1), *files(2, 2)})


# Kill -9

KILLED = """
import json, os, random, select, signal, sys, time
from pathlib import Path
import torch
from fastdfkd_cli.checkpoint import Checkpoints

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
moments = random.Random(sys.argv[3])


def opened(says):
    return Checkpoints.open(folder, {"seed": 0}, resume=True, say=says.append)


def segments(number, stored):
    names = [f"part-{each}" for each in range(max(number - 3, 1), number + 1)]
    return {name: None if name in stored else {"x": torch.full((2000,), int(name[5:]))} for name in names}


def child(pipe):
    checkpoints = opened([])
    latest = checkpoints.latest
    number, stored = (latest.values["number"], set(latest.segments)) if latest else (0, set())
    os.write(pipe, b"0\\n")
    while True:
        number += 1
        parts = segments(number, stored)
        checkpoints.save({"w": torch.full((5000,), number)}, {"number": number}, parts)
        stored = set(parts)
        if number % 3 == 0:
            checkpoints.wait()
            os.write(pipe, f"{number}\\n".encode())


torn, last, found = 0, 0, []
with opened([]) as checkpoints:
    began = time.perf_counter()
    for last in range(1, 6):
        parts = segments(last, segments(last - 1, ()))
        checkpoints.save({"w": torch.full((5000,), last)}, {"number": last}, parts, wait=True)
    each = (time.perf_counter() - began) / 5
for _ in range(kills):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            child(write)
        finally:
            os._exit(1)
    os.close(write)
    select.select([read], [], [], 20)
    time.sleep(moments.uniform(0, 2 * each))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the child ended by itself"
    with os.fdopen(read) as told:
        promised = max([last, *map(int, told.read().split("\\n")[:-1])])
    left = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    says = []
    with opened(says) as checkpoints:
        latest = checkpoints.latest
        number = latest.values["number"] if latest else 0
        assert not says, says
        assert promised <= number <= promised + 3, (promised, number)
        if latest:
            assert set(latest.tensors["w"].tolist()) == {number}
            assert set(latest.segments) == set(segments(number, ()))
            for name in latest.segments:
                assert set(latest.segment(name)["x"].tolist()) == {int(name[5:])}
    torn += bool(left - {entry.name for entry in folder.iterdir()})
    last = number
    found.append(number)
print(json.dumps({"torn": torn, "found": found}))
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    seed = str(time.time_ns())
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "c"), "30", seed], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    result = json.loads(done.stdout)
    assert result["found"] == sorted(result["found"])
    assert result["found"][-1] > 10
    assert result["torn"] >= 5  # of 30: a write was under way, and what it left was removed


# Folders from elsewhere

HOSTILE_FILES: list[Any] = [
    None, "x", 3, {}, [],
    {"file": "../secret", "bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()},
    {"file": "/etc/passwd", "bytes": 1, "sha256": "0" * 64},
    {"file": "checkpoint-00000001.json", "bytes": 1, "sha256": "0" * 64},
    {"file": "checkpoint-00000009.safetensors", "bytes": 1, "sha256": "0" * 64},
    {"file": "checkpoint-00000002.safetensors\n", "bytes": 1, "sha256": "0" * 64},
    {"file": "segment-00000001-part-1.safetensors", "bytes": 1, "sha256": "0" * 64},
    {"file": "checkpoint-00000002.safetensors", "bytes": -1, "sha256": "0" * 64},
    {"file": "checkpoint-00000002.safetensors", "bytes": 2**80, "sha256": "0" * 64},
    {"file": "checkpoint-00000002.safetensors", "bytes": True, "sha256": "0" * 64},
    {"file": "checkpoint-00000002.safetensors", "bytes": 1, "sha256": "\x1b[31m"},
    {"file": "checkpoint-00000002.safetensors", "bytes": 1, "sha256": ["0"]},
]  # fmt: skip
HOSTILE = [
    *({"tensors": each} for each in HOSTILE_FILES),
    *({"segments": {"part-1": each}} for each in HOSTILE_FILES),
    *({"segments": {name: {"file": f"segment-00000001-{name}.safetensors", "bytes": 1, "sha256": "0" * 64}}}
      for name in ("../x", "", "a/b", "A", "x" * 200)),
    *({key: junk} for key in ("format", "number", "written", "identity", "values", "segments")
      for junk in (None, "x", -1, 2.5, [], [[1]], True, 10**400)),
    {"written": "2026-01-01\x1b[2J"},
    {"number": 3},
    {"number": 2.0},
]  # fmt: skip


def test_a_json_that_says_anything_at_all_leads_nowhere(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "c" / "checkpoint-00000002.json"
    content = content_of(path)
    for lie in HOSTILE:
        path.write_bytes(sealed({**content, **lie}))
        says: Says = []
        with opened(tmp_path / "c", says=says) as checkpoints:
            require(checkpoints.latest, 1)
        assert len(says) == 1, lie
        assert says[0].isprintable()
        assert listing(tmp_path) == ["c", "secret"]
    for text in (b"[" * 100_000, b"NaN", b"1e999", b"9" * 100_000, b'"\\ud800"', b'{"a": ' * 900 + b"0" + b"}" * 900):
        rest = b'"identity": ' + text + b"}\n"
        path.write_bytes(f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", "bytes": {len(rest)},\n'.encode() + rest)
        with opened(tmp_path / "c") as checkpoints:
            require(checkpoints.latest, 1)
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    path.write_bytes(sealed({**content, "identity": {**IDENTITY, "b\x1b\n\ud800": deep, "c": "\x9b\ud800"}}))
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / "c")
    assert str(caught.value).isprintable()


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        header(w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        header(w={"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}),
        header(w={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}),
        header(w={"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}),
        header(w={"dtype": "X", "shape": [1], "data_offsets": [0, 1]}) + b"x",
        header(w={"dtype": "U8", "shape": [1], "data_offsets": [4, 5]}) + b"x",
        header(w={"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}) + b"xyz",
    ],
)
@pytest.mark.parametrize("name", files(2, 2)[1:])
def test_tensors_that_lie_about_themselves_are_damage(tmp_path: Path, name: str, content: bytes) -> None:
    """Checksums are right: whoever writes a folder can write those too."""
    fill(tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(content)
    path = tmp_path / "c" / "checkpoint-00000002.json"
    stated = content_of(path)
    facts = {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if name.startswith("segment"):
        stated["segments"]["part-2"] = facts
    else:
        stated["tensors"] = facts
    path.write_bytes(sealed(stated))
    says: Says = []
    with opened(tmp_path / "c", says=says) as checkpoints:
        latest = checkpoints.latest
        assert latest is not None
        if latest.number == 2:  # a segment's tensors are read when they are asked for
            with pytest.raises(UnavailableError, match="cannot be read"):
                latest.segment("part-2")
        else:
            require(latest, 1)
            assert says[0].isprintable()
