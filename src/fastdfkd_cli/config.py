"""The whole of a run's settings, as frozen dataclasses that check themselves.

A :class:`RunConfig` has four sections (``synthesis``, ``generator``, ``distillation``, ``schedule``) and a few
fields of its own. What ``synthesis`` holds depends on the method (:mod:`fastdfkd_cli.method_config`). Every field is
reachable from the command line as ``--set section.field=value`` and from a YAML or JSON file with the same nesting.
:mod:`fastdfkd_cli.recipes` builds the named ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from fastdfkd_cli.errors import UsageError, brief, did_you_mean
from fastdfkd_cli.method_config import (
    SETTINGS,
    Augmentation,
    Method,
    MethodConfig,
    SynthesisConfig,
    at_most,
    below_one,
    non_negative,
    positive,
    require,
)

GeneratorKind = Literal["linear", "map"]
Average = Literal["none", "ema"]
Init = Literal["random", "weight-selection"]
Loss = Literal["kl", "l1"]


MethodT = TypeVar("MethodT", bound=MethodConfig)


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The latent -> image network (built for the teacher's input size and channels)."""

    #: A vector z through a linear layer (32x32 recipes), or a map of z through convolutions alone (224x224).
    kind: GeneratorKind = "linear"
    #: Channels of z.
    latent_dim: int = 256
    #: Channels of the widest layer; the last block has half of them.
    width: int = 128
    #: How many times the map is doubled on the way to the image.
    upsamplings: int = 2

    def __post_init__(self) -> None:
        positive(self, "generator", "latent_dim", "upsamplings")
        require(self.width >= 2, "generator.width", self.width, "2 or more")
        at_most(self, "generator", 2**16, "latent_dim", "width")
        require(self.upsamplings <= 6, "generator.upsamplings", self.upsamplings, "6 or less")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the student learns from the pool (the paper's Eq. 12)."""

    #: What the student begins with: weights drawn at random, or a selection of a larger relative's, the teacher's.
    init: Init = "random"
    #: Images per KD step.
    batch_size: int = 256
    #: What the student descends on: Eq. 12's KL divergence, or the mean absolute difference of the logits (DFAD's).
    loss: Loss = "kl"
    #: Softening of both outputs in the KL divergence, which is multiplied by its square.
    temperature: float = 20.0
    #: SGD's learning rate at the start of the cosine.
    lr: float = 0.2
    #: The learning rate at the end of the cosine.
    lr_min: float = 2e-4
    #: Share of the KD steps over which the rate rises linearly to ``lr``.
    lr_warmup: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    #: How a pool image is varied before teacher and student see it.
    augmentation: Augmentation = "crop-flip"
    #: Fixed variations of each pool image that the teacher labels once, for all KD steps (0: a fresh one each time,
    #: labelled anew; Shen & Xing, ECCV 2022).
    label_views: int = 0
    #: Probability that an image of a KD step is blended with another, the teacher labelling the mixture (mixup).
    mixup: float = 0.0
    #: Probability that a rectangle of another image is pasted into it, the teacher labelling the result (CutMix).
    cutmix: float = 0.0
    #: Weight of attention transfer, which brings the student's spatial attention maps to the teacher's (ZSKT: 250).
    attention_weight: float = 0.0
    #: Weight of the noisy cross-entropy: the student, through a noise matrix that is learned beside it, against the
    #: teacher's answers (DFND: 1).
    noise_weight: float = 0.0
    #: The noise matrix's diagonal: the teacher's accuracy, as far as it is known (DFND's CIFAR-10 teacher: 0.9523).
    noise_accuracy: float = 0.95
    #: Adam's learning rate for the rest of the noise matrix.
    noise_lr: float = 1e-3
    #: Export the last student, or an exponential moving average of its weights.
    average: Average = "none"
    #: Decay of that average, per KD step.
    average_decay: float = 0.999

    def __post_init__(self) -> None:
        positive(self, "distillation", "batch_size", "temperature", "lr", "noise_lr")
        non_negative(self, "distillation", "lr_min", "weight_decay", "label_views", "attention_weight", "noise_weight")
        require(self.batch_size >= 2, "distillation.batch_size", self.batch_size, "2 or more (batch statistics)")
        at_most(self, "distillation", 2**31, "batch_size", "label_views")
        require(self.lr_min <= self.lr, "distillation.lr_min", self.lr_min, f"at most distillation.lr ({self.lr})")
        below_one(self, "distillation", "momentum", "lr_warmup", "average_decay")
        require(
            self.augmentation != "none" or self.label_views <= 1,
            "distillation.label_views",
            self.label_views,
            "at most 1 with distillation.augmentation=none (every variation would be the same)",
        )
        require(
            not (self.attention_weight and self.label_views),
            "distillation.label_views",
            self.label_views,
            "0 with distillation.attention_weight (kept labels hold no attention maps of the teacher's)",
        )
        for name in ("mixup", "cutmix"):
            require(0 <= getattr(self, name) <= 1, f"distillation.{name}", getattr(self, name), "a probability, 0 to 1")
        require(
            self.mixup + self.cutmix <= 1,
            "distillation.cutmix",
            self.cutmix,
            f"at most 1 less distillation.mixup ({self.mixup}): an image is mixed in one way",
        )
        require(
            not (self.mixes and self.label_views),
            "distillation.label_views",
            self.label_views,
            "0 with distillation.mixup or distillation.cutmix (each mixture is new, and labelled anew)",
        )
        accuracy = self.noise_accuracy
        require(0 < accuracy < 1, "distillation.noise_accuracy", accuracy, "between 0 and 1, both excluded")
        require(not self.nesterov or self.momentum > 0, "distillation.nesterov", self.nesterov, "off without momentum")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other, so that none looks the same twice."""
        return self.mixup + self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long synthesis and distillation go on, and how they interleave."""

    #: Rounds of synthesis followed by KD steps.
    rounds: int = 220
    #: The first rounds, which only synthesise.
    warmup_rounds: int = 20
    #: Batches synthesised per round.
    batches_per_round: int = 1
    #: KD steps per round.
    kd_steps_per_round: int = 400
    #: Rounds without synthesis at the end, of KD steps alone.
    final_rounds: int = 0
    #: Wall-clock seconds for synthesis and distillation; with it, ``rounds`` is only the unit in which
    #: ``warmup_rounds`` and ``final_rounds`` are shares, and the number of rounds follows from the clock.
    time_budget: float | None = None

    def __post_init__(self) -> None:
        positive(self, "schedule", "rounds", "batches_per_round")
        at_most(self, "schedule", 2**31, "rounds", "batches_per_round", "kd_steps_per_round")
        positive(self, "schedule", "kd_steps_per_round")
        non_negative(self, "schedule", "warmup_rounds", "final_rounds")
        require(
            self.warmup_rounds + self.final_rounds < self.rounds,
            "schedule.warmup_rounds + schedule.final_rounds",
            self.warmup_rounds + self.final_rounds,
            f"less than schedule.rounds ({self.rounds})",
        )
        if self.time_budget is not None:
            positive(self, "schedule", "time_budget")

    @property
    def synthesis_rounds(self) -> int:
        """Rounds that synthesise."""
        return self.rounds - self.final_rounds

    @property
    def kd_rounds(self) -> int:
        """Rounds that train the student."""
        return self.rounds - self.warmup_rounds


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result, besides the two models and the machine.

    Raises:
        UsageError: a value is out of its range.
    """

    recipe: str = "custom"
    #: How images are made.
    method: Method = "fast"
    seed: int = 0
    #: Ask torch for deterministic algorithms; two runs on the CPU then end with the same student, bit for bit.
    deterministic: bool = False
    #: Most images kept; the oldest make room for new ones (0: as many as the run makes).
    pool_size: int = 0
    #: Fresh images for the quality signal at the end (0: no signal).
    quality_images: int = 512
    #: Steps in which a batch of them is made.
    quality_steps: int = 100
    #: Of the class that goes with ``method``.
    synthesis: MethodConfig = field(default_factory=SynthesisConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if type(self.synthesis) is not SETTINGS[self.method]:
            raise TypeError(f"{type(self.synthesis).__name__} does not go with the method {self.method}")
        non_negative(self, "config", "seed", "pool_size", "quality_images")
        positive(self, "config", "quality_steps")
        at_most(self, "config", 2**31, "quality_steps")
        require(self.seed < 2**63, "config.seed", self.seed, "below 2**63")
        require(
            self.pool_size == 0 or self.pool_size >= self.synthesis.batch_size,
            "config.pool_size",
            self.pool_size,
            f"0 or at least synthesis.batch_size ({self.synthesis.batch_size})",
        )
        require(
            self.pool_size == 0 or not self.synthesis.feeds,
            "config.pool_size",
            self.pool_size,
            f"0 with the method {self.method} (no image is kept)",
        )
        require(
            not (self.deterministic and self.schedule.time_budget is not None),
            "schedule.time_budget",
            self.schedule.time_budget,
            "unset with --deterministic (the clock is not repeatable)",
        )

    def settings_of(self, kind: type[MethodT]) -> MethodT:
        """The section ``synthesis``, as the class that its method knows it by."""
        if not isinstance(self.synthesis, kind):
            raise TypeError(f"the method {self.method} has no {kind.__name__}")
        return self.synthesis

    @property
    def fast(self) -> SynthesisConfig:
        """The section ``synthesis`` of FastDFKD."""
        return self.settings_of(SynthesisConfig)

    @property
    def synthetic_images(self) -> int:
        """Images that the whole schedule synthesises (without a time budget)."""
        return self.schedule.synthesis_rounds * self.schedule.batches_per_round * self.synthesis.batch_size

    @property
    def pooled_images(self) -> int:
        """Images that the pool has room for, if nothing else limits it: all, or the latest batch where none serve."""
        return self.synthesis.batch_size if self.synthesis.feeds else self.synthetic_images

    @property
    def kd_steps(self) -> int:
        """KD steps of the whole schedule (without a time budget)."""
        return self.schedule.kd_rounds * self.schedule.kd_steps_per_round


#: The classes that a section may have, ``synthesis`` one for each method.
_SECTIONS: dict[str, tuple[type, ...]] = {
    "synthesis": tuple(SETTINGS.values()),
    "generator": (GeneratorConfig,),
    "distillation": (DistillationConfig,),
    "schedule": (ScheduleConfig,),
}


class Rates(Protocol):
    """The settings of a schedule of learning rates."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_min(self) -> float: ...
    @property
    def lr_warmup(self) -> float: ...


def learning_rate(config: Rates, done: float) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``lr_min``; ``done`` is the share of steps taken, 0 to 1."""
    if done < config.lr_warmup:
        return config.lr * max(done / config.lr_warmup, 0.01)
    position = (done - config.lr_warmup) / (1 - config.lr_warmup)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(position, 1.0))) / 2


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested plain values, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def field_names() -> Iterator[str]:
    """Yield every settable key, dotted: ``seed``, ``synthesis.steps``, ...; of ``synthesis``, those of all methods."""
    for item in dataclasses.fields(RunConfig):
        if item.name in _SECTIONS:
            found = (inner.name for owner in _SECTIONS[item.name] for inner in dataclasses.fields(owner))
            yield from (f"{item.name}.{name}" for name in dict.fromkeys(found))
        else:
            yield item.name


def from_dict(values: Mapping[str, Any], *, base: RunConfig | None = None) -> RunConfig:
    """Return ``base`` (default: the defaults) with ``values``, nested or dotted, put in.

    Another ``method`` than the base's brings its own section ``synthesis``, with the base's batch size.

    Raises:
        UsageError: an unknown key (with the nearest ones), a value of the wrong type or out of range.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _SECTIONS:
            if not isinstance(value, Mapping):
                raise UsageError(f"{key} must be a section with keys of its own, not {brief(value)}.")
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[str(key)] = value
    return _apply(base or RunConfig(), flat)


def with_overrides(config: RunConfig, assignments: Mapping[str, str]) -> RunConfig:
    """Return ``config`` with command-line ``key=value`` pairs put in; values are parsed as JSON or as text.

    A key without a section (``steps``) is taken where it is unambiguous.

    Raises:
        UsageError: as :func:`from_dict`.
    """
    return _apply(config, {full_key(key): parse_value(value) for key, value in assignments.items()})


def parse_value(text: str) -> Any:
    """Return what a command line's value means: a JSON value, ``none``, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of ten thousand digits, or as many brackets
        lowered = text.lower()
        return {"none": None, "true": True, "false": False}.get(lowered, text)


def full_key(key: str) -> str:
    """Return the dotted key of ``key``, which may leave its section out where that is unambiguous.

    Raises:
        UsageError: unknown (with the nearest ones) or ambiguous.
    """
    known = list(field_names())
    if key in known:
        return key
    matches = [name for name in known if name.endswith(f".{key}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"{brief(key)} is ambiguous: write {' or '.join(matches)}.")
    raise UsageError(_unknown(key, known))


def _unknown(key: str, known: list[str]) -> str:
    short = {name.rpartition(".")[2]: name for name in known}
    hint = did_you_mean(key, known) or did_you_mean(key.rpartition(".")[2], short)
    return f"Unknown setting {brief(key)}.{hint} `fastdfkd recipes --show NAME` lists them all."


def _apply(config: RunConfig, flat: Mapping[str, Any]) -> RunConfig:
    known = list(field_names())
    flat = dict(flat)
    if "method" in flat:
        method = coerce("method", flat.pop("method"), typing.get_type_hints(RunConfig)["method"])
        if method != config.method:
            section = SETTINGS[method](batch_size=config.synthesis.batch_size)
            kept = 0 if section.feeds else config.pool_size
            config = dataclasses.replace(config, method=method, synthesis=section, pool_size=kept)
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key not in known:
            raise UsageError(_unknown(key, known))
        section_name, _, name = key.rpartition(".")
        owner = type(getattr(config, section_name)) if section_name else RunConfig
        hints = typing.get_type_hints(owner)
        if name not in hints:
            own = ", ".join(item.name for item in dataclasses.fields(owner))
            raise UsageError(f"{key} is no setting of the method {config.method}, which has {own}.")
        checked = coerce(key, value, hints[name])
        if section_name:
            sections.setdefault(section_name, {})[name] = checked
        else:
            top[name] = checked
    for section_name, changes in sections.items():
        top[section_name] = dataclasses.replace(getattr(config, section_name), **changes)
    return dataclasses.replace(config, **top)


def coerce(key: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against a field's type; whole numbers pass as floats, nothing else is bent.

    Args:
        key: the setting, for the message.
        hint: the field's type.

    Raises:
        UsageError: it is of another type.
    """
    options: tuple[Any, ...] = (hint,)
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is Literal:
            choices = typing.get_args(option)
            chosen = "none" if value is None else value  # as YAML, JSON and the command line may write it
            if chosen in choices:
                return chosen
            nearest = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise UsageError(f"{key} must be one of {', '.join(choices)}, not {brief(value)}.{nearest}")
        if option is bool and isinstance(value, bool):
            return value
        if option is str and isinstance(value, str):
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared, not converted: a whole number may be larger than any float.
        if option is float and is_number and abs(value) <= sys.float_info.max:
            return float(value)
        if option is int and is_number and (isinstance(value, int) or value.is_integer()):
            return int(value)
    names = " or ".join(
        {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "none"}[
            option.__name__
        ]
        for option in options
    )
    raise UsageError(f"{key} must be {names}, not {brief(value)}.")


__all__ = [
    "DistillationConfig",
    "GeneratorConfig",
    "MethodConfig",
    "RunConfig",
    "ScheduleConfig",
    "SynthesisConfig",
    "coerce",
    "field_names",
    "from_dict",
    "full_key",
    "learning_rate",
    "parse_value",
    "to_dict",
    "with_overrides",
]
