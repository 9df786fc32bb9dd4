"""DFND (Chen et al., "Learning Student Networks in the Wild", CVPR 2021): images chosen from a large unlabelled set.

Nothing is synthesised. Each candidate x is scored by the cross-entropy of the teacher's output with its own answer,
H(f_t(x), y(x)) with y(x) = argmax f_t(x), which is -log max_c p_t(c | x): the lower, the more x is like what the
teacher was trained on. The N lowest are kept. The student then descends on

    L = T^2 KL(f_t(x) / T || f_s(x) / T) + w * -log (f_s(x) Q)_{y(x)},

plain distillation and the noisy cross-entropy, in which Q explains what the teacher gets wrong
(:mod:`fastdfkd_cli.noise`, :func:`fastdfkd_cli.losses.noisy_classification`); both are the student's affair, set by
``distillation.noise_weight``, and work with any method. Here is the choice of images.

The score, Q and the loss are those of the published code (one file, for CIFAR); the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli.data.files import ImageFile
from fastdfkd_cli.dataset.reader import decode_image
from fastdfkd_cli.pool import to_float


@dataclass(frozen=True)
class Chosen:
    """What was kept, in the order in which the candidates were given.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: the teacher's answers, int64 ``[N]``.
        scores: -log max_c p_t(c | x), float ``[N]``.
        positions: among the candidates, int64 ``[N]``.
    """

    images: Tensor
    labels: Tensor
    scores: Tensor
    positions: Tensor


def doubt(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log odds against the teacher's own answer, and the answer: ``[B, C] -> [B]``, int64 ``[B]``.

    The score is softplus of it, so that both put images in the same order. But a score rounds to 0 where a teacher is
    sure to seven digits, as it often is, and such images would be kept by their place in the folder.
    """
    logits = teacher_logits.float()
    answers = logits.argmax(dim=1)
    others = logits.scatter(1, answers[:, None], -torch.inf).logsumexp(dim=1)
    return others - logits.gather(1, answers[:, None])[:, 0], answers


def surest(doubts: Tensor, keep: int) -> Tensor:
    """Positions of the ``keep`` lowest of ``[N]``, in their order; of equals, the earlier ones. int64."""
    return torch.argsort(doubts, stable=True)[:keep].sort().values


def choose(
    teacher: nn.Module,
    files: Sequence[ImageFile],
    *,
    keep: int,
    image_size: tuple[int, int, int],
    interpolation: str,
    batch_size: int,
    device: torch.device,
    on_scored: Callable[[int], None] | None = None,
) -> Chosen:
    """Keep those ``keep`` of ``files`` of which the teacher is surest; all of them, where there are no more.

    No more images are in memory than are kept, and a batch: all are read once for their scores, and those that are kept
    once more. Scores are in float32 whatever the run's precision, of images as they are stored, unvaried.

    Args:
        teacher: images in [0, 1] -> logits ``[B, C]``; frozen, in evaluation mode, on ``device``.
        image_size: C, H, W.
        batch_size: images that the teacher sees at a time.
        on_scored: called with the number of images scored so far.

    Raises:
        UnavailableError: a file that cannot be read as an image.
    """
    everything = len(files) <= keep
    doubts = torch.empty(len(files))
    answers = torch.empty(len(files), dtype=torch.int64)
    images = torch.empty(min(keep, len(files)), *image_size, dtype=torch.uint8)
    for first in range(0, len(files), batch_size):
        some = slice(first, min(first + batch_size, len(files)))
        batch = torch.stack([decode_image(file, image_size, interpolation) for file in files[some]])
        with torch.no_grad():
            found, labels = doubt(teacher(to_float(batch.to(device))))
        doubts[some], answers[some] = found.cpu(), labels.cpu()
        if everything:
            images[some] = batch
        if on_scored is not None:
            on_scored(some.stop)
    positions = surest(doubts, keep)
    if not everything:
        for row, position in enumerate(positions.tolist()):
            images[row] = decode_image(files[position], image_size, interpolation)
    return Chosen(images, answers[positions], F.softplus(doubts[positions]), positions)


__all__ = ["Chosen", "choose", "doubt", "surest"]
