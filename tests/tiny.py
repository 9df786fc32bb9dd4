"""Networks and settings small enough for a test to train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdfkd_cli.config import RunConfig, from_dict

#: C, H, W of most tests' images.
SIZE = (3, 8, 8)
CLASSES = 4


class TinyNet(nn.Module):
    """Two convolutions and a classifier, with or without BatchNorm: ``[B, channels, H, W] -> [B, classes]``."""

    def __init__(
        self, channels: int = 3, classes: int = CLASSES, *, norm: bool = True, width: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def net(seed: int = 0, *, size: tuple[int, int, int] = SIZE, **keywords: Any) -> TinyNet:
    """A network of its own, whose BatchNorm layers remember something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = TinyNet(size[0], **keywords)
        nn.init.normal_(found.fc.weight)  # so that its predictions differ from image to image
        for _ in range(5):
            found(torch.rand(8, *size))
    return found


def teacher(seed: int = 0, **keywords: Any) -> TinyNet:
    """A network as the engines want a teacher: frozen, in evaluation mode."""
    found = net(seed, **keywords).eval()
    found.requires_grad_(False)
    return found


def config(**changes: Any) -> RunConfig:
    """Settings of a run of moments; ``changes`` are dotted keys with ``__`` for the dot."""
    small = {
        "quality_images": 8,
        "quality_steps": 2,
        "synthesis.batch_size": 4,
        "synthesis.steps": 2,
        "generator.latent_dim": 6,
        "generator.width": 4,
        "generator.upsamplings": 1,
        "distillation.batch_size": 4,
        "distillation.lr": 0.05,
        "schedule.rounds": 4,
        "schedule.warmup_rounds": 1,
        "schedule.kd_steps_per_round": 3,
    }
    return from_dict({**small, **{key.replace("__", "."): value for key, value in changes.items()}})


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a call might change on a module: tensors, modes, gradients wanted and held, hooks."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "modes": {name: layer.training for name, layer in module.named_modules()},
        "wanted": {name: p.requires_grad for name, p in module.named_parameters()},
        "held": {name for name, p in module.named_parameters() if p.grad is not None},
        "hooks": hooks_on(module),
    }


def hooks_on(module: nn.Module) -> int:
    """How many hooks stand on a module and all its layers; a replaced ``forward`` counts as one."""
    return sum(
        len(layer._forward_pre_hooks)
        + len(layer._forward_hooks)
        + len(layer._backward_hooks)
        + ("forward" in vars(layer))
        for layer in module.modules()
    )


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for what in ("modes", "wanted", "held", "hooks"):
        assert before[what] == after[what], what
