"""Is a student as good with the speed-ups as without them? Trains both ways, to the same number of steps.

    python benchmarks/accuracy.py --teacher teacher.safetensors --student cifar/wrn16_1 --recipe quick --rounds 30 \
        --seeds 0 1 2 --which plain ours --eval-data test.tar --output accuracy.jsonl

Each finished run is one line of JSON in the output; runs that stand there already are not repeated. The images given
are used once, to judge the finished students.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import plain
from fastdfkd_cli.config import RunConfig
from fastdfkd_cli.data import open_evaluation_data
from fastdfkd_cli.distillation import Distillation
from fastdfkd_cli.evaluation import drain, evaluate_model
from fastdfkd_cli.job import override
from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import LoadedModel, ModelOptions, load_student, load_teacher
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.runtime import default_amp, describe_device, resolve_device

ROOT = Path(__file__).resolve().parent.parent


def train(which: str, config: RunConfig, teacher: LoadedModel, student: LoadedModel, device: torch.device) -> None:
    """One run, ``student`` trained in place."""
    size, classes = teacher.input.size, teacher.num_classes
    if which == "plain":
        whole, pupil = teacher.normalized().to(device), student.normalized().to(device)
        for index, loss in plain.distill(config, whole, pupil, image_size=size, num_classes=classes, device=device):
            print(f"{which} seed {config.seed}: round {index + 1}, loss {loss:.4f}", file=sys.stderr, flush=True)
        return
    amp = which == "ours" and default_amp(device)
    form = {"memory_format": torch.channels_last}
    whole = teacher.normalized().to(device, **form).eval().requires_grad_(False)  # type: ignore[call-overload]
    pupil = student.normalized().to(device, **form)  # type: ignore[call-overload]
    keywords: dict[str, Any] = {"device": device, "amp": amp}
    method = build_method(config, whole, image_size=size, num_classes=classes, **keywords)
    for record in Distillation(config, whole, pupil, synthesizer=method, image_size=size, **keywords):
        print(f"{which} seed {config.seed}: {record.phase} {record.step}", file=sys.stderr, flush=True)
    method.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--rounds", type=int, help="a shorter run: warm-up keeps its share")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--which", nargs="+", choices=["plain", "ours", "float32"], default=["plain", "ours"],
        help="without speed-ups, with all of them, with all but bf16",
    )  # fmt: skip
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = resolve_device(args.device)
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.exists() else []
    done = [json.loads(line) for line in lines]
    for seed in args.seeds:
        for which in args.which:
            teacher = load_teacher(args.teacher, ModelOptions())
            budget = {"rounds": args.rounds} if args.rounds else {}
            config = override(get_recipe(args.recipe).config(teacher.input.size), {**budget, "seed": seed})
            wanted = {"which": which, "seed": seed, "recipe": args.recipe, "rounds": config.schedule.rounds}
            if any(wanted.items() <= run.items() for run in done):
                continue
            with torch.random.fork_rng():
                torch.default_generator.manual_seed(seed)
                student = load_student(args.student, ModelOptions(), like=teacher)
            began = time.perf_counter()
            train(which, config, teacher, student, device)
            seconds = time.perf_counter() - began
            data = open_evaluation_data(data_dir=args.eval_data)
            row = drain(evaluate_model(student, data, device=device, workers=0)).row
            run = {
                "which": which, "seed": seed, "top1": row["top1"], "seconds": round(seconds, 1),
                "recipe": args.recipe, "rounds": config.schedule.rounds, "images": config.synthetic_images,
                "kd_steps": config.kd_steps, "device": describe_device(device), "python": platform.python_version(),
                "torch": torch.__version__,
            }  # fmt: skip
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            done.append(run)
    for which in ("plain", "float32", "ours"):
        scores = [run["top1"] for run in done if run["which"] == which]
        if scores:
            spread = f", spread {max(scores) - min(scores):.2f}" if len(scores) > 1 else ""
            print(f"{which}: {', '.join(f'{s:.2f}' for s in scores)}; mean {statistics.mean(scores):.2f}{spread}")


if __name__ == "__main__":
    main()
