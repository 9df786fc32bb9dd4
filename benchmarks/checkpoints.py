"""What checkpoints cost: the same run with and without them, in turns.

    python benchmarks/checkpoints.py --turns 3 --every 5s -- \
        --teacher builtin/digits --student cifar/wrn10_1 --recipe digits

Everything behind ``--`` goes to ``fastdfkd distill``. A run without checkpoints (``--checkpoint-every 0``) and one with
them make a turn, and their order changes from turn to turn. For each: seconds on the wall's clock from start to end,
seconds of processor time, and the seconds that the run says it waited for its checkpoints. JSON on stdout: all of it,
and the medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(words: list[str], every: str, folder: Path) -> dict[str, Any]:
    """Carry out the command once, and measure it."""
    output = folder / f"student-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "fastdfkd_cli", "distill", *words, "--checkpoint-every", every]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the run ended with {process.returncode}: {said.strip().splitlines()[-1:]}")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "every": every,
        "wall": round(seconds, 2),
        "processor": round(usage.ru_utime + usage.ru_stime, 2),
        "waited": report["seconds"]["checkpoints"],
        "run": report["seconds"]["total"],
        "images": report["images"],
        "kd_steps": report["kd_steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--every", default="5m", help="as --checkpoint-every (default: 5m)")
    parser.add_argument("words", nargs="+", metavar="-- OPTIONS", help="options of fastdfkd distill")
    args = parser.parse_args()
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            order = ("0", args.every) if turn % 2 == 0 else (args.every, "0")
            found = {every: run(args.words, every, Path(folder)) for every in order}
            turns.append({"without": found["0"], "with": found[args.every]})
            line = ", ".join(f"{each['every']}: {each['wall']} s, {each['processor']} s" for each in found.values())
            print(f"turn {turn + 1} of {args.turns}: {line}", file=sys.stderr)
    result = {
        "wall": statistics.median(turn["with"]["wall"] / turn["without"]["wall"] for turn in turns),
        "processor": statistics.median(turn["with"]["processor"] / turn["without"]["processor"] for turn in turns),
        "waited_share": statistics.median(turn["with"]["waited"] / turn["with"]["run"] for turn in turns),
        "turns": turns,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
