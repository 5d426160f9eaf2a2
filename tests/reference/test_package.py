"""smca.reference as a package: what it may import, its worked examples, and that it stays readable."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import smca.reference

FOLDER = Path(smca.reference.__file__).resolve().parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
ALLOWED = {"numpy", "typing", "dataclasses", "collections"}


def foreign_imports(source: str) -> list[str]:
    """What a module imports besides NumPy, this package and three modules of the standard library."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append(node.id)
    return [name for name in found if name.split(".")[0] not in ALLOWED and not name.startswith("smca.reference")]


def test_the_import_check_finds_what_it_should() -> None:
    assert foreign_imports("import numpy as np\nfrom smca.reference.boxes import box_iou\nimport numpy.typing") == []
    assert foreign_imports("import torch") == ["torch"]
    assert foreign_imports("def f():\n    from scipy.optimize import linear_sum_assignment") == ["scipy.optimize"]
    assert foreign_imports("from smca.gpu import model\nfrom . import boxes") == ["smca.gpu", "."]
    assert foreign_imports("__import__('torch')") == ["__import__"]
    assert foreign_imports("import importlib") == ["importlib"]


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_imports_numpy_and_itself_only(module: str) -> None:
    assert foreign_imports((FOLDER / f"{module}.py").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES)
def test_worked_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"smca.reference.{module}"))
    assert result.failed == 0


def test_every_numeric_module_has_worked_examples() -> None:
    without = {"__init__", "arrays", "attention", "config", "decoder", "model", "parameters"}
    for module in set(MODULES) - without:
        assert doctest.testmod(importlib.import_module(f"smca.reference.{module}")).attempted > 0, module


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module: str) -> None:
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    public = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    local = {inner for n in public for inner in ast.walk(n) if inner is not n}  # helpers within a function
    in_class = {m for n in public if isinstance(n, ast.ClassDef) for m in n.body}
    for node in public:
        if node not in local or node in in_class:
            assert ast.get_docstring(node), f"{module}.{node.name}"


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_short_enough_to_read(module: str) -> None:
    assert len((FOLDER / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= 300


def test_the_reading_order_names_every_module() -> None:
    numbered = [line.split()[1] for line in (smca.reference.__doc__ or "").splitlines() if line.strip()[:1].isdigit()]
    assert sorted(numbered) == MODULES
    positions = {name: index for index, name in enumerate(numbered)}
    for module in MODULES:  # nothing is read before what it builds on
        source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smca.reference."):
                name = (node.module or "").rsplit(".", 1)[1]
                assert positions[name] < positions[module], f"{module} reads {name} first"


def test_tour_examples() -> None:
    tour = Path(__file__).parents[2] / "docs" / "tour.md"
    result = doctest.testfile(str(tour), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_torch_is_not_needed() -> None:
    """In a process of its own, importing the model loads neither torch nor SciPy."""
    code = (
        "import sys, smca.reference.model, smca.reference.losses; print('torch' in sys.modules, 'scipy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
