"""A student as timm and the Hub read it: weights, ``config.json`` and a model card, and the proof that they work.

``timm.create_model("local-dir:DIR", pretrained=True)`` opens the folder (after ``import fastdfkd_cli.nets_cifar`` for
the networks that timm does not know). A student that timm cannot build, torchvision's or the user's own, is written
with ``"architecture": null`` and how it was built; its weights load into that network with ``load_state_dict``.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdfkd_cli import __version__
from fastdfkd_cli.errors import FastDFKDError, UnavailableError
from fastdfkd_cli.models import LoadedModel, LogitsOnly, Normalized
from fastdfkd_cli.models.files import unwrapped
from fastdfkd_cli.nets_cifar import REGISTRY_PREFIX
from fastdfkd_cli.output import OWNER_KEY, one_line, plain_json, safe_code, safe_text, write_bytes, write_json
from fastdfkd_cli.pictures import write_samples

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
#: Largest difference of two logits, relative to the largest logit, that passes for equal: other kernels, not other
#: weights. On one machine it is 0.
TOLERANCE = 1e-6

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
#: What timm's configuration of the architecture says of its structure, and the student keeps.
_STRUCTURE = ("first_conv", "classifier", "fixed_input_size")


def plain_module(module: nn.Module) -> nn.Module:
    """Return the network itself, without what was put around it (compilation, data parallelism, our adapters)."""
    while True:
        inner = unwrapped(module)
        if isinstance(inner, LogitsOnly | Normalized):
            inner = inner.module
        if inner is module:
            return module
        module = inner


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The network's state on the CPU: contiguous, each tensor with memory of its own, floats in float32."""
    result = {}
    for name, tensor in plain_module(module).state_dict().items():
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        plain = tensor.detach().to("cpu", kind, copy=True).contiguous()
        if plain.is_floating_point() and not torch.isfinite(plain).all():
            raise FastDFKDError(
                f"The student's {name} is not finite, so it is not exported: lower distillation.lr and run again."
            )
        result[name] = plain
    return result


def _student_license(student: LoadedModel, teacher: LoadedModel | None) -> str | None:
    """The licence that all weights behind the student were given under; None where that is not known or not one."""
    stated = {teacher.license} if teacher is not None else set()
    if student.pretrained:
        stated.add(student.license)
    return stated.pop() if len(stated) == 1 else None


def _config(student: LoadedModel, teacher: LoadedModel | None) -> dict[str, Any]:
    """The content of ``config.json``."""
    module = plain_module(student.module)
    spec = student.input
    source = getattr(module, "pretrained_cfg", None) if student.architecture is not None else None
    structure = {name: source[name] for name in _STRUCTURE if name in source} if source else {}
    license = _student_license(student, teacher)
    config: dict[str, Any] = {
        "architecture": student.architecture,
        "num_classes": student.num_classes,
        "num_features": getattr(module, "num_features", None),
        "pretrained_cfg": {
            **structure,
            "input_size": spec.size,
            "mean": spec.mean,
            "std": spec.std,
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
            "crop_mode": spec.crop_mode,
            "num_classes": student.num_classes,
            # Which pool the head needs depends on the size; timm reads it for information only.
            "pool_size": None,
            **({"license": license} if license else {}),
        },
    }
    if student.class_names is not None:
        config["label_names"] = student.class_names
    if student.model_args:
        config["model_args"] = dict(student.model_args)
    if student.architecture is None:
        config[OWNER_KEY] = {"version": __version__, "reference": student.reference, "name": student.name}
    return config


def _metadata(student: LoadedModel, teacher: LoadedModel | None, report: Mapping[str, Any]) -> dict[str, str]:
    """The text pairs in the weights file: enough to load it by itself, and where it comes from."""
    spec, settings = student.input, dict(report.get("config") or {})
    # A user's file:function is left out: a weights file must not name code that somebody else's machine would run.
    architecture = student.architecture or (student.name if student.source == "torchvision" else None)
    values: dict[str, Any] = {
        "format": "pt",
        "fastdfkd_version": __version__,
        "architecture": architecture.split(".")[0] if architecture and not student.architecture else architecture,
        "num_classes": student.num_classes,
        "input_size": spec.size,
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "classes": student.class_names,
        "license": _student_license(student, teacher),
        "teacher": teacher.name if teacher is not None else None,
        "teacher_revision": teacher.revision if teacher is not None else None,
        "teacher_sha256": teacher.weights_sha256 if teacher is not None else None,
        "recipe": settings.get("recipe"),
        "seed": settings.get("seed"),
        "config": settings or None,
    }
    return {
        name: _writable(value if isinstance(value, str) else json.dumps(plain_json(value), ensure_ascii=False))
        for name, value in values.items()
        if value is not None
    }


def _writable(text: str) -> str:
    """A file name that is not UTF-8 holds halves of characters: they become escapes (JSON's own, in JSON)."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their names, so that one student is one file.

    The library keeps them in a table whose order changes from process to process.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(text) > size:  # written with fewer escapes than ours: as it was
        return content
    return content[:8] + text.ljust(size) + content[8 + size :]


def export_student(
    student: LoadedModel, directory: str | Path, *, teacher: LoadedModel | None, report: Mapping[str, Any]
) -> None:
    """Write ``model.safetensors``, ``config.json`` and the model card ``README.md`` into an existing folder.

    Args:
        student: the trained student; compiled, wrapped, half-precision and channels-last ones are written plain. It is
            left as it is.
        directory: the folder.
        teacher: what it was distilled from; None for a network that learned from labels.
        report: the run's report. Read, all optional: ``config`` (with ``recipe`` and ``seed``), ``command``,
            ``images``, ``kd_steps`` or ``steps``, ``seconds``, ``quality``, ``validation``, ``evaluation``. Without a
            teacher, ``data`` (with ``path`` and ``split``) is needed.

    Raises:
        FastDFKDError: a weight is not finite, the configuration cannot be written as JSON, or the disk is full.
    """
    folder = Path(directory)
    try:
        config = plain_json(_config(student, teacher))
        json.dumps(config)
    except TypeError as error:
        raise FastDFKDError(f"{student.name} cannot be exported: an argument of it is not JSON ({error}).") from error
    content = safetensors.torch.save(_tensors(student.module), _metadata(student, teacher, report))
    write_bytes(folder / WEIGHTS, _ordered(content))
    write_json(folder / CONFIG, config)
    write_bytes(folder / CARD, model_card(student, teacher, report).encode("utf-8"))


# The model card


def _base_model(model: LoadedModel) -> str | None:
    """The Hub repository that a model is, or None."""
    if model.source == "hub":
        name = model.name.removeprefix("hf-hub:").split("@")[0]
    elif model.source == "timm" and model.pretrained:
        name = model.name
    else:
        return None
    return name if _REPOSITORY.fullmatch(name) else None


def _front_matter(student: LoadedModel, teacher: LoadedModel | None, *, data_free: bool) -> str:
    license = _student_license(student, teacher)
    tags = ["image-classification"]
    tags += ["knowledge-distillation"] if teacher is not None else []
    tags += ["data-free"] if data_free else []
    values: dict[str, Any] = {
        "tags": tags,
        "pipeline_tag": "image-classification",
    }
    if student.architecture is not None:
        values["library_name"] = "timm"
        values["tags"].insert(1, "timm")
    bases = [_base_model(model) for model in (teacher, student if student.pretrained else None) if model is not None]
    known = [base for base in bases if base is not None]
    if known:
        values["base_model"] = known[0] if len(known) == 1 else known
    if license is not None and _LICENSE.fullmatch(license):
        values["license"] = license
    elif license is not None:
        values |= {"license": "other", "license_name": one_line(license)}
    return f"---\n{ModelCardData(**values).to_yaml()}\n---\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = ["| | |", "| --- | --- |"]
    lines += [f"| {safe_text(name)} | {safe_text(value)} |" for name, value in rows.items()]
    return "\n".join(lines)


def _number(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _scalars(values: Any) -> Iterator[tuple[str, Any]]:
    """The plain figures of a report's section."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                yield str(name).replace("_", " "), _number(value)


def _how_to_load(student: LoadedModel) -> str:
    channels, height, width = student.input.size
    feed = (
        f"# logits = model((images - mean) / std) for images [B, {channels}, {height}, {width}] in [0, 1], with\n"
        f"# mean {tuple(student.input.mean)} and std {tuple(student.input.std)}\n"
    )
    if student.architecture is not None:
        ours = student.architecture.startswith(REGISTRY_PREFIX)
        first = (
            "import fastdfkd_cli.nets_cifar  # tells timm of this network; part of the program fastdfkd\n"
            if ours
            else ""
        )
        code = (
            f"{first}import timm\n\n"
            'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()\n'
        )
        return f"```python\n{code}{feed}```"
    if student.source == "torchvision":
        name = student.name.removeprefix("torchvision/").split(".")[0]
        build = (
            f"import torchvision\n\nmodel = torchvision.models.get_model({name!r}, num_classes={student.num_classes})"
        )
    else:
        build = f"model = ...  # the network that the run was given as {one_line(student.reference)!r}"
    code = (
        f"from safetensors.torch import load_file\n{build}\n"
        f'model.load_state_dict(load_file("PATH/TO/THIS/FOLDER/{WEIGHTS}"))\nmodel.eval()\n'
    )
    return f"timm cannot build this network; its weights load into a new one.\n\n```python\n{code}{feed}```"


def _made_from(model: LoadedModel) -> str:
    parts = [safe_code(model.name)]
    if model.revision and model.revision not in model.name:
        parts.append(f"revision {safe_code(model.revision)}")
    if model.weights_sha256:
        parts.append(f"SHA-256 of its weights {safe_code(model.weights_sha256)}")
    return ", ".join(parts)


def _license_text(student: LoadedModel, teacher: LoadedModel | None) -> str:
    license = _student_license(student, teacher)
    if license is not None:
        return f"The weights it was made from are published under {safe_code(license)}, which is stated here too."
    if teacher is None:
        return "Whether and how these weights may be shared depends on the images; the program does not know it."
    if teacher.license is None:
        return "The teacher's licence is not known to the program; find it out before you share these weights."
    return (
        f"The teacher is published under {safe_code(teacher.license)}; the student's own initial weights under "
        f"{safe_code(student.license) if student.license else 'terms not known to the program'}."
    )


#: What a method is called, and where it was published.
_METHODS = {
    "fast": "FastDFKD (Fang et al., *Up to 100x Faster Data-Free Knowledge Distillation*, AAAI 2022)",
    "deepinversion": "DeepInversion (Yin et al., *Dreaming to Distill*, CVPR 2020)",
    "cmi": "CMI (Fang et al., *Contrastive Model Inversion for Data-Free Knowledge Distillation*, IJCAI 2021)",
    "dafl": "DAFL (Chen et al., *Data-Free Learning of Student Networks*, ICCV 2019)",
    "zskt": "ZSKT (Micaelli & Storkey, *Zero-shot Knowledge Transfer via Adversarial Belief Matching*, NeurIPS 2019)",
    "dfq": "DFQ (Choi et al., *Data-Free Network Quantization With Adversarial Knowledge Distillation*, CVPRW 2020)",
    "dfad": "DFAD (Fang et al., *Data-Free Adversarial Distillation*, 2019)",
    "dfnd": "DFND (Chen et al., *Learning Student Networks in the Wild*, CVPR 2021)",
    "generative-dfd": "Generative DFD (Luo et al., *Large-Scale Generative Data-Free Distillation*, 2020)",
    "nayer": "NAYER (Tran et al., *Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge "
    "Distillation*, CVPR 2024)",
}


def _synthesised_by(settings: Mapping[str, Any], data: Mapping[str, Any] | None) -> str:
    """The method that made the images: the run's, or that of the set it was given."""
    if data is not None:
        header = data.get("header")
        made_with = header.get("config") if isinstance(header, Mapping) else None
        settings = made_with if isinstance(made_with, Mapping) else {}
    method = settings.get("method", "fast")
    known = _METHODS.get(method) if isinstance(method, str) else None
    return known or f"the method {safe_code(method)}"


def model_card(student: LoadedModel, teacher: LoadedModel | None, report: Mapping[str, Any]) -> str:
    """Return the model card: front matter for the Hub, what it is, how to load it, how it was made, what is known.

    Everything that comes from elsewhere (names, references, settings) is escaped.
    """
    settings = report.get("config") or {}
    made: dict[str, Any] = {
        "method": settings.get("method"),
        "recipe": settings.get("recipe"),
        "seed": settings.get("seed"),
        "images": report.get("images"),
        "distillation steps": report.get("kd_steps"),
        "training steps": report.get("steps"),
    }
    made |= {f"seconds, {name}": value for name, value in _scalars(report.get("seconds"))}
    data = report.get("data")
    if teacher is None:
        title = f"# {safe_text(student.name)}, trained on labelled images"
        about = "An image classifier that was trained from scratch on images and their labels, without a teacher."
    elif data is None or data["synthetic"]:
        title = f"# {safe_text(student.name)}, distilled from {safe_text(teacher.name)} without its data"
        about = (
            "An image classifier that learned from its teacher alone: no real image was used. Images were synthesised "
            f"from the teacher by {_synthesised_by(settings, data)}."
        )
    else:
        title = f"# {safe_text(student.name)}, distilled from {safe_text(teacher.name)}"
        about = "An image classifier that learned its teacher's answers on given images; labels were not used."
        if data.get("candidates") is not None:
            about = (
                f"An image classifier that learned its teacher's answers on those of {data['candidates']:,} unlabelled "
                f"images of which the teacher is surest, by {_METHODS['dfnd']}."
            )
    parts = [
        _front_matter(student, teacher, data_free=teacher is not None and (data is None or data["synthetic"])),
        title,
        about,
        _table(
            {
                "parameters": f"{sum(p.numel() for p in plain_module(student.module).parameters()):,}",
                "classes": student.num_classes,
                "input (channels, height, width)": ", ".join(map(str, student.input.size)),
            }
        ),
        "## How to load it",
        _how_to_load(student),
        "## How it was made",
    ]
    if teacher is not None:
        parts.append(f"Teacher: {_made_from(teacher)}.")
    if student.pretrained:
        parts.append(f"The student started from {_made_from(student)}.")
    if data is not None:
        split = f", split {safe_code(data['split'])}" if data.get("split") else ""
        parts.append(f"Images: {safe_code(data['path'])}{split}.")
    parts.append(_table({name: value for name, value in made.items() if value is not None}))
    parts.append(f"Program: fastdfkd {safe_text(__version__)}. All settings are in the metadata of `{WEIGHTS}`.")
    quality = dict(_scalars(report.get("quality")))
    if quality:
        parts += [
            "## What is known of it without real data",
            "Read off fresh synthetic images that the student never saw; this is no accuracy on real images.",
            _table(quality),
        ]
    validation = dict(_scalars(report.get("validation")))
    if validation:
        parts += [
            "## On images kept back from training",
            "Of the same set; looked at while it was trained, and deciding nothing.",
            _table(validation),
        ]
    evaluation = dict(_scalars(report.get("evaluation")))
    parts.append("## On real images")
    parts.append(_table(evaluation) if evaluation else "Not measured: `fastdfkd evaluate` does it, given some.")
    parts += ["## Licence", _license_text(student, teacher)]
    return "\n\n".join(parts) + "\n"


# The proof


@torch.no_grad()
def _logits(module: nn.Module, student: LoadedModel, images: Tensor) -> Tensor:
    # On the CPU whatever `torch.autocast` or deterministic setting is on around: a stranger has none of it.
    with torch.autocast("cpu", enabled=False):
        return Normalized(module, student.input.mean, student.input.std)(images).float()


def _reopened(folder: Path, student: LoadedModel) -> nn.Module:
    """The exported network, from the folder alone where timm can build it."""
    if student.architecture is not None:
        with torch.random.fork_rng(devices=[]):  # building draws random weights; the run's numbers stay its own
            module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
        read: dict[str, Any] = dict(vars(module)["pretrained_cfg"])
        found = {name: read.get(name) for name in ("input_size", "mean", "std", "num_classes")}
        wanted = plain_json(_config(student, student)["pretrained_cfg"])
        differing = [name for name in found if plain_json(found[name]) != wanted[name]]
        if differing:
            raise FastDFKDError(f"timm reads another {differing[0]} from {folder / CONFIG} than was written.")
        return module
    module = copy.deepcopy(plain_module(student.module)).to("cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))  # whatever the file does not bring shows in the logits
    module.float().load_state_dict(safetensors.torch.load_file(folder / WEIGHTS), strict=True)
    return LogitsOnly(module)


def load_exported(directory: str | Path, student: LoadedModel) -> None:
    """Give ``student`` the weights that :func:`export_student` wrote for one like it; it is in evaluation mode then.

    Raises:
        UnavailableError: the file is damaged, or of another network.
    """
    path = Path(directory) / WEIGHTS
    try:
        plain_module(student.module).load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UnavailableError(f"{path} cannot be read: {one_line(error)}.") from error
    student.module.eval()


def verify_export(directory: str | Path, student: LoadedModel, images: Tensor) -> float:
    """Open the exported folder as a stranger would, and compare its logits with the student's.

    Both run on the CPU, in float32 and evaluation mode. The student is left as it is.

    Args:
        directory: what :func:`export_student` wrote.
        student: what was exported.
        images: ``[B, C, H, W]``, uint8 or floats in [0, 1].

    Returns:
        The largest absolute difference between two logits.

    Raises:
        FastDFKDError: the folder cannot be opened, or gives other logits.
    """
    folder = Path(directory)
    images = images.detach().to("cpu")
    # A copy with plain memory: a channels-last network runs other kernels, which round otherwise.
    trained = copy.deepcopy(plain_module(student.module)).to("cpu").float().to(memory_format=torch.contiguous_format)
    try:
        reopened = _reopened(folder, student)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FastDFKDError(f"The exported student in {folder} cannot be opened: {one_line(error)}") from error
    expected = _logits(LogitsOnly(trained).eval(), student, images)
    found = _logits(reopened.eval(), student, images)
    if found.shape != expected.shape:
        raise FastDFKDError(f"The exported student in {folder} has {found.shape[1]} outputs, not {expected.shape[1]}.")
    difference = (found - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():  # written so that NaN fails
        raise FastDFKDError(
            f"The exported student in {folder} gives other logits than the trained one (by {float(difference):.3g}); "
            "the export is not kept."
        )
    return float(difference)


__all__ = ["export_student", "load_exported", "model_card", "plain_module", "verify_export", "write_samples"]
