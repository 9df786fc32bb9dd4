"""Plain distillation on given images: named for what it is, and never taken for synthesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdfkd_cli import api
from fastdfkd_cli.config import from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import KDConfig
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import SIZE, config, net, state_of

FED = ModelOptions(input_size=SIZE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain images, some in a folder of their own."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a").mkdir()
    pixels = torch.randint(256, (9, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for index, image in enumerate(pixels):
        where = folder / "a" if index % 2 else folder
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(where / f"{index}.png")
    return folder


def distill(**changes: Any) -> api.DistillResult:
    call: dict[str, Any] = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False, **changes}
    return api.distill(call.pop("teacher", net()), call.pop("student", net(1)), **call)


@pytest.mark.parametrize("named", [True, False])
def test_a_run_on_given_images_is_kd(
    named: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdfkd_cli.distill_run.build_method", lambda *_, **__: pytest.fail("images were made"))
    said: list[str] = []
    student = net(1)
    before = state_of(student)["tensors"]
    report = distill(
        student=student, data_dir=pictures, output=tmp_path / "out", overrides={"method": "kd"} if named else None,
        on_message=said.append,
    ).report  # fmt: skip
    assert report["config"]["method"] == "kd"
    assert report["config"]["synthesis"] == {"batch_size": 4}
    assert (report["images"], report["seconds"]["synthesis"]) == (9, 0)
    assert report["quality"]["images"] == 8  # DeepInversion's, of any method
    assert any("method kd" in line for line in said)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| method | kd |" in card
    assert "on given images" in card
    assert "FastDFKD" not in card
    assert "data-free" not in card


def test_a_student_of_a_synthetic_set_names_who_made_it(tmp_path: Path) -> None:
    made_with = from_dict({"method": "nayer", "synthesis.steps": 1, "generator.latent_dim": 4}, base=config())
    call: dict[str, Any] = {"teacher_options": FED, "device": "cpu", "amp": False}
    api.synthesize(net(), num_images=6, output=tmp_path / "set", config=made_with, **call)
    settings = config(quality_images=0)
    assert (
        distill(config=settings, data_dir=tmp_path / "set", output=tmp_path / "out").report["config"]["method"] == "kd"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by NAYER (Tran" in card
    assert "data-free" in card
    assert "| method | kd |" in card


def test_kd_needs_images(tmp_path: Path) -> None:
    kd = {"method": "kd"}
    with pytest.raises(UsageError, match="distils on images that are given: name them with --data-dir"):
        distill(overrides=kd)
    with pytest.raises(UsageError, match="there are none to synthesise. Use fastdfkd distill"):
        api.synthesize(
            net(), num_images=4, output=tmp_path / "set", teacher_options=FED, config=config(), overrides=kd, amp=False
        )
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_makes_images_is_not_given_any(pictures: Path) -> None:
    with pytest.raises(UsageError, match="The method dfad makes its images, and --data-dir gives them"):
        distill(overrides={"method": "dfad"}, data_dir=pictures)
    # A report of an earlier run names FastDFKD as its method: its other settings hold for given images.
    assert distill(overrides={"method": "fast"}, data_dir=pictures).report["config"]["method"] == "kd"


def test_a_teacher_without_statistics_is_refused_for_the_signal_alone(pictures: Path) -> None:
    with pytest.raises(UsageError, match="no BatchNorm layers.* leave it out with --set quality_images=0"):
        distill(teacher=net(norm=False), data_dir=pictures)
    with pytest.raises(UsageError, match="leave it out with --set quality_images=0"):
        distill(teacher=net(norm=False), overrides={"method": "dfad"})
    distill(teacher=net(norm=False), data_dir=pictures, overrides={"quality_images": 0})


def test_another_method_keeps_the_budget() -> None:
    quick = get_recipe("quick").config((3, 32, 32))
    found = with_method(quick, "kd")
    assert isinstance(found.synthesis, KDConfig)
    assert (found.schedule, found.distillation, found.synthesis.batch_size) == (
        quick.schedule, quick.distillation, quick.synthesis.batch_size,
    )  # fmt: skip
