"""Latent -> image networks, built for an input size.

Both kinds double a small map several times and end in a sigmoid, so that images come out as floats in [0, 1].
Layer sizes follow the published runs (see docs/recipes.md); the size of the first map follows from the image's, and
what does not divide evenly is cut from the borders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli.config import GeneratorConfig


class UpsampledConv2d(nn.Conv2d):
    """A 3x3 convolution of a map doubled by nearest neighbours, without ever doubling the map.

    A 3x3 neighbourhood of the doubled map holds only 2x2 pixels of the small one, each with the sum of the weights
    that fall on it. Those sums are a 4x4 kernel, applied with stride 2: a transposed convolution. It is the same
    function of the same weights, with 4 products where there were 9, and no copy of the doubled map.

    Takes ``[B, in_channels, H, W]``, gives ``[B, out_channels, 2H, 2W]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.weight, (1, 1, 1, 1))
        sums = padded[..., 1:, 1:] + padded[..., 1:, :-1] + padded[..., :-1, 1:] + padded[..., :-1, :-1]
        # A transposed convolution counts its kernel from the other end.
        return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), stride=2, padding=1)


class Generator(nn.Module):
    """G(z; theta): latents to images ``[B, C, H, W]`` in [0, 1].

    Args:
        config: kind, channels and number of doublings.
        image_size: C, H, W.

    With ``kind="linear"`` (32x32 recipes) z is ``[B, latent_dim]`` and a linear layer gives the first map; with
    ``kind="map"`` (224x224 recipes) z is itself a map ``[B, latent_dim, h, w]``.
    """

    def __init__(self, config: GeneratorConfig, image_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_size
        scale = 2**config.upsamplings
        first = (math.ceil(height / scale), math.ceil(width / scale))
        self.kind = config.kind
        self.image_size = image_size
        self.first_map = (config.width, *first)
        self.latent_shape: tuple[int, ...]
        self.stem: nn.Module
        if config.kind == "linear":
            self.latent_shape = (config.latent_dim,)
            self.stem = nn.Linear(config.latent_dim, math.prod(self.first_map))
        else:
            self.latent_shape = (config.latent_dim, *first)
            self.stem = nn.Conv2d(config.latent_dim, config.width, 3, 1, 1, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(config.width)]
        planes = config.width
        for index in range(config.upsamplings):
            out = config.width if index < config.upsamplings - 1 else max(config.width // 2, 1)
            layers += [
                UpsampledConv2d(planes, out),
                nn.BatchNorm2d(out),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            planes = out
        layers.append(nn.Conv2d(planes, channels, 3, 1, 1))
        self.body = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stem(z)
        if self.kind == "linear":
            x = x.view(-1, *self.first_map).contiguous(memory_format=torch.channels_last)
        x = self.body(x)
        _, height, width = self.image_size
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        # The sigmoid runs in float32: bf16 has too few steps near 1 for an image.
        return torch.sigmoid(x[:, :, top : top + height, left : left + width].float())

    def sample_latent(self, batch: int, rng: torch.Generator) -> Tensor:
        """z ~ N(0, I) for ``batch`` images, on the generator's device."""
        device = next(self.parameters()).device
        return torch.randn(batch, *self.latent_shape, generator=rng, device=rng.device).to(device)

    def reinitialise_stem(self, rng: torch.Generator) -> None:
        """Draw the first layer anew from N(0, 0.02^2), as the published runs do once to renew diversity."""
        with torch.no_grad():
            for name, parameter in self.stem.named_parameters():
                if name.endswith("weight"):
                    noise = torch.randn(parameter.shape, generator=rng, device=rng.device)
                    parameter.copy_(0.02 * noise)
                else:
                    parameter.zero_()


class Pixels(nn.Module):
    """The image itself as the latent (the paper's "Pixel" rows): z holds ``[B, C, H, W]`` before the sigmoid.

    Has no weights; it stands where a :class:`Generator` stands, so that one inner loop serves both.
    """

    def __init__(self, image_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.latent_shape = image_size

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def sample_latent(self, batch: int, rng: torch.Generator) -> Tensor:
        """Noise N(0, I) around mid-grey for ``batch`` images, on ``rng``'s device."""
        return torch.randn(batch, *self.latent_shape, generator=rng, device=rng.device)


__all__ = ["Generator", "Pixels", "UpsampledConv2d"]
