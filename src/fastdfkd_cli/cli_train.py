"""``fastdfkd train``: read the options, call :func:`fastdfkd_cli.train`, print its result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdfkd_cli.cli_options import (
    DATA,
    MEAN,
    OUTPUT,
    SETTINGS_PANEL,
    SIZE,
    STD,
    Amp,
    CheckpointEvery,
    Deterministic,
    Device,
    DryRun,
    EvalData,
    EvalDataset,
    EvalSplit,
    Json,
    Overwrite,
    Resume,
    Seed,
    option,
    print_plan,
    require_one_process,
    slug,
)
from fastdfkd_cli.console import Progress, print_summary
from fastdfkd_cli.errors import UsageError
from fastdfkd_cli.settings import parse_input_size, parse_interval, parse_numbers
from fastdfkd_cli.training_config import resolve_training

MODEL_INPUT = "Where the images do not say it"


def train(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The architecture: cifar/wrn16_2, resnet18, torchvision/resnet18, nets.py:factory.",
            show_default=False,
        ),
    ],
    data_dir: Annotated[
        str | None,
        option(
            "--data-dir", panel=DATA, metavar="DIR", help="Folder of class folders, a tar of them, or a data set's."
        ),
    ] = None,
    dataset: Annotated[
        str | None, option("--dataset", panel=DATA, metavar="NAME", help="A timm data set: torch/cifar10, ...")
    ] = None,
    split: Annotated[
        str | None,
        option(
            "--split", panel=DATA, metavar="NAME", help="Split to train on. Default: train, or an undivided folder."
        ),
    ] = None,
    workers: Annotated[
        int,
        option("--workers", "-j", panel=DATA, metavar="N", min=0, help="Processes that read images. Default: 0."),
    ] = 0,
    validation: Annotated[
        float | None,
        option(
            "--validation",
            panel=DATA,
            metavar="SHARE",
            help="Share of the images that is kept back and shown as progress. Default: 0.",
        ),
    ] = None,
    eval_data: EvalData = None,
    eval_dataset: EvalDataset = None,
    eval_split: EvalSplit = "validation",
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the network and its report. Default: ./MODEL-trained.",
        ),
    ] = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    json: Json = False,
    epochs: Annotated[
        int | None,
        option("--epochs", panel=SETTINGS_PANEL, metavar="N", help="Times that each image is seen. Default: 30."),
    ] = None,
    batch_size: Annotated[
        int | None,
        option("--batch-size", "-b", panel=SETTINGS_PANEL, metavar="N", help="Images per step. Default: 128."),
    ] = None,
    optimizer: Annotated[
        str | None, option("--optimizer", panel=SETTINGS_PANEL, metavar="NAME", help="sgd or adamw. Default: sgd.")
    ] = None,
    lr: Annotated[
        float | None,
        option("--lr", panel=SETTINGS_PANEL, metavar="F", help="Learning rate. Default: 0.1, with adamw 0.001."),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        option(
            "--label-smoothing",
            panel=SETTINGS_PANEL,
            metavar="SHARE",
            help="Share of the target that is spread over all classes. Default: 0.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        option(
            "--config",
            panel=SETTINGS_PANEL,
            metavar="FILE",
            help="Settings from a YAML or JSON file, or from a report.json; - reads standard input. Default: none.",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        option(
            "--set",
            panel=SETTINGS_PANEL,
            metavar="KEY=VALUE",
            help="One setting, such as weight_decay=1e-4; repeatable. --dry-run --json lists them all.",
        ),
    ] = None,
    seed: Seed = None,
    deterministic: Deterministic = None,
    num_classes: Annotated[
        int | None, option("--num-classes", panel=MODEL_INPUT, metavar="N", min=2, help="Number of classes.")
    ] = None,
    input_size: Annotated[str | None, SIZE] = None,
    mean: Annotated[str | None, MEAN] = None,
    std: Annotated[str | None, STD] = None,
    device: Device = "auto",
    amp: Amp = None,
) -> None:
    """Train a network from scratch on labelled images: a teacher, or a student to compare with.

    Its folder opens with timm.create_model("local-dir:DIR", pretrained=True) and as --teacher DIR. Its path is the last
    line on stdout.

    Example: fastdfkd train cifar/wrn16_2 --dataset torch/cifar10 --eval-dataset torch/cifar10 --output teacher
    """
    require_one_process("train")
    if data_dir is None and dataset is None:
        raise UsageError("No images to train on: give --data-dir DIR, --dataset NAME or both.")
    source = ctx.get_parameter_source("seed")
    from_environment = source is not None and source.name == "ENVIRONMENT"
    settings = resolve_training(
        config=config,
        environment={"seed": seed} if from_environment else {},
        assignments=assignments or (),
        options={
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "lr": lr,
            "label_smoothing": label_smoothing,
            "validation": validation,
            "seed": None if from_environment else seed,
            "deterministic": deterministic,
        },
    )
    every = parse_interval(checkpoint_every)
    size = parse_input_size("--input-size", input_size)
    means, deviations = parse_numbers("--mean", mean), parse_numbers("--std", std)

    from fastdfkd_cli import api_train
    from fastdfkd_cli.runtime import tune_process

    tune_process()

    with Progress() as progress:
        request: dict[str, Any] = {
            "data_dir": data_dir,
            "dataset": dataset,
            "split": split,
            "config": settings,
            "num_classes": num_classes,
            "input_size": size,
            "mean": means,
            "std": deviations,
            "output": output or Path(f"{slug(model)}-trained"),
            "overwrite": overwrite,
            "device": device,
            "amp": amp,
            "workers": workers,
            "eval_data": eval_data,
            "eval_dataset": eval_dataset,
            "eval_split": eval_split,
            "on_record": progress.record,
            "on_message": progress.message,
        }
        if dry_run:
            plan = api_train.plan_train(model, **request)
        else:
            result = api_train.train(model, **request, resume=resume, checkpoint_every=every)
    if dry_run:
        print_plan(plan, json)
        return
    report = {"path": str(result.path), **result.report} if json else None
    print_summary("Model", str(result.path), _headline(result.report), as_json=report)


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report that a person wants first."""
    judged = report.get("evaluation") or {}
    return {
        "images": report["images"],
        "steps": report["steps"],
        "seconds": report["seconds"],
        "validation": report.get("validation") or {},
        "evaluation": {key: judged.get(key) for key in ("dataset", "n_samples", "top1", "top5")},
    }


__all__ = ["train"]
