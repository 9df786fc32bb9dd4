"""Generative DFD: Luo et al., "Large-Scale Generative Data-Free Distillation", 2020 (arXiv:2012.05578).

An ensemble of generators, one for each class c, each trained by the teacher alone:

    min over G_c of  w_cls CE(f_t(G_c(z)), c) + w_feat L_feat(G_c(z)),    z ~ N(0, I)

where L_feat brings the statistics of the BatchNorm layers' inputs to those that the teacher remembers. The student
takes no part, so that a generator follows from the teacher, the seed and its class. That makes what is stored of it a
cache: a generator is trained when its class is first asked for, kept in memory or in a temporary folder, and trained
again, to the same weights, where it is gone (:class:`_Store`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import to_device
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.generators import Generator
from fastdfkd_cli.method_config import GenerativeDFDConfig
from fastdfkd_cli.methods.base import Method, SyntheticBatch
from fastdfkd_cli.pool import to_uint8

Weights = dict[str, Tensor]


class _Store:
    """The weights of trained generators by class: in memory up to a limit, the others in a temporary folder."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.held: dict[int, Weights] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, label: int) -> Weights | None:
        """What was put there; None where it is gone."""
        if label in self.held or self._folder is None:
            return self.held.get(label)
        try:
            return safetensors.torch.load_file(self._path(self._folder, label))
        except (OSError, SafetensorError):  # never written, or somebody clears temporary folders
            return None

    def put(self, label: int, weights: Mapping[str, Tensor]) -> bool:
        """Keep copies; False where the disk does not take them."""
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
        if _size(copies) + sum(map(_size, self.held.values())) <= self.memory_bytes:
            self.held[label] = copies
            return True
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="fastdfkd-generators-")
            safetensors.torch.save_file(copies, self._path(self._folder, label))
        except (OSError, SafetensorError):
            if self._folder is not None:
                self._path(self._folder, label).unlink(missing_ok=True)
            return False
        return True

    def clear(self) -> None:
        self.held = {}
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()
            self._folder = None

    @staticmethod
    def _path(folder: tempfile.TemporaryDirectory[str], label: int) -> Path:
        return Path(folder.name, f"{label}.safetensors")


def _size(weights: Weights) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


class GenerativeDFD(Method[GenerativeDFDConfig]):
    """The ensemble. See :func:`fastdfkd_cli.methods.build_method` for the arguments."""

    settings = GenerativeDFDConfig

    def __init__(self, config: RunConfig, teacher: nn.Module, *, seed: int, **keywords: object) -> None:
        super().__init__(config, teacher, seed=seed, **keywords)  # type: ignore[arg-type]
        self.seed = seed
        self.store = _Store(self.config.memory_mib * 2**20)
        #: All classes in the order of their turns, and how many have had theirs.
        self.order = torch.arange(self.num_classes)
        self.turn = self.num_classes
        self._told = False

    def _next_classes(self) -> list[int]:
        """Those of a batch: each class once before any comes again."""
        found = []
        for _ in range(self.config.classes_per_batch):
            if self.turn == self.num_classes:
                self.order, self.turn = torch.randperm(self.num_classes, generator=self.rng), 0
            found.append(int(self.order[self.turn]))
            self.turn += 1
        return found

    def terms(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss at ``images`` ``[B, C, H, W]`` as the teacher sees them: unweighted terms, and ``total``."""
        logits, moments = self.observe(images)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if self.statistics is not None and moments is not None:
            terms["feature"] = self.statistics.loss(moments)
            total = total + self.config.feature_weight * terms["feature"]
        if self.config.class_weight > 0:
            terms["class"] = losses.classification(logits, labels)
            total = total + self.config.class_weight * terms["class"]
        return terms | {"total": total}

    def generator_of(self, label: int) -> Generator:
        """G_c, trained now if there is none yet."""
        # Own draws, so that a generator does not depend on which ones came before it.
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + label) % 2**63)
        generator = self.new_generator(rng)
        if (weights := self.store.get(label)) is not None:
            generator.load_state_dict(weights)
            return generator
        settings = self.config
        optimizer = self.adam(list(generator.parameters()), settings.lr_generator, (settings.beta1, settings.beta2))
        labels = torch.full((settings.batch_size,), label, device=self.device)
        for _ in range(settings.steps):
            optimizer.zero_grad(set_to_none=True)
            z = to_device(torch.randn(settings.batch_size, *generator.latent_shape, generator=rng), self.device)
            with self.autocast():
                images = generator(z)
            draws = draw_augmentation(settings.augmentation, len(images), self.image_size, rng)
            varied = apply_augmentation(images, settings.augmentation, to_device(draws, self.device))
            self.terms(varied, labels)["total"].backward()
            optimizer.step()
        if not self.store.put(label, generator.state_dict()) and not self._told:
            self._told = True
            self.acceleration.say(
                "the temporary folder takes no more generators: those that do not fit are trained again each time"
            )
        return generator

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Images of the next class, or of a few in equal parts; the student takes no part."""
        count, classes = self.config.batch_size, self._next_classes()
        labels = torch.tensor(classes)[torch.arange(count) * len(classes) // count]
        parts = []
        for index, label in enumerate(classes):
            share = int((torch.arange(count) * len(classes) // count == index).sum())
            generator = self.generator_of(label)
            z = to_device(generator.sample_latent(share, self.rng), self.device)
            with torch.no_grad(), self.autocast():
                parts.append(generator(z))
        images, labels = torch.cat(parts), to_device(labels, self.device)
        with torch.no_grad():
            terms = self.terms(images, labels)
        self.batches += 1
        return SyntheticBatch(to_uint8(images), labels, terms)

    def slow_down(self, factor: float) -> None:
        """At a lower rate all generators are others."""
        super().slow_down(factor)
        self.store.clear()

    def own_state(self) -> dict[str, Tensor]:
        """The turns, and the generators in memory; those on the disk can be trained again."""
        state = {"seed": torch.tensor(self.seed), "order": self.order, "turn": torch.tensor(self.turn)}
        for label, weights in self.store.held.items():
            state |= {f"generators.{label}.{name}": tensor for name, tensor in weights.items()}
        return state

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self.store.clear()
        self.seed, self.order, self.turn = int(state["seed"]), state["order"].cpu().clone(), int(state["turn"])
        held: dict[int, Weights] = {}
        for name, tensor in state.items():
            if name.startswith("generators."):
                _, number, key = name.split(".", 2)
                held.setdefault(int(number), {})[key] = tensor
        for label, weights in held.items():
            self.store.put(label, weights)

    def close(self) -> None:
        super().close()
        self.store.clear()


__all__ = ["GenerativeDFD"]
