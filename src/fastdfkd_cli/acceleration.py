"""The same computation for less: CUDA graphs and torch.compile, each with a way back that says why.

Neither changes what is computed beyond rounding. Both are offered by an :class:`Acceleration`, which is made once for a
run, and which everything that computes is handed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
#: Calls of a function before it is captured: the first ones choose kernels, make optimiser states and fill caches.
WARM_UP = 3


def _ignore(_: str) -> None:
    """Where nobody listens."""


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What a run may use, and whom it tells when something cannot be had.

    Without arguments, everything runs as it is written.
    """

    #: Replay whole steps as CUDA graphs.
    graphs: bool = False
    #: Compile the networks' passes.
    compile: bool = False
    #: Most images that a teacher holds activations of at a time (0: the whole batch).
    micro_batch: int = 0
    #: Keep few of the student's activations in a KD step, and compute the others again for its gradient.
    checkpoint: bool = False
    say: Callable[[str], None] = _ignore

    def compiled(
        self, function: Callable[..., T], name: str, *probe: Tensor, modules: Iterable[nn.Module] = ()
    ) -> Callable[..., T]:
        """Compile ``function`` of tensors for the shapes of ``probe``, forward and backward; or give it back as it is.

        Args:
            function: gives a tensor or a tuple of tensors; contains its own autocast.
            name: what it is, for the message.
            probe: arguments to try it on.
            modules: what the trial might change; it is put back as it was.
        """
        if not self.compile:
            return function
        began = time.perf_counter()
        try:
            if probe[0].device.type == "cpu":
                require_compiler()
            compiled = torch.compile(function, dynamic=False)
            with _unchanged(modules):
                _differentiate(compiled(*(each.detach().clone().requires_grad_(each.requires_grad) for each in probe)))
        except Exception as error:
            # A compiler's ways to fail are not to be listed; what it could not do, the function itself still can.
            self.say(f"{name} cannot be compiled and runs as it is ({first_line(error)})")
            return function
        self.say(f"{name} compiled in {time.perf_counter() - began:.0f} s")
        return compiled

    def captured(self, function: Callable[[], T], name: str) -> Captured[T]:
        """A function of fixed tensors that is replayed as one CUDA graph from its fourth call on; see Captured."""
        return Captured(function, name, self.say, enabled=self.graphs)


#: Everything runs as it is written.
EAGER = Acceleration()


class Captured(Generic[T]):
    """A function without arguments whose kernels are recorded once and then launched as one.

    A network for 32x32 images is hundreds of small kernels, and a fast device waits for the next launch most of the
    time. A CUDA graph launches them all at once.

    The function must work on tensors that stay where they are: read its input from them, write its results into them
    or return new ones, which then stay where they are too and are overwritten by the next call. It must not ask the
    device for a number, move anything between devices, or count on Python code being run again.

    Where the recording fails, this is said, and the function is called as it is from then on.

    Args:
        function: what to run.
        name: what it is, for the message.
        say: takes the message.
        enabled: False: always call the function as it is.
    """

    def __init__(
        self, function: Callable[[], T], name: str, say: Callable[[str], None] = _ignore, *, enabled: bool = True
    ) -> None:
        self.function = function
        self.name = name
        self.say = say
        self.enabled = enabled
        self._calls = 0
        self._recording: Recording | None = None
        self._result: T | None = None

    @property
    def replays(self) -> bool:
        """Whether calls are replayed by now."""
        return self._recording is not None

    def __call__(self) -> T:
        if not self.enabled:
            return self.function()
        if self._recording is None and self._calls >= WARM_UP:
            self._record()
        self._calls += 1
        if self._recording is None:
            return self._recorder().aside(self.function) if self.enabled else self.function()
        self._recording.replay()
        return self._result  # type: ignore[return-value]

    def _record(self) -> None:
        recording = self._recorder()
        try:
            self._result = recording.record(self.function)
        except RuntimeError as error:
            # Nothing has been computed yet: what is recorded is not run.
            self.enabled = False
            self.say(f"{self.name} cannot be captured as a CUDA graph and runs kernel by kernel ({first_line(error)})")
            return
        self._recording = recording

    def _recorder(self) -> Recording:
        return Recording()


class Recording:
    """One CUDA graph, and the stream on which it is warmed up and recorded."""

    #: One stream for all: autograd remembers on which stream it first met a parameter.
    _stream: torch.cuda.Stream | None = None

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def stream(cls) -> torch.cuda.Stream:
        if cls._stream is None:
            cls._stream = torch.cuda.Stream()
        return cls._stream

    def aside(self, function: Callable[[], T]) -> T:
        """Run on the recording's stream, as a warm-up has to."""
        stream, here = self.stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = function()
        here.wait_stream(stream)
        return result

    def record(self, function: Callable[[], T]) -> T:
        """Record the function; nothing is computed. Its result's tensors are filled by :meth:`replay`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a writer's, say) may use the device meanwhile.
        with torch.cuda.graph(graph, stream=self.stream(), capture_error_mode="thread_local"):
            result = function()
        self._graph = graph
        return result

    def replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor from the CPU without waiting for it to arrive: to a CUDA device, from page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether a model knows where to cut itself into parts, as most of timm's do."""
    return any(hasattr(module, "set_grad_checkpointing") for module in model.modules())


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Have the passes of ``model`` in this block keep what lies between its parts, and compute the rest once more.

    The backward pass belongs into the block too, but see :func:`statistics_held`.
    """
    cut = [module for module in model.modules() if hasattr(module, "set_grad_checkpointing")]
    for module in cut:
        module.set_grad_checkpointing(True)  # type: ignore[operator]
    try:
        yield
    finally:
        for module in cut:
            module.set_grad_checkpointing(False)  # type: ignore[operator]


@contextmanager
def statistics_held(model: nn.Module) -> Iterator[None]:
    """Normalise by each batch, as in training, without taking it into the running statistics: what is computed once
    more for a gradient was counted the first time."""
    counting = [module for module in model.modules() if getattr(module, "track_running_stats", False) is True]
    momenta = [module.momentum for module in counting]
    counts = [module.get_buffer("num_batches_tracked").clone() for module in counting]
    for module in counting:
        module.momentum = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, momentum, count in zip(counting, momenta, counts, strict=True):
            module.momentum = momentum
            module.get_buffer("num_batches_tracked").copy_(count)


def require_compiler() -> None:
    """torch.compile writes C++ for a CPU.

    Raises:
        RuntimeError: there is no compiler for it.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else ("g++", "clang++"))):
        raise RuntimeError(f"no C++ compiler: {named or 'g++'} is not installed")


@contextmanager
def _unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put buffers, gradients and the global random state back after a trial."""
    modules = list(modules)
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for module in modules for parameter in module.parameters()]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _differentiate(result: Any) -> None:
    """The backward pass of a trial, which is compiled with it."""
    parts = [each for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, Tensor)]
    wanted = [each.float().sum() for each in parts if each.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()


def first_line(error: BaseException) -> str:
    """An error's first line that says something, cut to a line's length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


__all__ = [
    "EAGER",
    "WARM_UP",
    "Acceleration",
    "Captured",
    "Recording",
    "can_checkpoint",
    "checkpointed",
    "first_line",
    "require_compiler",
    "statistics_held",
    "to_device",
]
