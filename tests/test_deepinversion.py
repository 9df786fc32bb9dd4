"""DeepInversion: its loss as the paper writes it, against the student; and what becomes of a batch of pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api, losses
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import DeepInversionConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.deepinversion import DeepInversion, to_images
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 3, 1, 1, 2])


def settings(**changes: Any) -> RunConfig:
    few = {"synthesis.steps": 3, **{key.replace("__", "."): value for key, value in changes.items()}}
    return from_dict(few, base=with_method(config(), "deepinversion"))


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> DeepInversion:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, DeepInversion)
    return made


# The loss


def transcribed(pixels: Tensor, model: nn.Module, student: nn.Module, weights: DeepInversionConfig) -> Tensor:
    """The paper's loss in float64, image by image and pixel by pixel."""
    images = 0.5 + 0.25 * pixels
    inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: inputs.append((layer, given[0]))) for layer in norms]
    answers = model(images)
    for hook in hooks:
        hook.remove()
    cross_entropy = -sum(answers.log_softmax(1)[i, c] for i, c in enumerate(LABELS)) / len(LABELS)
    feature = torch.zeros((), dtype=torch.float64)
    for layer, given in inputs:
        rows = given.movedim(1, 0).flatten(1)
        mean = rows.sum(1) / rows.shape[1]
        variance = ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
        feature = feature + ((mean - layer.running_mean) ** 2).sum().sqrt()
        feature = feature + ((variance - layer.running_var) ** 2).sum().sqrt()
    p, q = (logits.div(3.0).softmax(1) for logits in (answers, student(images)))
    m = (p + q) / 2
    divergence = 0.5 * ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean()
    height, width = pixels.shape[2:]
    variation = torch.zeros((), dtype=torch.float64)
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = [
            ((pixels[:, :, y + down, x + right] - pixels[:, :, y, x]) ** 2).sum()
            for y in range(height - down)
            for x in range(max(-right, 0), width - max(right, 0))
        ]
        variation = variation + torch.stack(squares).sum().sqrt()
    return (
        weights.class_weight * cross_entropy
        + weights.feature_weight * feature
        + weights.adversarial_weight * (1 - divergence)
        + weights.tv_weight * variation
        + weights.l2_weight * (pixels**2).sum().sqrt()
    )


def test_the_loss_is_the_papers() -> None:
    """Value, and gradient in the pixels."""
    ours = method(settings(synthesis__l2_weight=0.1, synthesis__tv_weight=0.02, synthesis__adversarial_weight=3.0))
    pixels = torch.randn(5, *SIZE)
    wide = pixels.double().requires_grad_()
    wanted = transcribed(wide, teacher().double(), teacher(1).double(), ours.config)
    (gradient,) = torch.autograd.grad(wanted, wide)
    narrow = pixels.clone().requires_grad_()
    terms = ours.terms(narrow, LABELS, teacher(1), (0, 0), False)
    terms["total"].backward()
    assert terms.keys() == {"class", "feature", "adversarial", "tv", "l2", "total"}
    assert float(terms["total"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert narrow.grad is not None
    torch.testing.assert_close(narrow.grad.double(), gradient, rtol=1e-3, atol=1e-6)


def test_the_images_compete_with_the_student() -> None:
    """Given the teacher in the student's place, the term would be 1 wherever the images lie, and pull nowhere."""
    model = teacher()
    pixels = torch.randn(5, *SIZE).requires_grad_()

    def compete(student: nn.Module) -> tuple[float, float]:
        term = method(model=model).terms(pixels, LABELS, student, (0, 0), False)["adversarial"]
        (gradient,) = torch.autograd.grad(term, pixels)
        return float(term.detach()), float(gradient.abs().max())

    value, pull = compete(teacher(1))
    assert value < 1 - 1e-4
    assert pull > 1e-6
    value, pull = compete(model)
    assert value == pytest.approx(1, abs=1e-6)
    assert pull < 1e-7
    seen: list[int] = []
    student = net(1)
    student.fc.register_forward_hook(lambda *_: seen.append(1))
    before = state_of(student)
    found = method().synthesize(student)
    assert len(seen) == 3
    assert "adversarial" in found.losses
    assert_same_state(before, state_of(student))  # asked, not trained
    assert "adversarial" not in method().synthesize(None).losses


def test_the_teacher_sees_shifted_and_mirrored_images() -> None:
    """A shift goes round the border, and the priors look at the pixels as they stand."""
    ours = method()
    pixels = torch.randn(5, *SIZE)
    moved = torch.cat([pixels[:, :, -1:], pixels[:, :, :-1]], dim=2)  # down by one
    moved = torch.cat([moved[..., 2:], moved[..., :2]], dim=3)  # left by two
    one = ours.terms(pixels, LABELS, None, (1, -2), True)
    other = ours.terms(moved.flip(3), LABELS, None, (0, 0), False)
    for name in ("class", "feature"):
        torch.testing.assert_close(one[name], other[name])
    assert not torch.isclose(one["tv"], other["tv"], rtol=1e-4)


def test_shifts_reach_an_eighth_and_mirroring_can_be_forbidden() -> None:
    ours = method()
    drawn = [ours._draw_jitter() for _ in range(200)]
    assert {down for (down, _), _ in drawn} == {right for (_, right), _ in drawn} == {-1, 0, 1}
    assert {mirror for _, mirror in drawn} == {True, False}
    ours = method(settings(synthesis__flip=False, synthesis__jitter=0.0))
    assert {ours._draw_jitter() for _ in range(50)} == {((0, 0), False)}


# A batch


def test_its_steps_bring_the_loss_down_and_the_best_is_kept() -> None:
    totals: list[float] = []
    batches: list[Tensor] = []

    class Watched(DeepInversion):
        def terms(self, pixels: Tensor, *others: Any) -> dict[str, Tensor]:
            found = super().terms(pixels, *others)
            totals.append(float(found["total"].detach()))
            batches.append(to_images(pixels).detach().mul(255).round().to(torch.uint8))
            return found

    run = settings(
        synthesis__steps=40, synthesis__batch_size=16, synthesis__lr_pixels=0.5, synthesis__feature_weight=0.05
    )
    ours = Watched(run, teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=0)
    batch = ours.synthesize()
    best = min(range(40), key=totals.__getitem__)
    assert totals[best] < 0.8 * totals[0]
    assert best != 39  # or this would say nothing about which is kept
    assert torch.equal(batch.images, batches[best])
    assert float(batch.losses["total"]) == pytest.approx(totals[best])


def test_pixels_stay_images() -> None:
    ours = method(settings(synthesis__lr_pixels=5.0))
    ours.synthesize()
    images = to_images(ours.pixels.detach())
    assert float(images.min()) == 0
    assert float(images.max()) == 1


def test_one_step_gives_the_noise_it_begins_with_and_two_give_more() -> None:
    one = method(settings(synthesis__steps=1)).synthesize()
    two = method(settings(synthesis__steps=2)).synthesize()
    assert one.images.shape == two.images.shape == (4, *SIZE)
    assert float(two.losses["total"]) <= float(one.losses["total"])


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    student = net(1)
    first, second, other = method(), method(), method(seed=1)
    a = [first.synthesize(student) for _ in range(2)]
    b = [second.synthesize(student) for _ in range(2)]
    assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].images, a[1].images)
    assert not torch.equal(a[0].images, other.synthesize(student).images)
    first.slow_down(0.5)
    third = method(seed=5)
    third.synthesize(student)  # what its Adam has seen must not matter
    third.load_state_dict(first.state_dict())
    for _ in range(2):
        x, y = first.synthesize(student), third.synthesize(student)
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)
    assert third.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


# A run


def test_a_whole_run_changes_the_student(tmp_path: Any) -> None:
    student = net(1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    done = api.distill(
        net(), student, teacher_options=ModelOptions(input_size=SIZE), config=settings(), device="cpu", amp=False,
        output=tmp_path / "student",
    )  # fmt: skip
    assert done.report["config"]["method"] == "deepinversion"
    assert done.report["kd_steps"] == 3 * 3
    assert any(not torch.equal(before[name], tensor) for name, tensor in done.student.state_dict().items())
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in done.student.state_dict().values())


def test_it_makes_sets_without_a_student(tmp_path: Any) -> None:
    made = api.synthesize(
        net(), num_images=8, output=tmp_path / "set", teacher_options=ModelOptions(input_size=SIZE), config=settings(),
        device="cpu", amp=False,
    )  # fmt: skip
    assert made.manifest["num_images"] == 8


# Settings


def test_recipes_keep_their_student_and_their_mirror() -> None:
    digits = get_recipe("digits").config((1, 8, 8))
    found = with_method(digits, "deepinversion")
    assert found.distillation == digits.distillation
    assert found.schedule == digits.schedule
    assert isinstance(found.synthesis, DeepInversionConfig)
    assert not found.synthesis.flip
    assert with_method(get_recipe("quick").config((3, 32, 32)), "deepinversion").synthesis == DeepInversionConfig(
        batch_size=128
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"lr_pixels": 0}, {"tv_weight": -1}, {"beta2": 1.0}, {"jitter": 1.0},
        {"feature_weight": 0, "class_weight": 0, "adversarial_weight": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        DeepInversionConfig(**changes)


def test_total_variation_of_a_flat_image_is_nothing() -> None:
    assert float(losses.total_variation(torch.full((2, 3, 5, 4), 0.7))) == 0
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 1, 1] = 1  # two differences in each of four directions
    assert float(losses.total_variation(one)) == pytest.approx(4 * 2**0.5)
