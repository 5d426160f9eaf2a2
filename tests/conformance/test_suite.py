"""Every property of every implementation."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import numpy as np
import pytest

import independent
from smca.conformance import replay as replay_module
from smca.conformance.diagnosis import explain
from smca.conformance.implementations.registry import IMPLEMENTATIONS, implementation_of
from smca.conformance.protocol import Unavailable, name_of
from smca.conformance.replay import replay
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


def test_the_oracle_is_not_compared_with_itself() -> None:
    compared = {
        name: {
            case.prop.operation
            for case in cases(PROPERTIES, [implementation_of(name)], PROFILES["ci"])
            if case.prop.oracle
        }
        for name in ("oracle", "eager")
    }
    assert compared["oracle"] == set()
    assert {"smca_attention", "smca_attention_vjp", "forward"} <= compared["eager"]


def test_names_are_unique() -> None:
    for name, count in Counter(prop.name for prop in PROPERTIES).items():
        assert count == 1, f"two properties are called {name}"


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


HAS_JAX = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed: pip install jax")


@pytest.mark.parametrize(
    "kind",
    [independent.Einsum, independent.Loops, pytest.param(independent.Jax, marks=HAS_JAX)],
    ids=lambda kind: kind.__name__,
)
def test_other_right_implementations_raise_no_alarm(kind: Any) -> None:
    """In every dtype that they have, and in all that is asked of their operations."""
    outcomes = [run(case, PROFILES["quick"], examples=5) for case in cases(PROPERTIES, [kind()], PROFILES["quick"])]
    tried = [outcome for outcome in outcomes if outcome.status != "not implemented"]
    assert [outcome.message for outcome in tried if outcome.status == "failed"] == []
    assert len(tried) > 8


class SkipsBlocks:
    """Passes over blocks of 16 keys whose largest possible weight is too small: |q|·|k|/√d less log G of the block's nearest cell.

    Args:
        margin: what the skipped weights may add up to.
        shift: cells that are added to the distance of a block; 0 is right.
    """

    name, dtypes = "skips blocks", ("float64",)

    def __init__(self, margin: float, shift: float) -> None:
        self.skips_below, self.shift = margin, shift

    def smca_attention(
        self, q: Any, k: Any, v: Any, center_xy: Any, precision_xy: Any, size: Any, key_padding_mask: Any, *, dtype: str
    ) -> Any:
        keys, root_d, out = k.shape[2], q.shape[-1] ** 0.5, np.zeros(q.shape)
        cells = key_minus_center(np.zeros(2), size)  # [L, 2]: positions
        for b, h, n in np.ndindex(q.shape[:3]):
            real = np.ones(keys, dtype=bool) if key_padding_mask is None else ~key_padding_mask[b]
            offset = cells - center_xy[b, h, n]
            logits = np.where(real, np.nan_to_num(k[b, h]) @ q[b, h, n] / root_d, -np.inf)
            logits = logits - (precision_xy[b, h, n] * offset**2).sum(-1) / 2
            largest = logits.max()
            for start in range(0, keys, 16):
                block = slice(start, start + 16)
                low, high = offset[block].min(0), offset[block].max(0)
                away = np.maximum(np.maximum(low, -high), 0.0)
                away = np.where(away > 0, away + self.shift, away)
                lengths = np.linalg.norm(np.nan_to_num(k[b, h, block]), axis=-1)
                most = np.linalg.norm(q[b, h, n]) * lengths.max() / root_d - (precision_xy[b, h, n] * away**2).sum() / 2
                if most < largest + np.log(self.skips_below / keys):
                    logits[block] = -np.inf
            weights = np.exp(logits - largest)
            out[b, h, n] = weights / (weights.sum() or 1.0) @ np.where(real[:, None], v[b, h], 0.0)
        return out


@pytest.mark.parametrize(("shift", "status"), [(0.0, "passed"), (0.5, "failed"), (-0.5, "passed")])
def test_a_bound_on_what_is_skipped_that_is_off_by_half_a_cell_is_found(shift: float, status: str) -> None:
    """A kernel that takes cells' corners for their centres skips keys that count; a bound that is too careful skips none."""
    names = ("smca_attention.distant_keys_count", "smca_attention.equals_the_oracle")
    found = {
        run(Case(prop, SkipsBlocks(2.0**-16, shift), "float64"), PROFILES["quick"], shrink=False).status
        for prop in PROPERTIES
        if prop.name in names
    }
    assert (found == {"passed"}) == (status == "passed")
