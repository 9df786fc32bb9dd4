"""ZSKT: its generator climbs the student's divergence, its student descends with attention transfer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastdfkd_cli import api
from fastdfkd_cli.config import RunConfig, from_dict
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.method_config import ZSKTConfig
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.methods.zskt import ZSKT
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.recipes import get_recipe, with_method
from tiny import CLASSES, SIZE, assert_same_state, config, net, state_of, teacher

CPU = torch.device("cpu")


def settings(**changes: Any) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return from_dict(changed, base=with_method(config(), "zskt"))


def method(run: RunConfig | None = None, model: nn.Module | None = None, seed: int = 0) -> ZSKT:
    made = build_method(
        run or settings(), model or teacher(), image_size=SIZE, num_classes=CLASSES, device=CPU, amp=False, seed=seed
    )
    assert isinstance(made, ZSKT)
    return made


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_papers(temperature: float) -> None:
    """-D_KL(T || S) in float64, and its gradient in the images."""
    model, student = teacher().double(), teacher(1).double()
    images = torch.rand(5, *SIZE).double().requires_grad_()
    p, q = ((net(images) / temperature).exp() for net in (model, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    wanted = -sum(p[i, c] * (p[i, c] / q[i, c]).log() for i in range(5) for c in range(CLASSES)) / 5
    (gradient,) = torch.autograd.grad(wanted, images)
    varied = images.detach().float().requires_grad_()
    terms, total, _ = method(settings(synthesis__adversarial_temperature=temperature)).terms(varied, teacher(1))
    total.backward()
    assert terms.keys() == {"adversarial"}
    assert float(total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert varied.grad is not None
    torch.testing.assert_close(varied.grad.double(), gradient, rtol=1e-3, atol=1e-6)


def test_the_generator_plays_against_the_student() -> None:
    """Given the teacher in the student's place, there would be nothing to play for."""
    images = torch.rand(4, *SIZE)
    model, student = teacher(), net(1)
    assert float(method(model=model).terms(images, teacher(1))[1]) < -1e-3
    assert float(method(model=model).terms(images, model)[1]) == pytest.approx(0, abs=1e-6)
    before = state_of(student)
    ours = method(settings(synthesis__batch_size=64, synthesis__lr_generator=0.01), model)
    figures = [float(ours.synthesize(student).losses["adversarial"]) for _ in range(60)]
    assert sum(figures[-10:]) < sum(figures[:10]) - 0.1
    assert_same_state(before, state_of(student))  # asked, not trained


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


def test_a_whole_run_with_attention_transfer(tmp_path: Any) -> None:
    student = net(1)
    before = student.fc.weight.detach().clone()
    report = api.distill(
        net(), student, teacher_options=ModelOptions(input_size=SIZE), config=config(), overrides={"method": "zskt"},
        output=tmp_path / "student", device="cpu", amp=False,
    ).report  # fmt: skip
    assert report["config"]["distillation"]["attention_weight"] == 250
    assert report["config"]["distillation"]["temperature"] == 1
    assert not torch.equal(before, student.fc.weight)
    assert all(torch.isfinite(each).all() for each in student.state_dict().values())
    assert state_of(student)["hooks"] == 0


def test_published_settings() -> None:
    found = with_method(get_recipe("auto").config((3, 32, 32)), "zskt")
    assert found.synthesis == ZSKTConfig(batch_size=256)
    assert found.generator.latent_dim == 256
    assert (found.schedule.kd_steps_per_round, found.kd_steps) == (5, 80_000)
    assert found.distillation.attention_weight == 250
    digits = with_method(get_recipe("digits").config((1, 8, 8)), "zskt")
    assert digits.distillation.attention_weight == 250 / 16  # maps of a sixteenth of the positions
    with_labels = from_dict({"distillation.label_views": 4}, base=get_recipe("auto").config((3, 32, 32)))
    assert with_method(with_labels, "zskt").distillation.label_views == 0
    with pytest.raises(UsageError, match=r"synthesis.adversarial_temperature must be greater than 0"):
        ZSKTConfig(adversarial_temperature=0)
    with pytest.raises(UsageError, match="against a student"):
        api.synthesize(
            net(), num_images=8, output="unused", teacher_options=ModelOptions(input_size=SIZE), config=config(),
            overrides={"method": "zskt"}, device="cpu", amp=False,
        )  # fmt: skip
