"""The real images that a finished network is judged on: opened before the run, and read once after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdfkd_cli import evaluation
from fastdfkd_cli.data import EvaluationData, open_evaluation_data
from fastdfkd_cli.models import LoadedModel
from fastdfkd_cli.records import MetricsLog


def open_judge(
    eval_data: str | None, eval_dataset: str | None, eval_split: str, model: LoadedModel
) -> EvaluationData | None:
    """Open the real images before the run, so that a typing error does not show after it.

    None where no images are named.
    """
    if eval_data is None and eval_dataset is None:
        return None
    data = open_evaluation_data(data_dir=eval_data, dataset=eval_dataset, split=eval_split)
    return data.aligned(model.num_classes, model.class_names)


def judged(
    model: LoadedModel,
    data: EvaluationData | None,
    device: torch.device,
    say: Callable[[str], None],
    log: MetricsLog,
    *,
    teacher: LoadedModel | None = None,
) -> dict[str, Any] | None:
    """The model's figures on ``data``, with timm's keys; None without any.

    Args:
        teacher: adds how often the two agree.

    Raises:
        UnavailableError: an image cannot be read.
    """
    if data is None:
        return None
    result = evaluation.drain(evaluation.evaluate_model(model, data, teacher=teacher, device=device), log)
    for note in result.notes:
        say(note)
    return result.row


__all__ = ["judged", "open_judge"]
