"""Models from a checkpoint file, from torchvision, from a user's factory, or passed from Python."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from timm.models import is_model
from torch import Tensor, nn

from fastdfkd_cli import architectures as arch
from fastdfkd_cli.architectures import Architecture
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.models.spec import (
    InputSpec,
    LoadedModel,
    ModelOptions,
    Source,
    adapt,
    config_input,
    flag,
    input_spec,
    require_same_channels,
    require_same_classes,
    taught_input,
)
from fastdfkd_cli.models.timm_format import WEIGHT_NAMES, class_names, download, load_folder
from fastdfkd_cli.weights import ModelFacts, load_exactly, misfit, read_checkpoint


def _layer_shape(layer: Any, tensors: Mapping[str, Tensor], axis: int) -> int | None:
    """The classes (axis 0) or channels (axis 1) that a checkpoint's layer has."""
    name = layer[0] if isinstance(layer, tuple | list) and layer else layer
    weight = tensors.get(f"{name}.weight")
    return int(weight.shape[axis]) if weight is not None and weight.ndim > axis else None


def load_file(
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
        if known is None and path.name in WEIGHT_NAMES and (path.parent / "config.json").is_file():
            return load_folder(path.parent, options, reference, role, like, file=path)
        if known is None:
            raise UsageError(
                f"{path} does not say which network it is for: give {flag(role, 'arch')} NAME (resnet18, "
                "cifar/wrn16_2, nets.py:factory)."
            )
        a = arch.require_architecture(known, option=flag(role, "arch") if options.arch else str(path))
        if a.family == "user" and not options.arch:
            # Weights are data: a file must not choose what code runs. The user may, by writing it.
            raise UsageError(
                f"{path} names code ({known}) as its network, which a file may not do: if you trust that code, give "
                f"{flag(role, 'arch')} {known}."
            )
    name = f"{a.name} ({path.name})" if source != "builtin" else reference
    config = a.config()
    in_file = _layer_shape(config.get("classifier"), checkpoint.tensors, 0)
    num_classes = in_file or options.num_classes or facts.num_classes
    if num_classes is None and like is not None:
        num_classes = like.num_classes
    require_same_classes(options.num_classes, in_file or facts.num_classes, str(path), role)
    channels = _layer_shape(config.get("first_conv"), checkpoint.tensors, 1)
    require_same_channels(options.input_size, channels, str(path), role)
    size = options.input_size or facts.input_size or config.get("input_size")
    if size is None and a.family == "torchvision":
        size = (3, 224, 224)
    if like is not None and options.input_size is None:
        size = ((facts.input_size or like.input.size)[0], *like.input.size[1:])
    if size is None:
        raise UsageError(f"{name} does not say what it is fed: give {flag(role, 'input-size')} C H W.")
    size = (channels or size[0], size[1], size[2])
    arguments = arch.registry_arguments(config, size) if config else {}
    module = build(a, num_classes, size, arguments)
    load_exactly(
        module,
        checkpoint,
        what=a.name,
        error=UnavailableError if source == "builtin" else UsageError,
        hint=f"Give the architecture it was saved from with {flag(role, 'arch')}."
        if a.family != "user"
        else "Give the factory that it was saved from.",
    )
    usual = taught_input(like) if like is not None else config_input(config)
    spec = input_spec(size, options, facts, usual, role)
    module, classes = with_classes(a, module, spec, name)
    require_same_classes(options.num_classes, classes, name, role)
    return LoadedModel(
        module=module,
        reference=reference,
        name=name,
        source="user" if a.family == "user" else source,
        input=spec,
        num_classes=classes,
        architecture=a.registry_name,
        model_args=arguments,
        class_names=class_names(facts.classes, classes),
        weights_sha256=checkpoint.sha256,
        license=facts.license,
        pretrained=True,
    )


def build(a: Architecture, num_classes: int | None, size: tuple[int, int, int], arguments: dict[str, Any]) -> nn.Module:
    """A network from scratch; ``num_classes`` None leaves the family's own default."""
    if a.family == "user":
        return arch.build_user(a.key, num_classes=num_classes, in_chans=size[0])
    if a.family == "torchvision":
        return arch.build_torchvision(a.key, num_classes=num_classes, in_chans=size[0])
    if num_classes is not None:
        arguments = {"num_classes": num_classes, **arguments}
    return arch.build_registry(a.key, in_chans=size[0], **arguments)


def with_classes(a: Architecture, module: nn.Module, spec: InputSpec, name: str) -> tuple[nn.Module, int]:
    if a.registry_name is not None:
        return module, int(module.num_classes)  # type: ignore[arg-type]
    return adapt(module, spec, name)


def load_torchvision(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    weights = torchvision.models.get_model_weights(a.key)
    if not len(weights):
        raise UnavailableError(f"torchvision has no weights for {a.key}: give {flag(role, 'weights')} FILE.")
    entry = weights["DEFAULT"]
    checkpoint = read_checkpoint(download(entry.url, a.name))
    num_classes = len(entry.meta["categories"])
    require_same_classes(options.num_classes, num_classes, a.name, role)
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
    require_same_channels(options.input_size, 3, a.name, role)
    module = arch.build_torchvision(a.key, num_classes=num_classes, in_chans=size[0])
    # Heads that only training uses (googlenet, inception_v3) are left out of both sides.
    wanted = {n: t for n, t in checkpoint.tensors.items() if not re.match(r"aux\d|AuxLogits\.|aux_classifier\.", n)}
    checkpoint = dataclasses.replace(checkpoint, tensors=wanted)
    load_exactly(module, checkpoint, what=a.name, error=UnavailableError, hint="")
    spec = input_spec(size, options, ModelFacts(), usual, role)
    module, classes = adapt(module, spec, a.name)
    return LoadedModel(
        module=module,
        reference=reference,
        name=f"{a.name}.{entry.name.lower()}",
        source="torchvision",
        input=spec,
        num_classes=classes,
        class_names=class_names(entry.meta["categories"], classes),
        weights_sha256=checkpoint.sha256,
        pretrained=True,
    )


def load_user(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    """A factory that loads its weights itself, which shows in that two calls give the same network."""
    channels = options.input_size[0] if options.input_size else None

    def build() -> nn.Module:
        return arch.build_user(a.key, num_classes=options.num_classes, in_chans=channels)

    random = arch.random_tensor(build)
    if random is not None:
        raise UsageError(
            f"{reference} returns random weights (two calls differ in {random}): give its checkpoint with "
            f"{flag(role, 'weights')} FILE."
        )
    return describe_module(build(), options, reference=reference, name=reference, source="user", role=role)


def describe_module(
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
        raise UsageError(f"{name} does not say what it is fed: give {flag(role, 'input-size')} C H W (input_size).")
    usual = taught_input(like) if like is not None else config_input({**config, "input_size": tuple(size)})
    spec = input_spec(tuple(size), options, ModelFacts(), usual, role)
    adapted, classes = adapt(module, spec, name)
    require_same_classes(options.num_classes, classes, name, role)
    # A network whose output had to be adapted is not what timm would build.
    known = adapted is module
    key, model_args = _registry_identity(module, config, classes, size[0]) if known else (None, {})
    return LoadedModel(
        module=adapted,
        reference=reference,
        name=name,
        source=source,
        input=spec,
        num_classes=classes,
        architecture=key,
        model_args=model_args,
        class_names=class_names(config.get("label_names"), classes),
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


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile's and the data-parallel wrappers."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module
