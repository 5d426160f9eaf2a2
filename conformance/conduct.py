"""How an implementation behaves, whatever its numbers: it answers with what was asked for, leaves its inputs alone, and
answers alike.

`Watched` stands in its place while properties are checked. Every call is looked at; the first call of each operation is made
a second time at once, and once more when all examples are through, in between of which the implementation was asked other
things.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.protocol import OPERATIONS
from smca.conformance.tolerances import UNIT_ROUNDOFF
from smca.conformance.wire import ARGUMENTS, NAMED, RESULTS, leaves

WRONG_NUMBERS = "wrong numbers"
RAISES = "raises"
RETURNS_NONE = "returns None"
OTHER_STRUCTURE = "another structure"
OTHER_SHAPE = "another shape"
OTHER_DTYPE = "another dtype"
WRITES = "writes into its inputs"
SECOND = "another answer the second time"
REMEMBERS = "depends on what was asked before"
HANGS = "hangs"
DIES = "ends the process"
VERDICTS = (
    WRONG_NUMBERS,
    RAISES,
    RETURNS_NONE,
    OTHER_STRUCTURE,
    OTHER_SHAPE,
    OTHER_DTYPE,
    WRITES,
    SECOND,
    REMEMBERS,
    HANGS,
    DIES,
)
"""What a failure may be called."""


class Misconduct(Exception):
    """What an implementation does that no correct one does, found while it was called."""

    def __init__(self, verdict: str, finding: str) -> None:
        super().__init__(finding)
        self.verdict, self.finding = verdict, finding


class Hangs(BaseException):
    """No answer within the time limit. It ends the search for examples, which would wait as long for each."""


@dataclass
class _Call:
    operation: str
    arguments: tuple[Any, ...]
    others: dict[str, Any]
    before: list[tuple[str, npt.NDArray[Any]]]
    """What the arrays among the arguments held."""
    answer: Any
    recipe: Any


class Watched:
    """An implementation, each of whose answers is looked at; all its other attributes are its own."""

    def __init__(self, implementation: Any) -> None:
        self._implementation = implementation
        self._calls: dict[str, _Call] = {}
        self._repeats = not getattr(implementation, "slow", False)
        self.recipe: Any = None
        """The example that is being tried."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._implementation, name)
        if name not in OPERATIONS or not callable(found):
            return found

        def call(*arguments: Any, **others: Any) -> Any:
            return self._call(name, found, arguments, others)

        return call

    def _call(self, operation: str, ask: Callable[..., Any], arguments: tuple[Any, ...], others: dict[str, Any]) -> Any:
        before = [(name, np.array(leaf)) for name, leaf in _parts(operation, arguments)]
        answer = _asked(ask, arguments, others)
        if (changed := _changed(operation, arguments, before)) is not None:
            raise Misconduct(WRITES, f"it changed its argument {changed}. Work on a copy.")
        check_answer(operation, answer, others["dtype"])
        if self._repeats and operation not in self._calls and any(values.size for _, values in _answers(answer)):
            call = _Call(operation, arguments, others, before, copy.deepcopy(answer), self.recipe)
            self._calls[operation] = call
            _compare(call, _asked(ask, arguments, others), SECOND, "asked the same a second time")
        return answer

    def asked_again(self) -> Iterator[tuple[Any, Misconduct]]:
        """The first call of each operation once more, now that the implementation was asked other things; the recipes of those that
        give another answer, each with what is wrong."""
        for call in self._calls.values():
            if _changed(call.operation, call.arguments, call.before) is not None:
                continue  # by the property that made them
            try:
                again = _asked(getattr(self._implementation, call.operation), call.arguments, call.others)
                _compare(call, again, REMEMBERS, "asked the same again after other questions")
            except Misconduct as error:
                yield call.recipe, error


def _asked(ask: Callable[..., Any], arguments: tuple[Any, ...], others: dict[str, Any]) -> Any:
    try:
        return ask(*arguments, **others)
    except Misconduct:
        raise
    except Exception as error:
        raise Misconduct(RAISES, f"it raised {type(error).__name__}: {error}") from error


def _parts(operation: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays among the arguments."""
    for name, value in zip(ARGUMENTS[operation], arguments, strict=False):
        for part, leaf in leaves(name, value):
            if isinstance(leaf, np.ndarray):
                yield part, leaf


def _changed(operation: str, arguments: tuple[Any, ...], before: list[tuple[str, npt.NDArray[Any]]]) -> str | None:
    """The name of the first array that is not as it was."""
    for (name, old), (_, new) in zip(before, _parts(operation, arguments), strict=True):
        if not np.array_equal(old, new, equal_nan=old.dtype.kind == "f"):
            return name
    return None


def _compare(call: _Call, again: Any, verdict: str, when: str) -> None:
    """Both answers alike, up to what rounding in another order may change."""
    one, two = dict(_answers(call.answer)), dict(_answers(again))
    if sorted(one) != sorted(two):
        raise Misconduct(verdict, f"{when}, {call.operation} gives {sorted(two)}, and before {sorted(one)}")
    digits = math.sqrt(UNIT_ROUNDOFF[call.others["dtype"]])
    for part, old in one.items():
        new = two[part]
        alike = old.shape == new.shape and np.allclose(
            old, new, rtol=digits, atol=digits * float(np.abs(old[np.isfinite(old)]).max(initial=0.0)), equal_nan=True
        )
        if not alike:
            where = f"[{part}]" if part else ""
            raise Misconduct(verdict, f"{when}, {call.operation}{where} gives {_some(new)}, and before {_some(old)}")


def _some(values: npt.NDArray[np.float64]) -> str:
    return f"{values.ravel()[:3].tolist()}{' …' if values.size > 3 else ''}"


def _answers(answer: Any) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    for part, leaf in leaves("", answer):
        yield part.lstrip("."), np.asarray(leaf, dtype=np.float64)


def check_answer(operation: str, answer: Any, dtype: str) -> None:
    """The answer is of the structure that the operation gives, and made of real numbers that lose nothing of `dtype`.

    Raises:
        Misconduct: it is not. Shapes of arrays are compared with the expected ones' afterwards.
    """
    names = RESULTS[operation]
    wanted = (
        "a dictionary"
        if names == NAMED
        else "an array"
        if isinstance(names, str)
        else f"{len(names)}: {', '.join(names)}"
    )
    if answer is None:
        raise Misconduct(RETURNS_NONE, f"it returned None, expected {wanted}")
    if names == NAMED:
        fits = isinstance(answer, Mapping)
    elif isinstance(names, str):
        fits = not isinstance(answer, (Mapping, str))
    else:
        fits = isinstance(answer, (tuple, list)) and len(answer) == len(names)
    if not fits:
        size = f" of {len(answer)}" if isinstance(answer, (tuple, list)) else ""
        raise Misconduct(OTHER_STRUCTURE, f"it returned a {type(answer).__name__}{size}, expected {wanted}")
    for part, leaf in leaves("", answer):
        _check_numbers(part.lstrip("."), leaf, dtype)


def _check_numbers(part: str, leaf: Any, dtype: str) -> None:
    of = f" for {part}" if part else ""
    try:
        values = np.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise Misconduct(OTHER_STRUCTURE, f"it returned what is no array{of}: {error}") from error
    if values.dtype.kind not in "fiub":
        raise Misconduct(OTHER_DTYPE, f"it returned {values.dtype}{of}, expected real numbers")
    if values.dtype.kind == "f" and np.finfo(values.dtype).nmant < _DIGITS[dtype]:
        raise Misconduct(OTHER_DTYPE, f"it returned {values.dtype}{of}, expected {dtype} or wider")


_DIGITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}
"""Bits of the mantissa."""
