"""The noise matrix: how often a teacher takes one class for another, learned beside the student.

Chen et al., "Learning Student Networks in the Wild" (DFND), CVPR 2021. On images that are none of its own a teacher's
hard labels are partly wrong. Q[i, j] is the probability that an image of class i is called j by the teacher: with the
student's probabilities passed through Q, the student need not agree with labels that Q explains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoiseMatrix:
    """Q, whose rows are distributions, and the optimiser that it learns by.

    As in the published code, the diagonal stays at the teacher's accuracy a, and each row divides the rest, 1 - a,
    among the other classes by a softmax of what is learned; it begins with equal shares. Adam learns it, at a rate of
    its own.

    Args:
        num_classes: C, 2 or more.
        accuracy: a, between 0 and 1.
        lr: Adam's learning rate.
    """

    def __init__(self, num_classes: int, accuracy: float, lr: float, device: torch.device) -> None:
        self.accuracy = accuracy
        #: ``[C, C]``; its diagonal takes no part.
        self.weight = nn.Parameter(torch.zeros(num_classes, num_classes, device=device))
        self._diagonal = torch.eye(num_classes, dtype=torch.bool, device=device)
        captured = device.type == "cuda"
        self.optimizer = torch.optim.Adam([self.weight], lr=lr, capturable=captured)
        # From 0, as Adam itself begins: a state that is there before the first step can be saved and recorded.
        self.optimizer.state[self.weight] = {
            "step": torch.zeros((), device=device if captured else "cpu"),
            "exp_avg": torch.zeros_like(self.weight),
            "exp_avg_sq": torch.zeros_like(self.weight),
        }

    def log(self) -> Tensor:
        """log Q, ``[C, C]``."""
        others = F.log_softmax(self.weight.masked_fill(self._diagonal, -math.inf), dim=1)
        return torch.where(self._diagonal, math.log(self.accuracy), others + math.log1p(-self.accuracy))

    def state_dict(self) -> dict[str, Tensor]:
        """What is learned, and Adam's state: the tensors themselves."""
        return {"weight": self.weight.detach(), **self.optimizer.state[self.weight]}


__all__ = ["NoiseMatrix"]
