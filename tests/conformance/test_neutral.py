"""The suite needs NumPy and Hypothesis, and nothing else until an implementation does."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = """
import importlib.abc, sys

class Fence(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = ("numpy", "hypothesis", "sortedcontainers", "_hypothesis_globals")
        own = top.startswith("_sysconfigdata")
        smca = top == "smca" and not name.startswith(("smca.gpu", "smca.datasets"))
        if not (top in sys.stdlib_module_names or top in known or own or smca):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, Fence())
from smca.conformance.command import main
"""


def fenced(code: str) -> str:
    """What a process prints that finds no other library."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{FENCE}\n{code}"], capture_output=True, text=True, cwd=ROOT / "conformance"
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_oracle_runs_without_anything_else() -> None:
    said = fenced("main(['--implementation', 'oracle', '--only', 'iou'])")
    assert "oracle             float64   generalized_box_iou                 3      0" in said


def test_what_needs_more_says_so() -> None:
    said = fenced("main(['--list', '--only', 'assign.constants'])")
    assert "eager              not here: torch is not installed: it comes with the whole project, smca-detr" in said
    assert "oracle             float64" in said
    assert "oracle-cupy        not here: CuPy is not installed" in said


def test_bugs_of_the_specification_are_found_and_those_of_the_rest_named() -> None:
    said = fenced(
        """
from smca.conformance.mutants.plant import MUTANTS, kill
from smca.conformance.protocol import Unavailable
from smca.conformance.runner import PROFILES
from smca.conformance.suite import PROPERTIES

ours = next(mutant for mutant in MUTANTS if mutant.module == "boxes")
print(kill(ours, PROPERTIES, PROFILES["quick"]).killer)
try:
    kill(next(mutant for mutant in MUTANTS if mutant.package == "gpu"), PROPERTIES, PROFILES["quick"])
except Unavailable as error:
    print(error)
"""
    )
    assert said.splitlines() == [
        "generalized_box_iou.equals_the_oracle",
        "smca.gpu is not installed: it comes with the whole project, smca-detr",
    ]


def test_the_distribution_of_the_suite_has_all_of_it_and_the_version_of_the_whole() -> None:
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    alone = tomllib.loads((ROOT / "conformance" / "pyproject.toml").read_text(encoding="utf-8"))
    assert alone["project"]["version"] == whole["project"]["version"]
    packages = [
        name for name in whole["tool"]["setuptools"]["packages"] if ".conformance" in name or ".reference" in name
    ]
    assert alone["tool"]["setuptools"]["packages"] == packages
