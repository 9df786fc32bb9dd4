"""DFQ: its four terms, the adversarial one against the student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdfkd_cli import api
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import DFQConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.dfq import DFQ
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")


def settings(**changes: Any) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return from_dict(changed, base=with_method(config(), "dfq"))


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> DFQ:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, DFQ)
    return made


def test_the_loss_is_the_sum_of_its_terms() -> None:
    """Each in float64, and the gradient of the weighted sum in the images."""
    model, student = teacher().double(), teacher(1).double()
    images = torch.rand(5, *SIZE).double().requires_grad_()

    def distance(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return (mean - norm.running_mean).norm() + (var - norm.running_var).norm()

    first = model.conv1(images)
    second = model.conv2(torch.relu(model.bn1(first)))
    feature = distance(first, model.bn1) + distance(second, model.bn2)
    p, q = (net(images).softmax(1) for net in (model, student))
    adversarial = -(p * (p / q).log()).sum(1).mean()
    one_hot = -p.max(1).values.log().mean()
    balance = (p.mean(0) * p.mean(0).log()).sum()
    wanted = 0.5 * adversarial + 2 * feature + 0.3 * one_hot + 7 * balance
    (gradient,) = torch.autograd.grad(wanted, images)
    weights = {"adversarial_weight": 0.5, "feature_weight": 2, "class_weight": 0.3, "balance_weight": 7}
    ours = method(settings(**{f"synthesis__{name}": value for name, value in weights.items()}))
    varied = images.detach().float().requires_grad_()
    terms, total, _ = ours.terms(varied, teacher(1))
    total.backward()
    expected = {"adversarial": adversarial, "feature": feature, "class": one_hot, "balance": balance}
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        assert float(terms[name].detach()) == pytest.approx(float(term.detach()), rel=1e-4)
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-3, atol=1e-6)
    ours.close()


def test_the_generator_plays_against_the_student() -> None:
    """Given the teacher in the student's place, there would be nothing to play for."""
    images, model = torch.rand(4, *SIZE), teacher()
    ours = method(model=model)
    assert float(ours.terms(images, teacher(1))[0]["adversarial"]) < -1e-3
    assert float(ours.terms(images, model)[0]["adversarial"]) == pytest.approx(0, abs=1e-6)
    student = net(1)
    before = state_of(student)
    ours.synthesize(student)
    assert_same_state(before, state_of(student))  # asked, not trained


def test_its_steps_lower_the_loss() -> None:
    student, ours = net(1), method(settings(synthesis__batch_size=64, synthesis__lr_generator=0.01))
    figures = [float(ours.synthesize(student).losses["total"]) for _ in range(60)]
    assert sum(figures[-10:]) < sum(figures[:10]) - 1


def test_a_term_of_weight_0_is_left_out_and_feature_asks_for_batch_norm(tmp_path: Any) -> None:
    plain = teacher(norm=False)
    ours = method(settings(synthesis__feature_weight=0, synthesis__class_weight=0), plain)
    assert ours.terms(torch.rand(4, *SIZE), teacher(1))[0].keys() == {"adversarial", "balance"}
    with pytest.raises(UsageError, match="--set synthesis.feature_weight=0"):
        api.distill(
            net(norm=False), net(1), teacher_options=ModelOptions(input_size=SIZE), config=config(quality_images=0),
            overrides={"method": "dfq"}, output=tmp_path / "out", device="cpu", amp=False,
        )  # fmt: skip


def test_one_seed_is_one_run_and_a_state_goes_on_with_it() -> None:
    student = net(1)
    first, second = method(), method()
    for _ in range(3):
        assert torch.equal(first.synthesize(student).images, second.synthesize(student).images)
    third = method(seed=5)
    third.load_state_dict(first.state_dict())
    for _ in range(2):
        assert torch.equal(first.synthesize(student).images, third.synthesize(student).images)
        assert torch.equal(first.training_batch(6), third.training_batch(6))


def test_a_whole_run(tmp_path: Any) -> None:
    student = net(1)
    before = student.fc.weight.detach().clone()
    report = api.distill(
        net(), student, teacher_options=ModelOptions(input_size=SIZE), config=config(schedule__kd_steps_per_round=10),
        overrides={"method": "dfq"}, output=tmp_path / "student", device="cpu", amp=False,
    ).report  # fmt: skip
    assert report["kd_steps"] == 30
    assert report["config"]["schedule"]["kd_steps_per_round"] == 10
    assert not torch.equal(before, student.fc.weight)
    assert all(torch.isfinite(each).all() for each in student.state_dict().values())


def test_published_settings() -> None:
    found = with_method(get_recipe("auto").config((3, 32, 32)), "dfq")
    assert found.synthesis == DFQConfig(batch_size=256)
    assert (found.schedule.kd_steps_per_round, found.kd_steps) == (10, 80_000)
    names = ("adversarial_weight", "feature_weight", "class_weight", "balance_weight")
    for changes in ({"feature_weight": -1}, {"adversarial_temperature": 0}, dict.fromkeys(names, 0)):
        with pytest.raises(UsageError, match="synthesis"):
            DFQConfig(**changes)
