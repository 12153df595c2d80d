"""The size of functions and files, and the direction of imports."""

import ast
import re
import sys

import pytest
from conftest import ROOT

PACKAGES = ("data", "peft", "scripts", "tests", "transformers_patch")
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


ALLOWED = {
    "data": {"data"},
    "peft": {"peft"},
    "transformers_patch": {"data", "peft", "transformers_patch"},
}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_left(package):
    for file in (ROOT / package).rglob("*.py"):
        imported = re.findall(
            r"^\s*(?:from|import) (data|peft|transformers_patch|scripts|train)\b", file.read_text(), re.M
        )
        assert set(imported) <= ALLOWED[package], file


def test_peft_needs_torch_and_safetensors_alone():
    allowed = {"torch", "safetensors", "deepspeed", "peft"}
    for file in (ROOT / "peft").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            third_party = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            assert third_party <= allowed, file
