"""Proof that the suite would find each of the planted bugs, and call it by its name."""

from __future__ import annotations

import ast
import os
from typing import Any

import pytest

from smca.conformance.diagnosis import explain
from smca.conformance.implementations.oracle import Oracle
from smca.conformance.mutants.importing import changed, folder_of
from smca.conformance.mutants.plant import MUTANTS, kill, planted
from smca.conformance.protocol import Unavailable
from smca.conformance.runner import PROFILES, Case, cases, run
from smca.conformance.suite import PROPERTIES

ALL = os.environ.get("SMCA_MUTANTS") == "all"
"""The nightly profile plants every bug, as `smca conformance --mutants` does; other runs one in twelve, and none of the kernels',
which take the interpreter a quarter of a minute each."""
SOME = [mutant for mutant in MUTANTS if mutant.module != "attention.fused_kernels"][::12]
OF_THE_SPECIFICATION = [mutant for mutant in MUTANTS if mutant.package == "reference"]


def test_mutants_are_enough() -> None:
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS) == 471  # as README.md and docs say


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_every_mutant_can_be_planted(mutant: Any) -> None:
    """Its source is where the table says, once, and what it becomes is Python."""
    path = folder_of(mutant.package).joinpath(*mutant.module.split(".")).with_suffix(".py")
    ast.parse(changed(path.read_text(encoding="utf-8"), mutant))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a bug may divide by 0 on its way to being found
@pytest.mark.parametrize("mutant", MUTANTS if ALL else SOME, ids=lambda mutant: mutant.bug)
def test_every_mutant_dies(mutant: Any, request: pytest.FixtureRequest) -> None:
    try:
        result = kill(mutant, PROPERTIES, PROFILES[request.config.getoption("--profile")])
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert result.killer, f"no property noticed: {mutant.bug} (in {mutant.package}/{mutant.module}.py)"
    assert mutant.bug not in result.message, "a mutant must be caught by what it computes, not by failing to load"


@pytest.mark.parametrize(
    ("bug", "operation", "lines"),
    [
        ("lifted: centre from the corner, cells from the middle", "smca_attention", ["λ_x = 0", "q = 0"]),
        ("padded targets matched", "set_loss", ["no padding among the targets", ""]),
        ("labels of padding wanted of the first query", "softmax_set_loss", ["no padding among the targets", ""]),
    ],
)
def test_what_a_failure_hangs_on_is_said(bug: str, operation: str, lines: list[str]) -> None:
    """The report names the simplifications with which an example passes, and those with which it still fails."""
    mutant = next(mutant for mutant in MUTANTS if mutant.bug == bug)
    prop = next(prop for prop in PROPERTIES if prop.name == f"{operation}.equals_the_oracle")
    with planted(mutant) as (implementation,):
        text = explain(run(Case(prop, implementation, "float64"), PROFILES["quick"]))
    passes, _, fails = text.partition("    it still fails with: ")
    assert "it passes with: " in passes
    assert lines[0] in passes
    assert lines[1] in fails


@pytest.mark.parametrize("mutant", OF_THE_SPECIFICATION[::120], ids=lambda mutant: mutant.bug)
def test_a_known_bug_is_called_by_its_name(mutant: Any) -> None:
    """An implementation that fails in the same way as a mutant is reported with that mutant's name."""
    with planted(mutant) as (implementation,):
        for case in cases([prop for prop in PROPERTIES if prop.oracle], [implementation], PROFILES["quick"]):
            outcome = run(case, PROFILES["quick"])
            if outcome.status == "failed":
                assert mutant.bug in explain(outcome)
                return
    result = kill(mutant, PROPERTIES, PROFILES["quick"])
    assert result.killer, "nothing failed"
    pytest.skip(f"found by {result.killer}, which has no numbers of the oracle's to compare")


def test_a_hair_too_much_is_no_known_bug() -> None:
    """Bugs that change nothing in a failing example do not explain it, however close its numbers are to the specification's."""

    class OffByAHair(Oracle):
        is_oracle = False

        def set_loss_vjp(self, *arguments: Any, dtype: str) -> Any:
            dlogits, dboxes = super().set_loss_vjp(*arguments, dtype=dtype)
            return dlogits * (1 + 1e-13), dboxes * (1 + 1e-13)

    prop = next(prop for prop in PROPERTIES if prop.name == "set_loss_vjp.equals_the_oracle")
    outcome = run(Case(prop, OffByAHair(), "float64"), PROFILES["quick"])
    assert outcome.status == "failed"
    assert "likely: " not in explain(outcome)
