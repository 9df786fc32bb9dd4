"""FastDFKD without any of our speed-ups: eager float32, in the manner of the published runs.

This is what `speed.py` and `accuracy.py` compare with, and what a test holds our float32 results against. It computes
what Fang et al. (AAAI 2022) describe, from the same config, the same weights and the same draws as
:mod:`fastdfkd_cli`, and it spends time where the published implementation is known to spend it:

- all weights of teacher and student keep their gradients, which nobody uses in synthesis;
- float32 and contiguous ``[B, C, H, W]`` throughout;
- the variance of each BatchNorm input is taken over a permuted, contiguous copy;
- ``.item()`` in every inner step;
- each batch goes to disk as PNG files, and each round opens a new loader of four workers over all of them.

Crops and flips are our own batched ones, which cost less than the published ones: the comparison is not made easier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional as pictures

from fastdfkd_cli import losses
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.bn_stats import batch_norm_layers
from fastdfkd_cli.config import GeneratorConfig, RunConfig

#: Worker processes of a loader in the published runs.
WORKERS = 4


class PlainGenerator(nn.Module):
    """The generator as it is usually written: doubling, then a convolution over the doubled map."""

    def __init__(self, config: GeneratorConfig, image_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image_size
        scale = 2**config.upsamplings
        first = (math.ceil(height / scale), math.ceil(width / scale))
        self.kind, self.image_size, self.first_map = config.kind, image_size, (config.width, *first)
        self.latent_shape = (config.latent_dim,) if config.kind == "linear" else (config.latent_dim, *first)
        self.stem: nn.Module
        if config.kind == "linear":
            self.stem = nn.Linear(config.latent_dim, math.prod(self.first_map))
        else:
            self.stem = nn.Conv2d(config.latent_dim, config.width, 3, 1, 1, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(config.width)]
        planes = config.width
        for index in range(config.upsamplings):
            out = config.width if index < config.upsamplings - 1 else max(config.width // 2, 1)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(planes, out, 3, 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(out), nn.LeakyReLU(0.2, inplace=True)]
            planes = out
        self.body = nn.Sequential(*layers, nn.Conv2d(planes, channels, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        x = self.stem(z)
        x = self.body(x.view(-1, *self.first_map) if self.kind == "linear" else x)
        _, height, width = self.image_size
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return torch.sigmoid(x[:, :, top : top + height, left : left + width])


class FeatureHook:
    """One BatchNorm layer's term, read in each forward pass."""

    def __init__(self, layer: nn.Module, momentum: float) -> None:
        self.layer, self.momentum = layer, momentum
        self.accumulated: tuple[Tensor, Tensor] | None = None
        self.handle = layer.register_forward_hook(self._read)

    def _read(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, correction=0)
        if self.accumulated is not None:
            mean = self.momentum * self.accumulated[0] + (1 - self.momentum) * mean
            var = self.momentum * self.accumulated[1] + (1 - self.momentum) * var
        self.latest = (mean.detach(), var.detach())
        distances = (mean - self.layer.running_mean, var - self.layer.running_var)  # type: ignore[operator]
        self.term = distances[0].norm() + distances[1].norm()

    def accumulate(self) -> None:
        if self.momentum > 0:
            self.accumulated = self.latest


class PlainSynthesizer:
    """Algorithm 1, lines 4 to 14, with a meta-learned generator.

    Draws what :class:`fastdfkd_cli.methods.fast_meta.FastMeta` draws for the same seed, in the same order.

    Args:
        config: ``synthesis.reuse`` is "meta", ``synthesis.latent`` is "fresh" and images come from a generator.
        teacher: images in [0, 1] -> logits; a copy of it is used.
    """

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        *,
        image_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        s = config.fast
        if (s.reuse, s.latent, s.images, s.keep) != ("meta", "fresh", "generator", "best"):
            raise ValueError("the plain version knows the paper's CIFAR settings alone")
        self.config, self.image_size, self.num_classes, self.device = s, image_size, num_classes, device
        self.teacher = copy.deepcopy(teacher).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.teacher.eval().requires_grad_(True)
        self.hooks = [FeatureHook(layer, s.feature_momentum) for layer in batch_norm_layers(self.teacher).values()]
        self.rng = torch.Generator().manual_seed(seed)
        self.generator = self._new_generator(config.generator).to(device).train()
        self._new_generator(config.generator)  # ours draws a second one, to hold the adapted weights
        self.meta = torch.optim.Adam(self.generator.parameters(), lr=s.meta_lr, betas=(s.beta1, s.beta2))

    def _new_generator(self, config: GeneratorConfig) -> PlainGenerator:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=self.rng)))
            return PlainGenerator(config, self.image_size)

    def synthesize(self, student: nn.Module | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """One batch: uint8 ``[B, C, H, W]``, the labels ``[B]``, the terms of the kept iterate."""
        s = self.config
        labels = torch.randint(self.num_classes, (s.batch_size,), generator=self.rng).to(self.device)
        z = torch.randn(s.batch_size, *self.generator.latent_shape, generator=self.rng).to(self.device)
        z.requires_grad_()
        draws = [
            draw_augmentation(s.augmentation, s.batch_size, self.image_size, self.rng).to(self.device)
            for _ in range(s.steps)
        ]
        adapted = copy.deepcopy(self.generator)
        optimizer = torch.optim.Adam(
            [{"params": adapted.parameters(), "lr": s.lr_generator}, {"params": [z], "lr": s.lr_latent}],
            betas=(s.beta1, s.beta2),
        )
        if student is not None:
            student.eval()
        self.meta.zero_grad()
        lowest, kept, kept_terms = float("inf"), torch.empty(0), {}
        for step in range(s.steps):
            images = adapted(z)
            varied = apply_augmentation(images, s.augmentation, draws[step])
            logits = self.teacher(varied)
            terms = {}
            if s.feature_weight > 0:
                terms["feature"] = sum((hook.term for hook in self.hooks), torch.zeros((), device=self.device))
            if s.class_weight > 0:
                terms["class"] = losses.classification(logits, labels)
            if s.adversarial_weight > 0 and student is not None:
                against = losses.ADVERSARIAL[s.adversarial]
                terms["adversarial"] = against(logits, student(varied), s.adversarial_temperature)
            weights = {"feature": s.feature_weight, "class": s.class_weight, "adversarial": s.adversarial_weight}
            total = sum((weights[name] * term for name, term in terms.items()), torch.zeros((), device=self.device))
            if total.item() < lowest:
                lowest, kept = total.item(), images.detach()
                kept_terms = {name: term.item() for name, term in terms.items()}
            optimizer.zero_grad()
            total.backward()
            if s.meta_gradient == "fomaml":
                for shared, own in zip(self.generator.parameters(), adapted.parameters(), strict=True):
                    shared.grad = own.grad.clone() if shared.grad is None else shared.grad + own.grad  # type: ignore[union-attr, operator]
            optimizer.step()
        for hook in self.hooks:
            hook.accumulate()
        if s.meta_gradient == "reptile":
            for shared, own in zip(self.generator.parameters(), adapted.parameters(), strict=True):
                shared.grad = s.reptile_scale * (shared.detach() - own.detach())
        self.meta.step()
        return kept.mul(255).round().clamp(0, 255).to(torch.uint8), labels, {**kept_terms, "total": lowest}

    def close(self) -> None:
        for hook in self.hooks:
            hook.handle.remove()


class FolderPool:
    """The pool as PNG files in a folder, read anew by a loader of four workers in every round."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, images: Tensor) -> None:
        for image in images.cpu():
            pictures.to_pil_image(image).save(self.folder / f"{self.count:06d}.png")
            self.count += 1

    def batches(self) -> Iterator[Tensor]:
        """Batches ``[B, C, H, W]`` in [0, 1], without end: one opening of the loader.

        Raises:
            ValueError: the folder holds less than a batch.
        """
        files = _Files(self.folder)
        if len(files) < self.batch_size:
            raise ValueError(f"{len(files)} images in {self.folder}, less than a batch of {self.batch_size}")
        loader: DataLoader[Any] = DataLoader(
            files, batch_size=self.batch_size, shuffle=True, num_workers=WORKERS, drop_last=True
        )
        while True:
            yield from loader


class _Files(Dataset[Tensor]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.png"))
        with Image.open(self.paths[0]) as first:
            size = (first.height, first.width)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=max(1, min(size) // 8)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as picture:
            return self.transform(picture)


class PlainStudent:
    """KD in float32: one step of Eq. 12 with SGD and its cosine."""

    def __init__(self, net: nn.Module, teacher: nn.Module, config: RunConfig) -> None:
        self.net, self.teacher, self.config = net, teacher, config.distillation
        d = self.config
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=d.lr, momentum=d.momentum, nesterov=d.nesterov, weight_decay=d.weight_decay
        )

    def set_learning_rate(self, done: float) -> None:
        """Linear warm-up, then a cosine; ``done`` is the share of steps taken."""
        d = self.config
        if done < d.lr_warmup:
            rate = d.lr * max(done / d.lr_warmup, 0.01)
        else:
            position = (done - d.lr_warmup) / (1 - d.lr_warmup)
            rate = d.lr_min + (d.lr - d.lr_min) * (1 + math.cos(math.pi * min(position, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def learn(self, images: Tensor) -> Tensor:
        """One step on images in [0, 1]; the loss."""
        self.net.train()
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        loss = losses.distillation(teacher_logits, self.net(images), self.config.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def distill(
    config: RunConfig,
    teacher: nn.Module,
    student: nn.Module,
    *,
    image_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
) -> Iterator[tuple[int, float]]:
    """A whole run with the pool in memory, drawn from as ours is: what it learns does not depend on files.

    Yields the round and the latest KD loss; ``student`` is trained in place.
    """
    synthesizer = PlainSynthesizer(
        config, teacher, image_size=image_size, num_classes=num_classes, device=device, seed=config.seed
    )
    pupil = PlainStudent(student, synthesizer.teacher, config)
    schedule, d = config.schedule, config.distillation
    rng = torch.Generator().manual_seed(config.seed + 1)
    pool = torch.empty(0, *image_size, dtype=torch.uint8, device=device)
    total, taken, loss = schedule.kd_rounds * schedule.kd_steps_per_round, 0, float("nan")
    for index in range(schedule.rounds):
        distils = index >= schedule.warmup_rounds
        if index < schedule.synthesis_rounds:
            for _ in range(schedule.batches_per_round):
                pool = torch.cat([pool, synthesizer.synthesize(student if distils else None)[0]])
        if distils:
            for _ in range(schedule.kd_steps_per_round):
                pupil.set_learning_rate(taken / total)
                index_drawn = torch.randint(len(pool), (d.batch_size,), generator=rng).to(device)
                draws = draw_augmentation(d.augmentation, d.batch_size, image_size, rng).to(device)
                images = apply_augmentation(pool[index_drawn], d.augmentation, draws).float() / 255
                loss = pupil.learn(images.contiguous()).item()
                taken += 1
        yield index, loss
    synthesizer.close()
    student.eval()
