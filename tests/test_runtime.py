"""The machine: devices by name, determinism on and off again, memory and versions."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.runtime import (
    available_memory,
    default_amp,
    describe_device,
    deterministic_algorithms,
    peak_memory,
    resolve_device,
    synchronize,
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


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_where_the_machine_is_made_for_it(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    assert default_amp(CPU) is bf16
    assert default_amp(torch.device("mps")) is False


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
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"
    synchronize(CPU)


def test_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"python", "fastdfkd", "torch", "torchvision", "timm", "safetensors", "huggingface-hub"}
