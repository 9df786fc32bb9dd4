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

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastdfkd_cli import architectures as arch
from fastdfkd_cli.architectures import Architecture
from fastdfkd_cli.errors import UnavailableError, UsageError, did_you_mean
from fastdfkd_cli.models.files import (
    build,
    describe_module,
    load_file,
    load_torchvision,
    load_user,
    unwrapped,
    with_classes,
)
from fastdfkd_cli.models.spec import (
    InputSpec,
    LoadedModel,
    LogitsOnly,
    ModelOptions,
    Normalized,
    as_logits,
    check_forward,
    input_spec,
    refuse,
    size_text,
    taught_input,
)
from fastdfkd_cli.models.timm_format import load_folder, load_hub, load_timm
from fastdfkd_cli.output import user_path
from fastdfkd_cli.weights import WEIGHT_SUFFIXES, ModelFacts, require_finite

#: The built-in teacher, and where the package keeps it.
BUILTIN_MODELS = {"builtin/digits": Path(__file__).parent.parent / "assets" / "digits.safetensors"}
_NO_OPTIONS = ModelOptions()
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
_COLLECTIONS = ("timm", "torchvision", "cifar", "builtin")


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
    path = user_path(text)
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
        return load_hub(resolved.value, options, reference, role, like)
    if resolved.kind == "folder":
        return load_folder(user_path(resolved.value), options, reference, role, like)
    if resolved.kind == "builtin":
        refuse(options, reference, role, "arch", "weights", why="it is complete as it is")
        path = BUILTIN_MODELS[resolved.value]
        return load_file(path, options, reference=reference, role=role, like=like, source="builtin")
    if resolved.kind == "file":
        refuse(options, reference, role, "weights", why="the reference is a weights file itself")
        return load_file(Path(resolved.value), options, reference=reference, role=role, like=like)
    refuse(options, reference, role, "arch", why="the reference is an architecture itself")
    if options.weights is None:
        return None
    weights = user_path(options.weights)
    return load_file(weights, options, reference=reference, role=role, like=like, a=resolved.architecture)


def load_teacher(
    reference: str | nn.Module, options: ModelOptions = _NO_OPTIONS, *, role: str = "teacher"
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
                by_family = {"torchvision": load_torchvision, "user": load_user}
                found = by_family.get(a.family, load_timm)(a, options, reference, role)
            loaded = found
    require_finite(loaded.module, loaded.name)
    loaded.module.eval()
    return loaded


def _load_module(module: nn.Module, options: ModelOptions, role: str, like: LoadedModel | None = None) -> LoadedModel:
    module = unwrapped(module)
    name = type(module).__name__
    refuse(options, name, role, "arch", "weights", why="it is a module with its own weights")
    return describe_module(
        module, options, reference=name, name=name, source="module", role=role, like=like, pretrained=like is None
    )


def load_student(reference: str | nn.Module, options: ModelOptions = _NO_OPTIONS, *, like: LoadedModel) -> LoadedModel:
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
            f"--student-input-size {stated} differs from the {size_text(like.input.size)} of {teacher}, whose "
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


def load_untrained(
    reference: str | nn.Module, spec: InputSpec, num_classes: int, class_names: tuple[str, ...] | None = None
) -> LoadedModel:
    """Build a network to be trained from scratch (seed torch before). ``module`` comes in training mode.

    Args:
        reference: an architecture, or a module (which is used, and trained, as it is).
        spec: what it will be fed.
        num_classes: its classes.
        class_names: their names, in order.

    Raises:
        UsageError: it has weights already, or cannot have these classes or this input.
    """
    like = LoadedModel(
        module=nn.Identity(), reference="", name="the images", source="module", input=spec, num_classes=num_classes
    )
    if isinstance(reference, nn.Module):
        loaded = _load_module(reference, _NO_OPTIONS, "model", like)
    else:
        a = _resolve(reference).architecture
        if a is None:
            raise UsageError(f"{reference} has weights already: name an architecture, such as cifar/wrn16_2.")
        loaded = _from_scratch(a, _NO_OPTIONS, reference, like)
    if loaded.num_classes != num_classes:
        raise UsageError(f"{loaded.name} has {loaded.num_classes} outputs for {num_classes} classes of images.")
    loaded.class_names = class_names
    loaded.module.train()
    return loaded


def usual_size(reference: str | nn.Module) -> tuple[int, int, int] | None:
    """The input size that an architecture is known for; None where it says none, or has weights already."""
    if isinstance(reference, nn.Module):
        return None
    a = _resolve(reference).architecture
    size = a.config().get("input_size") if a is not None else None
    return (size[0], size[1], size[2]) if size else None


def _from_scratch(a: Architecture | None, options: ModelOptions, reference: str, like: LoadedModel) -> LoadedModel:
    assert a is not None
    size = like.input.size
    arguments = arch.registry_arguments(a.config(), size)
    module = build(a, like.num_classes, size, arguments)
    spec = input_spec(size, options, ModelFacts(), taught_input(like), "student")
    module, classes = with_classes(a, module, spec, a.name)
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
    "load_untrained",
    "usual_size",
]
