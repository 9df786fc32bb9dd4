"""The ring of synthetic images."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdfkd_cli import pool as pool_module
from fastdfkd_cli.config import Augmentation
from fastdfkd_cli.pool import ImagePool, pool_bytes_per_image, to_float, to_uint8

CPU = torch.device("cpu")
KINDS: tuple[Augmentation, ...] = ("crop-flip", "resized-crop-flip", "crop", "none")
#: C, H, W of images whose variations all differ.
SIZE = (2, 6, 8)


def numbered(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images and labels that both say which one they are."""
    labels = torch.arange(first, first + count)
    return labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 3).contiguous(), labels


@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=12))
def test_the_newest_are_kept_and_stay_beside_their_labels(capacity: int, sizes: list[int]) -> None:
    pool = ImagePool((1, 2, 3), capacity, CPU)
    model: deque[int] = deque(maxlen=capacity)
    first = 0
    for size in (min(size, capacity) for size in sizes):
        pool.add(*numbered(first, size))
        model.extend(range(first, first + size))
        first += size
        assert len(pool) == len(model) == len(pool.images) == len(pool.labels)
        assert sorted(pool.labels.tolist()) == sorted(model)
        assert torch.equal(pool.images[:, 0, 0, 0].long(), pool.labels % 256)
        if model:
            # What the export shows: the newest stand just before `newest`, in order.
            newest = (torch.arange(pool.newest - len(model), pool.newest) % len(pool)).tolist()
            assert [int(pool.labels[i]) for i in newest] == list(model)


def test_memory_is_taken_as_it_is_needed() -> None:
    pool = ImagePool((1, 2, 3), 1000, CPU)
    assert pool.images.untyped_storage().nbytes() == 0
    pool.add(*numbered(0, 4))
    assert pool.images.untyped_storage().nbytes() == 4 * 6
    pool.add(*numbered(4, 1))
    assert pool.images.untyped_storage().nbytes() == 8 * 6
    assert pool.labels.tolist() == [0, 1, 2, 3, 4]
    pool.reserve(100)
    assert pool.images.untyped_storage().nbytes() == 100 * 6
    assert pool.labels.tolist() == [0, 1, 2, 3, 4]
    pool.reserve(50)
    assert pool.images.untyped_storage().nbytes() == 100 * 6
    pool.reserve(10**6)
    assert pool.images.untyped_storage().nbytes() == 1000 * 6


def test_a_sample_is_uniform_and_follows_the_generator() -> None:
    pool = ImagePool((1, 2, 3), 8, CPU)
    pool.add(*numbered(0, 5))
    images, logits = pool.sample(500, torch.Generator().manual_seed(0))
    assert logits is None
    assert images.shape == (500, 1, 2, 3)
    assert images.dtype == torch.uint8
    counts = images[:, 0, 0, 0].bincount()
    assert counts.shape == (5,)
    assert counts.min() > 60
    again, _ = pool.sample(500, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    images.zero_()
    assert pool.images.sum() > 0  # a copy, not a view


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must be 1 or more, not 0"):
        ImagePool((1, 2, 3), 0, CPU)
    pool = ImagePool((1, 2, 3), 4, CPU)
    with pytest.raises(ValueError, match="empty"):
        pool.sample(1, torch.Generator())
    with pytest.raises(ValueError, match="5 images does not fit a pool of 4"):
        pool.add(*numbered(0, 5))
    with pytest.raises(TypeError, match="float32"):
        pool.add(torch.rand(2, 1, 2, 3), torch.zeros(2, dtype=torch.int64))
    assert len(pool) == 0


def test_every_grey_survives_the_way_to_floats_and_back() -> None:
    greys = torch.arange(256, dtype=torch.uint8)
    floats = to_float(greys)
    assert floats.dtype == torch.float32
    assert (floats[0].item(), floats[-1].item()) == (0.0, 1.0)
    assert torch.equal(to_uint8(floats), greys)


def test_floats_are_rounded_not_cut_off() -> None:
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.2, -0.3], requires_grad=True)
    found = to_uint8(values)
    assert found.tolist() == [0, 0, 1, 255, 255, 255, 0]
    assert not found.requires_grad
    assert values[0] == 0  # and the images themselves stay as they are
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [128]


def test_a_pool_of_given_images_is_no_copy_of_them() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    pool = ImagePool.holding(images, torch.arange(5), torch.device("cpu"))
    assert len(pool) == pool.newest == 5
    assert pool.images.data_ptr() == images.data_ptr()
    assert torch.equal(pool.labels, torch.arange(5))


# What it costs


def test_a_pool_of_cifar_images_takes_what_their_bytes_take() -> None:
    pool = ImagePool((3, 32, 32), 56_320, CPU)
    pool.reserve(56_320)
    assert pool.nbytes == 56_320 * (3072 + 8) == 56_320 * pool_bytes_per_image((3, 32, 32))
    assert pool.nbytes < 1.1 * 173e6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp", [False, True])
def test_the_bytes_of_soft_labels_are_known_before(kind: Augmentation, amp: bool) -> None:
    pool = filled(10, capacity=16)
    pool.reserve(16)
    teacher = Watched(dtype=torch.bfloat16 if amp else torch.float32)
    pool.label(teacher, 3, kind, rng(), batch_size=4)
    each = pool_bytes_per_image(SIZE, views=3, num_classes=teacher.classes, augmentation=kind, amp=amp)
    assert pool.nbytes == 16 * each
    assert each > pool_bytes_per_image(SIZE) == 2 * 6 * 8 + 8
    _, logits = pool.sample(2, rng(), kind)
    assert logits is not None
    assert logits.dtype == teacher.dtype


def test_a_reserved_pool_never_moves_what_it_holds() -> None:
    pool = ImagePool(SIZE, 12, CPU)
    pool.reserve(12)

    def places() -> list[int]:
        assert pool._soft is not None
        return [each.data_ptr() for each in (pool._images, pool._labels, pool._soft.draws, pool._soft.logits)]

    pool.add(*noise(5))
    pool.label(Watched(), 2, "crop", rng(), batch_size=4)
    before = places()
    for _ in range(4):
        pool.add(*noise(5))
        pool.label(Watched(), 2, "crop", rng(), batch_size=4)
        assert places() == before


def test_what_a_step_needs_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def counted(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor.nbytes)
        return tensor.to(device)

    monkeypatch.setattr(pool_module, "to_device", counted)
    pool = filled(10)
    pool.sample(7, rng(), "crop-flip")
    assert sent == [7 * 4 * (1 + 3)]
    pool.label(Watched(), 2, "crop-flip", rng(), batch_size=10)
    sent.clear()
    pool.sample(7, rng(), "crop-flip")
    assert sent == [7 * 8]


# Soft labels


class Watched:
    """A teacher whose logits tell any two images apart, and which notes how many it has seen."""

    classes = 5

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.weights = torch.randn(2 * 6 * 8, self.classes, generator=rng(), dtype=torch.float64)
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        self.batches.append(len(images))
        return self.what_of(images)

    def what_of(self, images: Tensor) -> Tensor:
        return (images.flatten(1).double() @ self.weights).to(self.dtype)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (count, *SIZE), dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)


def filled(count: int, capacity: int | None = None) -> ImagePool:
    pool = ImagePool(SIZE, capacity or count, CPU)
    pool.add(*noise(count))
    return pool


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=10), st.sampled_from(KINDS))
def test_soft_labels_are_those_of_exactly_the_images_they_come_with(
    capacity: int, batches: list[tuple[int, bool]], kind: Augmentation
) -> None:
    # The ring grows, wraps and is overwritten, with labels made after each batch or after several.
    pool, teacher = ImagePool(SIZE, capacity, CPU), Watched()
    views = 1 if kind == "none" else 3
    draws = rng(1)
    for count, labels_now in [*batches, (1, True)]:
        pool.add(*noise(min(count, capacity)))
        if labels_now:
            expected = pool.unlabelled * views
            teacher.batches.clear()
            pool.label(teacher, views, kind, draws, batch_size=4)
            assert sum(teacher.batches) == expected
            assert max(teacher.batches, default=0) <= 4
            assert pool.unlabelled == 0
    teacher.batches.clear()
    images, logits = pool.sample(40, rng(2), kind)
    assert logits is not None
    assert torch.allclose(logits, teacher.what_of(to_float(images)), atol=1e-5)
    assert teacher.batches == []


def test_an_image_is_seen_in_its_fixed_variations_each_as_often() -> None:
    pool = filled(2)
    pool.label(Watched(), 4, "resized-crop-flip", rng(), batch_size=8)
    images, _ = pool.sample(2000, rng(), "resized-crop-flip")
    different, counts = images.flatten(1).unique(dim=0, return_counts=True)
    assert len(different) == 8
    assert counts.min() > 200


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_variations(kind: Augmentation) -> None:
    first, second = filled(6), ImagePool(SIZE, 6, CPU)
    second.add(first.images, first.labels)
    found = []
    for pool in (first, second):
        draws = rng(3)
        pool.label(Watched(), 2, kind, draws, batch_size=4)
        found.append([*pool.sample(9, draws, kind), *pool.sample(9, draws, kind)])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert torch.equal(a, b)
    assert not torch.equal(found[0][0], found[0][2])


def test_keeping_the_one_label_of_an_image_draws_the_same_images() -> None:
    plain = filled(6)
    kept = ImagePool.holding(plain.images, plain.labels, CPU)
    a, b = rng(4), rng(4)
    kept.label(Watched(), 1, "none", b, batch_size=4)
    for _ in range(3):
        assert torch.equal(plain.sample(9, a)[0], kept.sample(9, b)[0])


def test_images_without_soft_labels_are_not_drawn_as_if_they_had_some() -> None:
    pool = filled(3, capacity=5)
    pool.label(Watched(), 2, "crop", rng(), batch_size=4)
    with pytest.raises(ValueError, match="are those of crop, not of crop-flip"):
        pool.sample(1, rng(), "crop-flip")
    pool.add(*noise(2))
    with pytest.raises(ValueError, match="2 images of the pool have no soft labels yet"):
        pool.sample(1, rng(), "crop")


def test_dense_predictions_are_kept_whole() -> None:
    pool = filled(3)

    def dense(images: Tensor) -> Tensor:
        return images * torch.tensor([1.0, 2.0]).view(2, 1, 1)

    pool.label(dense, 2, "crop-flip", rng(), batch_size=2)
    images, logits = pool.sample(8, rng(), "crop-flip")
    assert logits is not None
    assert torch.equal(logits, dense(to_float(images)))
