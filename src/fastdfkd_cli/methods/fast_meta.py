"""FastDFKD: Fang et al., "Up to 100x Faster Data-Free Knowledge Distillation", AAAI 2022.

Each batch starts from features shared by earlier ones and is adapted in k steps (Algorithm 1, lines 4 to 14):

    (z, theta) <- (z, theta) - alpha grad L_i(G(z; theta))            k times, Eq. 6
    (z^, theta^) <- (z^, theta^) - eta grad L_i(G(U^k(z^; theta^)))    once, Eq. 9 (FOMAML) or Eq. 10 (Reptile)

with L = w_cls L_cls + w_adv L_adv + w_feat L_feat (Eq. 13, 15).

The other rows of the paper's Table 5 are the same loop with three switches: ``reuse`` (none, sequential, meta),
``images`` (generator or pixels) and ``feature_momentum``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.augment import augment
from fastdfkd_cli.bn_stats import BatchNormStatistics
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.generators import Generator, Pixels
from fastdfkd_cli.methods.base import SyntheticBatch, frozen
from fastdfkd_cli.pool import to_uint8


class FastMeta:
    """The meta-learned synthesiser. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        *,
        image_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        amp: bool,
        seed: int,
    ) -> None:
        self.config = config.synthesis
        self.generator_config = config.generator
        self.teacher = teacher
        self.image_size = image_size
        self.num_classes = num_classes
        self.device = device
        self.amp = amp
        # Draws are made on the CPU, so that one seed means one set of latents and labels on every device.
        self.rng = torch.Generator().manual_seed(seed)
        self.batches = 0
        self.statistics: BatchNormStatistics | None = None
        if self.config.feature_weight > 0:
            self.statistics = BatchNormStatistics(teacher, self.config.feature_momentum)
            self.statistics.__enter__()
        self.shared = self._new_generator()  # theta^: what is common to all images
        self.adapted = self._new_generator()  # theta: its copy, adapted to one batch
        self.shared_latent: Tensor | None = None  # z^, where it is kept between batches
        if self._keeps_latent:
            self.shared_latent = self._new_latent()
        self.meta_optimizer = self._new_meta_optimizer()

    # -- the pieces ---------------------------------------------------------------------------------------------

    @property
    def _keeps_latent(self) -> bool:
        """Pixels have nothing but z to hand on; a generator hands on z only if it is meta-learned."""
        if self.config.images == "pixel":
            return self.config.reuse != "none"
        return self.config.reuse == "meta" and self.config.latent == "meta"

    def _new_generator(self) -> Generator | Pixels:
        if self.config.images == "pixel":
            return Pixels(self.image_size)
        # torch's layers draw their first weights from the global state: lend them one that follows from ours.
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reset the states of all CUDA devices too.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=self.rng)))
            generator = Generator(self.generator_config, self.image_size)
        return generator.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def _new_latent(self) -> Tensor:
        return self.shared.sample_latent(self.config.batch_size, self.rng).to(self.device)

    def _new_meta_optimizer(self) -> torch.optim.Adam | None:
        if self.config.reuse != "meta":
            return None
        groups = [{"params": list(self.shared.parameters()), "lr": self.config.meta_lr}]
        if self.shared_latent is not None:
            groups.append({"params": [self.shared_latent], "lr": self.config.meta_lr_latent})
        groups = [group for group in groups if group["params"]]
        return torch.optim.Adam(groups, betas=(self.config.beta1, self.config.beta2))

    # -- Algorithm 1 --------------------------------------------------------------------------------------------

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Lines 4 to 14: adapt for k steps, hand out the images, update what is shared."""
        config = self.config
        self._reinitialise()
        labels = torch.randint(self.num_classes, (config.batch_size,), generator=self.rng)
        labels = labels.to(self.device, non_blocking=True)
        # Line 6: z, theta <- z^, theta^.
        start = self._new_latent() if self.shared_latent is None else self.shared_latent
        z = start.detach().clone().requires_grad_()
        self.adapted.load_state_dict(self.shared.state_dict())
        parameters = list(self.adapted.parameters())
        inner = torch.optim.Adam(
            [{"params": parameters, "lr": config.lr_generator}, {"params": [z], "lr": config.lr_latent}]
            if parameters
            else [{"params": [z], "lr": config.lr_latent}],
            betas=(config.beta1, config.beta2),
        )
        adapted = [*parameters, z]
        gradient_sums = [torch.zeros_like(p) for p in adapted] if self._fomaml else []

        kept: SyntheticBatch | None = None
        lowest = torch.full((), float("inf"), device=self.device)
        with frozen(student):
            for _ in range(config.steps):  # Lines 7 to 9, Eq. 6.
                images, terms, total = self._inversion_loss(z, labels, student)
                inner.zero_grad(set_to_none=True)
                if total.requires_grad:  # without a student, an adversarial term alone leaves nothing to descend
                    total.backward()
                for accumulated, parameter in zip(gradient_sums, adapted, strict=False):
                    if parameter.grad is not None:
                        accumulated.add_(parameter.grad)
                kept, lowest = self._keep(kept, lowest, images, labels, terms, total)
                inner.step()
        assert kept is not None
        if config.keep == "last":  # Line 10: x* = G(z; theta), behind the last step
            with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                kept = SyntheticBatch(to_uint8(self.adapted(z)), labels, kept.losses)
        if self.statistics is not None:
            self.statistics.accumulate()  # Eq. 14, once per batch
            self.statistics.reset()
        self._update_shared(adapted, gradient_sums)  # Line 14
        self.batches += 1
        return kept

    def _inversion_loss(
        self, z: Tensor, labels: Tensor, student: nn.Module | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Eq. 13 (Eq. 15 with momentum) at G(z; theta): images, the unweighted terms, the weighted sum."""
        config = self.config
        if self.statistics is not None:
            self.statistics.reset()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            images = self.adapted(z)
            varied = augment(images, self.rng, config.augmentation)
            teacher_logits = self.teacher(varied)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if self.statistics is not None:
            terms["feature"] = self.statistics.loss()
            total = total + config.feature_weight * terms["feature"]
        if config.class_weight > 0:
            terms["class"] = losses.classification(teacher_logits, labels)
            total = total + config.class_weight * terms["class"]
        if config.adversarial_weight > 0 and student is not None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
                student_logits = student(varied)
            adversarial = losses.ADVERSARIAL[config.adversarial]
            terms["adversarial"] = adversarial(teacher_logits, student_logits, config.adversarial_temperature)
            total = total + config.adversarial_weight * terms["adversarial"]
        terms["total"] = total
        return images, terms, total

    def _keep(
        self,
        kept: SyntheticBatch | None,
        lowest: Tensor,
        images: Tensor,
        labels: Tensor,
        terms: Mapping[str, Tensor],
        total: Tensor,
    ) -> tuple[SyntheticBatch, Tensor]:
        """Choose between the iterate kept so far and the present one, without asking the device for a number."""
        losses_now = {name: term.detach() for name, term in terms.items()}
        batch = SyntheticBatch(to_uint8(images), labels, losses_now)
        if kept is None or self.config.keep == "last":
            return batch, total.detach()
        better = total.detach() < lowest
        chosen = SyntheticBatch(
            torch.where(better, batch.images, kept.images),
            labels,
            {name: torch.where(better, losses_now[name], kept.losses[name]) for name in losses_now},
        )
        return chosen, torch.where(better, total.detach(), lowest)

    @property
    def _fomaml(self) -> bool:
        return self.config.reuse == "meta" and self.config.meta_gradient == "fomaml"

    def _update_shared(self, adapted: list[Tensor], gradient_sums: list[Tensor]) -> None:
        """Line 14: move (z^, theta^); with sequential reuse, the adapted ones simply take their place."""
        shared: list[Tensor] = list(self.shared.parameters())
        if self.shared_latent is not None:
            shared.append(self.shared_latent)
        # A z that is drawn anew stands last in `adapted` and has no partner in `shared`.
        if self.config.reuse == "sequential":
            with torch.no_grad():
                for target, source in zip(shared, adapted, strict=False):
                    target.copy_(source)
        if self.meta_optimizer is None:
            return
        for index, (target, source) in enumerate(zip(shared, adapted, strict=False)):
            if self._fomaml:
                target.grad = gradient_sums[index]  # Eq. 9: the sum of the inner gradients
            else:
                target.grad = self.config.reptile_scale * (target.detach() - source.detach())  # Eq. 10
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad(set_to_none=True)

    def _reinitialise(self) -> None:
        """What starts anew before a batch: everything without reuse; z^ now and then (line 5)."""
        if self.batches == 0:
            return
        if self.config.reuse == "none":
            self.shared = self._new_generator()
            return
        period = self.config.latent_reset_every
        if self.shared_latent is not None and period and self.batches % period == 0:
            self.shared_latent = self._new_latent()
            self.meta_optimizer = self._new_meta_optimizer()

    def renew(self) -> None:
        """Draw the shared generator's first layer anew (pixels have none)."""
        if isinstance(self.shared, Generator):
            self.shared.reinitialise_stem(self.rng)

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next batch depends on: theta^, z^, the meta optimiser, Eq. 14's statistics, the draws."""
        state = {f"shared.{name}": tensor for name, tensor in self.shared.state_dict().items()}
        if self.shared_latent is not None:
            state["shared_latent"] = self.shared_latent
        if self.meta_optimizer is not None:
            for index, entries in self.meta_optimizer.state_dict()["state"].items():
                state.update({f"meta_optimizer.{index}.{name}": value for name, value in entries.items()})
        if self.statistics is not None:
            state.update({f"statistics.{name}": value for name, value in self.statistics.state_dict().items()})
        state["rng"] = self.rng.get_state()
        state["batches"] = torch.tensor(self.batches)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave under the same config."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.shared.load_state_dict(part("shared."))
        if self.shared_latent is not None:
            self.shared_latent.copy_(state["shared_latent"])
        self.meta_optimizer = self._new_meta_optimizer()
        if self.meta_optimizer is not None:
            entries: dict[int, dict[str, Tensor]] = {}
            for name, tensor in part("meta_optimizer.").items():
                index, _, key = name.partition(".")
                entries.setdefault(int(index), {})[key] = tensor.clone()
            groups = self.meta_optimizer.state_dict()["param_groups"]
            self.meta_optimizer.load_state_dict({"state": entries, "param_groups": groups})
        if self.statistics is not None:
            self.statistics.load_state_dict({k: v.to(self.device) for k, v in part("statistics.").items()})
        self.rng.set_state(state["rng"].cpu())
        self.batches = int(state["batches"])

    def close(self) -> None:
        """Take the hooks off the teacher."""
        if self.statistics is not None:
            self.statistics.__exit__(None, None, None)


__all__ = ["FastMeta"]
