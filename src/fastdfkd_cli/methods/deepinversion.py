"""DeepInversion: Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

The pixels of a batch themselves are optimised, from noise, each batch for itself (arXiv:1912.08795):

    min over x of L_cls(f_t(x), c) + a_f R_feature(x) + a_tv R_TV(x) + a_l2 R_l2(x) + a_c R_compete(x)

    R_feature = sum over layers of |mean(x) - running mean|_2 + |var(x) - running var|_2
    R_compete = 1 - JSD(f_t(x) / 3, f_s(x) / 3)      with a student: Adaptive DeepInversion

Before teacher and student see it, a batch is shifted and mirrored as a whole, at random in each step. The priors R_TV
and R_l2 look at the batch as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import to_device
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.method_config import DeepInversionConfig
from fastdfkd_cli.methods.base import Method, SyntheticBatch, frozen, keep_lower, restart
from fastdfkd_cli.pool import to_uint8

#: Grey, and brightness for one unit of a pixel p: x = GREY + SPREAD p. About what networks' own normalisations do
#: (CIFAR-10's deviations are 0.20, ImageNet's 0.23), so that published learning rates and weights mean the same.
GREY, SPREAD = 0.5, 0.25
#: The temperature in R_compete.
TEMPERATURE = 3.0


class DeepInversion(Method[DeepInversionConfig]):
    """Pixels as the variables. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    settings = DeepInversionConfig

    def __init__(self, config: RunConfig, teacher: nn.Module, **keywords: object) -> None:
        super().__init__(config, teacher, **keywords)  # type: ignore[arg-type]
        pixels = torch.zeros(self.config.batch_size, *self.image_size, device=self.device)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam:
        return self.adam([self.pixels], self.config.lr_pixels, (self.config.beta1, self.config.beta2))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Optimise a new batch for all its steps; the iterate with the lowest loss is kept."""
        labels = self.draw_labels(self.config.batch_size)
        restart(self.optimizer)
        with torch.no_grad():
            self.pixels.copy_(to_device(torch.randn(self.pixels.shape, generator=self.rng), self.device))
            self._project()
        kept: dict[str, Tensor] = {}
        with frozen(student):
            for _ in range(self.config.steps):
                self.optimizer.zero_grad(set_to_none=True)
                images = to_images(self.pixels)
                terms = self.terms(self.pixels, labels, student, *self._draw_jitter())
                if terms["total"].requires_grad:  # without a student, R_compete alone leaves nothing to descend
                    terms["total"].backward()
                kept = keep_lower(kept, {"images": to_uint8(images), **terms})
                self.optimizer.step()
                self._project()
        self.batches += 1
        return SyntheticBatch(kept.pop("images"), labels, kept)

    def terms(
        self, pixels: Tensor, labels: Tensor, student: nn.Module | None, shift: tuple[int, int], mirror: bool
    ) -> dict[str, Tensor]:
        """The unweighted terms at ``pixels`` ``[B, C, H, W]`` for ``labels`` ``[B]``, and ``total``, their sum.

        Args:
            shift: rows and columns that teacher and student see the images moved by, round the border.
            mirror: whether they see them mirrored.
        """
        config = self.config
        seen = torch.roll(to_images(pixels), shift, dims=(2, 3))
        if mirror:
            seen = seen.flip(3)
        logits, moments = self.observe(seen)
        terms = {"class": losses.classification(logits, labels)}
        total = config.class_weight * terms["class"]
        if moments is not None and self.statistics is not None:
            terms["feature"] = self.statistics.loss(moments)  # R_feature
            total = total + config.feature_weight * terms["feature"]
        if student is not None and config.adversarial_weight > 0:
            terms["adversarial"] = losses.competition(logits, self.ask(student, seen), TEMPERATURE)  # R_compete
            total = total + config.adversarial_weight * terms["adversarial"]
        if config.tv_weight > 0:
            terms["tv"] = losses.total_variation(pixels)  # R_TV
            total = total + config.tv_weight * terms["tv"]
        if config.l2_weight > 0:
            terms["l2"] = torch.linalg.vector_norm(pixels.float())  # R_l2
            total = total + config.l2_weight * terms["l2"]
        return terms | {"total": total}

    def _draw_jitter(self) -> tuple[tuple[int, int], bool]:
        """How one step's batch is shifted, rows and columns, and whether it is mirrored."""
        _, height, width = self.image_size
        bounds = [int(self.config.jitter * side) for side in (height, width)]
        down, right = (int(torch.randint(-bound, bound + 1, (), generator=self.rng)) for bound in bounds)
        mirror = bool(torch.rand((), generator=self.rng) < 0.5)
        return (down, right), mirror and self.config.flip

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer = self._new_optimizer()  # at the rate of the state; batches share nothing else

    @torch.no_grad()
    def _project(self) -> None:
        """Back into the pixels that an image can have."""
        self.pixels.clamp_(-GREY / SPREAD, (1 - GREY) / SPREAD)


def to_images(pixels: Tensor) -> Tensor:
    """Images in [0, 1] of ``pixels`` ``[B, C, H, W]`` in units of SPREAD around GREY."""
    return GREY + SPREAD * pixels


__all__ = ["DeepInversion", "to_images"]
