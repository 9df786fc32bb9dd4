"""DFQ: Choi et al., "Data-Free Network Quantization With Adversarial Knowledge Distillation", CVPR-W 2020.

arXiv:2005.04136. ZSKT's game, kept near the teacher's domain: the generator descends on

    -D_KL(T || S)                   adversarial: images on which the student is far from the teacher
    + feature statistics            those of the teacher's BatchNorm inputs, against the remembered ones
    + CE(T, argmax T)               class: each image is of some class (the paper: the entropy H(T) of each image)
    - H(mean T)                     balance: the batch is of all classes

and the student learns by KL alone, 10 steps for each step of the generator. Compression is what is done here:
quantising the student, one generator of several and its warm-up are not. The feature term is the one that
:mod:`fastdfkd_cli.bn_stats` computes for all methods, the weights those of the published comparison (Fang et al.,
AAAI 2022); the paper itself takes the KL divergence of the two Gaussians.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.method_config import DFQConfig
from fastdfkd_cli.methods.base import OneGenerator


class DFQ(OneGenerator[DFQConfig]):
    """The adversarial generator with its regularisers. See :func:`fastdfkd_cli.methods.build_method`."""

    settings = DFQConfig

    def terms(self, images: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The weighted sum of the four at ``images``; a term of weight 0 is not computed."""
        assert student is not None
        config = self.config
        teacher_logits, moments = self.observe(images)
        terms, total = {}, teacher_logits.new_zeros((), dtype=teacher_logits.float().dtype)
        if config.adversarial_weight:
            student_logits = self.ask(student, images)
            divergence = losses.kl_divergence(teacher_logits, student_logits, config.adversarial_temperature)
            terms["adversarial"] = -divergence.mean()
            total = total + config.adversarial_weight * terms["adversarial"]
        if moments is not None and self.statistics is not None:
            terms["feature"] = self.statistics.loss(moments)
            total = total + config.feature_weight * terms["feature"]
        if config.class_weight:
            terms["class"] = losses.classification(teacher_logits, teacher_logits.detach().argmax(1))
            total = total + config.class_weight * terms["class"]
        if config.balance_weight:
            terms["balance"] = losses.information_entropy(teacher_logits)
            total = total + config.balance_weight * terms["balance"]
        return terms, total, teacher_logits


__all__ = ["DFQ"]
