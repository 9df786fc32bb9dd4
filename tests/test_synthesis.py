"""The engine of `synthesize`: what goes into a set, and that an interrupted one goes on exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdfkd_cli import synthesis
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.dataset import DatasetWriter, read_dataset
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.methods import SyntheticBatch, build_method
from fastdfkd_cli.records import Record
from fastdfkd_cli.synthesis import Synthesis, burn_in_batches, header
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

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


@pytest.mark.parametrize("at", ["generator", "teacher"])
def test_a_diverged_generator_ends_the_run(tmp_path: Path, at: str) -> None:
    # Rounding hides what is not finite: the stored images would be black, and the logits of black images are fine.
    model = teacher()
    settings = config(synthesis__lr_generator=1e38, synthesis__meta_lr_generator=1e38)
    if at == "teacher":
        settings = config()
        with torch.no_grad():
            model.fc.bias.fill_(math.nan)
    with pytest.raises(FastDFKDError, match=r"synthesis.lr_generator"):
        run(tmp_path / "set", settings, count=40, model=model)


def test_what_decides_the_images_is_in_the_header_and_nothing_else() -> None:
    def of(**changes: Any) -> dict[str, Any]:
        return header(config(**changes), ABOUT, None, False)

    plain = of()
    for same in ({"distillation__lr": 0.01}, {"quality_images": 3}, {"schedule__rounds": 9}, {"pool_size": 50}):
        assert of(**same) == plain
    for other in ({"seed": 1}, {"synthesis__steps": 3}, {"generator__width": 6}, {"schedule__warmup_rounds": 2}):
        assert of(**other) != plain
    assert header(config(), ABOUT, ABOUT, False) != plain
    assert header(config(), ABOUT, None, True) != plain
    assert header(config(), {**ABOUT, "weights_sha256": "ab"}, None, False) != plain
