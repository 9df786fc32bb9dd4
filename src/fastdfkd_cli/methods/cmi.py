"""CMI: Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation", IJCAI 2021 (arXiv:2105.08584).

Each batch has a generator that begins anew, and is optimised with z as in other inversions, with a term that keeps
it apart from what was made before:

    min over z, theta, head of  w_feat L_bn + w_cls L_cls + w_adv L_adv + w_cr L_cr

    L_cr = -log( exp(h(x) . h(x+) / tau) / sum over x' of exp(h(x) . h(x') / tau) )

x is a local view of an image (a resized crop), x+ a global view of the same one (a shifted crop), x' the global views
of all others: those of the batch and those of earlier images from a memory bank. A view's features are the means over
space of the inputs of all the teacher's BatchNorm layers; h is a projection head on them, of length 1, that is trained
along and kept from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import to_device
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.method_config import Augmentation, CMIConfig
from fastdfkd_cli.methods.base import (
    Method,
    SyntheticBatch,
    frozen,
    keep_lower,
    load_optimizer_state,
    optimizer_state,
    restart,
)
from fastdfkd_cli.pool import to_uint8

#: Deviation of a new generator's weights, as published.
INITIAL = 0.02


class MemoryBank:
    """The features of earlier images, local and global views, in a ring of fixed size.

    Features and not their projections, which would be another head's. Kept in bf16: half the memory, and half of each
    checkpoint.

    Args:
        rows: images that it holds.
        width: numbers per view.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.features = torch.zeros(rows, 2, width, dtype=torch.bfloat16, device=device)
        #: Images put in so far.
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, len(self.features))

    def add(self, features: Tensor) -> None:
        """Take ``[B, 2, width]`` in, in the places of the oldest."""
        features = features[-len(self.features) :].to(self.features.dtype)
        start = self.seen % len(self.features)
        first = min(len(features), len(self.features) - start)
        self.features[start : start + first] = features[:first]
        self.features[: len(features) - first] = features[first:]
        self.seen += len(features)

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features of ``count`` images, or of all if there are fewer: local and global views, float32 each."""
        chosen = torch.randperm(len(self), generator=rng)[:count]
        local, whole = self.features[to_device(chosen, self.features.device)].float().unbind(1)
        return local, whole


class CMI(Method[CMIConfig]):
    """A generator for each batch, and a memory. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    settings = CMIConfig

    def __init__(self, config: RunConfig, teacher: nn.Module, **keywords: object) -> None:
        super().__init__(config, teacher, **keywords)  # type: ignore[arg-type]
        self.generator = self.new_generator()
        latents = torch.zeros(self.config.batch_size, *self.generator.latent_shape, device=self.device)
        self.z = latents.requires_grad_()
        self.head: nn.Module | None = None
        self.bank: MemoryBank | None = None
        if self.config.contrastive_weight > 0:
            width = self._feature_width()
            self.head = self._new_head(width)
            bytes_per_row = 2 * width * torch.bfloat16.itemsize
            rows = max(min(self.config.bank_size, self.config.bank_mib * 2**20 // bytes_per_row), 1)
            self.bank = MemoryBank(rows, width, self.device)
        self._new_optimizers()

    def _new_optimizers(self) -> None:
        config = self.config
        variables = [*self.generator.parameters(), self.z]
        self.optimizer = self.adam(variables, config.lr_generator, (config.beta1, config.beta2))
        self.head_optimizer: torch.optim.Optimizer | None = None
        if self.head is not None:
            self.head_optimizer = self.adam(list(self.head.parameters()), config.lr_head, (0.9, 0.999))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [each for each in (self.optimizer, self.head_optimizer) if each is not None]

    @torch.no_grad()
    def _feature_width(self) -> int:
        """How many numbers the features of a view are."""
        grey = torch.full((2, *self.image_size), 0.5, device=self.device)
        with view_features(batch_norm_layers(self.teacher).values()) as features:
            self.teacher(grey)
        return features().shape[1]

    def _new_head(self, width: int) -> nn.Module:
        hidden = min(width, self.config.head_hidden)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=self.rng)))
            head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, self.config.head_dim))
        return head.to(self.device)

    # -- a batch ------------------------------------------------------------------------------------------------

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Optimise a new generator and new z for all steps; the iterate with the lowest loss is kept."""
        labels = self.draw_labels(self.config.batch_size)
        self._begin_anew()
        kept: dict[str, Tensor] = {}
        with frozen(student):
            for _ in range(self.config.steps):
                for optimizer in self.optimizers():
                    optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    images = self.generator(self.z)
                terms, features = self.terms(images, labels, student)
                if terms["total"].requires_grad:  # without a student, L_adv alone leaves nothing to descend
                    terms["total"].backward()
                found = {"images": to_uint8(images), **terms}
                kept = keep_lower(kept, found if features is None else found | {"features": features})
                for optimizer in self.optimizers():
                    optimizer.step()
        self.batches += 1
        if self.bank is not None:
            self.bank.add(kept.pop("features"))
        return SyntheticBatch(kept.pop("images"), labels, kept)

    def terms(
        self, images: Tensor, labels: Tensor, student: nn.Module | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The unweighted terms at ``images`` ``[B, C, H, W]`` and ``total``, their sum; and the images' features.

        The features are those of the local and the global view, ``[B, 2, S]``; None without a contrastive term.
        """
        config = self.config
        whole = self._view(images, "crop-flip" if config.flip else "crop")
        with self._features() as of_whole:
            logits, moments = self.observe(whole)
        terms = {"class": losses.classification(logits, labels)}
        total = config.class_weight * terms["class"]
        if config.feature_weight > 0 and moments is not None and self.statistics is not None:
            terms["feature"] = self.statistics.loss(moments)  # L_bn
            total = total + config.feature_weight * terms["feature"]
        if student is not None and config.adversarial_weight > 0:
            # Counted where teacher and student agree, as in the published code; the paper has it of all images.
            terms["adversarial"] = losses.adversarial_agreement_kl(logits, self.ask(student, whole))
            total = total + config.adversarial_weight * terms["adversarial"]
        features = None
        if self.head is not None:
            local = self._view(images, "resized-crop-flip")
            with self._features() as of_local, self.autocast():
                self.teacher(local)
            features = torch.stack([of_local(), of_whole()], dim=1)
            terms["contrastive"] = self._contrastive(features)  # L_cr
            total = total + config.contrastive_weight * terms["contrastive"]
        return terms | {"total": total}, features

    def _contrastive(self, features: Tensor) -> Tensor:
        """L_cr of a batch, and that of the images from the bank, each averaged by itself.

        The global views' projections are what the local ones are compared with, and not trained by it; averaged
        together, a batch would weigh the less, the more the bank holds (both as in the published code).
        """
        assert self.bank is not None
        count = len(features)
        local, whole = features.unbind(1)
        if len(self.bank):
            earlier_local, earlier_whole = self.bank.sample(self.config.negatives, self.rng)
            local, whole = torch.cat([local, earlier_local]), torch.cat([whole, earlier_whole])
        with torch.no_grad():
            keys = self.project(whole)
        each = losses.info_nce(self.project(local), keys, self.config.contrastive_temperature)
        return each.mean() if len(each) == count else each[:count].mean() + each[count:].mean()

    def project(self, features: Tensor) -> Tensor:
        """h: ``[N, S]`` to ``[N, head_dim]`` of length 1."""
        assert self.head is not None
        with self.autocast():
            return F.normalize(self.head(features).float(), dim=1)

    def _view(self, images: Tensor, kind: Augmentation) -> Tensor:
        scale = (self.config.local_scale, 1.0)
        draws = draw_augmentation(kind, len(images), self.image_size, self.rng, scale=scale, flip=self.config.flip)
        return apply_augmentation(images, kind, to_device(draws, self.device))

    @contextmanager
    def _features(self) -> Iterator[Callable[[], Tensor]]:
        layers = batch_norm_layers(self.teacher).values() if self.head is not None else ()
        with view_features(layers) as features:
            yield features

    @torch.no_grad()
    def _begin_anew(self) -> None:
        """A new z, a new generator and a fresh Adam, in place."""
        restart(self.optimizer)
        self.z.copy_(to_device(torch.randn(self.z.shape, generator=self.rng), self.device))
        for module in self.generator.modules():
            mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                else:
                    noise = torch.randn(parameter.shape, generator=self.rng)
                    parameter.copy_(to_device(mean + INITIAL * noise, self.device))

    def settle(self) -> None:
        """With as many images in the bank as a step draws."""
        if self.bank is not None:
            self.bank.seen = max(self.bank.seen, min(self.config.negatives, len(self.bank.features)))

    # -- what outlives a batch ----------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        if self.head is None or self.bank is None or self.head_optimizer is None:
            return {}
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        state |= optimizer_state(self.head_optimizer, "head_optimizer")
        return state | {"bank": self.bank.features, "seen": torch.tensor(self.bank.seen)}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self._new_optimizers()
        if self.head is None or self.bank is None or self.head_optimizer is None:
            return
        found = {name[len("head.") :]: tensor for name, tensor in state.items() if name.startswith("head.")}
        self.head.load_state_dict(found)
        load_optimizer_state(self.head_optimizer, state, "head_optimizer")
        self.bank.features.copy_(state["bank"])
        self.bank.seen = int(state["seen"])


@contextmanager
def view_features(layers: Iterable[nn.Module]) -> Iterator[Callable[[], Tensor]]:
    """Yield what gives the means over space of the inputs that ``layers`` had in the block: float32 ``[B, S]``."""
    means: list[Tensor] = []

    def read(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        means.append(x.mean(dim=tuple(range(2, x.dim())), dtype=torch.float32) if x.dim() > 2 else x.float())

    handles = [layer.register_forward_pre_hook(read) for layer in layers]
    try:
        yield lambda: torch.cat(means, dim=1)
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["CMI", "MemoryBank", "view_features"]
