"""DFND: which images are kept of an unlabelled set, the noisy loss and its matrix, and a run that goes on with both."""

from __future__ import annotations

import copy
import io
import json
import math
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdfkd_cli import api, losses, stopping
from fastdfkd_cli.config import DistillationConfig, from_dict
from fastdfkd_cli.dataset.reader import image_files
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.method_config import DFNDConfig
from fastdfkd_cli.methods.dfnd import choose, doubt, surest
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.noise import NoiseMatrix
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.processes import Group
from fastdfkd_cli.recipes import get_recipe, with_method
from fastdfkd_cli.resume import checkpoint_folder
from fastdfkd_cli.stopping import Stopped
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, config, net, teacher

CPU = torch.device("cpu")
FED = ModelOptions(input_size=SIZE, num_classes=CLASSES)
WITH = DistillationConfig(batch_size=4, temperature=2.0, lr=0.05, noise_weight=3.0, noise_accuracy=0.9, noise_lr=0.1)
KEPT = {"method": "dfnd", "synthesis.images_kept": 6}


@pytest.fixture(autouse=True)
def no_request() -> Iterator[None]:
    yield
    assert not stopping.asked()


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def folder_of(path: Path, images: Tensor) -> Path:
    """Images flat in a folder and in folders of their own, whose names mean nothing."""
    (path / "holiday").mkdir(parents=True)
    for index, image in enumerate(images):
        where = path / "holiday" if index % 2 else path
        (where / f"{index}.png").write_bytes(png(image))
    return path


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "wild", noise(13))


# Which images are kept


class Brightness(nn.Module):
    """Sure of bright images; of dark ones, not. Class 1 where red is above green."""

    def forward(self, x: Tensor) -> Tensor:
        red, green = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
        sign = torch.where(red > green, 1.0, -1.0)
        margin = sign * x.mean((1, 2, 3)) * 10
        return torch.stack([-margin, margin, torch.full_like(margin, -20)], dim=1)


def grey(values: list[int]) -> Tensor:
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].repeat(1, *SIZE)
    images[::2, 0] += 2  # every other one is reddish
    return images


def chosen(path: Path, keep: int, model: nn.Module | None = None, **changes: Any) -> Any:
    files = image_files(path, "--unlabeled-dir")
    return choose(
        model or Brightness(), files,
        **{"keep": keep, "image_size": SIZE, "interpolation": "bilinear", "batch_size": 4, "device": CPU, **changes},
    )  # fmt: skip


def test_the_teacher_s_surest_images_are_kept(tmp_path: Path) -> None:
    values = [10, 200, 50, 120, 90, 240, 30]
    images = grey(values)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for index, image in enumerate(images):
            info = tarfile.TarInfo(f"{index}.png")
            content = png(image)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = chosen(path, 3)
    assert found.positions.tolist() == [1, 3, 5]
    assert torch.equal(found.images, images[[1, 3, 5]])
    assert found.labels.tolist() == [0, 0, 0]
    logits = Brightness()(images[[1, 3, 5]].double() / 255)
    wanted = -logits.softmax(1).max(1).values.log()
    torch.testing.assert_close(found.scores.double(), wanted, rtol=1e-3, atol=1e-6)
    # All of them, where there are no more, with the teacher's answers.
    for keep in (7, 100):
        found = chosen(path, keep)
        assert torch.equal(found.images, images)
        assert found.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]


def test_an_image_is_not_kept_for_its_place_where_the_score_rounds_to_nothing() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0], [0.0, 40.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 60.0]])
    scores = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="none")
    assert scores[0] == scores[1] == scores[3] == 0
    odds, answers = doubt(logits)
    assert answers.tolist() == [0, 1, 1, 2]
    assert surest(odds, 1).tolist() == [3]
    assert surest(odds, 2).tolist() == [1, 3]
    precise = -logits.double().log_softmax(1).max(1).values
    torch.testing.assert_close(nn.functional.softplus(odds.double()), precise, rtol=1e-2, atol=1e-15)
    assert surest(torch.tensor([2.0, 1.0, 1.0, 1.0]), 2).tolist() == [1, 2]


def test_a_piece_at_a_time_is_as_all_at_once(wild: Path) -> None:
    counts: list[int] = []
    whole = chosen(wild, 6, teacher(), batch_size=100)
    for size in (1, 5):
        found = chosen(wild, 6, teacher(), batch_size=size, on_scored=counts.append)
        assert torch.equal(found.positions, whole.positions)
        assert torch.equal(found.images, whole.images)
        assert torch.equal(found.labels, whole.labels)
    assert counts == [*range(1, 14), 5, 10, 13]


def test_memory_holds_what_is_kept_and_no_more(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.dataset.reader.available_memory", lambda: 6 * math.prod(SIZE))
    call: dict[str, Any] = {"unlabeled_dir": wild, "config": config(), "device": "cpu", "amp": False}
    call |= {"teacher_options": FED}
    api.distill(net(), net(1), overrides=KEPT, **call)
    with pytest.raises(FastDFKDError, match=r"--unlabeled-dir .* 7 images .*Keep fewer of them: synthesis.images_kept"):
        api.distill(net(), net(1), overrides={**KEPT, "synthesis.images_kept": 7}, **call)


# The noisy loss


def transition(weight: Tensor, accuracy: float) -> Tensor:
    """Q, entry by entry: the accuracy on the diagonal, and the rest of each row by a softmax over the other classes."""
    classes = len(weight)
    rows = []
    for i in range(classes):
        total = sum(weight[i, j].exp() for j in range(classes) if j != i)
        row = [
            torch.tensor(accuracy, dtype=weight.dtype) if i == j else (1 - accuracy) * weight[i, j].exp() / total
            for j in range(classes)
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_the_noisy_loss_is_that_of_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    student = torch.randn(6, CLASSES, generator=rng) * 3
    labels = torch.tensor([0, 1, 2, 3, 3, 1])
    matrix = NoiseMatrix(CLASSES, 0.9, 0.1, CPU)
    with torch.no_grad():
        matrix.weight.copy_(torch.randn(CLASSES, CLASSES, generator=rng))
    ours = student.clone().requires_grad_()
    value = losses.noisy_classification(ours, labels, matrix.log())
    value.backward()
    logits, weight = student.double().requires_grad_(), matrix.weight.detach().double().requires_grad_()
    q = transition(weight, 0.9)
    torch.testing.assert_close(matrix.log().exp().double(), q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q.sum(1), torch.ones(CLASSES, dtype=torch.float64))
    wanted = -torch.stack([((row.exp() / row.exp().sum()) @ q)[y] for row, y in zip(logits, labels, strict=True)]).log()
    wanted.mean().backward()
    torch.testing.assert_close(value.double(), wanted.mean(), rtol=1e-5, atol=1e-7)
    assert ours.grad is not None
    assert logits.grad is not None
    assert matrix.weight.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(ours.grad.double(), logits.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(matrix.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-7)
    assert not matrix.weight.grad.diagonal().any()
    # A dense prediction is as many images as it has positions.
    dense = losses.noisy_classification(student.T.reshape(1, CLASSES, 2, 3), labels.reshape(1, 2, 3), matrix.log())
    torch.testing.assert_close(dense, value)


def test_a_student_that_is_surely_wrong_gives_a_finite_loss() -> None:
    student = torch.tensor([[200.0, -200.0, 0.0, 0.0]], requires_grad=True)
    value = losses.noisy_classification(student, torch.tensor([1]), NoiseMatrix(CLASSES, 0.95, 1e-3, CPU).log())
    assert float(value.detach()) == pytest.approx(-math.log(0.05 / 3), rel=1e-4)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_step_is_plain_distillation_and_the_weighted_noisy_loss() -> None:
    model, student, reference = teacher(), net(1), net(1)
    images = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(3))
    trained = Student(student, WITH, CPU, amp=False, num_classes=CLASSES)
    logits, own = model(images), reference.train()(images)
    first = NoiseMatrix(CLASSES, 0.9, 0.1, CPU)
    wanted = losses.distillation(logits, own, 2.0)
    wanted = wanted + 3 * losses.noisy_classification(own, logits.argmax(1), first.log())
    loss, _ = trained.learn(model, images, 0)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    wanted.backward()
    for (name, parameter), other in zip(student.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other[1].grad, msg=name)
    first.optimizer.step()
    assert trained.noise is not None
    torch.testing.assert_close(trained.noise.weight, first.weight)
    assert trained.noise.weight.any()
    # The labels are the teacher's, kept or not.
    again = Student(net(1), WITH, CPU, amp=False, num_classes=CLASSES)
    assert torch.equal(again.learn(logits, images, 0)[0], loss)


def test_the_matrix_learns_what_the_teacher_mistakes() -> None:
    """Images of class 0 are called 1 now and then, and nothing else is."""
    matrix = NoiseMatrix(3, 0.9, 0.05, CPU)
    student = torch.eye(3).repeat(10, 1) * 20
    labels = torch.arange(3).repeat(10)
    labels[0] = 1
    for _ in range(200):
        matrix.optimizer.zero_grad()
        losses.noisy_classification(student, labels, matrix.log()).backward()
        matrix.optimizer.step()
    q = matrix.log().exp()
    assert q[0, 1] > 0.09 > 0.01 > q[0, 2]
    torch.testing.assert_close(q.diagonal(), torch.full((3,), 0.9))
    torch.testing.assert_close(q[1, 0], q[1, 2], rtol=0, atol=0.005)


def test_trial_steps_leave_the_matrix_alone() -> None:
    trained = Student(net(1), WITH, CPU, amp=False, num_classes=CLASSES)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with trained.tried():
        trained.learn(teacher(), torch.rand(4, *SIZE), 0)
        assert not torch.equal(trained.state_dict()["noise.weight"], before["noise.weight"])
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_several_processes_send_the_matrix_s_gradient_too() -> None:
    trained = Student(net(1), WITH, CPU, amp=False, group=Group(), num_classes=CLASSES)
    trained.learn(teacher(), torch.rand(4, *SIZE), 0)
    assert trained.noise is not None
    assert any(gradient is trained.noise.weight.grad for gradient in trained._gradients())


# Runs


def engine(seed: int = 1) -> Distillation:
    pool = ImagePool.holding(noise(10), torch.arange(10) % CLASSES, CPU)
    settings = config(distillation__noise_weight=1.0, distillation__noise_lr=0.05, distillation__average="ema")
    return Distillation(
        settings, teacher(), net(seed, dropout=0.3), synthesizer=None, image_size=SIZE, device=CPU, amp=False, pool=pool
    )


def test_a_run_goes_on_with_its_matrix_bit_for_bit() -> None:
    torch.manual_seed(0)
    whole = engine()
    list(whole)

    class Border(Exception):
        pass

    for border in (1, 5, 9):
        torch.manual_seed(0)
        run = engine()
        seen = 0

        def stop(border: int = border) -> None:
            nonlocal seen
            seen += 1
            if seen == border:
                raise Border

        run.at_border = stop
        with pytest.raises(Border):
            list(run)
        tensors, values = run.state()
        assert tensors["student.noise.weight"].any()
        tensors, values = copy.deepcopy(tensors), json.loads(json.dumps(values))
        again = engine(2)
        again.take_up(tensors, values, run.pool.parts([], images=False))
        list(again)
        for name, tensor in whole.student.state_dict().items():
            assert torch.equal(tensor, again.student.state_dict()[name]), name


def distill(path: Path | None, **changes: Any) -> api.DistillResult:
    call: dict[str, Any] = {
        "teacher_options": FED, "config": config(), "overrides": KEPT, "device": "cpu", "amp": False,
        "unlabeled_dir": path, **changes,
    }  # fmt: skip
    return api.distill(net(), call.pop("student", net(1)), **call)


def test_a_run_keeps_some_images_and_says_so(wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.distill_run.build_method", lambda *_, **__: pytest.fail("images were made"))
    said: list[str] = []
    student = net(1)
    before = copy.deepcopy(student.state_dict())
    report = distill(wild, student=student, output=tmp_path / "out", on_message=said.append).report
    assert report["config"]["method"] == "dfnd"
    assert (report["config"]["distillation"]["noise_weight"], report["config"]["distillation"]["temperature"]) == (1, 4)
    assert (report["images"], report["pool"], report["seconds"]["synthesis"]) == (6, 6, 0)
    assert report["data"] == {"path": str(wild), "synthetic": False, "header": None, "candidates": 13}
    assert report["kd_steps"] == 4 * 3
    assert any(line.startswith("6 of 13 images are kept") for line in said)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert len(weights) == len(before)  # the matrix stays behind
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| method | dfnd |" in card
    assert "of 13 unlabelled images of which the teacher is surest, by DFND (Chen" in card
    assert str(wild) in card
    assert "data-free" not in card


def test_a_killed_run_goes_on_and_not_with_another_folder(
    wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(wild, output=tmp_path / "whole")
    step, seen = Distillation.kd_step, 0

    def kd_step(self: Distillation) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            assert stopping.ask(signal.SIGTERM)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "kd_step", kd_step)
        with pytest.raises(Stopped):
            distill(wild, output=tmp_path / "parts")
    other = folder_of(tmp_path / "other", noise(13, seed=1))
    with pytest.raises(UsageError, match=r"data\.sha256"):
        distill(other, output=tmp_path / "parts", resume="auto")
    with pytest.raises(UsageError, match=r"images_kept|data"):
        distill(wild, output=tmp_path / "parts", resume="auto", overrides={**KEPT, "synthesis.images_kept": 5})
    said: list[str] = []
    distill(wild, output=tmp_path / "parts", resume="auto", student=net(2), on_message=said.append)
    assert any(line.startswith("going on after") for line in said)
    assert not checkpoint_folder(tmp_path / "parts").exists()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_synthetic_set_is_a_set_of_images_too(tmp_path: Path) -> None:
    call: dict[str, Any] = {"teacher_options": FED, "config": config(), "device": "cpu", "amp": False}
    api.synthesize(net(), num_images=9, output=tmp_path / "set", shard_size=4, **call)
    assert distill(tmp_path / "set", overrides={"method": "dfnd"}).report["images"] == 9  # and none of its pictures
    (tmp_path / "set" / "train-00001.tar").write_bytes(b"")
    with pytest.raises(UnavailableError, match=r"train-00001\.tar"):
        distill(tmp_path / "set")


def test_a_plan_scores_nothing(wild: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.methods.dfnd.choose", lambda *_, **__: pytest.fail("images were scored"))
    plan = api.plan_distill(
        net(), net(1), teacher_options=FED, config=config(), overrides=KEPT, unlabeled_dir=wild, device="cpu", amp=False
    )
    assert (plan["synthetic_images"], plan["inner_steps"], plan["kd_steps"]) == (6, 0, 12)


def test_the_noisy_loss_goes_with_any_method() -> None:
    call: dict[str, Any] = {"teacher_options": FED, "device": "cpu", "amp": False}
    found = []
    for weight in (0.0, 1.0):
        student = net(1)
        api.distill(net(), student, config=config(distillation__noise_weight=weight, quality_images=0), **call)
        found.append(student.fc.weight.detach().clone())
    assert not torch.equal(*found)


def test_a_recipe_s_dfnd_is_its_student_with_the_published_loss() -> None:
    digits = get_recipe("digits").config((1, 8, 8))
    found = with_method(digits, "dfnd")
    assert found.synthesis == DFNDConfig(batch_size=128)
    assert found.synthesis.images_kept == 600_000
    assert found.distillation == replace(digits.distillation, temperature=4.0, noise_weight=1.0)
    assert found.schedule == digits.schedule


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {}}, r"--unlabeled-dir is what --method dfnd chooses its images from"),
        ({"overrides": {"method": "kd"}}, r"name that method, or distil on all of the images with --data-dir"),
        ({"unlabeled_dir": None}, r"chooses its images from an unlabelled set: name it with --unlabeled-dir\.$"),
        ({"data_dir": "."}, r"leave --data-dir out"),
        ({"unlabeled_dir": None, "data_dir": "."}, r"name it with --unlabeled-dir, and leave --data-dir out"),
        ({"unlabeled_dir": "nowhere"}, r"--unlabeled-dir nowhere does not exist"),
        ({"overrides": {**KEPT, "synthesis.images_kept": 0}}, r"synthesis.images_kept must be greater than 0"),
        ({"overrides": {**KEPT, "synthesis.steps": 3}}, r"steps"),
    ],
)
def test_what_makes_no_sense_is_refused(wild: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, UnavailableError), match=message):
        distill(wild, **changes)


def test_a_folder_without_images_and_one_with_a_broken_one_are_refused(wild: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnavailableError, match=r"--unlabeled-dir .*empty holds no images"):
        distill(tmp_path / "empty")
    (wild / "broken.png").write_bytes(b"no image")
    with pytest.raises(UnavailableError, match=r"broken\.png cannot be decoded"):
        distill(wild)


def test_dfnd_synthesises_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there are none to synthesise\. Use fastdfkd distill"):
        api.synthesize(
            net(),
            num_images=4,
            output=tmp_path / "set",
            teacher_options=FED,
            config=config(),
            overrides=KEPT,
            amp=False,
        )


@pytest.mark.parametrize(
    ("key", "value"), [("noise_weight", -1.0), ("noise_accuracy", 1.0), ("noise_accuracy", 0.0), ("noise_lr", 0.0)]
)
def test_settings_of_the_noisy_loss_are_checked(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"distillation\.{key} must be"):
        from_dict({f"distillation.{key}": value})
