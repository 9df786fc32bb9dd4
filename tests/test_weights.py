"""Checkpoint files: whole ones of every kind are read, everything else ends in one line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.output import sha256_file
from fastdfkd_cli.weights import (
    ModelFacts,
    load_exactly,
    misfit,
    parse_facts,
    read_checkpoint,
    require_finite,
    strip_prefixes,
)
from hostile import repacked


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand_like(t) if t.is_floating_point() else t + 3 for name, t in Net().state_dict().items()}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 600
    return text


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda sd: sd,
    "state_dict": lambda sd: {"epoch": 3, "state_dict": sd},
    "model": lambda sd: {"model": sd, "optimizer": {"state": {}}},
    "model_ema": lambda sd: {"model": {k: v * 0 for k, v in sd.items()}, "model_ema": sd},
    "state_dict_ema": lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd},
    "no average kept": lambda sd: {"state_dict": sd, "state_dict_ema": None},
    "teacher": lambda sd: {"teacher": sd, "student": {k: v * 0 for k, v in sd.items()}},
    "nested": lambda sd: {"model": {"state_dict": sd}},
    "DataParallel": lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}},
    "compiled": lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()},
    "compiled DataParallel": lambda sd: {f"module._orig_mod.{k}": v for k, v in sd.items()},
    "averaged": lambda sd: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in sd.items()}},
    "compiled part": lambda sd: {k.replace("conv.", "conv._orig_mod."): v for k, v in sd.items()},
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".pth.tar"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_pickles_are_unwrapped(tmp_path: Path, wrapping: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save(WRAPPINGS[wrapping](tensors()), path)
    module = Net()
    load_exactly(module, read_checkpoint(path), what="Net", error=UsageError, hint="")
    for name, tensor in tensors().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def test_safetensors_with_prefix(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"module.{k}": v for k, v in tensors().items()}, path, metadata={"architecture": '"wrn16_2"'})
    checkpoint = read_checkpoint(path)
    assert checkpoint.tensors.keys() == tensors().keys()
    assert checkpoint.facts.architecture == "wrn16_2"
    assert checkpoint.sha256 == sha256_file(path)


def test_a_network_that_is_itself_called_module_keeps_its_names(tmp_path: Path) -> None:
    wrapped = nn.Module()
    wrapped.module = Net()
    torch.save({f"module.{k}": v for k, v in tensors().items()}, tmp_path / "x.pt")
    load_exactly(wrapped, read_checkpoint(tmp_path / "x.pt"), what="Net", error=UsageError, hint="")
    assert torch.equal(wrapped.module.conv.weight, tensors()["conv.weight"])


def test_prefix_on_some_names_only_is_part_of_the_name() -> None:
    names = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_prefixes(names).keys() == names.keys()


def test_facts_in_metadata_win_over_the_json_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", metadata={"num_classes": "4", "license": "mit"})
    said = {"num_classes": 5, "arch": "resnet18", "input_size": [1, 8, 9], "mean": [0.5], "labels": ["a", "b"]}
    (tmp_path / "x.json").write_text(json.dumps(said))
    facts = read_checkpoint(tmp_path / "x.safetensors").facts
    assert facts == ModelFacts(
        architecture="resnet18", num_classes=4, input_size=(1, 8, 9), mean=(0.5,), classes=("a", "b"), license="mit"
    )


def test_json_beside_a_pth_tar(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.pth.tar")
    (tmp_path / "x.json").write_text('{"architecture": "resnet18"}')
    assert read_checkpoint(tmp_path / "x.pth.tar").facts.architecture == "resnet18"


def test_training_checkpoints_say_their_architecture(tmp_path: Path) -> None:
    torch.save({"arch": "resnet18", "epoch": 1, "state_dict": tensors()}, tmp_path / "a.pth")
    torch.save({"args": argparse.Namespace(model="resnet34", lr=0.1), "state_dict": tensors()}, tmp_path / "b.pth")
    assert read_checkpoint(tmp_path / "a.pth").facts.architecture == "resnet18"
    assert read_checkpoint(tmp_path / "b.pth").facts.architecture == "resnet34"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", "ten"), ("num_classes", 0), ("num_classes", 2.5), ("input_size", [3, 32]),
        ("input_size", "[3, 0, 32]"), ("mean", "[]"), ("mean", "[NaN]"), ("std", {"r": 1}), ("classes", "cat"),
        ("architecture", 7), ("interpolation", "cubic"), ("interpolation", "random"), ("interpolation", ["box"]),
        ("crop_pct", 0), ("crop_pct", 1.5), ("crop_pct", "NaN"), ("crop_pct", [1]), ("num_classes", 2**31),
        ("num_classes", "9" * 5000), ("input_size", [3, 10**30, 8]),
    ],
)  # fmt: skip
def test_facts_that_are_none(name: str, value: object) -> None:
    with pytest.raises(UnavailableError, match=f"x.json says {name} = ") as caught:
        parse_facts({name: value}, "x.json")
    one_line(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "\xff", "[" * 100_000])
def test_broken_json(tmp_path: Path, text: str) -> None:
    torch.save(tensors(), tmp_path / "x.pt")
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UnavailableError, match=r"x\.json") as caught:
        read_checkpoint(tmp_path / "x.pt")
    one_line(caught.value)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_does_not(tmp_path: Path, legacy: bool) -> None:
    torch.save(
        {"state_dict": tensors(), "x": Bomb(tmp_path / "ran")},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(UnavailableError, match=r"wants to run code .*safetensors") as caught:
        read_checkpoint(tmp_path / "x.pth")
    one_line(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_that_wants_to_run_code_does_not(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(UnavailableError) as caught:
        read_checkpoint(tmp_path / "x.pth")
    one_line(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "x.pth")
    with pytest.raises(UnavailableError, match=r"run code \(.*Net\).*state_dict"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_any_cut_or_garbled_file_ends_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": tensors()}, path)
    else:
        save_file(tensors(), path)
    whole = path.read_bytes()
    generator = random.Random(0)
    broken = [whole[: generator.randrange(len(whole))] for _ in range(40)]
    broken += [generator.randbytes(generator.randrange(1, 300)) for _ in range(100)] + [b"", b"{}", b"\x80\x02."]
    broken += [b"<!doctype html><html>", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(UnavailableError, match=str(path)) as caught:
            read_checkpoint(path)
        one_line(caught.value)
    assert "git lfs pull" in str(caught.value)


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    torch.save({"state_dict": tensors()}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    generator = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        content[generator.randrange(len(content) // 2)] = generator.randrange(256)
        (tmp_path / "x.pth").write_bytes(content)
        try:
            read_checkpoint(tmp_path / "x.pth")
        except UnavailableError as error:
            one_line(error)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    save_file({}, tmp_path / "empty.safetensors")
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), tmp_path / "script.pt")
    for name, words in {
        "list.pt": "holds a list", "empty.pt": "no tensors .*epoch", "empty.safetensors": "no tensors",
        "script.pt": "TorchScript", "gone.pt": "does not exist", ".": "is a folder",
    }.items():  # fmt: skip
        with pytest.raises(UnavailableError, match=words) as caught:
            read_checkpoint(tmp_path / name)
        one_line(caught.value)


def test_misfit_names_the_tensors(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    state = module.state_dict()
    assert misfit(module, state) is None
    assert misfit(module, {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}) is None
    bad = {k: v for k, v in state.items() if not k.startswith("1.")} | {"head.weight": torch.ones(1)}
    bad["0.weight"] = torch.ones(5, 2)
    text = misfit(module, bad)
    assert text is not None
    assert "4 missing: 1.weight, 1.bias, 1.running_mean, ..." in text
    assert "1 unexpected: head.weight" in text
    assert "0.weight (model 3x2, file 5x2)" in text
    save_file(bad, tmp_path / "x.safetensors")
    before = {k: v.clone() for k, v in state.items()}
    with pytest.raises(UsageError, match=r"does not fit my net: 4 missing.*Try that\.$") as caught:
        load_exactly(
            module, read_checkpoint(tmp_path / "x.safetensors"), what="my net", error=UsageError, hint="Try that."
        )
    one_line(caught.value)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv.weight", "bn.running_var"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    module = Net()
    require_finite(module, "Net")
    module.state_dict()[name].view(-1)[1] = value
    with pytest.raises(FastDFKDError, match=f"NaN or infinite values in {name}"):
        require_finite(module, "Net")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(3, dtype=torch.complex64), "complex"),
        (torch.empty(3, device="meta"), "meta"),
    ],
)
def test_tensors_that_no_network_has_are_refused(tmp_path: Path, tensor: Tensor, kind: str) -> None:
    torch.save({**tensors(), "conv.weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(UnavailableError, match=f"conv.weight as a {kind}"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_pickle_that_holds_itself_has_an_end(tmp_path: Path) -> None:
    content: dict[str, Any] = tensors()
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth").tensors.keys() == tensors().keys()


def test_one_number_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Of the expanded tensor the file holds four bytes; every copy of it would be a terabyte."""
    torch.save({**tensors(), "conv.weight": torch.ones(1).expand(2**38)}, tmp_path / "x.pth")
    began = time.perf_counter()
    with pytest.raises(UnavailableError, match=r"x\.pth would become 1,024\.0 GiB, many times its size"):
        read_checkpoint(tmp_path / "x.pth")
    assert time.perf_counter() - began < 20


def test_a_compressed_checkpoint_is_no_larger_than_it_looks(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2**23)}, tmp_path / "whole.pth")
    (tmp_path / "x.pth").write_bytes(repacked((tmp_path / "whole.pth").read_bytes(), zipfile.ZIP_DEFLATED))
    assert (tmp_path / "x.pth").stat().st_size < 2**16
    with pytest.raises(UnavailableError, match=r"x\.pth would become 0\.0 GiB, many times"):
        read_checkpoint(tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "whole.pth").tensors["conv.weight"].shape == (2**23,)


def test_weights_that_are_tied_may_be_larger_than_their_file(tmp_path: Path) -> None:
    shared = torch.rand(2**19)
    torch.save({f"{name}.weight": shared for name in "abc"}, tmp_path / "x.pth")
    assert len(read_checkpoint(tmp_path / "x.pth").tensors) == 3


def test_a_pipe_is_no_weights_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(UnavailableError, match="does not exist"):
        read_checkpoint(tmp_path / "x.pth")
