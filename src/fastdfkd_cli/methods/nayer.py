"""NAYER: Tran et al., "NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge
Distillation", CVPR 2024 (arXiv:2310.00258).

A class is told to the generator by a fixed embedding e_y, and chance does not come from z but from a *noisy layer* Z
between the two, whose weights are drawn anew for each batch and then trained with the generator:

    x = G(Z(e_y)),    Z(e) = W BN(e) + b,    W ~ N(0, 1), b = 0
    min over G and Z of  w_cls CE(f_t(x), y) + w_adv L_adv(x) + w_bn L_BN(x)

with L_BN as in FastDFKD (statistics with momentum) and L_adv = -KL(f_t(x) || f_s(x)) where both predict the same
class. An embedding gives one image through one layer, so a batch has as many layers as it has images of a class: each
serves every class once ("K-to-1 noisy layer").
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import to_device
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.generators import Generator
from fastdfkd_cli.method_config import NAYERConfig
from fastdfkd_cli.methods.base import Method, SyntheticBatch, frozen, keep_lower, part_of
from fastdfkd_cli.output import one_line
from fastdfkd_cli.pool import to_uint8


class NoisyLayers(nn.Module):
    """Z, several times over: ``[B, dim] -> [B, out]``, one layer for each ``classes`` images in a row.

    All share one BatchNorm, which puts the embeddings on one scale; its statistics are the batch's.
    """

    def __init__(self, batch: int, classes: int, dim: int, out: int) -> None:
        super().__init__()
        self.images_each = min(batch, classes)
        count = math.ceil(batch / classes)
        self.norm = nn.BatchNorm1d(dim, track_running_stats=False)
        self.weight = nn.Parameter(torch.zeros(count, dim, out))
        self.bias = nn.Parameter(torch.zeros(count, 1, out))

    def forward(self, embeddings: Tensor) -> Tensor:
        x = self.norm(embeddings)
        count, dim, out = self.weight.shape
        padded = nn.functional.pad(x, (0, 0, 0, count * self.images_each - len(x)))  # the last may serve fewer
        found = torch.baddbmm(self.bias, padded.view(count, self.images_each, dim), self.weight)
        return found.view(-1, out)[: len(x)]

    @torch.no_grad()
    def redraw(self, rng: torch.Generator) -> None:
        """W ~ N(0, 1), b = 0; ``rng`` is on the CPU."""
        self.weight.copy_(to_device(torch.randn(self.weight.shape, generator=rng), self.weight.device))
        self.bias.zero_()


class NAYER(Method[NAYERConfig]):
    """The noisy-layer synthesiser. See :func:`fastdfkd_cli.methods.build_method` for the arguments.

    Raises:
        UsageError, UnavailableError: there are no such embeddings.
    """

    settings = NAYERConfig

    def __init__(self, config: RunConfig, teacher: nn.Module, **keywords: object) -> None:
        super().__init__(config, teacher, **keywords)  # type: ignore[arg-type]
        try:
            self.embeddings = self._new_embeddings().to(self.device)
        except BaseException:
            self.close()
            raise
        self.generator, self.noise = self._new_networks()

    def _new_embeddings(self) -> Tensor:
        """e ``[classes, dim]``, the same for the whole run."""
        settings, classes = self.config, self.num_classes
        if settings.embeddings not in ("orthogonal", "random"):
            return _read_embeddings(settings.embeddings, classes)
        drawn = torch.randn(classes, settings.embedding_dim, generator=self.rng)
        if settings.embeddings == "random":
            return drawn
        # As orthogonal as that many vectors of that length can be.
        wide = classes <= settings.embedding_dim
        basis, _ = torch.linalg.qr(drawn.T if wide else drawn)
        return (basis.T if wide else basis).contiguous()

    def _new_networks(self) -> tuple[Generator, NoisyLayers]:
        generator = self.new_generator()
        out = math.prod(generator.latent_shape)
        noise = NoisyLayers(self.config.batch_size, self.num_classes, self.embeddings.shape[1], out)
        return generator, noise.to(self.device).train()

    def _draw_classes(self) -> Tensor:
        """All classes in order for each noisy layer; the last one's are drawn where the batch ends within them.

        Without repetition: two images of one class from one layer would be the same image.
        """
        layers, rest = divmod(self.config.batch_size, self.num_classes)
        blocks = [torch.arange(self.num_classes)] * layers
        return torch.cat([*blocks, torch.randperm(self.num_classes, generator=self.rng)[:rest]])

    def terms(self, images: Tensor, labels: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor]:
        """The loss at ``images`` ``[B, C, H, W]`` as the teacher sees them: unweighted terms and ``total``, and the
        moments of the teacher's BatchNorm inputs (empty without a feature term)."""
        settings = self.config
        teacher_logits, moments = self.observe(images)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if self.statistics is not None and moments is not None:
            terms["feature"] = self.statistics.loss(moments)  # L_BN
            total = total + settings.feature_weight * terms["feature"]
        if settings.class_weight > 0:
            terms["class"] = losses.classification(teacher_logits, labels)
            total = total + settings.class_weight * terms["class"]
        if settings.adversarial_weight > 0 and student is not None:
            terms["adversarial"] = losses.adversarial_agreement_kl(teacher_logits, self.ask(student, images))
            total = total + settings.adversarial_weight * terms["adversarial"]
        terms["total"] = total
        return terms, torch.empty(0) if moments is None else moments

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Draw the noisy layers anew and train them and the generator; the images are those with the lowest loss."""
        settings = self.config
        if self.batches and settings.generator_life and self.batches % settings.generator_life == 0:
            self.generator, self.noise = self._new_networks()
        self.noise.redraw(self.rng)
        labels = to_device(self._draw_classes(), self.device)
        embeddings = self.embeddings[labels]
        weights = [*self.generator.parameters(), *self.noise.parameters()]
        optimizer = self.adam(weights, settings.lr_generator, (settings.beta1, settings.beta2))
        kept: dict[str, Tensor] = {}
        moments = torch.empty(0)
        with frozen(student):
            for _ in range(settings.steps):
                optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    z = self.noise(embeddings).view(-1, *self.generator.latent_shape)
                    images = self.generator(z)
                draws = draw_augmentation(settings.augmentation, len(images), self.image_size, self.rng)
                varied = apply_augmentation(images, settings.augmentation, to_device(draws, self.device))
                terms, moments = self.terms(varied, labels, student)
                terms["total"].backward()
                kept = keep_lower(kept, {"images": to_uint8(images), **terms})
                optimizer.step()
        if self.statistics is not None:
            self.statistics.accumulate(moments)
        self.batches += 1
        return SyntheticBatch(kept.pop("images"), labels, kept)

    def own_state(self) -> dict[str, Tensor]:
        """Of the noisy layers the shared norm alone: the others are drawn for each batch."""
        state = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        state |= {f"norm.{name}": tensor for name, tensor in self.noise.norm.state_dict().items()}
        return state | {"embeddings": self.embeddings}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        if state["embeddings"].shape != self.embeddings.shape:
            raise ValueError("these embeddings are another run's")
        self.embeddings = state["embeddings"].to(self.device)  # a file may be another by now
        self.generator.load_state_dict(part_of(state, "generator."))
        self.noise.norm.load_state_dict(part_of(state, "norm."))


def _read_embeddings(path: str, classes: int) -> Tensor:
    """The one tensor of a file, ``[classes, dim]``, as float32."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise UnavailableError(f"synthesis.embeddings={path} cannot be read: {one_line(error)}.") from error
    found = next(iter(tensors.values())) if len(tensors) == 1 else None
    if found is None or found.ndim != 2 or len(found) != classes or not found.shape[1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in list(tensors.values())[:4]) or "nothing"
        raise UsageError(f"synthesis.embeddings={path} must hold one tensor [{classes}, dim], and holds {shapes}.")
    if not found.is_floating_point() or not torch.isfinite(found).all():
        raise UsageError(f"synthesis.embeddings={path} holds values that are no finite floats.")
    return found.float()


__all__ = ["NAYER", "NoisyLayers"]
