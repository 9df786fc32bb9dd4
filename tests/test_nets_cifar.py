"""The paper's networks for small images: their sizes, and that timm builds them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastdfkd_cli.nets_cifar import REGISTRY_PREFIX, WideResNet, cifar_names

#: Counted by hand from the papers' tables (3 channels, 10 classes).
PARAMETERS = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "vgg11": 9_231_114,
    "wrn16_1": 175_066,
    "wrn16_2": 691_674,
    "wrn40_1": 563_930,
    "wrn40_2": 2_243_546,
}
#: Channels and side of the last map for 32x32 images.
FEATURES = {"resnet18": (512, 4), "resnet34": (512, 4), "vgg11": (512, 2), "wrn16_1": (64, 8), "wrn40_2": (128, 8)}


def build(name: str, **keywords: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(f"{REGISTRY_PREFIX}{name}", **keywords)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", FEATURES)
def test_the_maps_shrink_as_the_papers_do(name: str) -> None:
    channels, side = FEATURES[name]
    model = build(name)
    assert model.forward_features(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, channels, side, side)
    assert model.num_features == model.head_hidden_size == channels


@pytest.mark.parametrize("name", cifar_names())
@pytest.mark.parametrize("size", [(1, 8, 8), (4, 9, 13), (3, 64, 32)])
def test_any_size_from_8_pixels(name: str, size: tuple[int, int, int]) -> None:
    model = build(name, num_classes=7, in_chans=size[0])
    assert model(torch.empty(2, *size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "wrn10_1"])
def test_the_smallest_input_gives_finite_logits_in_training(name: str) -> None:
    model = timm.create_model(f"{REGISTRY_PREFIX}{name}", num_classes=3, in_chans=1)
    logits = model(torch.rand(4, 1, 8, 8))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "wrn10_1"])
def test_what_timm_asks_of_a_classifier(name: str) -> None:
    model = build(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert isinstance(model.get_submodule(config["first_conv"]), nn.Conv2d)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    x = torch.empty(2, 3, 32, 32, device="meta")
    with torch.device("meta"):
        model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="max"):
        model.reset_classifier(5, "max")


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "wrn10_1"])
def test_the_first_weights_are_he_et_als(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(f"{REGISTRY_PREFIX}{name}")
    widest = max((m for m in model.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
    fan_out = widest.out_channels * 9
    assert widest.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert model.get_classifier().bias.abs().sum() == 0


def test_a_depth_that_makes_no_wide_resnet() -> None:
    with pytest.raises(ValueError, match="6n \\+ 4, not 17"):
        WideResNet(17, 1)
