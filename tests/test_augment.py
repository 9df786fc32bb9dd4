"""Crops and flips: exact moves of pixels, drawn per image, with exact derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdfkd_cli.augment import augment, crop_flip, mix, resized_crop_flip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def candidates(image: Tensor, padding: int, *, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Everything that pad, crop and flip can make of one image ``[C, H, W]``."""
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            found[top, left, False] = crop
            if flip:
                found[top, left, True] = crop.flip(2)
    return found


def numbered(count: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Images whose pixels all differ from each other and from 0."""
    size = channels * height * width
    one = 1 + torch.arange(size).view(channels, height, width)
    return one.expand(count, -1, -1, -1).to(dtype).clone()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flip", [True, False])
def test_crop_flip_is_pad_and_crop_and_flip(dtype: torch.dtype, flip: bool) -> None:
    images = numbered(300, 2, 4, 5, dtype)
    out = crop_flip(images, rng(), padding=1, flip=flip)
    assert out.shape == images.shape
    assert out.dtype == dtype
    choices = candidates(images[0], 1, flip=flip)
    seen = [next((key for key, choice in choices.items() if torch.equal(choice, image)), None) for image in out]
    assert None not in seen
    # 300 images have drawn all 9 shifts (and both directions) by themselves.
    assert set(seen) == set(choices)
    counts = [seen.count(key) for key in choices]
    assert min(counts) > 300 / len(choices) / 4


def test_without_padding_and_flip_nothing_moves() -> None:
    images = numbered(3, 1, 4, 5, torch.uint8)
    assert torch.equal(crop_flip(images, rng(), padding=0, flip=False), images)


def test_each_image_is_moved_by_itself() -> None:
    images = torch.rand(6, 2, 5, 5, generator=rng(1))
    changed = images.clone()
    changed[2] = torch.rand(2, 5, 5, generator=rng(2))
    before, after = crop_flip(images, rng(), padding=1), crop_flip(changed, rng(), padding=1)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, True, True, True]


@pytest.mark.parametrize("flip", [True, False])
def test_the_derivative_of_crop_flip_is_the_opposite_move(flip: bool) -> None:
    x = torch.rand(4, 2, 3, 4, dtype=torch.float64, generator=rng(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda images: crop_flip(images, rng(7), padding=2, flip=flip), (x,))
    # <move(x), y> = <x, back(y)>: what is cut off gets no gradient, and nothing is counted twice.
    y = torch.rand(4, 2, 3, 4, dtype=torch.float64, generator=rng(2))
    out = crop_flip(x, rng(7), padding=2, flip=flip)
    out.backward(y)
    assert torch.allclose((out * y).sum(), (x * x.grad).sum())  # type: ignore[operator]


def test_channels_last_images_move_alike() -> None:
    images = torch.rand(4, 3, 5, 6, generator=rng(1))
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_flip(images, rng(3), padding=1), crop_flip(last, rng(3), padding=1))


def ramps(count: int, height: int, width: int) -> Tensor:
    """Channel 0 holds x and channel 1 holds y, as coordinates of pixel centres between -1 and 1."""
    x = (2 * torch.arange(width) + 1) / width - 1
    y = (2 * torch.arange(height) + 1) / height - 1
    one = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    return one.expand(count, -1, -1, -1).clone()


def test_resized_crops_stay_in_their_ranges() -> None:
    out = resized_crop_flip(ramps(300, 24, 32), rng())
    # Away from the mirrored border, bilinear sampling of a ramp is exact: neighbours differ by the crop's zoom.
    steps_x = (out[:, 0, 12, 17] - out[:, 0, 12, 14]) / 3 * 32 / 2
    steps_y = (out[:, 1, 13, 16] - out[:, 1, 10, 16]) / 3 * 24 / 2
    flipped = steps_x < 0
    wide, high = steps_x.abs(), steps_y
    area, ratio = wide * high, wide / high
    assert 100 < flipped.sum() < 200
    assert (high > 0).all()  # never upside down
    assert area.min() > 0.75 - 1e-3
    assert area.max() < 1 + 1e-3
    assert area.min() < 0.8
    assert area.max() > 0.95
    assert ratio.min() > 3 / 4 - 1e-3
    assert ratio.max() < 4 / 3 + 1e-3
    assert ratio.min() < 0.85
    assert ratio.max() > 1.18
    # The crop lies inside the image, and in different places.
    centre_x = (out[:, 0, 12, 15] + out[:, 0, 12, 16]) / 2
    assert ((centre_x.abs() + wide) < 1 + 1e-3).all()
    assert centre_x.std() > 0.02
    assert centre_x.abs().mean() < 0.2


def test_resized_crops_by_another_scale() -> None:
    out = resized_crop_flip(ramps(50, 32, 32), rng(), scale=(0.25, 0.25))
    wide = (out[:, 0, 16, 17] - out[:, 0, 16, 14]).abs() / 3 * 16
    high = (out[:, 1, 17, 16] - out[:, 1, 14, 16]).abs() / 3 * 16
    assert torch.allclose(wide * high, torch.tensor(0.25), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_resized_crops_keep_shape_type_and_range(dtype: torch.dtype) -> None:
    images = torch.randint(20, 200, (5, 4, 9, 14), generator=rng(1)).to(dtype)
    out = resized_crop_flip(images, rng())
    assert out.shape == images.shape
    assert out.dtype == dtype
    assert out.min() >= 20 - 1e-3
    assert out.max() <= 199 + 1e-3
    flat = torch.full((3, 1, 6, 6), 77).to(dtype)
    assert torch.allclose(resized_crop_flip(flat, rng()).double(), flat.double(), atol=1e-4)


def test_resized_crops_of_uint8_are_rounded() -> None:
    images = torch.randint(0, 256, (5, 3, 9, 14), dtype=torch.uint8, generator=rng(1))
    wide = resized_crop_flip(images.float(), rng())
    assert torch.equal(resized_crop_flip(images, rng()), wide.round().to(torch.uint8))


def test_resized_crops_have_a_derivative() -> None:
    # Linear in the image, so a difference of any size is exact; float32 inside.
    x = torch.rand(2, 1, 5, 6, generator=rng(1)).requires_grad_()
    direction = torch.randn(2, 1, 5, 6, generator=rng(2))
    weights = torch.randn(2, 1, 5, 6, generator=rng(3))
    (resized_crop_flip(x, rng(9)) * weights).sum().backward()
    moved = ((resized_crop_flip(x + direction, rng(9)) - resized_crop_flip(x, rng(9))) * weights).sum()
    assert torch.allclose(moved, (x.grad * direction).sum(), rtol=1e-3)  # type: ignore[operator]


def test_augment_by_name() -> None:
    images = numbered(64, 1, 16, 12, torch.uint8)
    assert augment(images, rng(), "none") is images
    # An eighth of the shorter side: 1 pixel of 12.
    choices = candidates(images[0], 1, flip=True)
    for kind, flips in (("crop", False), ("crop-flip", True)):
        out = augment(images, rng(), kind)  # type: ignore[arg-type]
        seen = {next(key for key, choice in choices.items() if torch.equal(choice, image)) for image in out}
        assert {flipped for _, _, flipped in seen} == ({True, False} if flips else {False})
        assert len(seen) > 5
    assert torch.equal(augment(images, rng(), "resized-crop-flip"), resized_crop_flip(images, rng()))


def test_the_papers_padding_at_32() -> None:
    # Each row and column knows its place, so that the shifts can be read from the middle pixel.
    images = (torch.arange(32)[:, None] * 32 + torch.arange(32)).expand(400, 1, 32, 32).float()
    out = augment(images, rng(), "crop")
    middle = out[:, 0, 16, 16].long()
    assert (middle // 32 - 16).unique().tolist() == list(range(-4, 5))
    assert (middle % 32 - 16).unique().tolist() == list(range(-4, 5))


def test_crops_do_not_lose_precision_under_autocast() -> None:
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain = resized_crop_flip(images, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = resized_crop_flip(images, torch.Generator().manual_seed(1))
    assert torch.equal(plain, lowered)


def shares(mixed: Tensor) -> Tensor:
    """Of each pixel ``[B, H, W]``, the share of an image's own: the images are 0, 1, 0, 1, ... all over."""
    own = torch.arange(len(mixed)) % 2
    return torch.where(own[:, None, None] == 1, mixed[:, 0], 1 - mixed[:, 0])


def stripes(count: int, height: int = 16, width: int = 24) -> Tensor:
    return (torch.arange(count) % 2).float()[:, None, None, None].expand(count, 1, height, width)


def test_mixup_blends_an_image_with_the_next_by_a_uniform_share() -> None:
    found = shares(mix(stripes(2000), rng(), mixup=1, cutmix=0))
    assert (found - found[:, :1, :1]).abs().max() < 1e-6  # one share for an image
    stays = found[:, 0, 0].sort().values
    assert (stays - torch.linspace(0, 1, 2000)).abs().max() < 0.05


def test_cutmix_pastes_a_rectangle_of_the_next() -> None:
    found = shares(mix(stripes(4000), rng(), mixup=0, cutmix=1))
    assert found.unique().tolist() == [0.0, 1.0]
    pasted = found == 0
    rows, columns = pasted.any(2), pasted.any(1)
    assert torch.equal(pasted, rows[:, :, None] & columns[:, None, :])
    for marked in (rows, columns):  # one piece
        assert ((marked[:, 1:] != marked[:, :-1]).sum(1) + marked[:, 0] + marked[:, -1] <= 2).all()
    # Sides a and a (as shares), a^2 uniform in [0, 1], the centre uniform, what sticks out cut off: of a side there is
    # E[a - a^2 / 4], and of the area E[(a - a^2 / 4)^2] = E[a^2 - a^3 / 2 + a^4 / 16] = 1/2 - 1/5 + 1/48.
    assert pasted.float().mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.015)
    assert rows.float().mean().item() == pytest.approx(2 / 3 - 1 / 8, abs=0.015)
    # Centres anywhere: both borders are reached alike.
    assert rows[:, 0].float().mean().item() == pytest.approx(rows[:, -1].float().mean().item(), abs=0.04)


def test_so_many_images_are_mixed_in_each_way() -> None:
    found = shares(mix(stripes(4000), rng(), mixup=0.5, cutmix=0.2)).flatten(1)
    blended = ((found > 0) & (found < 1)).any(1).float().mean()
    pasted = (((found == 0) | (found == 1)).all(1) & (found == 0).any(1)).float().mean()
    assert blended.item() == pytest.approx(0.5, abs=0.03)
    assert pasted.item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixtures_of_the_numbers_that_are_given(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (8, 3, 6, 4), generator=rng(1)).to(dtype)
    assert torch.equal(mix(images, rng(), mixup=0, cutmix=0), images)
    mixed = mix(images, rng(), mixup=1, cutmix=0)
    assert (mixed.dtype, mixed.shape) == (dtype, images.shape)
    stays = torch.rand(4, 8, generator=rng())[1].view(8, 1, 1, 1)
    expected = stays * images.double() + (1 - stays) * images.roll(-1, 0).double()
    assert (mixed.double() - expected).abs().max() <= (0.5001 if dtype == torch.uint8 else 1e-3)
