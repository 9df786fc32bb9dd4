"""Under HF_HUB_OFFLINE=1 no command reaches for the network: not for a name, not for an address.

And whatever a command writes stands where it was told to write.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Runs command lines with an audit hook, which sees every look-up, connection and file that Python makes.
DRIVER = """
import json, os, sys
reached, written = [], []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(arguments[0])
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link"):
        written.append(arguments[1 if event in ("os.symlink", "os.link") else 0])
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        reached.append(f"{event} {arguments!r}")
    elif event == "socket.connect" and isinstance(arguments[1], tuple):  # others are files of this machine
        reached.append(f"{event} {arguments[1]!r}")
sys.addaudithook(hook)
from fastdfkd_cli.__main__ import main
codes = [main(words) for words in json.loads(sys.argv[1])]
written = sorted({os.path.realpath(os.fsdecode(path)) for path in written if not isinstance(path, int)})
print(json.dumps({"codes": codes, "reached": reached, "written": written}))
"""
ON_DIGITS = ("--dataset", "builtin/digits", "--device", "cpu")
TINY = (
    "synthesis.batch_size=8", "distillation.batch_size=8", "schedule.rounds=3", "schedule.warmup_rounds=1",
    "schedule.final_rounds=0", "quality_images=8", "quality_steps=2", "synthesis.steps=1",
    "schedule.kd_steps_per_round=2", "generator.width=4", "synthesis.generator_reset_after=0",
    "schedule.batches_per_round=1", "pool_size=0",
)  # fmt: skip


def drive(home: Path, *lines: tuple[str, ...], **environment: str) -> tuple[dict[str, Any], str]:
    """What the command lines ended with and reached for, and what they said on stderr."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING", "TORCH")) and "proxy" not in k.lower()
    }
    # An address that answers at once, that there is nobody; whoever asks for another one is seen all the same.
    moved = {"HF_HOME": str(home), "TORCH_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    moved |= {"TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)],
        env=kept | moved | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_offline_means_offline(tmp_path: Path) -> None:
    settings = [word for setting in TINY for word in ("--set", setting)]
    run = ("distill", "-t", "builtin/digits", "-s", "cifar/wrn10_1", "--recipe", "smoke", "-o", str(tmp_path / "out"))
    refused = (
        ("evaluate", "hf-hub:owner/repo", *ON_DIGITS),
        ("evaluate", "owner/repo@v1", *ON_DIGITS),
        ("evaluate", "timm/resnet18", *ON_DIGITS),
        ("evaluate", "torchvision/resnet18", *ON_DIGITS),
        ("evaluate", "builtin/digits", "--dataset", "torch/cifar10"),
        ("evaluate", "builtin/digits", "--dataset", "torch/mnist"),
    )
    whole = (
        ("evaluate", "builtin/digits", *ON_DIGITS),
        (*run, *settings, "--eval-dataset", "builtin/digits", "--device", "cpu"),
        ("evaluate", str(tmp_path / "out"), *ON_DIGITS, "--teacher", "builtin/digits"),
    )
    found, said = drive(tmp_path, *refused, *whole, HF_HUB_OFFLINE="1")
    assert found["reached"] == [], said
    assert found["codes"] == [3] * len(refused) + [0] * len(whole), said
    assert said.count("HF_HUB_OFFLINE is set") == len(refused)
    inside = str(tmp_path.resolve())
    assert f"{inside}/out.checkpoints" in found["written"]
    outside = [path for path in found["written"] if not f"{path}/".startswith(f"{inside}/") and path != os.devnull]
    assert not outside


def test_without_it_the_hub_is_asked(tmp_path: Path) -> None:
    """The hook sees what there is to see: otherwise the test above would prove nothing."""
    found, said = drive(tmp_path, ("evaluate", "hf-hub:owner/repo", *ON_DIGITS))
    assert found["codes"] == [3]
    assert any("127.0.0.1" in each for each in found["reached"]), said
