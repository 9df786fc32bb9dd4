"""How a run scales over processes: which messages it sends, what they cost, and what that leaves of the speed.

    python benchmarks/scaling.py                    # messages, and the calculation of docs/scaling.md
    python benchmarks/scaling.py --measure 1 2      # processes on this machine's CPU, over gloo, against the formula

The messages are counted, not listed by hand: one synthesised batch and one KD step are run with several processes'
code, in one process, while what would be sent is noted. Their number and size do not depend on the batch.

The calculation is ``seconds of a step = compute + messages * latency + bytes * 2 (R - 1) / R / bandwidth``, with
nothing sent while something is computed, which is how it is written. Latency and bandwidth are assumptions, and stand
in :data:`LINKS`; compute is an argument of the result, not a claim.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import fastdfkd_cli.nets_cifar  # noqa: F401 (registers them)
from fastdfkd_cli import distributed
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.methods.fast_meta import FastMeta
from fastdfkd_cli.processes import ALONE, Group
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.student import Student
from fastdfkd_cli.synced_norm import sync_batch_norm
from measure import flops

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A pair of networks, and the recipe they are run with."""

    name: str
    recipe: str
    teacher: str
    student: str
    size: int
    classes: int

    def config(self) -> RunConfig:
        return get_recipe(self.recipe).config((3, self.size, self.size))


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects R GPUs; assumed."""

    name: str
    processes: int
    #: Seconds of a message of a few kilobytes, with what the host does for it.
    latency: float
    #: Bytes a second of a ring.
    bandwidth: float


SETTINGS = (
    Setting(
        name="CIFAR", recipe="cifar10-wrn402-wrn162-k5", teacher="fastdfkd_wrn40_2", student="fastdfkd_wrn16_2",
        size=32, classes=10,
    ),
    Setting(
        name="ImageNet", recipe="imagenet-resnet50-resnet50-k50", teacher="resnet50", student="resnet50",
        size=224, classes=1000,
    ),
)  # fmt: skip
#: "graphs": the host launches nothing in between; "eager": it launches each message and the small operations around it.
LINKS = (
    Link(name="8 GPUs, one machine, NVLink, graphs", processes=8, latency=25e-6, bandwidth=300e9),
    Link(name="8 GPUs, one machine, NVLink, eager", processes=8, latency=150e-6, bandwidth=300e9),
    Link(name="64 GPUs, 400 Gb/s a GPU, graphs", processes=64, latency=50e-6, bandwidth=40e9),
    Link(name="64 GPUs, 400 Gb/s a GPU, eager", processes=64, latency=175e-6, bandwidth=40e9),
    Link(name="64 GPUs, 25 Gb/s Ethernet a machine", processes=64, latency=500e-6, bandwidth=2.5e9),
)
#: Shares of a GPU's 989 TFLOP/s (bf16, dense) for which compute is worked out.
SHARES = (0.05, 0.2)
PEAK = 989e12


# -- the two steps ----------------------------------------------------------------------------------------------


def networks(setting: Setting) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher, student = (
        timm.create_model(name, num_classes=setting.classes).to(memory_format=torch.channels_last)
        for name in (setting.teacher, setting.student)
    )
    return teacher.eval().requires_grad_(False), student.train()


def synthesizer(setting: Setting, teacher: nn.Module, group: Group, *, batch: int, steps: int) -> FastMeta:
    config = setting.config()
    config = replace(config, synthesis=replace(config.fast, batch_size=batch, steps=steps))
    size = (3, setting.size, setting.size)
    return FastMeta(
        config, teacher, image_size=size, num_classes=setting.classes, device=CPU, amp=False, seed=0, group=group
    )


def learner(setting: Setting, net: nn.Module, group: Group) -> Student:
    """The student as a run trains it: its BatchNorm layers normalise over all processes."""
    sync_batch_norm(net, group)
    return Student(net, setting.config().distillation, CPU, False, group=group)


# -- counted ----------------------------------------------------------------------------------------------------


@contextmanager
def noted(processes: int) -> Iterator[list[int]]:
    """Note the bytes of each message instead of sending it, as if all processes had said the same."""
    sent: list[int] = []
    real = distributed._all_reduce

    def note(tensor: Tensor) -> None:
        sent.append(tensor.nbytes)
        tensor.mul_(processes)

    distributed._all_reduce = note
    try:
        yield sent
    finally:
        distributed._all_reduce = real


def messages(setting: Setting) -> dict[str, list[int]]:
    """Bytes of each message of one inner step and of one KD step."""
    group = Group(rank=0, world_size=2)
    teacher, student = networks(setting)
    method = synthesizer(setting, teacher, group, batch=2, steps=1)
    with noted(2) as of_synthesis:
        method.synthesize(student)
    method.close()
    images = torch.rand(2, 3, setting.size, setting.size)
    with noted(2) as of_kd:
        learner(setting, student, group).learn(teacher, images, 0)
    return {"inner step": of_synthesis, "KD step": of_kd}


def operations(setting: Setting) -> dict[str, int]:
    """Floating-point operations of one image in each step."""
    teacher, student = networks(setting)
    method = synthesizer(setting, teacher, ALONE, batch=2, steps=1)
    of_synthesis = flops(lambda: method.synthesize(student)) // 2
    method.close()
    images = torch.rand(2, 3, setting.size, setting.size)
    trained = learner(setting, student, ALONE)
    of_kd = flops(lambda: trained.learn(teacher, images, 0)) // 2
    return {"inner step": of_synthesis, "KD step": of_kd}


def spoken(sent: list[int], link: Link) -> float:
    """Seconds that the messages of a step take."""
    ring = 2 * (link.processes - 1) / link.processes
    return len(sent) * link.latency + sum(sent) * ring / link.bandwidth


def calculation() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for setting in SETTINGS:
        config = setting.config()
        batches = {"inner step": config.synthesis.batch_size, "KD step": config.distillation.batch_size}
        sent, cost = messages(setting), operations(setting)
        for step, sizes in sent.items():
            computed = {share: cost[step] * batches[step] / (share * PEAK) for share in SHARES}
            for link in LINKS:
                seconds = spoken(sizes, link)
                rows.append({
                    "setting": setting.name, "step": step, "batch": batches[step], "messages": len(sizes),
                    "bytes": sum(sizes), "largest": max(sizes), "gflop_per_image": cost[step] / 1e9,
                    "link": link.name, "message_ms": seconds * 1e3,
                    "compute_ms": {str(share): value * 1e3 for share, value in computed.items()},
                    "efficiency": {str(share): value / (value + seconds) for share, value in computed.items()},
                    "tenth_at_ms": 9 * seconds * 1e3,
                })  # fmt: skip
    return rows


# -- measured ---------------------------------------------------------------------------------------------------


def measure(processes: int, batch: int, repeats: int) -> dict[str, float]:
    """Median seconds of CIFAR's inner step and KD step, and of a message of 1 KiB, with a thread for each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = Path(tempfile.mkdtemp()) / "result.json"
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(
                    RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
                )
                found = _measured(Group(rank=rank, world_size=processes, local_rank=rank), batch, repeats)
                if rank == 0:
                    result.write_text(json.dumps(found))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(f"a process of {processes} failed")
    return dict(json.loads(result.read_text()))


def _measured(group: Group, batch: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    setting, steps = SETTINGS[0], 5
    teacher, student = networks(setting)
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], times: int, each: int = 1) -> None:
        """On the wall's clock, and on the process's own, which neither waiting nor other programs move."""
        work()
        for _ in range(times):
            began, spent = time.perf_counter(), time.process_time()
            work()
            found.setdefault(name, []).append((time.perf_counter() - began) / each)
            found.setdefault(f"{name}, CPU", []).append((time.process_time() - spent) / each)

    with distributed.joined(group, CPU, say=print):
        method = synthesizer(setting, teacher, group, batch=batch, steps=steps)
        timed("inner step", lambda: method.synthesize(student), repeats, steps)
        method.close()
        trained = learner(setting, student, group)
        images = torch.rand(batch, 3, setting.size, setting.size).to(memory_format=torch.channels_last)
        timed("KD step", lambda: trained.learn(teacher, images, 0), repeats)
        if group.several:
            small = torch.zeros(256)
            timed("small message", lambda: distributed.sum_(group, [small]), 100)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="How a run scales over processes.")
    parser.add_argument("--measure", type=int, nargs="+", metavar="R", help="numbers of processes to run here")
    parser.add_argument("--batch", type=int, default=32, help="images of each process in --measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found: object
    if arguments.measure:
        found = {str(count): measure(count, arguments.batch, arguments.repeats) for count in arguments.measure}
    else:
        found = calculation()
    text = json.dumps(found, indent=2)
    if arguments.output is None:
        sys.stdout.write(text + "\n")
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
