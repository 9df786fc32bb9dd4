"""Train the built-in teacher, ``builtin/digits``, and write the package's two assets.

Run from the repository root (about a minute on two cores)::

    pip install scikit-learn
    PYTHONPATH=src python scripts/train_digits.py

Data: the UCI "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0) in the copy
that scikit-learn ships, the set's 1,797 test images: 8x8 pixels, grey, values 0 to 16. They are stored as 0 to 255.
A stratified, seeded quarter is put aside for testing before anything is learnt, the normalisation included. Nothing
is chosen by the test images: the schedule is fixed, and the exported weights are the last ones.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastdfkd_cli.nets_cifar  # noqa: F401  (registers the networks with timm)

ASSETS = Path(__file__).resolve().parents[1] / "src" / "fastdfkd_cli" / "assets"
ARCHITECTURE = "wrn16_1"
SEED = 0
TEST_IMAGES = 450
EPOCHS = 80
BATCH_SIZE = 64
SOURCE = (
    "UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49; "
    "the 1,797 images that scikit-learn ships"
)
LICENSE = "cc-by-4.0"


def load_split(seed: int = SEED) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train images, train labels, test images, test labels; images are uint8 ``[N, 1, 8, 8]``.

    The split is stratified, so that every digit has its share in both parts, and depends on ``seed`` alone.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=seed, shuffle=True
    )
    arrays = (images[train], labels[train], images[test], labels[test])
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)  # type: ignore[return-value]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each of ``images`` (float ``[B, 1, 8, 8]`` in [0, 1]) a little, on its own.

    At most 15 degrees, an eighth of the size and a pixel: what other writers might have done. Never mirrored.
    """
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(np.pi / 12), uniform(0.15)
    wide, high = 1 + uniform(0.12), 1 + uniform(0.12)
    pixel = 2 / images.shape[-1]
    rows = torch.stack(
        [
            torch.stack([wide * angle.cos(), shear - angle.sin(), uniform(pixel)], dim=1),
            torch.stack([angle.sin(), high * angle.cos(), uniform(pixel)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, mean: float, std: float, seed: int = SEED) -> nn.Module:
    """Train the teacher on float ``images`` in [0, 1] and return it in evaluation mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(f"fastdfkd_{ARCHITECTURE}", num_classes=10, in_chans=1)
    steps_per_epoch = len(images) // BATCH_SIZE
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=EPOCHS * steps_per_epoch, pct_start=0.15
    )
    model.train()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for step in range(steps_per_epoch):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            batch = (augment(images[chosen], generator) - mean) / std
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{EPOCHS}: training loss {total / steps_per_epoch:.4f}", flush=True)
    settle_statistics(model, (images - mean) / std)
    return model.eval()


@torch.no_grad()
def settle_statistics(model: nn.Module, normalised: Tensor) -> None:
    """Replace the running statistics by those of all training images, unaugmented, under the final weights.

    They are all that data-free distillation knows of the data, and a running average over augmented batches and
    changing weights is a poor record of it.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    model.train()
    model(normalised)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder for the two files")
    output: Path = parser.parse_args().output
    started = time.perf_counter()
    train_images, train_labels, test_images, test_labels = load_split()
    scaled = train_images.float() / 255
    mean, std = round(float(scaled.mean()), 4), round(float(scaled.std()), 4)
    model = train(scaled, train_labels, mean, std)
    with torch.no_grad():
        predicted = model((test_images.float() / 255 - mean) / std).argmax(dim=1)
    test_top1 = 100 * int((predicted == test_labels).sum()) / len(test_labels)
    classes = json.dumps([str(digit) for digit in range(10)])
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        output / "digits.safetensors",
        metadata={
            "format": "pt",
            "architecture": f"cifar/{ARCHITECTURE}",
            "num_classes": "10",
            "input_size": json.dumps([1, 8, 8]),
            "mean": json.dumps([mean]),
            "std": json.dumps([std]),
            "classes": classes,
            "license": LICENSE,
            "source": SOURCE,
            "training": (
                f"scripts/train_digits.py, seed {SEED}: {len(train_labels)} training images, {EPOCHS} epochs of SGD, "
                "small affine augmentation, BatchNorm statistics of all training images"
            ),
            "test_top1": f"{test_top1:.4f}",
        },
    )
    save_file(
        {"images": test_images, "labels": test_labels},
        output / "digits-test.safetensors",
        metadata={
            "format": "pt",
            "classes": classes,
            "license": LICENSE,
            "source": SOURCE,
            "split": f"test: {len(test_labels)} images put aside by scripts/train_digits.py, stratified, seed {SEED}",
        },
    )
    for name in ("digits.safetensors", "digits-test.safetensors"):
        print(f"{output / name}: {(output / name).stat().st_size:,} bytes")
    print(f"test top-1 {test_top1:.4f} % on {len(test_labels)} images, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
