"""The figures of `evaluate`: against counting by hand, against timm's own loop, and what must not change them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import timm.utils
import torch
from PIL import Image
from torch import Tensor, nn

from fastdfkd_cli import nets_cifar
from fastdfkd_cli.data import open_evaluation_data
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.evaluation import Evaluation, Scores, drain, evaluate_model, evaluation_mode, score
from fastdfkd_cli.models import InputSpec, LoadedModel
from fastdfkd_cli.records import Record

VALIDATE_KEYS = [
    "model",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "img_size",
    "crop_pct",
    "interpolation",
]
OUR_KEYS = ["loss", "n_samples", "dataset", "split", "revision", "weights_sha256", "images_per_sec"]


class Table(nn.Module):
    """Looks the logits up: an image's first pixel is its row."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        rows = (images[:, 0, 0, 0] * 255).round().long()
        return self.logits[rows]


def numbered_images(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 1, 2, 2)


def score_tensors(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256, **options: object
) -> Scores:
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return drain(score(model, (([part], wanted) for part, wanted in parts), **options))


def loaded(
    module: nn.Module, *, size: tuple[int, int, int] = (3, 24, 24), classes: int = 7, **changes: object
) -> LoadedModel:
    spec = InputSpec(size=size, mean=(0.4,) * size[0], std=(0.3,) * size[0], interpolation="bicubic", crop_pct=0.875)
    values = {"name": "a model", "num_classes": classes, "input": spec} | changes
    return LoadedModel(module=module, reference="x", source="module", **values)


def network(seed: int, classes: int = 7, chans: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    assert nets_cifar.REGISTRY_PREFIX == "fastdfkd_"
    model = timm.create_model("fastdfkd_wrn10_1", num_classes=classes, in_chans=chans)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 noise pictures of different sizes in 7 classes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for index in range(23):
        folder = root / f"class{index % 7}"
        folder.mkdir(exist_ok=True)
        height, width = rng.integers(20, 60, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


# ------------------------------------------------------------------------------------------------ against counting


def test_figures_against_counting_by_hand() -> None:
    # Ranks of the true class (0): first, first, third, sixth of six.
    logits = torch.tensor(
        [
            [9.0, 0, 0, 0, 0, 0],
            [3.0, 2, 1, 0, 0, 0],
            [1.0, 5, 4, 0, 0, 0],
            [-1.0, 5, 4, 3, 2, 1],
        ]
    )
    teacher = torch.zeros(4, 6)
    teacher[torch.arange(4), torch.tensor([0, 1, 1, 0])] = 1  # right, wrong, agrees in error, right
    scores = score_tensors(
        Table(logits), numbered_images(4), torch.zeros(4, dtype=torch.int64), num_classes=6, teacher=Table(teacher)
    )
    losses = torch.logsumexp(logits.double(), dim=1) - logits[:, 0].double()
    assert scores.n_samples == 4
    assert scores.top1 == 50
    assert scores.top5 == 75
    assert scores.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert scores.teacher_top1 == 50
    assert scores.agreement == 50
    assert scores.images_per_sec > 0


def test_top5_of_fewer_classes_counts_all_of_them() -> None:
    scores = score_tensors(Table(torch.eye(3)), numbered_images(3), torch.tensor([1, 1, 1]), num_classes=3)
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == 100
    assert scores.teacher_top1 is None
    assert scores.agreement is None


def test_the_row_equals_timms_validation_loop(photographs: Path) -> None:
    """timm's transform, meters and rounding, on the same network."""
    module = network(0)
    model = loaded(module)
    spec = model.input
    result = drain(evaluate_model(model, open_evaluation_data(data_dir=photographs), batch_size=5))

    transform = timm.data.create_transform(
        input_size=spec.size,
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        mean=spec.mean,
        std=spec.std,
    )
    files, _ = timm.data.readers.reader_image_folder.find_images_and_targets(str(photographs))
    top1, top5, losses = (timm.utils.AverageMeter() for _ in range(3))
    for path, target in files:
        with Image.open(path) as picture:
            image = transform(picture.convert("RGB"))[None]
        with torch.no_grad():
            output = module(image)
        labels = torch.tensor([target])
        first, fifth = timm.utils.accuracy(output, labels, topk=(1, 5))
        top1.update(first.item())
        top5.update(fifth.item())
        losses.update(nn.functional.cross_entropy(output, labels).item())
    assert list(result.row) == VALIDATE_KEYS + OUR_KEYS
    assert result.row["top1"] == round(top1.avg, 4)
    assert result.row["top1_err"] == round(100 - top1.avg, 4)
    assert result.row["top5"] == round(top5.avg, 4)
    assert result.row["top5_err"] == round(100 - top5.avg, 4)
    assert result.scores.loss == pytest.approx(losses.avg, rel=1e-5)
    assert result.row["param_count"] == round(sum(p.numel() for p in module.parameters()) / 1e6, 2)
    assert (result.row["img_size"], result.row["crop_pct"], result.row["interpolation"]) == (24, 0.875, "bicubic")
    assert (result.row["n_samples"], result.row["dataset"]) == (23, str(photographs))


def run(model: LoadedModel, place: Path, **options: object) -> Evaluation:
    return drain(evaluate_model(model, open_evaluation_data(data_dir=place), **options))


# ------------------------------------------------------------------------------------------ what must not matter


def test_batch_size_and_workers_change_nothing(photographs: Path) -> None:
    model, teacher = loaded(network(0)), loaded(network(1))

    def figures(**options: object) -> Scores:
        return run(model, photographs, teacher=teacher, **options).scores

    one, all_at_once, with_workers = figures(batch_size=1), figures(batch_size=64), figures(batch_size=5, workers=2)
    for other in (all_at_once, with_workers):
        assert (other.n_samples, other.top1, other.top5) == (one.n_samples, one.top1, one.top5)
        assert (other.teacher_top1, other.agreement) == (one.teacher_top1, one.agreement)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)


def test_modes_and_statistics_are_the_users_again_afterwards(photographs: Path) -> None:
    module = network(0).train()
    module.block1.eval()  # a frozen part, as fine-tuning has it
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = {name: layer.training for name, layer in module.named_modules()}
    trained = run(loaded(module), photographs).scores
    assert {name: layer.training for name, layer in module.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert trained.top1 == run(loaded(module.eval()), photographs).scores.top1
    module.train()
    with pytest.raises(RuntimeError, match="stop"), evaluation_mode(module, None):
        assert not module.training
        raise RuntimeError("stop")
    assert module.training


def test_the_teacher_sees_images_in_its_own_size_and_normalisation(photographs: Path) -> None:
    student, teacher = loaded(network(0)), loaded(network(1, chans=1), size=(1, 16, 20), name="grey teacher")
    together = run(student, photographs, teacher=teacher)
    assert together.row["teacher"] == "grey teacher"
    assert together.row["teacher_top1"] == run(teacher, photographs).row["top1"]
    assert together.row["top1"] == run(student, photographs).row["top1"]
    assert run(teacher, photographs).row["img_size"] == [16, 20]
    itself = run(student, photographs, teacher=student)
    assert itself.row["agreement"] == 100
    assert list(itself.row) == [*VALIDATE_KEYS, *OUR_KEYS, "teacher", "teacher_top1", "agreement"]


def test_classes_in_another_order_do_not_change_the_accuracy(photographs: Path) -> None:
    names = tuple(f"class{index}" for index in range(7))
    module = network(0)
    straight = run(loaded(module, class_names=names), photographs)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    with torch.no_grad():
        module.fc.weight.copy_(module.fc.weight[order])
        module.fc.bias.copy_(module.fc.bias[order])
    shuffled = run(loaded(module, class_names=tuple(names[index] for index in order)), photographs)
    assert shuffled.row["top1"] == straight.row["top1"]
    assert shuffled.scores.loss == pytest.approx(straight.scores.loss, rel=1e-5)
    assert straight.notes == ()
    assert "by name" in shuffled.notes[0]


def test_amp_computes_in_low_precision_and_stays_close(photographs: Path) -> None:
    module = network(0)
    seen: list[torch.dtype] = []
    module.fc.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    model = loaded(module)
    full, low = run(model, photographs), run(model, photographs, amp=True)
    assert seen == [torch.float32, torch.bfloat16]
    assert low.scores.loss == pytest.approx(full.scores.loss, rel=0.05)
    assert low.scores.loss != full.scores.loss


def test_size_and_crop_can_be_overridden(photographs: Path) -> None:
    sizes: list[tuple[int, ...]] = []
    module = network(0)
    module.conv1.register_forward_pre_hook(lambda layer, inputs: sizes.append(tuple(inputs[0].shape[1:])))
    row = run(loaded(module), photographs, img_size=32, crop_pct=1.0).row
    assert set(sizes) == {(3, 32, 32)}
    assert (row["img_size"], row["crop_pct"]) == (32, 1.0)


def test_a_size_that_a_model_cannot_take_is_named(photographs: Path) -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 7))
    assert run(loaded(fixed), photographs).row["img_size"] == 24
    with pytest.raises(UsageError, match="a model fails on input 2x3x32x32"):
        run(loaded(fixed), photographs, img_size=32)
    with pytest.raises(UsageError, match="fixed teacher fails on input 2x3x32x32"):
        run(loaded(network(0)), photographs, teacher=loaded(fixed, name="fixed teacher"), img_size=32)


# ---------------------------------------------------------------------------------------------- records and errors


def test_records_count_up_to_the_end(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.evaluation.RECORD_EVERY", 0.0)
    records: list[Record] = []
    result = drain(
        evaluate_model(loaded(network(0)), open_evaluation_data(data_dir=photographs), batch_size=8), records.append
    )
    assert [record.step for record in records] == [8, 16, 23, 23]
    assert all(record.total == 23 and record.phase == "evaluation" for record in records)
    assert [record.progress for record in records] == pytest.approx([8 / 23, 16 / 23, 1, 1])
    assert records[-1].values["top1"] == pytest.approx(result.scores.top1)
    assert records[-1].values["loss"] == pytest.approx(result.scores.loss)
    assert records[-1].remaining == 0


def test_an_abandoned_run_leaves_the_model_as_it_was(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.evaluation.RECORD_EVERY", 0.0)
    module = network(0).train()
    records = evaluate_model(loaded(module), open_evaluation_data(data_dir=photographs), batch_size=8)
    next(records)
    assert module.training
    assert torch.is_grad_enabled()
    records.close()


def test_a_model_that_gives_nan_ends_the_run_naming_the_image() -> None:
    logits = torch.zeros(300, 3)
    logits[259, 1] = float("nan")
    images = numbered_images(200).repeat(2, 1, 1, 1)
    labels = torch.zeros(400, dtype=torch.int64)
    with pytest.raises(FastDFKDError, match="not finite on image 59"):
        score_tensors(Table(logits.roll(-200, 0)), images, labels, num_classes=3, batch_size=32)


def test_what_does_not_fit_is_refused(photographs: Path) -> None:
    model = loaded(network(0))
    with pytest.raises(UsageError, match="has 7 classes .* and the model 5"):
        run(loaded(network(0, classes=5), classes=5), photographs)
    with pytest.raises(UsageError, match="a teacher has 5 classes and a model 7"):
        run(model, photographs, teacher=loaded(network(0, classes=5), classes=5, name="a teacher"))
    with pytest.raises(UsageError, match="--amp-dtype must be bfloat16 or float16, not 'int8'"):
        run(model, photographs, amp=True, amp_dtype="int8")
    with pytest.raises(UsageError, match="class number 3, and the model the classes 0 to 2"):
        score_tensors(Table(torch.eye(3)), numbered_images(1), torch.tensor([3]), num_classes=3)
    with pytest.raises(UnavailableError, match="no images"):
        drain(score(Table(torch.eye(3)), [], num_classes=3))
    with pytest.raises(FastDFKDError, match=r"shape \[2, 3\] for 2 images, not logits \[2, 4\]"):
        score_tensors(Table(torch.eye(3)), numbered_images(2), torch.tensor([0, 1]), num_classes=4)
