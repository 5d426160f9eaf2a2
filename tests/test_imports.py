"""Imports point one way, and no folder is imported by its bare name. Read from the source, so that no file escapes."""

from __future__ import annotations

import ast
import importlib.metadata
import runpy
import sys
from pathlib import Path

import pytest

STRUCTURE = runpy.run_path(str(Path(__file__).with_name("structure.py")))
PACKAGES, ROOT, circles, imported_modules, imports_of, modules = (
    STRUCTURE[name] for name in ("PACKAGES", "ROOT", "circles", "imported_modules", "imports_of", "modules")
)

FORBIDDEN = {
    "reference": {"datasets", "gpu", "conformance"},
    "datasets": {"reference", "gpu", "conformance"},
    "gpu": {"reference", "conformance"},
    "conformance": set(),
}
"""Package → the packages that it must not import."""


def violations(source: str, package: str) -> list[str]:
    """What a module of `package` ("" for one outside all four: tests, docs) imports but must not, as "line: reason"."""
    wrong = []
    for line, name in imported_modules(source, package):
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        if first in PACKAGES:
            wrong.append(f"{line}: {name} is a bare folder name; import smca.{first}")
        elif first == "smca" and second in FORBIDDEN.get(package, set()):
            wrong.append(f"{line}: smca.{package} must not import smca.{second}")
        elif package == "reference" and first not in {"numpy", "smca", *sys.stdlib_module_names}:
            wrong.append(f"{line}: smca.reference is NumPy only, {name} is not")
    return wrong


def python_files() -> list[Path]:
    folders = [*PACKAGES, "tests", "docs"]
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert violations(path.read_text(encoding="utf-8"), folder if folder in PACKAGES else "") == []


def test_every_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in python_files()} >= {*PACKAGES, "tests"}


def test_no_module_of_gpu_hides_a_package() -> None:
    """``python gpu/train.py`` puts gpu/ itself first on the import path: a gpu/triton.py would then be `triton`."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | {"triton", "cupy", "onnx"}
    importable = {path.stem for path in (ROOT / "gpu").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert len(importable) > 10
    assert importable & taken == set()


def test_no_imports_go_in_circles() -> None:
    known = modules()
    assert len(known) > 90
    assert circles({name: imports_of(name, path, known) for name, path in known.items()}) == []


def test_gpu_names_no_package_above_it_in_a_string_either() -> None:
    """An import by a variable would escape the checker. (``smca conformance`` is found by its entry point.)"""
    for path in (ROOT / "gpu").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("smca.conformance", "smca.reference")), f"{path}:{node.lineno}"


def test_every_command_is_an_entry_point() -> None:
    from smca.gpu.cli import COMMANDS

    assert {point.name for point in importlib.metadata.entry_points(group="smca.commands")} == set(COMMANDS)


def test_a_circle_is_found() -> None:
    needed = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set[str]()}
    assert circles(needed) == [{"b", "c"}]


def test_commands_are_imported_by_nobody() -> None:
    """What two commands need lives in neither of them."""
    known = modules()
    names = ("train", "check_data", "evaluate", "predict", "explain", "convert_weights", "benchmark.command")
    commands = {f"smca.gpu.{name}" for name in names}
    commands.add("smca.conformance.command")
    assert commands <= known.keys()
    for name, path in known.items():
        if path.name.startswith("test_") or path.name == "__main__.py":  # which is the command
            continue
        named = {
            t
            for _, target in imported_modules(path.read_text("utf-8"), name.split(".")[1])
            for t in (target, target.rpartition(".")[0])
        }
        assert named & commands <= {name}, name


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("reference", "import torch"),
        ("reference", "import scipy.optimize"),
        ("reference", "from smca.gpu import attention"),
        ("reference", "from smca import datasets"),
        ("reference", "from .. import gpu"),
        ("reference", "from ..gpu.attention import smca_attention"),
        ("datasets", "import smca.gpu.config"),
        ("datasets", "from smca.reference.boxes import box_iou"),
        ("datasets", "from smca import conformance"),
        ("gpu", "from smca.reference.attention import smca_attention"),
        ("gpu", "import smca.conformance as c"),
        ("gpu", "def f():\n    import smca.reference"),
        ("gpu", "if TYPE_CHECKING:\n    from smca.reference import model"),
        ("gpu", "importlib.import_module('smca.reference.model')"),
        ("gpu", "from ..reference import model"),
        ("gpu", "import datasets"),
        ("gpu", "from gpu.attention import smca_attention"),
        ("", "import reference.attention"),
        ("conformance", "from datasets import Sample"),
    ],
)
def test_checker_reports_bad_imports(package: str, source: str) -> None:
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (
            "reference",
            "from __future__ import annotations\nimport math\nfrom numpy.typing import NDArray",
        ),
        ("reference", "from smca.reference.boxes import box_iou\nfrom . import layers\nfrom .layers import mlp"),
        ("datasets", "import torch\nfrom smca.datasets.types import Sample"),
        ("gpu", "import torch\nfrom smca.datasets import Sample\nfrom ..datasets import Batch"),
        ("conformance", "import smca.reference.model\nfrom smca import gpu, datasets"),
        ("", "from smca.gpu.config import RunConfig\nimport datasets_of_mine"),
    ],
)
def test_checker_passes_good_imports(package: str, source: str) -> None:
    assert violations(source, package) == []
