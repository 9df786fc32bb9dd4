"""What SECURITY.md promises of the code as it stands: no call in it that would break the promise."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdfkd_cli

PACKAGE = Path(fastdfkd_cli.__file__).parent
#: Python's own functions that run text.
BUILTIN = ("eval", "exec", "compile", "__import__")
#: Calls that run what a file says, start a program or unpack an archive, by the end of their names; and who may make
#: them.
DANGEROUS: dict[str, tuple[str, ...]] = {
    "pickle.load": (), "pickle.loads": (), "pickle.Unpickler": (), "torch.load": ("weights.py",),
    "torch.jit.load": (), "torch.hub.load": (), "torch.hub.load_state_dict_from_url": (), "torch.package": (),
    "numpy.load": (), "np.load": (), "joblib.load": (), "load_checkpoint": (),
    "exec_module": ("architectures.py",), "import_module": ("architectures.py", "__init__.py"),
    "yaml.load": ("settings.py",), "yaml.unsafe_load": (), "yaml.full_load": (), "extractall": (), "extract": (),
    "unpack_archive": (), "os.system": (), "os.popen": (), "os.startfile": (), "subprocess.run": (),
    "subprocess.Popen": (), "check_call": (), "check_output": (), "os.execv": (), "os.posix_spawn": (),
}  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, by the dotted name as it is written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(path: Path, name: str) -> list[ast.Call]:
    return [node for written, node in calls(path) if written == name or written.endswith(f".{name}")]


@pytest.mark.parametrize("name", DANGEROUS)
def test_nothing_runs_or_unpacks_a_file(name: str) -> None:
    assert {path.name for path in PACKAGE.rglob("*.py") if named(path, name)} == set(DANGEROUS[name])


def test_no_text_is_run() -> None:
    assert not [(path.name, name) for path in PACKAGE.rglob("*.py") for name, _ in calls(path) if name in BUILTIN]


def test_pickles_are_read_as_data_alone() -> None:
    (call,) = named(PACKAGE / "weights.py", "torch.load")
    assert {key.arg: ast.unparse(key.value) for key in call.keywords}["weights_only"] == "True"


def test_config_files_are_read_as_data_alone() -> None:
    (call,) = named(PACKAGE / "settings.py", "yaml.load")
    assert ast.unparse(call.args[1]) == "Loader"
    (loader,) = [
        node
        for node in ast.walk(ast.parse((PACKAGE / "settings.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name == "Loader"
    ]
    assert [ast.unparse(base) for base in loader.bases] == ["yaml.SafeLoader"]


def test_no_remote_code_is_trusted() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path
