"""Where the time of an inner step and of a KD step goes, and how far that is from what the machine could do.

    python benchmarks/floor.py --teacher teacher.safetensors --student cifar/wrn16_1 --batch 256 --output floor.json

Three figures stand side by side, for each kind of operation:

- **time**: what it takes in the profiler (on a CPU the operation's own time, on CUDA that of its kernels). What is
  left of the wall-clock time is Python, autograd, launches and waiting: "between operations". Operations are run as
  they are written, without graphs or compilation, and the two gradients of a convolution one after the other, so that
  each has its own time.
- **at peak**: what the operations that were executed would take at the machine's measured peaks, each of them limited
  by its floating-point operations or by the bytes of the tensors it reads and writes, whichever takes longer.
- **floor**: what must be spent however it is written. That is the products of convolutions and linear layers which the
  algorithm needs:

  ==========  ==========  ===================  =====================
  step        network     forward              gradients
  ==========  ==========  ===================  =====================
  inner step  generator   1 (keep=last: 1+1/k) in input and weights
  inner step  teacher     1                    in the input
  inner step  student     1                    in the input
  KD step     teacher     1                    none
  KD step     student     1                    in input and weights
  ==========  ==========  ===================  =====================

  (the student takes part in an inner step where there is an adversarial term; nobody needs its first layer's gradient
  in the pixels in a KD step). The generator's convolutions count as our generator writes them, with 4 products in the
  place of 9. Each product reads its two operands and writes its result once per pass, in the working precision; all
  that is elementwise (normalisation, statistics, activation, casts) is taken to be done on the way, for nothing; saved
  activations are not read a second time for derivatives. To that comes the optimiser's float32 traffic: Adam reads
  four numbers for each weight and latent and writes three, SGD with momentum three and two, the meta optimiser's being
  divided by k. It is a bound for convolutions computed one at a time: fusing several of them could save bytes, and
  Winograd or FFT could save products.

Peaks are measured before and after, in the same run, and the better one counts: the fastest of a square matrix product
and of the teacher's own largest convolutions, and copies (bytes read and written) of a large buffer and of one that
stays in the cache. The floor uses the large one; with the other it is given once more, since what one operation
writes may still lie in the cache when the next one reads it.

Bytes are those of the distinct tensors that an operation reads and writes (what is changed in place counts twice, what
was expanded once); views and allocations move none, and stand under "other". Normalisation is BatchNorm itself, forward
and backward; "statistics" are the moments of its inputs for the feature term, and their derivative.

JSON goes to stdout or to ``--output``, tables to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.profiler import record_function
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdfkd_cli.config import RunConfig, to_dict
from fastdfkd_cli.console import print_error
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.generators import Generator, Pixels
from fastdfkd_cli.job import Job, prepare
from fastdfkd_cli.job import Machine as JobMachine
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import ModelOptions
from fastdfkd_cli.runtime import describe_device, synchronize, tune_process, versions
from fastdfkd_cli.settings import parse_assignments

aten = torch.ops.aten

FORWARD, IN_INPUT, IN_WEIGHT = "convolution forward", "convolution grad input", "convolution grad weight"
PRODUCTS = "matrix products"
NORMALISATION, STATISTICS, ACTIVATION = "normalisation", "statistics", "activation"
ELEMENTWISE, COPIES, OPTIMISER, OTHER = "elementwise", "copies and casts", "optimiser", "other"
KINDS = (
    FORWARD, IN_INPUT, IN_WEIGHT, PRODUCTS, NORMALISATION, STATISTICS, ACTIVATION, ELEMENTWISE, COPIES, OPTIMISER, OTHER
)  # fmt: skip

#: Moments of BatchNorm inputs; ``addcmul`` is their derivative (a loose Adam's is told by the optimiser around it).
_STATISTICS = {"batch_norm_update_stats", "batch_norm_stats", "var_mean", "var", "addcmul"}
_ACTIVATIONS = ("relu", "threshold", "sigmoid", "silu", "gelu", "hardtanh", "hardswish", "tanh", "mish", "elu")
_COPIES = {
    "copy_", "_to_copy", "clone", "cat", "stack", "flip", "roll", "repeat", "constant_pad_nd", "fill_", "zero_",
    "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "scalar_tensor", "index",
    "index_put_", "_index_put_impl_", "index_copy", "index_select", "gather", "slice_backward", "select_backward",
}  # fmt: skip
#: Read only what they pick out of their first tensor.
_PICK = {"index", "index_select", "gather", "embedding"}
#: Write a tensor without reading what stood there.
_OVERWRITE = {"copy_", "fill_", "zero_"}


# -- counting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two) and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor)


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: what was expanded lies in memory once."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(extent for extent, stride in extents if stride != 0 or extent == 0) * tensor.element_size()


def name_of(func: OpOverload) -> str:
    return str(func._schema.name).rpartition("::")[2]


def _bound(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument of the schema that was given, with its value."""
    yield from zip(func._schema.arguments, args, strict=False)
    for argument in func._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def bytes_moved(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that one operation reads and writes: each distinct tensor once; views and allocations cost nothing."""
    name = name_of(func)
    if "empty" in name:
        return 0
    read: dict[Any, int] = {}
    written = 0
    storages = set()
    for argument, value in _bound(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value):
            storages.add(tensor.untyped_storage().data_ptr())
            written += size_of(tensor) if writes else 0
            if not (writes and (name in _OVERWRITE or argument.is_out)):
                read[tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype] = size_of(tensor)
    fresh = sum(size_of(each) for each in _tensors(out) if each.untyped_storage().data_ptr() not in storages)
    if not written and not fresh and _tensors(out):
        return 0  # a view
    if name in _PICK:
        source = _tensors(args[0])[0]
        read[source.data_ptr(), source.shape, source.stride(), source.dtype] = min(size_of(source), fresh)
    return sum(read.values()) + written + fresh


def convolution_flops(x: Sequence[int], weight: Sequence[int], y: Sequence[int], transposed: bool) -> int:
    """Of the forward pass, and of either gradient: the same products, summed up in another order."""
    positions = math.prod((x if transposed else y)[2:])
    return 2 * x[0] * positions * math.prod(weight)


def flops_of(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of convolutions and matrix products; 0 for everything else.

    Of a convolution's derivative, ``output_mask`` decides which gradients are computed.
    """
    packet = func.overloadpacket
    if packet is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        return convolution_flops(x.shape, weight.shape, out.shape, transposed)
    if packet is aten.convolution_backward:
        grad, x, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        return sum(mask[:2]) * convolution_flops(x.shape, weight.shape, grad.shape, transposed)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


def kind_of(func: OpOverload) -> str:
    """The kind of an operation outside an optimiser. A convolution's derivative has two: see :class:`Operations`."""
    name = name_of(func)
    if func.overloadpacket is aten.convolution:
        return FORWARD
    if func.overloadpacket in flop_registry:
        return PRODUCTS
    if name in _STATISTICS:
        return STATISTICS
    if "batch_norm" in name or name.startswith(("native_layer_norm", "native_group_norm")):
        return NORMALISATION
    if any(word in name for word in _ACTIVATIONS):
        return ACTIVATION
    if name in _COPIES:
        return COPIES
    return ELEMENTWISE if torch.Tag.pointwise in func.tags else OTHER


@dataclass
class Operation:
    """All calls of one operation on tensors of one shape."""

    kind: str
    name: str
    shape: tuple[int, ...]
    #: What the profiler calls it.
    label: str
    calls: int = 0
    work: Work = field(default_factory=Work)
    seconds: float = 0.0


class Operations(TorchDispatchMode):
    """Counts every operation that torch executes while it is entered, and names it for the profiler.

    Everything inside an optimiser's ``step`` is the optimiser's. A convolution's two gradients are computed by two
    calls, so that each can be counted and timed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[str, str, tuple[int, ...]], Operation] = {}
        self._optimising = False
        self._handles: list[Any] = []

    def __enter__(self) -> Operations:
        def mark(optimising: bool) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._optimising = optimising

            return hook

        self._handles = [register_optimizer_step_pre_hook(mark(True)), register_optimizer_step_post_hook(mark(False))]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._handles:
            self._handles.pop().remove()

    @property
    def rows(self) -> list[Operation]:
        return list(self._rows.values())

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is not aten.convolution_backward:
            return self._run(OPTIMISER if self._optimising else kind_of(func), func, args, kwargs)
        in_input, in_weight, in_bias = args[10]
        grads: list[Tensor | None] = [None, None, None]
        if in_input:
            grads[0] = self._run(IN_INPUT, func, (*args[:10], [True, False, False]), kwargs)[0]
        if in_weight or in_bias:
            grads[1:] = self._run(IN_WEIGHT, func, (*args[:10], [False, in_weight, in_bias]), kwargs)[1:]
        return tuple(grads)

    def _run(self, kind: str, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = _tensors([args, kwargs])
        key = (kind, name_of(func), tuple(tensors[0].shape) if tensors else ())
        row = self._rows.setdefault(key, Operation(*key, label=f"operation {len(self._rows)}"))
        with record_function(row.label):
            out = func(*args, **kwargs)
        used = args
        if kind == IN_INPUT:  # reads the weights, and of the input no more than its shape
            used = (args[0], None, *args[2:])
        elif kind == IN_WEIGHT:
            used = (*args[:2], None, *args[3:])
        row.calls += 1
        row.work += Work(flops_of(func, args, kwargs, out), bytes_moved(func, used, kwargs, out))
        return out


# -- what must be spent -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A convolution or a matrix product of one forward pass: its operands, and what it takes."""

    convolution: bool
    #: Whether one operand is a weight; products of two activations (attention) have no gradient in weights.
    weighted: bool
    flops: int
    input_bytes: int
    weight_bytes: int
    output_bytes: int

    @property
    def work(self) -> Work:
        """Of one pass, forward or one gradient: three tensors, two of them read and one written."""
        return Work(self.flops, self.input_bytes + self.weight_bytes + self.output_bytes)


class Products(TorchDispatchMode):
    """Notes the convolutions and matrix products of a forward pass, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []
        #: x, weight, stride, padding, dilation, groups of the convolutions that are not transposed.
        self.convolutions: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind = kind_of(func)
        if kind not in (FORWARD, PRODUCTS):
            return out
        operands = _tensors(args)
        if func.overloadpacket is aten.addmm:
            operands = operands[1:]
        sizes = [size_of(each) for each in operands]
        convolution = kind == FORWARD
        result = sum(size_of(each) for each in _tensors(out)[:1])
        weighted = convolution or func.overloadpacket in (aten.addmm, aten.mm)
        flops = flops_of(func, args, kwargs, out)
        self.found.append(Product(convolution, weighted, flops, sizes[0], sum(sizes[1:]), result))
        if convolution and not args[6]:
            x, weight, _, stride, padding, dilation, _, _, groups = args
            self.convolutions.append((x.shape, weight.shape, stride, padding, dilation, groups))
        return out


Spent = dict[str, Work]


def passes(
    products: Sequence[Product],
    *,
    forward: float = 1.0,
    in_input: bool = False,
    in_weight: bool = False,
    in_pixels: bool = True,
) -> Spent:
    """What the passes of one network must spend, by kind.

    Args:
        products: those of its forward pass.
        forward: how many forward passes there are.
        in_input, in_weight: which gradients are needed.
        in_pixels: whether the gradient in the network's own input is needed too.
    """
    spent: Spent = {}

    def spend(kind: str, work: Work) -> None:
        spent[kind] = spent.get(kind, Work()) + work

    for index, product in enumerate(products):
        spend(FORWARD if product.convolution else PRODUCTS, product.work * forward)
        if in_input and (index > 0 or in_pixels):
            # Of two activations, both are inputs.
            spend(IN_INPUT if product.convolution else PRODUCTS, product.work * (1 if product.weighted else 2))
        if in_weight and product.weighted:
            spend(IN_WEIGHT if product.convolution else PRODUCTS, product.work)
    return spent


def together(parts: Iterable[Spent]) -> Spent:
    total: Spent = {}
    for part in parts:
        for kind, work in part.items():
            total[kind] = total.get(kind, Work()) + work
    return total


def needed_by_inner_step(
    config: RunConfig,
    generator: Sequence[Product],
    teacher: Sequence[Product],
    student: Sequence[Product],
    weights: int,
    latents: int,
) -> Spent:
    """What one inner step must spend; ``weights`` are the generator's, ``latents`` the numbers in z."""
    synthesis = config.fast
    steps = synthesis.steps
    parts = [
        passes(generator, forward=1 + (1 / steps if synthesis.keep == "last" else 0), in_input=True, in_weight=True),
        passes(teacher, in_input=True),
    ]
    if synthesis.adversarial_weight > 0:
        parts.append(passes(student, in_input=True))
    adam = 7 * 4
    meta = weights / steps if synthesis.reuse == "meta" else 0
    parts.append({OPTIMISER: Work(0, adam * (weights + latents + meta))})
    return together(parts)


def needed_by_kd_step(config: RunConfig, teacher: Sequence[Product], student: Sequence[Product], weights: int) -> Spent:
    """What one KD step must spend; ``weights`` are the student's."""
    distillation = config.distillation
    numbers = (5 if distillation.momentum else 3) + (3 if distillation.average == "ema" else 0)
    return together(
        [
            passes(teacher),
            passes(student, in_input=True, in_weight=True, in_pixels=False),
            {OPTIMISER: Work(0, numbers * 4 * weights)},
        ]
    )


# -- the machine --------------------------------------------------------------------------------------------------


def best_seconds(function: Callable[[], object], device: torch.device, *, rounds: int = 4) -> float:
    """Seconds of one call, at best; short calls are repeated, so that a launch or a clock does not count."""
    function()
    synchronize(device)

    def timed(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return (time.perf_counter() - began) / calls

    calls = max(1, int(0.02 / max(timed(1), 1e-7)))
    return min(timed(calls) for _ in range(rounds))


class Machine:
    """Measured peaks, the best of all rounds: other programs can only make them look worse.

    Args:
        convolutions: x, weight, stride, padding, dilation, groups: the largest ones are timed, channels-last.
    """

    def __init__(self, device: torch.device, precision: torch.dtype, convolutions: Sequence[tuple[Any, ...]]) -> None:
        self.device, self.precision = device, precision
        self.side = 8192 if device.type == "cuda" else 2048
        distinct = {(tuple(c[0]), tuple(c[1])): c for c in convolutions}.values()
        self._convolutions = sorted(distinct, key=_own_flops, reverse=True)[:4]
        #: FLOP/s by precision and name; bytes/s by name.
        self.products: dict[str, dict[str, float]] = {"bf16": {}, "float32": {}}
        self.copies: dict[str, float] = {}

    @torch.no_grad()
    def measure(self) -> None:
        """One round of everything."""
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
            found = self.products[name]
            a, b = (torch.randn(self.side, self.side, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), self.device)  # type: ignore[misc]
            self._note(found, f"matrix product {self.side}", 2 * self.side**3 / seconds)
            if dtype != self.precision:
                continue
            for each in self._convolutions:
                shape, weight, stride, padding, dilation, groups = each
                x = torch.randn(shape, device=self.device).to(dtype).contiguous(memory_format=torch.channels_last)
                w = torch.randn(weight, device=self.device).to(dtype).contiguous(memory_format=torch.channels_last)
                seconds = best_seconds(
                    lambda x=x, w=w, rest=(stride, padding, dilation, groups): nn.functional.conv2d(x, w, None, *rest),  # type: ignore[misc]
                    self.device,
                )
                self._note(found, f"convolution {_shape(weight)} of {_shape(shape)}", _own_flops(each) / seconds)
        memory, cached = (2**30, 2**24) if self.device.type == "cuda" else (2**29, 2**22)
        for name, size in (("memory", memory), ("cache", cached)):
            source = torch.zeros(size, dtype=torch.uint8, device=self.device)
            target = torch.ones_like(source)
            seconds = best_seconds(lambda s=source, t=target: t.copy_(s), self.device)  # type: ignore[misc]
            self._note(self.copies, f"{name} ({size / 2**20:.0f} MiB)", 2 * size / seconds)

    @staticmethod
    def _note(where: dict[str, float], name: str, value: float) -> None:
        where[name] = max(where.get(name, 0.0), value)

    @property
    def flops(self) -> float:
        """FLOP/s in the working precision."""
        return max(self.products["bf16" if self.precision == torch.bfloat16 else "float32"].values())

    @property
    def bandwidth(self) -> float:
        """Bytes/s, read and written, of a buffer that no cache holds."""
        return next(iter(self.copies.values()))

    @property
    def cache_bandwidth(self) -> float:
        return max(self.copies.values())

    def seconds(self, work: Work) -> float:
        """Of work in which operations and bytes overlap perfectly."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def _own_flops(convolution: tuple[Any, ...]) -> int:
    x, weight, stride, padding, dilation, _ = convolution
    spatial = [
        (extent + 2 * p - d * (kernel - 1) - 1) // s + 1
        for extent, kernel, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    return convolution_flops(x, weight, [x[0], weight[0], *spatial], transposed=False)


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


# -- measuring ----------------------------------------------------------------------------------------------------


def wall_seconds(step: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return found


def profiled(step: Callable[[], object], device: torch.device, rounds: int) -> list[Operation]:
    """The operations of one call of ``step``, with their seconds: those of the quickest of some rounds."""
    best: list[Operation] = []
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(rounds):
        operations = Operations()
        with profile(activities=activities) as profiler:
            with operations:
                step()
            synchronize(device)
        rows = {row.label: row for row in operations.rows}
        for event in profiler.events() or ():
            # A range shows once on the CPU, and once more on the device that its kernels ran on.
            row = rows.get(event.name) if event.device_type.name == "CPU" else None
            if row is not None:
                micros = event.device_time_total if device.type == "cuda" else event.cpu_time_total
                row.seconds += micros / 1e6
        if not best or sum(row.seconds for row in operations.rows) < sum(row.seconds for row in best):
            best = operations.rows
    return best


def step_report(
    operations: Sequence[Operation], needed: Spent, wall: Sequence[float], machine: Machine, *, per: int = 1
) -> dict[str, Any]:
    """Everything about one step, in plain values; ``operations`` and ``wall`` are divided by ``per``."""
    seconds = statistics.median(wall) / per
    inside = sum(row.seconds for row in operations) / per
    whole = max(seconds, inside)  # under other load, the profiled call may have been the slower one
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        rows = [row for row in operations if row.kind == kind]
        work = sum((row.work for row in rows), Work()) * (1 / per)
        must = needed.get(kind, Work())
        took = sum(row.seconds for row in rows) / per
        floor = machine.seconds(must)
        kinds[kind] = {
            "calls": sum(row.calls for row in rows) / per,
            "seconds": took,
            "share": took / whole,
            "flops": work.flops,
            "bytes": work.bytes,
            "flops_per_second": work.flops / took if took else 0.0,
            "bytes_per_second": work.bytes / took if took else 0.0,
            "at_peak_seconds": sum(machine.seconds(row.work) for row in rows) / per,
            "needed_flops": must.flops,
            "needed_bytes": must.bytes,
            "floor_seconds": floor,
            "factor": took / floor if floor else None,
        }
    must = sum(needed.values(), Work())
    floor = machine.seconds(must)
    listed = sorted(operations, key=lambda row: row.seconds, reverse=True)[:25]
    return {
        "seconds": seconds,
        "best_seconds": min(wall) / per,
        "timings": len(wall),
        "kinds": kinds,
        "operations_seconds": inside,
        "between_operations_seconds": max(seconds - inside, 0.0),
        "at_peak_seconds": sum(kind["at_peak_seconds"] for kind in kinds.values()),
        "needed_flops": must.flops,
        "needed_bytes": must.bytes,
        "floor": {
            "flops_seconds": must.flops / machine.flops,
            "bytes_seconds": must.bytes / machine.bandwidth,
            "cached_bytes_seconds": must.bytes / machine.cache_bandwidth,
            "overlapped_seconds": floor,
            "by_kind_seconds": sum(kind["floor_seconds"] for kind in kinds.values()),
            "not_overlapped_seconds": must.flops / machine.flops + must.bytes / machine.bandwidth,
        },
        "factor": seconds / floor,
        "operations": [
            {
                "kind": row.kind,
                "name": row.name,
                "shape": list(row.shape),
                "calls": row.calls / per,
                "seconds": row.seconds / per,
                "flops": row.work.flops / per,
                "bytes": row.work.bytes / per,
                "at_peak_seconds": machine.seconds(row.work) / per,
            }
            for row in listed
        ],
    }


def products_of(network: nn.Module, inputs: Tensor, *, amp: bool) -> Products:
    found = Products()
    with torch.no_grad(), torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=amp), found:
        network(inputs)
    return found


def measure(job: Job, *, repeats: int) -> dict[str, Any]:
    """Profile one synthesised batch and one KD step of a job, between two rounds of the machine's peaks."""
    assert job.student is not None
    device, amp = job.machine.device, job.machine.amp
    batch, steps = job.config.fast.batch_size, job.config.fast.steps
    config = replace(job.config, pool_size=4 * batch)
    teacher, student = job.machine.place(job.teacher), job.machine.place(job.student)

    pixels = config.fast.images == "pixel"
    generator: Generator | Pixels = Pixels(job.size) if pixels else Generator(config.generator, job.size)
    generator = generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = generator.sample_latent(batch, torch.Generator().manual_seed(0)).to(device)

    def pixels_of(count: int) -> Tensor:
        return torch.rand(count, *job.size, device=device).contiguous(memory_format=torch.channels_last)

    synthetic, drawn = pixels_of(batch), pixels_of(config.distillation.batch_size)
    # In evaluation mode, so that the student's statistics stay its own; the products are those of training.
    teacher.eval()
    student.eval()
    seen = products_of(teacher, synthetic, amp=amp)
    inner_needs = needed_by_inner_step(
        config,
        products_of(generator, z, amp=amp).found,
        seen.found,
        products_of(student, synthetic, amp=amp).found,
        weights=sum(parameter.numel() for parameter in generator.parameters()),
        latents=z.numel(),
    )
    kd_needs = needed_by_kd_step(
        config,
        products_of(teacher, drawn, amp=amp).found,
        products_of(student, drawn, amp=amp).found,
        weights=sum(parameter.numel() for parameter in student.parameters()),
    )
    del synthetic, drawn, z

    machine = Machine(device, torch.bfloat16 if amp else torch.float32, seen.convolutions)
    machine.measure()
    method = build_method(config, teacher, **job.keywords())
    run = Distillation(config, teacher, student, synthesizer=method, image_size=job.size, device=device, amp=amp)

    def synthesise() -> None:
        run.synthesize_batch(with_student=True)

    synthesise()  # warm up
    run.kd_step()
    inner_wall: list[float] = []
    kd_wall: list[float] = []
    for _ in range(repeats):  # side by side, so that other load falls on both
        inner_wall += wall_seconds(synthesise, device, 1)
        kd_wall += wall_seconds(run.kd_step, device, 5)
    by_inner = profiled(synthesise, device, rounds=2)
    by_kd = profiled(run.kd_step, device, rounds=5)
    method.close()
    machine.measure()
    return {
        "device": describe_device(device),
        "amp": amp,
        "teacher": job.teacher.name,
        "student": job.student.name,
        "versions": versions(),
        "config": to_dict(job.config),
        "peaks": {
            "flops_per_second": machine.products,
            "bytes_per_second": machine.copies,
            "used": {"flops_per_second": machine.flops, "bytes_per_second": machine.bandwidth},
        },
        "inner_step": step_report(by_inner, inner_needs, inner_wall, machine, per=steps),
        "kd_step": step_report(by_kd, kd_needs, kd_wall, machine),
    }


# -- showing ------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any], batch: Mapping[str, int]) -> None:
    """Tables on stderr."""
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 150)
    console.print(_peaks_table(result))
    for step, title in (("inner_step", "inner step"), ("kd_step", "KD step")):
        found = result[step]
        heading = (
            f"one {title} of {batch[step]} images: {found['seconds'] * 1e3:.2f} ms by the clock (at best "
            f"{found['best_seconds'] * 1e3:.2f}), {found['operations_seconds'] * 1e3:.2f} ms of operations profiled"
        )
        console.print(_kinds_table(found, heading))
        floor = found["floor"]
        console.print(
            f"must be spent: {found['needed_flops'] / 1e9:.2f} GFLOP = {floor['flops_seconds'] * 1e3:.2f} ms, "
            f"{found['needed_bytes'] / 1e9:.3f} GB = {floor['bytes_seconds'] * 1e3:.2f} ms "
            f"({floor['cached_bytes_seconds'] * 1e3:.2f} ms at the cache's speed). "
            f"Floor {floor['overlapped_seconds'] * 1e3:.2f} ms overlapped, {floor['by_kind_seconds'] * 1e3:.2f} ms "
            f"kind by kind, {floor['not_overlapped_seconds'] * 1e3:.2f} ms one after the other; the step takes "
            f"{found['factor']:.1f} times the first.",
            soft_wrap=True,
        )
        console.print(_operations_table(found, f"the costliest operations of one {title}"))


def _table(title: str, columns: Sequence[str], *, words: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", no_wrap=True)
    return table


def _peaks_table(result: Mapping[str, Any]) -> Table:
    peaks = result["peaks"]
    table = _table(f"peaks of {result['device']}", ["measured", ""])
    for precision, found in peaks["flops_per_second"].items():
        for name, value in found.items():
            table.add_row(f"{precision} {name}", f"{value / 1e9:,.0f} GFLOP/s")
    for name, value in peaks["bytes_per_second"].items():
        table.add_row(f"copy, {name}", f"{value / 1e9:,.1f} GB/s")
    return table


def _kinds_table(found: Mapping[str, Any], title: str) -> Table:
    columns = ["kind", "calls", "ms", "share", "GFLOP", "MB", "GFLOP/s", "GB/s", "at peak ms", "floor ms", "factor"]
    table = _table(title, columns)
    for name, kind in found["kinds"].items():
        if not kind["calls"]:
            continue
        table.add_row(
            name,
            f"{kind['calls']:.0f}",
            _ms(kind["seconds"]),
            f"{kind['share']:.1%}",
            f"{kind['flops'] / 1e9:.2f}" if kind["flops"] else "",
            f"{kind['bytes'] / 1e6:,.1f}",
            f"{kind['flops_per_second'] / 1e9:,.0f}" if kind["flops"] else "",
            f"{kind['bytes_per_second'] / 1e9:,.1f}",
            _ms(kind["at_peak_seconds"]),
            _ms(kind["floor_seconds"]),
            f"{kind['factor']:.1f}" if kind["factor"] else "",
        )
    gap = found["between_operations_seconds"]
    table.add_row("between operations", "", _ms(gap), f"{gap / (gap + found['operations_seconds']):.1%}")
    kinds = found["kinds"].values()
    table.add_row(
        "all",
        f"{sum(kind['calls'] for kind in kinds):.0f}",
        _ms(found["seconds"]),
        "",
        f"{sum(kind['flops'] for kind in kinds) / 1e9:.2f}",
        f"{sum(kind['bytes'] for kind in kinds) / 1e6:,.1f}",
        f"{sum(kind['flops'] for kind in kinds) / found['seconds'] / 1e9:,.0f}",
        f"{sum(kind['bytes'] for kind in kinds) / found['seconds'] / 1e9:,.1f}",
        _ms(found["at_peak_seconds"]),
        _ms(found["floor"]["overlapped_seconds"]),
        f"{found['factor']:.1f}",
        style="bold",
    )
    return table


def _operations_table(found: Mapping[str, Any], title: str) -> Table:
    table = _table(
        title, ["operation", "kind", "first tensor", "calls", "ms", "GFLOP/s", "GB/s", "at peak ms"], words=3
    )
    for row in found["operations"][:12]:
        seconds = row["seconds"] or math.inf
        table.add_row(
            row["name"],
            row["kind"],
            _shape(row["shape"]),
            f"{row['calls']:.3g}",
            _ms(row["seconds"]),
            f"{row['flops'] / seconds / 1e9:,.0f}" if row["flops"] else "",
            f"{row['bytes'] / seconds / 1e9:,.1f}",
            _ms(row["at_peak_seconds"]),
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--batch", type=int, default=256, help="images of a synthesised batch and of a KD step")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--repeats", type=int, default=5, help="batches to time, with five KD steps after each")
    parser.add_argument("--output", type=Path, help="where the JSON goes; default: stdout")
    args = parser.parse_args()
    tune_process()  # as the command does
    options = ModelOptions()
    sizes = {"synthesis.batch_size": args.batch, "distillation.batch_size": args.batch}
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    job = prepare(
        args.teacher, args.student, options, options, args.recipe, None, {**sizes, **parse_assignments(args.settings)},
        JobMachine.choose(args.device, args.amp, say), say, trains=True,
    )  # fmt: skip
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler notes its own starts and ends as errors
    result = measure(job, repeats=max(args.repeats, 1))
    config = job.config
    show(result, {"inner_step": config.synthesis.batch_size, "kd_step": config.distillation.batch_size})
    text = json.dumps(result, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except FastDFKDError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
