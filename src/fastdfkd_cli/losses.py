"""The terms of the inversion loss and of distillation, as pure functions over ``[B, C, ...]``.

Logits are ``[B, C]`` for a classifier or ``[B, C, H, W]`` for a dense predictor; class scores always stand in
dimension 1, and each function averages over all other dimensions. Everything is computed in float32, whatever the
precision of the logits. Equation numbers are those of Fang et al., "Up to 100x Faster Data-Free Knowledge
Distillation", AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """L_cls(x) = CE(f_t(x), c), Eq. 13: the teacher should recognise the class that was asked for.

    Args:
        teacher_logits: ``[B, C, ...]``.
        labels: class indices, int64 ``[B, ...]``.
    """
    return F.cross_entropy(teacher_logits.float(), labels)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(p / T) || softmax(q / T)) in nats per position: ``[B, C, ...] -> [B, ...]``."""
    log_p = F.log_softmax(p_logits.float() / temperature, dim=1)
    log_q = F.log_softmax(q_logits.float() / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def jensen_shannon(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """JSD of the softened outputs in nats per position (0 to ln 2): ``[B, C, ...] -> [B, ...]``."""
    p = F.softmax(p_logits.float() / temperature, dim=1)
    q = F.softmax(q_logits.float() / temperature, dim=1)
    # The clamp keeps 0 log 0 at 0 in value and in gradient where a softmax underflows.
    log_p, log_q, log_m = (x.clamp_min(1e-12).log() for x in (p, q, (p + q) / 2))
    return 0.5 * ((p * (log_p - log_m)).sum(dim=1) + (q * (log_q - log_m)).sum(dim=1))


def adversarial_jsd(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """L_adv(x) = -JSD(f_t(x) / tau || f_s(x) / tau), Eq. 13: seek images on which the two disagree."""
    return -jensen_shannon(teacher_logits, student_logits, temperature).mean()


def adversarial_agreement_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The published runs' adversarial term: -KL(teacher || student) where both predict the same class.

    Where they already disagree the image has done its work, and pushing further would leave the teacher's domain.
    """
    same = teacher_logits.argmax(dim=1) == student_logits.argmax(dim=1)
    return -(kl_divergence(teacher_logits, student_logits, temperature) * same).mean()


def distillation(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(f_t(x) / T || f_s(x) / T), Eq. 12 with Hinton et al.'s temperature; 0 where the two agree.

    The factor T^2 keeps the size of the gradient independent of T (Hinton, Vinyals & Dean 2015).
    """
    return temperature**2 * kl_divergence(teacher_logits, student_logits, temperature).mean()


def noisy_classification(student_logits: Tensor, labels: Tensor, log_transition: Tensor) -> Tensor:
    """-log (f_s(x) Q)_y: the student's probabilities, passed through a noise matrix, against a label that may be wrong.

    Chen et al., "Learning Student Networks in the Wild" (DFND), CVPR 2021, as its published code has it. In logarithms
    throughout, so that no probability rounds to 0.

    Args:
        student_logits: ``[B, C, ...]``.
        labels: the teacher's answers, int64 ``[B, ...]``.
        log_transition: log Q, ``[C, C]``: row, what an image is; column, what the teacher calls it.
    """
    log_p = F.log_softmax(student_logits.float(), dim=1)
    # Only the labels' columns take part: [B, ..., C] -> [B, C, ...].
    columns = log_transition.float().T[labels].movedim(-1, 1)
    return -torch.logsumexp(log_p + columns, dim=1).mean()


def logit_l1(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """D(T, S; x) = |f_t(x) - f_s(x)|_1 / n over the logits of n classes: DFAD's discrepancy (Fang et al., 2019)."""
    return (teacher_logits.float() - student_logits.float()).abs().mean()


def information_entropy(teacher_logits: Tensor) -> Tensor:
    """L_ie = -H(mean over the batch of softmax(f_t(x))) in nats: lowest where all classes are equally frequent.

    Minus ln C at balance, 0 where all images are of one class for certain (Chen et al., DAFL, ICCV 2019; Choi et al.,
    DFQ, 2020, call the entropy that of the batch).
    """
    mean = F.softmax(teacher_logits.float(), dim=1).movedim(1, -1).flatten(0, -2).mean(dim=0)
    return -torch.special.entr(mean.clamp_min(1e-12)).sum()


def activation(features: Tensor) -> Tensor:
    """L_a = -1/B sum_i |f_i|_1 of the features before the classifier (Chen et al., DAFL, ICCV 2019).

    Args:
        features: ``[B, D]``, or ``[B, D, ...]``, whose positions are averaged over.
    """
    return -features.float().abs().sum(dim=1).mean()


def attention_map(activations: Tensor) -> Tensor:
    """Where a layer looks: the mean of its squared channels, of norm 1: ``[B, C, H, W] -> [B, H W]``.

    Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017.
    """
    return F.normalize(activations.float().square().mean(dim=1).flatten(1))


def attention_transfer(teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor]) -> Tensor:
    """The sum over pairs of layers of the mean squared difference of their attention maps, ``[B, H W]`` each.

    As the published code of Micaelli & Storkey (ZSKT, NeurIPS 2019) has it, to whose scale its weight of 250 belongs;
    the paper writes the norm of the difference instead.
    """
    pairs = zip(teacher_maps, student_maps, strict=True)
    return torch.stack([(teacher - student).square().mean() for teacher, student in pairs]).sum()


def competition(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """R_compete = 1 - JSD(f_t(x) / tau, f_s(x) / tau), in nats (Yin et al., DeepInversion, 2020, section 3.3)."""
    return 1 - jensen_shannon(teacher_logits, student_logits, temperature).mean()


def total_variation(images: Tensor) -> Tensor:
    """R_TV: the sum of the L2 norms of ``[B, C, H, W]``'s differences with its neighbours in four directions.

    Over the whole batch, one norm for each of right, below and the two diagonals below (Yin et al., 2020, as their
    published code has it).
    """
    x = images.float()
    directions = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return sum((torch.linalg.vector_norm(each) for each in directions), x.new_zeros(()))


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """-log( exp(q_i . k_i / tau) / sum over j of exp(q_i . k_j / tau) ), one for each query: ``[N]``.

    Args:
        queries: ``[N, D]``, of length 1.
        keys: ``[N, D]``, of length 1: the i-th is the i-th query's partner, all others are what it is told from.
    """
    with torch.autocast(queries.device.type, enabled=False):
        similarities = queries.float() @ keys.float().T / temperature
    return F.cross_entropy(similarities, torch.arange(len(queries), device=queries.device), reduction="none")


ADVERSARIAL = {"agreement-kl": adversarial_agreement_kl, "jsd": adversarial_jsd}

__all__ = [
    "ADVERSARIAL",
    "activation",
    "adversarial_agreement_kl",
    "adversarial_jsd",
    "attention_map",
    "attention_transfer",
    "classification",
    "competition",
    "distillation",
    "info_nce",
    "information_entropy",
    "logit_l1",
    "jensen_shannon",
    "kl_divergence",
    "noisy_classification",
    "total_variation",
]
