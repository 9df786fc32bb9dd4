"""What the commands share: options, and how what was said is read and results are written.

Heavy imports stand in functions, so that ``fastdfkd --help`` answers at once.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastdfkd_cli.console import print_json, print_values
from fastdfkd_cli.errors import UsageError, printable
from fastdfkd_cli.method_config import SETTINGS
from fastdfkd_cli.processes import from_environment
from fastdfkd_cli.settings import join_number_lists, parse_input_size, parse_numbers, resolve

if TYPE_CHECKING:
    from fastdfkd_cli.models import ModelOptions

# -- options that several commands share -------------------------------------------------------------------------

MODELS = "Models"
TEACHER = "Where the teacher's reference does not say it"
STUDENT = "Where the student's reference does not say it"
MODEL = "Where the model's reference does not say it"
BUDGET = "Budget (at most one; default: the recipe's)"
SETTINGS_PANEL = "Settings (options over --set over environment over --config over --recipe)"
DATA = "Real images"
OUTPUT = "Output"
MACHINE = "Machine"

REFERENCE = (
    "timm/resnet50, resnet50, hf-hub:owner/repo@rev, a folder with config.json, a checkpoint file, nets.py:factory, "
    "torchvision/resnet50, cifar/wrn16_1"
)


def option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False, **more)


def _group(prefix: str, panel: str) -> tuple[Any, ...]:
    """The six options of one model: architecture, weights, classes, input size, mean, std."""
    return (
        option(
            f"--{prefix}arch",
            panel=panel,
            metavar="NAME",
            help="Architecture: a timm, torchvision/ or cifar/ name, or nets.py:factory.",
        ),
        option(
            f"--{prefix}weights",
            panel=panel,
            metavar="FILE",
            help="Checkpoint: .safetensors .pth .pt .th .tar .bin .ckpt.",
        ),
        option(f"--{prefix}num-classes", panel=panel, metavar="N", min=2, help="Number of classes."),
        option(f"--{prefix}input-size", panel=panel, metavar="C H W", help="Channels, height, width, in pixels."),
        option(f"--{prefix}mean", panel=panel, metavar="M ...", help="Mean per channel, of images in 0 to 1."),
        option(f"--{prefix}std", panel=panel, metavar="S ...", help="Deviation per channel, of images in 0 to 1."),
    )


ARCH, WEIGHTS, CLASSES, SIZE, MEAN, STD = _group("", MODEL)
_T_ARCH, _T_WEIGHTS, _T_CLASSES, _T_SIZE, _T_MEAN, _T_STD = _group("teacher-", TEACHER)
_S_ARCH, _S_WEIGHTS, _S_CLASSES, _S_SIZE, _S_MEAN, _S_STD = _group("student-", STUDENT)

Teacher = Annotated[
    str, option("--teacher", "-t", panel=MODELS, metavar="MODEL", help=f"The pretrained model: {REFERENCE}.")
]
TeacherArch = Annotated[str | None, _T_ARCH]
TeacherWeights = Annotated[str | None, _T_WEIGHTS]
TeacherClasses = Annotated[int | None, _T_CLASSES]
TeacherSize = Annotated[str | None, _T_SIZE]
TeacherMean = Annotated[str | None, _T_MEAN]
TeacherStd = Annotated[str | None, _T_STD]
StudentArch = Annotated[str | None, _S_ARCH]
StudentWeights = Annotated[str | None, _S_WEIGHTS]
StudentClasses = Annotated[int | None, _S_CLASSES]
StudentSize = Annotated[str | None, _S_SIZE]
StudentMean = Annotated[str | None, _S_MEAN]
StudentStd = Annotated[str | None, _S_STD]

RecipeName = Annotated[
    str | None,
    option(
        "--recipe",
        "-r",
        panel=SETTINGS_PANEL,
        metavar="NAME",
        envvar="FASTDFKD_RECIPE",
        help="A named recipe (`fastdfkd recipes` lists them). Default: auto, by the teacher's input.",
    ),
]
ConfigFile = Annotated[
    str | None,
    option(
        "--config",
        panel=SETTINGS_PANEL,
        metavar="FILE",
        help="Settings from a YAML or JSON file, or from a report.json; - reads standard input. Default: none.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    option(
        "--set",
        panel=SETTINGS_PANEL,
        metavar="KEY=VALUE",
        help="One setting, such as synthesis.steps=2; repeatable. `fastdfkd recipes --show NAME` lists the keys.",
    ),
]
MethodName = Annotated[
    str | None,
    option(
        "--method",
        "-m",
        panel=SETTINGS_PANEL,
        metavar="NAME",
        help=f"How images are made: {', '.join(SETTINGS)}. Default: the recipe's, fast.",
    ),
]
Steps = Annotated[
    int | None,
    option("--steps", panel=SETTINGS_PANEL, metavar="K", help="Synthesis steps per batch (synthesis.steps)."),
]
Seed = Annotated[
    int | None,
    option("--seed", panel=SETTINGS_PANEL, metavar="N", envvar="FASTDFKD_SEED", help="Seed. Default: 0."),
]
Deterministic = Annotated[
    bool | None,
    option(
        "--deterministic/--no-deterministic",
        panel=SETTINGS_PANEL,
        help="Repeatable algorithms: on the CPU, two runs agree bit for bit. Default: off.",
    ),
]
Device = Annotated[
    str,
    option(
        "--device",
        panel=MACHINE,
        metavar="NAME",
        envvar="FASTDFKD_DEVICE",
        help="auto, cpu, cuda, cuda:1 or mps. Default: auto.",
    ),
]
Amp = Annotated[
    bool | None, option("--amp/--no-amp", panel=MACHINE, help="Mixed precision. Default: where the device gains.")
]
Compile = Annotated[
    bool,
    option(
        "--compile",
        panel=MACHINE,
        help="Compile the networks' passes first: for runs of more than some minutes.",
    ),
]
Graphs = Annotated[
    bool,
    option(
        "--graphs", panel=MACHINE, help="Replay a synthesised batch, and a KD step, as one CUDA graph. Experimental."
    ),
]
Overwrite = Annotated[
    bool, option("--overwrite", panel=OUTPUT, help="Replace a folder that is not empty. Default: refuse it.")
]
CheckpointEvery = Annotated[
    str | None,
    option(
        "--checkpoint-every",
        panel=OUTPUT,
        metavar="TIME",
        help="Save an unfinished run this often, such as 90s or 10m; 0: only when it is stopped. Default: 5m.",
    ),
]
Resume = Annotated[
    str | None,
    option(
        "--resume",
        panel=OUTPUT,
        metavar="auto|DIR",
        help="Go on with an unfinished run: that of --output, if there is one, or of a folder of checkpoints.",
    ),
]
EvalData = Annotated[
    str | None,
    option(
        "--eval-data",
        panel=DATA,
        metavar="DIR",
        help="Judge the finished network on a folder of class folders or a tar of them. Default: no judgement.",
    ),
]
EvalDataset = Annotated[
    str | None,
    option(
        "--eval-dataset",
        panel=DATA,
        metavar="NAME",
        help="Judge it on a data set that timm knows, such as torch/cifar10, or on builtin/digits.",
    ),
]
EvalSplit = Annotated[
    str, option("--eval-split", panel=DATA, metavar="NAME", help="Split to judge on. Default: validation.")
]
DryRun = Annotated[
    bool,
    option("--dry-run", panel=OUTPUT, help="Say what would be done, how large and how long it is, and stop."),
]
Json = Annotated[
    bool, option("--json", panel=OUTPUT, help="Print one JSON object on stdout. Default: key value lines.")
]


class Command(TyperCommand):
    """A command whose --mean, --std and --input-size take any number of values after the flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_number_lists(args))


# -- helpers -----------------------------------------------------------------------------------------------------


def merged_settings(
    ctx: typer.Context,
    *,
    recipe: str | None,
    config: str | None,
    assignments: list[str] | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Merge every source of settings, and refuse an unknown recipe before anything heavy is imported."""
    source = ctx.get_parameter_source("seed")
    from_environment = source is not None and source.name == "ENVIRONMENT"
    name, overrides = resolve(
        recipe=recipe,
        config=config,
        environment={"seed": seed} if from_environment else {},
        assignments=assignments or (),
        options={**options, "seed": None if from_environment else seed},
    )
    from fastdfkd_cli.recipes import get_recipe, with_method

    if name != "auto":
        get_recipe(name)
    if "method" in overrides:
        from fastdfkd_cli.config import RunConfig

        with_method(RunConfig(), overrides["method"])
    return name, overrides


def require_one_process(command: str) -> None:
    if (count := from_environment().world_size) > 1:
        raise UsageError(f"{command} works in one process, and torchrun started {count}: run it without torchrun.")


def model_said(
    prefix: str,
    arch: str | None,
    weights: str | None,
    num_classes: int | None,
    input_size: str | None,
    mean: str | None,
    std: str | None,
) -> dict[str, Any]:
    """Parse one model's options (before torch is imported: a typing error should show at once)."""
    said = {
        "arch": arch,
        "weights": weights,
        "num_classes": num_classes,
        "input_size": parse_input_size(f"--{prefix}input-size", input_size),
        "mean": parse_numbers(f"--{prefix}mean", mean),
        "std": parse_numbers(f"--{prefix}std", std),
    }
    for name in ("mean", "std"):
        values, size = said[name], said["input_size"]
        if values is not None and size is not None and len(values) not in (1, size[0]):  # type: ignore[index,arg-type]
            raise UsageError(f"--{prefix}{name} has {len(values)} values for {size[0]} channels.")  # type: ignore[index,arg-type]
    return said


def model_options(said: Mapping[str, Any]) -> ModelOptions:
    from fastdfkd_cli.models import ModelOptions

    return ModelOptions(**said)


def slug(reference: str) -> str:
    """The part of a model reference that tells models apart, fit for a folder's name."""
    name = reference.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    name = re.sub(r"\.(safetensors|pth|pt|th|tar)$", "", name)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_values(result)


def print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """A plan for a person leaves out the fifty settings, which `fastdfkd recipes --show` lists."""
    print_result(plan if as_json else {key: value for key, value in plan.items() if key != "config"}, as_json)


def check_results_file(path: Path) -> None:
    if path.suffix not in (".json", ".csv"):
        raise UsageError(f"--results-file must end in .json or .csv, not {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder of --results-file {path} does not exist.")
    if path.is_dir():
        raise UsageError(f"--results-file {path} is a folder.")


def write_results(path: Path, row: Mapping[str, Any]) -> None:
    from fastdfkd_cli.output import write_bytes, write_json

    if path.suffix == ".json":
        write_json(path, dict(row))
    else:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(row))
        writer.writeheader()
        writer.writerow({key: printable(value) if isinstance(value, str) else value for key, value in row.items()})
        write_bytes(path, table.getvalue().encode("utf-8"))
