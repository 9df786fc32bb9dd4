"""Hostile input for everything that reads it, and the rules that must hold.

A target draws a case, lays its files into a folder, and hands them to the program. What may come of it: the input is
accepted, or refused in one line (a FastDFKDError; on the command line exit code 1 to 4). What may not: any other
exception, more time or memory than the limit, a file written, moved or removed outside the folder, anything printed
that a terminal would act on, a process, a connection.

``python tests/fuzz.py --seconds 180`` gives the targets the same time each, every one in a process with bounded
memory, and prints how many inputs there were and what became of them. ``tests/test_fuzz.py`` runs a few of each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, get_type_hints
from unittest import mock

if __name__ == "__main__":  # before torch and huggingface_hub read it
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("FORCE_COLOR", None)

import timm
import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save
from timm.models._hub import save_for_hf
from torch import Tensor

import hostile
import tiny
from fastdfkd_cli import api, cli, nets_cifar
from fastdfkd_cli.__main__ import main as command
from fastdfkd_cli.checkpoint import Checkpoints
from fastdfkd_cli.config import field_names, from_dict, to_dict
from fastdfkd_cli.data import open_evaluation_data
from fastdfkd_cli.dataset import DatasetWriter, read_dataset
from fastdfkd_cli.dataset.reader import check_channels, decode_image, image_files
from fastdfkd_cli.errors import FastDFKDError, is_out_of_memory
from fastdfkd_cli.export import model_card
from fastdfkd_cli.job import override
from fastdfkd_cli.method_config import SETTINGS
from fastdfkd_cli.models import InputSpec, ModelOptions, check_forward, load_teacher
from fastdfkd_cli.output import sha256_file, write_json
from fastdfkd_cli.recipes import get_recipe
from fastdfkd_cli.records import Record
from fastdfkd_cli.settings import parse_duration, parse_input_size, parse_numbers, read_config, resolve

#: Seconds for one input.
LIMIT = 20.0
#: Bytes that a worker may take beyond what it has when its libraries are loaded.
MEMORY = 3 * 2**30
#: What no message may hold: line breaks, and what a terminal acts on or cannot show.
ACTIVE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class TooLong(BaseException):
    """The time limit; no ``except Exception`` may hide it."""


# -- the rules -----------------------------------------------------------------------------------------------------


class Watch:
    """An audit hook that, while it is on, notes whatever reaches outside a folder: files, processes, connections.

    A hook cannot be taken off again, only switched off. It sees what Python does; :func:`contents` sees the rest.
    """

    _PATHS = {
        "os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,),
        "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,), "os.mkfifo": (0,), "shutil.rmtree": (0,),
    }  # fmt: skip
    _NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "pty.spawn")
    _NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []

    def install(self) -> Watch:
        sys.addaudithook(self._hook)
        return self

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder = self.folder
        if folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self._note(event, folder, path)
        elif event in self._PATHS:
            for index in self._PATHS[event]:
                self._note(event, folder, arguments[index])
        elif event in self._NEVER or event in self._NETWORK:
            self.seen.append(f"{event} {arguments[:2]!r}"[:200])

    def _note(self, event: str, folder: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        # Where the entry stands, not where it leads if it is a link: but what is opened is written through it.
        place, name = os.path.split(os.fsdecode(path))
        whole = os.path.realpath(path) if event == "open" else os.path.join(os.path.realpath(place or "."), name)
        if whole not in (folder, os.devnull) and not whole.startswith(folder + os.sep):
            self.seen.append(f"{event} {os.fsdecode(path)}"[:200])

    @contextlib.contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None


@cache
def watch() -> Watch:
    return Watch().install()


def contents(folder: Path) -> dict[str, str | bytes]:
    """Everything below a folder: links by where they lead, files by their bytes."""
    found: dict[str, str | bytes] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[path] = f"-> {os.readlink(path)}"
            elif os.path.isfile(path):
                found[path] = Path(path).read_bytes()
            else:
                found[path] = "another kind"
    return found


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing that reads input.

    Attributes:
        cases: draws them.
        lay: puts a case's files into the folder.
        act: hands them to the program, which is in that folder.
        writes: whether the program may write into the folder.
        quick: whether a few cases are a matter of a second, and of little memory.
    """

    name: str
    cases: st.SearchStrategy[Any]
    act: Callable[[Any], Any]
    lay: Callable[[Path, Any], None] = lambda folder, case: None
    writes: bool = False
    quick: bool = True


@dataclass(frozen=True)
class Outcome:
    """``accepted``, ``refused``, or a broken rule: ``raised``, ``hung``, ``outside``, ``said``."""

    kind: str
    detail: str = ""
    warned: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        return self.kind not in ("accepted", "refused")


class Sandbox:
    """``ROOT/in``, where a case is laid and the program is, beside ``ROOT/decoy``, which nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "in"
        (root / "decoy").write_text("untouched")

    def attempt(self, target: Target, case: Any, *, limit: float = LIMIT) -> Outcome:
        """Lay the case, act, and judge."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        target.lay(self.folder, case)
        before = contents(self.root)
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        here, kind, detail = Path.cwd(), "accepted", ""
        tempfile.tempdir = str(self.folder)  # torch makes, and removes, a folder there for some files
        with warnings.catch_warnings(record=True) as warned, contextlib.ExitStack() as stack:
            warnings.simplefilter("always")
            stack.callback(os.chdir, here)
            stack.callback(setattr, tempfile, "tempdir", None)
            os.chdir(self.folder)
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(watch().on(self.folder))
            stack.enter_context(_alarm(limit))
            try:
                target.act(case)
            except FastDFKDError as error:
                kind, detail = "refused", str(error)
            except TooLong:
                kind, detail = "hung", f"more than {limit:g} s"
            except Exception as error:
                kind, detail = "raised", _origin(error)
        after = contents(self.root)
        allowed = str(self.folder) + os.sep if target.writes else "\0"
        moved = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        outside = [*watch().seen, *(f"changed {name}" for name in moved if not name.startswith(allowed))]
        printed = [_printed(stream) for stream in (out, err)]
        if outside and kind != "raised":
            kind, detail = "outside", "; ".join(outside[:3])
        elif kind == "refused" and (ACTIVE.search(detail) or not detail.strip() or len(detail) > 2000):
            kind, detail = "said", repr(detail[:300])
        elif kind in ("accepted", "refused") and any(ACTIVE.search(text.replace("\n", "")) for text in printed):
            kind, detail = "said", repr("".join(printed)[:300])
        return Outcome(kind, detail, tuple(f"{w.category.__name__}: {str(w.message)[:80]}" for w in warned))


def _printed(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


def _origin(error: BaseException) -> str:
    """The kind of an exception, and the last place in this program that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}fastdfkd_cli{os.sep}" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {where}: {str(error)[:160]!r}"


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(signum: int, frame: FrameType | None) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# -- whole files, to be damaged ------------------------------------------------------------------------------------

ARCHITECTURE = "cifar/wrn10_1"
FACTS = {
    "architecture": ARCHITECTURE, "num_classes": 3, "input_size": [3, 8, 8], "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.6, 0.7], "classes": ["a", "b", "c"], "license": "mit", "interpolation": "bicubic", "crop_pct": 0.9,
}  # fmt: skip
LABELS = ("0000_cat", "0001_dog")
SHAPE = (3, 6, 5)


@cache
def network() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model(nets_cifar.REGISTRY_PREFIX + "wrn10_1", num_classes=3).state_dict()


@cache
def weights() -> bytes:
    return save(network(), {name: json.dumps(value) for name, value in FACTS.items()})


@cache
def small_checkpoint() -> dict[str, Tensor]:
    return {"conv.weight": torch.ones(2, 1, 3, 3), "bn.running_mean": torch.zeros(2), "fc.bias": torch.ones(3)}


def _files(make: Callable[[Path], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        return {p.relative_to(place).as_posix(): p.read_bytes() for p in Path(place).rglob("*") if p.is_file()}


@cache
def model_folder() -> dict[str, bytes]:
    module = timm.create_model(nets_cifar.REGISTRY_PREFIX + "wrn10_1", num_classes=3)
    module.pretrained_cfg |= {"license": "mit", "crop_mode": "center"}
    module.pretrained_cfg |= {"test_input_size": (3, 12, 12), "test_crop_pct": 1.0}
    extra = {"label_names": ["a", "b", "c"], "model_args": {}}
    return _files(lambda place: save_for_hf(module, place, model_config=extra, safe_serialization=True))


SET: dict[str, Any] = {
    "class_names": ("cat", "dog"), "num_classes": 2, "input_size": SHAPE, "shard_size": 3, "header": {"seed": 0},
}  # fmt: skip


def _write_set(place: Path) -> None:
    images = torch.randint(0, 256, (7, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with DatasetWriter(place, **SET) as writer:
        writer.add(images, torch.arange(7) % 2, torch.zeros(7, 2))
        writer.flush_shard(state=({"t": torch.zeros(2)}, {"k": 1}))
        writer.wait()


@cache
def synthetic_set() -> dict[str, bytes]:
    return _files(_write_set)


def lay_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# -- targets -------------------------------------------------------------------------------------------------------

#: Every setting, and its type (with any method that has it).
KEYS = {
    name: hints[last]
    for name in field_names()
    for section, _, last in [name.rpartition(".")]
    for config in [from_dict({"method": method}) for method in SETTINGS]
    for hints in [get_type_hints(type(getattr(config, section) if section else config))]
    if last in hints
}
CONFIG = to_dict(from_dict({"recipe": "smoke"}))


def act_settings(case: tuple[str, Any]) -> None:
    kind, value = case
    if kind == "dict":
        from_dict(value)
    elif kind == "set":
        name, overrides = resolve(recipe=None, config=None, environment={}, assignments=value, options={})
        override(get_recipe(name).config((3, 8, 8)), overrides)
    else:
        {"duration": parse_duration, "numbers": partial(parse_numbers, "--mean"),
         "size": partial(parse_input_size, "--input-size")}[kind](value)  # fmt: skip


numberish = st.text(alphabet="0123456789.,xhms eE+-_٣½", max_size=12)
SETTINGS = Target(
    name="settings",
    cases=st.one_of(
        st.tuples(st.just("dict"), hostile.changed(CONFIG).filter(lambda d: isinstance(d, dict))),
        st.tuples(st.just("set"), st.lists(hostile.assignment(KEYS), min_size=1, max_size=4)),
        st.tuples(st.sampled_from(["duration", "numbers", "size"]), numberish | hostile.names),
    ),
    act=act_settings,
)


def act_config(case: bytes) -> None:
    name, found = read_config("run.yaml")
    override(get_recipe(name or "auto").config((3, 8, 8)), found)


CONFIG_FILE = Target(
    name="config files",
    cases=hostile.config_bytes(CONFIG)
    | st.sampled_from(["aliases", "merge"]).map(lambda kind: hostile.yaml_bomb(kind).encode()),
    lay=lambda folder, case: lay_files(folder, {"run.yaml": case}),
    act=act_config,
)


#: What each command needs, and what its options mean when somebody means something.
_NEEDED = {
    "distill": ["-t", "builtin/digits", "-s", "cifar/wrn10_1", "-o", "out"],
    "synthesize": ["-t", "builtin/digits", "-n", "8", "-o", "out"],
    "evaluate": ["builtin/digits", "--dataset", "builtin/digits"],
    "recipes": ["--show", "smoke"],
}
_MEANT = {
    "teacher": ("builtin/digits", "x.safetensors"), "student": ("cifar/wrn10_1", "resnet18"), "output": ("out", "a/b"),
    "recipe": ("smoke", "auto", "digits"), "config": ("run.yaml", "-"), "set": ("steps=2", "seed=3", "lr=0.1"),
    "time-budget": ("90", "1h30m"), "device": ("cpu", "auto"), "amp-dtype": ("bfloat16",), "split": ("validation",),
    "dataset": ("builtin/digits",), "data-dir": ("set",), "results-file": ("x.json", "x.csv"),
    "arch": ("cifar/wrn10_1",), "weights": ("x.safetensors", "x.pth"),
    "input-size": ("3 8 8", "3x16x16", "1,8,8"), "mean": ("0.5", "0 0.1 0.2"),
    "std": ("0.5", "1 1 1"), "num-classes": ("3", "10"), "crop-pct": ("0.9", "1"), "min-top1": ("0", "50"),
    "img-size": ("8", "16"), "show": ("smoke",), "eval-dataset": ("builtin/digits",), "resume": ("auto",),
}  # fmt: skip


@cache
def options() -> dict[str, list[tuple[str, bool]]]:
    """Every option of every command (an empty one: an argument), and whether it is only a switch."""
    group: Any = typer.main.get_command(cli.app)
    return {
        name: [
            (word if word.startswith("-") else "", bool(getattr(parameter, "is_flag", False)))
            for parameter in each.params
            for word in (*parameter.opts, *parameter.secondary_opts)
        ]
        for name, each in group.commands.items()
    }


@st.composite
def option(draw: hostile.Draw, known: list[tuple[str, bool]], junk: st.SearchStrategy[str]) -> list[str]:
    """An option, most often with a value as it should be."""
    word, switch = draw(st.sampled_from(known))
    if switch and draw(st.integers(0, 9)):
        return [word]
    bare = word.lstrip("-").removeprefix("teacher-").removeprefix("student-")
    meant = st.sampled_from(_MEANT.get(bare, ("1", "3", "8")))
    value = draw(meant if draw(st.integers(0, 2)) else junk)
    return [word, value] if word else [value]


@st.composite
def words(draw: hostile.Draw, junk: st.SearchStrategy[str]) -> list[str]:
    """A command line with what the command needs, and some options."""
    name = draw(st.sampled_from(list(options())))
    line = [name, *(_NEEDED.get(name, []) if draw(st.integers(0, 5)) else [])]
    for _ in range(draw(st.integers(0, 4))):
        line += draw(option(options()[name], junk))
    return [hostile.typed(word) for word in line]


a_value = st.one_of(hostile.names, hostile.assignment(KEYS), numberish)


def run_command(line: list[str]) -> None:
    """Through the program's own boundary: an exit code, and for an error its one line."""
    sys.stderr.flush()
    code = command(line)
    sys.stderr.flush()
    text = _printed(sys.stderr)  # type: ignore[arg-type]
    errors = [each for each in text.splitlines() if each.startswith("fastdfkd: error: ")]
    if code not in (0, 1, 2, 3, 4) or len(errors) != (code != 0):
        raise AssertionError(f"code {code} with {text!r}")
    if code:
        raise FastDFKDError(errors[0])


def act_command_line(line: list[str]) -> None:
    """The engines give back what they were given, so that it is printed."""

    def report(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        said = {k: v for k, v in keywords.items() if isinstance(v, str | int | float | list)}
        keywords["on_message"](f"teacher {arguments[0]}")
        return {"model": arguments[0], "top1": 50.0, "images": 1, "seconds": {"total": 1.0}, "config": {}, **said}

    def distilled(*arguments: Any, **keywords: Any) -> SimpleNamespace:
        return SimpleNamespace(path=keywords["output"], report=report(*arguments, **keywords))

    def synthesized(*arguments: Any, **keywords: Any) -> SimpleNamespace:
        return SimpleNamespace(path=keywords["output"], manifest=report(*arguments, **keywords))

    fakes = {
        "distill": distilled, "synthesize": synthesized, "evaluate": report, "plan_distill": report,
        "plan_synthesize": report,
    }  # fmt: skip
    with mock.patch.multiple(api, **fakes), mock.patch("sys.stdin", io.StringIO("seed: 1")):
        run_command(line)


COMMAND_LINE = Target(
    name="command lines",
    cases=words(a_value),
    lay=lambda folder, case: lay_files(folder, {"run.yaml": b"seed: 1"}),
    act=act_command_line,
    writes=True,
)

NETS = "from torch import nn\nfactory = lambda: nn.Flatten()\nnumber = 3\ndef broken(): raise OSError('\\x1b[2J\\n')\n"
references = st.one_of(
    st.sampled_from([
        "x.safetensors", "x.pth", "m", "local-dir:m", "./m", "nets.py:factory", "nets.py:broken", "nets.py:number",
        "nets.py:none", "nets:factory", "nets.py", "hf-hub:a/b", "a/b@../../../x", "a/b@\x1b[2J", "timm/resnet18",
        "torchvision/resnet18", "cifar/wrn10_1", "builtin/digits", "~nobody/x.pth", "~nobody.py:f", "set", "run.yaml",
        "/dev/null", "hf-hub:a/b@v1", "resnet18.nonsense", "", ".", "xcit_nano_12_p16_224", "m/config.json", "pipe.pth",
    ]),
    hostile.names,
)  # fmt: skip
number_text = st.sampled_from(
    ["0", "1", "3", "8", "-1", "64", "100000", "10" * 15, "0.5", "nan", "1e999", "3 8 8", "3 0 8", "3 99999 99999"]
)
_EVALUATE = (
    "", "--arch", "--weights", "--num-classes", "--input-size", "--mean", "--std", "--img-size", "--crop-pct", "-b",
    "--device", "--split", "--dataset", "--data-dir", "--teacher", "--results-file", "--min-top1",
)  # fmt: skip


@st.composite
def evaluations(draw: hostile.Draw) -> list[str]:
    """A model to judge on images that are there; each of its options as it is meant, or not."""
    model = draw(st.sampled_from(["x.safetensors", "x.pth", "m"]) if draw(st.booleans()) else references)
    line = ["evaluate", model, "--data-dir", draw(st.sampled_from(["set", "set", "set", "m", "x.tar", "/dev/null"]))]
    if model == "x.pth" and draw(st.booleans()):
        line += ["--arch", "cifar/wrn10_1", "--input-size", "3 8 8"]
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 3)))):
        line += draw(option([(word, False) for word in _EVALUATE], st.one_of(references, number_text)))
    return [hostile.typed(word) for word in line]


def lay_models(folder: Path, case: Any) -> None:
    lay_files(folder / "m", model_folder())
    lay_files(folder, {"x.safetensors": weights(), "nets.py": NETS.encode(), "run.yaml": b"seed: 1"})
    lay_files(folder, {f"set/{name}/0.png": hostile.pictures()[0] for name in "abc"})
    torch.save(network(), folder / "x.pth")
    os.mkfifo(folder / "pipe.pth")


def act_evaluation(line: list[str]) -> None:
    sys.modules.pop("nets", None)
    run_command(line)


MODELS = Target(name="evaluate", cases=evaluations(), lay=lay_models, act=act_evaluation, writes=True, quick=False)

_PLAN = ["distill", "-t", "builtin/digits", "-s", "cifar/wrn10_1", "--recipe", "smoke", "--dry-run", "-o", "out"]


@st.composite
def plans(draw: hostile.Draw) -> list[str]:
    line = list(_PLAN)
    for _ in range(draw(st.integers(1, 3))):
        line += ["--set", draw(hostile.assignment(KEYS))]
    if draw(st.booleans()):
        budget = draw(st.sampled_from(["--rounds", "--images", "--time-budget", "--steps", "--seed"]))
        line += [budget, draw(number_text)]
    return [hostile.typed(word) for word in line]


PLANS = Target(name="dry runs", cases=plans(), act=run_command, quick=False)


def load(reference: str, said: ModelOptions) -> None:
    loaded = load_teacher(reference, said)
    check_forward(loaded)
    card = model_card(loaded, loaded, {"data": {"path": reference, "synthetic": True}})
    if ACTIVE.search(card.replace("\n", "")):
        raise AssertionError(f"the model card holds {ACTIVE.search(card.replace(chr(10), ''))!r}")
    write_json("described.json", loaded.describe())


SAFETENSORS = Target(
    name="safetensors",
    cases=st.tuples(hostile.safetensors_bytes(weights), st.none() | hostile.json_bytes(FACTS)),
    lay=lambda folder, case: lay_files(folder, {"x.safetensors": case[0]} | ({"x.json": case[1]} if case[1] else {})),
    act=lambda case: load("x.safetensors", ModelOptions()),
    writes=True,
)
PICKLES = Target(
    name="pickles",
    cases=st.tuples(
        st.one_of(hostile.pickled_bytes(network), hostile.pickled_bytes(small_checkpoint)),
        st.sampled_from([ModelOptions(arch=ARCHITECTURE, num_classes=3, input_size=(3, 8, 8)), ModelOptions()]),
    ),
    lay=lambda folder, case: lay_files(folder, {"x.pth": case[0]}),
    act=lambda case: load("x.pth", case[1]),
    writes=True,
)


@st.composite
def folders(draw: hostile.Draw) -> dict[str, bytes]:
    files = dict(model_folder())
    files["config.json"] = draw(hostile.json_bytes(json.loads(files["config.json"])))
    return files


FOLDERS = Target(
    name="model folders", cases=folders(), lay=lambda folder, case: lay_files(folder / "m", case),
    act=lambda case: load("m", ModelOptions()), writes=True,
)  # fmt: skip


def read_images(how: tuple[str, int], path: str) -> None:
    """As images to judge on, to distil on, or to choose from."""
    use, channels = how
    if use == "evaluate":
        data = open_evaluation_data(data_dir=path)
        spec = InputSpec(size=(channels, 6, 5), mean=(0.5,) * channels, std=(0.5,) * channels)
        for _ in data.batches([spec], batch_size=4):
            pass
    elif use == "choose":
        check_channels((channels, 6, 5))
        for file in image_files(path, "--unlabeled-dir"):
            decode_image(file, (channels, 6, 5), "bilinear")
    else:
        read_dataset(path, input_size=(channels, 6, 5))


hows = st.tuples(st.sampled_from(["evaluate", "distil", "choose"]), st.integers(1, 5))
TARS = Target(
    name="tars",
    cases=st.tuples(hostile.tar_bytes(hostile.pictures(), ("a", "b")), hows),
    lay=lambda folder, case: lay_files(folder, {"x.tar": case[0]}),
    act=lambda case: read_images(case[1], "x.tar"),
)
IMAGES = Target(
    name="images",
    cases=st.tuples(hostile.image_bytes(), hows),
    lay=lambda folder, case: lay_files(folder, {"set/a/0.png": case[0], "set/b/0.png": hostile.pictures()[0]}),
    act=lambda case: read_images(case[1], "set"),
)


@st.composite
def sets(draw: hostile.Draw) -> tuple[dict[str, Any], str]:
    """A synthetic set with something wrong in it; where a file was changed, the manifest agrees with it."""
    files: dict[str, Any] = dict(synthetic_set())
    manifest = json.loads(files["manifest.json"])
    part = draw(st.sampled_from(("manifest", "manifest", "tar", "tensors", "state", "classes", "links", "links")))
    uses = ["resume", "overwrite"] if part == "links" else ["read", "read", "judge", "resume", "overwrite", "shard"]
    state = next(name for name in files if name.startswith("state/") and name.endswith(".json"))
    if part == "tar":
        whole = files["train-00000.tar"]
        files["train-00000.tar"] = draw(hostile.tar_bytes(hostile.pictures(), LABELS) | hostile.damaged(whole))
    elif part == "tensors":
        name = draw(st.sampled_from(["train-00000.safetensors", state.replace("json", "safetensors")]))
        files[name] = draw(hostile.safetensors_bytes(partial(files.get, name)))
    elif part == "state":
        files[state] = draw(hostile.json_bytes(json.loads(files[state])))
    elif part == "classes":
        files["classes.txt"] = draw(hostile.damaged(files["classes.txt"]))
    elif part == "links":
        name = draw(st.sampled_from(_LINKS))
        files = {k: v for k, v in files.items() if k != name and not k.startswith(name + "/")}
        files[name] = draw(st.sampled_from(["../..", "../../decoy", "../../new", "../../../decoy", ".", name]))
    for shard in manifest["shards"]:
        _agree(shard["files"], files)
    _agree(manifest["state"], files)
    if part == "manifest":
        files["manifest.json"] = draw(hostile.json_bytes(manifest))
    elif isinstance(files.get("manifest.json"), bytes):
        files["manifest.json"] = json.dumps(manifest).encode()
    return files, draw(st.sampled_from(uses))


#: What of a set may be a link that leads elsewhere.
_LINKS = (
    "grids", "state", "train-00000.tar", "manifest.json", ".train-00002.tar.partial", "classes.txt", "report.json",
    "metrics.jsonl", ".train-00000.tar.partial", "_x_tarinfos.pickle", "README.md", "grids/0000_cat.png",
)  # fmt: skip


def _agree(facts: dict[str, Any], files: dict[str, Any]) -> None:
    for name, said in facts.items():
        if isinstance(files.get(name), bytes):
            with tempfile.NamedTemporaryFile() as file:
                file.write(files[name])
                file.flush()
                said.update(bytes=len(files[name]), sha256=sha256_file(file.name))


def lay_tree(folder: Path, files: dict[str, Any]) -> None:
    """Files, and links by where they lead."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def lay_set(folder: Path, case: tuple[dict[str, Any], str]) -> None:
    lay_tree(folder / "set", case[0])


def act_set(case: tuple[dict[str, Any], str]) -> None:
    use = case[1]
    if use == "read":
        read_dataset("set")
    elif use == "judge":
        read_images(("evaluate", 3), "set")
    elif use == "shard":
        read_images(("distil", 3), "set/train-00000.tar")
    else:
        resume = use == "resume"
        with DatasetWriter("set", **SET, resume=resume, overwrite=not resume) as writer:
            writer.add(torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.arange(4) % 2, torch.zeros(4, 2))
            writer.close()


SETS = Target(name="synthetic sets", cases=sets(), lay=lay_set, act=act_set, writes=True)


RUN = {"config": {"seed": 0}, "teacher": "tiny"}


def _write_checkpoints(place: Path) -> None:
    with Checkpoints.open(place, RUN, resume=False, say=print) as checkpoints:
        for number in (1, 2):
            part = {"images": torch.full((4, 3, 2, 2), number, dtype=torch.uint8)}
            parts = {f"part-{number}": part} | ({"part-1": None} if number == 2 else {})
            checkpoints.save(
                {"weights": torch.ones(4, 3), "step": torch.tensor(number)}, {"k": [number]}, parts, wait=True
            )


@cache
def checkpoint_files() -> dict[str, bytes]:
    return _files(_write_checkpoints)


def _stated(record: bytes) -> Any:
    """What a checkpoint's JSON says."""
    return json.loads(b"{" + record.partition(b"\n")[2])


def _restated(stated: bytes) -> bytes:
    """A checkpoint's JSON whose first line agrees with the others."""
    rest = stated[1:]
    return f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", "bytes": {len(rest)},\n'.encode() + rest


@st.composite
def checkpoint_folders(draw: hostile.Draw) -> tuple[dict[str, Any], str]:
    """Two checkpoints, one or both of them not as they were written; mostly with checksums that agree."""
    files: dict[str, Any] = dict(checkpoint_files())
    for number in draw(st.sampled_from(((2,), (1, 2), (1,)))):
        own = [name for name in files if re.fullmatch(rf"(checkpoint|segment)-0+{number}\b.*\.safetensors", name)]
        name, record = draw(st.sampled_from(own)), f"checkpoint-{number:08d}.json"
        rest = json.dumps(_stated(files[record])).encode()
        how = draw(
            st.sampled_from(("json", "json", "json", "tensors", "tensors", "bytes", "bytes", "link", "gone", "new"))
        )
        if how == "json":
            stated = json.loads(rest)
            rest = draw(hostile.json_bytes(stated))
        elif how == "tensors":
            content = draw(hostile.safetensors_bytes(partial(files.get, name)))
            stated = json.loads(rest)
            for facts in (stated["tensors"], *stated["segments"].values()):
                if facts["file"] == name:
                    facts.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            files[name], rest = content, json.dumps(stated).encode()
        elif how == "bytes":
            each = draw(st.sampled_from([name, record]))
            files[each] = draw(hostile.damaged(files[each]))
        elif how == "link":
            files[draw(st.sampled_from([name, record]))] = draw(
                st.sampled_from(["../../decoy", "../../new", name, ".."])
            )
        elif how == "gone":
            del files[draw(st.sampled_from([name, record]))]
        else:
            files[draw(st.sampled_from([*_OTHERS, record.replace("0", "9")]))] = draw(st.binary(max_size=50))
        if how in ("json", "tensors") and rest.startswith(b"{"):
            files[record] = _restated(rest)
    return files, draw(st.sampled_from(["resume", "resume", "resume", "begin anew", "neither"]))


_OTHERS = (
    "checkpoint-00000003.json", "checkpoint-99999999.safetensors", ".checkpoint-00000003.json.partial-0123abcd",
    "notes", "segment-00000001-x.safetensors", "checkpoint-0000000٣.json", "checkpoint-00000002.json~", ".DS_Store",
)  # fmt: skip


def lay_checkpoints(folder: Path, case: tuple[dict[str, Any], str]) -> None:
    lay_tree(folder / "run", case[0])


def act_checkpoints(case: tuple[dict[str, Any], str]) -> None:
    use, said = case[1], list[str]()
    with Checkpoints.open(
        "run", RUN, resume=use == "resume", begin_anew=use == "begin anew", say=said.append
    ) as checkpoints:
        latest = checkpoints.latest
        parts: dict[str, Any] = {}
        if latest is not None:
            parts = {name: None for name in latest.segments if latest.segment(name)}
        if any(ACTIVE.search(each) for each in said):
            raise AssertionError(f"said {said!r}")
        checkpoints.save({"weights": torch.zeros(2)}, {"k": 1}, {**parts, "fresh": {"x": torch.ones(1)}}, wait=True)
    with Checkpoints.open("run", RUN, resume=True, say=said.append) as checkpoints:
        if checkpoints.latest is None or checkpoints.latest.segment("fresh")["x"] != 1:
            raise AssertionError("what was saved is not what is found")
        checkpoints.finish()


CHECKPOINTS = Target(
    name="checkpoints", cases=checkpoint_folders(), lay=lay_checkpoints, act=act_checkpoints, writes=True
)


class _Left(Exception):
    """Where a run is left."""


def _distill(output: Path, **more: Any) -> None:
    settings = tiny.config(quality_images=0, schedule__rounds=3, schedule__kd_steps_per_round=1)
    said = ModelOptions(input_size=tiny.SIZE, mean=(0.5,), std=(0.5,))
    api.distill(tiny.teacher(), tiny.net(1), teacher_options=said, config=settings, output=output, device="cpu", **more)


def _leave_a_run(place: Path) -> None:
    def leave(record: Record) -> None:
        if record.phase == "distillation":
            raise _Left

    with contextlib.suppress(_Left):
        _distill(place / "out", checkpoint_every=1e-9, on_record=leave)


@cache
def unfinished_run() -> dict[str, bytes]:
    return _files(_leave_a_run)


@st.composite
def unfinished_runs(draw: hostile.Draw) -> dict[str, bytes]:
    """The checkpoint of a run, whole, but not as this program would have written it."""
    files = dict(unfinished_run())
    record = max(name for name in files if name.endswith(".json"))
    stated = _stated(files[record])
    if draw(st.integers(0, 2)):
        stated["values"] = draw(hostile.changed(stated["values"]))
    else:
        facts = draw(st.sampled_from([stated["tensors"], *stated["segments"].values()]))
        name = f"{Path(record).parent}/{facts['file']}"
        content = files[name] = draw(hostile.safetensors_bytes(partial(files.get, name)))
        facts.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    files[record] = _restated(json.dumps(stated).encode())
    return files


def act_run(case: Any) -> None:
    try:
        _distill(Path("out"), resume="auto")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise FastDFKDError("out of memory, as the command says it") from error


RUNS = Target(
    name="resumed runs", cases=st.deferred(unfinished_runs), lay=lay_files, act=act_run, writes=True, quick=False
)


@cache
def zip_bomb() -> bytes:
    """A pickled checkpoint of 64 MiB for each of 40 tensors, in a zip of kilobytes."""
    buffer = io.BytesIO()
    torch.save({f"w{n}": torch.zeros(2**24) for n in range(2)}, buffer)
    return hostile.repacked(buffer.getvalue(), 8)


def _bombs() -> dict[str, tuple[dict[str, bytes], Callable[[], Any]]]:
    """Small files that claim, or become, gigabytes."""
    expanded = io.BytesIO()
    torch.save({name: torch.zeros(1).expand(2**32) for name in ("conv1.weight", "x", "y")}, expanded)
    black = {f"set/{name}/{n}.png": hostile.black_png(9000) for name in "ab" for n in range(3)}
    huge = {"set/a/0.png": hostile.png(30_000, 30_000, bytes(100))}
    manifest = json.loads(synthetic_set()["manifest.json"])
    many = {**manifest, "counts": [2**40, 0], "input_size": [3, 10_000, 10_000]}
    many["shards"] = [{**manifest["shards"][0], "images": 2**40}]
    sets_of = {f"set/{k}": v for k, v in synthetic_set().items()}
    named = {**json.loads(model_folder()["config.json"]), "num_classes": 2**30, "label_names": None}
    wide = json.loads(model_folder()["config.json"])
    wide["pretrained_cfg"]["input_size"] = [3, 30_000, 30_000]
    options_of = ModelOptions(arch=ARCHITECTURE, num_classes=3, input_size=(3, 8, 8))
    evaluate_set, distil_set = partial(read_images, ("evaluate", 3), "set"), partial(read_images, ("distil", 3), "set")
    folder = {f"m/{k}": v for k, v in model_folder().items()}
    return {
        "black images": (black, evaluate_set),
        "black images to distil on": (black, distil_set),
        "an image of 900 megapixels": (huge, evaluate_set),
        "compressed checkpoint": ({"x.pth": zip_bomb()}, lambda: load("x.pth", options_of)),
        "expanded tensors": ({"x.pth": expanded.getvalue()}, lambda: load("x.pth", options_of)),
        "manifest of 2**40 images": (
            {**sets_of, "set/manifest.json": json.dumps(many).encode()},
            lambda: read_dataset("set"),
        ),
        "a set resized": (sets_of, lambda: read_dataset("set", input_size=(3, 30_000, 30_000))),
        "2**30 classes": ({**folder, "m/config.json": json.dumps(named).encode()}, lambda: load("m", ModelOptions())),
        "input of 30,000 pixels": (
            {**folder, "m/config.json": json.dumps(wide).encode()},
            lambda: load("m", ModelOptions()),
        ),
        "tar with a huge header": (
            {"x.tar": hostile.tar_member(b"x", b"", size=2**40, kind=b"x") + bytes(1024)},
            partial(read_images, ("evaluate", 3), "x.tar"),
        ),
        "YAML aliases": ({"run.yaml": hostile.yaml_bomb("aliases").encode()}, lambda: act_config(b"")),
        "YAML merges": ({"run.yaml": hostile.yaml_bomb("merge").encode()}, lambda: act_config(b"")),
    }  # fmt: skip


@cache
def bombs() -> dict[str, tuple[dict[str, bytes], Callable[[], Any]]]:
    return _bombs()


BOMBS = Target(
    name="bombs",
    cases=st.deferred(lambda: st.sampled_from(list(bombs()))),
    lay=lambda folder, case: lay_files(folder, bombs()[case][0]),
    act=lambda case: bombs()[case][1](),
    writes=True,
    quick=False,
)

TARGETS = {
    target.name: target
    for target in (
        SETTINGS, CONFIG_FILE, COMMAND_LINE, MODELS, PLANS, SAFETENSORS, PICKLES, FOLDERS, TARS, IMAGES, SETS,
        CHECKPOINTS, RUNS, BOMBS,
    )
}  # fmt: skip


# -- a run ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of a target's inputs."""

    inputs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    found: dict[str, str] = field(default_factory=dict)
    warned: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def add(self, case: Any, outcome: Outcome, seconds: float) -> None:
        self.inputs += 1
        self.kinds[outcome.kind] += 1
        self.warned.update(outcome.warned)
        self.slowest = max(self.slowest, seconds)
        if outcome.broken:
            signature = re.sub(r"\d+|'.*", "N", outcome.detail)[:120] if outcome.kind == "raised" else outcome.kind
            shown = repr(case)
            if signature not in self.found or len(shown) < len(self.found[signature]):
                self.found[signature] = f"{outcome.kind}: {outcome.detail}\n    case: {shown}"


class _Enough(KeyboardInterrupt):
    """The time is up; hypothesis lets it through."""


def explore(target: Target, *, seconds: float, examples: int, number: int, heartbeat: Path | None = None) -> Tally:
    """Run cases of one target until the time is up or there were enough."""
    tally, end = Tally(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        sandbox = Sandbox(Path(place))

        def one(case: Any) -> None:
            if time.monotonic() > end or tally.inputs >= examples:
                raise _Enough
            if heartbeat is not None:
                heartbeat.write_text(f"{tally.inputs}\n{repr(case)[:4000]}")
            began = time.monotonic()
            outcome = sandbox.attempt(target, case)
            tally.add(case, outcome, time.monotonic() - began)

        while True:
            run = given(target.cases)(one)
            run = settings(
                max_examples=500, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(run)  # fmt: skip
            number += 1
            try:
                seed(number)(run)()
            except _Enough:
                return tally


def work(arguments: argparse.Namespace) -> None:
    """One target in this process, with bounded memory; the tally as JSON on stdout."""
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as place:
        Sandbox(Path(place)).attempt(PLANS, _PLAN)  # what is loaded late is loaded before the limit is set
    status = Path("/proc/self/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = explore(
        target, seconds=arguments.seconds, examples=arguments.examples, number=arguments.seed * 1_000_000,
        heartbeat=arguments.heartbeat,
    )  # fmt: skip
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({**vars(tally), "grown": grown * 1024}))  # noqa: T201


def run_all(arguments: argparse.Namespace) -> int:
    """Every target in a process of its own, one after the other; a table of figures, then what was found."""
    chosen = [arguments.target] if arguments.target else list(TARGETS)
    heads = ("inputs", "accepted", "refused", "tracebacks", "hangs", "outside", "printed", "slowest", "memory")
    print(f"{'target':<16}" + "".join(f"{head:>11}" for head in heads), flush=True)  # noqa: T201
    found, total = [], Counter[str]()
    for name in chosen:
        with tempfile.TemporaryDirectory() as place:
            beat = Path(place) / "beat"
            seconds = arguments.seconds / len(chosen)
            line = [
                sys.executable, "-B", __file__, "--worker", "--target", name, "--seconds", str(seconds),
                "--examples", str(arguments.examples), "--seed", str(arguments.seed), "--heartbeat", str(beat),
            ]  # fmt: skip
            try:
                done = subprocess.run(line, capture_output=True, text=True, timeout=seconds + 180)
                failure = "" if done.returncode == 0 else f"worker ended with {done.returncode}: {done.stderr[-800:]}"
            except subprocess.TimeoutExpired:
                failure = "worker hung"
            if failure:
                last = beat.read_text() if beat.exists() else "nothing"
                found.append(f"{name}: {failure}\n    case: {last}")
                total["crashed"] += 1
                print(f"{name:<16} {failure[:90]!r}", flush=True)  # noqa: T201
                continue
        row = json.loads(done.stdout.splitlines()[-1])
        kinds = Counter(row["kinds"])
        total.update(kinds)
        total["inputs"] += row["inputs"]
        shown = [row["inputs"], *(kinds[kind] for kind in ("accepted", "refused", "raised", "hung", "outside", "said"))]
        figures = [f"{value:,}" for value in shown] + [f"{row['slowest']:.2f} s", f"{row['grown'] / 2**20:,.0f} MiB"]
        print(f"{name:<16}" + "".join(f"{value:>11}" for value in figures), flush=True)  # noqa: T201
        found += [f"{name}: {text}" for text in row["found"].values()]
        found += [f"{name}: {count} warnings: {text}" for text, count in Counter(row["warned"]).most_common(5)]
    print(f"{total['inputs']:,} inputs, {total['accepted']:,} accepted, {total['refused']:,} refused")  # noqa: T201
    for text in found:
        print(f"\n{text if arguments.verbose else text[:600]}")  # noqa: T201
    return int(any(total[kind] for kind in ("raised", "hung", "outside", "said", "crashed")))


def main() -> int:
    parser = argparse.ArgumentParser(description="Hostile input for everything that reads it.")
    parser.add_argument("--seconds", type=float, default=180.0, help="for all targets together")
    parser.add_argument("--examples", type=int, default=10**9, help="most inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=list(TARGETS))
    parser.add_argument("--verbose", action="store_true", help="print the cases that broke a rule whole")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--heartbeat", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
