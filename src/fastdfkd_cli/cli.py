"""The command line: read the options, call one function of :mod:`fastdfkd_cli.api`, print its result.

Heavy imports stand in the commands' bodies, so that ``fastdfkd --help`` answers at once. Errors and signals are
turned into one line and an exit code by :func:`fastdfkd_cli.__main__.main`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdfkd_cli import __version__
from fastdfkd_cli.cli_benchmark import benchmark
from fastdfkd_cli.cli_options import (
    ARCH,
    BUDGET,
    CLASSES,
    DATA,
    MACHINE,
    MEAN,
    MODELS,
    OUTPUT,
    REFERENCE,
    SIZE,
    STD,
    WEIGHTS,
    Amp,
    Assignments,
    CheckpointEvery,
    Command,
    Compile,
    ConfigFile,
    Deterministic,
    Device,
    DryRun,
    EvalData,
    EvalDataset,
    EvalSplit,
    Graphs,
    Json,
    MethodName,
    Overwrite,
    RecipeName,
    Resume,
    Seed,
    Steps,
    StudentArch,
    StudentClasses,
    StudentMean,
    StudentSize,
    StudentStd,
    StudentWeights,
    Teacher,
    TeacherArch,
    TeacherClasses,
    TeacherMean,
    TeacherSize,
    TeacherStd,
    TeacherWeights,
    check_results_file,
    merged_settings,
    model_options,
    model_said,
    option,
    print_plan,
    print_result,
    require_one_process,
    slug,
    write_results,
)
from fastdfkd_cli.cli_train import train
from fastdfkd_cli.console import (
    Progress,
    print_columns,
    print_error,
    print_json,
    print_line,
    print_summary,
)
from fastdfkd_cli.errors import ThresholdError, UsageError
from fastdfkd_cli.processes import from_environment
from fastdfkd_cli.settings import (
    parse_duration,
    parse_input_size,
    parse_interval,
    parse_part,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="fastdfkd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


@app.command(cls=Command)
def distill(
    ctx: typer.Context,
    teacher: Teacher,
    student: Annotated[
        str,
        option("--student", "-s", panel=MODELS, metavar="MODEL", help="The model to train, named the same way."),
    ],
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the student and its report. Default: ./STUDENT-from-TEACHER.",
        ),
    ] = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    checkpoint_every: CheckpointEvery = None,
    dry_run: DryRun = False,
    json: Json = False,
    rounds: Annotated[
        int | None,
        option("--rounds", panel=BUDGET, metavar="N", min=1, help="Rounds of synthesis and distillation."),
    ] = None,
    images: Annotated[
        int | None, option("--images", panel=BUDGET, metavar="N", min=1, help="Synthetic images, in whole batches.")
    ] = None,
    time_budget: Annotated[
        str | None,
        option("--time-budget", panel=BUDGET, metavar="TIME", help="Wall-clock time: 90 (seconds), 10m, 1h30m."),
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
        option(
            "--data-dir",
            panel=MODELS,
            metavar="DIR",
            help="Distil on the images of an earlier `fastdfkd synthesize`. Default: synthesise them.",
        ),
    ] = None,
    unlabeled_dir: Annotated[
        str | None,
        option(
            "--unlabeled-dir",
            panel=MODELS,
            metavar="DIR",
            help="Images that --method dfnd chooses from: a folder, a tar or a folder of tars, of any size.",
        ),
    ] = None,
    eval_data: EvalData = None,
    eval_dataset: EvalDataset = None,
    eval_split: EvalSplit = "validation",
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
    name, overrides = merged_settings(
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
    teacher_said = model_said(
        "teacher-", teacher_arch, teacher_weights, teacher_num_classes, teacher_input_size, teacher_mean, teacher_std
    )
    student_said = model_said(
        "student-", student_arch, student_weights, student_num_classes, student_input_size, student_mean, student_std
    )

    from fastdfkd_cli import api
    from fastdfkd_cli.runtime import tune_process

    tune_process()

    with Progress() if group.leads else nullcontext() as progress:
        request: dict[str, Any] = {
            "teacher_options": model_options(teacher_said),
            "student_options": model_options(student_said),
            "recipe": name,
            "overrides": overrides,
            "data_dir": data_dir,
            "unlabeled_dir": unlabeled_dir,
            "output": output or Path(f"{slug(student)}-from-{slug(teacher)}"),
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
        print_plan(plan, json)
        return
    report = {"path": str(result.path), **result.report} if json else None
    print_summary("Student", str(result.path), _headline(result.report), as_json=report)


@app.command(cls=Command)
def synthesize(
    ctx: typer.Context,
    teacher: Teacher,
    num_images: Annotated[
        int, option("--num-images", "-n", panel=OUTPUT, metavar="N", min=1, help="Images to make, over all classes.")
    ],
    output: Annotated[
        Path,
        option(
            "--output",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            envvar="FASTDFKD_OUTPUT",
            help="Folder for the shards, the soft labels and the manifest.",
        ),
    ],
    student: Annotated[
        str | None,
        option(
            "--student",
            "-s",
            panel=MODELS,
            metavar="MODEL",
            help="A student for the adversarial term to work against. Default: no adversarial term.",
        ),
    ] = None,
    resume: Annotated[
        bool, option("--resume", panel=OUTPUT, help="Go on with the set in the folder. Default: start a new one.")
    ] = False,
    overwrite: Overwrite = False,
    shard_size: Annotated[
        int, option("--shard-size", panel=OUTPUT, metavar="N", min=1, help="Images per tar file. Default: 1000.")
    ] = 1000,
    part: Annotated[
        str | None,
        option(
            "--part",
            panel=OUTPUT,
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
    name, overrides = merged_settings(
        ctx,
        recipe=recipe,
        config=config,
        assignments=assignments,
        seed=seed,
        options={"method": method, "synthesis.steps": steps, "deterministic": deterministic},
    )
    teacher_said = model_said(
        "teacher-", teacher_arch, teacher_weights, teacher_num_classes, teacher_input_size, teacher_mean, teacher_std
    )
    student_said = model_said(
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
            "teacher_options": model_options(teacher_said),
            "student_options": model_options(student_said),
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
        print_plan(plan, json)
    elif json:
        print_json({"path": str(result.path), **result.manifest})
    else:
        print_line(result.path)


@app.command(cls=Command)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"The model to judge: {REFERENCE}.", show_default=False)
    ],
    data_dir: Annotated[
        str | None,
        option(
            "--data-dir", panel=DATA, metavar="DIR", help="Folder of class folders, a tar of them, or a data set's."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        option("--dataset", panel=DATA, metavar="NAME", help="A timm data set: torch/cifar10, ...; or builtin/digits."),
    ] = None,
    split: Annotated[
        str, option("--split", panel=DATA, metavar="NAME", help="Split of the data set. Default: validation.")
    ] = "validation",
    batch_size: Annotated[
        int, option("--batch-size", "-b", panel=DATA, metavar="N", min=1, help="Images per batch. Default: 128.")
    ] = 128,
    workers: Annotated[
        int,
        option("--workers", "-j", panel=DATA, metavar="N", min=0, help="Processes that read images. Default: 0."),
    ] = 0,
    img_size: Annotated[
        int | None,
        option("--img-size", panel=DATA, metavar="N", min=1, help="Height and width in pixels. Default: the model's."),
    ] = None,
    crop_pct: Annotated[
        float | None,
        option(
            "--crop-pct",
            panel=DATA,
            metavar="F",
            min=0.0,
            help="Share of the resized image that is kept. Default: the model's.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        option("--teacher", "-t", panel=MODELS, metavar="MODEL", help="A teacher to judge beside it; adds agreement."),
    ] = None,
    min_top1: Annotated[
        float | None,
        option(
            "--min-top1",
            panel=OUTPUT,
            metavar="PERCENT",
            min=0.0,
            max=100.0,
            help="Exit with code 4 if top1 is below this. Default: no threshold.",
        ),
    ] = None,
    json: Json = False,
    results_file: Annotated[
        Path | None,
        option("--results-file", panel=OUTPUT, metavar="FILE", help="Write the result there too: .json or .csv."),
    ] = None,
    arch: Annotated[str | None, ARCH] = None,
    weights: Annotated[str | None, WEIGHTS] = None,
    num_classes: Annotated[int | None, CLASSES] = None,
    input_size: Annotated[str | None, SIZE] = None,
    mean: Annotated[str | None, MEAN] = None,
    std: Annotated[str | None, STD] = None,
    device: Device = "auto",
    amp: Annotated[bool, option("--amp/--no-amp", panel=MACHINE, help="Mixed precision. Default: off.")] = False,
    amp_dtype: Annotated[
        str, option("--amp-dtype", panel=MACHINE, metavar="NAME", help="bfloat16 or float16. Default: bfloat16.")
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
    require_one_process("evaluate")
    if data_dir is None and dataset is None:
        raise UsageError("Nothing to judge on: give --data-dir DIR, --dataset NAME or both.")
    if amp_dtype not in ("bfloat16", "float16"):
        raise UsageError(f"--amp-dtype must be bfloat16 or float16, not {amp_dtype!r}.")
    if results_file is not None:
        check_results_file(results_file)
    said = model_said("", arch, weights, num_classes, input_size, mean, std)
    teacher_said = model_said(
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
            options=model_options(said),
            teacher=teacher,
            teacher_options=model_options(teacher_said),
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
        write_results(results_file, row)
    print_result(row, json)
    # Not `top1 < min_top1`: a top1 that is not a number has not reached anything.
    if min_top1 is not None and not row["top1"] >= min_top1:
        raise ThresholdError(f"top1 is {row['top1']:.2f} %, below --min-top1 {min_top1:g} %.")


app.command(cls=Command)(train)


app.command(cls=Command)(benchmark)


@app.command(cls=Command)
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


__all__ = ["app"]
