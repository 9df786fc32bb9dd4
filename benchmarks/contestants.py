"""The two sides of a comparison, each in a process of its own that works only when it is asked to.

Processes, because our side sets what holds for a whole process (threads, how freed memory is kept, choices of cuDNN):
in one process the plain side would gain from it. They take turns, so that both meet the same state of the machine.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdfkd_cli.nets_cifar  # noqa: F401  (registers the networks with timm)
import plain
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.job import Job, Machine, accelerated, plan_of, prepare
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.pool import ImagePool
from fastdfkd_cli.runtime import describe_device, resolve_device, synchronize, tune_process
from measure import MemoryGrowth, flops

#: Begins the name of a timm network with random weights.
RANDOM = "random:"
#: KD steps between two readings of the loss, on the plain side.
LOG_EVERY = 50
#: Images of a batch whose floating-point operations are counted.
COUNTED = 8


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What both sides work on."""

    #: A model reference, or ``random:NAME`` for a timm network with random weights.
    teacher: str
    student: str
    recipe: str
    device: str
    #: Settings on top of the recipe, by dotted key.
    overrides: dict[str, Any] = field(default_factory=dict)
    #: Classes and image size of a random teacher.
    num_classes: int = 10
    image_size: tuple[int, int, int] = (3, 32, 32)
    #: Images that KD draws from.
    pool_images: int = 2560
    #: Where the plain side keeps its PNG files.
    folder: Path = Path("pool")
    #: Our side's ``--compile`` and ``--graphs``.
    compile: bool = False
    graphs: bool = False
    #: Whether our side makes the plan of a run first, as the command does. Each part of it is tried for that, so no
    #: part's own memory can be read after it.
    planned: bool = True


def teacher_of(setup: Setup) -> tuple[str | nn.Module, ModelOptions]:
    """What to hand to the loader. A random teacher's BatchNorm layers remember noise, so that nothing overflows."""
    if not setup.teacher.startswith(RANDOM):
        return setup.teacher, ModelOptions()
    channels = setup.image_size[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = timm.create_model(setup.teacher.removeprefix(RANDOM), num_classes=setup.num_classes, in_chans=channels)
        net.train()
        with torch.no_grad():
            for _ in range(20):
                net(torch.randn(16, *setup.image_size))
    half = (0.5,) * channels
    return net.eval(), ModelOptions(num_classes=setup.num_classes, input_size=setup.image_size, mean=half, std=half)


def job_of(setup: Setup, amp: bool | None) -> Job:
    """Models, settings and machine, as a run has them."""
    teacher, options = teacher_of(setup)
    overrides = {**setup.overrides, "pool_size": setup.pool_images, "quality_images": 0}
    return prepare(
        teacher, setup.student, options, ModelOptions(), setup.recipe, None, overrides,
        Machine.choose(setup.device, amp, lambda _: None), lambda _: None, trains=True,
    )  # fmt: skip


def pool_pictures(setup: Setup, size: tuple[int, int, int]) -> Iterator[Tensor]:
    """Smooth noise, in parts of uint8 ``[N, C, H, W]``: as easy for PNG as synthetic images are."""
    rng = torch.Generator().manual_seed(0)
    for start in range(0, setup.pool_images, 64):
        coarse = torch.rand(min(64, setup.pool_images - start), size[0], 8, 8, generator=rng)
        smooth = F.interpolate(coarse, size[1:], mode="bilinear", align_corners=False)
        yield smooth.mul(255).round().to(torch.uint8)


def counted(config: RunConfig) -> RunConfig:
    """The same computation for one inner step of few images: operations grow with both in proportion."""
    synthesis = dataclasses.replace(config.fast, batch_size=COUNTED, steps=1, meta_lr_generator=1e-3)
    return dataclasses.replace(config, synthesis=synthesis)


class Plain:
    """Eager float32 in the published manner; see :mod:`plain`."""

    def __init__(self, setup: Setup) -> None:
        job = job_of(setup, amp=False)
        assert job.student is not None
        self.setup, self.config, self.device, self.size = setup, job.config, job.machine.device, job.size
        self.arguments: dict[str, Any] = {"image_size": job.size, "num_classes": job.teacher.num_classes}
        self.arguments["device"] = self.device
        self.teacher = job.teacher.normalized().to(self.device).requires_grad_(True)
        self.student = job.student.normalized().to(self.device)
        self.growth = MemoryGrowth(self.device)
        try:
            self.synthesizer = plain.PlainSynthesizer(job.config, self.teacher, **self.arguments)
        except ValueError as error:
            raise UsageError(f"Recipe {job.config.recipe}: {error}. Leave the plain column out.") from None
        self.pupil = plain.PlainStudent(self.student, self.teacher, job.config)
        self.pool = plain.FolderPool(setup.folder, job.config.distillation.batch_size)
        self.steps = 0

    def describe(self) -> dict[str, Any]:
        return {"device": describe_device(self.device), "precision": "float32"}

    def synthesize(self, batches: int) -> float:
        """Seconds of so many batches, their PNG files included."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(batches):
            images, _, _ = self.synthesizer.synthesize(self.student)
            # Files are written over: the pool keeps its size.
            self.pool.count %= self.setup.pool_images
            self.pool.add(images)
        synchronize(self.device)
        return time.perf_counter() - began

    def fill(self) -> None:
        for images in pool_pictures(self.setup, self.size):
            self.pool.add(images)

    def distil(self, steps: int) -> dict[str, float]:
        """A round of KD steps: seconds in all, and of them until the new loader's first batch was there."""
        synchronize(self.device)
        began = time.perf_counter()
        batches = self.pool.batches()
        images, opened = next(batches), time.perf_counter() - began
        for step in range(steps):
            self.pupil.set_learning_rate(min(self.steps / max(self.config.kd_steps, 1), 1.0))
            loss = self.pupil.learn(images.to(self.device))
            self.steps += 1
            if step % LOG_EVERY == 0:
                loss.item()
            if step < steps - 1:
                images = next(batches)
        synchronize(self.device)
        return {"seconds": time.perf_counter() - began, "loader": opened}

    def flops(self) -> dict[str, int]:
        """Floating-point operations for an image: of one inner step, and of one KD step."""
        synthesizer = plain.PlainSynthesizer(counted(self.config), self.teacher, **self.arguments)
        images = torch.rand(COUNTED, *self.size, device=self.device)
        found = {
            "inner_step": flops(lambda: synthesizer.synthesize(self.student)) // COUNTED,
            "kd_step": flops(lambda: self.pupil.learn(images)) // COUNTED,
        }
        synthesizer.close()
        return found

    def memory(self, what: str) -> dict[str, int]:
        """What two batches, or a few KD steps, take beside the models; the loader's processes come on top."""
        return _memory(self, what)


class Ours:
    """This package, as the command uses it; ``amp`` as it decides by itself, or off."""

    def __init__(self, setup: Setup, *, amp: bool | None = None) -> None:
        tune_process()
        self.setup = setup
        self.job = job_of(setup, amp)
        job = self.job
        assert job.student is not None
        self.device = job.machine.device
        self.teacher, self.student = job.machine.place(job.teacher), job.machine.place(job.student)
        self.growth = MemoryGrowth(self.device)
        self.messages: list[str] = []
        self.run = self._engine()

    def _engine(self) -> Distillation:
        """A run, put together as :func:`fastdfkd_cli.api.distill` does it."""
        job, setup = self.job, self.setup
        plan = plan_of(job, None) if setup.planned else None
        acceleration = accelerated(job, plan, compiles=setup.compile, graphs=setup.graphs, say=self.messages.append)
        method = build_method(job.config, self.teacher, acceleration=acceleration, **job.keywords())
        run = Distillation(
            job.config, self.teacher, self.student, synthesizer=method, image_size=job.size, device=self.device,
            amp=job.machine.amp, acceleration=acceleration,
        )  # fmt: skip
        run.prepare()
        return run

    def describe(self) -> dict[str, Any]:
        """What was chosen, and what was said about it so far."""
        precision = "bf16" if self.job.machine.amp else "float32"
        return {"device": describe_device(self.device), "precision": precision, "messages": self.messages}

    def synthesize(self, batches: int) -> float:
        """Seconds of so many batches, put into the pool."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(batches):
            self.run.synthesize_batch(with_student=True)
        synchronize(self.device)
        return time.perf_counter() - began

    def fill(self) -> None:
        for images in pool_pictures(self.setup, self.job.size):
            labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
            self.run.pool.add(images.to(self.device), labels)

    def distil(self, steps: int) -> dict[str, float]:
        """A round of KD steps, drawing and augmentation included."""
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.run.kd_step()
        synchronize(self.device)
        return {"seconds": time.perf_counter() - began, "loader": 0.0}

    def flops(self) -> dict[str, int]:
        """As :meth:`Plain.flops`: of the operations that our side runs, counted without graphs and compilation."""
        job = self.job
        shape = {"image_size": job.size, "device": self.device, "amp": False}
        method = build_method(counted(job.config), self.teacher, num_classes=job.teacher.num_classes, **shape)  # type: ignore[arg-type]
        pool = ImagePool.holding(
            torch.zeros(COUNTED, *job.size, dtype=torch.uint8), torch.zeros(COUNTED, dtype=torch.int64), self.device
        )
        distillation = dataclasses.replace(job.config.distillation, batch_size=COUNTED)
        config = dataclasses.replace(job.config, distillation=distillation)
        run = Distillation(config, self.teacher, self.student, synthesizer=None, pool=pool, **shape)  # type: ignore[arg-type]
        found = {
            "inner_step": flops(lambda: method.synthesize(self.student)) // COUNTED,
            "kd_step": flops(run.kd_step) // COUNTED,
        }
        method.close()
        return found

    def memory(self, what: str) -> dict[str, int]:
        """As :meth:`Plain.memory`; the pool is in memory, and counts."""
        return _memory(self, what)


def _memory(side: Plain | Ours, what: str) -> dict[str, int]:
    if what == "kd":
        side.fill()
        side.distil(3)
    else:
        side.synthesize(2)
    synchronize(side.device)
    return side.growth.read()


class Pool:
    """The images of a whole published run, and nothing else."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def memory(self, images: int, batch: int) -> dict[str, int]:
        """What the pool takes, filled batch by batch."""
        device, size = resolve_device(self.setup.device), self.setup.image_size
        filler = torch.zeros(batch, *size, dtype=torch.uint8, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        ImagePool(size, batch, device).add(filler, labels)  # what a first use of anything takes
        growth = MemoryGrowth(device)
        pool = ImagePool(size, images, device)
        pool.reserve(images)
        while len(pool) < images:
            pool.add(filler, labels)
        return {**growth.read(), "payload_bytes": pool.images.numel()}


def contestant(name: str, setup: Setup) -> Any:
    """``plain``, ``ours``, ``float32`` (ours without bf16), or ``pool``."""
    if name == "float32":
        return Ours(setup, amp=False)
    return {"plain": Plain, "ours": Ours, "pool": Pool}[name](setup)


class Remote:
    """A contestant in its own process: call it with a method's name and arguments."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setup))
        self._process.start()
        theirs.close()
        self._receive()

    def __call__(self, method: str, **arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            reply = self._pipe.recv()
        except EOFError:
            raise FastDFKDError(f"The process of '{self.name}' ended before it was done.") from None
        if isinstance(reply, FastDFKDError):
            raise reply
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # what it reads ends, and so does it
        self._process.join()


def _serve(pipe: Any, name: str, setup: Setup) -> None:
    # Four workers on two cores are what the published code starts there, too.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    try:
        mine = contestant(name, setup)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(mine, method)(**arguments))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # whoever asked is gone, or leaves with us
        pass
    except FastDFKDError as error:
        pipe.send(error)
