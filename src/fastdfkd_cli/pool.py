"""The synthetic images a student learns from, in one uint8 ring on the device.

There are no files and no worker processes between synthesis and distillation: a training batch is one gather.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 0..255; what is kept, shown and stored is always this."""
    return images.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float().div_(255)


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
        self._filled = 0
        self._next = 0

    @classmethod
    def holding(cls, images: Tensor, labels: Tensor, device: torch.device) -> ImagePool:
        """A full pool of given images (uint8 ``[N, C, H, W]``, int64 ``[N]``); on their own device it shares them."""
        channels, height, width = images.shape[1:]
        pool = cls((channels, height, width), len(images), device)
        pool._images, pool._labels, pool._filled = images.to(device), labels.to(device), len(images)
        return pool

    def __len__(self) -> int:
        return self._filled

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

    def reserve(self, count: int) -> None:
        """Take the memory for ``count`` images (at most the capacity) at once."""
        count = min(count, self.capacity)
        if count <= len(self._images):
            return
        images = torch.empty(count, *self.image_size, dtype=torch.uint8, device=self.device)
        labels = torch.empty(count, dtype=torch.int64, device=self.device)
        images[: self._filled], labels[: self._filled] = self.images, self.labels
        self._images, self._labels = images, labels

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
        where = (self._next + torch.arange(count, device=self.device)) % self.capacity
        self._images[where] = images.to(self.device)
        self._labels[where] = labels.to(self.device)
        self._next = (self._next + count) % self.capacity
        self._filled = needed

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``count`` uniformly, with replacement: uint8 ``[count, C, H, W]`` and int64 ``[count]``."""
        if not self._filled:
            raise ValueError("the pool is empty")
        index = torch.randint(self._filled, (count,), generator=rng, device=rng.device).to(
            self.device, non_blocking=True
        )
        return self._images[index], self._labels[index]


__all__ = ["ImagePool", "to_float", "to_uint8"]
