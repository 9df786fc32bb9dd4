"""The real command under torchrun: one result, one report, stopped and killed as machines do it, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranks

#: Nothing here may hang.
LIMIT = 120
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastdfkd_cli"]
ALONE = [sys.executable, "-m", "fastdfkd_cli"]
SETTINGS = [
    "steps=2",
    "kd_steps_per_round=20",
    "distillation.batch_size=16",
    "synthesis.batch_size=32",
    "generator.width=16",
    "quality_images=0",
]
MODELS = ["distill", "--teacher", "builtin/digits", "--student", "cifar/wrn10_1", "--device", "cpu", "--no-amp"]
WORDS = [*MODELS, "--recipe", "digits", "--rounds", "12", *(word for each in SETTINGS for word in ("--set", each))]
ENVIRONMENT = {**os.environ, **ranks.ENVIRONMENT}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def ours(self) -> list[str]:
        """What the command itself said at the end; torchrun adds its own report."""
        return [line for line in self.err.splitlines() if line.startswith("fastdfkd: ")]


def ran(words: list[str], *more: str) -> Done:
    done = subprocess.run([*words, *more], capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT)
    return Done(done.returncode, done.stdout, done.stderr)


def ended(output: Path, signum: int, rank: int | None) -> Done:
    """Start a run, and send a signal at its first KD step: to torchrun, or to the process of a rank."""
    words = [*TORCHRUN, *WORDS, "--output", str(output), "--checkpoint-every", "0.2s"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            read = []
            for line in process.stderr:
                read.append(line)
                if "] distillation" in line:
                    os.kill(process.pid if rank is None else worker(process.pid, rank), signum)
                    break
            out, rest = process.communicate(timeout=LIMIT)
        except BaseException:
            process.terminate()
            raise
    return Done(process.returncode, out, "".join(read) + rest)


def worker(parent: int, rank: int) -> int:
    """The process of torchrun's that has this rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            of_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if of_parent and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except OSError:
            continue
    raise LookupError(f"no process of rank {rank}")


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that is left alone."""
    output = folder / "whole"
    done = ran([*TORCHRUN, *WORDS], "--output", str(output))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(output)
    assert done.out.count(str(output)) == 1  # rank 0 alone speaks
    assert done.err.count("teacher builtin/digits") == 1
    assert "2 processes; a step is over 2 x 16 images in distillation, 2 x 32 in synthesis" in done.err
    assert not done.ours
    return output


def test_one_student_and_one_report_for_all(whole: Path) -> None:
    found = report(whole)
    assert found["processes"] == 2
    assert found["global_batch"] == {"synthesis": 64, "distillation": 32}
    assert found["images"] == found["pool"] == 12 * 32  # those of one process
    assert found["config"]["schedule"]["rounds"] == 12  # as it was asked for
    assert sorted(path.name for path in whole.parent.iterdir()) == [whole.name]  # no checkpoints are left


def test_a_stopped_run_saves_and_goes_on_to_the_same_student(whole: Path) -> None:
    output = whole.with_name("stopped")
    stopped = ended(output, signal.SIGTERM, None)
    assert stopped.code == 1  # torchrun's, whatever ours are
    assert stopped.out == ""
    saving, line = stopped.ours
    assert saving == "fastdfkd: finishing the step and saving; once more to stop at once"
    assert line.startswith("fastdfkd: interrupted: stopped by SIGTERM; ")
    assert line.endswith(f"are kept in {output}.checkpoints: the same command with --resume auto goes on.")
    again = ran([*TORCHRUN, *WORDS], "--output", str(output), "--resume", "auto")
    assert again.code == 0, again.err
    assert "going on after" in again.err
    one, other = (load_file(path / "model.safetensors") for path in (whole, output))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_killed_process_ends_the_run_and_one_process_goes_on_with_it(folder: Path) -> None:
    output = folder / "killed"
    killed = ended(output, signal.SIGKILL, 1)
    assert killed.code == 1
    assert killed.out == ""
    (line,) = [line for line in killed.ours if "finishing the step" not in line]
    assert line == (
        "fastdfkd: error: Process 1 of 2 ended or stopped answering without a word (killed, or out of memory?). The "
        f"others end with it. The last checkpoint is kept in {output}.checkpoints: --resume auto goes on with it."
    )
    again = ran([*ALONE, *WORDS], "--output", str(output), "--resume", "auto")
    assert again.code == 0, again.err
    assert "going on after" in again.err
    assert report(output)["processes"] == 1
    assert report(output)["images"] >= 12 * 32


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["distill", "--teacher", "a", "--student", "b", "--nonsense"], "No such option"),
        (["evaluate", "a", "--dataset", "builtin/digits"], "evaluate works in one process, and torchrun started 2"),
        (["synthesize", "--teacher", "a", "-n", "1", "-o", "x"], "1 images cannot be divided into 2 parts"),
    ],
)
def test_a_usage_error_is_said_once(words: list[str], line: str) -> None:
    done = ran([*TORCHRUN, *words])
    assert done.code == 1
    assert len(done.ours) == 1
    assert line in done.ours[0]


def test_a_set_is_made_by_all_processes_and_gone_on_with_by_one(folder: Path) -> None:
    settings = [word for each in (*SETTINGS[3:5], "synthesis.steps=2") for word in ("--set", each)]
    words = [
        "synthesize",
        "--teacher",
        "builtin/digits",
        "-n",
        "70",
        "--recipe",
        "digits",
        "--device",
        "cpu",
        "--no-amp",
    ]
    words += [*settings, "--shard-size", "16"]
    together, apart = folder / "together", folder / "apart"
    done = ran([*TORCHRUN, *words], "--output", str(together))
    assert done.code == 0, done.err
    assert done.out.splitlines() == [str(together)]
    assert "of 2 parts, this process makes 1" in done.err
    assert not done.ours
    first = ran([*ALONE, *words], "--output", str(apart), "--part", "1/2")
    assert first.code == 0, first.err
    assert first.out.splitlines() == [str(apart / "part-00001-of-00002")]
    rest = ran([*ALONE, *words], "--output", str(apart), "--resume")
    assert rest.code == 0, rest.err
    assert rest.out.splitlines() == [str(apart)]
    made, alone = (json.loads((output / "manifest.json").read_text()) for output in (together, apart))
    assert made["num_images"] == 70
    for key in ("header", "shards", "counts"):
        assert made[key] == alone[key], key
