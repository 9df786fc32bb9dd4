"""The machine: devices by name, determinism on and off again, memory and versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdfkd_cli import host
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.runtime import (
    available_memory,
    default_amp,
    describe_device,
    deterministic_algorithms,
    peak_memory,
    resolve_device,
    synchronize,
    tune_process,
    versions,
)

CPU = torch.device("cpu")


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == resolve_device("mps").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, "sees no CUDA device. Use --device cpu"),
        ("cuda:1", 0, "sees no CUDA device"),
        ("cuda:2", 2, "there are 2 CUDA devices, cuda:0 to cuda:1"),
        ("mps", 0, "no MPS device"),
        ("gpu", 0, "must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
        ("meta", 0, "must be auto, cpu"),
        ("", 0, "must be auto, cpu"),
        ("cuda:x", 0, "must be auto, cpu"),
    ],
)
def test_devices_that_are_not_there(name: str, count: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=message) as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cuda").type == "cuda"


AMX, AVX512, NEITHER = (True, True), (False, True), (False, False)


INTEL, AMD = "GenuineIntel", "AuthenticAMD"


def cpu_with(monkeypatch: pytest.MonkeyPatch, has: tuple[bool, bool], vendor: str = INTEL, **environment: str) -> None:
    """A CPU with or without AMX and AVX-512's bf16, and oneDNN with no cap but those of ``environment``."""
    monkeypatch.setattr(host, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has[0], raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: has[0], raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has[1], raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize(
    ("has", "vendor", "environment", "amp", "words"),
    [
        (AMX, INTEL, {}, True, "cpu (2 threads, AMX bf16)"),
        (AVX512, INTEL, {}, False, "cpu (2 threads, AVX-512 bf16)"),
        (AVX512, AMD, {}, True, "cpu (2 threads, AVX-512 bf16)"),
        (AVX512, "", {}, False, "cpu (2 threads, AVX-512 bf16)"),
        (NEITHER, AMD, {}, False, "cpu (2 threads)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True, "cpu (2 threads, AMX bf16)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "ALL"}, True, "cpu (2 threads, AMX bf16)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "DEFAULT"}, True, "cpu (2 threads, AMX bf16)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, False, "cpu (2 threads, AVX-512 bf16)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"}, False, "cpu (2 threads, AVX-512 bf16)"),
        (AMX, INTEL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False, "cpu (2 threads)"),
        (AMX, INTEL, {"DNNL_MAX_CPU_ISA": "AVX2"}, False, "cpu (2 threads)"),
        (AVX512, AMD, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False, "cpu (2 threads)"),
        (NEITHER, INTEL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, False, "cpu (2 threads)"),
    ],
)
def test_bf16_where_the_processor_gains_by_it(
    has: tuple[bool, bool],
    vendor: str,
    environment: dict[str, str],
    amp: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu_with(monkeypatch, has, vendor, **environment)
    assert default_amp(CPU) is amp
    assert describe_device(CPU) == words


def test_bf16_needs_more_than_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_with(monkeypatch, AMX)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)  # the kernel refuses the registers
    assert default_amp(CPU) is False
    cpu_with(monkeypatch, AMX)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert default_amp(CPU) is False
    assert describe_device(CPU) == "cpu (2 threads)"
    assert default_amp(torch.device("mps")) is False


@pytest.mark.parametrize(
    ("environment", "usable", "threads"),
    [
        ({}, 3, 3),
        ({}, 64, 8),  # torch leaves out what hyper-threading adds: no more than it would take
        ({"OMP_NUM_THREADS": "8"}, 3, 8),
        ({"MKL_NUM_THREADS": "8"}, 3, 8),
        ({"OMP_NUM_THREADS": ""}, 3, 3),
    ],
)
def test_threads_within_the_quota(
    environment: dict[str, str], usable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [8]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host, "keep_freed_memory", lambda: True)  # the tests' own process stays as it is
    monkeypatch.setattr(host, "usable_cpus", lambda: usable)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    tune_process()
    assert now[-1] == threads


#: How often the process was tuned after a call from Python, and after the command that makes the same call.
TUNED = """
import fastdfkd_cli.runtime as runtime
tuned = []
runtime.tune_process = lambda: tuned.append(True)
from fastdfkd_cli import evaluate
from fastdfkd_cli.__main__ import main
words = {"data_dir": "no-such-folder", "device": "cpu"}
try:
    evaluate("builtin/digits", **words)
except Exception as error:
    print(len(tuned))
code = main(["evaluate", "builtin/digits", "--data-dir", "no-such-folder", "--device", "cpu"])
print(code, len(tuned))
"""


def test_only_the_command_line_changes_its_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TUNED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    # From Python nothing was touched; the command touched it once, and then found no images.
    assert done.stdout.split() == ["0", "3", "1"], done.stderr


def test_determinism_ends_with_its_block() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_users_own_determinism_stays() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True):
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_machine_in_figures() -> None:
    assert 2**20 < peak_memory(CPU) < 2**42
    assert 2**20 < available_memory(CPU) < 2**48
    assert describe_device(CPU).startswith(f"cpu ({torch.get_num_threads()} thread")
    synchronize(CPU)


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"python", "fastdfkd", "torch", "torchvision", "timm", "safetensors", "huggingface-hub"}
