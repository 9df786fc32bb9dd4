"""How fast are synthesis and distillation: a plain version in the published manner against ours, taking turns.

    python benchmarks/speed.py --teacher teacher.safetensors --student cifar/wrn16_1 --batch 256 --steps 5
    python benchmarks/speed.py --teacher teacher.safetensors --student cifar/wrn16_1 --memory
    python benchmarks/speed.py --published          # on a GPU: the paper's whole schedule, end to end
    python benchmarks/speed.py --large              # on a GPU: ResNet-50 at 224 pixels, 50 steps

A table goes to stderr, JSON to stdout or to --output. README.md beside this file says what each figure means.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from contestants import RANDOM, Remote, Setup, teacher_of
from fastdfkd_cli import api
from fastdfkd_cli.errors import FastDFKDError, UsageError
from fastdfkd_cli.runtime import describe_device, resolve_device, tune_process, versions
from measure import best_peaks, peaks, spread

COLUMNS = ("plain", "float32", "ours")
#: The networks of the paper's Table 1 that the issue's figures are stated for, and of its Table 2.
SMALL_TEACHER, SMALL_STUDENT, SMALL_RECIPE = f"{RANDOM}fastdfkd_wrn40_2", "cifar/wrn16_2", "cifar10-wrn402-wrn162-k5"
LARGE_TEACHER, LARGE_STUDENT = f"{RANDOM}resnet50", "timm/mobilenetv2_100"
LARGE_RECIPE = "imagenet-resnet50-mobilenetv2-k50"
#: Images of the paper's CIFAR pool (220 batches of 256).
PUBLISHED_POOL = 56_320

stderr = Console(stderr=True)
if not stderr.is_terminal:
    stderr.width = 120


def compare(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Synthesis and KD of each column, in turns, with the machine's peaks measured before and after."""
    device = resolve_device(setup.device)
    cuda = device.type == "cuda"
    # A GPU is done with one batch before the clock can tell, and a graph is recorded at the fourth call.
    batches = args.batches or (10 if cuda else 1)
    kd_steps = args.kd_steps or (100 if cuda else 10)
    warm_ups = args.warm_ups if args.warm_ups is not None else (5 if cuda else 1)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"synthesis": [], "kd": [], "kd_without_loader": []} for name in args.columns
    }
    columns: dict[str, dict[str, Any]] = {}
    before = peaks(device)
    with ExitStack() as stack:
        remotes: dict[str, Remote] = {}
        for name in args.columns:
            began = time.perf_counter()
            remote = remotes[name] = stack.enter_context(Remote(name, setup))
            columns[name] = {"flops_per_image": remote("flops"), "start_seconds": round(time.perf_counter() - began, 2)}
            remote("fill")
            columns[name]["first_batch_seconds"] = round(remote("synthesize", batches=1), 3)
            columns[name]["first_kd_step_seconds"] = round(remote("distil", steps=1)["seconds"], 3)
            for _ in range(warm_ups - 1):
                remote("synthesize", batches=1)
                remote("distil", steps=2)
            say(f"{name} is warm ({columns[name]['first_batch_seconds']:.1f} s for the first batch)")
        for turn in range(args.repeats):
            for name, remote in remotes.items():
                seconds[name]["synthesis"].append(remote("synthesize", batches=batches) / batches)
            for name, remote in remotes.items():
                round_of = remote("distil", steps=kd_steps)
                seconds[name]["kd"].append(round_of["seconds"] / kd_steps)
                seconds[name]["kd_without_loader"].append((round_of["seconds"] - round_of["loader"]) / kd_steps)
            say(f"turn {turn + 1} of {args.repeats}")
        for name, remote in remotes.items():
            columns[name].update(remote("describe"))
    peak = best_peaks(before, peaks(device))
    batch, inner_steps = setup.overrides["synthesis.batch_size"], setup.overrides["synthesis.steps"]
    kd_batch = setup.overrides["distillation.batch_size"]
    for name, column in columns.items():
        taken, work = seconds[name], column["flops_per_image"]
        column["synthesis_images_per_second"] = spread([batch / each for each in taken["synthesis"]])
        column["kd_steps_per_second"] = spread([1 / each for each in taken["kd"]])
        column["kd_steps_per_second_without_loader_start"] = spread([1 / each for each in taken["kd_without_loader"]])
        reached = {
            "synthesis": inner_steps * work["inner_step"] * batch / median(taken["synthesis"]),
            "kd": work["kd_step"] * kd_batch / median(taken["kd"]),
        }
        column["share_of_peak"] = {
            what: round(rate / 1e12 / peak[f"{column['precision']}_tflops"], 4) for what, rate in reached.items()
        }
    return {
        "machine": {"device": describe_device(device), "peaks": peak, "versions": versions()},
        "setup": described(setup),
        "measured": {
            "repeats": args.repeats, "batches_per_repeat": batches, "kd_steps_per_repeat": kd_steps,
            "warm_ups": warm_ups, "pool_images": setup.pool_images,
        },
        "columns": columns,
        "ratios": {name: ratios(seconds, name) for name in columns if name != "plain" and "plain" in columns},
    }  # fmt: skip


def ratios(seconds: dict[str, dict[str, list[float]]], name: str) -> dict[str, dict[str, float]]:
    """How many times as fast as plain, turn by turn."""
    return {
        what: spread([a / b for a, b in zip(seconds["plain"][what], seconds[name][what], strict=True)])
        for what in ("synthesis", "kd", "kd_without_loader")
    }


def memory(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Growth of peak memory, each figure in a fresh process."""
    setup = dataclasses.replace(setup, planned=False)
    found: dict[str, Any] = {}
    for name in args.columns:
        for what in ("synthesis", "kd"):
            with Remote(name, setup) as remote:
                found[f"{name}.{what}"] = remote("memory", what=what)
            say(f"{name}, {what}: {found[f'{name}.{what}']['growth_bytes'] / 1e6:.0f} MB")
            for file in setup.folder.glob("*.png"):
                file.unlink()
    with Remote("pool", setup) as remote:
        found["pool"] = remote("memory", images=PUBLISHED_POOL, batch=setup.overrides["synthesis.batch_size"])
    return {
        "machine": {"device": describe_device(resolve_device(setup.device)), "versions": versions()},
        "setup": described(setup),
        "memory": found,
    }


def published(setup: Setup, rounds: int | None) -> dict[str, Any]:
    """The recipe's whole schedule through the public function, without images to judge the student on."""
    tune_process()
    teacher, options = teacher_of(setup)
    budget = {"rounds": rounds} if rounds else {}
    began = time.perf_counter()
    report = api.distill(
        teacher,
        setup.student,
        teacher_options=options,
        recipe=setup.recipe,
        overrides={**setup.overrides, **budget, "quality_images": 0},
        device=setup.device,
        compile=setup.compile,
        graphs=setup.graphs,
        on_message=say,
    ).report
    spent = report["seconds"]
    return {
        "machine": {"device": report["device"], "versions": report["versions"]},
        "setup": described(setup),
        "amp": report["amp"],
        "rounds": report["config"]["schedule"]["rounds"],
        "images": report["images"],
        "kd_steps": report["kd_steps"],
        "seconds": {**spent, "wall": round(time.perf_counter() - began, 2)},
        "seconds_for_50000_images": round(spent["synthesis"] / report["images"] * 50_000, 2),
        "kd_steps_per_second": round(report["kd_steps"] / max(spent["distillation"], 1e-9), 1),
        "peak_memory_bytes": report["peak_memory_bytes"],
    }


def large(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for 1,000 images at 224 pixels, by batch size, each in a fresh process."""
    device = resolve_device(setup.device)
    cuda = device.type == "cuda"
    peak = best_peaks(peaks(device))
    found: dict[str, dict[str, Any]] = {}
    for batch in args.large_batches:
        overrides = {**setup.overrides, "synthesis.batch_size": batch}
        sized = replace(setup, overrides=overrides, pool_images=max(batch, setup.pool_images))
        warm_ups = args.warm_ups if args.warm_ups is not None else (5 if cuda else 1)
        try:
            with Remote("ours", sized) as remote:
                work = remote("flops")["inner_step"]
                first = remote("synthesize", batches=1)
                for _ in range(warm_ups - 1):
                    remote("synthesize", batches=1)
                taken = [remote("synthesize", batches=1) for _ in range(args.repeats)]
                column = remote("describe")
                grown = remote("memory", what="synthesis")
        except FastDFKDError as error:  # memory, most likely: the smaller batches stand
            say(f"batch {batch}: {error}")
            found[str(batch)] = {"error": str(error)}
            continue
        rate = setup.overrides["synthesis.steps"] * work * batch / median(taken)
        found[str(batch)] = {
            **column,
            "seconds_per_1000_images": spread([1000 / batch * each for each in taken]),
            "first_batch_seconds": round(first, 2),
            "flops_per_image_and_step": work,
            "share_of_peak": round(rate / 1e12 / peak[f"{column['precision']}_tflops"], 4),
            "peak_memory_bytes": grown["peak_bytes"],
        }
        say(f"batch {batch}: {found[str(batch)]['seconds_per_1000_images']['median']:.2f} s for 1,000 images")
    return {
        "machine": {"device": describe_device(device), "peaks": peak, "versions": versions()},
        "setup": described(setup),
        "batches": found,
    }


def described(setup: Setup) -> dict[str, Any]:
    return {name: value for name, value in vars(setup).items() if name != "folder"}


def say(line: str) -> None:
    stderr.print(line, highlight=False, markup=False)


def show(result: dict[str, Any]) -> None:
    """The comparison as a table on stderr."""
    columns: dict[str, Any] = result["columns"]
    table = Table(title=f"{result['setup']['teacher']} to {result['setup']['student']}", title_style="")
    table.add_column("")
    for name, column in columns.items():
        table.add_column(f"{name} ({column['precision']})", justify="right")

    def row(label: str, values: Sequence[str]) -> None:
        table.add_row(label, *values)

    def rates(key: str) -> list[str]:
        return [f"{c[key]['median']:g} ({c[key]['min']:g} to {c[key]['max']:g})" for c in columns.values()]

    def factors(what: str) -> list[str]:
        found = [result["ratios"].get(name, {}).get(what) for name in columns]
        return [f"{each['median']:.1f} ({each['min']:.1f} to {each['max']:.1f})" if each else "1" for each in found]

    row("synthesis, images/s", rates("synthesis_images_per_second"))
    if result["ratios"]:
        row("  times plain", factors("synthesis"))
    row("KD, steps/s", rates("kd_steps_per_second"))
    if result["ratios"]:
        row("  times plain", factors("kd"))
        row("  times plain, without its loader's start", factors("kd_without_loader"))
    for what in ("synthesis", "kd"):
        row(f"share of peak, {what}", [f"{100 * c['share_of_peak'][what]:.1f} %" for c in columns.values()])
    row("MFLOP per image and inner step", [f"{c['flops_per_image']['inner_step'] / 1e6:.0f}" for c in columns.values()])
    row("MFLOP per image and KD step", [f"{c['flops_per_image']['kd_step'] / 1e6:.0f}" for c in columns.values()])
    row("first batch, s", [f"{c['first_batch_seconds']:.2f}" for c in columns.values()])
    stderr.print(table)
    peak = result["machine"]["peaks"]
    say(
        f"peaks of this run: {peak['float32_tflops']:.3f} TFLOP/s in float32, {peak['bf16_tflops']:.3f} in bf16, "
        f"{peak['copy_gb_per_second']:.1f} GB/s read and written by a copy"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    what.add_argument("--published", action="store_true", help="the recipe's whole schedule, end to end")
    what.add_argument("--large", action="store_true", help="ResNet-50 at 224 pixels")
    parser.add_argument("--teacher", help="a model reference (default: the paper's network with random weights)")
    parser.add_argument("--student", help="a model reference")
    parser.add_argument("--recipe", help="default: auto; with --published and --large the paper's")
    parser.add_argument("--batch", type=int, help="images per synthesised batch and per KD step")
    parser.add_argument("--steps", type=int, help="inner steps per batch")
    parser.add_argument("--width", type=int, help="channels of the generator")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=["plain", "ours"],
        help="what is compared: plain, ours, and ours in float32")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="turns, of which the median counts")
    parser.add_argument("--batches", type=int, help="batches per turn (default: 1, on CUDA 10)")
    parser.add_argument("--kd-steps", type=int, help="KD steps per turn (default: 10, on CUDA 100)")
    parser.add_argument("--warm-ups", type=int, help="batches before the first turn (default: 1, on CUDA 5)")
    parser.add_argument("--pool-images", type=int, default=2560, help="images that KD draws from")
    parser.add_argument("--rounds", type=int, help="with --published: fewer rounds")
    parser.add_argument("--large-batches", type=int, nargs="+", default=[100, 200, 400], help="with --large")
    parser.add_argument("--compile", action="store_true", help="our side's --compile")
    parser.add_argument("--graphs", action="store_true", help="our side's --graphs (CUDA)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a file for the JSON (default: stdout)")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "width", "repeats", "batches", "kd_steps", "warm_ups", "pool_images", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    return args


def setup_of(args: argparse.Namespace, folder: Path) -> Setup:
    """The request with its defaults; the settings that figures are computed from are always stated."""
    wide = args.large
    recipe = args.recipe or (LARGE_RECIPE if wide else SMALL_RECIPE if args.published else "auto")
    setup = Setup(
        teacher=args.teacher or (LARGE_TEACHER if wide else SMALL_TEACHER),
        student=args.student or (LARGE_STUDENT if wide else SMALL_STUDENT),
        recipe=recipe,
        device=args.device,
        num_classes=1000 if wide else 10,
        image_size=(3, 224, 224) if wide else (3, 32, 32),
        # Pictures of 224 pixels are many bytes, and KD is not measured there.
        pool_images=100 if wide else args.pool_images,
        folder=folder,
        compile=args.compile,
        graphs=args.graphs,
    )
    if args.published:
        asked = {"synthesis.batch_size": args.batch, "distillation.batch_size": args.batch}
        asked |= {"synthesis.steps": args.steps, "generator.width": args.width}
        return replace(setup, overrides={key: value for key, value in asked.items() if value is not None})
    overrides: dict[str, Any] = {
        "synthesis.batch_size": args.batch or (100 if wide else 256),
        "distillation.batch_size": args.batch or (100 if wide else 256),
        "synthesis.steps": args.steps or (50 if wide else 5),
    }
    if args.width is not None:
        overrides["generator.width"] = args.width
    if not wide and setup.pool_images < overrides["synthesis.batch_size"]:
        raise UsageError(f"--pool-images must be a batch or more, not {setup.pool_images}.")
    return replace(setup, overrides=overrides)


def main() -> int:
    args = parse()
    try:
        with tempfile.TemporaryDirectory(prefix="plain-pool-") as folder:
            setup = setup_of(args, Path(folder))
            if args.memory:
                result = memory(setup, args)
            elif args.published:
                result = published(setup, args.rounds)
            elif args.large:
                result = large(setup, args)
            else:
                result = compare(setup, args)
                show(result)
    except FastDFKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = json.dumps(result, indent=2)
    if args.output is None:
        print(text)
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
