"""The ring of synthetic images."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdfkd_cli.pool import ImagePool, to_float, to_uint8

CPU = torch.device("cpu")


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
    images, labels = pool.sample(500, torch.Generator().manual_seed(0))
    assert images.shape == (500, 1, 2, 3)
    assert images.dtype == torch.uint8
    assert torch.equal(images[:, 0, 0, 0].long(), labels)
    counts = labels.bincount()
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
