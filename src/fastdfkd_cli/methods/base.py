"""What all methods share: the batch they hand out, the care they take of the student, and two frames to build on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastdfkd_cli.acceleration import EAGER, Acceleration, to_device
from fastdfkd_cli.bn_stats import BatchNormStatistics
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.generators import Generator
from fastdfkd_cli.method_config import MethodConfig
from fastdfkd_cli.pool import to_uint8
from fastdfkd_cli.processes import ALONE, Group


@dataclass(frozen=True)
class SyntheticBatch:
    """One synthesised batch."""

    #: uint8 ``[B, C, H, W]``.
    images: Tensor
    #: The classes that were asked for, or the teacher's own answers where none were; int64 ``[B]``.
    labels: Tensor
    #: The loss terms of the kept images, unweighted, as zero-dimensional tensors still on the device, and ``total``,
    #: their weighted sum.
    losses: dict[str, Tensor]


@contextmanager
def frozen(student: nn.Module | None) -> Iterator[None]:
    """Evaluate ``student`` without gradients for its weights, and restore its mode afterwards.

    Gradients still flow through it to the images.
    """
    if student is None:
        yield
        return
    modes = [(module, module.training) for module in student.modules()]
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def restart(optimizer: torch.optim.Optimizer) -> None:
    """Have ``optimizer`` forget what it has seen, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


@torch.no_grad()
def keep_lower(kept: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of two iterates, all tensors of the one with the lower ``total``; the device is not asked which.

    ``kept`` is empty before there is any. What comes back shares no memory that a later step writes to only if
    ``found`` shares none.
    """
    if not kept:
        return {name: tensor.detach() for name, tensor in found.items()}
    better = found["total"] < kept["total"]
    return {name: torch.where(better, tensor.detach(), kept[name]) for name, tensor in found.items()}


SettingsT = TypeVar("SettingsT", bound=MethodConfig)


class Method(ABC, Generic[SettingsT]):
    """A frame for a method: its settings, its draws, its statistics of the teacher, its state.

    See :func:`fastdfkd_cli.methods.build_method` for the arguments. A method draws everything random from
    :attr:`rng`, on the CPU, so that one seed means one set of images on every device.
    """

    #: The class of its settings.
    settings: ClassVar[type[MethodConfig]]

    def __init__(
        self,
        config: RunConfig,
        teacher: nn.Module,
        *,
        image_size: tuple[int, int, int],
        num_classes: int,
        device: torch.device,
        amp: bool,
        seed: int,
        acceleration: Acceleration = EAGER,
        group: Group = ALONE,
    ) -> None:
        if group.several:
            raise ValueError(f"{type(self).__name__} works in one process")
        self.config: SettingsT = config.settings_of(self.settings)  # type: ignore[assignment]
        self.generator_config = config.generator
        self.teacher = teacher
        self.image_size = image_size
        self.num_classes = num_classes
        self.device = device
        self.amp = amp
        self.acceleration = acceleration
        self.rng = torch.Generator().manual_seed(seed)
        self.batches = 0
        #: Factor on all learning rates.
        self.rate = 1.0
        self.statistics: BatchNormStatistics | None = None
        if self.config.needs_statistics:
            self.statistics = BatchNormStatistics(teacher, self.config.momentum_of_statistics)
            self.statistics.__enter__()

    # -- what a method brings -----------------------------------------------------------------------------------

    @abstractmethod
    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """Make one batch; with a student (images in [0, 1] -> logits), the adversarial term takes part."""

    def own_state(self) -> dict[str, Tensor]:
        """The tensors beyond the frame's that the next batch depends on."""
        return {}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`own_state` gave."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that outlive a batch, whose rates :meth:`slow_down` lowers."""
        return []

    # -- what it can use ----------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """f_t(x) ``[B, classes]``, and the moments of its BatchNorm inputs where the method has a feature term."""
        with self.autocast():
            if self.statistics is None:
                return self.teacher(images), None
            return self.statistics.observe(images)

    def ask(self, student: nn.Module, images: Tensor) -> Tensor:
        """f_s(x) ``[B, classes]``."""
        with self.autocast():
            return student(images)

    def draw_labels(self, count: int) -> Tensor:
        """Classes, uniform at random: int64 ``[count]`` on the device."""
        return to_device(torch.randint(self.num_classes, (count,), generator=self.rng), self.device)

    def new_generator(self, rng: torch.Generator | None = None) -> Generator:
        """A generator with first weights that follow from ``rng`` (default: :attr:`rng`), in training mode."""
        # torch's layers draw their first weights from the global state: lend them one that follows from ours.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=rng or self.rng)))
            generator = Generator(self.generator_config, self.image_size)
        return generator.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def adam(self, parameters: Sequence[Tensor], lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
        """Adam over ``parameters`` at ``lr`` times :attr:`rate`, in one kernel where there is one."""
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.Adam(parameters, lr=lr * self.rate, betas=betas, fused=fused)

    # -- the protocol -------------------------------------------------------------------------------------------

    @property
    def micro_batch(self) -> int:
        return 0

    def prepare(self, student: nn.Module | None = None) -> None:
        """Nothing is compiled for this method."""

    def settle(self) -> None:
        """Bring about what most batches of a run are made in, where the first ones cost less: for timing alone."""

    def renew(self) -> None:
        """Nothing: the schedule renews FastDFKD's generator."""

    def slow_down(self, factor: float) -> None:
        self.rate *= factor
        for optimizer in self.optimizers():
            for group in optimizer.param_groups:
                group["lr"] *= factor

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"own.{name}": tensor for name, tensor in self.own_state().items()}
        if self.statistics is not None:
            state |= {f"statistics.{name}": value for name, value in self.statistics.state_dict().items()}
        state["rng"] = self.rng.get_state()
        state["batches"] = torch.tensor(self.batches)
        state["rate"] = torch.tensor(self.rate, dtype=torch.float64)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def is_own(self, name: str) -> bool:
        return name == "rng"

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rate = float(state["rate"])
        self.load_own_state(part_of(state, "own."))
        self.batches = int(state["batches"])
        self.rng.set_state(state["rng"].cpu())
        if self.statistics is not None:
            found = part_of(state, "statistics.")
            self.statistics.load_state_dict({name: tensor.to(self.device) for name, tensor in found.items()})

    def close(self) -> None:
        if self.statistics is not None:
            self.statistics.__exit__(None, None, None)


class OneGenerator(Method[SettingsT]):
    """A frame for methods that train one generator over the whole run, a step for each batch.

    The student learns from what the generator makes at the moment (:meth:`training_batch`), so that nothing is stored.
    A subclass says what the generator's step descends on (:meth:`terms`); its settings are a
    :class:`~fastdfkd_cli.method_config.OneGeneratorConfig`.
    """

    def __init__(self, config: RunConfig, teacher: nn.Module, **keywords: object) -> None:
        super().__init__(config, teacher, **keywords)  # type: ignore[arg-type]
        self.generator = self.new_generator()
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam:
        settings = self.config
        betas = (settings.beta1, settings.beta2)  # type: ignore[attr-defined]
        return self.adam(list(self.generator.parameters()), settings.lr_generator, betas)  # type: ignore[attr-defined]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    @abstractmethod
    def terms(self, images: Tensor, student: nn.Module | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The loss at ``images`` ``[B, C, H, W]`` in [0, 1].

        Returns:
            The unweighted terms, their weighted sum, and the teacher's logits ``[B, classes]``.
        """

    def synthesize(self, student: nn.Module | None = None) -> SyntheticBatch:
        """One step of the generator on a new batch of z; the images are those before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        images = self._images(self.config.batch_size)
        with frozen(student):
            terms, total, logits = self.terms(images, student)
            total.backward()
        self.optimizer.step()
        self.batches += 1
        found = {name: term.detach() for name, term in terms.items()} | {"total": total.detach()}
        return SyntheticBatch(to_uint8(images.detach()), logits.detach().argmax(1), found)

    def follow(self, done: float) -> None:
        """Take the rate of the schedule at the share ``done`` of the distillation, 0 to 1."""
        settings = self.config
        if settings.lr_schedule == "cosine":  # type: ignore[attr-defined]
            lr = settings.lr_generator * (1 + math.cos(math.pi * done)) / 2  # type: ignore[attr-defined]
            for group in self.optimizer.param_groups:
                group["lr"] = lr * self.rate

    @torch.no_grad()
    def training_batch(self, count: int) -> Tensor:
        """Images ``[count, C, H, W]`` in [0, 1] of the generator as it stands."""
        return self._images(count)

    def _images(self, count: int) -> Tensor:
        z = to_device(self.generator.sample_latent(count, self.rng), self.device)
        with self.autocast():
            return self.generator(z)

    def own_state(self) -> dict[str, Tensor]:
        state = {f"generator.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        return state | optimizer_state(self.optimizer)

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        self.generator.load_state_dict(part_of(state, "generator."))
        self.optimizer = self._new_optimizer()
        load_optimizer_state(self.optimizer, state)


def optimizer_state(optimizer: torch.optim.Optimizer, name: str = "optimizer") -> dict[str, Tensor]:
    """An optimiser's tensors, by weight."""
    entries = optimizer.state_dict()["state"].items()
    return {f"{name}.{index}.{key}": value for index, values in entries for key, value in values.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor], name: str = "optimizer"
) -> None:
    """Put what :func:`optimizer_state` gave into an optimiser over the same weights, at the rates that it has."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in part_of(state, f"{name}.").items():
        index, _, entry = key.partition(".")
        # In the weight's own memory layout, which a file does not keep: the fused kernel walks both alike.
        like = parameters[int(index)] if entry != "step" else tensor
        entries.setdefault(int(index), {})[entry] = torch.empty_like(like).copy_(tensor)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of ``state`` whose names begin with ``prefix``, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


__all__ = [
    "Method",
    "OneGenerator",
    "SyntheticBatch",
    "frozen",
    "keep_lower",
    "load_optimizer_state",
    "optimizer_state",
    "part_of",
    "restart",
]
