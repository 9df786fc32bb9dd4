"""The loss terms against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdfkd_cli import losses


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax64(x: Tensor, temperature: float = 1.0) -> Tensor:
    e = (x.double() / temperature - (x.double() / temperature).amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def kl64(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


SHAPES = [(6, 5), (3, 5, 4, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_kl_of_equal_outputs_is_zero(shape: tuple[int, ...], temperature: float) -> None:
    p = logits(*shape)
    assert losses.kl_divergence(p, p, temperature).abs().max() == 0
    # A constant added to all logits is no other distribution.
    assert losses.kl_divergence(p, p + 7, temperature).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_kl_is_the_formula(shape: tuple[int, ...], temperature: float) -> None:
    p, q = logits(*shape), logits(*shape, seed=1)
    found = losses.kl_divergence(p, q, temperature)
    expected = kl64(softmax64(p, temperature), softmax64(q, temperature))
    assert found.shape == (shape[0], *shape[2:])
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.min() > 0
    # Not symmetric: the teacher stands first.
    assert not torch.allclose(found, losses.kl_divergence(q, p, temperature), rtol=1e-2)


def test_kl_stays_finite_where_a_probability_underflows() -> None:
    p = torch.tensor([[200.0, 0.0, -200.0]])
    q = torch.tensor([[-200.0, 0.0, 200.0]], requires_grad=True)
    found = losses.kl_divergence(p, q)
    assert found.item() == pytest.approx(400, rel=1e-4)
    found.sum().backward()
    assert torch.isfinite(q.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_jensen_shannon_is_the_formula_and_keeps_its_bounds(shape: tuple[int, ...], temperature: float) -> None:
    p, q = logits(*shape), logits(*shape, seed=1)
    found = losses.jensen_shannon(p, q, temperature)
    a, b = softmax64(p, temperature), softmax64(q, temperature)
    m = (a + b) / 2
    assert torch.allclose(found.double(), (kl64(a, m) + kl64(b, m)) / 2, rtol=1e-4, atol=1e-6)
    assert found.min() >= 0
    assert found.max() <= math.log(2)
    assert torch.allclose(found, losses.jensen_shannon(q, p, temperature))
    assert losses.jensen_shannon(p, p, temperature).abs().max() < 1e-6


def test_jensen_shannon_of_disjoint_outputs_is_ln_2_with_a_finite_gradient() -> None:
    p = torch.tensor([[300.0, 0.0], [0.0, 300.0]])
    q = p.flip(1).requires_grad_()
    found = losses.jensen_shannon(p, q)
    assert torch.allclose(found, torch.full((2,), math.log(2)))
    found.sum().backward()
    assert torch.isfinite(q.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
def test_adversarial_jsd_is_negative_disagreement(shape: tuple[int, ...]) -> None:
    p, q = logits(*shape), logits(*shape, seed=1)
    found = losses.adversarial_jsd(p, q, 2.0)
    assert found.shape == ()
    assert torch.allclose(found, -losses.jensen_shannon(p, q, 2.0).mean())
    assert found < -0.01
    assert losses.adversarial_jsd(p, p).abs() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agreement_kl_is_the_published_term(shape: tuple[int, ...], temperature: float) -> None:
    # The published runs sum KL over classes per image, mask it where the predictions differ, and take the mean over
    # the whole batch, those images included.
    p = logits(*shape)
    q = p + logits(*shape, seed=1, scale=2.0)
    same = p.argmax(1) == q.argmax(1)
    assert 0 < same.sum() < same.numel()
    expected = -(kl64(softmax64(p, temperature), softmax64(q, temperature)) * same).sum() / same.numel()
    found = losses.adversarial_agreement_kl(p, q, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_agreement_kl_leaves_alone_where_they_disagree() -> None:
    p = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    losses.adversarial_agreement_kl(p, q).backward()
    assert p.grad is not None
    assert p.grad[0].abs().sum() > 0
    assert p.grad[1].abs().sum() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 5.0, 20.0])
def test_distillation_has_the_factor_t_squared(shape: tuple[int, ...], temperature: float) -> None:
    p, q = logits(*shape), logits(*shape, seed=1)
    expected = temperature**2 * kl64(softmax64(p, temperature), softmax64(q, temperature)).mean()
    assert losses.distillation(p, q, temperature).item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses.distillation(p, p, temperature) == 0


def test_distillation_has_the_gradient_that_the_literature_gives() -> None:
    # d/dq of T^2 KL is T (softmax(q/T) - softmax(p/T)) / B: of one size at every temperature.
    p = logits(4, 5)
    for temperature in (1.0, 20.0):
        q = logits(4, 5, seed=1).requires_grad_()
        losses.distillation(p, q, temperature).backward()
        expected = temperature * (softmax64(q.detach(), temperature) - softmax64(p, temperature)) / 4
        assert torch.allclose(q.grad.double(), expected, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES)
def test_classification_is_cross_entropy(shape: tuple[int, ...]) -> None:
    p = logits(*shape)
    labels = torch.randint(5, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(2))
    expected = -softmax64(p).gather(1, labels.unsqueeze(1)).log().mean()
    assert losses.classification(p, labels).item() == pytest.approx(expected.item(), rel=1e-5)


Term = Callable[[Tensor, Tensor], Tensor]
TERMS: dict[str, Term] = {
    "jsd": losses.adversarial_jsd,
    "agreement-kl": losses.adversarial_agreement_kl,
    "distillation": lambda p, q: losses.distillation(p, q, 4.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_dense_predictor_is_a_classifier_of_positions(name: str) -> None:
    p, q = logits(2, 5, 3, 4), logits(2, 5, 3, 4, seed=1)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (p, q)]
    assert torch.allclose(TERMS[name](p, q), TERMS[name](*flat), rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_low_precision_logits_are_compared_in_float32(name: str) -> None:
    p, q = logits(4, 5).bfloat16(), logits(4, 5, seed=1).bfloat16()
    found = TERMS[name](p, q)
    assert found.dtype == torch.float32
    assert torch.equal(found, TERMS[name](p.float(), q.float()))


def test_the_adversarial_terms_by_name() -> None:
    p = logits(8, 5)
    q = p + 0.3 * logits(8, 5, seed=1)
    assert set(losses.ADVERSARIAL) == {"agreement-kl", "jsd"}
    assert torch.equal(losses.ADVERSARIAL["jsd"](p, q, 2.0), losses.adversarial_jsd(p, q, 2.0))
    assert torch.equal(losses.ADVERSARIAL["agreement-kl"](p, q, 2.0), losses.adversarial_agreement_kl(p, q, 2.0))


def test_distillation_follows_torchs_own_kl() -> None:
    p, q = logits(6, 5), logits(6, 5, seed=1)
    torchs = F.kl_div(F.log_softmax(q / 4, 1), F.softmax(p / 4, 1), reduction="batchmean") * 16
    assert torch.allclose(losses.distillation(p, q, 4.0), torchs, rtol=1e-5)
