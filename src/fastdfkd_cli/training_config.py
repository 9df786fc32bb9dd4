"""The settings of ``fastdfkd train``, which check themselves, and where they come from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastdfkd_cli.config import Average, coerce, parse_value
from fastdfkd_cli.errors import UsageError, brief, did_you_mean
from fastdfkd_cli.method_config import Augmentation, require
from fastdfkd_cli.settings import plain_value, read_mapping

Optimizer = Literal["sgd", "adamw"]
#: What goes with AdamW unless it is stated; the defaults below are SGD's.
_ADAMW = {"lr": 1e-3, "weight_decay": 0.05}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides what a training on labelled images computes, besides the images and the machine.

    Raises:
        UsageError: a value is out of its range.
    """

    seed: int = 0
    #: Ask torch for deterministic algorithms; two runs on the CPU then end with the same model, bit for bit.
    deterministic: bool = False
    #: Times that each image is seen; the last ones of an epoch that fill no batch wait for the next.
    epochs: int = 30
    #: Images per step.
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    #: The learning rate after the warm-up.
    lr: float = 0.1
    #: The learning rate at the end of the cosine.
    lr_min: float = 0.0
    #: Share of the steps over which the rate rises linearly to ``lr``.
    lr_warmup: float = 0.05
    #: SGD's momentum, or AdamW's first beta.
    momentum: float = 0.9
    #: Of SGD's momentum.
    nesterov: bool = True
    #: Of all weights but biases and those of norms.
    weight_decay: float = 5e-4
    #: Share of the target that is spread over all classes (Szegedy et al., CVPR 2016, section 7).
    label_smoothing: float = 0.0
    #: How an image is varied each time that it is seen.
    augmentation: Augmentation = "crop-flip"
    #: Export the last weights, or an exponential moving average of them.
    average: Average = "none"
    #: Decay of that average, per step.
    average_decay: float = 0.999
    #: Share of the images that is not trained on but judged on after each epoch, to be looked at: it decides nothing.
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            require(getattr(self, name) > 0, name, getattr(self, name), "greater than 0")
        for name in ("seed", "lr_min", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("momentum", "lr_warmup", "average_decay", "label_smoothing", "validation"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(self.seed < 2**63, "seed", self.seed, "below 2**63")
        require(self.batch_size >= 2, "batch_size", self.batch_size, "2 or more (batch statistics)")
        for name in ("epochs", "batch_size"):
            require(getattr(self, name) <= 2**31, name, getattr(self, name), f"{2**31:,} or less")
        require(self.lr_min <= self.lr, "lr_min", self.lr_min, f"at most lr ({self.lr})")
        require(
            not self.nesterov or self.optimizer == "adamw" or self.momentum > 0,
            "nesterov",
            self.nesterov,
            "off without momentum",
        )


def from_values(values: Mapping[str, Any], *, base: TrainingConfig | None = None) -> TrainingConfig:
    """Return ``base`` (default: the defaults) with ``values`` put in.

    AdamW, where it is chosen here, brings its own learning rate and weight decay unless those are given too.

    Raises:
        UsageError: an unknown key (with the nearest ones), a value of the wrong type or out of range.
    """
    base = base or TrainingConfig()
    hints = typing.get_type_hints(TrainingConfig)
    for key in values:
        if key not in hints:
            raise UsageError(f"Unknown setting {brief(key)} of train.{did_you_mean(str(key), hints)}")
    checked = {key: coerce(key, value, hints[key]) for key, value in values.items()}
    if checked.get("optimizer") == "adamw" != base.optimizer:
        checked = _ADAMW | checked
    return dataclasses.replace(base, **checked)


def resolve_training(
    *,
    config: str | None,
    environment: Mapping[str, Any],
    assignments: Iterable[str],
    options: Mapping[str, Any],
) -> TrainingConfig:
    """Merge all sources: options over ``--set`` over the environment over the file.

    Args:
        config: a YAML or JSON file, or ``-`` for standard input; of a report.json, its ``config``.
        environment: what environment variables gave.
        assignments: the words given to ``--set``.
        options: values of options of their own (``--epochs``); None stands for "not given".

    Raises:
        UsageError: as :func:`from_values`; a file or a word that cannot be read.
    """
    values: dict[str, Any] = {}
    if config is not None:
        values = {str(key): plain_value(value) for key, value in read_mapping(config).items()}
    values |= environment
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes key=value, such as label_smoothing=0.1, not {assignment!r}.")
        values[key.strip()] = plain_value(parse_value(value.strip()))
    values |= {key: value for key, value in options.items() if value is not None}
    return from_values(values)


__all__ = ["Optimizer", "TrainingConfig", "from_values", "resolve_training"]
