"""Runs properties against implementations: how many examples, in which order, and with what outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky

from smca.conformance.conduct import (
    HANGS,
    OTHER_STRUCTURE,
    REMEMBERS,
    SECOND,
    WRONG_NUMBERS,
    Hangs,
    Misconduct,
    Watched,
)
from smca.conformance.implementations.registry import implementation_of
from smca.conformance.property import Judge, Mismatch, Property, Recorder, Worst
from smca.conformance.protocol import OPERATIONS, address_of, dtypes_of, implemented, leaves_out, name_of
from smca.conformance.tolerances import UNIT_ROUNDOFF


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
    verdict: str = ""
    """Of a failure, one of `conduct.VERDICTS`."""
    remarks: tuple[str, ...] = ()
    """What no correct answer depends on, but a user should know: it prints, it is slow."""
    explanation: str = ""
    """Of a failure, where it was looked for already."""


def cases(properties: Iterable[Property], implementations: Iterable[Any], profile: Profile) -> Iterator[Case]:
    """All combinations, implementation by implementation; what is not implemented comes once, not once per dtype.

    An implementation that is slow to try (it compiles every new shape, or is interpreted) declares it by a true ``slow``, and
    may name in ``quick_operations`` the operations that are enough of it in the quick profile. ``quick_always`` says how many
    of a property's examples that are always tried are enough there.
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
    """Whether the property would compare the oracle with the oracle, which cannot fail."""
    return bool(getattr(implementation, "is_oracle", False)) and prop.oracle


SLOW = 1.0
"""Seconds: an example that takes longer is remarked on."""


def run(
    case: Case,
    profile: Profile,
    *,
    examples: int | None = None,
    shrink: bool = True,
    starts: Callable[[Any], None] | None = None,
) -> Outcome:
    """Draw examples until one fails or the profile's number is reached.

    Args:
        case: which property to check, for which implementation and dtype.
        profile: how thoroughly.
        examples: number of examples, in place of the profile's; 0 = those alone that the property always tries.
        shrink: look for the smallest failing example; False = report the first.
        starts: called with every example before it is tried.
    """
    judge = Judge(case.prop, name_of(case.implementation), case.dtype, address=address_of(case.implementation))
    if case.missing is not None:
        return Outcome(case, "not implemented", "", judge.worst, 0.0)
    factor = case.prop.examples_factor * float(getattr(case.implementation, "examples_factor", 1.0))
    number = round((profile.examples if examples is None else examples) * factor)
    always = case.prop.always
    if not profile.patient:
        always = always[: getattr(case.implementation, "quick_always", None)]
    database = DirectoryBasedExampleDatabase(Path(".hypothesis") / "examples") if profile.random else None
    tried, failing, slowest = 0, dict[str, Any](), (0.0, "")
    implementation = Watched(case.implementation)

    def check(recipe: Any) -> None:
        nonlocal tried, slowest
        tried += 1
        if starts is not None:
            starts(recipe)
        begun = time.perf_counter()
        try:
            checked(judge, implementation, recipe)
        except (AssertionError, KeyboardInterrupt):
            failing[repr(recipe)] = recipe
            raise
        finally:
            slowest = max(slowest, (time.perf_counter() - begun, repr(recipe)))

    def attempt(*phases: Phase) -> tuple[Mismatch | None, Any]:
        """The failure, if there is one, and its recipe."""
        test = given(recipe=case.prop.recipes)(check)
        for recipe in always:
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
        except Mismatch as error:
            return error, judge.recipe
        except Flaky:
            judge.recipe = list(failing.values())[-1]
            return judge.mismatch("it fails on this example, and when tried again it does not", SECOND), judge.recipe
        return None, None

    begun = time.perf_counter()
    failure, smallest = None, None
    try:
        if always:
            failure, smallest = attempt(Phase.explicit)
        # Hypothesis's first example is the simplest and tells next to nothing: drawing it alone is useless.
        if (number > 0 or not always) and not (failure and not shrink):
            drawn = attempt(Phase.reuse, Phase.generate, *([Phase.shrink] if shrink else []))
            failure, smallest = drawn if drawn[0] else (failure, smallest)
        for recipe, misconduct in () if failure else implementation.asked_again():
            judge.recipe = recipe
            failure, smallest = judge.mismatch(misconduct.finding, misconduct.verdict), recipe
            break
    except Hangs as hangs:
        failure, smallest = judge.mismatch(str(hangs), HANGS), judge.recipe
    if failure is not None and failure.verdict == WRONG_NUMBERS and shrink:
        failure = _unsteady(case, judge, smallest) or failure
    judge.worst.examples, seconds = tried, time.perf_counter() - begun
    some = (*list(failing.values())[:4], smallest) if failure else ()
    return Outcome(
        case,
        "failed" if failure else "passed",
        str(failure or ""),
        judge.worst,
        seconds,
        some,
        failure.verdict if failure else "",
        () if slowest[0] < SLOW else (f"slow: an example took {slowest[0]:.1f} s, {slowest[1]}",),
    )


def _unsteady(case: Case, judge: Judge, recipe: Any) -> Mismatch | None:
    """The failure by its right name, if the numbers are wrong because answers change: from one time to the next, or with what was
    asked before. An outside implementation is made anew to find out."""
    judge.recipe, address = recipe, address_of(case.implementation)
    implementation = implementation_of(address) if ":" in address else case.implementation
    seen = []
    for _ in range(2):
        recorder = Recorder(case.prop, judge.implementation, case.dtype, recipe)
        try:
            case.prop.check(implementation, recipe, case.dtype, recorder)
        except Exception:  # of any kind: it is known already that something is wrong
            return None
        seen.append(recorder.seen)
    digits = UNIT_ROUNDOFF[case.dtype] ** 0.5
    alike = len(seen[0]) == len(seen[1]) and all(
        one.shape == two.shape and np.allclose(one, two, rtol=digits, atol=digits, equal_nan=True)
        for one, two in zip(*seen, strict=True)
    )
    if not alike:
        return judge.mismatch("asked the same twice, it gives two answers", SECOND)
    if implementation is not case.implementation:
        try:
            checked(Judge(case.prop, judge.implementation, case.dtype), implementation, recipe)
        except Mismatch:
            return None
        finding = "its answer is wrong, and right when a newly made one is asked nothing else before"
        return judge.mismatch(finding, REMEMBERS)
    return None


def checked(judge: Judge, implementation: Any, recipe: Any) -> None:
    """Check the judge's property on one example.

    Raises:
        Mismatch: it does not hold, or the implementation misbehaves.
    """
    judge.recipe = recipe
    watched = implementation if isinstance(implementation, Watched) else Watched(implementation)
    watched.recipe = recipe
    try:
        judge.of.check(watched, recipe, judge.dtype, judge)
    except Misconduct as misconduct:
        raise judge.mismatch(misconduct.finding, misconduct.verdict) from misconduct
    except AssertionError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("hypothesis"):
            raise  # Hypothesis's own way to reject an example
        finding = f"its answer could not be used: {type(error).__name__}: {error}"
        raise judge.mismatch(finding, OTHER_STRUCTURE) from error
