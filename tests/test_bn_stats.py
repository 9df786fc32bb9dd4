"""The feature term: Eq. 13 to 15, its gradient, and that nothing of it stays on a teacher."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fastdfkd_cli import bn_stats
from fastdfkd_cli.bn_stats import BatchNormStatistics, batch_norm_layers, channel_moments
from tiny import hooks_on, state_of, teacher


def images(seed: int = 0, count: int = 5) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def moments64(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance of each BatchNorm layer's input, in float64, by the textbook."""
    inputs: list[Tensor] = []
    layers = batch_norm_layers(model).values()
    handles = [layer.register_forward_pre_hook(lambda _, a: inputs.append(a[0].detach().double())) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    flat = [each.transpose(0, 1).flatten(1) for each in inputs]
    return [(each.sum(1) / each.shape[1], ((each - each.mean(1, keepdim=True)) ** 2).mean(1)) for each in flat]


def distance64(model: nn.Module, moments: list[tuple[Tensor, Tensor]]) -> float:
    """Eq. 13's feature term for given statistics."""
    total = 0.0
    for layer, (mean, var) in zip(batch_norm_layers(model).values(), moments, strict=True):
        total += ((mean - layer.running_mean.double()) ** 2).sum().sqrt().item()  # type: ignore[operator, union-attr]
        total += ((var - layer.running_var.double()) ** 2).sum().sqrt().item()  # type: ignore[operator, union-attr]
    return total


# Which layers


def test_layers_with_running_statistics_are_found_whatever_their_class() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.BatchNorm2d(2),
            "vector": nn.BatchNorm1d(2),
            "volume": nn.BatchNorm3d(2),
            "synchronised": nn.SyncBatchNorm(2),
            "timms": BatchNormAct2d(2),
            "frozen": FrozenBatchNorm2d(2),
            "deep": nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)),
            "forgetful": nn.BatchNorm2d(2, track_running_stats=False),
            "group": nn.GroupNorm(1, 2),
            "layer": nn.LayerNorm(2),
        }
    )
    assert list(batch_norm_layers(model)) == [
        "plain", "vector", "volume", "synchronised", "timms", "frozen", "deep.1"
    ]  # fmt: skip


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer with running statistics"):
        BatchNormStatistics(teacher(norm=False))


# The moments and their gradient

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (1, 2, 3, 3), (6, 1, 1, 1)])
def test_moments_and_gradient_are_those_of_var_mean(layout: str, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 2).contiguous(
        memory_format=LAYOUTS[layout]
    )
    weights = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    mean, var = channel_moments(ours)
    var64, mean64 = torch.var_mean(theirs, dim=(0, 2, 3), correction=0)
    assert torch.allclose(mean.double(), mean64, rtol=1e-5, atol=1e-6)
    assert torch.allclose(var.double(), var64, rtol=1e-4, atol=1e-6)
    (weights[0] * mean + weights[1] * var).sum().backward()
    (weights[0] * mean64 + weights[1] * var64).sum().backward()
    assert torch.allclose(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (2, 2, 2, 3), (2, 2, 2, 2, 2)])
def test_the_derivative_holds_against_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(channel_moments, (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_activations_are_averaged_in_float32(layout: str) -> None:
    x = (torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    wide = x.detach().double().requires_grad_()
    mean, var = channel_moments(x)
    assert (mean.dtype, var.dtype) == (torch.float32, torch.float32)
    var64, mean64 = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    # 16,384 values: an average kept in bf16 would be off by percents.
    assert torch.allclose(mean.double(), mean64, rtol=1e-4)
    assert torch.allclose(var.double(), var64, rtol=1e-4)
    (mean.sum() + var.sum()).backward()
    (mean64.sum() + var64.sum()).backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad.double() - wide.grad).norm() / wide.grad.norm() < 1e-2


def test_half_precision_is_widened_too() -> None:
    x = (torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 1).half()
    mean, var = channel_moments(x)
    var64, mean64 = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    assert mean.dtype == torch.float32
    assert torch.allclose(mean.double(), mean64, rtol=1e-4)
    assert torch.allclose(var.double(), var64, rtol=1e-4)


# Eq. 13 to 15


def test_the_term_is_zero_at_the_running_statistics() -> None:
    model, x = teacher(), images()
    for layer in batch_norm_layers(model).values():
        # Layer by layer: what a layer gives on depends on what it remembers.
        index = list(batch_norm_layers(model).values()).index(layer)
        mean, var = moments64(model, x)[index]
        layer.running_mean.copy_(mean)  # type: ignore[operator, union-attr]
        layer.running_var.copy_(var)  # type: ignore[operator, union-attr]
    x.requires_grad_()
    with BatchNormStatistics(model) as statistics:
        loss = statistics.loss(statistics.observe(x)[1])
    assert loss < 1e-5
    loss.backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]


def test_the_term_has_a_gradient_at_its_exact_zero() -> None:
    model = nn.BatchNorm1d(2).eval()
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)  # mean 0, variance 1: a new layer's memory
    with BatchNormStatistics(model) as statistics:
        loss = statistics.loss(statistics.observe(x)[1])
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(2, 2))  # type: ignore[arg-type]


def test_equation_13() -> None:
    model, x = teacher(), images()
    with BatchNormStatistics(model) as statistics:
        loss = statistics.loss(statistics.observe(x)[1])
    assert loss.item() == pytest.approx(distance64(model, moments64(model, x)), rel=1e-4)
    assert loss > 0.01


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_equations_14_and_15(momentum: float) -> None:
    model = teacher()
    accumulated: list[tuple[Tensor, Tensor]] | None = None
    with BatchNormStatistics(model, momentum) as statistics:
        for seed in range(4):
            # Two inner steps: only the last one's statistics count for Eq. 14.
            for inner in range(2):
                x = images(10 * seed + inner) * (0.5 + 0.3 * seed)
                output, moments = statistics.observe(x)
                assert torch.equal(output, model(x))
                now = moments64(model, x)
                mixed = now
                if accumulated is not None:
                    pairs = zip(accumulated, now, strict=True)
                    mixed = [
                        (momentum * a[0] + (1 - momentum) * b[0], momentum * a[1] + (1 - momentum) * b[1])
                        for a, b in pairs
                    ]
                assert statistics.loss(moments).item() == pytest.approx(distance64(model, mixed), rel=1e-4)
            statistics.accumulate(moments)
            accumulated = mixed
    assert accumulated is not None
    expected = torch.cat([mean for mean, _ in accumulated] + [var for _, var in accumulated])
    assert torch.allclose(statistics.state_dict()["accumulated"].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_flows_through_the_batch_alone() -> None:
    # Eq. 15's accumulated part is constant, so the gradient is (1 - its weight) times as long in a linear regime.
    model = nn.Sequential(nn.BatchNorm2d(1)).eval()
    x = images()[:, :1]
    with BatchNormStatistics(model, 0.9) as statistics:
        statistics.accumulate(statistics.observe(x)[1])
        y = x.clone().requires_grad_()
        statistics.loss(statistics.observe(y)[1]).backward()
    z = x.clone().requires_grad_()
    with BatchNormStatistics(model) as plain:
        plain.loss(plain.observe(z)[1]).backward()
    assert torch.allclose(y.grad, 0.1 * z.grad, rtol=1e-4, atol=1e-8)  # type: ignore[arg-type, operator]


def test_without_momentum_nothing_is_kept() -> None:
    model = teacher()
    with BatchNormStatistics(model) as statistics:
        statistics.accumulate(statistics.observe(images(0))[1])
        loss = statistics.loss(statistics.observe(images(1))[1])
    assert loss.item() == pytest.approx(distance64(model, moments64(model, images(1))), rel=1e-4)
    assert not statistics.state_dict()["accumulated"].any()


def test_only_an_observed_call_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = teacher()
    read: list[int] = []
    moments = bn_stats._moments
    monkeypatch.setattr(bn_stats, "_moments", lambda x: (read.append(1), moments(x))[1])
    with BatchNormStatistics(model) as statistics:
        model(images())
        assert not read
        statistics.observe(images())
        assert len(read) == 2
        model(images())
        assert len(read) == 2


def test_a_model_whose_layers_do_not_run_is_told() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with BatchNormStatistics(Idle()) as statistics, pytest.raises(RuntimeError, match="no BatchNorm layer"):
        statistics.observe(images())


def test_a_layer_that_runs_twice_counts_twice() -> None:
    layer = nn.BatchNorm2d(3).eval()
    x = images()
    with BatchNormStatistics(nn.Sequential(layer, layer)) as statistics:
        output, moments = statistics.observe(x)
        loss = statistics.loss(moments)
    assert moments.shape == (12,)
    once = distance64(layer, moments64(layer, x))
    # What the first call gives out is all but what it took in: mean 0 and variance 1 are remembered.
    assert loss.item() == pytest.approx(2 * once, rel=1e-3)
    assert output.shape == x.shape


def test_shifted_moments_are_the_moments() -> None:
    x = 50 + torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, var = channel_moments(x)
    for centre in (torch.full((3,), 49.0), mean):
        shifted = bn_stats.shifted_moments(x, centre)
        assert torch.allclose(shifted[0], mean, rtol=1e-5)
        assert torch.allclose(shifted[1], var, rtol=1e-3)


def test_the_term_reaches_the_images_through_a_frozen_teacher() -> None:
    model, x = teacher(), images().requires_grad_()
    with BatchNormStatistics(model, 0.9) as statistics:
        statistics.loss(statistics.observe(x)[1]).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 6, 2), (2, 5, 3, 3), (16, 3, 8, 8)])
def test_an_observed_layer_is_the_library_s_layer(layout: str, affine: bool, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm2d(shape[1], affine=affine).double().eval()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name != "num_batches_tracked":
                tensor.uniform_(0.5, 2, generator=rng)
    layer.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, generator=rng).contiguous(memory_format=LAYOUTS[layout])
    weights = [
        torch.randn(shape, dtype=torch.float64, generator=rng),
        *torch.randn(2, shape[1], generator=rng).double(),
    ]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with BatchNormStatistics(layer) as statistics:
        output, moments = statistics.observe(ours)
    mean, var = moments.chunk(2)
    wanted = layer(theirs)
    var64, mean64 = torch.var_mean(theirs, dim=(0, 2, 3), correction=0)
    for found, expected in [(output, wanted), (mean, mean64), (var, var64)]:
        assert torch.allclose(found, expected)
    found, expected = (
        torch.autograd.grad([(w * part).sum() for w, part in zip(weights, parts, strict=True)], x)[0]
        for x, parts in [(ours, (output, mean, var)), (theirs, (wanted, mean64, var64))]
    )
    assert torch.allclose(found, expected)


def test_weights_that_learn_get_their_gradients_while_observed() -> None:
    model = teacher()
    model.bn1.requires_grad_(True)
    with BatchNormStatistics(model) as statistics:
        logits, _ = statistics.observe(images())
        logits.square().sum().backward()
    found = model.bn1.weight.grad.clone()  # type: ignore[union-attr]
    model.bn1.weight.grad = None
    model(images()).square().sum().backward()
    assert torch.equal(found, model.bn1.weight.grad)  # type: ignore[arg-type]


def test_an_observed_layer_in_training_normalises_by_its_batch() -> None:
    model = teacher()
    model.bn1.train()
    expected = model(images())
    with BatchNormStatistics(model) as statistics:
        assert torch.equal(statistics.observe(images())[0], expected)


# What stays behind


def test_nothing_stays_on_the_teacher() -> None:
    model = teacher()
    before = state_of(model)
    with BatchNormStatistics(model, 0.9) as statistics:
        assert hooks_on(model) == 2
        statistics.accumulate(statistics.observe(images())[1])
    after = state_of(model)
    assert before["hooks"] == after["hooks"] == 0
    assert all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])


def test_nothing_stays_after_an_exception() -> None:
    model = teacher()
    with pytest.raises(RuntimeError), BatchNormStatistics(model):
        model(torch.rand(1, 7, 8, 8))  # a channel count that does not fit
    assert hooks_on(model) == 0


def test_a_users_own_hook_stays() -> None:
    model = teacher()
    called = []
    model.bn1.register_forward_pre_hook(lambda *_: called.append(1))
    with BatchNormStatistics(model):
        model(images())
    model(images())
    assert len(called) == 2


def test_the_state_can_be_taken_up() -> None:
    model = teacher()
    with BatchNormStatistics(model, 0.9) as first:
        first.accumulate(first.observe(images(0))[1])
        state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
        expected = first.loss(first.observe(images(1))[1])
    with BatchNormStatistics(model, 0.9) as second:
        second.load_state_dict(state)
        assert torch.equal(second.loss(second.observe(images(1))[1]), expected)
    fresh = BatchNormStatistics(model, 0.9)
    assert fresh.state_dict() == {}
    fresh.load_state_dict({})
    with BatchNormStatistics(teacher(width=5), 0.9) as stranger:
        stranger.load_state_dict(state)
        with pytest.raises(ValueError, match="another model's"):
            stranger.observe(images())
    with BatchNormStatistics(teacher(width=5), 0.9) as stranger:
        stranger.observe(images())
        with pytest.raises(ValueError, match="another model's"):
            stranger.load_state_dict(state)


def test_moments_of_a_long_way_from_zero_keep_their_variance() -> None:
    # A sum of squares minus a squared sum would lose all digits here.
    x = 1000 + torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert math.isclose(channel_moments(x)[1].item(), x.double().var(correction=0).item(), rel_tol=1e-3)
