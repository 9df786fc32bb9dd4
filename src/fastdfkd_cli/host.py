"""What the operating system grants this process: CPUs, memory, and the C library's way of handing memory out.

Paths are read below ``root``, so that a test can stand a machine of its own there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")

# <malloc.h>: the parameters of mallopt(). Their values are C ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_INT_MAX = 2**31 - 1
_TOP_PAD = 64 * 2**20
#: Allocators that people preload in the place of the C library's.
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "tbbmalloc", "hoard")


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process can keep busy: those of its affinity, at most the whole ones in its cgroups' quotas.

    A container that may use one and a half CPUs of sixteen still sees sixteen. Threads beyond the quota do worse than
    nothing: OpenMP's wait for one another by spinning, and the spinning is charged to the quota.
    """
    # macOS has no affinity.
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(min([cpus, *(int(quota) for quota in _cpu_quotas(root))]), 1)


def cpu_vendor(root: Path = ROOT) -> str:
    """The CPU's maker: ``GenuineIntel``, ``AuthenticAMD``; empty on ARM, and where there is no /proc."""
    with contextlib.suppress(OSError):  # not Linux
        for line in _read(root / "proc/cpuinfo").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "vendor_id":
                return value.strip()
    return ""


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can be had now: of the machine's and, in a container, of each of its cgroups' limits."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # not Linux
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    for group in _cgroups("memory", root):
        for limit, usage, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),  # version 2
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
        ):
            with contextlib.suppress(OSError, ValueError):  # the other version; or no limit ("max")
                left = int(_read(group / limit)) - int(_read(group / usage))
                # What the usage counts of files that were read is given back when memory is asked for.
                free.append(max(left + _reclaimable(group, reclaimable), 0))
    return min(free)


def keep_freed_memory() -> bool:
    """Let the C library keep large freed blocks for the next request, for the rest of the process; whether it did.

    By default glibc maps each block beyond some size for itself and gives it back when it is freed. The activations of
    a network are such blocks: each pass then pays for having the same pages mapped and zeroed again.

    Left alone: a C library other than glibc, an allocator that was preloaded, and settings that a user made.
    """
    if not _is_glibc() or _user_chose_allocator():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # Blocks come from the heap, the heap's end is given back only beyond two gigabytes, and it grows in strides.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _INT_MAX), (_M_TOP_PAD, _TOP_PAD))
    kept = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(kept)


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):  # musl does not know the name
        return False


def _user_chose_allocator() -> bool:
    preloaded = os.environ.get("LD_PRELOAD", "")
    return (
        any(name.startswith("MALLOC_") for name in os.environ)
        or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
        or any(name in preloaded for name in _ALLOCATORS)
    )


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPU time per time, of each cgroup that has a quota."""
    for group in _cgroups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # version 1; or no quota ("max")
            quota, period = map(int, _read(group / "cpu.max").split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError):  # version 2
            if (quota := int(_read(group / "cpu.cfs_quota_us"))) > 0:  # -1: no quota
                yield quota / int(_read(group / "cpu.cfs_period_us"))


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups for a controller, each with those around it: every limit on the way holds.

    A path that leads outside what a container sees is not there, and its reader goes on to the next.
    """
    try:
        lines = _read(root / "proc/self/cgroup").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers, beside version 1's on some machines
            trees = ["", "unified"]
        elif controller in controllers.split(","):
            trees = list(dict.fromkeys([controllers, controller]))
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for tree in trees:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath("sys/fs/cgroup", tree, *parts[:depth])


def _reclaimable(group: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in _read(group / "memory.stat").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


__all__ = ["available_memory", "cpu_vendor", "keep_freed_memory", "usable_cpus"]
