"""What the machine can do, and what a computation takes of it: peaks, floating-point operations, memory, seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdfkd_cli.runtime import peak_memory, synchronize

#: Runs of each peak, of which the fastest counts.
TRIES = 5


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def peaks(device: torch.device) -> dict[str, float]:
    """The machine's measured peaks: matrix products in float32 and bf16 in TFLOP/s, a large copy in GB/s.

    The products are of square matrices (2048, on CUDA 8192) in torch's default precision; a copied byte counts twice,
    as it is read and written. The copy (512 MiB, on CUDA 1 GiB) is larger than a server's last cache, which can hold
    256 MiB.
    """
    cuda = device.type == "cuda"
    size, found = 8192 if cuda else 2048, {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        fastest = min(seconds_of(lambda a=a, b=b: a @ b, device) for _ in range(TRIES + 1))  # type: ignore[misc]
        found[f"{name}_tflops"] = 2 * size**3 / fastest / 1e12
    source = torch.ones(2**30 if cuda else 2**29, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # touched, so that its pages are there
    fastest = min(seconds_of(lambda: target.copy_(source), device) for _ in range(TRIES))
    found["copy_gb_per_second"] = 2 * len(source) / fastest / 1e9
    return found


def best_peaks(*measured: dict[str, float]) -> dict[str, float]:
    """The highest of several measurements, rounded."""
    return {name: round(max(each[name] for each in measured), 3) for name in measured[0]}


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions that ``work`` runs, backward ones included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest, to four digits."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in named.items()}


class MemoryGrowth:
    """How far memory rises above what it was when this was made: torch's allocations on CUDA, this process's resident
    memory elsewhere (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):  # Not allowed everywhere; the peak then counts from the start of the process.
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS") or peak_memory(device)

    def read(self) -> dict[str, int]:
        """``before_bytes``, ``peak_bytes`` and their difference, ``growth_bytes``."""
        # Not getrusage: a process inherits the peak of the one that started it.
        peak = (0 if self.device.type == "cuda" else _status("VmHWM")) or peak_memory(self.device)
        return {"before_bytes": self.before, "peak_bytes": peak, "growth_bytes": peak - self.before}


def _status(name: str) -> int:
    """A line of this process's status in bytes, or 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
