"""The synthetic images a student learns from, in one uint8 ring on the device.

There are no files and no worker processes between synthesis and distillation: a training batch is one gather.

Beside each image the ring can keep the teacher's soft labels of a few fixed variations of it, so that the teacher,
which is frozen, sees each of them once and not again in every KD step (the idea of Shen and Xing, "A Fast Knowledge
Distillation Framework for Visual Recognition", ECCV 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdfkd_cli.acceleration import to_device
from fastdfkd_cli.augment import apply_augmentation, draw_augmentation
from fastdfkd_cli.method_config import Augmentation


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 0..255; what is kept, shown and stored is always this."""
    return images.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float().div_(255)


def pool_bytes_per_image(
    image_size: tuple[int, int, int],
    *,
    views: int = 0,
    num_classes: int = 0,
    augmentation: Augmentation = "none",
    amp: bool = False,
) -> int:
    """Bytes that a pool holds for an image.

    Args:
        image_size: C, H, W.
        views: variations whose soft labels are kept.
        num_classes: logits of each.
        augmentation: how the variations are drawn.
        amp: whether the teacher's logits are bf16.
    """
    channels, height, width = image_size
    numbers = len(draw_augmentation(augmentation, 1, image_size, torch.Generator()))
    return channels * height * width + 8 + views * (4 * numbers + num_classes * (2 if amp else 4))


@dataclass
class _SoftLabels:
    """What the teacher says to V fixed variations of each image of a ring."""

    augmentation: Augmentation
    draws: Tensor  # [N, V, D], for apply_augmentation
    logits: Tensor  # [N, V, C, ...], as the teacher gave them

    @property
    def views(self) -> int:
        return self.logits.shape[1]


class ImagePool:
    """A ring of labelled images; when it is full, the oldest images make room.

    Args:
        image_size: C, H, W.
        capacity: most images kept. Memory is taken in growing blocks up to that, so that a run whose length the
            clock decides does not pay for more than it makes.
        device: where the images live.
    """

    def __init__(self, image_size: tuple[int, int, int], capacity: int, device: torch.device) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be 1 or more, not {capacity}")
        self.image_size = image_size
        self.capacity = capacity
        self.device = device
        self._images = torch.empty(0, *image_size, dtype=torch.uint8, device=device)
        self._labels = torch.empty(0, dtype=torch.int64, device=device)
        self._soft: _SoftLabels | None = None
        self.added = 0  #: Images ever put in; the latest stand in the ring.
        self._unlabelled = 0  # of the newest images: those without soft labels

    @classmethod
    def holding(cls, images: Tensor, labels: Tensor, device: torch.device) -> ImagePool:
        """A full pool of given images (uint8 ``[N, C, H, W]``, int64 ``[N]``); on their own device it shares them."""
        channels, height, width = images.shape[1:]
        pool = cls((channels, height, width), len(images), device)
        pool._images, pool._labels = images.to(device), labels.to(device)
        pool.added = pool._unlabelled = len(images)
        return pool

    def __len__(self) -> int:
        return self._filled

    @property
    def _filled(self) -> int:
        return min(self.added, self.capacity)

    @property
    def _next(self) -> int:
        return self.added % self.capacity

    @property
    def newest(self) -> int:
        """Position just behind the newest image, in :attr:`images`."""
        return self._next or self._filled

    @property
    def images(self) -> Tensor:
        """The images that are held, uint8 ``[N, C, H, W]``: a view, in no order of age once the ring is full."""
        return self._images[: self._filled]

    @property
    def labels(self) -> Tensor:
        """The classes that were asked for, int64 ``[N]``: a view beside :attr:`images`."""
        return self._labels[: self._filled]

    @property
    def nbytes(self) -> int:
        """Bytes taken, also for images still to come."""
        held = [self._images, self._labels]
        if self._soft is not None:
            held += [self._soft.draws, self._soft.logits]
        return sum(tensor.nbytes for tensor in held)

    def reserve(self, count: int) -> None:
        """Take the memory for ``count`` images (at most the capacity) at once."""
        count = min(count, self.capacity)
        if count <= len(self._images):
            return
        # One after the other: at most one of them is there twice at a time.
        self._images = self._grown(self._images, count)
        self._labels = self._grown(self._labels, count)
        if self._soft is not None:
            self._soft.draws = self._grown(self._soft.draws, count)
            self._soft.logits = self._grown(self._soft.logits, count)

    def _grown(self, rows: Tensor, count: int) -> Tensor:
        grown = rows.new_empty(count, *rows.shape[1:])
        grown[: self._filled] = rows[: self._filled]
        return grown

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Put a batch in: uint8 ``[B, C, H, W]`` and int64 ``[B]``, B at most the capacity."""
        count = len(images)
        if count > self.capacity:
            raise ValueError(f"a batch of {count} images does not fit a pool of {self.capacity}")
        if images.dtype != torch.uint8:
            raise TypeError(f"the pool holds uint8 images, not {images.dtype}")
        needed = min(self._filled + count, self.capacity)
        if needed > len(self._images):
            self.reserve(max(needed, 2 * len(self._images)))
        behind = min(count, self.capacity - self._next)  # so many fit before the ring begins anew
        for rows, values in ((self._images, images), (self._labels, labels)):
            rows[self._next : self._next + behind] = values[:behind]
            rows[: count - behind] = values[behind:]
        self.added += count
        self._unlabelled = min(self._unlabelled + count, needed)

    @property
    def unlabelled(self) -> int:
        """How many images have no soft labels (all of them, until :meth:`label` is called)."""
        return self._unlabelled

    def label(
        self,
        teacher: Callable[[Tensor], Tensor],
        views: int,
        augmentation: Augmentation,
        rng: torch.Generator,
        *,
        batch_size: int,
    ) -> None:
        """Draw ``views`` variations of each image that has none yet, and keep what the teacher says to them.

        Args:
            teacher: float images in [0, 1] ``[B, C, H, W]`` -> logits ``[B, classes, ...]``, without gradient.
            views: V, 1 or more; the same in every call.
            augmentation: how images are varied; the same in every call. With ``none``, one variation is all there is.
            rng: source of the draws.
            batch_size: most images that the teacher is shown at a time.
        """
        while self._unlabelled:
            start = (self._next - self._unlabelled) % self.capacity
            count = min(batch_size, self._unlabelled, self.capacity - start)
            images = self._images[start : start + count]
            draws = to_device(draw_augmentation(augmentation, views * count, self.image_size, rng), self.device)
            draws = draws.unflatten(1, (views, count))
            seen = (to_float(apply_augmentation(images, augmentation, draws[:, view])) for view in range(views))
            logits = torch.stack([teacher(each) for each in seen], dim=1)
            if self._soft is None:
                rows = len(self._images)
                self._soft = _SoftLabels(
                    augmentation, draws.new_empty(rows, views, len(draws)), logits.new_empty(rows, *logits.shape[1:])
                )
            self._soft.draws[start : start + count] = draws.permute(2, 1, 0)
            self._soft.logits[start : start + count] = logits
            self._unlabelled -= count

    def sample(
        self, count: int, rng: torch.Generator, augmentation: Augmentation = "none"
    ) -> tuple[Tensor, Tensor | None]:
        """Draw ``count`` images uniformly, with replacement, and vary each.

        Where soft labels are kept, one of an image's variations is drawn with it.

        Args:
            rng: source of the draws. On the CPU, all of them reach the device in one copy that nobody waits for.
            augmentation: how images are varied; where soft labels are kept, as they were for :meth:`label`.

        Returns:
            uint8 ``[count, C, H, W]``, and the teacher's logits of exactly these, ``[count, classes, ...]``, or None.
        """
        if not self._filled:
            raise ValueError("the pool is empty")
        if self._soft is None:
            index = torch.randint(self._filled, (count,), generator=rng, device=rng.device)
            draws = draw_augmentation(augmentation, count, self.image_size, rng)
            # Whole numbers and floats in one tensor: bits are only passed on.
            sent = to_device(torch.cat([index.int().unsqueeze(0), draws.view(torch.int32)]), self.device)
            return apply_augmentation(self._images[sent[0]], augmentation, sent[1:].view(torch.float32)), None
        if self._unlabelled:
            raise ValueError(f"{self._unlabelled} images of the pool have no soft labels yet")
        if augmentation != self._soft.augmentation:
            raise ValueError(f"the pool's soft labels are those of {self._soft.augmentation}, not of {augmentation}")
        views = self._soft.views
        index = torch.randint(self._filled * views, (count,), generator=rng, device=rng.device)
        index = to_device(index, self.device)
        images, draws = self._images[index // views], self._soft.draws.flatten(0, 1)[index].T
        return apply_augmentation(images, augmentation, draws), self._soft.logits.flatten(0, 1)[index]

    # -- what a checkpoint holds of it --------------------------------------------------------------------------

    def parts(self, stored: Iterable[str], *, images: bool = True) -> dict[str, dict[str, Tensor] | None]:
        """The pool as parts that never change, by name; None for those that are ``stored`` already.

        An image is counted by how many were put in before it, so that a part's name says for good what it holds:
        ``images-0-512`` or ``soft-0-512``. What only held images that made room for others is not among them.

        Args:
            images: whether the images belong to it, or come from elsewhere.
        """
        oldest, found = self.added - self._filled, dict[str, dict[str, Tensor] | None]()
        ends = {"images": self.added if images else 0, "soft": self.added - self._unlabelled if self._soft else 0}
        for kind, end in ends.items():
            spans = [(*_span(name), name) for name in stored if name.startswith(f"{kind}-")]
            found |= dict.fromkeys(name for _, stop, name in spans if stop > oldest)
            start = max([oldest, *(stop for _, stop, _ in spans)])
            if start < end:
                rows = torch.arange(start, end, device=self.device) % self.capacity
                found[f"{kind}-{start}-{end}"] = {name: rows_of[rows] for name, rows_of in self._rows(kind).items()}
        return found

    def _rows(self, kind: str) -> dict[str, Tensor]:
        if kind == "images":
            return {"images": self._images, "labels": self._labels}
        assert self._soft is not None
        return {"draws": self._soft.draws, "logits": self._soft.logits}

    def restore(
        self, parts: Mapping[str, Mapping[str, Tensor]], added: int, unlabelled: int, augmentation: Augmentation
    ) -> None:
        """Become the pool that :meth:`parts` was asked of, when ``added`` images had been put in.

        Args:
            parts: by name.
            unlabelled: how many of the newest images had no soft labels.
            augmentation: how the labelled variations were drawn.
        """
        self.added, self._unlabelled = added, unlabelled
        if self._filled > len(self._images):
            fresh = self._images.new_empty(self._filled, *self.image_size)
            self._images, self._labels = fresh, self._labels.new_empty(self._filled)
        oldest = added - self._filled
        for name, tensors in parts.items():
            start, stop = _span(name)
            kind = name.partition("-")[0]
            if kind == "soft" and self._soft is None:
                draws, logits = tensors["draws"], tensors["logits"]
                rows = len(self._images)
                self._soft = _SoftLabels(
                    augmentation,
                    torch.empty(rows, *draws.shape[1:], dtype=draws.dtype, device=self.device),
                    torch.empty(rows, *logits.shape[1:], dtype=logits.dtype, device=self.device),
                )
            if stop <= oldest:
                continue
            places = torch.arange(max(start, oldest), stop, device=self.device) % self.capacity
            for key, target in self._rows(kind).items():
                target[places] = tensors[key][max(oldest - start, 0) :].to(self.device)

    def forget(self, added: int, unlabelled: int) -> None:
        """Be again the pool that had ``added`` images, ``unlabelled`` of them without soft labels.

        Where later images took the places of earlier ones, they stay there.
        """
        self.added, self._unlabelled = added, unlabelled


@dataclass(frozen=True)
class StoredPool:
    """What :meth:`ImagePool.parts` gave over time, and how the pool stood then."""

    parts: Mapping[str, Mapping[str, Tensor]]
    added: int
    unlabelled: int
    held: int

    def rows(self, kind: str) -> dict[str, Tensor]:
        """The rows of its ``images``, or of its ``soft`` labels, oldest first."""
        oldest = self.added - self.held
        spans = sorted((*_span(name), name) for name in self.parts if name.startswith(f"{kind}-"))
        pieces = [
            {key: rows[max(oldest - start, 0) :] for key, rows in self.parts[name].items()}
            for start, stop, name in spans
            if stop > oldest
        ]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]} if pieces else {}


def redealt(pools: Sequence[StoredPool], processes: int) -> list[StoredPool]:
    """The pools of several processes as those of another number of them, each with every so many-th image.

    Age decides the order, so that the oldest still make room first. Images without soft labels must be the newest of a
    pool: some that have them may lose them.
    """
    age = torch.cat([torch.arange(pool.held) * len(pools) + index for index, pool in enumerate(pools)])
    labelled = torch.cat([torch.arange(pool.held) < pool.held - pool.unlabelled for pool in pools])
    order = age.argsort()
    whole = {}
    for kind in ("images", "soft"):
        rows_of_each = [pool.rows(kind) for pool in pools]
        if all(rows_of_each):
            whole[kind] = {key: torch.cat([rows[key] for rows in rows_of_each]) for key in rows_of_each[0]}
    with_labels = int(labelled[order].long().cumprod(0).sum()) if "soft" in whole else 0
    # Soft labels stand in a tensor of their own, without the rows of images that have none.
    places = {"images": torch.arange(len(age)), "soft": labelled.long().cumsum(0) - 1}
    found = []
    for rank in range(processes):
        chosen = order[rank::processes]
        held, soft = len(chosen), len(range(rank, with_labels, processes))
        parts = {}
        for kind, count in (("images", held), ("soft", soft)):
            if count and kind in whole:
                rows = places[kind][chosen[:count]]
                parts[f"{kind}-0-{count}"] = {key: values[rows] for key, values in whole[kind].items()}
        found.append(StoredPool(parts, held, held - soft, held))
    return found


def _span(name: str) -> tuple[int, int]:
    _, start, stop = name.split("-")
    return int(start), int(stop)


__all__ = ["ImagePool", "StoredPool", "pool_bytes_per_image", "redealt", "to_float", "to_uint8"]
