"""Latents to images: any size, and the sizes that the paper names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdfkd_cli.config import GeneratorConfig
from fastdfkd_cli.generators import Generator, Pixels, UpsampledConv2d


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SIZES = [(1, 8, 8), (2, 9, 13), (3, 32, 32), (4, 17, 40), (3, 5, 3)]


@pytest.mark.parametrize("kind", ["linear", "map"])
@pytest.mark.parametrize("upsamplings", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_channel_count(kind: str, upsamplings: int, size: tuple[int, int, int]) -> None:
    config = GeneratorConfig(kind=kind, latent_dim=5, width=4, upsamplings=upsamplings)  # type: ignore[arg-type]
    generator = Generator(config, size)
    z = generator.sample_latent(3, rng())
    assert z.shape == (3, *generator.latent_shape)
    images = generator(z)
    assert images.shape == (3, *size)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01  # not one grey


def test_images_are_float32_under_autocast() -> None:
    generator = Generator(GeneratorConfig(latent_dim=5, width=4), (3, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = generator(generator.sample_latent(2, rng()))
    assert images.dtype == torch.float32


def test_the_papers_network_at_32() -> None:
    generator = Generator(GeneratorConfig(), (3, 32, 32))
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters() if p.ndim > 1}
    assert shapes == {
        "stem.weight": (128 * 8 * 8, 256),
        "body.1.weight": (128, 128, 3, 3),
        "body.4.weight": (64, 128, 3, 3),
        "body.7.weight": (3, 64, 3, 3),
    }
    assert [type(layer).__name__ for layer in generator.body] == [
        "BatchNorm2d",
        *("UpsampledConv2d", "BatchNorm2d", "LeakyReLU"),
        *("UpsampledConv2d", "BatchNorm2d", "LeakyReLU"),
        "Conv2d",
    ]
    assert {layer.negative_slope for layer in generator.body if isinstance(layer, nn.LeakyReLU)} == {0.2}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 1), (3, 1, 1, 6)])
def test_the_convolution_of_a_doubled_map_and_its_derivatives(shape: tuple[int, ...]) -> None:
    ours = UpsampledConv2d(shape[1], 4).double()
    x = torch.randn(shape, dtype=torch.float64, generator=rng()).requires_grad_()
    weight = ours.weight.detach().clone().requires_grad_()
    theirs = nn.functional.conv2d(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    out = ours(x)
    assert torch.allclose(out, theirs)
    pull = torch.randn(out.shape, dtype=torch.float64, generator=rng(1))
    (theirs * pull).sum().backward()
    expected, x.grad = x.grad, None
    (out * pull).sum().backward()
    assert torch.allclose(x.grad, expected)  # type: ignore[arg-type]
    assert torch.allclose(ours.weight.grad, weight.grad)  # type: ignore[arg-type]


def test_the_papers_network_at_224() -> None:
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(kind="map", upsamplings=4), (3, 224, 224))
        assert generator.latent_shape == (256, 14, 14)
        assert generator(torch.empty(2, 256, 14, 14)).shape == (2, 3, 224, 224)


@pytest.mark.parametrize("kind", ["linear", "map"])
def test_what_does_not_divide_is_cut_from_the_borders(kind: str) -> None:
    config = GeneratorConfig(kind=kind, latent_dim=5, width=4)  # type: ignore[arg-type]
    whole, cut = Generator(config, (3, 12, 16)).eval(), Generator(config, (3, 10, 13)).eval()
    cut.load_state_dict(whole.state_dict())
    z = whole.sample_latent(2, rng())
    assert torch.allclose(cut(z), whole(z)[:, :, 1:11, 1:14], atol=1e-6)


def test_renewal_changes_the_first_layer_alone() -> None:
    generator = Generator(GeneratorConfig(latent_dim=64, width=16), (3, 8, 8))
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.reinitialise_stem(rng(3))
    after = generator.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"stem.weight", "stem.bias"}
    assert after["stem.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert after["stem.weight"].mean().abs() < 0.005
    assert after["stem.bias"].abs().sum() == 0
    again = Generator(GeneratorConfig(latent_dim=64, width=16), (3, 8, 8))
    again.reinitialise_stem(rng(3))
    assert torch.equal(again.stem.weight, generator.stem.weight)  # type: ignore[arg-type]


def test_latents_are_standard_normal_and_follow_the_seed() -> None:
    generator = Generator(GeneratorConfig(latent_dim=100, width=4), (3, 8, 8))
    z = generator.sample_latent(100, rng(5))
    assert z.mean().abs() < 0.05
    assert z.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(z, generator.sample_latent(100, rng(5)))
    assert not torch.equal(z, generator.sample_latent(100, rng(6)))


def test_pixels_are_their_own_latents() -> None:
    pixels = Pixels((2, 5, 7))
    assert not list(pixels.parameters())
    z = pixels.sample_latent(3, rng())
    assert z.shape == (3, 2, 5, 7)
    assert torch.equal(pixels(z), torch.sigmoid(z))
