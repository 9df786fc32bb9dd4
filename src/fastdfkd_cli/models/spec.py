"""What a loaded model is: its module, its input, its output, and checks of all three."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdfkd_cli.architectures import one_line
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.host import available_memory
from fastdfkd_cli.weights import ModelFacts

Source = Literal["timm", "hub", "local-dir", "file", "user", "torchvision", "cifar", "builtin", "module"]


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


def flag(role: str, name: str) -> str:
    """The command-line option of a role: ``--teacher-arch``; plain ``--arch`` for the one model of ``evaluate``."""
    return f"--{role}-{name}" if role in ("teacher", "student") else f"--{name}"


def size_text(size: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in size)


def _forward(module: nn.Module, spec: InputSpec, name: str, batch: int = 2) -> Any:
    """One evaluation forward on normalised noise; modes and the global random state stay as they were.

    Raises:
        UsageError: the model cannot take the stated input.
        FastDFKDError: memory ran out.
    """
    too_much = f"{name} needs more memory than there is for {batch} images of {size_text(spec.size)}."
    # An input size that a file states may be any number; a network needs several times its input.
    if 16 * batch * math.prod(spec.size) > available_memory():
        raise FastDFKDError(too_much)
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    device, dtype = (parameter.device, parameter.dtype) if parameter is not None else (torch.device("cpu"), None)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        images = torch.rand((batch, *spec.size), generator=torch.Generator().manual_seed(0))
        shape = (1, -1, 1, 1)
        x = (images - torch.tensor(spec.mean).view(shape)) / torch.tensor(spec.std).view(shape)
        with torch.no_grad():
            return module(x.to(device=device, dtype=dtype))
    except torch.OutOfMemoryError as error:
        raise FastDFKDError(too_much) from error
    except Exception as error:  # whatever a user's forward raises
        raise UsageError(
            f"{name} fails on input {size_text((batch, *spec.size))} (batch, channels, height, width): "
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
            f"{model.name} returns {size_text(tuple(logits.shape))} for {batch} images of "
            f"{size_text(model.input.size)}, not logits of {batch}x{model.num_classes}."
        )


def adapt(module: nn.Module, spec: InputSpec, name: str) -> tuple[nn.Module, int]:
    """Make a network that was not built by timm return logits; give it and its class count, read from its output."""
    output = _forward(module, spec, name)
    logits = _logits_of(output, name)
    if logits.ndim != 2:
        raise UsageError(
            f"{name} returns {size_text(tuple(logits.shape))} for 2 images of {size_text(spec.size)}: only "
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


def input_spec(
    size: tuple[int, int, int], options: ModelOptions, facts: ModelFacts, usual: InputSpec, role: str
) -> InputSpec:
    """Options over what the file says over what is usual."""
    mean = _channel_values(options.mean or facts.mean, usual.mean, size[0], flag(role, "mean"))
    std = _channel_values(options.std or facts.std, usual.std, size[0], flag(role, "std"))
    if not all(0 < value < float("inf") for value in std):
        raise UsageError(f"{flag(role, 'std')} must be above 0 in every channel, not {std}.")
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


def taught_input(teacher: LoadedModel) -> InputSpec:
    """A student's usual input: its teacher's, at the size it is trained at."""
    return dataclasses.replace(teacher.input, test_size=None, test_crop_pct=None)


def config_input(config: Mapping[str, Any]) -> InputSpec:
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


def stated_size(options: ModelOptions, like: LoadedModel | None, usual: tuple[int, int, int]) -> tuple[int, int, int]:
    """The stated size; a student's is the teacher's, whose images it will see, with the channels its weights have."""
    if options.input_size is not None:
        return options.input_size
    return usual if like is None else (usual[0], *like.input.size[1:])


def require_same_classes(stated: int | None, actual: int | None, name: str, role: str) -> None:
    if stated is not None and actual is not None and stated != actual:
        raise UsageError(
            f"{flag(role, 'num-classes')} {stated} differs from the {actual} classes of {name}: leave the option "
            "out, or use weights with that many classes."
        )


def require_same_channels(stated: tuple[int, int, int] | None, actual: int | None, name: str, role: str) -> None:
    if stated is not None and actual is not None and stated[0] != actual:
        raise UsageError(
            f"{flag(role, 'input-size')} {' '.join(map(str, stated))} has {stated[0]} channels, but {name} takes "
            f"{actual}."
        )


def refuse(options: ModelOptions, reference: str, role: str, *names: str, why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"{flag(role, name.replace('_', '-'))} does not go with {reference}: {why}.")
