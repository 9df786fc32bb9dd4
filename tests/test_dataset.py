"""A synthetic set survives interruption, is what timm reads, and never loads damaged."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor

from fastdfkd_cli.background import Background, HostCopy
from fastdfkd_cli.dataset import DatasetWriter, class_folders, load_manifest, read_dataset
from fastdfkd_cli.dataset import writer as dataset_writer
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.output import StagedDirectory, sha256_file

NAMES = ("cat", "dog / wolf", "Häher")
HEADER = {"config": {"seed": 0, "synthesis": {"steps": 5}}, "teacher": "tiny"}
Batch = tuple[Tensor, Tensor, Tensor]


def batch(count: int, *, seed: int = 0, channels: int = 3, size: tuple[int, int] = (6, 5)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % len(NAMES)
    return images, labels, torch.randn(count, len(NAMES), generator=generator)


def arguments(**changes: Any) -> dict[str, Any]:
    values = {"class_names": NAMES, "num_classes": 3, "input_size": (3, 6, 5), "shard_size": 4, "header": HEADER}
    return {**values, **changes}


def make(path: Path, count: int = 10, *, channels: int = 3, **changes: Any) -> Batch:
    data = batch(count, channels=channels)
    with DatasetWriter(path, **arguments(input_size=(channels, 6, 5), **changes)) as writer:
        writer.add(*data)
        writer.close()
    return data


def listing(path: Path) -> list[str]:
    return sorted(item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file())


def snapshot(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in listing(path)}


# The layout


def test_class_folders_sort_like_their_indices() -> None:
    assert class_folders(3, NAMES) == ("0000_cat", "0001_dog_wolf", "0002_Haher")
    assert class_folders(2, ("猫", "../../etc/passwd")) == ("0000", "0001_etc_passwd")
    many = class_folders(12345)
    assert many[7] == "00007"
    assert list(many) == sorted(many)
    with pytest.raises(ValueError, match="2 class names for 3"):
        class_folders(3, ("a", "b"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_set_comes_back_to_the_bit(tmp_path: Path, channels: int) -> None:
    images, labels, logits = make(tmp_path / "set", channels=channels)
    found = read_dataset(tmp_path / "set")
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert found.logits is not None
    assert torch.equal(found.logits, logits)
    assert found.manifest is not None
    assert found.manifest["counts"] == [4, 3, 3]
    assert [shard["images"] for shard in found.manifest["shards"]] == [4, 4, 2]
    assert found.manifest["complete"]
    assert len(found) == 10


def test_half_precision_logits_stay_half(tmp_path: Path) -> None:
    images, labels, logits = batch(4)
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(images, labels, logits.half())
        writer.close()
    found = read_dataset(tmp_path / "set").logits
    assert found is not None
    assert found.dtype == torch.float16


def test_the_layout_and_its_checksums(tmp_path: Path) -> None:
    make(tmp_path / "set")
    shards = [f"train-{index:05d}.{kind}" for index in range(3) for kind in ("safetensors", "tar")]
    grids = [f"grids/{name}.png" for name in ("0000_cat", "0001_dog_wolf", "0002_Haher")]
    assert listing(tmp_path / "set") == sorted(["classes.txt", "manifest.json", *grids, *shards])
    manifest = load_manifest(tmp_path / "set")
    for shard in manifest["shards"]:
        for name, facts in shard["files"].items():
            assert sha256_file(tmp_path / "set" / name) == facts["sha256"]
    with tarfile.open(tmp_path / "set" / "train-00001.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        "0001_dog_wolf/00000004.png", "0002_Haher/00000005.png", "0000_cat/00000006.png", "0001_dog_wolf/00000007.png"
    ]  # fmt: skip
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    with Image.open(tmp_path / "set" / "grids" / "0000_cat.png") as grid:
        assert grid.height > 64
        assert grid.width > 4 * 64


def test_two_writes_of_the_same_images_are_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


# timm leaves the files that it opens to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_timm_opens_a_shard_and_the_folder_of_shards(tmp_path: Path) -> None:
    images, labels, _ = make(tmp_path / "set")

    def check(opened: ImageDataset, expected: range) -> None:
        assert len(opened) == len(expected)
        for position in range(len(opened)):
            picture, label = opened[position]
            number = int(Path(opened.filename(position)).stem)
            assert number in expected
            assert np.array_equal(np.array(picture).transpose(2, 0, 1), images[number].numpy())
            assert label == labels[number]

    check(create_dataset("", root=str(tmp_path / "set" / "train-00000.tar")), range(4))
    check(ImageDataset(str(tmp_path / "set"), reader=ReaderImageInTar(str(tmp_path / "set"))), range(10))
    # The last shard lacks class 2: with the class map the numbers are right all the same.
    classes = str(tmp_path / "set" / "classes.txt")
    check(create_dataset("", root=str(tmp_path / "set" / "train-00002.tar"), class_map=classes), range(8, 10))


def test_add_checks_what_it_is_given(tmp_path: Path) -> None:
    images, labels, logits = batch(4)
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        with pytest.raises(ValueError, match="must be uint8"):
            writer.add(images.float(), labels, logits)
        with pytest.raises(ValueError, match="do not fit"):
            writer.add(images, labels, logits[:, :2])
        with pytest.raises(ValueError, match=r"in 0\.\.2"):
            writer.add(images, labels + 1, logits)


# Going on


def test_a_run_that_stops_anywhere_goes_on_to_the_same_set(tmp_path: Path) -> None:
    """Batches of 3, shards of 4: the images between shards travel with the state."""
    batches = [batch(3, seed=seed) for seed in range(5)]

    def run(path: Path, *, start: int, stop: int, resume: bool) -> None:
        open_writer = DatasetWriter.resume if resume else DatasetWriter
        with open_writer(path, **arguments()) as writer:
            if resume:
                assert writer.state is not None
                assert writer.state.values == {"batches": start}
                assert torch.equal(writer.state.tensors["z"], torch.full((2,), float(start)))
                assert writer.num_images == 3 * start
            for index in range(start, stop):
                writer.add(*batches[index])
                if writer.full:
                    writer.flush_shard(state=({"z": torch.full((2,), index + 1.0)}, {"batches": index + 1}))
            if stop == len(batches):
                writer.close()

    run(tmp_path / "whole", start=0, stop=5, resume=False)
    run(tmp_path / "parts", start=0, stop=3, resume=False)  # two shards of 4 want 9 images: batch 3 flushed the second
    assert (tmp_path / "parts" / "state").is_dir()
    run(tmp_path / "parts", start=3, stop=5, resume=True)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "parts")


def test_a_closed_set_with_its_state_can_grow(tmp_path: Path) -> None:
    first, second = batch(6), batch(6, seed=1)
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*first)
        writer.close(state=({}, {"next": 1}), summary={"seconds": 1.5})
    assert load_manifest(tmp_path / "set")["summary"] == {"seconds": 1.5}
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as writer:
        assert writer.complete
        assert writer.state is not None
        assert writer.state.values == {"next": 1}
        assert (writer.num_images, writer.num_written) == (6, 6)
        writer.add(*second)
        assert not writer.complete
        writer.close()
    assert torch.equal(read_dataset(tmp_path / "set").images, torch.cat([first[0], second[0]]))


def test_resume_begins_a_set_where_there_is_none(tmp_path: Path) -> None:
    with DatasetWriter.resume(tmp_path / "new" / "set", **arguments()) as writer:
        assert (writer.state, writer.num_images) == (None, 0)
        writer.add(*batch(4))
        writer.close()
    assert len(read_dataset(tmp_path / "new" / "set")) == 4


def test_a_failure_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "a" / "set", **arguments())
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert listing(tmp_path) == []
    assert not (tmp_path / "a").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, when: Callable[[Any], bool]) -> None:
    """Make ``os.NAME`` (or the writer's own function) fail where ``when`` its last argument says so."""
    owner: Any = dataset_writer if hasattr(dataset_writer, name) else os
    original = getattr(owner, name)

    def failing(*values: Any) -> Any:
        if when(values[0]):
            raise error
        return original(*values)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("where", ["write_json", "replace"])
def test_an_interrupted_shard_is_dropped_or_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    first, second = batch(4), batch(4, seed=1)
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*first)
        writer.flush_shard(state=({}, {"done": 1}))
    writer = DatasetWriter.resume(tmp_path / "set", **arguments())
    writer.add(*second)
    with monkeypatch.context() as patch:
        # Before the manifest the shard does not exist; after it, before the rename, it does.
        interrupt(
            patch, where, KeyboardInterrupt(), lambda path: str(path).endswith(("manifest.json", "1.tar.partial"))
        )
        with pytest.raises(KeyboardInterrupt):
            writer.flush_shard(state=({}, {"done": 2}))
            writer.wait()
    # Nothing is tidied up here, as after a kill: the temporary names are still there.
    assert any(name.endswith(".partial") for name in listing(tmp_path / "set"))
    writer.release()
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as writer:
        assert writer.state is not None
        done = 1 if where == "write_json" else 2
        assert (writer.state.values, writer.num_written) == ({"done": done}, 4 * done)
    assert not any(".partial" in name for name in listing(tmp_path / "set"))
    expected = first[0] if done == 1 else torch.cat([first[0], second[0]])
    assert torch.equal(read_dataset(tmp_path / "set").images, expected)


def test_leaving_after_an_interrupted_rename_keeps_what_the_manifest_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = DatasetWriter(tmp_path / "set", **arguments())
    writer.add(*batch(4))
    with monkeypatch.context() as patch:
        interrupt(patch, "replace", KeyboardInterrupt(), lambda path: str(path).endswith(".tar.partial"))
        with pytest.raises(KeyboardInterrupt), writer:
            writer.flush_shard(state=({}, {}))
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as writer:
        assert writer.num_written == 4
    assert len(read_dataset(tmp_path / "set")) == 4


def test_a_full_disk_is_one_line_and_keeps_the_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = DatasetWriter(tmp_path / "set", **arguments())
    writer.add(*batch(4))
    writer.flush_shard()
    writer.wait()
    writer.add(*batch(4, seed=1))
    with monkeypatch.context() as patch:
        interrupt(patch, "_png", OSError(errno.ENOSPC, "No space left on device"), lambda image: True)
        with pytest.raises(FastDFKDError, match=r"Cannot write .*set: No space left"), writer:
            writer.flush_shard()
    assert len(read_dataset(tmp_path / "set")) == 4
    assert not any(".partial" in name for name in listing(tmp_path / "set"))


def test_a_disk_that_is_full_before_the_first_shard_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = FastDFKDError("Cannot write: No space left on device")
    with (
        pytest.raises(FastDFKDError, match="No space left"),
        DatasetWriter(tmp_path / "set", **arguments()) as writer,
    ):
        interrupt(monkeypatch, "write_bytes", full, lambda path: path.parent.name == "state")
        writer.add(*batch(4))
        writer.flush_shard(state=({}, {"done": 1}))
    assert list(tmp_path.iterdir()) == []


# Beside the computation


class SlowDisk:
    """Every image waits for the gate; a test that forgets to open it fails within seconds."""

    def __init__(self) -> None:
        self.busy, self.gate = threading.Event(), threading.Event()
        self._png = dataset_writer._png

    def png(self, image: Any) -> bytes:
        self.busy.set()
        assert self.gate.wait(20), "the caller waited for the disk"
        return self._png(image)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk()
    monkeypatch.setattr(dataset_writer, "_png", disk.png)
    yield disk
    disk.gate.set()


def writing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastdfkd-writer")]


def no_thread_is_left() -> bool:
    for thread in writing_threads():
        thread.join(10)
    return not writing_threads()


def test_what_is_flushed_is_written_as_it_was_while_the_caller_goes_on(tmp_path: Path, slow_disk: SlowDisk) -> None:
    images, labels, logits = batch(6)
    state, values = torch.tensor([1.0, 2.0]), {"done": [1]}
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        mine = [part.clone() for part in (images, labels, logits)]
        writer.add(*mine)
        writer.flush_shard(state=({"z": state}, values))
        assert slow_disk.busy.wait(20)
        for part in (*mine, state):  # an engine steps in place
            part.zero_()
        values["done"].append(2)
        writer.add(*batch(1, seed=1))
        assert (writer.num_images, writer.num_buffered, writer.num_written) == (7, 3, 0)
        assert not writer.full
        slow_disk.gate.set()
        writer.wait()
        assert (writer.num_images, writer.num_buffered, writer.num_written) == (7, 3, 4)
    found = read_dataset(tmp_path / "set")
    assert torch.equal(found.images, images[:4])
    assert torch.equal(found.labels, labels[:4])
    assert found.logits is not None
    assert torch.equal(found.logits, logits[:4])
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as writer:
        assert writer.state is not None
        assert (writer.state.tensors["z"].tolist(), writer.state.values) == ([1.0, 2.0], {"done": [1]})
        assert (writer.num_images, writer.num_buffered) == (6, 2)
        writer.close()
    assert torch.equal(read_dataset(tmp_path / "set").images, images)


def test_a_caller_faster_than_the_disk_waits_with_one_shard_in_its_hands(
    tmp_path: Path, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, threads = Background.wait, []

    def waits(self: Background) -> None:
        threads.append(len(writing_threads()))
        slow_disk.gate.set()
        wait(self)

    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*batch(4))
        writer.flush_shard()
        assert slow_disk.busy.wait(20)
        writer.add(*batch(4, seed=1))
        monkeypatch.setattr(Background, "wait", waits)
        writer.flush_shard()
        assert threads[0] == 1
        assert writer.num_written >= 4
        writer.close()
    expected = torch.cat([batch(4, seed=seed)[0] for seed in range(2)])
    assert torch.equal(read_dataset(tmp_path / "set").images, expected)
    assert no_thread_is_left()


@pytest.fixture
def slow_until_left(slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """A disk that goes on when the caller has stopped and waits for it."""
    failure = Background.failure

    def waits(self: Background) -> BaseException | None:
        slow_disk.gate.set()
        return failure(self)

    monkeypatch.setattr(Background, "failure", waits)
    return slow_disk


def test_an_interruption_finishes_the_shard_that_is_being_written(tmp_path: Path, slow_until_left: SlowDisk) -> None:
    first, second = batch(4), batch(3, seed=1)
    writer = DatasetWriter(tmp_path / "set", **arguments())
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add(*first)
        writer.flush_shard(state=({}, {"done": 1}))
        writer.add(*second)
        assert slow_until_left.busy.wait(20)
        raise KeyboardInterrupt
    assert no_thread_is_left()
    assert not any(".partial" in name for name in listing(tmp_path / "set"))
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as writer:
        assert writer.state is not None
        assert (writer.state.values, writer.num_images) == ({"done": 1}, 4)
    assert torch.equal(read_dataset(tmp_path / "set").images, first[0])


@pytest.mark.parametrize("begun", [False, True])
def test_an_interruption_while_the_thread_starts_leaves_a_whole_shard_or_nothing(
    tmp_path: Path, slow_until_left: SlowDisk, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    start = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if begun:
            start(self)
            assert slow_until_left.busy.wait(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*batch(4))
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        writer.flush_shard()
    assert no_thread_is_left()
    assert (tmp_path / "set").exists() == begun
    if begun:
        assert len(read_dataset(tmp_path / "set")) == 4


def test_the_folder_stays_locked_while_anything_is_written_to_it(
    tmp_path: Path, slow_disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(self: Background) -> None:
        raise KeyboardInterrupt  # Ctrl-C again, as Python's own handler raises it in somebody's session

    writer = DatasetWriter(tmp_path / "set", **arguments())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), writer:
        writer.add(*batch(4))
        writer.flush_shard(state=({}, {}))
        assert slow_disk.busy.wait(20)
        patch.setattr(Background, "failure", impatient)
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="Another run"):
        DatasetWriter.resume(tmp_path / "set", **arguments())
    slow_disk.gate.set()
    assert no_thread_is_left()
    with DatasetWriter.resume(tmp_path / "set", **arguments()) as again:
        assert again.num_written == 4


@pytest.mark.parametrize("then", ["add", "flush_shard", "close", "leave"])
def test_a_failure_in_the_background_ends_the_run_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*batch(4))
        writer.flush_shard(state=({}, {"done": 1}))
    before = snapshot(tmp_path / "set")
    writer = DatasetWriter.resume(tmp_path / "set", **arguments())
    calls: dict[str, Callable[[], Any]] = {
        "add": lambda: writer.add(*batch(1)),
        "flush_shard": lambda: writer.flush_shard(state=({}, {"done": 3})),
        "close": writer.close,
        "leave": lambda: None,
    }
    with monkeypatch.context() as patch:
        interrupt(patch, "_png", OSError(errno.ENOSPC, "No space left on device"), lambda image: True)
        with pytest.raises(FastDFKDError, match=r"Cannot write .*set: No space left"), writer:
            writer.add(*batch(4, seed=1))
            writer.flush_shard(state=({}, {"done": 2}))
            assert no_thread_is_left()
            patch.undo()  # there is room again: going on would leave a hole where the failed shard was
            if then != "leave":
                with pytest.raises(FastDFKDError, match="No space left"):
                    calls[then]()
            calls[then]()
    assert snapshot(tmp_path / "set") == before


def test_a_shard_that_the_caller_refuses_is_not_written(tmp_path: Path) -> None:
    def broken() -> None:
        raise FastDFKDError("not a number")

    writer = DatasetWriter(tmp_path / "set", **arguments())
    with pytest.raises(FastDFKDError, match="not a number"), writer:
        writer.add(*batch(6))
        writer.flush_shard(state=({}, {}), check=broken)
        writer.close()
    assert not (tmp_path / "set").exists()


def test_copies_for_the_thread_are_waited_for_and_in_one_piece() -> None:
    class Arrival:
        def __init__(self) -> None:
            self.waits = 0

        def synchronize(self) -> None:
            self.waits += 1

    source = torch.rand(5, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    (copy,) = HostCopy.of(source).wait()
    assert torch.equal(copy, source)
    assert copy.is_contiguous()
    assert copy.data_ptr() != source.data_ptr()
    arrival: Any = Arrival()
    cut = HostCopy([source], arrival).behind(2)
    assert (len(cut), arrival.waits) == (3, 0)
    assert torch.equal(cut.wait()[0], source[2:])
    assert arrival.waits == 1


def test_resume_refuses_other_settings_and_names_them(tmp_path: Path) -> None:
    make(tmp_path / "set")
    header = {"config": {"seed": 1, "synthesis": {"steps": 5}, "method": "fast"}, "teacher": "tiny"}
    with pytest.raises(UsageError) as caught:
        DatasetWriter.resume(tmp_path / "set", **arguments(header=header, shard_size=8))
    message = str(caught.value)
    assert "config.seed (there 0, now 1)" in message
    assert 'config.method (there not set, now "fast")' in message
    assert "shard_size (there 4, now 8)" in message
    assert "steps" not in message
    before = snapshot(tmp_path / "set")
    with DatasetWriter.resume(tmp_path / "set", **arguments()):
        pass
    assert snapshot(tmp_path / "set") == before


@pytest.mark.parametrize("name", ["notes.txt", "train-00007.tar", "grids/mine.png", "train-00000.tar/../x.png"])
def test_resume_refuses_files_the_manifest_does_not_know(tmp_path: Path, name: str) -> None:
    make(tmp_path / "set")
    strange = Path(os.path.normpath(tmp_path / "set" / name))
    strange.write_text("mine")
    with pytest.raises(UsageError, match=rf"does not know \(.*{strange.name}\)"):
        DatasetWriter.resume(tmp_path / "set", **arguments())
    assert strange.read_text() == "mine"
    strange.unlink()
    (tmp_path / "set" / ".DS_Store").write_text("litter")
    (tmp_path / "set" / "_set_tarinfos.pickle").write_text("timm's cache, stale once the set grows")
    with DatasetWriter.resume(tmp_path / "set", **arguments()):
        pass
    assert not (tmp_path / "set" / "_set_tarinfos.pickle").exists()


def test_resume_refuses_a_folder_that_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="no set to go on with"):
        DatasetWriter.resume(tmp_path / "photos", **arguments())
    with pytest.raises(UsageError, match="is not empty"):
        DatasetWriter(tmp_path / "photos", **arguments())
    with pytest.raises(UsageError, match="not written by fastdfkd"):
        DatasetWriter(tmp_path / "photos", **arguments(), overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        DatasetWriter(tmp_path / "file", **arguments())
    assert listing(tmp_path) == ["file", "photos/README.md"]


def test_resume_notices_a_damaged_shard_or_state(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", **arguments()) as writer:
        writer.add(*batch(5))
        writer.flush_shard(state=({}, {"done": 1}))
    state = next((tmp_path / "set" / "state").glob("*.json"))
    content = state.read_bytes()
    state.write_bytes(content.replace(b"1", b"2"))
    with pytest.raises(UnavailableError, match="is damaged"):
        DatasetWriter.resume(tmp_path / "set", **arguments())
    state.write_bytes(content)
    (tmp_path / "set" / "train-00000.safetensors").unlink()
    with pytest.raises(UnavailableError, match=r"train-00000.safetensors is missing"):
        DatasetWriter.resume(tmp_path / "set", **arguments())


def test_an_existing_set_needs_resume_or_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "set")
    with pytest.raises(UsageError, match="--resume"):
        DatasetWriter(tmp_path / "set", **arguments())
    before = snapshot(tmp_path / "set")
    writer = DatasetWriter(tmp_path / "set", **arguments(shard_size=5), overwrite=True)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.add(*batch(2, seed=7))
        raise KeyboardInterrupt
    assert snapshot(tmp_path / "set") == before
    writer = DatasetWriter(tmp_path / "set", **arguments(shard_size=5), overwrite=True)
    writer.add(*batch(5, seed=7))
    with monkeypatch.context() as patch:
        interrupt(patch, "_png", OSError(errno.ENOSPC, "No space left on device"), lambda image: True)
        with pytest.raises(FastDFKDError, match="No space left"), writer:
            writer.flush_shard()
    assert snapshot(tmp_path / "set") == before
    new = batch(5, seed=8)
    with DatasetWriter(tmp_path / "set", **arguments(shard_size=5), overwrite=True) as writer:
        writer.add(*new)
        writer.close()
    assert torch.equal(read_dataset(tmp_path / "set").images, new[0])
    assert "train-00001.tar" not in listing(tmp_path / "set")
    (tmp_path / "set" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="thesis.txt"):
        DatasetWriter(tmp_path / "set", **arguments(), overwrite=True)


def test_a_set_may_be_replaced_by_a_run_and_the_other_way_round(tmp_path: Path) -> None:
    make(tmp_path / "set")
    with StagedDirectory(tmp_path / "set", overwrite=True) as staging:
        (staging / "report.json").write_text('{"fastdfkd": "1"}')
    assert listing(tmp_path / "set") == ["report.json"]
    with DatasetWriter(tmp_path / "set", **arguments(), overwrite=True) as writer:
        writer.add(*batch(4))
        writer.close()
    assert "report.json" not in listing(tmp_path / "set")


def test_two_runs_cannot_write_one_set(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", **arguments())
    with pytest.raises(UsageError, match="Another run"):
        DatasetWriter.resume(tmp_path / "set", **arguments())
    writer.release()
    DatasetWriter.resume(tmp_path / "set", **arguments()).release()


# Reading what is damaged


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-700])
    elif how == "longer":
        path.write_bytes(content + b"x")
    else:
        path.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("truncated", r"is truncated: [\d,]+ of [\d,]+ bytes"),
        ("longer", "is not what was written"),
        ("flipped", "is damaged: its bytes"),
    ],
)
def test_a_damaged_shard_is_told_apart(tmp_path: Path, how: str, message: str) -> None:
    make(tmp_path / "set")
    damage(tmp_path / "set" / "train-00001.tar", how)
    with pytest.raises(UnavailableError, match=f"train-00001.tar {message}") as caught:
        read_dataset(tmp_path / "set")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "not written by fastdfkd"),
        (lambda m: m.update(format_version=99), "format version 99"),
        (lambda m: m.update(input_size=[9, 6, 5]), "input_size"),
        (lambda m: m.update(counts=[1, 2, 3]), "do not add up"),
        (lambda m: m.update(classes=["a"]), "do not fit num_classes"),
        (lambda m: m.pop("shards"), "shards is not a list"),
        (lambda m: m["shards"][0]["files"].update({"../../x.tar": {}}), "lacks its images or files"),
        (lambda m: m["shards"][0].update(files={"train-00000.tar": {"bytes": 1, "sha256": "x"}}), "lacks its images"),
        (lambda m: m.update(state={"/etc/passwd": {"bytes": 1, "sha256": ""}}), "state names something else"),
        (lambda m: m.pop("state"), "state names something else"),
        (lambda m: m.pop("header"), "header or complete"),
        (lambda m: m.update(complete="yes"), "header or complete"),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    make(tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnavailableError, match=message):
        read_dataset(tmp_path / "set")
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UnavailableError, match="cannot be read"):
            read_dataset(tmp_path / "set")


def forge(path: Path, members: list[tuple[str, bytes | None]]) -> None:
    """Replace the first shard's tar (None: a link) and make the manifest agree."""
    tar_path = path / "train-00000.tar"
    with tarfile.open(tar_path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    manifest = json.loads((path / "manifest.json").read_text())
    facts = manifest["shards"][0]["files"]["train-00000.tar"]
    facts.update(bytes=tar_path.stat().st_size, sha256=sha256_file(tar_path))
    (path / "manifest.json").write_text(json.dumps(manifest))


def png(size: tuple[int, int] = (5, 6), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil.png", png())], "another class than its label 0"),
        ([("/etc/evil.png", png())], "another class than its label 0"),
        ([("0000_cat/link.png", None)], "is a link or a device"),
        ([("0000_cat/run.sh", b"#!")], "holds 0 images, and its manifest says 4"),
        ([("0000_cat/0.png", b"no png")], "cannot be decoded"),
        ([("0000_cat/0.png", png()[:45])], "cannot be decoded"),
        ([("0000_cat/0.png", png((500, 6)))], "not what the manifest states"),
        ([("0000_cat/0.png", png(mode="L"))], "not what the manifest states"),
        ([("0001_dog_wolf/0.png", png())], "another class than its label 0"),
        ([("0000_cat/0.png", png())], "holds 1 images, and its manifest says 4"),
        (
            [(f"{name}/{i}.png", png()) for i, name in enumerate(class_folders(3, NAMES) * 2)],
            "holds 6 images, and its manifest says 4",
        ),
    ],
)
def test_a_tar_that_only_looks_right_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes | None]], message: str
) -> None:
    make(tmp_path / "set", count=4)
    forge(tmp_path / "set", members)
    with pytest.raises(UnavailableError, match=message):
        read_dataset(tmp_path / "set")


def test_logits_of_another_shape_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "set", count=4)
    path = tmp_path / "set" / "train-00000.safetensors"
    safetensors.torch.save_file({"labels": torch.zeros(4, dtype=torch.int64), "logits": torch.zeros(4, 2)}, path)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["shards"][0]["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnavailableError, match=r"does not hold labels \[4\] and logits \[4, 3\]"):
        read_dataset(tmp_path / "set")


def test_another_size_drops_the_logits_and_other_channels_are_refused(tmp_path: Path) -> None:
    images, _, _ = make(tmp_path / "set", count=4)
    found = read_dataset(tmp_path / "set", input_size=(3, 12, 10), interpolation="nearest")
    assert found.logits is None
    assert torch.equal(found.images[:, :, ::2, ::2], images)
    with pytest.raises(UsageError, match="3 channels, and 1 are needed"):
        read_dataset(tmp_path / "set", input_size=(1, 6, 5))


def test_a_set_without_images_yet_is_refused(tmp_path: Path) -> None:
    DatasetWriter(tmp_path / "set", **arguments()).release()
    with pytest.raises(UnavailableError, match="no images yet"):
        read_dataset(tmp_path / "set")


# Plain images


# timm leaves the files that it opens to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_folder_of_class_folders_is_read_as_timm_numbers_it(tmp_path: Path) -> None:
    for index, name in enumerate(("class10", "class9")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 4), (index * 100, 0, 0)).save(tmp_path / "data" / name / "a.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (3, 3), 255).save(tmp_path / "elsewhere" / "b.JPG")
    (tmp_path / "data" / "class9" / "notes.txt").write_text("no image")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    found = read_dataset(tmp_path / "data", input_size=(3, 4, 4))
    opened = create_dataset("", root=str(tmp_path / "data"))
    assert found.images.shape == (3, 3, 4, 4)
    assert found.class_folders == ("class9", "class10", "linked")
    assert found.labels.tolist() == [opened[position][1] for position in range(3)]
    assert found.images[:, 0].float().mean((1, 2)).round().tolist() == [100.0, 0.0, 255.0]
    assert (found.logits, found.manifest) == (None, None)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_plain_images_take_the_channels_asked_for(tmp_path: Path, channels: int) -> None:
    Image.new("RGB", (4, 4), (10, 10, 10)).save(tmp_path / "a.png")
    found = read_dataset(tmp_path, input_size=(channels, 4, 4))
    assert found.images.shape == (1, channels, 4, 4)
    assert found.images[0, 0].unique().tolist() == [10]
    assert found.labels.tolist() == [-1]


def test_a_shard_alone_and_shards_without_their_manifest_are_plain_images(tmp_path: Path) -> None:
    images, labels, _ = make(tmp_path / "set")
    last = read_dataset(tmp_path / "set" / "train-00002.tar", input_size=(3, 6, 5))
    assert torch.equal(last.images, images[8:])
    assert torch.equal(last.labels, labels[8:])  # class 1 is missing here: classes.txt beside it tells
    (tmp_path / "set" / "manifest.json").unlink()
    found = read_dataset(tmp_path / "set", input_size=(3, 6, 5))
    assert torch.equal(found.images, images)  # and not the pictures in grids/
    assert torch.equal(found.labels, labels)


def test_plain_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    size = (3, 4, 4)
    with pytest.raises(UnavailableError, match="does not exist"):
        read_dataset(tmp_path / "none", input_size=size)
    with pytest.raises(UnavailableError, match="holds no images"):
        read_dataset(tmp_path, input_size=size)
    with pytest.raises(UsageError, match="input size must be given"):
        read_dataset(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="neither a folder nor"):
        read_dataset(tmp_path / "a.txt", input_size=size)
    (tmp_path / "a.tar").write_text("no tar")
    with pytest.raises(UnavailableError, match=r"a.tar cannot be read as an uncompressed tar"):
        read_dataset(tmp_path / "a.tar", input_size=size)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "broken.png").write_bytes(png()[:40])
    with pytest.raises(UnavailableError, match=r"broken.png cannot be decoded"):
        read_dataset(folder, input_size=size)
    (folder / "broken.png").unlink()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(folder / "deep.png")
    with pytest.raises(UnavailableError, match=r"deep.png has more than 8 bits"):
        read_dataset(folder, input_size=size)


@pytest.mark.parametrize("size", [(3, 10**6, 10**6), (3, 2**40, 2**40)])
def test_images_that_no_memory_holds_are_refused_before_they_are_read(
    tmp_path: Path, size: tuple[int, int, int]
) -> None:
    make(tmp_path / "set", count=4)
    path = tmp_path / "set" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "input_size": size}))
    with pytest.raises(FastDFKDError, match="GiB of memory for 4 images of 3x.*, more than there is"):
        read_dataset(tmp_path / "set")
    with pytest.raises(FastDFKDError, match="GiB of memory for 4 images"):
        read_dataset(tmp_path / "set" / "train-00000.tar", input_size=size)


def test_more_images_than_there_are_labels_are_not_made_room_for(tmp_path: Path) -> None:
    make(tmp_path / "set", count=4)
    path = tmp_path / "set" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["images"] = manifest["counts"][0] = 2**24
    manifest["counts"][1:] = [0] * (len(manifest["counts"]) - 1)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnavailableError, match=r"does not hold labels \[16777216\]"):
        read_dataset(tmp_path / "set")


def test_a_class_list_that_is_no_text_does_not_count(tmp_path: Path) -> None:
    make(tmp_path / "set", count=4)
    (tmp_path / "set" / "classes.txt").write_bytes(b"\xff\xfe")
    data = read_dataset(tmp_path / "set" / "train-00000.tar", input_size=(3, 6, 5))
    assert data.class_folders == class_folders(3, NAMES)


@pytest.mark.parametrize("name", ["grids", "state"])
def test_a_link_in_a_set_is_not_written_through(tmp_path: Path, name: str) -> None:
    make(tmp_path / "set", count=4)
    for path in (tmp_path / "set" / name).glob("*"):
        path.unlink()
    if (tmp_path / "set" / name).exists():
        (tmp_path / "set" / name).rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set" / name).symlink_to("../elsewhere")
    with pytest.raises(UsageError, match=name):
        DatasetWriter(tmp_path / "set", **arguments(), overwrite=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def begun(path: Path) -> None:
    """A set of one shard, with images that wait and a state to go on from."""
    with DatasetWriter(path, **arguments()) as writer:
        writer.add(*batch(6))
        writer.flush_shard(state=({"z": torch.zeros(2)}, {"k": 1}))
        writer.wait()


def restate(path: Path, suffix: str, content: bytes) -> None:
    """Another state, with which the manifest agrees."""
    manifest = json.loads((path / "manifest.json").read_text())
    name = next(name for name in manifest["state"] if name.endswith(suffix))
    (path / name).write_bytes(content)
    manifest["state"][name] = {"bytes": len(content), "sha256": sha256_file(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".json", b"{"),
        (".json", b"[" * 100_000),
        (".json", b"\xff"),
        (".json", b"[1]"),
        (".safetensors", b"no tensors"),
        (".safetensors", safetensors.torch.save({"pending.images": torch.zeros(2, 3, 6, 5, dtype=torch.uint8)})),
        (
            ".safetensors",
            safetensors.torch.save(
                {
                    "pending.images": torch.zeros(2, 3, 6, 5, dtype=torch.uint8),
                    "pending.labels": torch.tensor([0, 3]),
                    "pending.logits": torch.zeros(2, 3),
                }
            ),
        ),
    ],
)
def test_a_state_that_says_anything_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    begun(tmp_path / "set")
    restate(tmp_path / "set", suffix, content)
    with pytest.raises(UnavailableError, match=r"state.*(cannot be read|is damaged)"):
        DatasetWriter.resume(tmp_path / "set", **arguments())


@pytest.mark.parametrize("name", ["grids", "state"])
def test_a_set_with_a_link_in_it_is_not_gone_on_with(tmp_path: Path, name: str) -> None:
    begun(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    if (tmp_path / "set" / name).exists():
        (tmp_path / "set" / name).rename(tmp_path / "elsewhere" / name)
    (tmp_path / "set" / name).symlink_to(f"../elsewhere/{name}")
    with pytest.raises(UsageError, match=f"files that its manifest does not know .*{name}"):
        DatasetWriter.resume(tmp_path / "set", **arguments())


def test_a_link_where_a_shard_is_written_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "set", count=4)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "set" / ".train-00000.tar.partial").symlink_to("../precious")
    with DatasetWriter(tmp_path / "set", **arguments(), overwrite=True) as writer:
        writer.add(*batch(4))
        writer.close()
    assert (tmp_path / "precious").read_text() == "mine"
    assert len(read_dataset(tmp_path / "set")) == 4


def test_pictures_of_a_set_are_made_of_its_own_images_only(tmp_path: Path) -> None:
    begun(tmp_path / "set")
    forge(tmp_path / "set", [(f"{name}/{i}.png", png(mode="L")) for i, name in enumerate(class_folders(3, NAMES))])
    writer = DatasetWriter.resume(tmp_path / "set", **arguments())
    writer.add(*batch(2))
    with pytest.raises(UnavailableError, match="is L 5x6, not what the manifest states"), writer:
        writer.close()


def test_a_state_at_the_same_position_never_writes_over_the_one_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: dict[str, Any] = {
        "class_names": None, "num_classes": 2, "input_size": (3, 4, 4), "shard_size": 5, "header": {}
    }  # fmt: skip

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    with DatasetWriter(tmp_path / "set", **facts) as writer:
        for value in range(3):
            writer.flush_shard(state=({"x": torch.tensor([value])}, {}))
        writer.wait()
        monkeypatch.setattr(writer, "_write_manifest", killed)  # as if killed before the manifest is replaced
        monkeypatch.setattr(writer, "_give_up", lambda: None)
        writer.flush_shard(state=({"x": torch.tensor([3])}, {}))
        with pytest.raises(Killed):
            writer.wait()
        writer._background = type(writer._background)()
    monkeypatch.undo()
    with DatasetWriter.resume(tmp_path / "set", **facts) as again:
        assert again.state is not None
        assert again.state.tensors["x"].item() == 2
    assert len(list((tmp_path / "set" / "state").iterdir())) == 2
