"""The operations and bytes that the profile counts are those of a hand calculation, and those that ours executes are
no more than what must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import floor
from fastdfkd_cli.augment import augment
from fastdfkd_cli.generators import Generator
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, config, net, teacher

CPU = torch.device("cpu")


def counted(function: Callable[[], object]) -> dict[str, floor.Work]:
    """Work by kind, of kinds that had any."""
    with floor.Operations() as operations:
        function()
    return floor.together({row.kind: row.work} for row in operations.rows if row.work != floor.Work())


def total_bytes(function: Callable[[], object]) -> float:
    return sum(work.bytes for work in counted(function).values())


def product_flops(found: dict[str, floor.Work]) -> float:
    return sum(work.flops for work in found.values())


@pytest.mark.parametrize(
    ("layer", "x", "products"),
    [
        (nn.Conv2d(4, 6, 3, 1, 1, bias=False), (2, 4, 5, 7), 2 * 5 * 7 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, 2, 1, bias=False), (2, 4, 8, 8), 2 * 4 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 8, 3, 1, 1, groups=4, bias=False), (2, 4, 5, 5), 2 * 5 * 5 * 8 * 1 * 9),
        (nn.ConvTranspose2d(4, 6, 4, 2, 1, bias=False), (2, 4, 5, 5), 2 * 5 * 5 * 4 * 6 * 16),
    ],
    ids=["plain", "strided", "grouped", "transposed"],
)
def test_a_convolution_and_each_of_its_gradients(layer: nn.Module, x: tuple[int, ...], products: int) -> None:
    inputs = torch.randn(x, requires_grad=True)
    output = layer(inputs)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    expected = floor.Work(2 * products, 4 * (inputs.numel() + weight.numel() + output.numel()))
    assert counted(lambda: layer(inputs)) == {floor.FORWARD: expected}
    upstream = torch.randn_like(output)
    in_input, in_both = {floor.IN_INPUT: expected}, {floor.IN_INPUT: expected, floor.IN_WEIGHT: expected}
    assert counted(lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)) == in_input
    assert counted(lambda: torch.autograd.grad(output, [inputs, weight], upstream)) == in_both


def test_counting_changes_no_gradient() -> None:
    layer, x = nn.Conv2d(3, 4, 3, 2, 1), torch.randn(2, 3, 6, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with floor.Operations():
        found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_bytes_are_those_of_distinct_tensors_read_and_written() -> None:
    a, b, c = torch.randn(10, 8), torch.randn(10, 8), torch.randn(1, 8)
    whole, row = 4 * 80, 4 * 8
    assert total_bytes(lambda: a + b) == 3 * whole
    assert total_bytes(lambda: a * a) == 2 * whole  # one tensor, though twice an operand
    assert total_bytes(lambda: a + c.expand(10, 8)) == 2 * whole + row
    assert total_bytes(lambda: a.add_(b)) == 3 * whole
    assert total_bytes(lambda: a.copy_(b)) == 2 * whole  # what stood there is not read
    assert total_bytes(lambda: a.bfloat16()) == whole + whole / 2
    assert total_bytes(lambda: a[torch.tensor([3, 5])]) == 2 * 8 + 2 * 2 * row  # the indices; two rows of ten
    assert total_bytes(lambda: (a.view(80), a.t(), a[2:], torch.empty(1000), a.detach())) == 0


def test_what_an_optimiser_does_is_the_optimisers() -> None:
    weight = torch.zeros(50, requires_grad=True)
    weight.grad = torch.ones(50)
    adam = torch.optim.Adam([weight], fused=True)
    adam.step()
    found = counted(adam.step)
    assert found.keys() == {floor.OPTIMISER}
    # Four vectors read and three written, a gradient that is declared as written too, and the step count.
    assert 7 * 200 <= found[floor.OPTIMISER].bytes <= 8 * 200 + 32
    assert floor.ELEMENTWISE in counted(lambda: weight * 2)  # and no longer than its step


def test_the_kinds_of_a_networks_operations() -> None:
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 4)
    assert counted(lambda: nn.BatchNorm2d(3)(x)).keys() >= {floor.NORMALISATION}
    assert counted(lambda: F.leaky_relu(x, 0.2)).keys() == {floor.ACTIVATION}
    assert counted(lambda: torch.var_mean(x, dim=(0, 2, 3))).keys() == {floor.STATISTICS}
    assert counted(lambda: F.linear(x, weight)).keys() == {floor.PRODUCTS}


@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_inner_step_computes_no_product_that_it_need_not(keep: str) -> None:
    settings = config(synthesis__keep=keep)
    whole, student = teacher(), net(1)
    keywords: dict[str, Any] = {"image_size": SIZE, "num_classes": CLASSES, "device": CPU, "amp": False}
    method = build_method(settings, whole, **keywords)
    found = counted(lambda: method.synthesize(student))
    method.close()
    generator = Generator(settings.generator, SIZE)
    images = torch.rand(settings.synthesis.batch_size, *SIZE)
    z = generator.sample_latent(len(images), torch.Generator())
    by = [
        floor.products_of(each, of, amp=False).found
        for each, of in ((generator, z), (whole, images), (student, images))
    ]
    needed = floor.needed_by_inner_step(settings, *by, weights=1, latents=1)
    for kind in (floor.FORWARD, floor.IN_INPUT, floor.IN_WEIGHT, floor.PRODUCTS):
        assert found[kind].flops == pytest.approx(settings.synthesis.steps * needed[kind].flops)


def test_a_kd_step_computes_no_product_that_it_need_not() -> None:
    settings = config()
    whole, student = teacher(), net(1)
    trained = Student(student, settings.distillation, CPU, amp=False)
    pool = torch.randint(0, 256, (4, *SIZE), dtype=torch.uint8)
    images = to_float(augment(pool, torch.Generator(), settings.distillation.augmentation))
    by = [floor.products_of(each, images, amp=False).found for each in (whole, student)]
    found = counted(lambda: trained.learn(whole, images, 0))
    needed = floor.needed_by_kd_step(settings, *by, weights=1)
    for kind in (floor.FORWARD, floor.IN_INPUT, floor.IN_WEIGHT, floor.PRODUCTS):
        assert found[kind].flops == needed[kind].flops


def test_profiled_operations_take_time() -> None:
    x, layer = torch.randn(4, 8, 16, 16), nn.Conv2d(8, 8, 3)
    (row,) = [row for row in floor.profiled(lambda: layer(x), CPU, rounds=2) if row.kind == floor.FORWARD]
    assert row.calls == 1
    assert row.seconds > 0
