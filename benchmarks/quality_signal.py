"""Does the quality signal, which needs no data, follow real accuracy? Reads it off finished students once more.

    python benchmarks/quality_signal.py methods table5 --settings 128x50 256x150 fast --output signal.json \
        --picture signal.png

The arguments are folders of `fastdfkd benchmark`, whose runs were judged on real images and have one teacher. A setting
is images x steps of DeepInversion's images, or `fast`: fresh images of FastDFKD's by the recipe `quick`, from another
seed than any run's, after its warm-up. The images of a setting are made once and shown to all students. The picture is
of the first setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdfkd_cli.methods import build_method
from fastdfkd_cli.models import LoadedModel, load_teacher
from fastdfkd_cli.plots import write_quality
from fastdfkd_cli.quality import QUALITY_SEED, compare, signal_config
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.resume import finished
from fastdfkd_cli.runtime import default_amp, resolve_device
from fastdfkd_cli.tables import correlations

#: Batches that a new FastDFKD generator makes before its images count.
WARM_UP = 10
FAST_IMAGES = 512


def runs(folders: list[Path]) -> Iterator[tuple[str, str, Path, dict[str, Any]]]:
    """Name, row, folder and report of every finished run that was judged and learned from a teacher."""
    for folder in folders:
        for request in sorted((folder / "runs").glob("*.json")):
            report = finished(run := request.with_suffix(""))
            if report is not None and report.get("evaluation") and report.get("teacher"):
                cell = json.loads(request.read_text(encoding="utf-8"))["cell"]
                yield cell, cell.partition("/")[0], run, report


def images(setting: str, teacher: nn.Module, loaded: LoadedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images of a setting, uint8, and the classes that were asked for."""
    size = loaded.input.size
    config = get_recipe("quick").config(size)
    fast = setting == "fast"
    if fast:
        wanted, skipped = FAST_IMAGES, WARM_UP
        config = replace(config, seed=QUALITY_SEED)
    else:
        wanted, steps = map(int, setting.split("x"))
        config, skipped = signal_config(replace(config, quality_images=wanted, quality_steps=steps), size), 0
    method = build_method(
        config, teacher, image_size=size, num_classes=loaded.num_classes, device=device, amp=default_amp(device)
    )
    for _ in range(skipped):
        method.synthesize()
    batches = [method.synthesize() for _ in range(-(-wanted // config.synthesis.batch_size))]
    method.close()
    return torch.cat([b.images for b in batches])[:wanted], torch.cat([b.labels for b in batches])[:wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--settings", nargs="+", default=["128x50", "256x150", "fast"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    found = list(runs(arguments.folders))
    teachers = {report["teacher"]["reference"] for *_, report in found}
    if len(teachers) != 1:
        sys.exit(f"The runs must have one teacher, not {len(teachers)}: {', '.join(sorted(teachers))}")
    loaded = load_teacher(teachers.pop())
    form: dict[str, Any] = {"memory_format": torch.channels_last}
    teacher = loaded.normalized().to(device, **form).eval().requires_grad_(False)
    result: dict[str, Any] = {}
    for setting in arguments.settings:
        shown, labels = images(setting, teacher, loaded, device)
        points = []
        for cell, row, folder, report in found:
            student = load_teacher(str(folder)).normalized().to(device, **form).eval()
            quality = compare(teacher, student, shown, labels, num_classes=loaded.num_classes, batch_size=128)
            points.append(
                {
                    "cell": cell, "row": row, "teacher": loaded.name, "top1": report["evaluation"]["top1"],
                    "quality": quality.to_dict(),
                }
            )  # fmt: skip
        result[setting] = {"points": points, "quality": correlations(points)}
        print(f"{setting}, {len(points)} runs")
        for entry in result[setting]["quality"]:
            if entry["spearman"] is not None:
                print(f"  {entry['figure']:20} Spearman {entry['spearman']:+.3f}  Pearson {entry['pearson']:+.3f}")
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.picture is not None:
        write_quality(result[arguments.settings[0]], arguments.picture)


if __name__ == "__main__":
    main()
