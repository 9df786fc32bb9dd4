"""Models with weights in timm's format: its registry, Hub repositories, folders with a config.json."""

from __future__ import annotations

import contextlib
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn

from fastdfkd_cli import architectures as arch
from fastdfkd_cli.architectures import Architecture, one_line
from fastdfkd_cli.errors import UnavailableError, UsageError
from fastdfkd_cli.hub import HubFile, HubFileMissing, hub_file, refuse_offline, split_revision
from fastdfkd_cli.models.spec import (
    LoadedModel,
    ModelOptions,
    Source,
    config_input,
    flag,
    input_spec,
    refuse,
    require_same_channels,
    require_same_classes,
    stated_size,
)
from fastdfkd_cli.nets_cifar import REGISTRY_PREFIX
from fastdfkd_cli.weights import (
    WEIGHT_SUFFIXES,
    Checkpoint,
    ModelFacts,
    misfit,
    parse_facts,
    read_checkpoint,
    read_json,
)

#: What in ``model_args`` is no argument of a network, but tells timm to read other files or to ask a server.
_LOADING = re.compile(r"pretrained.*|checkpoint_path|cache_dir")
#: How torchvision's files are called, as torch.hub reads it.
_STATED_HASH = re.compile(r"-([a-f0-9]{8,64})\.")
_CROP_MODES = ("center", "squash", "border")
#: Weights in a Hub repository or a folder, in the order timm looks for them.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


def build_verified(key: str, checkpoint: Checkpoint, config: dict[str, Any], what: str, **arguments: Any) -> nn.Module:
    """Build a registry network with a checkpoint's weights, renamed as timm does for it; nothing may stay random.

    timm's loading goes through code of each architecture that renames, cuts and resizes, and drops what does not
    fit without an error where classes differ. So the same load runs once more with every value replaced by NaN:
    whatever is not NaN afterwards did not come from the file.
    """
    _refuse_larger(key, checkpoint, config, what, arguments)
    try:
        module = arch.build_registry(key, config=config, tensors=dict(checkpoint.tensors), **arguments)
        blank = {
            name: torch.full_like(t, float("nan")) if t.is_floating_point() else t
            for name, t in checkpoint.tensors.items()
        }
        probe = arch.build_registry(key, config=config, tensors=blank, **arguments)
    except (RuntimeError, LookupError, AttributeError) as error:
        # timm's renaming code meets names it does not expect in many ways; the names themselves say most.
        problem = None
        with contextlib.suppress(UsageError, LookupError, AttributeError):  # arguments that the network does not take
            problem = misfit(arch.build_registry(key, config=config, **arguments), checkpoint.tensors)
        problem = problem or one_line(error)
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


def _refuse_larger(
    key: str, checkpoint: Checkpoint, config: dict[str, Any], what: str, arguments: Mapping[str, Any]
) -> None:
    """Refuse to build a network that cannot be in the file, however many classes and layers its config.json states."""
    try:
        with torch.device("meta"):
            plain = arch.build_registry(key, config=config, **arguments)
    except (UsageError, LookupError, AttributeError, NotImplementedError):
        return  # not every network can be built without its memory; others are told of below
    needed = sum(tensor.numel() for tensor in plain.state_dict().values())
    held = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    # Embeddings that depend on the image's size may grow.
    if needed > 2 * held + 2**24:
        raise UnavailableError(
            f"{checkpoint.path} does not fit {what}: it holds {held:,} values, and that network {needed:,}."
        )


@dataclass(frozen=True, kw_only=True)
class Described:
    """A config.json in timm's format, or an entry of timm's registry."""

    key: str
    config: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)


def _described(path: Path, origin: str) -> Described:
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
    if loading := [name for name in model_args if _LOADING.fullmatch(name)]:
        raise UnavailableError(f"{origin}: model_args in config.json may describe a network, not {loading[0]}.")
    defaults = Architecture(family="timm", name=key, key=key).config()
    headless = config.get("num_classes") == 0  # said so by the caller, with the model's name
    skipped = {"label_names", "num_classes"} if headless else {"label_names"}
    facts = parse_facts({k: v for k, v in config.items() if k not in skipped}, origin)
    size = facts.input_size or tuple(defaults.get("input_size", (3, 224, 224)))
    # Some write these two as arguments of the network: checked like the others, and 0 classes are no head.
    channels = model_args.pop("in_chans", size[0])
    classes = model_args.pop("num_classes", 0 if headless else facts.num_classes or 1000)
    checked = parse_facts({"input_size": [channels, *size[1:]], "num_classes": classes or None}, origin)
    at_test = {"input_size": config.get("test_input_size"), "crop_pct": config.get("test_crop_pct")}
    tested = parse_facts(at_test, f"{origin} (for tests)")
    values = {
        "architecture": key,
        "input_size": checked.input_size,
        "num_classes": checked.num_classes or 0,
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct,
        "crop_mode": mode if (mode := config.get("crop_mode")) in _CROP_MODES else None,
        "test_input_size": tested.input_size,
        "test_crop_pct": tested.crop_pct,
        "license": facts.license,
    }
    config |= {name: value for name, value in values.items() if value is not None or name in config}
    for name in ("first_conv", "classifier"):
        if not _names_layers(config.get(name)):
            config[name] = None
    for name in ("first_conv", "classifier", "fixed_input_size", "mean", "std"):
        if config.get(name) is None and name in defaults:
            config[name] = defaults[name]
    for name in ("url", "file", "hf_hub_id", "hf_hub_filename", "source"):
        config.pop(name, None)
    return Described(key=key, config=config, model_args=model_args)


def _names_layers(value: Any) -> bool:
    """Whether it is a layer's name, or several."""
    return all(isinstance(name, str) for name in (value if isinstance(value, list | tuple) and value else [value]))


def class_names(names: Any, num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes where there is one for each; a dict maps label to name or index to name."""
    if isinstance(names, Mapping):
        names = list(names.values())
    if isinstance(names, list | tuple) and len(names) == num_classes:
        return tuple(str(name) for name in names)
    return None


def load_described(
    described: Described,
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
    usual = config_input(config)
    require_same_classes(options.num_classes, num_classes, name, role)
    require_same_channels(options.input_size, usual.size[0], name, role)
    size = stated_size(options, like, usual.size)
    arguments = {**described.model_args, **arch.registry_arguments(config, size)}
    module = build_verified(
        described.key, checkpoint, config, name, num_classes=num_classes, in_chans=usual.size[0], **arguments
    )
    return LoadedModel(
        module=module,
        reference=reference,
        name=name,
        source=source,
        input=input_spec(size, options, ModelFacts(), usual, role),
        num_classes=num_classes,
        architecture=described.key,
        model_args=arguments,
        class_names=class_names(config.get("label_names"), num_classes) or checkpoint.facts.classes,
        revision=revision,
        weights_sha256=checkpoint.sha256,
        license=config.get("license") or license or checkpoint.facts.license,
        pretrained=True,
    )


def _hub_weights(repo: str, revision: str | None, filename: str | None = None) -> HubFile:
    for candidate in [filename] if filename else WEIGHT_NAMES:
        try:
            return hub_file(repo, candidate, revision)
        except HubFileMissing:
            continue
    written = f"{repo}@{revision}" if revision else repo
    raise UnavailableError(f"The Hub repository {written} has no weights ({', '.join(WEIGHT_NAMES[:2])}).")


def _card_license(repo: str, revision: str | None) -> str | None:
    """The licence in the front matter of a repository's model card, where there is one."""
    try:
        card = hub_file(repo, "README.md", revision).path.read_text(encoding="utf-8", errors="replace")
    except UnavailableError:
        return None  # without a card, nothing is known and nothing is claimed
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def load_hub(written: str, options: ModelOptions, reference: str, role: str, like: LoadedModel | None) -> LoadedModel:
    refuse(options, reference, role, "arch", "weights", why="its config.json and its own weights are used")
    repo, revision = split_revision(written)
    config = _hub_config(repo, revision)
    commit = config.commit or revision  # config and weights of one commit, even when someone pushes in between
    name = f"hf-hub:{repo}" + (f"@{commit}" if commit else "")
    described = _described(config.path, f"hf-hub:{written}")
    checkpoint = read_checkpoint(_hub_weights(repo, commit).path)
    return load_described(
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


def _hub_config(repo: str, revision: str | None) -> HubFile:
    try:
        return hub_file(repo, "config.json", revision)
    except HubFileMissing as error:
        raise UnavailableError(
            f"The Hub repository {repo} has no config.json: only repositories in timm's format can be loaded by name."
        ) from error


def load_folder(
    folder: Path, options: ModelOptions, reference: str, role: str, like: LoadedModel | None, file: Path | None = None
) -> LoadedModel:
    refuse(options, reference, role, "arch", "weights", why="its config.json and its own weights are used")
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise UnavailableError(f"The model folder {folder} {what}.")
    described = _described(folder / "config.json", str(folder))
    found = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    found += [path for suffix in WEIGHT_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if not found:
        raise UnavailableError(f"The model folder {folder} has no weights ({', '.join(WEIGHT_NAMES[:2])}).")
    return load_described(
        described,
        read_checkpoint(file or found[0]),
        options,
        reference=reference,
        name=f"local-dir:{folder}",
        source="local-dir",
        role=role,
        like=like,
    )


def load_timm(a: Architecture, options: ModelOptions, reference: str, role: str) -> LoadedModel:
    """timm's registry name with the weights timm has for it."""
    config = a.config()
    hub_id, url = config.get("hf_hub_id"), config.get("url") or ""
    if not hub_id and not url:
        other = _pretrained_names(a.key)
        hint = f" Others of its kind with weights: {', '.join(other)}." if other else ""
        raise UnavailableError(
            f"There are no pretrained weights for {a.name}: give {flag(role, 'weights')} FILE.{hint}"
        )
    name, commit = f"{a.family}/{a.key}", None
    if config.get("tag"):
        name += f".{config['tag']}"
    if hub_id:
        repo, revision = split_revision(hub_id)
        downloaded = _hub_weights(repo, revision, config.get("hf_hub_filename"))
        path, commit = downloaded.path, downloaded.commit
    else:
        path = download(str(url if isinstance(url, str) else url[0]), name)
    return load_described(
        Described(key=a.key, config=config),
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
    return timm.list_pretrained(f"{key.split('_')[0]}*")[:4] if not key.startswith(REGISTRY_PREFIX) else []


def download(url: str, name: str) -> Path:
    """A weights file by URL, kept where torch.hub keeps them; torchvision's by the checksum in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        refuse_offline(f"The weights of {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stated = _STATED_HASH.search(path.name) if url.startswith("https://download.pytorch.org/") else None
            torch.hub.download_url_to_file(url, str(path), stated[1] if stated else None, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another file than stated
            raise UnavailableError(
                f"The weights of {name} cannot be downloaded from {url}: {one_line(error)}"
            ) from error
    return path
