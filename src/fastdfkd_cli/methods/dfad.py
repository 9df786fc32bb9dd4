"""DFAD: Fang et al., "Data-Free Adversarial Distillation", 2019 (arXiv:1912.11006).

A generator looks for images on which teacher and student differ most, and the student learns to answer them as the
teacher does, in turns:

    D(T, S; x) = 1/n |f_t(x) - f_s(x)|_1                 the discrepancy of the logits of n classes
    student:    min D(T, S; G(z))                        (the setting distillation.loss: l1)
    generator:  min -D(T, S; G(z)), or -log(D + 1)       the latter where D would grow without bound

Nothing ties the images to the teacher's domain but that both networks answer to them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.method_config import DFADConfig
from fastdfkd_cli.methods.base import OneGenerator


class DFAD(OneGenerator[DFADConfig]):
    """The adversarial generator. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    settings = DFADConfig

    def terms(self, images: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """L_G at ``images``."""
        assert student is not None
        teacher_logits, _ = self.observe(images)
        discrepancy = losses.logit_l1(teacher_logits, self.ask(student, images))
        adversarial = -torch.log1p(discrepancy) if self.config.log_discrepancy else -discrepancy
        return {"adversarial": adversarial}, adversarial, teacher_logits


__all__ = ["DFAD"]
