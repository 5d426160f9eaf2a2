"""Expected failures: what a port is known to do otherwise, in a file, so that its continuous integration stays green and says
when it changes.

A line names properties, and may name one dtype and an implementation; "*" stands for anything, "#" begins the reason, or a comment:

    set_loss_vjp.finite_at_the_corners            # 0/0 of two boxes without area
    match_cost.*[float32]
    transformers-*: set_loss.equals_the_oracle    # another class term

They are tried all the same. One that fails does not fail the run; one that passes is said.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smca.conformance.protocol import DTYPES, name_of
from smca.conformance.runner import Case, Outcome

FAILED_AS_EXPECTED = "failed as expected"
PASSED_UNEXPECTEDLY = "passed unexpectedly"
_LINE = re.compile(r"((?P<of>[^\s:]+):\s+)?(?P<name>[\w.*?]+)(\[(?P<dtype>\w+)\])?")


@dataclass(frozen=True)
class Expected:
    """A line of the file."""

    name: str
    """Of properties, with wildcards."""
    dtype: str | None
    """None: any."""
    place: str
    """File and line, for messages."""
    reason: str = ""
    of: str | None = None
    """The implementation, with wildcards; None: any."""

    def covers(self, case: Case) -> bool:
        """Whether the case is one that the line names."""
        of = self.of is None or fnmatch.fnmatchcase(name_of(case.implementation), self.of)
        return of and self.dtype in (None, case.dtype) and fnmatch.fnmatchcase(case.prop.name, self.name)


def read_xfails(path: Path, names: Iterable[str]) -> list[Expected]:
    """The lines of a file of expected failures.

    Args:
        path: of the file.
        names: of all properties.

    Raises:
        ValueError: a line that cannot be read, names no property or an unknown dtype.
        OSError: no such file.
    """
    names, lines = list(names), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, _, reason = (part.strip() for part in line.partition("#"))
        if not text:
            continue
        place, match = f"{path}:{number}", _LINE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{place}: expected a property and perhaps [dtype], such as assign.*[float32], got {text!r}"
            )
        expected = Expected(match["name"], match["dtype"], place, reason, match["of"])
        if expected.dtype not in (None, *DTYPES):
            raise ValueError(f"{place}: expected a dtype of {', '.join(DTYPES)}, got {expected.dtype!r}")
        if not any(fnmatch.fnmatchcase(name, expected.name) for name in names):
            raise ValueError(
                f"{place}: no property is called {expected.name!r}. `smca conformance --list` has the names."
            )
        lines.append(expected)
    return lines


def judged(outcome: Outcome, expected: Sequence[Expected]) -> Outcome:
    """The outcome, a failure that is expected and an unexpected pass called so."""
    lines = [line for line in expected if line.covers(outcome.case)]
    if not lines or outcome.status not in ("passed", "failed"):
        return outcome
    status = FAILED_AS_EXPECTED if outcome.status == "failed" else PASSED_UNEXPECTEDLY
    reason = f": {lines[0].reason}" if lines[0].reason else ""
    return dataclasses.replace(
        outcome, status=status, remarks=(*outcome.remarks, f"expected to fail ({lines[0].place}){reason}")
    )
