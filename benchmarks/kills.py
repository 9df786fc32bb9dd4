"""Stop a run at random moments until it has ended all the same, and compare what it leaves with a run left alone.

    python benchmarks/kills.py --kills 50                      # SIGKILL
    python benchmarks/kills.py --kills 20 --signal TERM        # or INT: the run saves itself and says how to go on
    python benchmarks/kills.py --kills 20 --command synthesize

Each run is the real command in a process of its own, forked from this one so that nothing is imported again, and is
stopped and gone on with several times. A line for each goes to stderr, JSON to stdout: stops by phase, and whether
every student (or set) is the same, bit for bit. Exit code 1 if one is not, or if anything was found damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fastdfkd_cli.api  # noqa: F401  (once, for all runs)
from fastdfkd_cli.__main__ import main as fastdfkd

COMMANDS = {
    "distill": ["distill", "--teacher", "builtin/digits", "--student", "cifar/wrn10_1", "--recipe", "digits",
                "--set", "quality_images=64", "--set", "distillation.average=ema", "--resume", "auto"],
    "synthesize": ["synthesize", "--teacher", "builtin/digits", "--recipe", "digits", "--shard-size", "100",
                   "--resume"],
}  # fmt: skip
#: What in a run's output tells its phase, latest first.
PHASES = ("export", "quality", "distillation", "synthesis", "expecting")


def command(args: argparse.Namespace, output: Path) -> list[str]:
    size = ["--images", str(args.images)] if args.command == "distill" else ["--num-images", str(args.images)]
    return [
        *COMMANDS[args.command],
        *size,
        "--device",
        "cpu",
        "--checkpoint-every",
        args.every,
        "--output",
        str(output),
    ]


def start(words: list[str], log: Path) -> int:
    """Fork a process that runs the command; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        code = fastdfkd(words)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """The exit status, or None if it is still running after so many seconds."""
    end = None if seconds is None else time.perf_counter() + seconds
    while True:
        found, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if found:
            return status
        if end is not None and time.perf_counter() >= end:
            return None
        time.sleep(0.002)


def phase(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return next((name for name in PHASES if name in text), "loading")


def digest(command: str, output: Path) -> str:
    """What is compared: the student's tensors, or every image, label and logit of the set."""
    found = hashlib.sha256()
    if command == "distill":
        for name, tensor in sorted(load_file(output / "model.safetensors").items()):
            found.update(name.encode() + tensor.numpy().tobytes())
    else:
        for path in sorted([*output.glob("train-*.tar"), *output.glob("train-*.safetensors")]):
            found.update(path.read_bytes())
    return found.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See the head of the file.")
    parser.add_argument("--command", choices=COMMANDS, default="distill")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--every", default="0.05s", help="--checkpoint-every of the runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance, signum = random.Random(args.seed), getattr(signal, f"SIG{args.signal}")
    expected_code = {"KILL": None, "TERM": 143, "INT": 130}[args.signal]
    stops: Counter[str] = Counter()
    runs, same, wrong = 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        if wait(start(command(args, root / "whole"), root / "whole.log")):
            print((root / "whole.log").read_text(), file=sys.stderr)
            return 1
        whole_seconds, whole = time.perf_counter() - began, digest(args.command, root / "whole")
        while sum(stops.values()) < args.kills:
            runs += 1
            output = root / f"run-{runs}"
            for attempt in range(1000):
                log = root / f"run-{runs}-{attempt}.log"
                pid = start(command(args, output), log)
                # Somewhere in what is left, or after it; towards the end of a run its moments are short.
                status = wait(pid, chance.uniform(0.05, 1.05) * whole_seconds / chance.choice((1, 2, 4)))
                if status is None and sum(stops.values()) < args.kills:
                    stops[phase(log)] += 1
                    os.kill(pid, signum)
                    status = wait(pid)
                    code = None if os.WIFSIGNALED(status or 0) else os.waitstatus_to_exitcode(status or 0)
                    if code == 0:
                        break  # it had ended before the signal came
                    if code != expected_code:
                        wrong.append(f"run {runs}, attempt {attempt}: exit code {code}: {log.read_text()[-300:]}")
                    continue
                if status is None:
                    status = wait(pid)
                if status:
                    wrong.append(f"run {runs}, attempt {attempt}: {log.read_text()[-300:]}")
                break
            damage = [line for each in root.glob(f"run-{runs}-*.log") for line in each.read_text().splitlines()
                      if "truncated" in line or "damaged" in line or "Traceback" in line]  # fmt: skip
            left = [path.name for path in root.iterdir() if path.name.startswith((f"run-{runs}.", f".run-{runs}."))]
            equal = digest(args.command, output) == whole if output.exists() else False
            same += equal
            wrong += damage + [f"run {runs} left {name}" for name in left]
            print(f"run {runs}: {attempt + 1} processes, {'the same' if equal else 'NOT THE SAME'}", file=sys.stderr)
    result: dict[str, Any] = {
        "command": args.command, "signal": args.signal, "stops": dict(stops), "runs": runs, "same": same,
        "seconds_of_a_whole_run": round(whole_seconds, 2), "wrong": wrong,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    return 1 if wrong or same != runs else 0


if __name__ == "__main__":
    sys.exit(main())
