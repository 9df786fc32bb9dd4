"""A model reference -> a module, how to feed it, and where it came from.

::

    timm/resnet50, resnet50, timm/resnet50.a1_in1k     timm's registry
    hf-hub:owner/repo[@rev], owner/repo[@rev]          a Hub repository in timm's format
    folder with config.json, local-dir:folder          the same on disk
    file.safetensors | .pth | .pt | .th | .tar         a checkpoint; the architecture from options or from the file
    nets.py:factory, package.module:factory            the user's network
    torchvision/NAME, cifar/NAME, builtin/digits       torchvision's, the paper's, the one in this package
    an nn.Module                                       from Python

A teacher is loaded whole or refused: timm gives a network whose class count differs from its file a new random head
without a word, so every tensor is checked to have come from the file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from timm.models import is_model
from torch import Tensor, nn

from fastdfkd_cli import architectures as arch
from fastdfkd_cli.architectures import Architecture, one_line
from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError, did_you_mean
from fastdfkd_cli.hub import HubFile, HubFileMissing, hub_file, split_revision
from fastdfkd_cli.nets_cifar import REGISTRY_PREFIX
from fastdfkd_cli.weights import (
    WEIGHT_SUFFIXES,
    Checkpoint,
    ModelFacts,
    load_exactly,
    misfit,
    parse_facts,
    read_checkpoint,
    read_json,
    require_finite,
)

Source = Literal["timm", "hub", "local-dir", "file", "user", "torchvision", "cifar", "builtin", "module"]

#: The built-in teacher, and where the package keeps it.
BUILTIN_MODELS = {"builtin/digits": Path(__file__).parent / "assets" / "digits.safetensors"}
#: Weights in a Hub repository or a folder, in the order timm looks for them.
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
_COLLECTIONS = ("timm", "torchvision", "cifar", "builtin")


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a model is fed: images in [0, 1] of one size, normalised per channel."""

    #: ``(C, H, W)``.
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    #: How a larger real image becomes one of this size: resized so that ``crop_pct`` of it is kept, then cropped.
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    #: The size and crop at which the weights' authors evaluate, where it differs from the training size.
    test_size: tuple[int, int, int] | None = None
    test_crop_pct: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What ``--teacher-arch``, ``--student-mean``, ... say beside a reference. Unset: the reference says it."""

    arch: str | None = None
    weights: str | Path | None = None
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"The number of classes must be 1 or more, not {self.num_classes}.")
        if self.input_size is not None and (len(self.input_size) != 3 or min(self.input_size) < 1):
            raise UsageError(
                f"The input size must be three numbers above 0 (channels height width), not {self.input_size}."
            )


@dataclass(kw_only=True)
class LoadedModel:
    """A module and everything that has to be known to feed it, report it and export it."""

    #: Takes normalised input ``[B, C, H, W]`` and returns logits ``[B, num_classes]``.
    module: nn.Module
    #: As the user wrote it.
    reference: str
    #: As resolved, to be printed: ``timm/resnet50.a1_in1k``, ``cifar/wrn16_1``, ``hf-hub:owner/repo@COMMIT``.
    name: str
    source: Source
    input: InputSpec
    num_classes: int
    #: The name that ``timm.create_model`` builds it by, or None.
    architecture: str | None = None
    #: Further arguments for ``timm.create_model`` beside ``num_classes`` and ``in_chans``.
    model_args: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    #: The Hub commit.
    revision: str | None = None
    weights_sha256: str | None = None
    license: str | None = None
    pretrained: bool = False

    def normalized(self) -> nn.Module:
        """The model for images in [0, 1]: ``[B, C, H, W]`` -> logits. It shares :attr:`module`'s parameters."""
        return Normalized(self.module, self.input.mean, self.input.std)

    def describe(self) -> dict[str, Any]:
        """What a report says about the model, as JSON values."""
        return {
            "reference": self.reference,
            "name": self.name,
            "source": self.source,
            "architecture": self.architecture,
            "model_args": dict(self.model_args),
            "num_classes": self.num_classes,
            "param_count": sum(p.numel() for p in self.module.parameters()),
            "input": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.input).items()
            },
            "pretrained": self.pretrained,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "license": self.license,
        }


class Normalized(nn.Module):
    """A model behind its own normalisation.

    Takes ``[B, C, H, W]`` as floats in [0, 1] or as uint8; memory format and autocast pass through unchanged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.module = module
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        # Not persistent: the state_dict stays the module's own (behind "module.").
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        logits: Tensor = self.module((images - self.mean.to(images.dtype)) / self.std.to(images.dtype))
        return logits


class LogitsOnly(nn.Module):
    """A model whose output is more than logits, reduced to them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        logits = as_logits(self.module(x))
        if logits is None:
            raise TypeError("the model's output holds no logits")
        return logits


def as_logits(output: Any) -> Tensor | None:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]``, ``["out"]`` or a tuple's first element."""
    if isinstance(output, Tensor):
        return output
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    if isinstance(output, Mapping):
        return next((v for key in ("logits", "out") if isinstance(v := output.get(key), Tensor)), None)
    if isinstance(output, tuple | list) and output:
        return as_logits(output[0])
    return None


def _flag(role: str, name: str) -> str:
    """The command-line option of a role: ``--teacher-arch``; plain ``--arch`` for the one model of ``evaluate``."""
    return f"--{role}-{name}" if role in ("teacher", "student") else f"--{name}"


def _size_text(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)


# --------------------------------------------------------------------------------------------------------------------
# What every source ends in
# --------------------------------------------------------------------------------------------------------------------


def _forward(module: nn.Module, spec: InputSpec, name: str, batch: int = 2) -> Any:
    """One evaluation forward on normalised noise; modes and the global random state stay as they were.

    Raises:
        UsageError: the model cannot take the stated input.
        FastDFKDError: memory ran out.
    """
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    device, dtype = (parameter.device, parameter.dtype) if parameter is not None else (torch.device("cpu"), None)
    images = torch.rand((batch, *spec.size), generator=torch.Generator().manual_seed(0))
    shape = (1, -1, 1, 1)
    x = (images - torch.tensor(spec.mean).view(shape)) / torch.tensor(spec.std).view(shape)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            return module(x.to(device=device, dtype=dtype))
    except torch.OutOfMemoryError as error:
        raise FastDFKDError(
            f"{name} needs more memory than there is for {batch} images of {_size_text(spec.size)}."
        ) from error
    except Exception as error:  # whatever a user's forward raises
        raise UsageError(
            f"{name} fails on input {_size_text((batch, *spec.size))} (batch, channels, height, width): "
            f"{one_line(error)}"
        ) from error
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


def _logits_of(output: Any, name: str) -> Tensor:
    logits = as_logits(output)
    if logits is None:
        raise UsageError(
            f"{name} returns a {type(output).__name__} in which no logits are found: return a tensor, an object with "
            ".logits, a dict with 'logits' or 'out', or a tuple that starts with them."
        )
    return logits


def check_forward(model: LoadedModel, *, batch: int = 2) -> None:
    """Run the model once, in evaluation mode, on noise of its stated input.

    Raises:
        UsageError: it fails, or its output is not ``[batch, num_classes]``.
        FastDFKDError: memory ran out.
    """
    logits = _logits_of(_forward(model.module, model.input, model.name, batch), model.name)
    if tuple(logits.shape) != (batch, model.num_classes):
        raise UsageError(
            f"{model.name} returns {_size_text(tuple(logits.shape))} for {batch} images of "
            f"{_size_text(model.input.size)}, not logits of {batch}x{model.num_classes}."
        )


def _adapt(module: nn.Module, spec: InputSpec, name: str) -> tuple[nn.Module, int]:
    """Make a network that was not built by timm return logits; give it and its class count, read from its output."""
    output = _forward(module, spec, name)
    logits = _logits_of(output, name)
    if logits.ndim != 2:
        raise UsageError(
            f"{name} returns {_size_text(tuple(logits.shape))} for 2 images of {_size_text(spec.size)}: only "
            "classifiers, with logits [batch, classes], can be distilled."
        )
    return (module if output is logits else LogitsOnly(module)), int(logits.shape[1])


def _channel_values(
    stated: tuple[float, ...] | None, usual: tuple[float, ...], channels: int, option: str
) -> tuple[float, ...]:
    """A mean or std per channel: the stated one (a single value goes for all channels), or the usual one."""
    if stated is None:
        # An architecture's own values are for colour; for another channel count their average is the nearest thing.
        return usual if len(usual) == channels else (sum(usual) / len(usual),) * channels
    if len(stated) == 1:
        return tuple(stated) * channels
    if len(stated) != channels:
        raise UsageError(f"{option} has {len(stated)} values for {channels} channels: give one per channel, or one.")
    return tuple(stated)


def _input_spec(
    size: tuple[int, int, int], options: ModelOptions, facts: ModelFacts, usual: InputSpec, role: str
) -> InputSpec:
    """Options over what the file says over what is usual."""
    mean = _channel_values(options.mean or facts.mean, usual.mean, size[0], _flag(role, "mean"))
    std = _channel_values(options.std or facts.std, usual.std, size[0], _flag(role, "std"))
    if not all(0 < value < float("inf") for value in std):
        raise UsageError(f"{_flag(role, 'std')} must be above 0 in every channel, not {std}.")
    resized = size != usual.size
    return InputSpec(
        size=size,
        mean=mean,
        std=std,
        interpolation=facts.interpolation or usual.interpolation,
        crop_pct=usual.crop_pct if facts.crop_pct is None else facts.crop_pct,
        crop_mode=usual.crop_mode,
        test_size=None if resized else usual.test_size,
        test_crop_pct=None if resized else usual.test_crop_pct,
    )


def _config_input(config: Mapping[str, Any]) -> InputSpec:
    """The input that timm's pretrained configuration (or its absence: images in [0, 1] as they are) describes."""
    size = tuple(config.get("input_size") or (3, 224, 224))
    mean, std = tuple(config.get("mean") or (0.0,)), tuple(config.get("std") or (1.0,))
    return InputSpec(
        size=size,
        mean=mean * size[0] if len(mean) == 1 else mean,
        std=std * size[0] if len(std) == 1 else std,
        interpolation=config.get("interpolation") or "bilinear",
        crop_pct=config.get("crop_pct") or 1.0,
        crop_mode=config.get("crop_mode") or "center",
        test_size=tuple(config["test_input_size"]) if config.get("test_input_size") else None,
        test_crop_pct=config.get("test_crop_pct"),
    )


# --------------------------------------------------------------------------------------------------------------------
# Weights in timm's format: the registry, the Hub, a folder
# --------------------------------------------------------------------------------------------------------------------


def _build_verified(key: str, checkpoint: Checkpoint, config: dict[str, Any], what: str, **arguments: Any) -> nn.Module:
    """Build a registry network with a checkpoint's weights, renamed as timm does for it; nothing may stay random.

    timm's loading goes through code of each architecture that renames, cuts and resizes, and drops what does not
    fit without an error where classes differ. So the same load runs once more with every value replaced by NaN:
    whatever is not NaN afterwards did not come from the file.
    """
    try:
        module = arch.build_registry(key, config=config, tensors=dict(checkpoint.tensors), **arguments)
        blank = {
            name: torch.full_like(t, float("nan")) if t.is_floating_point() else t
            for name, t in checkpoint.tensors.items()
        }
        probe = arch.build_registry(key, config=config, tensors=blank, **arguments)
    except (RuntimeError, LookupError, AttributeError) as error:
        # timm's renaming code meets names it does not expect in many ways; the names themselves say most.
        plain = arch.build_registry(key, config=config, **arguments)
        problem = misfit(plain, checkpoint.tensors) or one_line(error)
        raise UnavailableError(f"{checkpoint.path} does not fit {what}: {problem}.") from error
    left = [
        name
        for name, tensor in probe.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isnan(tensor).all())
    ]
    if left:
        raise UnavailableError(
            f"{checkpoint.path} has no weights for {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} of {what}: "
            "they would be random."
        )
    return module


@dataclass(frozen=True, kw_only=True)
class _Described:
    """A config.json in timm's format, or an entry of timm's registry."""

    key: str
    config: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)


def _described(path: Path, origin: str) -> _Described:
    """Read a config.json in timm's format, old or new.

    Raises:
        UnavailableError: it names no architecture, or one that the installed timm does not know.
    """
    content = read_json(path)
    key = content.get("architecture")
    if not isinstance(key, str):
        kind = " (it looks like a transformers model)" if "model_type" in content else ""
        raise UnavailableError(f"{origin}: config.json names no timm architecture{kind}; only timm's format is read.")
    if not is_model(key):
        raise UnavailableError(
            f"{origin}: the installed timm has no architecture {key!r}; a newer timm may (pip install -U timm)."
        )
    nested = content.get("pretrained_cfg")
    config = dict(nested if isinstance(nested, dict) else content)
    for name in ("num_classes", "label_names"):
        if name in content:
            config[name] = content[name]
    if "labels" in config:
        config.setdefault("label_names", config["labels"])
    model_args = content.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise UnavailableError(f"{origin}: model_args in config.json must be an object.")
    model_args = dict(model_args)
    defaults = Architecture(family="timm", name=key, key=key).config()
    facts = parse_facts({k: v for k, v in config.items() if k != "label_names"}, origin)
    size = facts.input_size or tuple(defaults.get("input_size", (3, 224, 224)))
    channels = model_args.pop("in_chans", size[0])
    config |= {
        "architecture": key,
        "input_size": (channels, *size[1:]),
        "num_classes": model_args.pop("num_classes", facts.num_classes or 1000),
    }
    for name in ("first_conv", "classifier", "fixed_input_size", "mean", "std"):
        if config.get(name) is None and name in defaults:
            config[name] = defaults[name]
    for name in ("url", "file", "hf_hub_id", "hf_hub_filename", "source"):
        config.pop(name, None)
    return _Described(key=key, config=config, model_args=model_args)


def _class_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes where there is one for each; a dict maps label to name or index to name."""
    if isinstance(names, Mapping):
        names = list(names.values())
    if isinstance(names, list | tuple) and len(names) == num_classes:
        return tuple(str(name) for name in names)
    return None


def _load_described(
    described: _Described,
    checkpoint: Checkpoint,
    options: ModelOptions,
    *,
    reference: str,
    name: str,
    source: Source,
    role: str,
    like: LoadedModel | None,
    revision: str | None = None,
    license: str | None = None,
) -> LoadedModel:
    """A registry network with weights in timm's format."""
    config = described.config
    num_classes = int(config.get("num_classes") or 0)
    if num_classes < 1:
        raise UnavailableError(f"{name} has no classifier head (num_classes 0): it has no classes to distil.")
    usual = _config_input(config)
    _require_same_classes(options.num_classes, num_classes, name, role)
    _require_same_channels(options.input_size, usual.size[0], name, role)
    size = _size(options, like, usual.size)
    arguments = {**described.model_args, **arch.registry_arguments(config, size)}
    module = _build_verified(
        described.key, checkpoint, config, name, num_classes=num_classes, in_chans=usual.size[0], **arguments
    )
    return LoadedModel(
        module=module,
        reference=reference,
        name=name,
        source=source,
        input=_input_spec(size, options, ModelFacts(), usual, role),
        num_classes=num_classes,
        architecture=described.key,
        model_args=arguments,
        class_names=_class_names(config.get("label_names"), num_classes) or checkpoint.facts.classes,
        revision=revision,
        weights_sha256=checkpoint.sha256,
        license=config.get("license") or license or checkpoint.facts.license,
        pretrained=True,
    )


def _size(options: ModelOptions, like: LoadedModel | None, usual: tuple[int, int, int]) -> tuple[int, int, int]:
    """The stated size; a student's is the teacher's, whose images it will see, with the channels its weights have."""
    if options.input_size is not None:
        return options.input_size
    return usual if like is None else (usual[0], *like.input.size[1:])


def _require_same_classes(stated: int | None, actual: int | None, name: str, role: str) -> None:
    if stated is not None and actual is not None and stated != actual:
        raise UsageError(
            f"{_flag(role, 'num-classes')} {stated} differs from the {actual} classes of {name}: leave the option "
            "out, or use weights with that many classes."
        )


def _require_same_channels(stated: tuple[int, int, int] | None, actual: int | None, name: str, role: str) -> None:
    if stated is not None and actual is not None and stated[0] != actual:
        raise UsageError(
            f"{_flag(role, 'input-size')} {' '.join(map(str, stated))} has {stated[0]} channels, but {name} takes "
            f"{actual}."
        )


def _hub_weights(repo: str, revision: str | None, filename: str | None = None) -> HubFile:
    for candidate in [filename] if filename else _WEIGHT_NAMES:
        try:
            return hub_file(repo, candidate, revision)
        except HubFileMissing:
            continue
    written = f"{repo}@{revision}" if revision else repo
    raise UnavailableError(f"The Hub repository {written} has no weights ({', '.join(_WEIGHT_NAMES[:2])}).")


def _card_license(repo: str, revision: str | None) -> str | None:
    """The licence in the front matter of a repository's model card, where there is one."""
    try:
        card = hub_file(repo, "README.md", revision).path.read_text(encoding="utf-8", errors="replace")
    except UnavailableError:
        return None  # without a card, nothing is known and nothing is claimed
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _load_hub(written: str, options: ModelOptions, reference: str, role: str, like: LoadedModel | None) -> LoadedModel:
    _refuse(options, reference, role, "arch", "weights", why="its config.json and its own weights are used")
    repo, revision = split_revision(written)
    config = _missing_config(repo, revision)
    commit = config.commit or revision  # config and weights of one commit, even when someone pushes in between
    name = f"hf-hub:{repo}" + (f"@{commit}" if commit else "")
    described = _described(config.path, f"hf-hub:{written}")
    checkpoint = read_checkpoint(_hub_weights(repo, commit).path)
    return _load_described(
        described,
        checkpoint,
        options,
        reference=reference,
        name=name,
        source="hub",
        role=role,
        like=like,
        revision=config.commit,
        license=None if described.config.get("license") else _card_license(repo, commit),
    )


def _missing_config(repo: str, revision: str | None) -> HubFile:
    try:
        return hub_file(repo, "config.json", revision)
    except HubFileMissing as error:
        raise UnavailableError(
            f"The Hub repository {repo} has no config.json: only repositories in timm's format can be loaded by name."
        ) from error


def _load_folder(
    folder: Path, options: ModelOptions, reference: str, role: str, like: LoadedModel | None, file: Path | None = None
) -> LoadedModel:
    _refuse(options, reference, role, "arch", "weights", why="its config.json and its own weights are used")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UnavailableError(f"The model folder {folder} {what}.")
    described = _described(folder / "config.json", str(folder))
    found = [folder / name for name in _WEIGHT_NAMES if (folder / name).is_file()]
    found += [path for suffix in WEIGHT_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if not found:
        raise UnavailableError(f"The model folder {folder} has no weights ({', '.join(_WEIGHT_NAMES[:2])}).")
    return _load_described(
        described,
        read_checkpoint(file or found[0]),
        options,
        reference=reference,
        name=f"local-dir:{folder}",
        source="local-dir",
        role=role,
        like=like,
    )


def _load_timm(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    """timm's registry name with the weights timm has for it."""
    config = a.config()
    hub_id, url = config.get("hf_hub_id"), config.get("url")
    if not hub_id and not url:
        other = [n for n in _pretrained_names(a.key)]
        hint = f" Others of its kind with weights: {', '.join(other)}." if other else ""
        raise UnavailableError(
            f"There are no pretrained weights for {a.name}: give {_flag(role, 'weights')} FILE.{hint}"
        )
    name, commit = f"{a.family}/{a.key}", None
    if config.get("tag"):
        name += f".{config['tag']}"
    if hub_id:
        repo, revision = split_revision(hub_id)
        downloaded = _hub_weights(repo, revision, config.get("hf_hub_filename"))
        path, commit = downloaded.path, downloaded.commit
    else:
        path = _download(url if isinstance(url, str) else url[0], name)
    return _load_described(
        _Described(key=a.key, config=config),
        read_checkpoint(path),
        options,
        reference=reference,
        name=name,
        source="timm",
        role=role,
        like=None,
        revision=commit,
    )


def _pretrained_names(key: str) -> list[str]:
    import timm

    return timm.list_pretrained(f"{key.split('_')[0]}*")[:4] if not key.startswith(REGISTRY_PREFIX) else []


def _download(url: str, name: str) -> Path:
    """A weights file by URL, kept where torch.hub keeps them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except (urllib.error.URLError, OSError) as error:
            raise UnavailableError(
                f"The weights of {name} cannot be downloaded from {url}: {one_line(error)}"
            ) from error
    return path


# --------------------------------------------------------------------------------------------------------------------
# Weights in a file, for an architecture that is known otherwise
# --------------------------------------------------------------------------------------------------------------------


def _refuse(options: ModelOptions, reference: str, role: str, *names: str, why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"{_flag(role, name.replace('_', '-'))} does not go with {reference}: {why}.")


def _layer_shape(layer: Any, tensors: Mapping[str, Tensor], axis: int) -> int | None:
    """The classes (axis 0) or channels (axis 1) that a checkpoint's layer has."""
    name = layer[0] if isinstance(layer, tuple | list) and layer else layer
    weight = tensors.get(f"{name}.weight")
    return int(weight.shape[axis]) if weight is not None and weight.ndim > axis else None


def _load_file(
    path: Path,
    options: ModelOptions,
    *,
    reference: str,
    role: str,
    like: LoadedModel | None,
    a: Architecture | None = None,
    source: Source = "file",
) -> LoadedModel:
    """A checkpoint file, for the architecture ``a``, the one in the options, or the one that the file names."""
    checkpoint = read_checkpoint(path)
    facts = checkpoint.facts
    if a is None:
        known = options.arch or facts.architecture
        if known is None and path.name in _WEIGHT_NAMES and (path.parent / "config.json").is_file():
            return _load_folder(path.parent, options, reference, role, like, file=path)
        if known is None:
            raise UsageError(
                f"{path} does not say which network it is for: give {_flag(role, 'arch')} NAME (resnet18, "
                "cifar/wrn16_2, nets.py:factory)."
            )
        a = arch.require_architecture(known, option=_flag(role, "arch") if options.arch else str(path))
    name = f"{a.name} ({path.name})" if source != "builtin" else reference
    config = a.config()
    in_file = _layer_shape(config.get("classifier"), checkpoint.tensors, 0)
    num_classes = in_file or options.num_classes or facts.num_classes
    if num_classes is None and like is not None:
        num_classes = like.num_classes
    _require_same_classes(options.num_classes, in_file or facts.num_classes, str(path), role)
    channels = _layer_shape(config.get("first_conv"), checkpoint.tensors, 1)
    _require_same_channels(options.input_size, channels, str(path), role)
    size = options.input_size or facts.input_size or config.get("input_size")
    if size is None and a.family == "torchvision":
        size = (3, 224, 224)
    if like is not None and options.input_size is None:
        size = ((facts.input_size or like.input.size)[0], *like.input.size[1:])
    if size is None:
        raise UsageError(f"{name} does not say what it is fed: give {_flag(role, 'input-size')} C H W.")
    size = (channels or size[0], size[1], size[2])
    arguments = arch.registry_arguments(config, size) if config else {}
    module = _build(a, num_classes, size, arguments)
    load_exactly(
        module,
        checkpoint,
        what=a.name,
        error=UnavailableError if source == "builtin" else UsageError,
        hint=f"Give the architecture it was saved from with {_flag(role, 'arch')}."
        if a.family != "user"
        else "Give the factory that it was saved from.",
    )
    usual = like.input if like is not None else _config_input(config)
    spec = _input_spec(size, options, facts, usual, role)
    module, classes = _with_classes(a, module, spec, name)
    _require_same_classes(options.num_classes, classes, name, role)
    return LoadedModel(
        module=module,
        reference=reference,
        name=name,
        source="user" if a.family == "user" else source,
        input=spec,
        num_classes=classes,
        architecture=a.registry_name,
        model_args=arguments,
        class_names=_class_names(facts.classes, classes),
        weights_sha256=checkpoint.sha256,
        license=facts.license,
        pretrained=True,
    )


def _build(
    a: Architecture, num_classes: int | None, size: tuple[int, int, int], arguments: dict[str, Any]
) -> nn.Module:
    """A network from scratch; ``num_classes`` None leaves the family's own default."""
    if a.family == "user":
        return arch.build_user(a.key, num_classes=num_classes, in_chans=size[0])
    if a.family == "torchvision":
        return arch.build_torchvision(a.key, num_classes=num_classes, in_chans=size[0])
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return arch.build_registry(a.key, in_chans=size[0], **classes, **arguments)


def _with_classes(a: Architecture, module: nn.Module, spec: InputSpec, name: str) -> tuple[nn.Module, int]:
    if a.registry_name is not None:
        return module, int(module.num_classes)  # type: ignore[arg-type]
    return _adapt(module, spec, name)


# --------------------------------------------------------------------------------------------------------------------
# torchvision's own weights, a user's factory that brings its own, a module from Python
# --------------------------------------------------------------------------------------------------------------------


def _load_torchvision(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    weights = torchvision.models.get_model_weights(a.key)
    if not len(weights):
        raise UnavailableError(f"torchvision has no weights for {a.key}: give {_flag(role, 'weights')} FILE.")
    entry = weights["DEFAULT"]
    checkpoint = read_checkpoint(_download(entry.url, a.name))
    num_classes = len(entry.meta["categories"])
    _require_same_classes(options.num_classes, num_classes, a.name, role)
    preset = entry.transforms()
    side = (getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None) or [224])[0]
    usual = InputSpec(
        size=(3, side, side),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        crop_pct=side / (preset.resize_size or [side])[0],
    )
    size = options.input_size or usual.size
    _require_same_channels(options.input_size, 3, a.name, role)
    module = arch.build_torchvision(a.key, num_classes=num_classes, in_chans=size[0])
    # Heads that only training uses (googlenet, inception_v3) are left out of both sides.
    wanted = {n: t for n, t in checkpoint.tensors.items() if not re.match(r"aux\d|AuxLogits\.|aux_classifier\.", n)}
    checkpoint = dataclasses.replace(checkpoint, tensors=wanted)
    load_exactly(module, checkpoint, what=a.name, error=UnavailableError, hint="")
    spec = _input_spec(size, options, ModelFacts(), usual, role)
    module, classes = _adapt(module, spec, a.name)
    return LoadedModel(
        module=module,
        reference=reference,
        name=f"{a.name}.{entry.name.lower()}",
        source="torchvision",
        input=spec,
        num_classes=classes,
        class_names=_class_names(entry.meta["categories"], classes),
        weights_sha256=checkpoint.sha256,
        pretrained=True,
    )


def _load_user(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    """A factory that loads its weights itself, which shows in that two calls give the same network."""
    channels = options.input_size[0] if options.input_size else None

    def build() -> nn.Module:
        return arch.build_user(a.key, num_classes=options.num_classes, in_chans=channels)

    random = arch.random_tensor(build)
    if random is not None:
        raise UsageError(
            f"{reference} returns random weights (two calls differ in {random}): give its checkpoint with "
            f"{_flag(role, 'weights')} FILE."
        )
    return _describe_module(build(), options, reference=reference, name=reference, source="user", role=role)


def _describe_module(
    module: nn.Module,
    options: ModelOptions,
    *,
    reference: str,
    name: str,
    source: Source,
    role: str,
    like: LoadedModel | None = None,
    pretrained: bool = True,
) -> LoadedModel:
    """What can be known about a module: from the options, from timm's attributes on it, from its output."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    config = dict(config) if isinstance(config, Mapping) else {}
    channels = getattr(module, "in_chans", None)
    if config.get("input_size") and isinstance(channels, int):
        config["input_size"] = (channels, *config["input_size"][1:])
    size = options.input_size or (like.input.size if like is not None else None) or config.get("input_size")
    if size is None:
        raise UsageError(f"{name} does not say what it is fed: give {_flag(role, 'input-size')} C H W (input_size).")
    usual = like.input if like is not None else _config_input({**config, "input_size": tuple(size)})
    spec = _input_spec(tuple(size), options, ModelFacts(), usual, role)
    adapted, classes = _adapt(module, spec, name)
    _require_same_classes(options.num_classes, classes, name, role)
    key, model_args = _registry_identity(module, config, classes, size[0])
    return LoadedModel(
        module=adapted,
        reference=reference,
        name=name,
        source=source,
        input=spec,
        num_classes=classes,
        architecture=key,
        model_args=model_args,
        class_names=_class_names(config.get("label_names"), classes),
        license=config.get("license") if pretrained else None,
        pretrained=pretrained,
    )


def _registry_identity(
    module: nn.Module, config: Mapping[str, Any], num_classes: int, channels: int
) -> tuple[str | None, dict[str, Any]]:
    """The registry name and arguments that build a module's twin, or None where timm would build something else."""
    key = config.get("architecture")
    if not isinstance(key, str) or not is_model(key):
        return None, {}
    stored = getattr(module, "_model_args", None) or {}
    model_args = {name: value for name, value in stored.items() if name not in ("num_classes", "in_chans")}
    try:
        json.dumps(model_args)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = arch.build_registry(key, num_classes=num_classes, in_chans=channels, **model_args)
    except (UsageError, TypeError, RuntimeError):  # not JSON, or timm cannot build it (so)
        return None, {}
    same = type(twin) is type(module) and misfit(twin, module.state_dict()) is None
    return (key, model_args) if same else (None, {})


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile's and the data-parallel wrappers."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


# --------------------------------------------------------------------------------------------------------------------
# The two entry points
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    """What a written reference turned out to be."""

    kind: Literal["hub", "folder", "builtin", "file", "architecture"]
    value: str = ""
    architecture: Architecture | None = None


def _resolve(text: str) -> _Reference:
    """Decide what a reference is, without reading or downloading anything.

    Raises:
        UsageError, UnavailableError: it cannot be any known kind, or is not there.
    """
    if not text.strip():
        raise UsageError("The model reference is empty.")
    prefix, colon, rest = text.partition(":")
    if colon and prefix.lower() in ("hf-hub", "hf_hub"):
        if not _REPOSITORY.fullmatch(rest):
            raise UsageError(
                f"{text!r} names no Hub repository: write hf-hub:owner/repo or hf-hub:owner/repo@revision."
            )
        return _Reference("hub", rest)
    if colon and prefix.lower() in ("local-dir", "local_dir"):
        return _Reference("folder", rest)
    if text.startswith("builtin/"):
        if text not in BUILTIN_MODELS:
            raise UnavailableError(f"There is no {text}: built in is {', '.join(BUILTIN_MODELS)}.")
        return _Reference("builtin", text)
    path = Path(text).expanduser()
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        return _Reference("file", str(path))
    if path.suffix == ".py":
        raise UsageError(f"{text} is a Python file: name the function in it too, as in {text}:factory.")
    found = arch.find_architecture(text)
    if found is not None:
        return _Reference("architecture", architecture=found)
    if path.is_dir():
        return _Reference("folder", str(path))
    if path.exists():
        raise UsageError(f"{text} is neither a model folder nor a weights file ({', '.join(WEIGHT_SUFFIXES)}).")
    if text.startswith((".", "/", "~")):
        raise UnavailableError(f"The model {text} does not exist.")
    if _REPOSITORY.fullmatch(text):
        owner = text.split("/")[0]
        if close := did_you_mean(owner, _COLLECTIONS):
            raise UnavailableError(
                f"There is no model {text!r}.{close} (For a Hub repository of that name write hf-hub:{text}.)"
            )
        return _Reference("hub", text)
    raise arch.unknown_model(text)


def _load_weights(
    resolved: _Reference, options: ModelOptions, reference: str, role: str, like: LoadedModel | None
) -> LoadedModel | None:
    """Load a reference that brings weights, or is given some; None where it is an architecture alone."""
    if resolved.kind == "hub":
        return _load_hub(resolved.value, options, reference, role, like)
    if resolved.kind == "folder":
        return _load_folder(Path(resolved.value).expanduser(), options, reference, role, like)
    if resolved.kind == "builtin":
        _refuse(options, reference, role, "arch", "weights", why="it is complete as it is")
        path = BUILTIN_MODELS[resolved.value]
        return _load_file(path, options, reference=reference, role=role, like=like, source="builtin")
    if resolved.kind == "file":
        _refuse(options, reference, role, "weights", why="the reference is a weights file itself")
        return _load_file(Path(resolved.value), options, reference=reference, role=role, like=like)
    _refuse(options, reference, role, "arch", why="the reference is an architecture itself")
    if options.weights is None:
        return None
    weights = Path(options.weights).expanduser()
    return _load_file(weights, options, reference=reference, role=role, like=like, a=resolved.architecture)


def load_teacher(
    reference: str | nn.Module, options: ModelOptions = ModelOptions(), *, role: str = "teacher"
) -> LoadedModel:
    """Load a pretrained model, in evaluation mode, with every tensor from its file.

    The global random state is left as it was, so that what follows does not depend on how the teacher was given.

    Args:
        reference: a model reference (see the module), or a trained module. A module is put into evaluation mode.
        options: what the reference does not say itself.
        role: "teacher" or "model", for the option names in messages.

    Raises:
        UsageError: reference and options do not go together, or the model cannot take its stated input.
        UnavailableError: the model or its weights cannot be had, or are not whole.
    """
    if isinstance(reference, nn.Module):
        loaded = _load_module(reference, options, role)
    else:
        with torch.random.fork_rng(devices=[]):
            resolved = _resolve(reference)
            found = _load_weights(resolved, options, reference, role, None)
            if found is None:
                a = resolved.architecture
                assert a is not None
                by_family = {"torchvision": _load_torchvision, "user": _load_user}
                found = by_family.get(a.family, _load_timm)(a, options, reference, role)
            loaded = found
    require_finite(loaded.module, loaded.name)
    loaded.module.eval()
    return loaded


def _load_module(module: nn.Module, options: ModelOptions, role: str, like: LoadedModel | None = None) -> LoadedModel:
    module = _unwrapped(module)
    name = type(module).__name__
    _refuse(options, name, role, "arch", "weights", why="it is a module with its own weights")
    return _describe_module(
        module, options, reference=name, name=name, source="module", role=role, like=like, pretrained=like is None
    )


def load_student(
    reference: str | nn.Module, options: ModelOptions = ModelOptions(), *, like: LoadedModel
) -> LoadedModel:
    """Build a student for a teacher: from scratch (seed torch before), or with the weights that are given.

    Classes, input size and normalisation are the teacher's unless the options or the student's own weights say
    otherwise. ``module`` comes in training mode.

    Args:
        reference: a model reference, or a module (which is used, and trained, as it is).
        options: what differs from the teacher's.
        like: the teacher.

    Raises:
        UsageError: classes, channels or image size differ from the teacher's.
        UnavailableError: the model or its weights cannot be had.
    """
    teacher = f"the teacher {like.name}"
    if options.num_classes is not None and options.num_classes != like.num_classes:
        raise UsageError(
            f"--student-num-classes {options.num_classes} differs from the {like.num_classes} classes of {teacher}."
        )
    if options.input_size is not None and options.input_size != like.input.size:
        stated = " ".join(map(str, options.input_size))
        raise UsageError(
            f"--student-input-size {stated} differs from the {_size_text(like.input.size)} of {teacher}, whose "
            "images the student sees."
        )
    if isinstance(reference, nn.Module):
        loaded = _load_module(reference, options, "student", like)
    else:
        resolved = _resolve(reference)
        given = _load_weights(resolved, options, reference, "student", like)
        loaded = given if given is not None else _from_scratch(resolved.architecture, options, reference, like)
        if given is not None:
            require_finite(loaded.module, loaded.name)
    if loaded.num_classes != like.num_classes:
        raise UsageError(f"The student {loaded.name} has {loaded.num_classes} classes, {teacher} {like.num_classes}.")
    if loaded.input.size[0] != like.input.size[0]:
        raise UsageError(
            f"The student {loaded.name} takes {loaded.input.size[0]} channels, {teacher} {like.input.size[0]}."
        )
    loaded.class_names = loaded.class_names or like.class_names
    loaded.module.train()
    return loaded


def _from_scratch(a: Architecture | None, options: ModelOptions, reference: str, like: LoadedModel) -> LoadedModel:
    assert a is not None
    size = like.input.size
    arguments = arch.registry_arguments(a.config(), size)
    module = _build(a, like.num_classes, size, arguments)
    spec = _input_spec(size, options, ModelFacts(), like.input, "student")
    module, classes = _with_classes(a, module, spec, a.name)
    return LoadedModel(
        module=module,
        reference=reference,
        name=a.name,
        source=a.family,
        input=spec,
        num_classes=classes,
        architecture=a.registry_name,
        model_args=arguments,
    )


__all__ = [
    "BUILTIN_MODELS",
    "InputSpec",
    "LoadedModel",
    "LogitsOnly",
    "ModelOptions",
    "Normalized",
    "as_logits",
    "check_forward",
    "load_student",
    "load_teacher",
]
