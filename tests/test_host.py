"""What a process is granted: CPUs and memory below the limits of containers, and an allocator that keeps its pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastdfkd_cli import host
from fastdfkd_cli.host import available_memory, cpu_vendor, keep_freed_memory, usable_cpus

GB = 2**30
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="cgroups and affinity are Linux's")


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def machine(root: Path, files: Mapping[str, str]) -> Path:
    """A root folder with the system's files in it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        pytest.param({}, 8, id="no cgroups"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8, id="no quota"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2, id="2.5 CPUs are two"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1, id="half a CPU is one"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "1600000 100000"}, 8, id="more than CPUs"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            },
            3,
            id="the quota of the group around",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/cpu.max": "500000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000",
                "sys/fs/cgroup/other/cpu.max": "100000 100000",
            },
            4,
            id="its own quota, not a neighbour's",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/../../pod", "sys/fs/cgroup/cpu.max": "200000 100000"},
            2,
            id="seen from a namespace",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n0::/docker/1f",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            6,
            id="version 1, its path not seen from the container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:cpuset:/box\n1:cpu:/box",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "75000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "25000",
                "sys/fs/cgroup/cpuset/box/cpu.cfs_quota_us": "25000",
                "sys/fs/cgroup/cpuset/box/cpu.cfs_period_us": "25000",
            },
            3,
            id="version 1, no quota outside",
        ),
    ],
)
@LINUX
def test_cpus_within_the_quota(files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    assert usable_cpus(machine(tmp_path, files)) == cpus


@pytest.mark.usefixtures("eight_cpus")
@LINUX
def test_affinity_below_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}
    assert usable_cpus(machine(tmp_path, files)) == 1


@pytest.mark.usefixtures("eight_cpus")
def test_a_system_without_affinity_and_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cpus(tmp_path) == 8


MEMINFO = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {GB // 1024} kB"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        pytest.param({}, GB, id="no cgroups"),
        pytest.param({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, GB, id="no limit"),
        pytest.param(
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "3000"},
            2000,
            id="version 2",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/box",
                "sys/fs/cgroup/pod/memory.max": "9000",
                "sys/fs/cgroup/pod/memory.current": "8000",
                "sys/fs/cgroup/pod/memory.stat": "anon 7300\ninactive_file 700\nfile 700",
                "sys/fs/cgroup/pod/box/memory.max": "5000",
                "sys/fs/cgroup/pod/box/memory.current": "3000",
            },
            1700,
            id="the group around is fuller, but for files it has read",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/box",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5000",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "6000",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "5000",
                "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 200",
            },
            1200,
            id="version 1",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "5001"},
            0,
            id="over the limit",
        ),
    ],
)
def test_memory_within_the_limits(files: dict[str, str], free: int, tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, MEMINFO | files)) == free


def test_memory_of_a_system_that_tells_no_more_than_its_size(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


#: Pages faulted in while one large block is taken, written and freed, over and over.
CHURN = """
import ctypes, resource
from fastdfkd_cli.host import keep_freed_memory
lib = ctypes.CDLL(None)
lib.malloc.restype, lib.malloc.argtypes, lib.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 48 << 20
def churn():
    block = lib.malloc(size)
    ctypes.memset(block, 1, size)
    lib.free(block)
kept = keep_freed_memory()
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    churn()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / size)
"""


def churn(**environment: str) -> tuple[bool, float]:
    """Whether memory was kept, and how often the pages of a block were mapped anew over five uses of it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", CHURN], env=clean | environment, capture_output=True, text=True, timeout=60, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", float(faults)


@pytest.mark.skipif(not host._is_glibc(), reason="a setting of glibc's")
@pytest.mark.parametrize(
    "users",
    [
        {},
        {"MALLOC_ARENA_MAX": "2"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
    ],
)
def test_freed_memory_is_kept_unless_the_user_chose(users: dict[str, str]) -> None:
    kept, faults = churn(**users)
    if users:
        assert not kept
        assert faults > 4  # else the other half of this test shows nothing
    else:
        assert kept
        assert faults < 0.5


@pytest.mark.parametrize("preloaded", ["/usr/lib/libjemalloc.so.2", "libtcmalloc_minimal.so.4"])
def test_a_preloaded_allocator_is_left_alone(preloaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was touched"))
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    assert keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")  # what musl's confstr leads to

    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was touched"))
    monkeypatch.setattr(os, "confstr", unknown)
    assert keep_freed_memory() is False
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.parametrize(
    ("files", "vendor"),
    [
        pytest.param({}, "", id="not Linux"),
        pytest.param(
            {"proc/cpuinfo": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD"}, "AuthenticAMD", id="x86"
        ),
        pytest.param({"proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41"}, "", id="ARM"),
    ],
)
def test_who_made_the_cpu(files: Mapping[str, str], vendor: str, tmp_path: Path) -> None:
    assert cpu_vendor(machine(tmp_path, files)) == vendor
