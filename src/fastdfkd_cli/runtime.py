"""The machine a run works on: device, precision, determinism, memory, versions."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

from fastdfkd_cli import host
from fastdfkd_cli.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that is there.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(f"--device {name}: this torch sees no CUDA device. Use --device cpu.")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}.")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps: this machine has no MPS device. Use --device cpu.")
    elif device.type != "cpu":
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, not {name!r}.")
    return device


def default_amp(device: torch.device) -> bool:
    """Whether bf16 is worth using: natively supported, so that it is never slower than float32."""
    if device.type == "cuda":
        # Asked of the device itself: torch.cuda.is_bf16_supported() answers for the current one.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        # AVX-512's own bf16 instructions gain on AMD's processors; on Intel's, float32 is faster (figures:
        # docs/machine.md). By the maker, not by a stopwatch: a busy moment must not change what a seed gives.
        bf16 = _cpu_bf16()
        return bf16 == "AMX" or (bf16 == "AVX-512" and host.cpu_vendor() == "AuthenticAMD")
    return False


def _cpu_bf16() -> str:
    """The instructions that torch's products in bf16 use on this CPU: ``AMX``, ``AVX-512``, or none."""
    if not torch.backends.mkldnn.is_available():
        return ""
    # oneDNN, which computes them, keeps to a cap in the environment, and ignores a name that it does not know.
    cap = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    capped = cap.startswith(("SSE", "AVX"))
    # The kernel, too, must let this process use AMX's registers: older ones, and some sandboxes, do not.
    if ("AMX" in cap or not capped) and _cpu_has("_is_amx_tile_supported") and _cpu_has("_init_amx"):
        return "AMX"
    avx512 = not capped or cap.startswith(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10"))
    return "AVX-512" if avx512 and _cpu_has("_is_avx512_bf16_supported") else ""


def _cpu_has(check: str) -> bool:
    # Names that torch does not promise to keep: without them, float32.
    return getattr(torch.cpu, check, lambda: False)()


def tune_process() -> None:
    """Fit torch's threads and the allocator to the machine, for the rest of the process.

    For a program that owns its process; a library leaves both to its caller. What a user set in the environment stays.
    """
    host.keep_freed_memory()
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return
    # torch counts CPUs and looks at the affinity, but knows nothing of a container's quota.
    if (usable := host.usable_cpus()) < torch.get_num_threads():
        torch.set_num_threads(usable)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Ask torch for deterministic kernels while the block runs."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next to it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of torch's allocations on a CUDA device, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that are free now: on the CUDA device, or in the machine as far as it tells."""
    if device.type == "cuda":
        # What torch keeps for reuse is free to us.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return host.available_memory()


def describe_device(device: torch.device) -> str:
    """A device in words: ``cpu (2 threads, AMX bf16)``, ``cuda:0 (NVIDIA ...)``."""
    if device.type == "cuda":
        return f"cuda:{device.index or 0} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        bf16 = _cpu_bf16()
        return f"cpu ({threads} {'thread' if threads == 1 else 'threads'}{f', {bf16} bf16' if bf16 else ''})"
    return device.type


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    names = ("fastdfkd", "torch", "torchvision", "timm", "safetensors", "huggingface-hub")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


__all__ = [
    "available_memory",
    "default_amp",
    "describe_device",
    "deterministic_algorithms",
    "peak_memory",
    "resolve_device",
    "synchronize",
    "tune_process",
    "versions",
]
