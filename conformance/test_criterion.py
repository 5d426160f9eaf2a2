"""Matching and set loss of the production package against the oracle (docs/method.md §5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from smca.conformance.strategies import CriterionInputs, criterion_inputs
from smca.conformance.tolerances import assert_close
from smca.datasets import Targets
from smca.gpu import matcher
from smca.gpu.config import LossConfig
from smca.gpu.criterion import SetCriterion
from smca.gpu.finite import NonFiniteError
from smca.reference import losses, matching

WEIGHTS = LossConfig().weights


def targets_of(x: CriterionInputs, dtype: torch.dtype) -> Targets:
    return Targets(torch.tensor(x.labels), torch.tensor(x.target_boxes, dtype=dtype), torch.tensor(x.valid))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=80, deadline=None)
@given(x=criterion_inputs())
def test_cost_and_total_of_the_assignment(x: CriterionInputs, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    logits, boxes = torch.tensor(x.logits, dtype=torch_dtype), torch.tensor(x.boxes, dtype=torch_dtype)
    cost = matcher.match_cost(logits, boxes, targets_of(x, torch_dtype), WEIGHTS).numpy()
    query = matcher.match(logits, boxes, targets_of(x, torch_dtype), WEIGHTS).numpy()
    for m, b in np.ndindex(*x.logits.shape[:2]):
        valid = np.flatnonzero(x.valid[b])
        expected = matching.match_cost(
            x.logits[m, b], x.boxes[m, b], x.labels[b, valid], x.target_boxes[b, valid], WEIGHTS
        )
        assert_close(cost[m, b][:, valid], expected, "criterion", dtype, "matching cost as the oracle's")
        assert (query[m, b][~x.valid[b]] == -1).all(), "padded targets have no query"
        got = query[m, b, valid]
        chosen = got[got >= 0]
        assert len(set(chosen)) == len(chosen) == min(len(valid), x.logits.shape[2]), (
            "one query for each target that fits"
        )
        rows, cols = matching.linear_sum_assignment(expected)
        total = sum(expected[q, t] for t, q in enumerate(got) if q >= 0)  # ties may differ, their cost may not
        assert_close(np.array(total), expected[rows, cols].sum(), "criterion", dtype, "total cost of the assignment")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=80, deadline=None)
@given(x=criterion_inputs())
def test_every_term_of_the_loss(x: CriterionInputs, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    outputs = {"logits": torch.tensor(x.logits, dtype=torch_dtype), "boxes": torch.tensor(x.boxes, dtype=torch_dtype)}
    got = SetCriterion(LossConfig())(outputs, targets_of(x, torch_dtype))
    expected = losses.set_loss(
        {"logits": x.logits, "boxes": x.boxes},
        losses.Targets(x.labels, x.target_boxes, x.valid),
        WEIGHTS,
    )
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name].numpy(), expected[name], "criterion", dtype, f"loss term {name}")


def test_gradients_are_finite_at_the_corners() -> None:
    """Saturated logits, boxes without area, no object at all: a gradient that is NaN once spoils the whole run."""
    logits = torch.tensor([[[[200.0, -200.0], [-200.0, 200.0]]]], requires_grad=True)
    boxes = torch.tensor([[[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]]]], requires_grad=True)
    for valid in ([[True]], [[False]]):
        targets = Targets(torch.tensor([[0]]), torch.tensor([[[0.5, 0.5, 0.0, 0.0]]]), torch.tensor(valid))
        loss = SetCriterion(LossConfig())({"logits": logits, "boxes": boxes}, targets)["loss"]
        assert torch.isfinite(loss)
        for gradient in torch.autograd.grad(loss, [logits, boxes]):
            assert torch.isfinite(gradient).all()


def test_non_finite_costs_are_reported_not_repaired() -> None:
    logits, boxes = torch.zeros(2, 1, 3, 2), torch.full((2, 1, 3, 4), 0.5)
    logits[1, 0, 2, 1] = torch.nan
    targets = Targets(torch.tensor([[1]]), torch.full((1, 1, 4), 0.5), torch.tensor([[True]]))
    with pytest.raises(NonFiniteError, match=r"decoder layer 1, image 0 .* query 2 and target 0"):
        matcher.match(logits, boxes, targets, WEIGHTS)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong α in the cost, planted; the comparison above must see it."""
    monkeypatch.setattr(matcher, "FOCAL_ALPHA", 0.75)
    x = CriterionInputs(
        logits=np.array([[[[0.3], [1.0]]]]),
        boxes=np.full((1, 1, 2, 4), 0.5),
        labels=np.array([[0]]),
        target_boxes=np.full((1, 1, 4), 0.5),
        valid=np.array([[True]]),
    )
    with pytest.raises(AssertionError, match="matching cost"):
        test_cost_and_total_of_the_assignment.hypothesis.inner_test(x, "float64")
