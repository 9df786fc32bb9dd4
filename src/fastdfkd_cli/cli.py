"""The command line: read the options, call one function of :mod:`fastdfkd_cli.api`, print its result.

Heavy imports stand in the commands' bodies, so that ``fastdfkd --help`` answers at once. Errors and signals are
turned into one line and an exit code by :func:`fastdfkd_cli.__main__.main`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from fastdfkd_cli import __version__
from fastdfkd_cli.console import (
    Progress,
    print_columns,
    print_error,
    print_json,
    print_line,
    print_summary,
    print_values,
)
from fastdfkd_cli.errors import ThresholdError, UsageError, printable
from fastdfkd_cli.method_config import SETTINGS
from fastdfkd_cli.processes import from_environment
from fastdfkd_cli.settings import (
    join_number_lists,
    parse_duration,
    parse_input_size,
    parse_interval,
    parse_numbers,
    parse_part,
    resolve,
)

if TYPE_CHECKING:
    from fastdfkd_cli.models import ModelOptions

app = typer.Typer(
    name="fastdfkd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# -- options that several commands share -------------------------------------------------------------------------

_MODELS = "Models"
_TEACHER = "Where the teacher's reference does not say it"
_STUDENT = "Where the student's reference does not say it"
_MODEL = "Where the model's reference does not say it"
_BUDGET = "Budget (at most one; default: the recipe's)"
_SETTINGS = "Settings (options over --set over environment over --config over --recipe)"
_DATA = "Real images"
_OUTPUT = "Output"
_MACHINE = "Machine"

_REFERENCE = (
    "timm/resnet50, resnet50, hf-hub:owner/repo@rev, a folder with config.json, a checkpoint file, nets.py:factory, "
    "torchvision/resnet50, cifar/wrn16_1"
)


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=False, **more)


def _group(prefix: str, panel: str) -> tuple[Any, ...]:
    """The six options of one model: architecture, weights, classes, input size, mean, std."""
    return (
        _option(
            f"--{prefix}arch",
            panel=panel,
            metavar="NAME",
            help="Architecture: a timm, torchvision/ or cifar/ name, or nets.py:factory.",
        ),
        _option(
            f"--{prefix}weights",
            panel=panel,
            metavar="FILE",
            help="Checkpoint: .safetensors .pth .pt .th .tar .bin .ckpt.",
        ),
        _option(f"--{prefix}num-classes", panel=panel, metavar="N", min=2, help="Number of classes."),
        _option(f"--{prefix}input-size", panel=panel, metavar="C H W", help="Channels, height, width, in pixels."),
        _option(f"--{prefix}mean", panel=panel, metavar="M ...", help="Mean per channel, of images in 0 to 1."),
        _option(f"--{prefix}std", panel=panel, metavar="S ...", help="Deviation per channel, of images in 0 to 1."),
    )


_ARCH, _WEIGHTS, _CLASSES, _SIZE, _MEAN, _STD = _group("", _MODEL)
_T_ARCH, _T_WEIGHTS, _T_CLASSES, _T_SIZE, _T_MEAN, _T_STD = _group("teacher-", _TEACHER)
_S_ARCH, _S_WEIGHTS, _S_CLASSES, _S_SIZE, _S_MEAN, _S_STD = _group("student-", _STUDENT)

Teacher = Annotated[
    str, _option("--teacher", "-t", panel=_MODELS, metavar="MODEL", help=f"The pretrained model: {_REFERENCE}.")
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
    _option(
        "--recipe",
        "-r",
        panel=_SETTINGS,
        metavar="NAME",
        envvar="FASTDFKD_RECIPE",
        help="A named recipe (`fastdfkd recipes` lists them). Default: auto, by the teacher's input.",
    ),
]
ConfigFile = Annotated[
    str | None,
    _option(
        "--config",
        panel=_SETTINGS,
        metavar="FILE",
        help="Settings from a YAML or JSON file, or from a report.json; - reads standard input. Default: none.",
    ),
]
Assignments = Annotated[
    list[str] | None,
    _option(
        "--set",
        panel=_SETTINGS,
        metavar="KEY=VALUE",
        help="One setting, such as synthesis.steps=2; repeatable. `fastdfkd recipes --show NAME` lists the keys.",
    ),
]
MethodName = Annotated[
    str | None,
    _option(
        "--method",
        "-m",
        panel=_SETTINGS,
        metavar="NAME",
        help=f"How images are made: {', '.join(SETTINGS)}. Default: the recipe's, fast.",
    ),
]
Steps = Annotated[
    int | None,
    _option("--steps", panel=_SETTINGS, metavar="K", help="Synthesis steps per batch (synthesis.steps)."),
]
Seed = Annotated[
    int | None,
    _option("--seed", panel=_SETTINGS, metavar="N", envvar="FASTDFKD_SEED", help="Seed. Default: 0."),
]
Deterministic = Annotated[
    bool | None,
    _option(
        "--deterministic/--no-deterministic",
        panel=_SETTINGS,
        help="Repeatable algorithms: on the CPU, two runs agree bit for bit. Default: off.",
    ),
]
Device = Annotated[
    str,
    _option(
        "--device",
        panel=_MACHINE,
        metavar="NAME",
        envvar="FASTDFKD_DEVICE",
        help="auto, cpu, cuda, cuda:1 or mps. Default: auto.",
    ),
]
Amp = Annotated[
    bool | None, _option("--amp/--no-amp", panel=_MACHINE, help="Mixed precision. Default: where the device gains.")
]
Compile = Annotated[
    bool,
    _option(
        "--compile",
        panel=_MACHINE,
        help="Compile the networks' passes first: for runs of more than some minutes.",
    ),
]
Graphs = Annotated[
    bool,
    _option(
        "--graphs", panel=_MACHINE, help="Replay a synthesised batch, and a KD step, as one CUDA graph. Experimental."
    ),
]
Overwrite = Annotated[
    bool, _option("--overwrite", panel=_OUTPUT, help="Replace a folder that is not empty. Default: refuse it.")
]
CheckpointEvery = Annotated[
    str | None,
    _option(
        "--checkpoint-every",
        panel=_OUTPUT,
        metavar="TIME",
        help="Save an unfinished run this often, such as 90s or 10m; 0: only when it is stopped. Default: 5m.",
    ),
]
DryRun = Annotated[
    bool,
    _option("--dry-run", panel=_OUTPUT, help="Say what would be done, how large and how long it is, and stop."),
]
Json = Annotated[
    bool, _option("--json", panel=_OUTPUT, help="Print one JSON object on stdout. Default: key value lines.")
]


class _Command(TyperCommand):
    """A command whose --mean, --std and --input-size take any number of values after the flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_number_lists(args))


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"fastdfkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Distil an image classifier into a smaller one without its training data (FastDFKD)."""


# -- commands ----------------------------------------------------------------------------------------------------


@app.command(cls=_Command)
def distill(
    ctx: typer.Context,
    teacher: Teacher,
    student: Annotated[
        str,
        _option("--student", "-s", panel=_MODELS, metavar="MODEL", help="The model to train, named the same way."),
    ],
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            panel=_OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the student and its report. Default: ./STUDENT-from-TEACHER.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        _option(
            "--resume",
            panel=_OUTPUT,
            metavar="auto|DIR",
            help="Go on with an unfinished run: that of --output, if there is one, or of a folder of checkpoints.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    json: Json = False,
    rounds: Annotated[
        int | None,
        _option("--rounds", panel=_BUDGET, metavar="N", min=1, help="Rounds of synthesis and distillation."),
    ] = None,
    images: Annotated[
        int | None, _option("--images", panel=_BUDGET, metavar="N", min=1, help="Synthetic images, in whole batches.")
    ] = None,
    time_budget: Annotated[
        str | None,
        _option("--time-budget", panel=_BUDGET, metavar="TIME", help="Wall-clock time: 90 (seconds), 10m, 1h30m."),
    ] = None,
    recipe: RecipeName = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    method: MethodName = None,
    steps: Steps = None,
    seed: Seed = None,
    deterministic: Deterministic = None,
    data_dir: Annotated[
        str | None,
        _option(
            "--data-dir",
            panel=_MODELS,
            metavar="DIR",
            help="Distil on the images of an earlier `fastdfkd synthesize`. Default: synthesise them.",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        _option(
            "--eval-data",
            panel=_DATA,
            metavar="DIR",
            help="Judge the finished student on a folder of class folders or a tar of them. Default: no judgement.",
        ),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        _option(
            "--eval-dataset",
            panel=_DATA,
            metavar="NAME",
            help="Judge it on a data set that timm knows, such as torch/cifar10, or on builtin/digits.",
        ),
    ] = None,
    eval_split: Annotated[
        str, _option("--eval-split", panel=_DATA, metavar="NAME", help="Split to judge on. Default: validation.")
    ] = "validation",
    device: Device = "auto",
    amp: Amp = None,
    compile: Compile = False,
    graphs: Graphs = False,
    teacher_arch: TeacherArch = None,
    teacher_weights: TeacherWeights = None,
    teacher_num_classes: TeacherClasses = None,
    teacher_input_size: TeacherSize = None,
    teacher_mean: TeacherMean = None,
    teacher_std: TeacherStd = None,
    student_arch: StudentArch = None,
    student_weights: StudentWeights = None,
    student_num_classes: StudentClasses = None,
    student_input_size: StudentSize = None,
    student_mean: StudentMean = None,
    student_std: StudentStd = None,
) -> None:
    """Train a student from a teacher alone: synthesise images from it and distil on them.

    The student's folder opens with timm.create_model("local-dir:DIR", pretrained=True). Its path is the last line on
    stdout.

    Example: fastdfkd distill --teacher timm/resnet50 --student mobilenetv2_100 --time-budget 8h
    """
    group = from_environment()
    budgets = {"--rounds": rounds, "--images": images, "--time-budget": time_budget}
    if len(given := [name for name, value in budgets.items() if value is not None]) > 1:
        raise UsageError(f"{' and '.join(given)} set the same budget: give one of them.")
    every = parse_interval(checkpoint_every)
    name, overrides = _settings(
        ctx,
        recipe=recipe,
        config=config,
        assignments=assignments,
        seed=seed,
        options={
            "method": method,
            "synthesis.steps": steps,
            "deterministic": deterministic,
            "rounds": rounds,
            "schedule.time_budget": None if time_budget is None else parse_duration(time_budget),
            "images": images,
        },
    )
    if rounds is not None or images is not None:
        overrides["schedule.time_budget"] = None  # a file's time budget gives way to the budget on the command line
    teacher_said = _said(
        "teacher-", teacher_arch, teacher_weights, teacher_num_classes, teacher_input_size, teacher_mean, teacher_std
    )
    student_said = _said(
        "student-", student_arch, student_weights, student_num_classes, student_input_size, student_mean, student_std
    )

    from fastdfkd_cli import api
    from fastdfkd_cli.runtime import tune_process

    tune_process()

    with Progress() if group.leads else nullcontext() as progress:
        request: dict[str, Any] = {
            "teacher_options": _model_options(teacher_said),
            "student_options": _model_options(student_said),
            "recipe": name,
            "overrides": overrides,
            "data_dir": data_dir,
            "output": output or Path(f"{_slug(student)}-from-{_slug(teacher)}"),
            "overwrite": overwrite,
            "device": device,
            "amp": amp,
            "eval_data": eval_data,
            "eval_dataset": eval_dataset,
            "eval_split": eval_split,
            "on_record": progress.record if progress is not None else None,
            "on_message": progress.message if progress is not None else None,
        }
        if group.several:
            request["group"] = group
        ending: dict[str, Any] = {"fail": print_error} if group.several else {}
        if dry_run:
            plan = api.plan_distill(teacher, student, **request) if group.leads else {}
        else:
            result = api.distill(
                teacher,
                student,
                **request,
                resume=resume,
                checkpoint_every=every,
                compile=compile,
                graphs=graphs,
                **ending,
            )
    if not group.leads:
        return
    if dry_run:
        _print_plan(plan, json)
        return
    report = {"path": str(result.path), **result.report} if json else None
    print_summary("Student", str(result.path), _headline(result.report), as_json=report)


@app.command(cls=_Command)
def synthesize(
    ctx: typer.Context,
    teacher: Teacher,
    num_images: Annotated[
        int, _option("--num-images", "-n", panel=_OUTPUT, metavar="N", min=1, help="Images to make, over all classes.")
    ],
    output: Annotated[
        Path,
        _option(
            "--output",
            "-o",
            panel=_OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the shards, the soft labels and the manifest.",
        ),
    ],
    student: Annotated[
        str | None,
        _option(
            "--student",
            "-s",
            panel=_MODELS,
            metavar="MODEL",
            help="A student for the adversarial term to work against. Default: no adversarial term.",
        ),
    ] = None,
    resume: Annotated[
        bool, _option("--resume", panel=_OUTPUT, help="Go on with the set in the folder. Default: start a new one.")
    ] = False,
    overwrite: Overwrite = False,
    shard_size: Annotated[
        int, _option("--shard-size", panel=_OUTPUT, metavar="N", min=1, help="Images per tar file. Default: 1000.")
    ] = 1000,
    part: Annotated[
        str | None,
        _option(
            "--part",
            panel=_OUTPUT,
            metavar="K/N",
            help="Make part K of N, for jobs that fill one folder side by side; the last to end puts all together. "
            "Default: the whole set.",
        ),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    json: Json = False,
    recipe: RecipeName = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    method: MethodName = None,
    steps: Steps = None,
    seed: Seed = None,
    deterministic: Deterministic = None,
    device: Device = "auto",
    amp: Amp = None,
    compile: Compile = False,
    graphs: Graphs = False,
    teacher_arch: TeacherArch = None,
    teacher_weights: TeacherWeights = None,
    teacher_num_classes: TeacherClasses = None,
    teacher_input_size: TeacherSize = None,
    teacher_mean: TeacherMean = None,
    teacher_std: TeacherStd = None,
    student_arch: StudentArch = None,
    student_weights: StudentWeights = None,
    student_num_classes: StudentClasses = None,
    student_input_size: StudentSize = None,
    student_mean: StudentMean = None,
    student_std: StudentStd = None,
) -> None:
    """Make a labelled synthetic data set from a teacher: tar shards that timm reads, soft labels, a manifest.

    Its path is the last line on stdout. `fastdfkd distill --data-dir DIR` trains any number of students on it.

    Example: fastdfkd synthesize --teacher timm/resnet50 --num-images 50000 --output synthetic
    """
    group = from_environment()
    if resume and overwrite:
        raise UsageError("--resume goes on with what is in the folder and --overwrite discards it: give one of them.")
    every, of_whole = parse_interval(checkpoint_every), parse_part(part)
    name, overrides = _settings(
        ctx,
        recipe=recipe,
        config=config,
        assignments=assignments,
        seed=seed,
        options={"method": method, "synthesis.steps": steps, "deterministic": deterministic},
    )
    teacher_said = _said(
        "teacher-", teacher_arch, teacher_weights, teacher_num_classes, teacher_input_size, teacher_mean, teacher_std
    )
    student_said = _said(
        "student-", student_arch, student_weights, student_num_classes, student_input_size, student_mean, student_std
    )
    if student is None and any(value is not None for value in student_said.values()):
        raise UsageError("The --student- options describe a student: name it with --student.")

    from fastdfkd_cli import api
    from fastdfkd_cli.runtime import tune_process

    tune_process()

    with Progress() if group.leads else nullcontext() as progress:
        request: dict[str, Any] = {
            "num_images": num_images,
            "output": output,
            "student": student,
            "teacher_options": _model_options(teacher_said),
            "student_options": _model_options(student_said),
            "recipe": name,
            "overrides": overrides,
            "resume": resume,
            "overwrite": overwrite,
            "shard_size": shard_size,
            "part": of_whole,
            "device": device,
            "amp": amp,
            "group": group,
            "on_record": progress.record if progress is not None else None,
            "on_message": progress.message if progress is not None else None,
        }
        if dry_run:
            plan = api.plan_synthesize(teacher, **request) if group.leads else {}
        else:
            try:
                result = api.synthesize(teacher, **request, checkpoint_every=every, compile=compile, graphs=graphs)
            except KeyboardInterrupt as stop:
                if not getattr(stop, "__notes__", None):
                    stop.add_note("whole shards stay in the folder: the same command with --resume goes on")
                raise
    if not group.leads:
        return
    if dry_run:
        _print_plan(plan, json)
    elif json:
        print_json({"path": str(result.path), **result.manifest})
    else:
        print_line(result.path)


@app.command(cls=_Command)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"The model to judge: {_REFERENCE}.", show_default=False)
    ],
    data_dir: Annotated[
        str | None,
        _option(
            "--data-dir", panel=_DATA, metavar="DIR", help="Folder of class folders, a tar of them, or a data set's."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        _option(
            "--dataset", panel=_DATA, metavar="NAME", help="A timm data set: torch/cifar10, ...; or builtin/digits."
        ),
    ] = None,
    split: Annotated[
        str, _option("--split", panel=_DATA, metavar="NAME", help="Split of the data set. Default: validation.")
    ] = "validation",
    batch_size: Annotated[
        int, _option("--batch-size", "-b", panel=_DATA, metavar="N", min=1, help="Images per batch. Default: 128.")
    ] = 128,
    workers: Annotated[
        int,
        _option("--workers", "-j", panel=_DATA, metavar="N", min=0, help="Processes that read images. Default: 0."),
    ] = 0,
    img_size: Annotated[
        int | None,
        _option(
            "--img-size", panel=_DATA, metavar="N", min=1, help="Height and width in pixels. Default: the model's."
        ),
    ] = None,
    crop_pct: Annotated[
        float | None,
        _option(
            "--crop-pct",
            panel=_DATA,
            metavar="F",
            min=0.0,
            help="Share of the resized image that is kept. Default: the model's.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        _option(
            "--teacher", "-t", panel=_MODELS, metavar="MODEL", help="A teacher to judge beside it; adds agreement."
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        _option(
            "--min-top1",
            panel=_OUTPUT,
            metavar="PERCENT",
            min=0.0,
            max=100.0,
            help="Exit with code 4 if top1 is below this. Default: no threshold.",
        ),
    ] = None,
    json: Json = False,
    results_file: Annotated[
        Path | None,
        _option("--results-file", panel=_OUTPUT, metavar="FILE", help="Write the result there too: .json or .csv."),
    ] = None,
    arch: Annotated[str | None, _ARCH] = None,
    weights: Annotated[str | None, _WEIGHTS] = None,
    num_classes: Annotated[int | None, _CLASSES] = None,
    input_size: Annotated[str | None, _SIZE] = None,
    mean: Annotated[str | None, _MEAN] = None,
    std: Annotated[str | None, _STD] = None,
    device: Device = "auto",
    amp: Annotated[bool, _option("--amp/--no-amp", panel=_MACHINE, help="Mixed precision. Default: off.")] = False,
    amp_dtype: Annotated[
        str, _option("--amp-dtype", panel=_MACHINE, metavar="NAME", help="bfloat16 or float16. Default: bfloat16.")
    ] = "bfloat16",
    teacher_arch: TeacherArch = None,
    teacher_weights: TeacherWeights = None,
    teacher_num_classes: TeacherClasses = None,
    teacher_input_size: TeacherSize = None,
    teacher_mean: TeacherMean = None,
    teacher_std: TeacherStd = None,
) -> None:
    """Judge a model on real images, with the keys of timm's validate.py.

    Example: fastdfkd evaluate student --dataset torch/cifar10 --data-dir data --min-top1 90 --json
    """
    _require_one_process("evaluate")
    if data_dir is None and dataset is None:
        raise UsageError("Nothing to judge on: give --data-dir DIR, --dataset NAME or both.")
    if amp_dtype not in ("bfloat16", "float16"):
        raise UsageError(f"--amp-dtype must be bfloat16 or float16, not {amp_dtype!r}.")
    if results_file is not None:
        _check_results_file(results_file)
    said = _said("", arch, weights, num_classes, input_size, mean, std)
    teacher_said = _said(
        "teacher-", teacher_arch, teacher_weights, teacher_num_classes, teacher_input_size, teacher_mean, teacher_std
    )
    if teacher is None and any(value is not None for value in teacher_said.values()):
        raise UsageError("The --teacher- options describe a teacher: name it with --teacher.")

    from fastdfkd_cli import api
    from fastdfkd_cli.runtime import tune_process

    tune_process()

    with Progress() as progress:
        row = api.evaluate(
            model,
            data_dir=data_dir,
            dataset=dataset,
            split=split,
            options=_model_options(said),
            teacher=teacher,
            teacher_options=_model_options(teacher_said),
            batch_size=batch_size,
            workers=workers,
            img_size=img_size,
            crop_pct=crop_pct,
            device=device,
            amp=amp,
            amp_dtype=amp_dtype,
            on_record=progress.record,
            on_message=progress.message,
        )
    if results_file is not None:
        _write_results(results_file, row)
    _print_result(row, json)
    # Not `top1 < min_top1`: a top1 that is not a number has not reached anything.
    if min_top1 is not None and not row["top1"] >= min_top1:
        raise ThresholdError(f"top1 is {row['top1']:.2f} %, below --min-top1 {min_top1:g} %.")


@app.command(cls=_Command)
def recipes(
    show: Annotated[
        str | None,
        typer.Option("--show", metavar="NAME", help="Print all settings of one, as YAML that --config reads."),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            "--input-size",
            metavar="C H W",
            help="With --show: the teacher's input, in pixels; some settings follow from it. "
            "Default: 3 32 32, and 3 224 224 for the imagenet rows.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", show_default=False)] = False,
) -> None:
    """List the named recipes: where each comes from, what it is for and what it costs."""
    from fastdfkd_cli.config import to_dict
    from fastdfkd_cli.recipes import RECIPES, get_recipe

    size = parse_input_size("--input-size", input_size)
    if show is None:
        if size is not None:
            raise UsageError("--input-size goes with --show NAME.")
        rows = [{"name": r.name, "source": r.source, "description": r.description} for r in RECIPES.values()]
        if json:
            print_json({"recipes": rows})
        else:
            print_columns(("recipe", "source", "description"), [tuple(row.values()) for row in rows])
        return
    recipe = get_recipe(show)
    size = size or ((3, 224, 224) if show.startswith("imagenet") else (3, 32, 32))
    settings = to_dict(recipe.config(size))
    if json:
        about = {"name": recipe.name, "source": recipe.source, "description": recipe.description}
        print_json({**about, "input_size": size, "config": settings})
        return

    import yaml

    for line in (recipe.description, f"Source: {recipe.source}", f"For input of {'x'.join(map(str, size))} (C, H, W)"):
        print_line(f"# {line}")
    print_line(yaml.safe_dump(settings, sort_keys=False).rstrip())


# -- helpers -----------------------------------------------------------------------------------------------------


def _settings(
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


def _require_one_process(command: str) -> None:
    if (count := from_environment().world_size) > 1:
        raise UsageError(f"{command} works in one process, and torchrun started {count}: run it without torchrun.")


def _said(
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


def _model_options(said: Mapping[str, Any]) -> ModelOptions:
    from fastdfkd_cli.models import ModelOptions

    return ModelOptions(**said)


def _slug(reference: str) -> str:
    """The part of a model reference that tells models apart, fit for a folder's name."""
    name = reference.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    name = re.sub(r"\.(safetensors|pth|pt|th|tar)$", "", name)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report that a person wants first."""
    judged = report.get("evaluation") or {}
    scores = {key: judged.get(key) for key in ("dataset", "n_samples", "top1", "top5", "teacher_top1", "agreement")}
    return {
        "images": report["images"],
        "seconds": report["seconds"],
        "quality": report.get("quality") or {},
        "evaluation": scores,
    }


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_values(result)


def _print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """A plan for a person leaves out the fifty settings, which `fastdfkd recipes --show` lists."""
    _print_result(plan if as_json else {key: value for key, value in plan.items() if key != "config"}, as_json)


def _check_results_file(path: Path) -> None:
    if path.suffix not in (".json", ".csv"):
        raise UsageError(f"--results-file must end in .json or .csv, not {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder of --results-file {path} does not exist.")
    if path.is_dir():
        raise UsageError(f"--results-file {path} is a folder.")


def _write_results(path: Path, row: Mapping[str, Any]) -> None:
    from fastdfkd_cli.output import write_bytes, write_json

    if path.suffix == ".json":
        write_json(path, dict(row))
    else:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(row))
        writer.writeheader()
        writer.writerow({key: printable(value) if isinstance(value, str) else value for key, value in row.items()})
        write_bytes(path, table.getvalue().encode("utf-8"))


__all__ = ["app"]
