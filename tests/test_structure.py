"""The size of functions and files, and the direction of imports."""

import ast
import re
import sys

import pytest
from conftest import ROOT

# Each may import itself and those before it, but for `peft`, which knows nothing of `data`.
ROOMS = ("data", "peft", "transformers_patch", "loading", "inference", "training", "train", "scripts", "workbench")
PACKAGES = (*(room for room in ROOMS if room != "train"), "integrations", "tests")
FILES = [*sorted(ROOT.glob("*.py")), *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py")))]


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_function_is_longer_than_80_lines(file):
    long = [node.name for node in functions(ast.parse(file.read_text())) if node.end_lineno - node.lineno >= 80]
    assert not long


def test_the_method_can_be_read_in_one_sitting():
    lines = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "peft").glob("*.py")}
    assert sum(lines[name] for name in ("functions.py", "router.py", "layer.py", "balance.py")) < 350
    assert max(lines.values()) <= 400


def test_nothing_starts_the_workbench():
    """It has no name outside: no import by name, no command of another process, no shell script."""
    files = [file for file in FILES if not {"workbench", "tests"} & set(file.relative_to(ROOT).parts)]
    for file in [*files, ROOT / "run_loramoe.sh", *(ROOT / "scripts").rglob("*.sh")]:
        assert "workbench" not in file.read_text(), file


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_left(package):
    allowed = {"peft"} if package == "peft" else set(ROOMS[: ROOMS.index(package) + 1])
    for file in (ROOT / package).rglob("*.py") if package != "train" else [ROOT / "train.py"]:
        imported = re.findall(rf"^\s*(?:from|import) ({'|'.join(ROOMS)})\b", file.read_text(), re.M)
        assert set(imported) <= allowed, file


def test_peft_needs_torch_and_safetensors_alone():
    """And triton for the kernels, which are imported where it is wanted. Its own files it imports relatively: the
    plug-in for PyPI's peft is built from them under another name."""
    for file in (ROOT / "peft").glob("*.py"):
        allowed = {"torch", "safetensors", "deepspeed"} | ({"triton"} if file.name == "kernels.py" else set())
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            third_party = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert third_party <= allowed, file
