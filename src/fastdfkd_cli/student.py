"""The student while it learns: its optimiser, its rate, its average, and its KD step, plain, compiled or captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from fastdfkd_cli import losses
from fastdfkd_cli.acceleration import EAGER, Acceleration, Captured, checkpointed, statistics_held
from fastdfkd_cli.attention import AttentionPairs
from fastdfkd_cli.config import DistillationConfig, learning_rate
from fastdfkd_cli.distributed import mean_
from fastdfkd_cli.divergence import Diverged, broken_weight
from fastdfkd_cli.labels import soft_labels
from fastdfkd_cli.noise import NoiseMatrix
from fastdfkd_cli.pool import to_float
from fastdfkd_cli.processes import ALONE, Group


def _sgd(
    parameters: Iterable[nn.Parameter], config: DistillationConfig, device: torch.device, captured: bool
) -> torch.optim.SGD:
    """SGD whose steps are all alike, the first too, and are one kernel where torch has one."""
    parameters = list(parameters)
    optimizer = torch.optim.SGD(
        parameters,
        # A captured step reads the rate from the device.
        lr=torch.tensor(config.lr, device=device) if captured else config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda") and not any(parameter.is_complex() for parameter in parameters),
    )
    if config.momentum:
        # From 0, as from nothing: and a layer that takes part only later (or now and then) has one as well.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Student:
    """A student in training: its optimiser, its learning-rate schedule, its average.

    Args:
        net: takes images in [0, 1] and returns logits; it is trained in place.
        config: the distillation section.
        amp: bf16 autocast in both networks.
        acceleration: how its steps may be made faster.
        group: the processes that take each step together, each on a batch of its own.
        num_classes: needed with ``config.noise_weight`` alone.
    """

    def __init__(
        self,
        net: nn.Module,
        config: DistillationConfig,
        device: torch.device,
        amp: bool,
        acceleration: Acceleration = EAGER,
        group: Group = ALONE,
        num_classes: int = 0,
    ) -> None:
        self.net = net
        self.group = group
        self.config = config
        self.device = device
        self.amp = amp
        self.acceleration = acceleration
        self.optimizer = _sgd(net.parameters(), config, device, captured=acceleration.graphs)
        self.average = None
        if config.average == "ema":
            self.average = ModelEmaV3(net, decay=config.average_decay, use_warmup=True)
        #: Learned with the student, and no part of it.
        self.noise = None
        if config.noise_weight:
            self.noise = NoiseMatrix(num_classes, config.noise_accuracy, config.noise_lr, device)
        #: Factor on the schedule's rate.
        self.rate = 1.0
        self._answer: Callable[[Tensor], Tensor] = self._forward
        self._ask: Callable[[nn.Module, Tensor], Tensor] = partial(soft_labels, amp=amp)
        self._captured: _CapturedStep | None = None
        self._pairs: AttentionPairs | None = None

    def prepare(self, teacher: nn.Module | None, image_size: tuple[int, int, int]) -> None:
        """Compile the networks' passes for KD steps, where that is wanted, before the first is timed.

        Args:
            teacher: the one to be asked in each step; None where its answers are kept.
            image_size: C, H, W.

        Raises:
            UsageError: attention transfer finds nothing to compare in the two.
        """
        if self.config.attention_weight and teacher is not None:
            self._pairs = AttentionPairs(teacher, self.net, torch.full((2, *image_size), 0.5, device=self.device))
            if self.acceleration.compile:
                self.acceleration.say("KD steps run as they are: --compile does not go with attention transfer")
            return
        if not self.acceleration.compile:
            return
        probe = torch.full((self.config.batch_size, *image_size), 128, dtype=torch.uint8, device=self.device)
        images = to_float(probe)
        self.net.train()
        self._answer = self.acceleration.compiled(
            self._forward, "the student's pass in distillation", images, modules=[self.net]
        )
        if teacher is not None:
            ask = self.acceleration.compiled(
                partial(soft_labels, teacher, amp=self.amp), "the teacher's pass in distillation", images
            )
            self._ask = lambda asked, images: ask(images) if asked is teacher else soft_labels(asked, images, self.amp)

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self.net(images)

    def set_learning_rate(self, done: float) -> float:
        """Take the schedule's rate when the share ``done`` of all steps is taken, and return it."""
        rate = self.rate * learning_rate(self.config, done)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        return rate

    def learn(self, teacher: nn.Module | Tensor, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One KD step: the loss and the share of equal predictions, on the device.

        Args:
            teacher: the teacher, or its logits for exactly these images.
            images: float in [0, 1], or uint8.
            step: steps taken before this one.
        """
        self.net.train()
        if self.acceleration.graphs and not self.acceleration.checkpoint:
            if self._captured is None or not self._captured.fits(teacher, images):
                self._captured = _CapturedStep(self, teacher, images)
            loss, agreement = self._captured(teacher, images)
        else:
            loss, agreement = self.descend(teacher, images)
        if self.average is not None:
            self.average.update(self.net, step=step)
        return loss, agreement

    def descend(self, teacher: nn.Module | Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`learn` computes of Eq. 12: a function of tensors, which never asks the device for a number."""
        if images.dtype == torch.uint8:
            images = to_float(images)
        self._forget_gradients()
        with checkpointed(self.net) if self.acceleration.checkpoint else nullcontext():
            with self._compared(teacher, images) as attention:
                teacher_logits = teacher if isinstance(teacher, Tensor) else self._ask(teacher, images)
                student_logits = self._answer(images)
            loss = self._loss(teacher_logits, student_logits)
            if attention is not None:
                loss = loss + self.config.attention_weight * attention()
            with statistics_held(self.net) if self.acceleration.checkpoint else nullcontext():
                loss.backward()
        agreement = (teacher_logits.argmax(1) == student_logits.argmax(1)).float().mean()
        if self.group.several:
            mean_(self.group, [loss.detach(), agreement, *self._gradients()])
        self.optimizer.step()
        if self.noise is not None:
            self.noise.optimizer.step()
        return loss.detach(), agreement

    def _compared(
        self, teacher: nn.Module | Tensor, images: Tensor
    ) -> AbstractContextManager[Callable[[], Tensor] | None]:
        """Around a pass of both networks: gives the attention transfer of it, where that is wanted."""
        if not self.config.attention_weight:
            return nullcontext()
        if isinstance(teacher, Tensor):
            raise ValueError("logits alone hold no attention maps")
        if self._pairs is None or self._pairs.networks != (teacher, self.net):
            self._pairs = AttentionPairs(teacher, self.net, images[:2])
        return self._pairs.compared()

    def _loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        if self.config.loss == "l1":
            loss = losses.logit_l1(teacher_logits, student_logits)
        else:
            loss = losses.distillation(teacher_logits, student_logits, self.config.temperature)
        if self.noise is None:
            return loss
        labels = teacher_logits.argmax(1)
        return loss + self.config.noise_weight * losses.noisy_classification(student_logits, labels, self.noise.log())

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.noise is not None:
            self.noise.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> list[Tensor]:
        """One of each weight that is trained, as all processes send the same: 0 where a weight took no part."""
        found = []
        for parameter in [*self.net.parameters(), *([self.noise.weight] if self.noise is not None else [])]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                found.append(parameter.grad)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, statistics, momentum, average and noise matrix."""
        state = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for index, parameter in enumerate(self.net.parameters()):
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{index}"] = momentum
        if self.average is not None:
            state |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        if self.noise is not None:
            state |= {f"noise.{name}": tensor for name, tensor in self.noise.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave; every tensor stays where it is.

        Raises:
            ValueError: it is another student's.
        """
        own = self.state_dict()
        strange = sorted({*own} ^ {*state}) or [name for name in own if own[name].shape != state[name].shape]
        if strange:
            raise ValueError(f"this state is another student's: {strange[0]}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Steps that are taken back: weights, statistics, momentum, average and noise matrix become again, in place,
        what they were.

        In place, because a recording goes on with these very tensors.
        """
        tensors = [*self.net.parameters(), *self.net.buffers()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        if self.average is not None:
            tensors += [*self.average.module.parameters(), *self.average.module.buffers()]
        if self.noise is not None:
            tensors += self.noise.state_dict().values()
        before = [tensor.detach().clone() for tensor in tensors]
        modes = [(module, module.training) for module in self.net.modules()]
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            yield
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        self._forget_gradients()
        for module, mode in modes:
            module.training = mode

    def finish(self) -> None:
        """Put the averaged weights and statistics, where an average is kept, into the student itself."""
        if self.average is not None:
            self.net.load_state_dict(self.average.module.state_dict())
        self.net.eval()
        self.check()

    def check(self) -> None:
        """Look at all weights and statistics, which a last update can break behind a loss that was fine.

        Raises:
            Diverged: one of them is not finite.
        """
        if (name := broken_weight(self.net)) is not None:
            raise Diverged(f"The student's {name} is not finite", "distillation.lr")


class _CapturedStep:
    """:meth:`Student.descend` as a function of tensors that stay where they are, into which each batch is copied."""

    def __init__(self, student: Student, teacher: nn.Module | Tensor, images: Tensor) -> None:
        self._images = torch.empty_like(images)
        self._teacher = torch.empty_like(teacher) if isinstance(teacher, Tensor) else teacher
        self._run: Captured[tuple[Tensor, Tensor]] = student.acceleration.captured(
            lambda: student.descend(self._teacher, self._images), "a KD step"
        )

    def fits(self, teacher: nn.Module | Tensor, images: Tensor) -> bool:
        """Whether this is what such a batch needs."""
        return _alike(self._images, images) and (
            _alike(self._teacher, teacher)
            if isinstance(teacher, Tensor) and isinstance(self._teacher, Tensor)
            else self._teacher is teacher
        )

    def __call__(self, teacher: nn.Module | Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the agreement; the next call writes over them."""
        self._images.copy_(images)
        if isinstance(teacher, Tensor) and isinstance(self._teacher, Tensor):
            self._teacher.copy_(teacher)
        return self._run()


def _alike(kept: Tensor, given: Tensor) -> bool:
    return kept.shape == given.shape and kept.dtype == given.dtype


__all__ = ["Student"]
