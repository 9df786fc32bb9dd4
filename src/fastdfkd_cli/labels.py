"""The teacher's soft labels in distillation: how it is asked, and when its answers are worth keeping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdfkd_cli.config import DistillationConfig


def soft_labels(teacher: nn.Module, images: Tensor, amp: bool) -> Tensor:
    """The teacher's logits for images in [0, 1], without gradient and as it gives them (bf16 with ``amp``)."""
    with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
        return teacher(images)


def label_views(config: DistillationConfig, *, images: int, kd_steps: int, feeds: bool = False) -> int:
    """How many variations of each pool image the teacher labels once, for all KD steps; 0: it labels what is drawn.

    Without augmentation an image always looks the same: its one label is exact, and costs nothing but memory. In
    either case it has to pay: where there are fewer draws than variations to label, labelling draws is cheaper.
    Of a method that ``feeds`` the student, no image is seen twice, and no mixture either; and labels hold no attention
    maps.
    """
    if feeds or config.attention_weight or config.mixes:
        return 0
    views = 1 if config.augmentation == "none" else config.label_views
    return views if kd_steps * config.batch_size > views * images else 0


__all__ = ["label_views", "soft_labels"]
