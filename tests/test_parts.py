"""One set by several jobs: each makes its part, the last puts all together, and a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdfkd_cli import api, plan_synthesize, set_maker, synthesize
from fastdfkd_cli.api import SynthesizeResult
from fastdfkd_cli.dataset import DatasetWriter, load_manifest, read_dataset
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.output import files_below, lock_folder, unlock_folder
from fastdfkd_cli.processes import Group, Part
from fastdfkd_cli.settings import parse_part
from tiny import SIZE, config, net

TOTAL = 11


def make(output: Path, part: Part | None = None, *, said: list[str] | None = None, **changes: Any) -> SynthesizeResult:
    call: dict[str, Any] = {
        "num_images": TOTAL,
        "output": output,
        "teacher_options": ModelOptions(input_size=SIZE),
        "config": config(schedule__warmup_rounds=1),
        "shard_size": 3,
        "device": "cpu",
        "amp": False,
        "part": part,
        "on_message": said.append if said is not None else None,
        **changes,
    }
    return synthesize(net(), **call)


def shards(output: Path) -> list[tuple[str, str]]:
    manifest = load_manifest(output)
    return [(name, facts["sha256"]) for shard in manifest["shards"] for name, facts in shard["files"].items()]


@pytest.fixture(scope="module")
def united(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set made in three parts."""
    output = tmp_path_factory.mktemp("parts") / "set"
    for number in (1, 2, 3):
        make(output, Part(number, 3))
    return output


# Dividing


@pytest.mark.parametrize(("total", "count"), [(11, 3), (3, 3), (8, 1), (50_000, 7)])
def test_parts_cover_everything_once_and_differ_by_one_at_most(total: int, count: int) -> None:
    ranges = [Part(number + 1, count).range(total) for number in range(count)]
    assert [image for part in ranges for image in part] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_each_part_draws_numbers_of_its_own() -> None:
    seeds = [Part(number, count).seed(seed) for count in (2, 3) for number in range(1, count + 1) for seed in (0, 1)]
    # Part k is seeded alike whatever the count, as processes are: the count is in the header.
    assert len(set(seeds)) == 6
    assert Part(1, 1).seed(7) == 7


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2", "", "١/٢"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--part must be"):
        parse_part(text)


def test_a_part_as_it_is_written() -> None:
    assert parse_part("2/8") == Part(2, 8)
    assert parse_part(None) is None
    assert str(Part(2, 8)) == "2/8"


# A whole set


def test_the_parts_make_one_set_that_looks_like_any_other(united: Path) -> None:
    manifest = load_manifest(united)
    assert manifest["complete"]
    assert manifest["state"] is None
    assert manifest["num_images"] == sum(manifest["counts"]) == TOTAL
    assert manifest["header"]["parts"] == {"count": 3, "images": TOTAL}
    assert "part" not in manifest["header"]
    assert len(manifest["summary"]["parts"]) == 3
    found = read_dataset(united)
    assert len(found) == TOTAL
    assert found.logits is not None
    # What a set of one piece has, and nothing of the parts.
    names = set(files_below(united))
    grids = {name for name in names if name.startswith("grids/")}
    assert len(grids) == sum(count > 0 for count in manifest["counts"])
    assert names - grids == {"manifest.json", "classes.txt", *(name for name, _ in shards(united))}
    firsts = [(shard["first"], shard["images"]) for shard in manifest["shards"]]
    assert firsts == [(0, 3), (3, 3), (6, 1), (7, 3), (10, 1)]  # in order, without a gap: 3, 4 and 4 images


def test_each_part_has_images_of_its_own(united: Path) -> None:
    images = read_dataset(united).images.flatten(1).float()
    distances = torch.cdist(images, images).fill_diagonal_(torch.inf)
    assert float(distances.min()) > 1.0


def test_the_order_of_the_jobs_does_not_matter(united: Path, tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "set"
    first = make(output, Part(3, 3), said=said)
    assert first.path == output / "part-00003-of-00003"
    assert first.manifest["num_images"] == 4
    assert said[-1] == "not complete yet: parts 1, 2; the last puts all together"
    assert read_dataset(first.path).images.shape[0] == 4  # a part is a set of its own
    make(output, Part(1, 3))
    last = make(output, Part(2, 3))
    assert last.path == output
    assert last.manifest == load_manifest(output)
    assert shards(output) == shards(united)


def test_two_jobs_that_end_at_once_put_it_together_once(united: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    make(output, Part(1, 3))
    make(output, Part(2, 3))
    lock = lock_folder(output)  # somebody else is putting it together
    assert lock is not None
    ends: list[SynthesizeResult] = []
    job = threading.Thread(target=lambda: ends.append(make(output, Part(3, 3))))
    job.start()
    job.join(timeout=3)
    assert job.is_alive()
    assert not (output / "manifest.json").exists()
    unlock_folder(lock)
    job.join(timeout=60)
    assert [end.path for end in ends] == [output]
    assert shards(output) == shards(united)


# Going on


def test_a_stopped_part_goes_on_alone(united: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "set"
    make(output, Part(1, 3))
    make(output, Part(3, 3))
    batches = 0
    original = FastMeta.synthesize

    def stop(self: FastMeta, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FastMeta, "synthesize", stop)
        with pytest.raises(KeyboardInterrupt):
            make(output, Part(2, 3), checkpoint_every=1e-9)
    assert load_manifest(output / "part-00002-of-00003")["state"] is not None
    with pytest.raises(UnavailableError, match="made in 3 parts, and some are not complete"):
        read_dataset(output)
    assert make(output, Part(2, 3), resume=True).path == output
    assert shards(output) == shards(united)


def test_one_process_goes_on_with_all_parts_that_several_began(united: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    make(output, Part(2, 3))
    said: list[str] = []
    assert make(output, resume=True, said=said).path == output
    assert "of 3 parts, this process makes 1, 2, 3" in said
    assert shards(output) == shards(united)


def test_each_of_several_processes_takes_every_so_manyth_part(tmp_path: Path) -> None:
    output = tmp_path / "set"
    second = Group(rank=1, world_size=2, local_rank=1, local_size=2)
    make(output, Part(1, 3))
    assert make(output, resume=True, group=second).path == output / "part-00002-of-00003"
    fourth = Group(rank=3, world_size=4, local_rank=3, local_size=4)
    said: list[str] = []
    make(output, resume=True, group=fourth, said=said)  # there are more processes than parts
    assert "of 3 parts, this process makes none" in said
    assert not (output / "part-00003-of-00003").exists()


def test_a_complete_set_is_left_as_it_is(united: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (united / name).stat().st_mtime_ns for name in files_below(united)}
    monkeypatch.setattr(FastMeta, "synthesize", lambda *_: pytest.fail("work was done"))
    for part in (None, Part(2, 3)):
        assert make(united, part, resume=True).manifest == load_manifest(united)
    assert {name: (united / name).stat().st_mtime_ns for name in files_below(united)} == before


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three complete parts that nobody has put together yet."""
    output = tmp_path_factory.mktemp("complete") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_maker, "unite", lambda *_, **__: None)
        patch.setattr(api, "unfinished", lambda *_: [1, 2, 3])
        for number in (1, 2, 3):
            make(output, Part(number, 3))
    return output


def test_a_kill_while_it_is_put_together_loses_nothing(
    united: Path, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before each renaming and each removal, one after the other."""
    left = 0

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return action(*arguments, **keywords)

        return act

    whole, cut = False, 0
    while not whole:
        output = tmp_path / str(cut)
        shutil.copytree(complete, output)
        left = cut
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                make(output, Part(3, 3), resume=True)
                whole = True
            except KeyboardInterrupt:
                pass
        again = make(output, Part(1 + cut % 3, 3), resume=True)
        assert again.path == output
        assert shards(output) == shards(united)
        assert set(files_below(output)) == set(files_below(united)), cut
        assert len(read_dataset(output)) == TOTAL
        cut += 1
    assert cut > 10 + 2 + 3  # shards, classes and manifest, and the three folders


# What cannot be


def test_a_part_with_other_settings_is_refused(complete: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    shutil.copytree(complete, output)
    before = sorted(files_below(output))
    with pytest.raises(
        UsageError, match=r"part-00001-of-00003 was made with other settings: config.seed \(there 0, now 1"
    ):
        make(output, Part(2, 3), resume=True, overrides={"seed": 1})
    with pytest.raises(UsageError, match=r"images_of_all \(there 11, now 12\)"):
        make(output, Part(2, 3), resume=True, num_images=12)
    assert sorted(files_below(output)) == before


def test_a_set_with_other_settings_is_refused(united: Path) -> None:
    with pytest.raises(UsageError, match=r"was made with other settings: config.seed \(there 0, now 1"):
        make(united, resume=True, overrides={"seed": 1})


def test_parts_of_another_count_or_size_are_refused(complete: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="made in 3 parts, not in 4"):
        make(complete, Part(4, 4))
    with pytest.raises(UsageError, match="2 images cannot be divided into 3 parts"):
        make(tmp_path / "set", Part(1, 3), num_images=2)
    assert list(tmp_path.iterdir()) == []


def test_parts_are_put_beside_nothing_else(united: Path, complete: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(UsageError, match="not empty \\(notes.txt\\)"):
            make(output, Part(1, 2), resume=resume)
    with pytest.raises(UsageError, match="holds a set, which parts do not replace"):
        make(united, Part(1, 3))
    with pytest.raises(UsageError, match="leave --overwrite out"):
        make(united, Part(1, 3), overwrite=True)
    with pytest.raises(UsageError, match="is not empty"):
        make(complete, Part(1, 3))  # that part is there: --resume
    with pytest.raises(UsageError, match="is a file"):
        make(output / "notes.txt", Part(1, 2))
    assert files_below(output) == ["notes.txt"]


def test_a_set_in_one_piece_and_one_in_parts_do_not_mix(complete: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        make(complete)
    output = tmp_path / "set"
    make(output)
    with pytest.raises(UsageError, match="parts"):
        make(output, Part(1, 2), resume=True)
    with pytest.raises(UsageError, match="leave --part out under torchrun"):
        make(output, Part(1, 2), group=Group(rank=0, world_size=2, local_rank=0, local_size=2))


def test_a_damaged_part_is_named(complete: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    shutil.copytree(complete, output)
    tar = output / "part-00002-of-00003" / "train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(UnavailableError, match="part-00002-of-00003/train-00000.tar is truncated"):
        make(output, resume=True)
    assert not (output / "train-00000.tar").exists()
    manifest = json.loads((output / "part-00001-of-00003" / "manifest.json").read_text())
    manifest["header"]["part"]["number"] = 2
    (output / "part-00001-of-00003" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"part.number \(there 2, now 1\)"):
        make(output, resume=True)


def test_somebodys_file_in_a_part_stays(complete: Path, united: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    shutil.copytree(complete, output)
    (output / "part-00002-of-00003" / "notes.txt").write_text("mine")
    assert make(output, resume=True).path == output
    assert shards(output) == shards(united)
    assert (output / "part-00002-of-00003" / "notes.txt").read_text() == "mine"


def test_a_plan_of_a_part(tmp_path: Path) -> None:
    call: dict[str, Any] = {
        "num_images": TOTAL,
        "output": tmp_path / "set",
        "teacher_options": ModelOptions(input_size=SIZE),
        "config": config(),
        "shard_size": 3,
        "device": "cpu",
    }
    plan = plan_synthesize(net(), part=Part(2, 3), **call)
    assert (plan["synthetic_images"], plan["shards"], plan["parts"]) == (4, 2, ["2/3"])
    assert plan_synthesize(net(), **call)["parts"] == ["1/1"]
    assert list(tmp_path.iterdir()) == []


def test_a_writer_numbers_its_images_from_where_it_is_told(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "class_names": None,
        "num_classes": 2,
        "input_size": SIZE,
        "shard_size": 2,
        "header": {},
    }
    with DatasetWriter(tmp_path / "set", **settings, first_image=5) as writer:
        writer.add(torch.zeros(3, *SIZE, dtype=torch.uint8), torch.tensor([0, 1, 0]), torch.zeros(3, 2))
        manifest = writer.close()
    assert [shard["first"] for shard in manifest["shards"]] == [5, 7]
    with tarfile.open(tmp_path / "set" / "train-00001.tar") as tar:
        assert tar.getnames() == ["0000/00000007.png"]
