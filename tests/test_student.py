"""The student that learns: its rate, its KD step, what it asks of the device, and what it is not handed out with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdfkd_cli.config import DistillationConfig
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.labels import soft_labels
from fastdfkd_cli.losses import distillation as kd_loss
from fastdfkd_cli.student import Student
from tiny import CLASSES, SIZE, net, teacher

CPU = torch.device("cpu")


def test_the_cosine_and_its_warm_up() -> None:
    student = Student(net(), DistillationConfig(lr=0.2, lr_min=2e-4), CPU, False)
    assert student.set_learning_rate(0) == pytest.approx(0.2)
    assert student.set_learning_rate(0.5) == pytest.approx((0.2 + 2e-4) / 2)
    assert student.set_learning_rate(1) == pytest.approx(2e-4)
    assert student.optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    warmed = Student(net(), DistillationConfig(lr=0.2, lr_min=0, lr_warmup=0.1), CPU, False)
    assert 0 < warmed.set_learning_rate(0) <= 0.002
    assert warmed.set_learning_rate(0.05) == pytest.approx(0.1)
    assert warmed.set_learning_rate(0.1) == pytest.approx(0.2)
    assert warmed.set_learning_rate(0.55) == pytest.approx(0.1)
    assert warmed.set_learning_rate(1) == pytest.approx(0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_kd_step_is_sgd_on_equation_12(nesterov: bool) -> None:
    settings = DistillationConfig(lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01, temperature=4)
    model, ours, theirs = teacher(), net(1).eval(), net(1).train()
    student = Student(ours, settings, CPU, False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.01)
    for step in range(3):
        images = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(step))
        loss, agreement = student.learn(model, images, step)
        with torch.no_grad():
            wanted = model(images)
        found = theirs(images)
        expected = kd_loss(wanted, found, 4)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert not loss.requires_grad
        assert agreement.item() == (wanted.argmax(1) == found.argmax(1)).float().mean().item()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_a_layer_that_takes_part_now_and_then_learns_too() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.extra, self.skip = net(1), nn.Linear(CLASSES, CLASSES), True

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            return logits if self.skip else logits + self.extra(logits)

    learner = Skips()
    before = learner.extra.weight.detach().clone()
    student = Student(learner, DistillationConfig(weight_decay=0), CPU, False)
    images = torch.rand(4, *SIZE)
    student.learn(teacher(), images, 0)
    assert torch.equal(learner.extra.weight, before)
    learner.skip = False
    student.learn(teacher(), images, 1)
    assert not torch.equal(learner.extra.weight, before)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_kd_step_asks_the_device_for_nothing(labelled: bool) -> None:
    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model = teacher()
    student = Student(net(1).train(), DistillationConfig(), CPU, False)
    images = torch.randint(0, 256, (4, *SIZE), dtype=torch.uint8)
    with Ops() as ops:
        student.descend(soft_labels(model, images / 255, False) if labelled else model, images)
    assert "_fused_sgd_" in ops.seen
    # Reading a number, and counting what a mask selects.
    assert not ops.seen & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


@pytest.mark.parametrize("name", ["conv2.weight", "bn1.running_var"])
def test_weights_that_are_not_finite_are_not_handed_out(name: str) -> None:
    student = Student(net(1), DistillationConfig(), CPU, False)
    with torch.no_grad():
        student.net.state_dict()[name].view(-1)[0] = torch.inf
    with pytest.raises(FastDFKDError, match=f"student's {name} is not finite"):
        student.finish()
