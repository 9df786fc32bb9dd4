"""FastDFKD: Fang et al., "Up to 100x Faster Data-Free Knowledge Distillation", AAAI 2022.

Each batch starts from features shared by earlier ones and is adapted in k steps (Algorithm 1, lines 4 to 14):

    (z, theta) <- (z, theta) - alpha grad L_i(G(z; theta))            k times, Eq. 6
    (z^, theta^) <- (z^, theta^) - eta grad L_i(G(U^k(z^; theta^)))    once, Eq. 9 (FOMAML) or Eq. 10 (Reptile)

with L = w_cls L_cls + w_adv L_adv + w_feat L_feat (Eq. 13, 15).

The other rows of the paper's Table 5 are the same loop with three switches: ``reuse`` (none, sequential, meta),
``images`` (generator or pixels) and ``feature_momentum``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import EAGER, Acceleration, Captured, to_device
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.bn_stats import BatchNormStatistics, moments_of_all
from fastdfkd_cli.config import RunConfig, SynthesisConfig
from fastdfkd_cli.distributed import sum_
from fastdfkd_cli.errors import is_out_of_memory
from fastdfkd_cli.generators import Generator, Pixels
from fastdfkd_cli.methods.base import SyntheticBatch, frozen
from fastdfkd_cli.pool import to_uint8
from fastdfkd_cli.processes import ALONE, Group
from fastdfkd_cli.synced_norm import sync_batch_norm


class FastMeta:
    """The meta-learned synthesiser. See :func:`fastdfkd_cli.methods.build_method` for the arguments.

    A batch is drawn on the CPU (latents, labels, augmentations) and then computed on the device from tensors that stay
    where they are: without a question to the device, a copy or a new optimiser in the loop, so that all k steps can be
    replayed as one CUDA graph.

    Several processes (``group``) adapt one batch together, each its own part of it, and end with the same theta^: the
    batch is then R times ``batch_size``. Its parts are tied together by the generator's BatchNorm, by the statistics
    of the feature term and by the gradients in theta, which is what is exchanged in each of the k steps; latents are
    each image's own and stay where they are.
    """

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
        acceleration: Acceleration = EAGER,
        group: Group = ALONE,
    ) -> None:
        self.config = config.settings_of(SynthesisConfig)
        self.generator_config = config.generator
        self.teacher = teacher
        self.image_size = image_size
        self.num_classes = num_classes
        self.device = device
        self.amp = amp
        self.acceleration = acceleration
        self.group = group
        self.seed = seed
        # Draws are made on the CPU, so that one seed means one set of latents and labels on every device.
        self.rng = torch.Generator().manual_seed(group.seed(seed))
        # What generators start from is drawn alike in all processes.
        self.common_rng = torch.Generator().manual_seed(seed) if group.several else self.rng
        self.batches = 0
        self._updating = False  # what the next batch starts from is being changed
        #: Factor on all learning rates.
        self.rate = 1.0
        self.statistics: BatchNormStatistics | None = None
        if self.config.feature_weight > 0:
            self.statistics = BatchNormStatistics(teacher, self.config.feature_momentum)
            self.statistics.__enter__()
        self._observe: Callable[[Tensor], tuple[Tensor, Tensor | None]] = self._observe_teacher
        self._ask: Callable[[Tensor], Tensor] = self._ask_student
        self.shared = self._new_generator()  # theta^: what is common to all images
        self.adapted = self._new_generator()  # theta: its copy, adapted to one batch
        sync_batch_norm(self.adapted, group)
        self.shared_latent: Tensor | None = None  # z^, where it is kept between batches
        if self._keeps_latent:
            self.shared_latent = self._new_latent()
        self.meta_optimizer = self._new_meta_optimizer()
        self.z = torch.zeros(self.config.batch_size, *self.shared.latent_shape, device=device).requires_grad_()
        self.labels = torch.zeros(self.config.batch_size, dtype=torch.int64, device=device)
        self.draws = [draws.to(device) for draws in self._draw_augmentations(torch.Generator())]
        self.inner_optimizer = self._new_inner_optimizer()
        self.student: nn.Module | None = None
        self._run = self._new_run()

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
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=self.common_rng)))
            generator = Generator(self.generator_config, self.image_size)
        return generator.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def _new_latent(self) -> Tensor:
        return to_device(self.shared.sample_latent(self.config.batch_size, self.rng), self.device)

    def _draw_augmentations(self, rng: torch.Generator) -> list[Tensor]:
        """How each of the k steps varies the images."""
        config = self.config
        return [
            draw_augmentation(config.augmentation, config.batch_size, self.image_size, rng) for _ in range(config.steps)
        ]

    def _adam(self, groups: list[dict[str, Any]]) -> torch.optim.Adam:
        cuda = self.device.type == "cuda"
        # One kernel for all weights, where there is one; a step count on the device, which a graph can replay.
        fused = cuda or self.device.type == "cpu"
        betas = (self.config.beta1, self.config.beta2)
        groups = [{**group, "lr": group["lr"] * self.rate} for group in groups if group["params"]]
        return torch.optim.Adam(groups, betas=betas, fused=fused, capturable=cuda)

    def _new_inner_optimizer(self) -> torch.optim.Adam:
        return self._adam(
            [
                {"params": list(self.adapted.parameters()), "lr": self.config.lr_generator},
                {"params": [self.z], "lr": self.config.lr_latent},
            ]
        )

    def _new_meta_optimizer(self) -> torch.optim.Adam | None:
        if self.config.reuse != "meta":
            return None
        latents = [] if self.shared_latent is None else [self.shared_latent]
        return self._adam(
            [
                {"params": list(self.shared.parameters()), "lr": self.config.meta_lr},
                {"params": latents, "lr": self.config.meta_lr_latent},
            ]
        )

    def _new_run(self) -> Captured[SyntheticBatch]:
        return self.acceleration.captured(self._adapt, "synthesis")

    # -- Algorithm 1 --------------------------------------------------------------------------------------------

    def prepare(self, student: nn.Module | None = None) -> None:
        """Compile the networks' passes, where that is wanted, before the first batch is timed."""
        batch = min(self.acceleration.micro_batch or self.config.batch_size, self.config.batch_size)
        probe = torch.full((batch, *self.image_size), 0.5, device=self.device)
        probe = probe.contiguous(memory_format=torch.channels_last).requires_grad_()
        if self.acceleration.compile and self.statistics is not None:
            with torch.no_grad():
                self._observe_teacher(probe)  # lays out what the compiled pass finds ready
        self._observe = self.acceleration.compiled(
            self._observe_teacher, "the teacher's pass in synthesis", probe, modules=[self.teacher]
        )
        if student is not None and self.config.adversarial_weight > 0:
            self.student = student
            with frozen(student):
                self._ask = self.acceleration.compiled(
                    self._ask_student, "the student's pass in synthesis", probe, modules=[student]
                )

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Lines 4 to 14: adapt for k steps, hand out the images, update what is shared."""
        if student is not self.student:
            # What was recorded computes with the other one; in a run this happens once, when warm-up rounds end.
            self.student = student
            self._run = self._new_run()
        while True:
            draws = self.rng.get_state()
            try:
                self._reinitialise()
                self._draw()
                with frozen(student):
                    batch = self._run()
                break
            except Exception as error:
                # With several processes the others are waiting further on: nothing can be done again.
                if not is_out_of_memory(error) or self._updating or self.group.several or not self._split():
                    raise
                self.rng.set_state(draws)  # the same batch again
        self.batches += 1
        if not self._run.replays:
            return SyntheticBatch(batch.images, self.labels.clone(), batch.losses)
        # What a recording gives out is written over by its next run.
        terms = {name: term.clone() for name, term in batch.losses.items()}
        return SyntheticBatch(batch.images.clone(), self.labels.clone(), terms)

    @property
    def micro_batch(self) -> int:
        return self.acceleration.micro_batch

    def _split(self) -> bool:
        """Have teacher and student see half as many images at a time; whether that was possible."""
        before = self.acceleration.micro_batch or self.config.batch_size
        if before == 1:
            return False
        size = (before + 1) // 2
        self.acceleration.say(f"out of memory with {before} images at a time: teacher and student see {size} from here")
        self.acceleration = replace(self.acceleration, micro_batch=size)
        self.inner_optimizer.zero_grad(set_to_none=True)
        self._run = self._new_run()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    @torch.no_grad()
    def _draw(self) -> None:
        """Everything random about a batch, put where the k steps read it. Line 6 for a z that is drawn anew."""
        labels = torch.randint(self.num_classes, (self.config.batch_size,), generator=self.rng)
        self.labels.copy_(to_device(labels, self.device))
        if self.shared_latent is None:
            self.z.copy_(self._new_latent())
        for kept, drawn in zip(self.draws, self._draw_augmentations(self.rng), strict=True):
            kept.copy_(to_device(drawn, self.device))

    def _adapt(self) -> SyntheticBatch:
        """Lines 6 to 14, from tensors that stay where they are."""
        config, student = self.config, self.student
        with torch.no_grad():  # Line 6: z, theta <- z^, theta^
            if self.shared_latent is not None:
                self.z.copy_(self.shared_latent)
            _copy(self.adapted.parameters(), self.shared.parameters())
        for state in self.inner_optimizer.state.values():  # a fresh Adam for each batch
            for value in state.values():
                value.zero_()
        parameters = list(self.adapted.parameters())
        adapted = [*parameters, self.z]
        gradient_sums = [torch.zeros_like(p) for p in adapted] if self._fomaml else []

        kept: SyntheticBatch | None = None
        moments: Tensor | None = None
        lowest = torch.full((), float("inf"), device=self.device)
        for draws in self.draws:  # Lines 7 to 9, Eq. 6.
            self.inner_optimizer.zero_grad(set_to_none=True)
            images, terms, moments = self._descend(draws, student)
            for accumulated, parameter in zip(gradient_sums, adapted, strict=False):
                if parameter.grad is not None:
                    accumulated.add_(parameter.grad)
            kept, lowest = self._keep(kept, lowest, images, terms)
            self.inner_optimizer.step()
        assert kept is not None
        if config.keep == "last":  # Line 10: x* = G(z; theta), behind the last step
            with torch.no_grad(), self._autocast():
                kept = SyntheticBatch(to_uint8(self.adapted(self.z)), self.labels, kept.losses)
        self._updating = True
        if self.statistics is not None:
            assert moments is not None
            self.statistics.accumulate(moments)  # Eq. 14, once per batch
        self._update_shared(adapted, gradient_sums)  # Line 14
        self._updating = False
        return kept

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def _observe_teacher(self, varied: Tensor) -> tuple[Tensor, Tensor | None]:
        """f_t(x), and the moments of its BatchNorm inputs where the feature term is on."""
        with self._autocast():
            if self.statistics is None:
                return self.teacher(varied), None
            return self.statistics.observe(varied)

    def _ask_student(self, varied: Tensor) -> Tensor:
        assert self.student is not None
        with self._autocast():
            return self.student(varied)

    def _descend(self, draws: Tensor, student: nn.Module | None) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The gradients of Eq. 13 (Eq. 15 with momentum) at G(z; theta) in z and theta: images, terms, moments."""
        with self._autocast():
            images = self.adapted(self.z)
        if 0 < self.acceleration.micro_batch < len(images):
            terms, moments = self._in_micro_batches(images, draws, student)
        else:
            terms, moments = self._inversion_loss(images, self.labels, draws, student)
            if terms["total"].requires_grad:  # without a student, an adversarial term alone leaves nothing to descend
                self._part(terms["total"]).backward()
        return images, self._of_all(terms), moments

    def _part(self, total: Tensor) -> Tensor:
        """What this process adds to the loss of all, which is the mean of theirs."""
        return total / self.group.world_size if self.group.several else total

    @torch.no_grad()
    def _of_all(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the whole batch; and put the whole batch's gradients in theta in the place of its parts'.

        z's are whole: an image's loss is its own process's, divided by the number of all images.
        """
        if not self.group.several:
            return terms
        values = torch.stack([term.detach() for term in terms.values()]) / self.group.world_size
        sum_(self.group, [values, *(p.grad for p in self.adapted.parameters() if p.grad is not None)])
        return dict(zip(terms, values, strict=True))

    def _inversion_loss(
        self, images: Tensor, labels: Tensor, draws: Tensor, student: nn.Module | None, *, feature: bool = True
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Eq. 13 (Eq. 15 with momentum) at ``images``: the unweighted terms with their weighted sum, and the moments.

        ``feature=False`` leaves the feature term to the caller.
        """
        config = self.config
        varied = apply_augmentation(images, config.augmentation, draws)
        teacher_logits, moments = self._observe(varied)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if self.statistics is not None and feature:
            assert moments is not None
            moments = moments_of_all(self.group, moments)
            terms["feature"] = self.statistics.loss(moments)
            total = total + config.feature_weight * terms["feature"]
        if config.class_weight > 0:
            terms["class"] = losses.classification(teacher_logits, labels)
            total = total + config.class_weight * terms["class"]
        if config.adversarial_weight > 0 and student is not None:
            adversarial = losses.ADVERSARIAL[config.adversarial]
            terms["adversarial"] = adversarial(teacher_logits, self._ask(varied), config.adversarial_temperature)
            total = total + config.adversarial_weight * terms["adversarial"]
        terms["total"] = total
        return terms, moments

    def _in_micro_batches(
        self, images: Tensor, draws: Tensor, student: nn.Module | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """:meth:`_descend` with the activations of a few images at a time, to the same result.

        The generator has the whole batch at once (its BatchNorm wants it); teacher and student see each image by
        itself. Only the feature term ties the batch together: its statistics are collected in a first pass without
        gradients, and its derivative in them is then handed to each part in a second one.
        """
        count, size = len(images), self.acceleration.micro_batch
        parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        shares = [(part.stop - part.start) / count for part in parts]
        leaf = images.detach().requires_grad_()
        terms: dict[str, Tensor] = {}
        moments, pull = None, None
        if self.statistics is not None:
            moments = moments_of_all(self.group, self._moments_of_parts(leaf, draws, parts, shares))
            variable = moments.clone().requires_grad_()
            terms["feature"] = self.statistics.loss(variable)
            (pull,) = torch.autograd.grad(self.config.feature_weight * terms["feature"], variable)
        sums: dict[str, Tensor] = {}
        for part, share in zip(parts, shares, strict=True):
            found, here = self._inversion_loss(leaf[part], self.labels[part], draws[:, part], student, feature=False)
            total = share * found.pop("total")
            if here is not None and moments is not None and pull is not None:
                total = total + share * _linearised(here, moments, pull)
            if total.requires_grad:
                self._part(total).backward()
            for name, term in found.items():
                sums[name] = sums.get(name, 0) + share * term.detach()
        if leaf.grad is not None:
            images.backward(leaf.grad)
        terms |= sums
        weights = {
            "feature": self.config.feature_weight,
            "class": self.config.class_weight,
            "adversarial": self.config.adversarial_weight,
        }
        terms["total"] = sum(
            (weights[name] * term.detach() for name, term in terms.items()), torch.zeros((), device=self.device)
        )
        return terms, moments

    @torch.no_grad()
    def _moments_of_parts(self, images: Tensor, draws: Tensor, parts: list[slice], shares: list[float]) -> Tensor:
        """The whole batch's moments from those of its parts."""
        means, squares = [], []
        for part, share in zip(parts, shares, strict=True):
            varied = apply_augmentation(images[part], self.config.augmentation, draws[:, part])
            _, moments = self._observe(varied)
            assert moments is not None
            mean, var = moments.chunk(2)
            means.append(share * mean)
            squares.append((share, mean, var))
        mean = torch.stack(means).sum(0)
        # About the common mean: no cancellation.
        var = torch.stack([share * (v + (m - mean) ** 2) for share, m, v in squares]).sum(0)
        return torch.cat([mean, var])

    def _keep(
        self,
        kept: SyntheticBatch | None,
        lowest: Tensor,
        images: Tensor,
        terms: Mapping[str, Tensor],
    ) -> tuple[SyntheticBatch, Tensor]:
        """Choose between the iterate kept so far and the present one, without asking the device for a number."""
        losses_now = {name: term.detach() for name, term in terms.items()}
        total = losses_now["total"]
        batch = SyntheticBatch(to_uint8(images), self.labels, losses_now)
        if kept is None or self.config.keep == "last":
            return batch, total
        better = total < lowest
        chosen = SyntheticBatch(
            torch.where(better, batch.images, kept.images),
            self.labels,
            {name: torch.where(better, losses_now[name], kept.losses[name]) for name in losses_now},
        )
        return chosen, torch.where(better, total, lowest)

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

    @torch.no_grad()
    def _reinitialise(self) -> None:
        """What starts anew before a batch: everything without reuse; z^ now and then (line 5). All in place."""
        if self.batches == 0:
            return
        if self.config.reuse == "none":
            _copy(self.shared.parameters(), self._new_generator().parameters())
            return
        period = self.config.latent_reset_every
        if self.shared_latent is not None and period and self.batches % period == 0:
            self.shared_latent.copy_(self._new_latent())
            for state in self.meta_optimizer.state.values() if self.meta_optimizer is not None else ():
                for value in state.values():
                    value.zero_()

    def renew(self) -> None:
        """Draw the shared generator's first layer anew (pixels have none)."""
        if isinstance(self.shared, Generator):
            self.shared.reinitialise_stem(self.common_rng)

    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates."""
        self.rate *= factor
        for optimizer in (self.inner_optimizer, self.meta_optimizer):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] *= factor
        self._run = self._new_run()  # a recording has the rates in it

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
        if self.group.several:
            state["common_rng"] = self.common_rng.get_state()
        state["batches"] = torch.tensor(self.batches)
        state["rate"] = torch.tensor(self.rate, dtype=torch.float64)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def is_own(self, name: str) -> bool:
        """Each of several processes has its own draws, z^, and what the meta optimiser knows of that."""
        of_latent = f"meta_optimizer.{len(list(self.shared.parameters()))}."
        return name in ("rng", "shared_latent") or name.startswith(of_latent)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave under the same config.

        Without a process's own entries: from another number of processes. Then they follow from the seed and from how
        many batches were made.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}

        self.batches = int(state["batches"])
        if "rng" in state:
            self.rng.set_state(state["rng"].cpu())
        else:
            self.rng.manual_seed(self.group.seed(self.seed + self.batches))
        if self.group.several and "common_rng" in state:
            self.common_rng.set_state(state["common_rng"].cpu())
        elif self.group.several:
            self.common_rng.manual_seed(self.seed + self.batches)
        self.shared.load_state_dict(part("shared."))
        if self.shared_latent is not None:
            with torch.no_grad():
                self.shared_latent.copy_(state["shared_latent"] if "shared_latent" in state else self._new_latent())
        self.rate = float(state["rate"])
        self.inner_optimizer, self.meta_optimizer = self._new_inner_optimizer(), self._new_meta_optimizer()
        if self.meta_optimizer is not None:
            entries: dict[int, dict[str, Tensor]] = {}
            parameters = [p for group in self.meta_optimizer.param_groups for p in group["params"]]
            for name, tensor in part("meta_optimizer.").items():
                index, _, key = name.partition(".")
                # In the weight's own memory layout, which a file does not keep: the fused kernel walks both alike.
                like = parameters[int(index)] if key != "step" else tensor
                entries.setdefault(int(index), {})[key] = torch.empty_like(like).copy_(tensor)
            groups = self.meta_optimizer.state_dict()["param_groups"]
            self.meta_optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self._run = self._new_run()  # a recording would go on with the earlier optimiser
        if self.statistics is not None:
            self.statistics.load_state_dict({k: v.to(self.device) for k, v in part("statistics.").items()})

    def close(self) -> None:
        """Take the hooks off the teacher."""
        if self.statistics is not None:
            self.statistics.__exit__(None, None, None)


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _linearised(moments: Tensor, of_batch: Tensor, pull: Tensor) -> Tensor:
    """A function of a part's ``moments`` with the derivative in its images that ``pull . of_batch`` has in them.

    With weights w over parts, the batch's mean is sum w m and its variance sum w (v + m^2) - mean^2; the factor w is
    the caller's.
    """
    mean, var = moments.chunk(2)
    batch_mean, _ = of_batch.chunk(2)
    pull_mean, pull_var = pull.chunk(2)
    return (pull_mean * mean + pull_var * (var + mean * (mean - 2 * batch_mean))).sum()


__all__ = ["FastMeta"]
