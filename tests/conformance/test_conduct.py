"""An implementation that misbehaves is told what it does, by a name, and takes nothing down with it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import misbehaving
from smca.conformance import conduct
from smca.conformance.apart import Apart
from smca.conformance.diagnosis import explain
from smca.conformance.implementations.registry import implementation_of
from smca.conformance.runner import PROFILES, Case, Outcome, run
from smca.conformance.suite import PROPERTIES

EQUALITY = next(prop for prop in PROPERTIES if prop.name == "generalized_box_iou.equals_the_oracle")

HERE = [
    (misbehaving.Raises, conduct.RAISES, "it raised KeyError: 'no such box'"),
    (misbehaving.ReturnsNone, conduct.RETURNS_NONE, "it returned None, expected an array"),
    (misbehaving.ReturnsADictionary, conduct.OTHER_STRUCTURE, "it returned a dict, expected an array"),
    (misbehaving.ReturnsTheTransposed, conduct.OTHER_SHAPE, "GIoU: got shape (2, 3), expected (1, 3)"),
    (misbehaving.ReturnsFloat32, conduct.OTHER_DTYPE, "it returned float32, expected float64 or wider"),
    (misbehaving.ReturnsComplex, conduct.OTHER_DTYPE, "it returned complex128, expected real numbers"),
    (misbehaving.Writes, conduct.WRITES, "it changed its argument boxes1. Work on a copy."),
    (misbehaving.AlternatesAnswers, conduct.SECOND, "two answers"),
    (misbehaving.FailsOnce, conduct.SECOND, "when tried again it does not"),
    (
        misbehaving.DriftsAway,
        conduct.REMEMBERS,
        "asked the same again after other questions, generalized_box_iou gives",
    ),
]
APART = [
    (misbehaving.KeepsByShape, conduct.REMEMBERS, "right when a newly made one is asked nothing else before"),
    (misbehaving.Hangs, conduct.HANGS, "no answer within 3 s"),
    (misbehaving.Dies, conduct.DIES, "it ended by signal 6"),
    (misbehaving.Exits, conduct.DIES, "it ended with status 3"),
]


def check_verdict(outcome: Outcome, verdict: str, finding: str) -> None:
    assert outcome.status == "failed"
    assert outcome.verdict == verdict
    assert f"    verdict: {verdict}\n" in outcome.message
    assert finding in outcome.message
    assert "BoxInputs(" in outcome.message.partition("again:")[2], "the example is there"


@pytest.mark.parametrize(("kind", "verdict", "finding"), HERE, ids=lambda value: getattr(value, "__name__", ""))
def test_misconduct_has_a_name(kind: Any, verdict: str, finding: str) -> None:
    check_verdict(run(Case(EQUALITY, kind(), "float64"), PROFILES["quick"]), verdict, finding)


def test_what_behaves_passes() -> None:
    outcome = run(Case(EQUALITY, misbehaving.Right(), "float64"), PROFILES["quick"])
    assert (outcome.status, outcome.verdict, outcome.remarks) == ("passed", "", ())


@pytest.fixture
def apart() -> Any:
    """Runs the case of a class in a process of its own."""
    made: list[Apart] = []

    def run_apart(kind: Any, time_limit: float) -> tuple[Apart, Case, Outcome]:
        implementation = implementation_of(f"misbehaving:{kind.__name__}")
        made.append(Apart(implementation, time_limit))
        case = Case(EQUALITY, implementation, "float64")
        return made[0], case, made[0].run(case, PROFILES["quick"])

    yield run_apart
    made[0].end()


@pytest.mark.parametrize(("kind", "verdict", "finding"), APART, ids=lambda value: getattr(value, "__name__", ""))
def test_what_an_implementation_does_to_its_process_stays_there(
    apart: Any, kind: Any, verdict: str, finding: str
) -> None:
    process, case, outcome = apart(kind, 3.0 if kind is misbehaving.Hangs else 60.0)
    check_verdict(outcome, verdict, finding)
    if kind is misbehaving.Dies:  # the next question finds a new process
        check_verdict(process.run(case, PROFILES["quick"]), verdict, finding)


@pytest.mark.parametrize(
    ("kind", "remark"),
    [(misbehaving.Prints, "prints: 'one more' and more, "), (misbehaving.IsSlow, "slow: an example took ")],
)
def test_what_is_only_remarked_on(apart: Any, kind: Any, remark: str) -> None:
    _, _, outcome = apart(kind, 60.0)
    assert outcome.status == "passed"
    assert outcome.remarks[0].startswith(remark)


def port(habit: str, time_limit: float = 60.0) -> Any:
    program = shlex.join([sys.executable, str(Path(__file__).with_name("misbehaving_port.py")), habit])
    return implementation_of(f"exec:{program}", time_limit)


@pytest.mark.parametrize(
    ("habit", "verdict", "finding"),
    [
        ("ends", conduct.DIES, "it ended with status 7; on stderr: out of memory"),
        ("prints", conduct.DIES, "Is something else printed to standard output?"),
        ("stops halfway", conduct.DIES, "it ended with status 0"),
        ("sends nonsense", conduct.DIES, "expected a safetensors file, got 32 bytes"),
        ("forgets the result", conduct.RAISES, "expected a tensor 'giou' in the answer, got ['iou']"),
        ("none", conduct.RAISES, "it answered with an error: no such habit: none"),
    ],
)
def test_a_program_that_misbehaves_is_told_so(habit: str, verdict: str, finding: str) -> None:
    outcome = run(Case(EQUALITY, port(habit), "float64"), PROFILES["quick"], shrink=False)
    check_verdict(outcome, verdict, finding)


def test_a_program_that_hangs_is_ended() -> None:
    outcome = run(Case(EQUALITY, port("hangs", 10.0), "float64"), PROFILES["quick"])
    check_verdict(outcome, conduct.HANGS, "no answer within 10 s")
    assert explain(outcome) == "", "it would hang again"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("./no-such-program", "asked to describe itself: .*No such file"),
        ("false", "asked to describe itself: it ended with status 1"),
        (f"{sys.executable} -c 'print(1)'", "asked to describe itself: "),
        ("", "asked to describe itself: "),
    ],
)
def test_what_is_no_port_is_refused(program: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^--implementation exec:.*{says}"):
        implementation_of(f"exec:{program}", 60.0)


def test_a_port_that_offers_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected its description to list operations of .* got operations \[\]"):
        port("says nothing")
