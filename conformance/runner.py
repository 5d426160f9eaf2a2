"""Runs properties against implementations: how many examples, in which order, and with what outcome."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from smca.conformance.property import Judge, Property, Worst
from smca.conformance.protocol import OPERATIONS, address_of, dtypes_of, implemented, leaves_out, name_of


@dataclass(frozen=True)
class Profile:
    """How thoroughly to test."""

    name: str
    examples: int
    """Examples per property, implementation and dtype (times the property's own factor)."""
    random: bool
    """Whether every run draws new examples and keeps failures in .hypothesis/; otherwise every run draws the same."""
    patient: bool
    """Whether slow implementations get all properties; otherwise only equality with the oracle."""


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("quick", 20, random=False, patient=False),
        Profile("ci", 100, random=True, patient=True),
        Profile("deep", 5000, random=True, patient=True),
    )
}
"""quick: under a minute, in every CI run. ci: some minutes. deep: hours."""


@dataclass(frozen=True)
class Case:
    """A property to check for an implementation and a dtype."""

    prop: Property
    implementation: Any
    dtype: str

    @property
    def missing(self) -> str | None:
        """The operation that the implementation lacks for it, or the property itself; None if it lacks none."""
        if self.prop.name in leaves_out(self.implementation):
            return self.prop.name
        for operation in (self.prop.operation, *self.prop.needs):
            if not implemented(self.implementation, operation):
                return operation
        return None


@dataclass(frozen=True)
class Outcome:
    """The result of a case."""

    case: Case
    status: str
    """"passed", "failed" or "not implemented"."""
    message: str
    """The failure, for the smallest example that was found; empty if there is none."""
    worst: Worst
    """The largest error, as a multiple of its bound; its `examples` is how many were tried."""
    seconds: float
    failing: tuple[Any, ...] = ()
    """Some recipes that failed: the smallest one last."""


def cases(properties: Iterable[Property], implementations: Iterable[Any], profile: Profile) -> Iterator[Case]:
    """All combinations, implementation by implementation; what is not implemented comes once, not once per dtype.

    An implementation that is slow to try (it compiles every new shape, or is interpreted) declares it by a true ``slow``, and may
    name in ``quick_operations`` the operations that are enough of it in the quick profile.
    """
    everything = sorted(properties, key=lambda prop: OPERATIONS.index(prop.operation))
    for implementation in implementations:
        quick = getattr(implementation, "slow", False) and not profile.patient
        enough = getattr(implementation, "quick_operations", OPERATIONS) if quick else OPERATIONS
        for prop in everything:
            if prop.operation not in enough or _is_itself(implementation, prop):
                continue
            if quick and not prop.oracle:
                continue
            names = dtypes_of(implementation)
            wanted = [dtype for dtype in names if prop.dtypes is None or dtype in prop.dtypes]
            for dtype in wanted if Case(prop, implementation, names[0]).missing is None else wanted[:1]:
                yield Case(prop, implementation, dtype)


def _is_itself(implementation: Any, prop: Property) -> bool:
    """Whether the property would compare the oracle with the oracle, which cannot fail. (Assignments are compared with SciPy's.)"""
    return bool(getattr(implementation, "is_oracle", False)) and prop.oracle and prop.operation != "assign"


def run(case: Case, profile: Profile, *, examples: int | None = None, shrink: bool = True) -> Outcome:
    """Draw examples until one fails or the profile's number is reached.

    Args:
        case: which property to check, for which implementation and dtype.
        profile: how thoroughly.
        examples: number of examples, in place of the profile's; 0 = those alone that the property always tries.
        shrink: look for the smallest failing example; False = report the first.
    """
    judge = Judge(case.prop, name_of(case.implementation), case.dtype, address=address_of(case.implementation))
    if case.missing is not None:
        return Outcome(case, "not implemented", "", judge.worst, 0.0)
    factor = case.prop.examples_factor * float(getattr(case.implementation, "examples_factor", 1.0))
    number = round((profile.examples if examples is None else examples) * factor)
    database = DirectoryBasedExampleDatabase(Path(".hypothesis") / "examples") if profile.random else None
    tried, failing = 0, dict[str, Any]()

    def check(recipe: Any) -> None:
        nonlocal tried
        tried += 1
        judge.recipe = recipe
        try:
            case.prop.check(case.implementation, recipe, case.dtype, judge)
        except (AssertionError, KeyboardInterrupt):
            failing[repr(recipe)] = recipe
            raise
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise  # Hypothesis's own way to reject an example
            raise judge.mismatch(f"it raised {type(error).__name__}: {error}") from error

    def attempt(*phases: Phase) -> tuple[str, Any]:
        """Message and recipe of the failure; "" if there is none."""
        test = given(recipe=case.prop.recipes)(check)
        for recipe in case.prop.always:
            test = example(recipe=recipe)(test)
        test = settings(
            max_examples=max(1, number),
            deadline=None,
            derandomize=not profile.random,
            database=database,
            phases=phases,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )(test)
        try:
            test()
        except AssertionError as error:
            return str(error), judge.recipe
        return "", None

    begun = time.perf_counter()
    message, smallest = attempt(Phase.explicit) if case.prop.always else ("", None)
    # Hypothesis's first example is the simplest and tells next to nothing: drawing it alone is useless.
    if (number > 0 or not case.prop.always) and not (message and not shrink):
        drawn = attempt(Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else []))
        message, smallest = drawn if drawn[0] else (message, smallest)
    judge.worst.examples, seconds = tried, time.perf_counter() - begun
    some = (*list(failing.values())[:4], smallest) if message else ()
    return Outcome(case, "failed" if message else "passed", message, judge.worst, seconds, some)
