"""The engine of `synthesize`: what goes into a set, and that an interrupted one goes on exactly."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdfkd_cli import synthesis
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.dataset import DatasetWriter, load_manifest, read_dataset
from fastdfkd_cli.dataset import writer as dataset_writer
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.methods import SyntheticBatch, build_method
from fastdfkd_cli.records import Record
from fastdfkd_cli.synthesis import Synthesis, burn_in_batches, header
from tiny import CLASSES, SIZE, TinyNet, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")
ABOUT = {"name": "tiny", "revision": None, "weights_sha256": None, "num_classes": CLASSES, "input": {"size": [3, 8, 8]}}


def run(
    path: Path,
    settings: RunConfig,
    *,
    count: int,
    resume: bool = False,
    student: nn.Module | None = None,
    model: nn.Module | None = None,
    stop_after: int | None = None,
    shard_size: int = 6,
    before_batch: Callable[[int], None] = lambda made: None,
) -> list[Record]:
    """Fill ``path``; a batch after ``stop_after`` of them pulls the plug."""
    model = model or teacher()
    method = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    facts: dict[str, Any] = {
        "class_names": None, "num_classes": CLASSES, "input_size": SIZE, "shard_size": shard_size,
        "header": header(settings, ABOUT, ABOUT if student is not None else None, False),
    }  # fmt: skip
    make, made = method.synthesize, 0

    def until(opponent: nn.Module | None) -> SyntheticBatch:
        nonlocal made
        before_batch(made)
        if made == stop_after:
            raise KeyboardInterrupt
        made += 1
        return make(opponent)

    method.synthesize = until  # type: ignore[method-assign]
    try:
        opened = DatasetWriter.resume(path, **facts) if resume else DatasetWriter(path, **facts)
        with opened as writer:
            keywords: dict[str, Any] = {"writer": writer, "num_images": count, "device": CPU}
            return list(Synthesis(settings, method, model, student, **keywords))
    finally:
        method.close()


def contents(path: Path) -> dict[str, bytes]:
    return {
        item.name: item.read_bytes()
        for item in sorted(path.rglob("*"))
        if item.name != "manifest.json" and item.is_file()
    }


@pytest.fixture
def every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "RECORD_EVERY", 0.0)


@pytest.mark.usefixtures("every_record")
def test_a_set_holds_the_images_behind_the_warm_up_with_the_teachers_logits(tmp_path: Path) -> None:
    settings = config(schedule__warmup_rounds=2, schedule__batches_per_round=2)
    assert burn_in_batches(settings) == 4
    model = teacher()
    before = state_of(model)
    records = run(tmp_path / "set", settings, count=10, model=model)
    assert_same_state(before, state_of(model))
    found = read_dataset(tmp_path / "set")
    again = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    batches = [again.synthesize() for _ in range(7)]
    again.close()
    assert torch.equal(found.images, torch.cat([batch.images for batch in batches[4:]])[:10])
    assert torch.equal(found.labels, torch.cat([batch.labels for batch in batches[4:]])[:10])
    assert found.logits is not None
    assert torch.allclose(found.logits, model(found.images.float() / 255), atol=1e-5)
    assert [record.step for record in records] == [0, 0, 0, 0, 4, 8, 10, 10]
    progress = [record.progress for record in records]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    assert all(record.total == 10 and record.unit == "images" for record in records)


def test_the_manifest_says_how_the_images_were_made(tmp_path: Path) -> None:
    run(tmp_path / "set", config(), count=5)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    text = json.dumps(manifest)
    assert manifest["complete"]
    assert '"steps": 2' in text
    assert '"torch"' in text


@pytest.mark.parametrize("variant", [{}, {"synthesis__reuse": "none"}, {"synthesis__latent": "meta"}])
def test_an_interrupted_set_goes_on_bit_for_bit(tmp_path: Path, variant: dict[str, Any]) -> None:
    settings = config(schedule__warmup_rounds=1, **variant)
    student = net(1)
    run(tmp_path / "whole", settings, count=20, student=student)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", settings, count=20, student=student, stop_after=4)
    run(tmp_path / "parts", settings, count=20, student=student, resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    longer = run(tmp_path / "parts", settings, count=20, student=student, resume=True)
    assert longer == []  # nothing to do


def test_an_interruption_in_the_warm_up_is_no_harm(tmp_path: Path) -> None:
    settings = config(schedule__warmup_rounds=3)
    run(tmp_path / "whole", settings, count=8)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", settings, count=8, stop_after=2)
    if (tmp_path / "parts").exists():
        run(tmp_path / "parts", settings, count=8, resume=True)
    else:
        run(tmp_path / "parts", settings, count=8)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("every_record")
def test_the_rate_of_a_continued_set_is_of_this_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(schedule__warmup_rounds=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "set", settings, count=16, stop_after=5)
    records = run(tmp_path / "set", settings, count=16, resume=True)
    first = records[0]
    assert first.rate is not None
    assert first.rate * first.elapsed == pytest.approx(4)  # one batch, and not the warm-up of the day before
    assert [record.step for record in records] == [12, 16, 16]
    assert records[-1].progress == 1


def test_the_student_takes_part_and_stays_as_it_is(tmp_path: Path) -> None:
    student = net(1)
    before = state_of(student)
    run(tmp_path / "with", config(), count=8, student=student)
    run(tmp_path / "without", config(), count=8)
    assert_same_state(before, state_of(student))
    assert contents(tmp_path / "with") != contents(tmp_path / "without")


# Beside the computation


def test_synthesis_goes_on_while_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, encode = threading.Event(), dataset_writer._png

    def slow(image: Any) -> bytes:
        assert ahead.wait(20), "synthesis waited for the disk"
        return encode(image)

    def before_batch(made: int) -> None:
        if made == 6:  # one thrown away, three in the first shard, two that wait for the second
            ahead.set()

    settings = config(schedule__warmup_rounds=1)
    run(tmp_path / "whole", settings, count=28, shard_size=12)
    monkeypatch.setattr(dataset_writer, "_png", slow)
    run(tmp_path / "slow", settings, count=28, shard_size=12, before_batch=before_batch)
    assert contents(tmp_path / "slow") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_synthesis
from fastdfkd_cli.dataset import writer

encode, encoded = writer._png, 0

def killed(image):
    global encoded
    encoded += 1
    if encoded == 9:  # in the middle of the second shard
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(image)

writer._png = killed
test_synthesis.run(Path({path!r}), test_synthesis.config(schedule__warmup_rounds=1), count=20)
"""


def test_a_run_killed_while_it_writes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "parts"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [shard["images"] for shard in load_manifest(tmp_path / "parts")["shards"]] == [6]
    assert (tmp_path / "parts" / ".train-00001.tar.partial").exists()
    settings = config(schedule__warmup_rounds=1)
    run(tmp_path / "parts", settings, count=20, resume=True)
    run(tmp_path / "whole", settings, count=20)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


class ScalarReads(TorchDispatchMode):
    """Counts the operations that make a device wait: those that turn a tensor into a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal, torch.ops.aten.nonzero
        )  # fmt: skip
        return function(*args, **(kwargs or {}))


class Prepared:
    """A method that has made its batches before."""

    def __init__(self, batches: list[SyntheticBatch], state: dict[str, Tensor]) -> None:
        self._batches, self._state = iter(batches), state

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        return next(self._batches)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def test_the_loop_reads_nothing_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = config(schedule__warmup_rounds=1), teacher()
    method = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    prepared: Any = Prepared([method.synthesize() for _ in range(6)], method.state_dict())
    method.close()
    # On the CPU, where it is free, the writer looks at labels early.
    monkeypatch.setattr(DatasetWriter, "_check_labels", lambda self, labels: None)
    monkeypatch.setattr(synthesis, "RECORD_EVERY", 1e9)
    facts: dict[str, Any] = {
        "class_names": None, "num_classes": CLASSES, "input_size": SIZE, "shard_size": 6, "header": {}
    }  # fmt: skip
    with DatasetWriter(tmp_path / "set", **facts) as writer, ScalarReads() as reads:
        run = Synthesis(settings, prepared, model, None, writer=writer, num_images=20, device=CPU)
        records = list(run)
        assert reads.found == 0
        assert bool(torch.ones(()))
        assert reads.found == 1
    assert len(records) == 1
    assert len(read_dataset(tmp_path / "set")) == 20


class Forgetful(TinyNet):
    """A teacher that answers while images are made of it, and not when it is asked for soft labels."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if torch.is_grad_enabled() else logits * math.nan


def test_a_diverged_run_ends_and_stores_nothing_of_it(tmp_path: Path) -> None:
    # Rounding hides what is not finite: the stored images would be black, and the logits of black images are fine.
    model = teacher()

    def break_it(made: int) -> None:
        if made == 4:  # one thrown away, and 12 images: two shards
            with torch.no_grad():
                model.fc.bias.fill_(math.nan)

    settings = config(schedule__warmup_rounds=1)
    with pytest.raises(FastDFKDError) as caught:
        run(tmp_path / "set", settings, count=40, model=model, before_batch=break_it)
    assert "stopped being finite after 12 images (class, total). Lower synthesis.lr_generator" in str(caught.value)
    run(tmp_path / "whole", settings, count=12)
    found, whole = read_dataset(tmp_path / "set"), read_dataset(tmp_path / "whole")
    assert torch.equal(found.images, whole.images)
    assert found.logits is not None
    assert found.logits.isfinite().all()


@pytest.mark.parametrize("often", [False, True])
def test_a_generator_that_breaks_in_the_warm_up_ends_the_run(
    tmp_path: Path, often: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "RECORD_EVERY", 0.0 if often else 1e9)
    settings = config(synthesis__lr_generator=1e38, synthesis__meta_lr_generator=1e38, schedule__warmup_rounds=2)
    with pytest.raises(FastDFKDError, match=r"after 0 images .*synthesis.lr_generator"):
        run(tmp_path / "set", settings, count=40)
    assert not (tmp_path / "set").exists()


def test_a_batch_that_breaks_in_the_warm_up_alone_is_not_passed_over(tmp_path: Path) -> None:
    settings, model = config(schedule__warmup_rounds=1), teacher()
    method = build_method(settings, model, image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False)
    batches = [method.synthesize() for _ in range(3)]
    batches[0].losses["feature"].fill_(math.inf)
    prepared: Any = Prepared(batches, method.state_dict())
    method.close()
    facts: dict[str, Any] = {
        "class_names": None, "num_classes": CLASSES, "input_size": SIZE, "shard_size": 6, "header": {}
    }  # fmt: skip
    with (
        pytest.raises(FastDFKDError, match=r"after 0 images \(feature\)"),
        DatasetWriter(tmp_path / "set", **facts) as writer,
    ):
        list(Synthesis(settings, prepared, model, None, writer=writer, num_images=8, device=CPU))
    assert not (tmp_path / "set").exists()


def test_soft_labels_that_are_no_numbers_end_the_run(tmp_path: Path) -> None:
    model = Forgetful().eval().requires_grad_(False)
    with pytest.raises(FastDFKDError, match=r"teacher's outputs .*synthesis.lr_generator"):
        run(tmp_path / "set", config(), count=40, model=model)
    assert not (tmp_path / "set").exists()


def test_what_decides_the_images_is_in_the_header_and_nothing_else() -> None:
    def of(**changes: Any) -> dict[str, Any]:
        return header(config(**changes), ABOUT, None, False)

    plain = of()
    for same in (
        {"distillation__lr": 0.01},
        {"quality_images": 3},
        {"quality_steps": 7},
        {"schedule__rounds": 9},
        {"pool_size": 50},
    ):
        assert of(**same) == plain
    for other in ({"seed": 1}, {"synthesis__steps": 3}, {"generator__width": 6}, {"schedule__warmup_rounds": 2}):
        assert of(**other) != plain
    assert header(config(), ABOUT, ABOUT, False) != plain
    assert header(config(), ABOUT, None, True) != plain
    assert header(config(), {**ABOUT, "weights_sha256": "ab"}, None, False) != plain
