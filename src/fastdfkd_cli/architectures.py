"""Architecture names, and building a network from one.

``resnet18`` and ``timm/resnet18`` are timm's, ``cifar/wrn16_2`` the paper's networks, ``torchvision/resnet18``
torchvision's, ``nets.py:factory`` and ``package.module:factory`` the user's own.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, split_model_name_tag
from torch import Tensor, nn

from fastdfkd_cli.errors import FastDFKDError, UnavailableError, UsageError, brief, did_you_mean
from fastdfkd_cli.nets_cifar import REGISTRY_PREFIX, cifar_names
from fastdfkd_cli.output import user_path

Family = Literal["timm", "cifar", "torchvision", "user"]
_FACTORY = re.compile(r"(?P<module>.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network that can be built, without its weights."""

    family: Family
    #: As printed: ``timm/resnet18``, ``cifar/wrn16_2``, ``torchvision/resnet18``, ``nets.py:factory``.
    name: str
    #: timm's registry name, torchvision's name or the factory's reference.
    key: str
    #: timm's pretrained tag, where one was written.
    tag: str = ""

    @property
    def registry_name(self) -> str | None:
        """The name that ``timm.create_model`` knows, or None."""
        return self.key if self.family in ("timm", "cifar") else None

    def config(self) -> dict[str, Any]:
        """timm's pretrained configuration (input size, normalisation, names of the first and last layer)."""
        if self.registry_name is None:
            return {}
        try:
            found = get_pretrained_cfg(f"{self.key}.{self.tag}" if self.tag else self.key)
        except RuntimeError:
            if self.tag:
                known = [name for name in timm.list_pretrained(f"{self.key}.*") if name != self.key]
                raise UnavailableError(
                    f"timm has no weights {self.key}.{self.tag}."
                    + (f" It has {', '.join(known[:6])}{', ...' if len(known) > 6 else ''}." if known else "")
                ) from None
            found = None  # registered without any configuration
        return {} if found is None else found.to_dict()


def factory_parts(text: str) -> tuple[str, str] | None:
    """``nets.py:factory`` or ``package.module:factory`` as its two halves, or None."""
    match = _FACTORY.fullmatch(text)
    return (match["module"], match["name"]) if match else None


def torchvision_names() -> list[str]:
    """torchvision's classification and segmentation networks that run in full precision."""
    models = torchvision.models
    return models.list_models(module=models) + models.list_models(module=models.segmentation)


def _suggest(word: str) -> str:
    bare = word.rsplit("/", 1)[-1].split("@")[0]
    base, _, _ = bare.partition(".")
    names = {name: name for name in timm.list_models() if not name.startswith(REGISTRY_PREFIX)}
    names |= {f"cifar/{name}": f"cifar/{name}" for name in cifar_names()}
    if word.startswith("torchvision/"):
        names = {f"torchvision/{name}": f"torchvision/{name}" for name in torchvision_names()}
        return did_you_mean(word, names)
    if word.startswith("cifar/") or bare.startswith("wrn"):
        return did_you_mean(f"cifar/{bare}", [name for name in names if "/" in name])
    return did_you_mean(base, names)


def find_architecture(text: str) -> Architecture | None:
    """The architecture that a name means, or None when it is none of the known kinds.

    Raises:
        UnavailableError: the name has a known prefix and no such network exists.
    """
    prefix, slash, rest = text.partition("/")
    if "@" in text:
        return None  # a revision: only Hub repositories have one
    if slash and prefix == "cifar":
        if rest not in cifar_names():
            raise UnavailableError(f"There is no network {text}.{_suggest(text)}")
        return Architecture(family="cifar", name=text, key=REGISTRY_PREFIX + rest)
    if slash and prefix == "torchvision":
        if rest not in torchvision_names():
            raise UnavailableError(f"torchvision has no network {rest!r}.{_suggest(text)}")
        return Architecture(family="torchvision", name=text, key=rest)
    if factory_parts(text):
        return Architecture(family="user", name=text, key=text)
    name = rest if slash and prefix == "timm" else text
    key, tag = split_model_name_tag(name)
    if is_model(key):
        if key.startswith(REGISTRY_PREFIX):
            return Architecture(family="cifar", name="cifar/" + key.removeprefix(REGISTRY_PREFIX), key=key)
        return Architecture(family="timm", name=f"timm/{name}", key=key, tag=tag)
    if slash and prefix == "timm":
        raise UnavailableError(
            f"timm has no model {name!r}.{_suggest(name)} (For a Hub repository of that name write hf-hub:{text}.)"
        )
    if name in cifar_names():
        return Architecture(family="cifar", name=f"cifar/{name}", key=REGISTRY_PREFIX + name)
    return None


def require_architecture(text: str, *, option: str) -> Architecture:
    """Like :func:`find_architecture`, for a name that must be an architecture's.

    Raises:
        UnavailableError: nothing of that name is known; the nearest names are offered.
    """
    found = find_architecture(text)
    if found is None:
        raise UnavailableError(f"{option}: there is no architecture {text!r}.{_suggest(text)}")
    return found


def unknown_model(text: str) -> UnavailableError:
    """The error for a reference that is none of the known kinds."""
    return UnavailableError(
        f"There is no model {text!r}.{_suggest(text)} (Known are timm names, hf-hub:owner/repo, cifar/NAME, "
        "torchvision/NAME, builtin/digits, a folder with config.json, a weights file and nets.py:factory.)"
    )


def registry_arguments(config: dict[str, Any], size: tuple[int, int, int] | None) -> dict[str, Any]:
    """What ``timm.create_model`` needs beside classes and channels: ``img_size`` where the network is built for one."""
    if size is not None and config.get("fixed_input_size") and tuple(config["input_size"][1:]) != size[1:]:
        return {"img_size": list(size[1:])}
    return {}


def build_registry(
    key: str,
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    **arguments: Any,
) -> nn.Module:
    """``timm.create_model`` by registry name.

    Args:
        key: the registry name.
        config: a pretrained configuration in place of timm's own.
        tensors: load these, through the renaming that timm has for the architecture; None: from scratch.
        arguments: ``num_classes``, ``in_chans`` and further arguments of the network.

    Raises:
        UsageError: the network refuses the arguments, or needs more memory than there is.
        RuntimeError: the tensors do not fit (as timm raises it).
    """
    known = {f.name for f in fields(PretrainedCfg)}
    cfg = {name: value for name, value in (config or {}).items() if name in known} or None
    if tensors is not None:
        cfg = {**(cfg or {}), "source": None, "file": None, "custom_load": False, "state_dict": tensors}
    try:
        module = timm.create_model(key, pretrained=tensors is not None, pretrained_cfg=cfg, **arguments)
    except (TypeError, ValueError, AssertionError, OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and tensors is not None:
            raise
        given = ", ".join(f"{name}={brief(value)}" for name, value in arguments.items())
        raise UsageError(f"timm's {key} cannot be built with {given}: {one_line(error)}") from error
    # Otherwise the module would keep a second copy of all its weights.
    stored = getattr(module, "pretrained_cfg", None)
    if isinstance(stored, dict):
        stored.pop("state_dict", None)
    return module


def build_torchvision(key: str, *, num_classes: int | None, in_chans: int) -> nn.Module:
    """A torchvision network from scratch.

    Raises:
        UsageError: another channel count than 3.
    """
    if in_chans != 3:
        raise UsageError(f"torchvision/{key} takes 3 channels, not {in_chans}: use a timm name for other inputs.")
    builder = torchvision.models.get_model_builder(key)
    parameters = inspect.signature(builder).parameters
    arguments: dict[str, Any] = {"weights": None}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if "weights_backbone" in parameters:
        arguments["weights_backbone"] = None
    if key in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": True, "aux_logits": False}
    return builder(**arguments)


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """Let a file import its neighbours while it is being imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _import(module_name: str) -> Any:
    if not module_name.endswith(".py"):
        with _import_path(Path.cwd()):
            return importlib.import_module(module_name)
    path = user_path(module_name).resolve()
    # A name of its own, the same for the same file: pickling and dataclasses look modules up by name.
    name = f"_fastdfkd_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _import_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def user_factory(reference: str) -> Callable[..., Any]:
    """Import ``nets.py:factory`` or ``package.module:factory``.

    Raises:
        UnavailableError: no such file or module.
        UsageError: the import fails, or there is no such function in it.
    """
    parts = factory_parts(reference)
    if parts is None:
        raise UsageError(f"{reference!r} is not of the form nets.py:factory or package.module:factory.")
    module_name, name = parts
    if module_name.endswith(".py") and not user_path(module_name).is_file():
        raise UnavailableError(f"The file {module_name} of {reference} does not exist.")
    try:
        found = _import(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UnavailableError(f"There is no Python module {module_name} (looked in this folder too).") from error
        raise UsageError(f"{module_name} cannot be imported: {one_line(error)}") from error
    except FastDFKDError:
        raise
    except Exception as error:  # whatever the user's file raises
        raise UsageError(f"{module_name} cannot be imported: {one_line(error)}") from error
    owner = found
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, value in vars(owner).items() if callable(value) and not n.startswith("_")]
            raise UsageError(f"{module_name} has no {name!r}.{did_you_mean(name, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{reference} is a {type(found).__name__}, not a function that returns a network.")
    return found


def build_user(reference: str, *, num_classes: int | None, in_chans: int | None) -> nn.Module:
    """Call the user's factory with those of ``num_classes`` and ``in_chans`` that it takes and that are known.

    A factory with ``**kwargs`` gets ``num_classes`` only, which is what such functions hand on to a network.

    Raises:
        UnavailableError: no such file or module.
        UsageError: the factory fails, needs other arguments or returns no network.
    """
    factory = user_factory(reference)
    if isinstance(factory, nn.Module):
        raise UsageError(f"{reference} is a network, not a function that returns one: write a function.")
    known = {"num_classes": num_classes, "in_chans": in_chans}
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        parameters = {}  # type: ignore[assignment]
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {name for name, parameter in parameters.items() if parameter.kind in keywords}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        taken.add("num_classes")
    arguments = {name: value for name, value in known.items() if name in taken and value is not None}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and name not in arguments
    ]
    if needed:
        raise UsageError(
            f"{reference} needs {', '.join(needed)}: write a function that needs no arguments, or only num_classes "
            "and in_chans (and state those)."
        )
    try:
        module = factory(**arguments)
    except FastDFKDError:
        raise
    except Exception as error:  # whatever the user's function raises
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise UsageError(f"{reference} fails when called with ({given}): {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{reference} returned a {type(module).__name__}, not a torch.nn.Module.")
    return module


def random_tensor(build: Callable[[], nn.Module]) -> str | None:
    """Build a network under two seeds; name a tensor that differs (it was random), or None when all agree."""
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            states.append(build().state_dict())
    first, second = states
    for name, tensor in first.items():
        other = second.get(name)
        if isinstance(tensor, Tensor) and (other is None or not torch.equal(tensor.cpu(), other.cpu())):
            return str(name)
    return None


__all__ = [
    "Architecture",
    "build_registry",
    "build_torchvision",
    "build_user",
    "factory_parts",
    "find_architecture",
    "random_tensor",
    "one_line",
    "registry_arguments",
    "require_architecture",
    "torchvision_names",
    "unknown_model",
    "user_factory",
]
