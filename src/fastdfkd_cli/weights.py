"""Checkpoint files: reading them safely, and loading them so that nothing stays random.

A file is read as safetensors or, for every other suffix, as a pickle with ``weights_only=True``: no code of a
checkpoint is ever run, and a small file does not become a large one in memory. What a training script wraps around its
tensors (``state_dict``, ``model``, an average of the weights, a ``module.`` prefix) is taken off, and what the file
says about itself (architecture, classes, input size, normalisation) is handed on as :class:`ModelFacts`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdfkd_cli.errors import FastDFKDError, UnavailableError, brief
from fastdfkd_cli.output import sha256_file

#: What a checkpoint file's name may end in.
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")
#: Where training scripts put the tensors, averaged weights first (as timm prefers them).
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
#: What DataParallel, DistributedDataParallel, AveragedModel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
#: How the readers of torch report a file that is cut short or is not a checkpoint at all.
_BROKEN_PICKLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error,
    MemoryError, AssertionError,
)  # fmt: skip
#: What timm's evaluation transform takes (its names of PIL's filters).
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_FACT_KEYS = {"labels": "classes", "label_names": "classes", "class_names": "classes", "arch": "architecture"}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a file says about the model in it; None where it says nothing."""

    architecture: str | None = None
    num_classes: int | None = None
    #: ``(C, H, W)``.
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    license: str | None = None
    interpolation: str | None = None
    crop_pct: float | None = None

    def over(self, other: ModelFacts) -> ModelFacts:
        """These facts, with the gaps filled from ``other``."""
        return ModelFacts(
            **{f.name: v if (v := getattr(self, f.name)) is not None else getattr(other, f.name) for f in fields(self)}
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a file, on the CPU and without wrapper prefixes where those stood on every name."""

    path: Path
    tensors: dict[str, Tensor]
    #: The same tensors under the names that stand in the file.
    raw: dict[str, Tensor] = field(repr=False)
    facts: ModelFacts
    sha256: str


def parse_facts(raw: Mapping[str, Any], origin: str) -> ModelFacts:
    """Check what a file says about its model. Values may be JSON values or, as in safetensors, JSON text.

    Args:
        raw: names and values; names that mean nothing here are passed over.
        origin: the file, for the error message.

    Raises:
        UnavailableError: a value is not of its kind.
    """
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = _FACT_KEYS.get(key, key)
        if isinstance(value, str):
            # What is not JSON is a bare word, such as an architecture's name.
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value is not None:
            values.setdefault(name, value)

    def read(name: str, convert: Any, expected: str) -> Any:
        if name not in values:
            return None
        try:
            return convert(values[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UnavailableError(
                f"{origin} says {name} = {brief(values[name])}, which is not {expected}; correct the file."
            ) from error

    def text(value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise TypeError
        return value

    def count(value: Any) -> int:
        if isinstance(value, bool) or int(value) != value or not 0 < value < 2**31:
            raise ValueError
        return int(value)

    def size(value: Any) -> tuple[int, int, int]:
        channels, height, width = (count(v) for v in value)
        return channels, height, width

    def numbers(value: Any) -> tuple[float, ...]:
        result = tuple(float(v) for v in (value if isinstance(value, list | tuple) else [value]))
        if not result or not all(math.isfinite(v) for v in result):
            raise ValueError
        return result

    def share(value: Any) -> float:
        if not 0 < float(value) <= 1:
            raise ValueError
        return float(value)

    def filter_name(value: Any) -> str:
        if value not in _INTERPOLATIONS:
            raise ValueError
        return str(value)

    def names(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise TypeError
        return tuple(str(v) for v in value)

    return ModelFacts(
        architecture=read("architecture", text, "a name"),
        num_classes=read("num_classes", count, "a whole number above 0"),
        input_size=read("input_size", size, "three whole numbers (channels, height, width)"),
        mean=read("mean", numbers, "a list of numbers"),
        std=read("std", numbers, "a list of numbers"),
        classes=read("classes", names, "a list of names"),
        license=read("license", text, "a name"),
        interpolation=read("interpolation", filter_name, f"one of {', '.join(_INTERPOLATIONS)}"),
        crop_pct=read("crop_pct", share, "a number above 0 and at most 1"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UnavailableError: the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnavailableError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnavailableError(f"{path} is not readable JSON ({_brief(error)}).") from error
    if not isinstance(content, dict):
        raise UnavailableError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file and what it, or a JSON file of the same name, says about its model.

    Raises:
        UnavailableError: the file is missing, cut short, not a checkpoint, or a pickle that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise UnavailableError(f"The weights file {path} {what}.")
    try:
        if path.suffix.lower() == ".safetensors":
            raw, metadata = _read_safetensors(path)
        else:
            raw, metadata = _read_pickle(path)
        digest = sha256_file(path)
    except PermissionError as error:
        raise UnavailableError(f"{path} may not be read (permission denied).") from error
    if not raw:
        raise UnavailableError(f"{path} holds no tensors.")
    facts = parse_facts(metadata, str(path)).over(_beside(path))
    return Checkpoint(path=path, tensors=strip_prefixes(raw), raw=raw, facts=facts, sha256=digest)


def _beside(path: Path) -> ModelFacts:
    """The facts in a JSON file of the same name (``x.json`` beside ``x.pth`` or ``x.pth.tar``)."""
    stems = {path.with_suffix(".json"), path.with_name(path.name.split(".")[0] + ".json")}
    for candidate in sorted(stems, key=lambda p: -len(p.name)):
        if candidate.is_file():
            return parse_facts(read_json(candidate), str(candidate))
    return ModelFacts()


def _brief(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160].rstrip(". ")


def _pointer_hint(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(64).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return " It is a Git LFS pointer: fetch the file itself with `git lfs pull`."
    if head[:1] == b"<":
        return " It looks like a web page: download the file itself."
    return " Download or save it again."


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, *_BROKEN_PICKLE) as error:
        if isinstance(error, PermissionError):
            raise
        raise UnavailableError(
            f"{path} is not a whole safetensors file ({_brief(error)}).{_pointer_hint(path)}"
        ) from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _refuse_bomb(path, _unpacked_size(path))
    try:
        # timm's training checkpoints hold their arguments as a Namespace, which is data. torch warns of odd files
        # before it fails on them; the failure is told below.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported class ([\w.]+)", str(error))
        if wanted is None:
            raise UnavailableError(f"{path} is not a PyTorch checkpoint.{_pointer_hint(path)}") from error
        raise UnavailableError(
            f"{path} is a pickle that wants to run code ({wanted[1] or wanted[2]}), which is refused: save its "
            "state_dict() alone, or convert it to safetensors where you trust it."
        ) from error
    except (OSError, *_BROKEN_PICKLE) as error:
        if isinstance(error, PermissionError):
            raise
        if "TorchScript" in str(error):
            raise UnavailableError(
                f"{path} is a TorchScript archive: save the model's state_dict() instead."
            ) from error
        raise UnavailableError(
            f"{path} is not a whole PyTorch checkpoint ({_brief(error)}).{_pointer_hint(path)}"
        ) from error
    if not isinstance(content, Mapping):
        raise UnavailableError(f"{path} holds a {type(content).__name__}, not a state_dict: save model.state_dict().")
    metadata = {
        key: value for key, value in content.items() if isinstance(key, str) and not isinstance(value, Tensor | Mapping)
    }
    args = content.get("args")
    if isinstance(args, argparse.Namespace) and isinstance(getattr(args, "model", None), str):
        metadata.setdefault("architecture", args.model)
    tensors = _unwrap(content)
    if not tensors:
        keys = ", ".join(sorted(str(k)[:60] for k in content)[:6]) or "nothing"
        raise UnavailableError(f"{path} holds no tensors where a checkpoint has them (its keys: {keys}).")
    for name, tensor in tensors.items():
        if (kind := _unusual(tensor)) is not None:
            raise UnavailableError(f"{path} holds {name} as a {kind} tensor: save it as a plain one.")
    _refuse_bomb(path, sum(tensor.nbytes for tensor in tensors.values()))
    return tensors, {k: v for k, v in metadata.items() if k in _PICKLE_FACTS}


#: Other entries of a training checkpoint ("epoch", "args", ...) are not about the model.
_PICKLE_FACTS = (
    "architecture", "arch", "num_classes", "input_size", "mean", "std", "classes", "class_names", "license",
)  # fmt: skip


#: Wrappers within wrappers; a pickle can hold itself.
_MOST_WRAPPERS = 8
#: How much larger than its file a checkpoint may be: tensors that are tied have one memory and several names.
_MOST_GROWTH = 8


def _unpacked_size(path: Path) -> int:
    """Bytes in a zip archive, which is what torch saves (uncompressed); 0 for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, *_BROKEN_PICKLE):  # what is wrong with it is told by torch
        return 0


def _refuse_bomb(path: Path, size: int) -> None:
    """Refuse a file that is compressed, or whose tensors repeat one number, until they fill the memory."""
    if size > _MOST_GROWTH * max(path.stat().st_size, 2**20):
        raise UnavailableError(
            f"{path} would become {size / 2**30:,.1f} GiB, many times its size: save the network's state_dict() again."
        )


def _unusual(tensor: Tensor) -> str | None:
    """What kind of tensor it is, where no network's weights can be made of it."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_complex():
        return "complex"
    return None if tensor.device.type == "cpu" else str(tensor.device.type)


def _unwrap(content: Mapping[Any, Any], depth: int = 0) -> dict[str, Tensor]:
    """The innermost mapping of names to tensors."""
    for wrapper in _WRAPPERS if depth < _MOST_WRAPPERS else ():
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and (tensors := _unwrap(inner, depth + 1)):
            return tensors
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off wrapper prefixes, in any order and number, where they stand on every name."""
    stripped = dict(tensors)
    # torch.optim.swa_utils.AveragedModel counts its averages beside the wrapped module.
    if "n_averaged" in stripped and any(name.startswith("module.") for name in stripped):
        del stripped["n_averaged"]
    while stripped:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            break
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    # A compiled submodule leaves its mark in the middle of a name.
    return {name.replace("._orig_mod.", "."): value for name, value in stripped.items()}


def misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Say how ``tensors`` differ from what ``module`` needs, or None when every one of them fits.

    BatchNorm's ``num_batches_tracked`` may be missing: nothing that is computed here depends on it.
    """
    wanted = module.state_dict()
    missing = [n for n in wanted if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in tensors if n not in wanted]
    shapes = [
        f"{n} (model {_shape(wanted[n])}, file {_shape(tensors[n])})"
        for n in wanted
        if n in tensors and wanted[n].shape != tensors[n].shape
    ]
    parts = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    return "; ".join(parts) or None


def _shape(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "scalar"


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def load_exactly(
    module: nn.Module, checkpoint: Checkpoint, *, what: str, error: type[FastDFKDError], hint: str
) -> None:
    """Load a checkpoint into a module so that every tensor of the module comes from the file.

    Args:
        module: changed in place.
        checkpoint: its names are tried as they stand in the file and without wrapper prefixes.
        what: the architecture, for the message.
        error: raised with the first few tensors that do not fit.
        hint: what to do then.
    """
    problem = None
    for tensors in (checkpoint.tensors, checkpoint.raw):
        found = misfit(module, tensors)
        if found is None:
            # Strict but for num_batches_tracked: misfit() has compared all the other names and shapes.
            module.load_state_dict(tensors, strict=False)
            return
        problem = problem or found
    raise error(f"{checkpoint.path} does not fit {what}: {problem}. {hint}".rstrip())


def require_finite(module: nn.Module, what: str) -> None:
    """Refuse a model with NaN or infinite weights or statistics.

    Raises:
        UnavailableError: naming the first few such tensors.
    """
    bad = [
        name
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise UnavailableError(f"{what} has NaN or infinite values in {_first(bad)}: it cannot be used as it is.")


__all__ = [
    "WEIGHT_SUFFIXES",
    "Checkpoint",
    "ModelFacts",
    "load_exactly",
    "misfit",
    "parse_facts",
    "read_checkpoint",
    "read_json",
    "require_finite",
    "strip_prefixes",
]
