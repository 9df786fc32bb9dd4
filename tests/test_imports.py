"""The shape of the package: who may import whom, what `--help` must not load, and what the package exports."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdfkd_cli

PACKAGE = Path(fastdfkd_cli.__file__).parent
HEAVY = {"huggingface_hub", "safetensors", "timm", "torch", "torchvision"}
#: From the ground up. A module imports from its own row (without cycles) and from those before it.
LAYERS = (
    {"errors", "host", "stopping"},
    {"config", "matrix", "method_config", "processes", "records", "recipes", "settings", "training_config"},
    {
        "acceleration",
        "architectures",
        "augment",
        "background",
        "clock",
        "distributed",
        "divergence",
        "generators",
        "hub",
        "labels",
        "losses",
        "nets_cifar",
        "output",
        "pictures",
        "runtime",
        "weights",
    },
    {"attention", "bn_stats", "data", "models", "noise", "pool", "synced_norm"},
    {"checkpoint", "dataset", "export", "initialisation", "methods", "student"},
    {"distillation", "evaluation", "plan", "quality", "synthesis", "training"},
    {"judging", "resume"},
    {"job"},
    {"distill_report", "distill_run", "given", "set_maker"},
    {"api", "api_train", "console"},
    {"benchmarking", "cli_options", "plots", "tables"},
    {"cli_benchmark", "cli_train"},
    {"cli"},
    {"__main__"},
)
#: What stands on the way to `--help`; pyproject.toml's TID253 has the same list.
LIGHT = {
    "__init__",
    "__main__",
    "cli",
    "cli_benchmark",
    "cli_options",
    "cli_train",
    "config",
    "console",
    "errors",
    "method_config",
    "processes",
    "recipes",
    "records",
    "settings",
    "stopping",
    "training_config",
}


def modules() -> dict[str, Path]:
    """Dotted names below the package: ``losses``, ``methods``, ``methods.fast_meta``."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        names[name.removesuffix(".__init__") if name != "__init__" else name] = path
    return names


MODULES = modules()


def imported(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every absolute name that ``path`` imports anywhere, with its statement; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def internal(path: Path) -> set[str]:
    """The package's own modules that ``path`` imports."""
    found = set()
    for name, _ in imported(path):
        parts = name.split(".")
        if parts[0] != "fastdfkd_cli":
            continue
        # The longest prefix that is a module; the rest is a name in it.
        for length in range(len(parts), 1, -1):
            if (module := ".".join(parts[1:length])) in MODULES:
                found.add(module)
                break
    return found


def layer(module: str) -> int:
    top = module.partition(".")[0]
    for index, names in enumerate(LAYERS):
        if top in names:
            return index
    pytest.fail(f"{module} has no place in LAYERS: give it one, and in DESIGN's drawing")


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_run_downwards(module: str) -> None:
    upwards = {other for other in internal(MODULES[module]) if layer(other) > layer(module)}
    assert not upwards, f"{module} imports from above itself: {sorted(upwards)}"


def test_no_cycles() -> None:
    graph = {name: internal(path) - {name} for name, path in MODULES.items() if name != "__init__"}
    # A package and its parts import each other by nature; methods/base.py is what the parts share.
    graph["methods"] = graph.get("methods", set())
    for name, others in graph.items():
        if name.startswith("methods."):
            others.discard("methods")
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_methods_never_import_each_other() -> None:
    methods = {name: path for name, path in MODULES.items() if name.startswith("methods.")}
    assert "methods.fast_meta" in methods
    for name, path in methods.items():
        others = {o for o in internal(path) if o.startswith("methods") and o not in ("methods.base", name)}
        assert not others, f"{name} imports {sorted(others)}: what methods share belongs into methods/base.py"


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_load_nothing_heavy(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in HEAVY, f"{module}:{node.lineno} imports {name} at module level"
            if name.startswith("fastdfkd_cli."):
                assert name.removeprefix("fastdfkd_cli.") in LIGHT, f"{module}:{node.lineno} imports {name}"


HELP_OF_ALL = """
import json, sys
from fastdfkd_cli.__main__ import main
words = [["--help"], ["--version"], ["recipes"], ["recipes", "--show", "smoke"], ["distill"], ["nonsense"],
         ["distill", "--help"], ["synthesize", "--help"], ["evaluate", "--help"], ["recipes", "--help"],
         ["benchmark", "--help"], ["benchmark", "nonsense", "--output", "a"],
         ["train", "--help"], ["train", "cifar/wrn10_1", "--data-dir", "a", "--set", "nonsense=1"],
         ["distill", "--teacher", "a", "--student", "b", "--recipe", "nonsense"],
         ["distill", "--teacher", "a", "--student", "b", "--set", "nonsense=1"]]
codes = [main(each) for each in words]
print("\\n" + json.dumps({"codes": codes, "modules": sorted(sys.modules)}))
"""


def test_help_and_typing_errors_load_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 2, 0, 2, 2, 2]
    assert not HEAVY & set(found["modules"])
    assert "Traceback" not in done.stderr


def test_public_names() -> None:
    assert sorted(fastdfkd_cli.__all__) == [
        "BenchmarkResult",
        "DistillResult",
        "ModelOptions",
        "RunConfig",
        "SynthesizeResult",
        "TrainResult",
        "TrainingConfig",
        "__version__",
        "benchmark",
        "distill",
        "evaluate",
        "plan_benchmark",
        "plan_distill",
        "plan_synthesize",
        "plan_train",
        "synthesize",
        "train",
    ]
    for name in fastdfkd_cli.__all__:
        assert getattr(fastdfkd_cli, name) is not None
    assert sorted(dir(fastdfkd_cli)) == sorted(fastdfkd_cli.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        fastdfkd_cli.nonsense  # noqa: B018


def test_no_module_hides_a_public_name() -> None:
    # Importing a submodule binds its name in the package: a module distill.py would replace the function distill.
    assert not set(MODULES) & set(fastdfkd_cli.__all__)


def test_every_module_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name} has no docstring"
