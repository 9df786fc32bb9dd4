"""The built-in teacher: what its file says of it is true, and its test images were not among those it learnt from."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fastdfkd_cli.data import open_evaluation_data
from fastdfkd_cli.evaluation import drain, evaluate_model
from fastdfkd_cli.models import load_teacher

ASSETS = Path(str(resources.files("fastdfkd_cli") / "assets"))
TEACHER, TEST_IMAGES = ASSETS / "digits.safetensors", ASSETS / "digits-test.safetensors"


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


@pytest.fixture(scope="module")
def training_script() -> ModuleType:
    pytest.importorskip("sklearn", reason="the script's split is recomputed with scikit-learn")
    path = Path(__file__).parents[1] / "scripts" / "train_digits.py"
    if not path.exists():
        pytest.skip("scripts/train_digits.py is not beside the tests")
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_assets_are_small() -> None:
    assert TEACHER.stat().st_size + TEST_IMAGES.stat().st_size < 1_000_000


def test_the_stated_accuracy_is_the_measured_one() -> None:
    _, metadata = read(TEACHER)
    teacher = load_teacher("builtin/digits")
    row = drain(evaluate_model(teacher, open_evaluation_data(dataset="builtin/digits"))).row
    assert row["top1"] == float(metadata["test_top1"])
    assert row["top1"] >= 98.5
    assert row["n_samples"] == 450
    assert f"{row['top1']:.2f} %" in (ASSETS / "README.md").read_text(encoding="utf-8")


def test_the_metadata_says_how_to_feed_it() -> None:
    tensors, metadata = read(TEACHER)
    teacher = load_teacher("builtin/digits")
    assert teacher.input.size == tuple(json.loads(metadata["input_size"])) == (1, 8, 8)
    assert teacher.input.mean == tuple(json.loads(metadata["mean"]))
    assert teacher.input.std == tuple(json.loads(metadata["std"]))
    assert teacher.num_classes == int(metadata["num_classes"]) == 10
    assert metadata["license"] == "cc-by-4.0"
    assert "Alpaydin" in metadata["source"]
    assert {name: value.shape for name, value in teacher.module.state_dict().items()} == {
        name: value.shape for name, value in tensors.items()
    }


def test_the_test_images_are_those_of_the_script_and_none_was_learnt(training_script: ModuleType) -> None:
    tensors, _ = read(TEST_IMAGES)
    train_images, train_labels, test_images, test_labels = training_script.load_split()
    assert torch.equal(tensors["images"], test_images)
    assert torch.equal(tensors["labels"], test_labels)
    assert (len(train_labels), len(test_labels)) == (1347, 450)
    learnt = {image.numpy().tobytes() for image in train_images}
    assert not any(image.numpy().tobytes() in learnt for image in test_images)
    shares = test_labels.bincount(minlength=10) / torch.cat([train_labels, test_labels]).bincount(minlength=10)
    assert float((shares - 450 / 1797).abs().max()) < 0.01  # every digit has its share in the test part


def test_the_running_statistics_are_those_of_the_training_images(training_script: ModuleType) -> None:
    """They are all that distillation knows of the data: a pass over the training images must give them again."""
    train_images = training_script.load_split()[0]
    model = load_teacher("builtin/digits").module
    mean, std = (json.loads(read(TEACHER)[1][name])[0] for name in ("mean", "std"))
    assert mean == pytest.approx(float((train_images / 255).mean()), abs=1e-4)
    assert std == pytest.approx(float((train_images / 255).std()), abs=1e-4)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    training_script.settle_statistics(model, (train_images / 255 - mean) / std)
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, stored[name], rtol=1e-3, atol=1e-3)
