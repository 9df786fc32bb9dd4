"""Model references: each kind of them is loaded whole, and each way they fail is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

import fastdfkd_cli
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError
from fastdfkd_cli.hub import _reachable
from fastdfkd_cli.models import (
    BUILTIN_MODELS,
    InputSpec,
    LoadedModel,
    LogitsOnly,
    ModelOptions,
    check_forward,
    load_student,
    load_teacher,
)
from fastdfkd_cli.models.timm_format import build_verified, download
from fastdfkd_cli.output import sha256_file
from fastdfkd_cli.weights import read_checkpoint
from hub_server import HubServer, serving

TINY = "fastdfkd_wrn10_1"


def net(num_classes: int = 4, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """A tiny network with every tensor, statistics included, away from its initial value."""
    torch.manual_seed(seed)
    module = timm.create_model(TINY, num_classes=num_classes, in_chans=in_chans)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1 + 0.01)
    return module.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def fails(
    error: type[FastDFKDError], words: str, reference: Any, /, like: LoadedModel | None = None, **options: Any
) -> str:
    """Loading ends in exactly this error, in one line that holds these words."""
    with pytest.raises(FastDFKDError, match=words) as caught:
        if like is None:
            load_teacher(reference, ModelOptions(**options))
        else:
            load_student(reference, ModelOptions(**options), like=like)
    text = str(caught.value)
    assert caught.value.exit_code == error.exit_code, text
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint that says everything about itself."""
    path = tmp_path / "teacher.safetensors"
    facts = {
        "architecture": "cifar/wrn10_1", "num_classes": 4, "input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7], "classes": ["a", "b", "c", "d"], "license": "mit",
    }  # fmt: skip
    save_file(net().state_dict(), path, metadata={name: json.dumps(value) for name, value in facts.items()})
    return path


@pytest.fixture
def teacher(file: Path) -> LoadedModel:
    return load_teacher(str(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    save_for_hf(net(), path, model_config={"label_names": ["a", "b", "c", "d"]}, safe_serialization=True)
    return path


# ---------------------------------------------------------------------------------------------------------- files


def test_a_file_that_says_everything(file: Path, teacher: LoadedModel) -> None:
    assert same(teacher.module, net())
    assert not teacher.module.training
    assert teacher.input == InputSpec(size=(3, 16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert (teacher.source, teacher.architecture, teacher.num_classes) == ("file", TINY, 4)
    assert (teacher.class_names, teacher.license) == (("a", "b", "c", "d"), "mit")
    assert teacher.weights_sha256 == sha256_file(file)
    assert teacher.pretrained
    check_forward(teacher)
    described = json.loads(json.dumps(teacher.describe()))
    assert described["name"] == "cifar/wrn10_1 (teacher.safetensors)"
    assert described["input"]["size"] == [3, 16, 16]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".pth.tar"])
@pytest.mark.parametrize("name", ["cifar/wrn10_1", "wrn10_1", TINY])
def test_a_bare_checkpoint_with_an_architecture(tmp_path: Path, suffix: str, name: str) -> None:
    """Classes and channels are read from the tensors; a DataParallel prefix is taken off."""
    path = tmp_path / f"x{suffix}"
    source = net(num_classes=6, in_chans=1)
    torch.save({"epoch": 1, "state_dict": nn.DataParallel(source).state_dict()}, path)
    loaded = load_teacher(str(path), ModelOptions(arch=name, mean=(0.4,), input_size=(1, 12, 20)))
    assert same(loaded.module, source)
    assert (loaded.num_classes, loaded.input.size, loaded.input.mean) == (6, (1, 12, 20), (0.4,))
    check_forward(loaded)
    # Without a stated normalisation: the architecture's, averaged over its colours.
    assert load_teacher(str(path), ModelOptions(arch=name)).input.std == pytest.approx(
        ((0.2023 + 0.1994 + 0.2010) / 3,)
    )


def test_an_architecture_with_weights(file: Path) -> None:
    for reference in ("cifar/wrn10_1", TINY):
        loaded = load_teacher(reference, ModelOptions(weights=file))
        assert same(loaded.module, net())
        assert loaded.input.mean == (0.1, 0.2, 0.3)


def test_json_beside_a_file_says_the_rest(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "x.pth")
    (tmp_path / "x.json").write_text(json.dumps({"architecture": "wrn10_1", "input_size": [3, 8, 8]}))
    assert load_teacher(str(tmp_path / "x.pth")).input.size == (3, 8, 8)


def test_torchvision_network_with_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = torchvision.models.squeezenet1_1(num_classes=5)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    options = ModelOptions(weights=tmp_path / "x.pth", num_classes=5, input_size=(3, 40, 40))
    loaded = load_teacher("torchvision/squeezenet1_1", options)
    assert same(loaded.module, source)
    assert (loaded.num_classes, loaded.architecture) == (5, None)


def test_torchvision_default_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    source = torchvision.models.squeezenet1_1()
    (tmp_path / "checkpoints").mkdir()
    torch.save(source.state_dict(), tmp_path / "checkpoints" / entry.url.rsplit("/", 1)[1])
    loaded = load_teacher("torchvision/squeezenet1_1")
    assert same(loaded.module, source)
    assert loaded.class_names is not None
    assert loaded.class_names[:2] == ("tench", "goldfish")
    assert loaded.input == InputSpec(
        size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=224 / 256
    )


def test_a_checkpoint_that_does_not_fit(file: Path, tmp_path: Path) -> None:
    text = fails(UsageError, "does not fit cifar/wrn10_2", str(file), arch="cifar/wrn10_2")
    assert "block1.layer.0.bn2.weight (model 32, file 16)" in text
    state = net().state_dict()
    del state["fc.weight"], state["bn1.running_mean"]
    torch.save(state, tmp_path / "x.pth")
    fails(UsageError, "2 missing: bn1.running_mean, fc.weight", str(tmp_path / "x.pth"), arch="cifar/wrn10_1")


def test_stated_facts_that_contradict_the_file(file: Path) -> None:
    fails(UsageError, "--teacher-num-classes 10 differs from the 4 classes", str(file), num_classes=10)
    fails(UsageError, "--teacher-input-size 1 16 16 has 1 channels, but .* takes 3", str(file), input_size=(1, 16, 16))
    fails(UsageError, "--teacher-mean has 2 values for 3 channels", str(file), mean=(0.1, 0.2))
    fails(UsageError, "--teacher-std must be above 0", str(file), std=(0.1, 0.2, 0.0))
    fails(UsageError, "--teacher-weights does not go with", str(file), weights=file)
    fails(UsageError, "--teacher-arch does not go with cifar/wrn10_1", "cifar/wrn10_1", weights=file, arch="resnet18")
    with pytest.raises(UsageError, match="^--num-classes 10 differs"):
        load_teacher(str(file), ModelOptions(num_classes=10), role="model")
    with pytest.raises(UsageError):
        ModelOptions(num_classes=0)
    with pytest.raises(UsageError):
        ModelOptions(input_size=(3, 0, 32))


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    state["fc.bias"][0] = float("nan")
    save_file(state, tmp_path / "x.safetensors", metadata={"architecture": "wrn10_1"})
    fails(UnavailableError, "NaN or infinite values in fc.bias", str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("code", ["os:getcwd", "nets.py:factory"])
def test_a_file_cannot_choose_the_code_that_runs(code: str, tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "x.safetensors", metadata={"architecture": code})
    fails(UsageError, f"names code .{code}. as its network, which a file may not do", str(tmp_path / "x.safetensors"))


def test_a_file_that_says_nothing(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "x.pth")
    fails(UsageError, "give --teacher-arch NAME", str(tmp_path / "x.pth"))
    fails(
        UnavailableError,
        "--teacher-arch: there is no architecture 'resnet1'.* resnet",
        str(tmp_path / "x.pth"),
        arch="resnet1",
    )


# ------------------------------------------------------------------------------------------------- timm's format


def test_a_folder(folder: Path) -> None:
    for reference in (str(folder), f"local-dir:{folder}", str(folder / "model.safetensors")):
        loaded = load_teacher(reference)
        assert same(loaded.module, net())
        assert (loaded.source, loaded.architecture, loaded.num_classes) == ("local-dir", TINY, 4)
        assert loaded.class_names == ("a", "b", "c", "d")
        assert loaded.input.size == (3, 32, 32)
        assert loaded.weights_sha256 == sha256_file(folder / "model.safetensors")
    assert load_teacher(str(folder), ModelOptions(input_size=(3, 20, 24))).input.size == (3, 20, 24)


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | values).items() if v is not None}))


def test_a_folder_whose_head_does_not_match_is_refused(folder: Path) -> None:
    """timm itself would load this without a word and leave the head random."""
    edit(folder / "config.json", num_classes=6, label_names=None, model_args={})
    fails(UnavailableError, "does not fit local-dir:.*fc.weight", str(folder))


@pytest.mark.parametrize("gone", ["fc.weight", "fc.bias", "bn1.running_var", "conv1.weight"])
def test_a_folder_with_a_missing_tensor_is_refused(folder: Path, gone: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[gone]
    save_file(state, folder / "model.safetensors")
    fails(UnavailableError, gone, str(folder))


def test_what_timm_would_leave_random_is_found(folder: Path) -> None:
    """The NaN probe itself: the configuration says 1000 classes, the network has 4, so timm drops the head."""
    checkpoint = read_checkpoint(folder / "model.safetensors")
    config = {"architecture": TINY, "num_classes": 1000, "classifier": "fc", "input_size": (3, 32, 32)}
    with pytest.raises(UnavailableError, match=r"no weights for fc.weight, fc.bias of x: they would be random"):
        build_verified(TINY, checkpoint, config, "x", num_classes=4, in_chans=3)
    module = build_verified(TINY, checkpoint, config | {"num_classes": 4}, "x", num_classes=4, in_chans=3)
    assert same(module, net())
    assert "state_dict" not in module.pretrained_cfg


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    fails(UsageError, "--teacher-arch does not go with", str(folder), arch="resnet18")
    fails(UsageError, "--teacher-num-classes 10 differs from the 4", str(folder), num_classes=10)
    edit(config, num_classes=0, label_names=None, model_args={})
    fails(UnavailableError, "no classifier head", str(folder))
    edit(config, architecture="resnet_of_tomorrow")
    fails(UnavailableError, "installed timm has no architecture 'resnet_of_tomorrow'", str(folder))
    edit(config, architecture=None, model_type="vit")
    fails(UnavailableError, "names no timm architecture .*transformers", str(folder))
    config.write_text("{")
    fails(UnavailableError, "config.json is not readable JSON", str(folder))
    config.unlink()
    fails(UnavailableError, "has no config.json", str(folder))
    fails(UnavailableError, "does not exist", "local-dir:" + str(tmp_path / "gone"))
    (tmp_path / "notes.txt").touch()
    fails(UsageError, "neither a model folder nor a weights file", str(tmp_path / "notes.txt"))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fails(UnavailableError, "has no weights", str(folder))
    torch.save(net().state_dict(), folder / "pytorch_model.bin")
    assert same(load_teacher(str(folder)).module, net())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("resnet5o", "Did you mean resnet50"),
        ("timm/mobilenetv2_10", "Did you mean .*mobilenetv2_100"),
        ("resnet50.nonsense", "timm has no weights resnet50.nonsense. It has resnet50.a1_in1k"),
        ("cifar/wrn16_3", "Did you mean .*cifar/wrn16_2"),
        ("torchvision/resnet19", "Did you mean .*torchvision/resnet18"),
        ("torchvison/resnet18", "Did you mean torchvision"),
        ("builtin/letters", "built in is builtin/digits"),
        ("cifar/wrn16_1", "no pretrained weights for cifar/wrn16_1: give --teacher-weights"),
        ("./gone", "does not exist"),
        ("gone.pth", "does not exist"),
        ("gone.py:f", "gone.py of gone.py:f does not exist"),
        ("no_such_package.nets:f", "no Python module no_such_package.nets"),
    ],
)
def test_names_that_mean_nothing(reference: str, words: str) -> None:
    fails(UnavailableError, words, reference)


@pytest.mark.parametrize("reference", ["", " ", "nets.py", "hf-hub:", "hf-hub:justone", "hf_hub:a/b/c"])
def test_references_that_cannot_be(reference: str) -> None:
    fails(UsageError, "empty|nets.py:factory|owner/repo", reference)


# ------------------------------------------------------------------------------------------- the user's factories


NETS = """
import torch
from torch import nn
from neighbour import WIDTH


class Net(nn.Module):
    def __init__(self, num_classes=5, in_chans=3):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, WIDTH, 3)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Dict(Net):
    def forward(self, x):
        return {"aux": x, "out": super().forward(x)}


def plain():
    return Net()


def keywords(**kwargs):
    return Net(**kwargs)


def fixed():
    generator = torch.Generator().manual_seed(0)
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand(p.shape, generator=generator))
    return net


def needy(depth):
    return Net()


def broken():
    raise RuntimeError("no\\nluck")


def number():
    return 3


INSTANCE = Net()
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "nets.py").write_text(NETS)
    sys.modules.pop("neighbour", None)
    return str(tmp_path / "nets.py")


def save_user(path: Path, **shape: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    width, classes, channels = 4, shape.get("classes", 5), shape.get("channels", 3)
    state = nn.ModuleDict(
        {"conv": nn.Conv2d(channels, width, 3), "bn": nn.BatchNorm2d(width), "fc": nn.Linear(width, classes)}
    ).state_dict()
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    return state


@pytest.mark.parametrize("factory", ["plain", "keywords", "Net", "Dict"])
def test_a_factory_with_a_dataparallel_checkpoint(nets: str, tmp_path: Path, factory: str) -> None:
    state = save_user(tmp_path / "x.th")
    before = list(sys.path)
    loaded = load_teacher(f"{nets}:{factory}", ModelOptions(weights=tmp_path / "x.th", input_size=(3, 9, 9)))
    assert sys.path == before
    inner = loaded.module.module if isinstance(loaded.module, LogitsOnly) else loaded.module
    assert all(torch.equal(inner.state_dict()[name], state[name]) for name in state)
    assert (loaded.source, loaded.num_classes, loaded.architecture) == ("user", 5, None)
    assert (loaded.input.mean, loaded.input.std) == ((0.0,) * 3, (1.0,) * 3)
    check_forward(loaded)


def test_a_factory_gets_what_is_known(nets: str, tmp_path: Path) -> None:
    save_user(tmp_path / "x.th", classes=7, channels=1)
    options = ModelOptions(weights=tmp_path / "x.th", input_size=(1, 9, 9), num_classes=7)
    assert load_teacher(f"{nets}:Net", options).num_classes == 7
    file_first = ModelOptions(arch=f"{nets}:Net", input_size=(1, 9, 9), num_classes=7)
    assert load_teacher(str(tmp_path / "x.th"), file_first).num_classes == 7


def test_a_package_factory(nets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(nets, tmp_path / "a_package_of_nets.py")
    save_user(tmp_path / "x.th")
    monkeypatch.syspath_prepend(tmp_path)
    options = ModelOptions(weights=tmp_path / "x.th", input_size=(3, 9, 9))
    assert load_teacher("a_package_of_nets:plain", options).num_classes == 5


def test_a_factory_that_brings_its_weights(nets: str) -> None:
    loaded = load_teacher(f"{nets}:fixed", ModelOptions(input_size=(3, 9, 9)))
    assert loaded.pretrained
    fails(UsageError, "returns random weights .*conv.weight.* --teacher-weights", f"{nets}:plain", input_size=(3, 9, 9))


def test_bad_factories(nets: str, tmp_path: Path) -> None:
    save_user(tmp_path / "x.th")
    known = {"weights": tmp_path / "x.th", "input_size": (3, 9, 9)}
    for name, words in {
        "needy": "needs depth", "broken": "fails when called with .*RuntimeError: no$", "number": "returned a int",
        "plian": "has no 'plian'. Did you mean plain", "INSTANCE": "write a function",
    }.items():  # fmt: skip
        fails(UsageError, words, f"{nets}:{name}", **known)
    fails(
        UsageError, "does not say what it is fed: give --teacher-input-size", f"{nets}:plain", weights=tmp_path / "x.th"
    )
    fails(UsageError, "--teacher-num-classes 9 differs from the 5", f"{nets}:plain", num_classes=9, **known)
    fails(UsageError, "fails on input 2x3x2x2", f"{nets}:plain", **known | {"input_size": (3, 2, 2)})
    (tmp_path / "bad.py").write_text("import\n")
    fails(UsageError, "cannot be imported: SyntaxError", f"{tmp_path}/bad.py:f", **known)
    (tmp_path / "lacks.py").write_text("import a_module_that_is_not_there\n")
    fails(UsageError, "cannot be imported: ModuleNotFoundError", f"{tmp_path}/lacks.py:f", **known)


# --------------------------------------------------------------------------------------------- modules from Python


class Wrapped(nn.Module):
    """Returns its logits in one of the usual wrappings."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net(), kind

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        if self.kind == "object":
            output = type("Output", (), {})()
            output.logits = logits
            return output
        return {
            "logits": {"loss": None, "logits": logits}, "out": {"out": logits, "aux": x}, "tuple": (logits, x),
            "nested": ({"out": logits}, x), "nothing": {"features": logits}, "dense": x,
        }[self.kind]  # fmt: skip


SMALL = ModelOptions(input_size=(3, 16, 16), mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("kind", ["object", "logits", "out", "tuple", "nested"])
def test_outputs_become_logits(kind: str) -> None:
    loaded = load_teacher(Wrapped(kind), SMALL)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.module(x), net()(x))
    assert (loaded.source, loaded.num_classes) == ("module", 4)
    check_forward(loaded)


def test_outputs_without_logits() -> None:
    fails(UsageError, "Wrapped returns a dict in which no logits", Wrapped("nothing"), **vars(SMALL))
    fails(UsageError, "returns 2x3x16x16 .* only classifiers", Wrapped("dense"), **vars(SMALL))


def test_a_module_keeps_its_identity() -> None:
    module = net()
    loaded = load_teacher(nn.DataParallel(module), SMALL)
    assert loaded.module is module
    assert loaded.architecture == TINY
    assert load_teacher(Wrapped("tuple"), SMALL).architecture is None
    changed = net()
    changed.extra = nn.Linear(1, 1)
    assert load_teacher(changed, SMALL).architecture is None
    fails(UsageError, "--teacher-weights does not go with WideResNet", net(), weights="x.pth")
    fails(UsageError, "give --teacher-input-size C H W .input_size", nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))


def test_check_forward_leaves_everything_as_it_was() -> None:
    loaded = load_teacher(net(), SMALL)
    loaded.module.train()
    loaded.module.bn1.eval()
    state, modes = (
        {k: v.clone() for k, v in loaded.module.state_dict().items()},
        [m.training for m in loaded.module.modules()],
    )
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    check_forward(loaded)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in loaded.module.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in loaded.module.state_dict().items())
    loaded.num_classes = 9
    with pytest.raises(UsageError, match="returns 2x4 for 2 images of 3x16x16, not logits of 2x9"):
        check_forward(loaded)


def test_loading_a_teacher_leaves_the_random_state_alone(file: Path, folder: Path) -> None:
    for reference in (str(file), str(folder)):
        torch.manual_seed(5)
        load_teacher(reference)
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(1), drawn)


def test_normalized(teacher: LoadedModel) -> None:
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
    normalized = teacher.normalized()
    expected = teacher.module((images - mean) / std)
    torch.testing.assert_close(normalized(images), expected)
    torch.testing.assert_close(normalized(images.to(memory_format=torch.channels_last)), expected)
    whole = (images * 255).to(torch.uint8)
    torch.testing.assert_close(normalized(whole), normalized(whole / 255))
    with torch.autocast("cpu", torch.bfloat16):
        assert normalized(images).dtype == torch.bfloat16
    assert {id(p) for p in normalized.parameters()} == {id(p) for p in teacher.module.parameters()}
    assert all(name.startswith("module.") for name in normalized.state_dict())


# -------------------------------------------------------------------------------------------------------- students


def test_a_student_takes_after_its_teacher(teacher: LoadedModel) -> None:
    for reference, key in {"cifar/wrn16_1": "fastdfkd_wrn16_1", "timm/mobilenetv2_035": "mobilenetv2_035"}.items():
        torch.manual_seed(1)
        student = load_student(reference, like=teacher)
        assert student.input == teacher.input
        assert student.class_names == teacher.class_names
        assert (student.num_classes, student.architecture, student.pretrained) == (4, key, False)
        assert student.module.training
        check_forward(student)
        twin = timm.create_model(key, num_classes=4, in_chans=3, **student.model_args)
        twin.load_state_dict(student.module.state_dict())
        torch.manual_seed(1)
        assert same(load_student(reference, like=teacher).module, student.module)
        torch.manual_seed(2)
        assert not same(load_student(reference, like=teacher).module, student.module)


def test_a_students_own_normalisation_and_channels(tmp_path: Path, teacher: LoadedModel) -> None:
    student = load_student("cifar/wrn10_1", ModelOptions(mean=(0.5,), std=(0.5, 0.4, 0.3)), like=teacher)
    assert (student.input.mean, student.input.std) == ((0.5,) * 3, (0.5, 0.4, 0.3))
    for channels in (1, 2, 4):
        grey = load_teacher(
            net(in_chans=channels), ModelOptions(input_size=(channels, 12, 18), mean=(0.5,), std=(0.2,))
        )
        pupil = load_student("mobilenetv2_035", like=grey)
        assert pupil.input.size == (channels, 12, 18)
        check_forward(pupil)


def test_a_transformer_student_gets_the_image_size(teacher: LoadedModel) -> None:
    student = load_student("test_vit", like=teacher)
    assert student.model_args == {"img_size": [16, 16]}
    check_forward(student)


def test_a_user_student(nets: str, teacher: LoadedModel) -> None:
    student = load_student(f"{nets}:Net", like=teacher)
    assert (student.num_classes, student.source) == (4, "user")
    fails(UsageError, "has 5 classes, the teacher .* 4", f"{nets}:plain", like=teacher)
    module = net(seed=7)
    assert load_student(module, like=teacher).module is module
    assert not load_student(module, like=teacher).pretrained
    pupil = load_student("torchvision/mobilenet_v3_small", like=teacher)
    assert (pupil.num_classes, pupil.architecture) == (4, None)


def test_a_student_with_weights(teacher: LoadedModel, folder: Path, file: Path) -> None:
    student = load_student(str(folder), like=teacher)
    assert same(student.module, net())
    assert student.pretrained
    assert student.input.size == teacher.input.size
    assert student.input.mean == (0.4914, 0.4822, 0.4465)
    assert same(load_student("cifar/wrn10_1", ModelOptions(weights=file), like=teacher).module, net())


def test_students_that_differ_from_the_teacher(teacher: LoadedModel, tmp_path: Path) -> None:
    fails(UsageError, "--student-num-classes 10 differs from the 4", "cifar/wrn10_1", like=teacher, num_classes=10)
    for name, module in {"classes": net(num_classes=7), "grey": net(in_chans=1)}.items():
        save_file(module.state_dict(), tmp_path / f"{name}.safetensors", metadata={"architecture": "wrn10_1"})
    fails(UsageError, "has 7 classes, the teacher .* 4", str(tmp_path / "classes.safetensors"), like=teacher)
    fails(UsageError, "takes 1 channels, the teacher .* 3", str(tmp_path / "grey.safetensors"), like=teacher)
    grey = load_teacher(str(tmp_path / "grey.safetensors"))
    fails(
        UsageError,
        "3 32 32 differs from the 1x32x32 of the teacher",
        "cifar/wrn10_1",
        like=grey,
        input_size=(3, 32, 32),
    )
    fails(UsageError, "torchvision/resnet18 takes 3 channels, not 1", "torchvision/resnet18", like=grey)


# ------------------------------------------------------------------------------------------------------- built in


def test_the_built_in_teacher() -> None:
    if not BUILTIN_MODELS["builtin/digits"].is_file():
        pytest.skip("the package has no built-in teacher yet")
    loaded = load_teacher("builtin/digits")
    assert (loaded.name, loaded.source, loaded.num_classes) == ("builtin/digits", "builtin", 10)
    assert loaded.input.size[0] == 1
    assert loaded.class_names is not None
    assert loaded.license
    check_forward(loaded)
    student = load_student("cifar/wrn10_1", like=loaded)
    check_forward(student)


# ------------------------------------------------------------------------------------------------------------ Hub


CLIENT = """
import json, sys, time
from fastdfkd_cli.errors import FastDFKDError
from fastdfkd_cli.models import load_teacher
results = {}
for reference in sys.argv[1:]:
    start = time.monotonic()
    try:
        loaded = load_teacher(reference)
        results[reference] = loaded.describe() | {"head": loaded.module.get_classifier().bias.tolist()}
    except FastDFKDError as error:
        results[reference] = {"error": str(error), "code": error.exit_code}
    results[reference]["seconds"] = time.monotonic() - start
print(json.dumps(results))
"""


def client(home: Path, endpoint: str, *references: str, **environment: str) -> subprocess.Popen[str]:
    """huggingface_hub reads its settings when it is imported: a process of its own for each endpoint."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    source = str(Path(fastdfkd_cli.__file__).parent.parent)
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": source}
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, *references],
        env=kept | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    """The client's results. Nothing else may stand on its stdout."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


TIMM_NAME = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    save_for_hf(net(), root / "me/net", safe_serialization=True)
    (root / "me/net/README.md").write_text("---\ntags: [a]\nlicense: bsd-3-clause\n---\n# A net\n")
    save_for_hf(net(num_classes=6), root / "me/net@v2", safe_serialization=True)
    save_for_hf(net(), root / "me/gated", safe_serialization=True)
    (root / "me/gated/.gated").touch()
    save_for_hf(net(), root / "me/no-config", safe_serialization=True)
    (root / "me/no-config/config.json").unlink()
    save_for_hf(net(), root / "me/no-weights", safe_serialization=True)
    (root / "me/no-weights/model.safetensors").unlink()
    save_for_hf(net(), root / "me/pickle", safe_serialization=False)
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_resnet"), root / "timm" / TIMM_NAME, safe_serialization=True)
    with serving(root) as server:
        yield server


def test_a_broken_connection_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the client's HTTP library raises while a file is on its way."""

    def broken(*args: object, **kwargs: object) -> str:
        raise HfHubHTTPError.__bases__[0]("peer closed connection\nwithout sending it all")

    monkeypatch.setattr("fastdfkd_cli.hub.hf_hub_download", broken)
    monkeypatch.setattr("fastdfkd_cli.hub._reachable", lambda endpoint, minute: True)
    fails(UnavailableError, "config.json of me/net could not be downloaded: peer closed connection$", "me/net")


@pytest.mark.parametrize("endpoint", ["no-url", "http://127.0.0.1:9", "http://127.0.0.1:port", "https://"])
def test_an_endpoint_that_is_not_there(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert not _reachable(endpoint, 0)


def test_a_proxy_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert _reachable("http://hub.invalid", 0)


def test_the_students_size_for_evaluation_is_not_the_teachers(teacher: LoadedModel) -> None:
    teacher.input = replace(teacher.input, test_size=(3, 24, 24), test_crop_pct=0.9)
    assert load_student("cifar/wrn10_1", like=teacher).input == replace(
        teacher.input, test_size=None, test_crop_pct=None
    )


def test_hub(hub: HubServer, tmp_path: Path) -> None:
    found = answers(
        client(
            tmp_path,
            hub.url,
            "hf-hub:me/net",
            "me/net@v2",
            "hf_hub:me/pickle",
            "timm/test_resnet",
            "me/gated",
            "me/nothing",
            "me/net@v9",
            "me/no-config",
            "me/no-weights",
            "timm/nothing-here",
            "hf-hub:me/--a",
        )  # fmt: skip
    )
    commit = hub.commit(hub.root / "me/net")
    main = found["hf-hub:me/net"]
    assert main["name"] == f"hf-hub:me/net@{commit}"
    assert main["revision"] == commit
    assert main["weights_sha256"] == sha256_file(hub.root / "me/net/model.safetensors")
    assert main["license"] == "bsd-3-clause"
    assert main["head"] == net().fc.bias.tolist()
    second = found["me/net@v2"]
    assert (second["num_classes"], second["revision"]) == (6, hub.commit(hub.root / "me/net@v2"))
    assert found["hf_hub:me/pickle"]["head"] == net().fc.bias.tolist()
    official = found["timm/test_resnet"]
    assert (official["name"], official["source"]) == (f"timm/{TIMM_NAME}", "timm")
    assert official["input"]["size"] == [3, 160, 160]
    assert official["revision"] == hub.commit(hub.root / "timm" / TIMM_NAME)
    for reference, code, words in (
        ("me/gated", 3, "is gated: accept its terms"),
        ("me/nothing", 3, "does not exist or is private"),
        ("me/net@v9", 3, "has no revision 'v9'"),
        ("me/no-config", 3, "has no config.json"),
        ("me/no-weights", 3, "has no weights"),
        ("timm/nothing-here", 3, "write hf-hub:timm/nothing-here"),
        ("hf-hub:me/--a", 2, "is not a Hub repository's name"),
    ):
        assert words in found[reference]["error"], found[reference]
        assert "\n" not in found[reference]["error"]
        assert found[reference]["code"] == code

    # What was fetched is in the cache: no network is needed for it again, and none is waited for.
    offline = client(tmp_path, hub.url, "me/net", "me/net@v2", "me/pickle2", HF_HUB_OFFLINE="1")
    dead = client(tmp_path, "http://127.0.0.1:9", "me/net", "timm/test_resnet", "me/pickle2")
    for process, words in ((offline, "HF_HUB_OFFLINE is set"), (dead, "(http://127.0.0.1:9) cannot be reached")):
        found = answers(process)
        assert found["me/net"]["revision"] == commit
        assert words in found["me/pickle2"]["error"]
        assert found["me/pickle2"]["code"] == 3
        assert found["me/pickle2"]["seconds"] < 15


# ----------------------------------------------------------------------------------------- files that mean no good


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x.pth"}},
        {"cache_dir": "/tmp"},
        {"pretrained": True},
        {"pretrained_model_args": {}},
    ],
)
def test_a_config_cannot_have_other_files_read(folder: Path, arguments: dict[str, Any]) -> None:
    edit(folder / "config.json", model_args=arguments)
    fails(
        UnavailableError, f"model_args in config.json may describe a network, not {next(iter(arguments))}", str(folder)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_args": {"in_chans": "three"}}, "says input_size = "),
        ({"model_args": {"num_classes": [4]}}, "says num_classes = "),
        ({"model_args": {"num_classes": 2**62}}, "says num_classes = "),
        ({"pretrained_cfg": {"test_input_size": [3, 0, 8]}}, r"\(for tests\) says input_size"),
        ({"pretrained_cfg": {"test_crop_pct": "x"}}, r"\(for tests\) says crop_pct"),
        ({"pretrained_cfg": {"mean": {}}}, "says mean = "),
        ({"num_classes": 2**30}, "it holds .* values, and that network"),
        ({"model_args": {"in_chans": 2**30}}, "it holds .* values, and that network"),
        ({"model_args": {"no_such_argument": 1}}, "cannot be built with .*no_such_argument"),
    ],
)
def test_a_config_of_odd_values_is_refused(folder: Path, values: dict[str, Any], words: str) -> None:
    edit(folder / "config.json", label_names=None, **({"num_classes": 4, "model_args": {}} | values))
    fails(UnavailableError if "built with" not in words else UsageError, words, str(folder))


def test_a_config_may_write_its_values_as_text_or_as_one(folder: Path) -> None:
    odd = {"mean": "[0.1, 0.2, 0.3]", "std": 0.5, "crop_mode": "sideways", "first_conv": 3, "input_size": [3, 32, 32]}
    edit(folder / "config.json", pretrained_cfg=odd)
    found = load_teacher(str(folder)).input
    assert (found.mean, found.std, found.crop_mode) == ((0.1, 0.2, 0.3), (0.5,) * 3, "center")


def test_an_input_that_no_memory_holds_is_refused_before_it_is_made(folder: Path, file: Path) -> None:
    edit(folder / "config.json", pretrained_cfg={"input_size": [3, 10**9, 10**9]})
    loaded = load_teacher(str(folder))
    with pytest.raises(FastDFKDError, match="more memory than there is for 2 images of 3x1000000000x1000000000"):
        check_forward(loaded)


@pytest.mark.parametrize("reference", ["~no-such-user/x.pth", "~no-such-user.py:f", "local-dir:~no-such-user"])
def test_a_home_that_nobody_has(reference: str) -> None:
    fails(UnavailableError, "does not exist", reference)


@pytest.mark.parametrize("revision", ["../../../x", "a..b", "/etc", "a b", "x\x1b[2J", "a:b", "main@{1}", "a//b"])
def test_a_revision_is_a_name_that_git_allows(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.hub.hf_hub_download", lambda *a, **k: pytest.fail("asked the Hub"))
    fails(UsageError, "is no revision", f"hf-hub:me/net@{revision}")


def test_offline_nothing_is_fetched_from_elsewhere_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdfkd_cli.hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(UnavailableError, match="weights of a net would have to be downloaded, and HF_HUB_OFFLINE"):
        download("http://127.0.0.1:9/x.pth", "a net")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "x.pth").touch()
    assert download("http://127.0.0.1:9/x.pth", "a net") == tmp_path / "checkpoints" / "x.pth"


@pytest.mark.parametrize(
    ("url", "stated"),
    [
        ("https://download.pytorch.org/models/resnet50-11ad3fa6.pth", "11ad3fa6"),
        ("https://download.pytorch.org/models/net.pth", None),
        ("https://example.org/resnet50-11ad3fa6.pth", None),
    ],
)
def test_torchvisions_weights_are_those_that_their_name_states(
    url: str, stated: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(url: str, path: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        assert hash_prefix == stated
        raise RuntimeError('invalid hash value (expected "11ad3fa6", got "0")')

    monkeypatch.setattr("fastdfkd_cli.hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fetched)
    with pytest.raises(UnavailableError, match="weights of a net cannot be downloaded .*: RuntimeError: invalid hash"):
        download(url, "a net")
