"""Every property of every implementation, and proof that the suite would find each of the planted bugs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from smca.conformance import replay as replay_module
from smca.conformance.diagnosis import explain
from smca.conformance.implementations.ours import IMPLEMENTATIONS
from smca.conformance.mutants.plant import MUTANTS, kill, planted
from smca.conformance.protocol import Unavailable, name_of
from smca.conformance.replay import implementation_of, replay
from smca.conformance.runner import PROFILES, Case, cases, run
from smca.conformance.suite import PROPERTIES
from smca.reference.gaussian import key_minus_center


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    parameters: list[Any] = []
    profile = PROFILES[metafunc.config.getoption("--profile")]
    for name in metafunc.config.getoption("--implementation") or list(IMPLEMENTATIONS):
        try:
            made = implementation_of(name)
        except Unavailable as reason:
            skip = pytest.mark.skip(reason=f"{name}: {reason}")
            parameters.append(pytest.param(None, marks=skip, id=name))
            continue
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        for case in cases(PROPERTIES, [made], profile):
            outside = ":" in name
            if case.missing is None or outside:  # for ours it is known what each implements
                parameters.append(pytest.param(case, id=f"{name_of(made)}-{case.dtype}-{case.prop.name}"))
    metafunc.parametrize("case", parameters)


def test_property(case: Case, request: pytest.FixtureRequest) -> None:
    outcome = run(case, PROFILES[request.config.getoption("--profile")])
    if outcome.status == "not implemented":
        pytest.skip(f"{name_of(case.implementation)} does not implement {case.missing}")
    assert outcome.status == "passed", f"{outcome.message}\n{explain(outcome)}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a bug may divide by 0 on its way to being found
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_every_mutant_dies(mutant: Any, request: pytest.FixtureRequest) -> None:
    try:
        result = kill(mutant, PROPERTIES, PROFILES[request.config.getoption("--profile")])
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert result.killer, f"no property noticed: {mutant.bug} (in {mutant.package}/{mutant.module}.py)"
    assert mutant.bug not in result.message, "a mutant must be caught by what it computes, not by failing to load"


def test_the_oracle_is_not_compared_with_itself() -> None:
    compared = {
        name: {
            case.prop.operation
            for case in cases(PROPERTIES, [implementation_of(name)], PROFILES["ci"])
            if case.prop.oracle
        }
        for name in ("oracle", "eager")
    }
    assert compared["oracle"] == {"assign"}, "whose totals are compared with SciPy's"
    assert {"smca_attention", "smca_attention_vjp", "forward"} <= compared["eager"]


def test_names_are_unique_and_mutants_enough() -> None:
    for name, count in Counter(prop.name for prop in PROPERTIES).items():
        assert count == 1, f"two properties are called {name}"
    assert len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS) == 371  # as README.md and docs say


def test_a_failure_prints_what_replays_it() -> None:
    """The message of a failure ends in Python that fails in the same way."""

    class Halved:
        name = "halved"

        def generalized_box_iou(self, boxes1: Any, boxes2: Any, *, dtype: str) -> Any:
            return implementation_of("oracle").generalized_box_iou(boxes1, boxes2, dtype=dtype) / 2

    prop = next(prop for prop in PROPERTIES if prop.name == "generalized_box_iou.equals_the_oracle")
    outcome = run(Case(prop, Halved(), "float64"), PROFILES["quick"])
    assert outcome.status == "failed"
    for part in ("GIoU[0, 0] = ", "expected", "bound", "boxes1 (1, 4)", "arXiv 1902.09630", "halved, float64"):
        assert part in outcome.message
    snippet = outcome.message.split("again:\n")[1].replace("        ", "").replace("'halved'", "made")
    with pytest.raises(AssertionError, match="GIoU"):
        exec(snippet, {"made": Halved()})
    with pytest.raises(ValueError, match="no implementation 'egger'"):
        replay(prop.name, "egger", "float64", None)


def test_what_replays_has_every_kind_of_example() -> None:
    """The snippet of a failure imports from one module."""
    kinds = {type(recipe).__name__ for prop in PROPERTIES for recipe in prop.always}
    assert {"ModelInputs", "AnchoredInputs", "OddsInputs", "SoftmaxLossInputs"} <= kinds <= set(replay_module.__all__)


class PassesOver:
    """Leaves out keys whose weights are so small that together they stay below `margin` of the sum."""

    name, dtypes = "passes over", ("float64",)

    def __init__(self, margin: float, skips_below: float) -> None:
        self.margin, self.skips_below = margin, skips_below

    def smca_attention(
        self, q: Any, k: Any, v: Any, center_xy: Any, precision_xy: Any, size: Any, mask: Any, *, dtype: str
    ) -> Any:
        padded = np.zeros((len(q), 1, 1, k.shape[2]), dtype=bool) if mask is None else mask[:, None, None]
        k, v = (np.where(padded[:, :, 0, :, None], 0.0, x) for x in (k, v))
        log_g = -0.5 * np.einsum("bhna,bhnla->bhnl", precision_xy, key_minus_center(center_xy, size) ** 2)
        logits = np.where(padded, -np.inf, q @ np.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5 + log_g)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights = np.where(weights < self.margin / k.shape[2], 0.0, weights)
        return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(
    ("margin", "says", "status"),
    [(2.0**-40, 2.0**-40, "passed"), (2.0**-40, 0.0, "failed"), (2.0**-30, 2.0**-40, "failed")],
)
def test_what_passes_over_keys_is_held_to_what_it_says(margin: float, says: float, status: str) -> None:
    prop = next(prop for prop in PROPERTIES if prop.name == "smca_attention.distant_keys_count")
    assert run(Case(prop, PassesOver(margin, says), "float64"), PROFILES["quick"]).status == status


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


@pytest.mark.parametrize("mutant", MUTANTS[::17], ids=lambda mutant: mutant.bug)
def test_a_known_bug_is_called_by_its_name(mutant: Any) -> None:
    """An implementation that fails in the same way as a mutant is reported with that mutant's name."""
    if mutant.package != "reference":
        pytest.skip("diagnoses are of the specification's bugs")
    with planted(mutant) as (implementation,):
        for case in cases([prop for prop in PROPERTIES if prop.oracle], [implementation], PROFILES["quick"]):
            outcome = run(case, PROFILES["quick"])
            if outcome.status == "failed":
                assert mutant.bug in explain(outcome)
                return
    pytest.fail("no comparison with the oracle failed")
