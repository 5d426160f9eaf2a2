"""A guess at what is wrong: what a failure depends on, and a known bug that gives the same wrong numbers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.conduct import DIES, HANGS, WRONG_NUMBERS, Hangs
from smca.conformance.implementations.oracle import Oracle
from smca.conformance.mutants.plant import MUTANTS, operations_of, planted
from smca.conformance.property import Recorder
from smca.conformance.protocol import name_of
from smca.conformance.runner import Outcome
from smca.conformance.simplify import describe_simplifications
from smca.conformance.tolerances import UNIT_ROUNDOFF

Outputs = list[npt.NDArray[np.float64]] | None
"""The numbers that a property compared; None if there was an error."""


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
        wrong, right = (
            [_outputs(implementation, outcome, recipe) for recipe in outcome.failing]
            for implementation in (outcome.case.implementation, Oracle())
        )

        def alike(some: list[Outputs], others: list[Outputs]) -> bool:
            return all(_same(a, b, outcome.case.dtype) for a, b in zip(some, others, strict=True))

        if alike(wrong, right):  # off by so little that any bug which changes nothing here would seem to be the one
            return ""
        for mutant in MUTANTS:
            if mutant.package != "reference" or prop.operation not in operations_of(mutant):
                continue
            with planted(mutant) as (oracle,):
                if alike([_outputs(oracle, outcome, recipe) for recipe in outcome.failing], wrong):
                    names.append(f"{mutant.bug} (as in {mutant.module})")
    return (
        f"    likely: the specification gives the same numbers with this bug in it: {'; or '.join(names)}"
        if names
        else ""
    )


def _outputs(implementation: Any, outcome: Outcome, recipe: Any) -> Outputs:
    judge = Recorder(outcome.case.prop, name_of(implementation), outcome.case.dtype, recipe)
    try:
        outcome.case.prop.check(implementation, recipe, outcome.case.dtype, judge)
    except Exception:  # an error of any kind: there are no numbers to compare
        return None
    return judge.seen


def _same(one: Outputs, two: Outputs, dtype: str) -> bool:
    if one is None or two is None or len(one) != len(two):
        return False
    digits = UNIT_ROUNDOFF[dtype] ** 0.75
    return all(
        a.shape == b.shape and np.allclose(a, b, rtol=digits, atol=digits * np.abs(b).max(initial=0.0), equal_nan=True)
        for a, b in zip(one, two, strict=True)
    )
