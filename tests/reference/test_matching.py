"""smca.reference.matching: the cost by hand and in torch, the assignment against SciPy and every permutation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from smca.reference.matching import focal_terms, linear_sum_assignment, match_cost

WEIGHTS = {"class": 2.0, "l1": 5.0, "giou": 2.0}


def random_cost(rng: np.random.Generator, kind: str) -> Any:
    n, m = rng.integers(1, 13, size=2)
    if kind == "ties":
        return rng.integers(0, 4, size=(n, m)).astype(float)
    if kind == "integers":
        return rng.integers(-50, 50, size=(n, m)).astype(float)
    cost = rng.normal(size=(n, m)) * 10.0 ** rng.integers(-3, 4)
    return np.where(rng.random((n, m)) < 0.4, np.inf, cost) if kind == "forbidden" else cost


@pytest.mark.parametrize("kind", ["floats", "integers", "ties", "forbidden"])
def test_assignment_equals_scipys(kind: str) -> None:
    rng = np.random.default_rng(0)
    feasible = 0
    for _ in range(150):
        cost = random_cost(rng, kind)
        try:
            want_rows, want_cols = scipy.optimize.linear_sum_assignment(cost)
        except ValueError:
            with pytest.raises(ValueError, match="too many pairs are \\+inf"):
                linear_sum_assignment(cost)
            continue
        feasible += 1
        rows, cols = linear_sum_assignment(cost)
        assert len(rows) == len(cols) == min(cost.shape)
        assert (np.diff(rows) > 0).all()
        assert len(set(cols.tolist())) == len(cols)
        assert cost[rows, cols].sum() == pytest.approx(cost[want_rows, want_cols].sum(), rel=1e-12, abs=1e-12)
        if kind == "floats":  # no ties, so the assignment itself is unique
            assert rows.tolist() == want_rows.tolist()
            assert cols.tolist() == want_cols.tolist()
    assert feasible > 30


def test_assignment_equals_every_permutation() -> None:
    rng = np.random.default_rng(1)
    for n, m in [(1, 1), (2, 2), (3, 5), (4, 4), (5, 3)]:
        cost = rng.normal(size=(n, m))
        few, many, table = (n, m, cost) if n <= m else (m, n, cost.T)
        least = min(sum(table[i, p[i]] for i in range(few)) for p in itertools.permutations(range(many), few))
        rows, cols = linear_sum_assignment(cost)
        assert cost[rows, cols].sum() == pytest.approx(least, rel=1e-13)


def test_assignment_at_the_size_of_a_detector() -> None:
    cost = np.random.default_rng(2).normal(size=(300, 40))
    rows, cols = linear_sum_assignment(cost)
    want_rows, want_cols = scipy.optimize.linear_sum_assignment(cost)
    assert rows.tolist() == want_rows.tolist()
    assert cols.tolist() == want_cols.tolist()


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_assign(shape: tuple[int, int]) -> None:
    rows, cols = linear_sum_assignment(np.zeros(shape))
    assert rows.shape == cols.shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_costs_that_are_no_costs_raise(bad: float, shape: tuple[int, int]) -> None:
    cost = np.zeros(shape)
    cost[1, 0] = bad
    with pytest.raises(ValueError, match=r"cost\[1, 0\]: expected a number or \+inf"):
        linear_sum_assignment(cost)


def test_other_bad_costs_raise() -> None:
    with pytest.raises(ValueError, match=r"cost: expected shape \(any, any\), got \(3,\)"):
        linear_sum_assignment([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="too many pairs"):
        linear_sum_assignment([[np.inf, 1.0], [np.inf, 2.0]])


def test_focal_terms_by_hand_and_far_out() -> None:
    positive, negative = focal_terms(np.array([np.log(3.0), -1000.0, 1000.0]))
    # p = ¾: ¼·(¼)²·ln(4/3) and ¾·(¾)²·ln 4; far out, the one is 0 and the other linear in the logit
    np.testing.assert_allclose(positive, [0.015625 * np.log(4 / 3), 250.0, 0.0], rtol=1e-13)
    np.testing.assert_allclose(negative, [0.421875 * np.log(4.0), 0.0, 750.0], rtol=1e-13)


def test_cost_equals_method_in_torch() -> None:
    rng = np.random.default_rng(3)
    logits, labels = rng.normal(size=(6, 4)) * 3, rng.integers(0, 4, size=5)
    boxes, targets = rng.uniform(0.2, 0.6, size=(6, 4)), rng.uniform(0.2, 0.6, size=(5, 4))
    p = torch.from_numpy(logits).sigmoid()
    got = match_cost(logits, boxes, labels, targets, WEIGHTS)
    assert got.shape == (6, 5)
    for n, t in np.ndindex(6, 5):
        prob = p[n, labels[t]]
        focal = 0.25 * (1 - prob) ** 2 * -prob.log() - 0.75 * prob**2 * -(1 - prob).log()
        l1 = sum(abs(boxes[n] - targets[t]))
        (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[n], targets[t]
        inter = max(0.0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
        inter *= max(0.0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
        union = aw * ah + bw * bh - inter
        hull = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
        hull *= max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
        giou = inter / union - (hull - union) / hull
        assert got[n, t] == pytest.approx(2 * float(focal) + 5 * l1 - 2 * giou, rel=1e-12)


def test_cost_without_targets() -> None:
    cost = match_cost(np.zeros((3, 2)), np.full((3, 4), 0.5), np.zeros(0, dtype=int), np.zeros((0, 4)), WEIGHTS)
    assert cost.shape == (3, 0)


def test_bad_costs_input_is_named() -> None:
    logits, boxes = np.zeros((3, 2)), np.full((3, 4), 0.5)
    one = np.array([[0.5, 0.5, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"labels: expected each in \[0, 2\).* got 2\."):
        match_cost(logits, boxes, np.array([2]), one, WEIGHTS)
    with pytest.raises(ValueError, match=r"labels: expected each in \[0, 2\).* got -1\."):
        match_cost(logits, boxes, np.array([-1]), one, WEIGHTS)
    with pytest.raises(ValueError, match=r"boxes_cxcywh: expected shape \(3, 4\), got \(2, 4\)"):
        match_cost(logits, boxes[:2], np.array([0]), one, WEIGHTS)
    with pytest.raises(ValueError, match=r"target_boxes_cxcywh: expected shape \(2, 4\)"):
        match_cost(logits, boxes, np.array([0, 1]), one, WEIGHTS)
    with pytest.raises(ValueError, match="weights: expected the terms"):
        match_cost(logits, boxes, np.array([0]), one, {"class": 2.0, "bbox": 5.0, "giou": 2.0})
    with pytest.raises(ValueError, match=r"weights\['l1'\]: expected a finite number ≥ 0, got nan"):
        match_cost(logits, boxes, np.array([0]), one, {**WEIGHTS, "l1": float("nan")})
