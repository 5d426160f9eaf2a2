"""A property: a statement about an operation that holds for every correct implementation, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from smca.conformance.conduct import OTHER_SHAPE, WRONG_NUMBERS
from smca.conformance.tolerances import CONSTANTS, TINY

Array = npt.NDArray[np.float64]


class Recipe(Protocol):
    """A few numbers from which all arrays of an example follow; its repr is Python that makes it again."""

    def describe(self) -> str:
        """Shapes, and the values worth reading."""
        ...


class Mismatch(AssertionError):
    """An implementation broke a property; the message holds all that is needed to investigate."""

    def __init__(self, message: str, verdict: str = WRONG_NUMBERS) -> None:
        super().__init__(message)
        self.verdict = verdict
        """One of `conduct.VERDICTS`."""


@dataclass
class Worst:
    """The largest error seen, as a multiple of its bound."""

    ratio: float = -1.0
    error: float = 0.0
    bound: float = 0.0
    what: str = ""
    recipe: Any = None
    examples: int = 0


@dataclass
class Judge:
    """Compares results for one property, implementation and dtype, and remembers the worst error."""

    of: Property
    implementation: str
    dtype: str
    recipe: Any = None
    worst: Worst = field(default_factory=Worst)
    address: str = ""
    """By what `replay` finds the implementation, if not by its name."""
    note: Callable[[tuple[int, ...]], str] | None = None
    """What else to print for the worst index: the parts that the expected number is made of."""

    def close(self, got: Any, expected: npt.ArrayLike, bound: npt.ArrayLike, what: str) -> None:
        """Every entry of `got` is within its bound of `expected`.

        Args:
            got: array-like under test.
            expected: of the same shape.
            bound: broadcast to it; first order, in units of the entry, without the operation's constant.
            what: is compared, in words: "output", "gradient of k".
        """
        got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
        if got.shape != expected.shape:
            raise self.mismatch(f"{what}: got shape {got.shape}, expected {expected.shape}", OTHER_SHAPE)
        if not got.size:
            return
        limit = np.broadcast_to(self.limit(bound), got.shape)
        # Equal infinities agree; anything else that isn't finite does not, unless both are NaN (and then neither does).
        error = np.where(got == expected, 0.0, np.abs(got - expected))
        error = np.where(np.isnan(error), np.inf, error)
        ratio = error / limit
        at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        if ratio[at] > self.worst.ratio:
            self.worst = Worst(float(ratio[at]), float(error[at]), float(limit[at]), what, self.recipe, 0)
        if not ratio[at] <= 1:
            where = f"[{', '.join(str(int(i)) for i in at)}]" if at else ""
            wrong = int((ratio > 1).sum())
            note = f"\n    {self.note(tuple(int(i) for i in at))}" if self.note else ""
            raise self.mismatch(
                f"{what}{where} = {float(got[at])!r}, expected {float(expected[at])!r}\n"
                f"    off by {error[at]:.3g}, bound {limit[at]:.3g}; {wrong} of {got.size} entries are over their bounds{note}"
            )

    def limit(self, bound: npt.ArrayLike) -> Array:
        """How far an entry may be off: its bound times the operation's constant."""
        return np.asarray(np.asarray(bound) * CONSTANTS[self.of.operation][0] + TINY)

    def along(
        self, parts: Sequence[tuple[Any, npt.NDArray[Any]]], expected: float, bound: npt.ArrayLike, what: str
    ) -> None:
        """Gradients, along one direction in all of them, are within a bound of a derivative.

        Args:
            parts: each gradient under test, with its direction, of the same shape.
            expected: the derivative along it.
            bound: as in `close`.
            what: is compared, in words.
        """
        got = sum(float((np.asarray(gradient, dtype=np.float64) * direction).sum()) for gradient, direction in parts)
        self.close(got, expected, bound, f"{what} along a direction")

    def holds(self, condition: bool, message: str) -> None:
        """`condition` is true; otherwise `message` is the finding."""
        if not condition:
            raise self.mismatch(message)

    def all_finite(self, got: Any, what: str) -> None:
        """`got` holds no NaN and no infinity."""
        got = np.asarray(got, dtype=np.float64)
        if not np.isfinite(got).all():
            at = np.argwhere(~np.isfinite(got))[0]
            where = f"[{', '.join(str(int(i)) for i in at)}]" if len(at) else ""
            raise self.mismatch(f"{what}{where} = {got[~np.isfinite(got)][0]}, expected a finite number")

    def mismatch(self, finding: str, verdict: str = WRONG_NUMBERS) -> Mismatch:
        """The error for a finding: what failed, for which implementation and input, why it must hold, and how to repeat it."""
        prop = self.of
        named = "" if verdict == WRONG_NUMBERS else f"    verdict: {verdict}\n"
        return Mismatch(
            f"{prop.operation}: {prop.sentence}\n{named}"
            f"    {finding}\n"
            f"    implementation: {self.implementation}, {self.dtype}\n"
            f"    input: {self.recipe.describe() if self.recipe is not None else ''}\n"
            f"    why: {prop.equation}\n"
            f"    again:\n"
            f"        from smca.conformance.replay import *\n"
            f"        replay({prop.name!r}, {(self.address or self.implementation)!r}, {self.dtype!r}, {self.recipe!r})",
            verdict,
        )


@dataclass
class Recorder(Judge):
    """Records what an implementation returns, and judges nothing."""

    seen: list[Array] = field(default_factory=list)

    def close(self, got: Any, expected: npt.ArrayLike, bound: npt.ArrayLike, what: str) -> None:
        self.seen.append(np.array(got, dtype=np.float64))

    def holds(self, condition: bool, message: str) -> None:
        pass


@dataclass(frozen=True)
class Property:
    """One thing that must be true of an operation."""

    name: str
    """Short and unique: ``smca_attention.equals_the_oracle``."""
    sentence: str
    """In words."""
    equation: str
    """Its source, in docs/method.md or the reference, and what the source says."""
    recipes: SearchStrategy[Any]
    """What to draw examples from."""
    check: Callable[[Any, Any, str, Judge], None]
    """Called with implementation, recipe, dtype and judge; raises Mismatch."""
    dtypes: tuple[str, ...] | None = None
    """Dtypes that it applies to; None = all that the implementation has."""
    needs: tuple[str, ...] = ()
    """Operations that it calls besides its own."""
    examples_factor: float = 1.0
    """Multiplies a profile's number of examples: below 1 where an example is costly, above 1 where few are informative."""
    always: tuple[Any, ...] = ()
    """Recipes tried first in every run and profile: cases that a few random examples would miss."""

    @property
    def operation(self) -> str:
        """What is tested: the first part of the name."""
        return self.name.partition(".")[0]

    @property
    def oracle(self) -> bool:
        """Whether it compares with the oracle (the others need nothing but the implementation itself)."""
        return self.name.endswith("equals_the_oracle")


Check = Callable[[Any, Any, str, Judge], None]


def assume(condition: bool) -> None:
    """Rejects an example for which the property says nothing. Other than Hypothesis's own, it may be called anywhere.

    Raises:
        UnsatisfiedAssumption: `condition` is false.
    """
    if not condition:
        raise UnsatisfiedAssumption


def property_of(
    name: str,
    sentence: str,
    equation: str,
    recipes: SearchStrategy[Any],
    *,
    into: list[Property],
    dtypes: Sequence[str] | None = None,
    needs: Sequence[str] = (),
    examples_factor: float = 1.0,
    always: Sequence[Any] = (),
) -> Callable[[Check], Check]:
    """Decorator: the function becomes the check of a property, which is appended to `into`."""

    def register(check: Check) -> Check:
        only = tuple(dtypes) if dtypes else None
        into.append(
            Property(name, sentence, equation, recipes, check, only, tuple(needs), examples_factor, tuple(always))
        )
        return check

    return register
