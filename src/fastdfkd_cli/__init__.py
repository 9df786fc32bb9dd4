"""Distil a vision model into a smaller one without its training data (FastDFKD, AAAI 2022).

The Python API does what the commands do, with model references or with your own ``nn.Module``::

    from fastdfkd_cli import distill, evaluate, synthesize

    result = distill("builtin/digits", "cifar/wrn10_1", recipe="digits", output="student")
    evaluate("student", dataset="builtin/digits")["top1"]

Nothing heavy is imported until one of the names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastdfkd_cli.api import (
        DistillResult,
        SynthesizeResult,
        distill,
        evaluate,
        plan_distill,
        plan_synthesize,
        synthesize,
    )
    from fastdfkd_cli.api_train import TrainResult, plan_train, train
    from fastdfkd_cli.benchmarking import BenchmarkResult, benchmark, plan_benchmark
    from fastdfkd_cli.config import RunConfig
    from fastdfkd_cli.models import ModelOptions
    from fastdfkd_cli.training_config import TrainingConfig

_WHERE = {
    "BenchmarkResult": "fastdfkd_cli.benchmarking",
    "DistillResult": "fastdfkd_cli.api",
    "ModelOptions": "fastdfkd_cli.models",
    "RunConfig": "fastdfkd_cli.config",
    "SynthesizeResult": "fastdfkd_cli.api",
    "TrainResult": "fastdfkd_cli.api_train",
    "TrainingConfig": "fastdfkd_cli.training_config",
    "benchmark": "fastdfkd_cli.benchmarking",
    "distill": "fastdfkd_cli.api",
    "evaluate": "fastdfkd_cli.api",
    "plan_benchmark": "fastdfkd_cli.benchmarking",
    "plan_distill": "fastdfkd_cli.api",
    "plan_synthesize": "fastdfkd_cli.api",
    "plan_train": "fastdfkd_cli.api_train",
    "synthesize": "fastdfkd_cli.api",
    "train": "fastdfkd_cli.api_train",
}

__all__ = [
    "BenchmarkResult",
    "DistillResult",
    "ModelOptions",
    "RunConfig",
    "SynthesizeResult",
    "TrainResult",
    "TrainingConfig",
    "__version__",
    "benchmark",
    "distill",
    "evaluate",
    "plan_benchmark",
    "plan_distill",
    "plan_synthesize",
    "plan_train",
    "synthesize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
