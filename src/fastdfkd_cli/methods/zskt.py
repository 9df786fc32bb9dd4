"""ZSKT: Micaelli & Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019.

arXiv:1905.09768, Algorithm 1. A generator looks for images on which the student's belief is far from the teacher's,
and the student matches them, in turns:

    generator:  max D_KL(T(G(z)) || S(G(z)))
    student:    min D_KL(T(G(z)) || S(G(z))) + beta * attention transfer

The student's attention transfer is a setting of distillation, ``distillation.attention_weight`` (beta = 250), open to
every method.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.method_config import ZSKTConfig
from fastdfkd_cli.methods.base import OneGenerator


class ZSKT(OneGenerator[ZSKTConfig]):
    """The adversarial generator. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    settings = ZSKTConfig

    def terms(self, images: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """-D_KL(T || S) at ``images``."""
        assert student is not None
        teacher_logits, _ = self.observe(images)
        temperature = self.config.adversarial_temperature
        adversarial = -losses.kl_divergence(teacher_logits, self.ask(student, images), temperature).mean()
        return {"adversarial": adversarial}, adversarial, teacher_logits


__all__ = ["ZSKT"]
