"""A network from scratch on labelled images: its loss and schedule, its state, and the folder that it ends in."""

from __future__ import annotations

import copy
import json
import math
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from fastdfkd_cli import api_train, evaluate, plan_train, stopping, train
from fastdfkd_cli.config import learning_rate
from fastdfkd_cli.data import open_training_data
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.job import Machine
from fastdfkd_cli.models import load_teacher
from fastdfkd_cli.resume import checkpoint_folder
from fastdfkd_cli.stopping import Stopped
from fastdfkd_cli.training import Training, channel_statistics, label_loss
from fastdfkd_cli.training_config import TrainingConfig, from_values
from tiny import CLASSES, SIZE, net

CPU = torch.device("cpu")
COLOURS = ("blue", "green", "red")
QUICK = {"epochs": 6, "batch_size": 16, "deterministic": True}


class Border(Exception):
    """Where a run is left."""


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    assert not stopping.asked()


def paint(folder: Path, count: int, *, size: int = 12, grey: bool = False, seed: int = 0) -> Path:
    """``count`` noisy pictures of each colour, in a folder for each."""
    rng = torch.Generator().manual_seed(seed)
    for index, colour in enumerate(COLOURS):
        (folder / colour).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 120, (size, size, 3), dtype=torch.uint8, generator=rng)
            pixels[..., 2 - index] += 80
            if grey:
                pixels = pixels // 2 + 60 * index
            picture = Image.fromarray(pixels.numpy())
            (picture.convert("L") if grey else picture).save(folder / colour / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    paint(root / "train", 24)
    paint(root / "val", 8, seed=1)
    return root


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# The terms


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_is_the_cross_entropy_to_smoothed_targets(smoothing: float) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, 7, generator=rng)
    labels = torch.tensor([0, 6, 3, 3, 1])
    expected = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        total = math.log(math.fsum(math.exp(value) for value in row))
        target = [smoothing / 7 + (1 - smoothing) * (k == label) for k in range(7)]
        expected -= math.fsum(t * (value - total) for t, value in zip(target, row, strict=True)) / 5
    assert float(label_loss(logits, labels, smoothing)) == pytest.approx(expected, rel=1e-6)
    assert label_loss(logits.bfloat16(), labels, smoothing).dtype == torch.float32


def test_the_rate_rises_linearly_and_falls_by_a_cosine() -> None:
    settings = TrainingConfig(lr=0.4, lr_min=0.01, lr_warmup=0.2)
    assert learning_rate(settings, 0.1) == pytest.approx(0.2)
    assert 0 < learning_rate(settings, 0.0) < 0.01
    assert learning_rate(settings, 0.2) == pytest.approx(0.4)
    assert learning_rate(settings, 0.6) == pytest.approx((0.4 + 0.01) / 2)
    assert learning_rate(settings, 1.0) == pytest.approx(0.01)
    assert learning_rate(TrainingConfig(lr_warmup=0.0), 0.0) == pytest.approx(0.1)


def test_mean_and_deviation_are_those_of_all_pixels() -> None:
    images = torch.randint(0, 256, (300, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 2] = 51
    mean, std = channel_statistics(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert std[:2] == pytest.approx(values.std((0, 2, 3), correction=0)[:2].tolist(), abs=6e-5)
    assert (mean[2], std[2]) == (0.2, 1.0)


# The engine


def engine(network: nn.Module | None = None, say: Callable[[str], None] = lambda _: None, **settings: Any) -> Training:
    rng = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (22, *SIZE), dtype=torch.uint8, generator=rng)
    config = from_values({"epochs": 3, "batch_size": 5, **settings})
    network = network if network is not None else net(1, dropout=0.3)
    return Training(config, network, images, torch.arange(22) % CLASSES, device=CPU, amp=False, say=say)


def final(run: Training) -> dict[str, Tensor]:
    list(run)
    return run.net.state_dict()


def left_at(run: Training, border: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Run up to a border, and take copies of everything as a file would hold it. None: there is no such border."""
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        if seen == border:
            raise Border

    run.at_border = stop
    try:
        list(run)
    except Border:
        tensors, values = run.state()
        return copy.deepcopy(tensors), json.loads(json.dumps(values))
    return None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"average": "ema", "validation": 0.2, "label_smoothing": 0.1},
        {"optimizer": "adamw", "augmentation": "resized-crop-flip"},
        {"momentum": 0.0, "nesterov": False, "augmentation": "none"},
    ],
)
def test_a_run_goes_on_from_any_border_to_the_same_network(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = final(engine(**settings))
    borders = 0
    for border in range(1, 100, 2):
        torch.manual_seed(0)
        kept = left_at(engine(**settings), border)
        if kept is None:
            break
        borders += 1
        torch.manual_seed(1)  # another process
        run = engine(**settings)
        run.take_up(*kept)
        assert run.steps_taken == border
        assert_equal(final(run), whole)
    assert borders >= 4


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", 4), ("epoch", -1), ("step", 99), ("step", True), ("rate", 2.0), ("retries", [1] * 9)]
)
def test_a_state_that_fits_no_such_run_is_refused(key: str, value: Any) -> None:
    kept = left_at(engine(), 2)
    assert kept is not None
    with pytest.raises(ValueError, match="its "):
        engine().take_up(kept[0], {**kept[1], key: value})
    with pytest.raises(ValueError, match="order"):
        engine().take_up({**kept[0], "order": torch.zeros(22, dtype=torch.int64)}, kept[1])


def test_every_image_is_seen_once_in_an_epoch_but_for_what_fills_no_batch() -> None:
    run = engine()
    seen: list[int] = []
    learn = run.learn

    def noted() -> None:
        seen.extend(run.order[run.step * 5 : run.step * 5 + 5].tolist())
        learn()

    run.learn = noted  # type: ignore[method-assign]
    list(run)
    assert len(seen) == 3 * 20 == 5 * run.steps_taken
    epochs = [seen[start : start + 20] for start in (0, 20, 40)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_images_that_are_kept_back_are_looked_at_and_never_learned() -> None:
    torch.manual_seed(0)
    run = engine(validation=0.25)
    expected = final(run)
    assert run.validation_top1 is not None
    assert len(run.held_out) == 6
    assert not {*run.held_out.tolist()} & {*run.learned.tolist()}
    torch.manual_seed(0)
    other = engine(validation=0.25)
    other.images[other.held_out] = 0
    other.labels[other.held_out] = 0
    assert_equal(final(other), expected)


class Brittle(nn.Module):
    """Its output is not a number in the calls that are named."""

    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.inner = net(1)
        self.bad, self.calls = bad, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(x)
        return logits * float("nan") if self.calls in self.bad else logits


def test_a_loss_that_is_not_a_number_puts_the_run_back_at_a_lower_rate() -> None:
    said: list[str] = []
    run = engine(Brittle(6), said.append)  # the second epoch's second step
    list(run)
    assert run.steps_taken == run.total_steps
    assert run.rate == 0.25
    assert [each["epoch"] for each in run.retries] == [1]
    assert "back to epoch 2 with a quarter of lr" in said[0]
    assert all(torch.isfinite(tensor).all() for tensor in run.net.state_dict().values())


def test_a_run_that_breaks_again_and_again_ends() -> None:
    run = engine(Brittle(*range(100)))
    with pytest.raises(FastDFKDError, match=r"after 3 returns .* Lower lr"):
        list(run)


def test_weight_decay_spares_biases_and_norms() -> None:
    run = engine(weight_decay=0.3)
    decayed = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {p.ndim > 1: decayed[id(p)] for p in run.net.parameters()} == {True: 0.3, False: 0.0}
    assert len(decayed) == len(list(run.net.parameters()))


# The whole of it


def test_it_learns_and_its_folder_opens_as_a_stranger_opens_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records: list[Any] = []
    result = train(
        "cifar/wrn10_1", data_dir=photos, overrides={**QUICK, "validation": 0.1}, output=out, device="cpu", amp=False,
        eval_data=str(photos), on_record=records.append,
    )  # fmt: skip
    assert result.report["evaluation"]["top1"] > 90
    assert result.report["validation"]["n_samples"] == 7
    assert (result.report["images"], result.report["steps"]) == (65, 6 * 4)
    assert result.report["data"] == {"path": str(photos), "split": "train", "synthetic": False}
    assert {record.phase for record in records} == {"reading", "training", "evaluation"}

    opened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == list(COLOURS)
    spec = config["pretrained_cfg"]
    assert spec["input_size"] == [3, 12, 12]
    assert 0.2 < spec["mean"][0] < 0.4
    x = torch.rand(4, 3, 12, 12)
    x = (x - torch.tensor(spec["mean"]).view(3, 1, 1)) / torch.tensor(spec["std"]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(opened(x), result.model.to(memory_format=torch.contiguous_format)(x), atol=1e-5)

    teacher = load_teacher(str(out))
    assert (teacher.class_names, teacher.input.size) == (COLOURS, (3, 12, 12))
    assert evaluate(str(out), data_dir=str(photos), device="cpu")["top1"] == result.report["evaluation"]["top1"]


def test_its_folder_claims_no_teacher_and_shows_no_picture_of_somebody(photos: Path, tmp_path: Path) -> None:
    train("cifar/wrn10_1", data_dir=photos, overrides={"epochs": 1}, output=tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained from scratch on images and their labels, without a teacher" in card
    for word in ("distil", "data-free", "Teacher:", "synthesised", "FastDFKD", "license:"):
        assert word not in card
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "metrics.jsonl", "model.safetensors", "report.json",
    ]  # fmt: skip
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert not [name for name in facts if name.startswith("teacher")]
    assert json.loads(facts["config"])["epochs"] == 1


def test_two_runs_with_one_seed_are_one_network(photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # what stands before does not matter
        train(
            "cifar/wrn10_1", data_dir=photos, overrides={**QUICK, "epochs": 1, "seed": seed}, output=tmp_path / name,
            device="cpu",
        )  # fmt: skip
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_stopped_run_goes_on_to_the_same_network(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request: dict[str, Any] = {
        "data_dir": photos, "overrides": {**QUICK, "average": "ema"}, "device": "cpu", "amp": False
    }  # fmt: skip
    train("cifar/wrn10_1", **request, output=tmp_path / "whole")
    out = tmp_path / "out"
    learn = Training.learn

    def asked(self: Training) -> None:
        learn(self)
        if self.steps_taken == 10:
            stopping.ask(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "learn", asked)
        with pytest.raises(Stopped) as stopped:
            train("cifar/wrn10_1", **request, output=out)
    assert "10 steps are kept in" in stopped.value.__notes__[0]
    assert not out.exists()
    with pytest.raises(UsageError, match=r"--resume"):
        train("cifar/wrn10_1", **request, output=out)
    with pytest.raises(UsageError, match=r"lr"):
        train("cifar/wrn10_1", **{**request, "overrides": {**QUICK, "lr": 0.3}}, output=out, resume="auto")
    said: list[str] = []
    train("cifar/wrn10_1", **request, output=out, resume="auto", on_message=said.append)
    assert "going on after 10 steps" in said
    assert not checkpoint_folder(out).exists()
    assert_equal(weights(out), weights(tmp_path / "whole"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["progress"] for line in lines] == sorted(line["progress"] for line in lines)

    again = train("cifar/wrn10_1", **request, output=out, resume="auto", on_message=said.append)
    assert said[-1] == "the run is complete: nothing is left to do"
    assert again.report["steps"] == 24
    with pytest.raises(UsageError, match="not empty"):
        train("cifar/wrn10_1", **{**request, "overrides": {"epochs": 2}}, output=out, resume="auto")


def test_a_checkpoint_that_somebody_else_wrote_is_refused(photos: Path, tmp_path: Path) -> None:
    job = api_train._prepare(
        "cifar/wrn10_1", photos, None, None, None, {"epochs": 1}, None, None, None, None, "cpu", False, lambda _: None
    )
    images, labels = api_train._read(job, 0, api_train.MetricsLog())
    api_train._normalise(job, images, lambda _: None)
    about = api_train._identity(job, images, labels)
    folder = checkpoint_folder(tmp_path / "out")
    with api_train.Checkpoints.open(folder, about, resume=False, say=lambda _: None) as checkpoints:
        checkpoints.save({"x": torch.zeros(1)}, {"run": {"epoch": 0}, "elapsed": 0.0}, {}, wait=True)
    with pytest.raises(UnavailableError, match="does not fit this run"):
        train(
            "cifar/wrn10_1", data_dir=photos, overrides={"epochs": 1}, output=tmp_path / "out", resume="auto",
            device="cpu", amp=False,
        )  # fmt: skip


def test_a_module_of_ones_own_is_trained_in_place(photos: Path) -> None:
    module = net(0, classes=3)
    before = copy.deepcopy(module.state_dict())
    result = train(module, data_dir=photos, overrides={"epochs": 1}, device="cpu")
    assert result.model is module
    assert result.path is None
    assert not torch.equal(before["fc.weight"], module.state_dict()["fc.weight"])
    with pytest.raises(UsageError, match="4 outputs for 3 classes"):
        train(net(0), data_dir=photos, device="cpu")


# The images


def test_images_are_found_where_evaluate_finds_them(photos: Path, tmp_path: Path) -> None:
    assert open_training_data(data_dir=photos).split == "train"
    assert open_training_data(data_dir=photos, split="val").size == 24
    assert open_training_data(data_dir=photos / "train").size == 72  # undivided: all of it
    with pytest.raises(UsageError, match="no folder 'train'"):
        open_training_data(data_dir=photos / "train", split="train")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(photos / "val", arcname=".")
    found = plan_train("cifar/wrn10_1", data_dir=tmp_path / "all.tar", overrides={"batch_size": 8}, device="cpu")
    assert (found["images"], found["steps"]) == (24, 30 * 3)
    assert found["model"]["input"]["mean"] is None  # nobody has read them
    assert found["seconds"]["training"] > 0


def test_the_input_follows_from_the_images_or_the_architecture(tmp_path: Path) -> None:
    paint(tmp_path / "grey", 2, grey=True)
    paint(tmp_path / "large", 2, size=80)

    def size(model: Any, folder: str, **stated: Any) -> list[int]:
        found = plan_train(model, data_dir=tmp_path / folder, overrides={"batch_size": 2}, device="cpu", **stated)
        return list(found["model"]["input"]["size"])

    assert size("cifar/wrn10_1", "grey") == [1, 12, 12]
    assert size("cifar/wrn10_1", "large") == [3, 32, 32]
    assert size("cifar/wrn10_1", "large", input_size=(3, 40, 48)) == [3, 40, 48]
    with pytest.raises(UsageError, match="80 x 80 pixels: give --input-size"):
        size(net(0, classes=3), "large")


def test_stated_normalisation_is_exported(photos: Path, tmp_path: Path) -> None:
    train(
        "cifar/wrn10_1", data_dir=photos, overrides={"epochs": 1}, mean=(0.5,), std=(0.2, 0.3, 0.4),
        output=tmp_path / "out", device="cpu",
    )  # fmt: skip
    spec = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (spec["mean"], spec["std"]) == ([0.5] * 3, [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("model", "request_", "line"),
    [
        ("cifar/wrn10_1", {}, "No images to train on"),
        ("cifar/wrn10_1", {"dataset": "builtin/digits"}, "holds only its test images"),
        ("cifar/wrn10_1", {"data_dir": "missing"}, "no folder or file"),
        ("builtin/digits", {"data_dir": "val"}, "has weights already"),
        ("cifar/wrn99_1", {"data_dir": "val"}, "cifar/wrn99_1"),
        ("cifar/wrn10_1", {"data_dir": "val", "num_classes": 5}, "3 classes"),
        ("cifar/wrn10_1", {"data_dir": "val", "std": (0.0,)}, "--std must be above 0"),
        ("cifar/wrn10_1", {"data_dir": "val", "mean": (0.1, 0.2)}, "2 values for 3 channels"),
        ("cifar/wrn10_1", {"data_dir": "val", "overrides": {"epoch": 3}}, "Did you mean epochs"),
        ("cifar/wrn10_1", {"data_dir": "val", "overrides": {"validation": 0.99}}, "batch statistics"),
        ("cifar/wrn10_1", {"data_dir": "val", "eval_data": "missing"}, "no folder or file"),
        ("cifar/wrn10_1", {"data_dir": "val", "resume": "auto"}, "name it"),
    ],
)
def test_what_cannot_be_is_one_line(photos: Path, model: str, request_: dict[str, Any], line: str) -> None:
    for key in ("data_dir", "eval_data"):
        if key in request_:
            request_ = {**request_, key: str(photos / request_[key])}
    with pytest.raises(FastDFKDError) as error:
        train(model, **request_, device="cpu")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_refused_before_they_are_read(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "available_memory", lambda self: 10_000)
    with pytest.raises(UsageError, match=r"72 images of 3x12x12 take .* lower --input-size"):
        train("cifar/wrn10_1", data_dir=photos, device="cpu")


def test_a_picture_that_cannot_be_read_ends_it_by_name(tmp_path: Path) -> None:
    paint(tmp_path, 2)
    (tmp_path / "red" / "9.png").write_bytes(b"no picture")
    with pytest.raises(UnavailableError, match=r"9\.png"):
        train("cifar/wrn10_1", data_dir=tmp_path, device="cpu")


def test_a_damaged_judge_does_not_cost_the_network(photos: Path, tmp_path: Path) -> None:
    paint(tmp_path / "judge", 2)
    (tmp_path / "judge" / "red" / "9.png").write_bytes(b"no picture")
    with pytest.raises(UnavailableError, match="The network itself is whole"):
        train(
            "cifar/wrn10_1", data_dir=photos, overrides={"epochs": 1}, output=tmp_path / "out", device="cpu",
            eval_data=str(tmp_path / "judge"),
        )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").is_file()
