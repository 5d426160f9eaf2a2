"""A guess at what is wrong: what a failure depends on, and a known bug that gives the same wrong numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.conduct import DIES, HANGS, WRONG_NUMBERS, Hangs
from smca.conformance.mutants.plant import MUTANTS, operations_of, planted
from smca.conformance.property import Recorder
from smca.conformance.protocol import name_of
from smca.conformance.runner import Outcome
from smca.conformance.simplify import describe_simplifications
from smca.conformance.tolerances import UNIT_ROUNDOFF


def explain(outcome: Outcome) -> str:
    """What a failure depends on, and which known bug makes the specification fail in the same way.

    Empty for an implementation that hangs or ends: it would do so again. If it begins to while it is asked, the search ends.
    """
    if outcome.verdict in (HANGS, DIES):
        return ""
    try:
        return "\n".join(filter(None, [describe_simplifications(outcome), known_bugs(outcome)]))
    except Hangs:
        return ""


def known_bugs(outcome: Outcome) -> str:
    """A line that names the specification's bugs that reproduce a failure, for every failing example; "" if none does.

    Only for comparisons with the oracle: the others have no wrong numbers to reproduce.
    """
    prop = outcome.case.prop
    if outcome.verdict != WRONG_NUMBERS or not prop.oracle or not outcome.failing:
        return ""
    names = []
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        wrong = [_outputs(outcome.case.implementation, outcome, recipe) for recipe in outcome.failing]
        for mutant in MUTANTS:
            if mutant.package != "reference" or prop.operation not in operations_of(mutant):
                continue
            with planted(mutant) as (oracle,):
                pairs = zip(outcome.failing, wrong, strict=True)
                if all(_same(_outputs(oracle, outcome, recipe), seen, outcome.case.dtype) for recipe, seen in pairs):
                    names.append(f"{mutant.bug} (as in {mutant.module})")
    return (
        f"    likely: the specification gives the same numbers with this bug in it: {'; or '.join(names)}"
        if names
        else ""
    )


def _outputs(implementation: Any, outcome: Outcome, recipe: Any) -> list[npt.NDArray[np.float64]] | None:
    judge = Recorder(outcome.case.prop, name_of(implementation), outcome.case.dtype, recipe)
    try:
        outcome.case.prop.check(implementation, recipe, outcome.case.dtype, judge)
    except Exception:  # an error of any kind: there are no numbers to compare
        return None
    return judge.seen


def _same(one: list[npt.NDArray[np.float64]] | None, two: list[npt.NDArray[np.float64]] | None, dtype: str) -> bool:
    if one is None or two is None or len(one) != len(two):
        return False
    digits = UNIT_ROUNDOFF[dtype] ** 0.75
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=digits, atol=digits * np.abs(b).max(initial=0.0), equal_nan=True)
        for a, b in zip(one, two, strict=True)
    )
