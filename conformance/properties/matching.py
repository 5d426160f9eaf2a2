"""What must be true of generalized_box_iou, match_cost and assign (docs/method.md §5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.matching import (
    CLOSE_COSTS,
    WITH_CLASS,
    BoxInputs,
    CostInputs,
    LossInputs,
    box_inputs,
    cost_inputs,
    loss_inputs,
)
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.tolerances import HALVES, UNIT_ROUNDOFF, at_least_float32, giou_bound, round_to
from smca.reference import boxes as oracle_boxes
from smca.reference import matching as oracle

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

GIOU = "reference/boxes.py: GIoU = |A∩B|/|A∪B| − (|hull| − |A∪B|)/|hull| (arXiv 1902.09630)"
COST = (
    "method.md §5: λ_cls·(α(1−p)^γ·(−log p) − (1−α)p^γ·(−log(1−p))) + λ_L1·‖b_n − b_t‖₁ + λ_GIoU·(−GIoU), "
    "p = sigmoid of the logit of t's class, α = ¼, γ = 2, weights 2, 5, 2"
)
ASSIGNED = "method.md §5: the assignment minimises the sum of the costs; each ground truth gets one query"


def giou(impl: Any, one: Array, two: Array, dtype: str) -> Array:
    return np.asarray(impl.generalized_box_iou(one, two, dtype=dtype), dtype=np.float64)


@property_of("generalized_box_iou.equals_the_oracle", "equals the oracle", GIOU, box_inputs(), into=PROPERTIES)
def giou_equals_the_oracle(impl: Any, recipe: BoxInputs, dtype: str, judge: Judge) -> None:
    one, two = recipe.arrays(dtype)
    expected = oracle_boxes.generalized_box_iou(one[:, None], two)
    judge.close(giou(impl, one, two, dtype), expected, giou_bound(one, two, dtype), "GIoU")


@property_of(
    "generalized_box_iou.symmetric_and_bounded",
    "lies in [−1, 1], is the same with the two sets swapped, and 1 for equal boxes",
    GIOU,
    box_inputs(),
    into=PROPERTIES,
)
def symmetric_and_bounded(impl: Any, recipe: BoxInputs, dtype: str, judge: Judge) -> None:
    one, two = recipe.arrays(dtype)
    values, bound = giou(impl, one, two, dtype), giou_bound(one, two, dtype)
    judge.all_finite(values, "GIoU")
    judge.close(values, np.clip(values, -1, 1), bound, "GIoU against the nearest value in [−1, 1],")
    judge.close(giou(impl, two, one, dtype).T, values, 2 * bound, "GIoU(b, a)")
    areas = (one[:, 2:] - one[:, :2]).prod(-1)
    itself = np.diagonal(giou(impl, one, one, dtype))
    judge.close(
        itself[areas > 0], np.ones((areas > 0).sum()), np.diagonal(giou_bound(one, one, dtype))[areas > 0], "GIoU(a, a)"
    )


@property_of(
    "generalized_box_iou.scale_and_shift",
    "does not change when all boxes are scaled (axis by axis) and shifted",
    GIOU,
    box_inputs(),
    into=PROPERTIES,
)
def scale_and_shift(impl: Any, recipe: BoxInputs, dtype: str, judge: Judge) -> None:
    one, two = recipe.arrays(dtype)
    scale, shift = np.array([4.0, 0.5, 4.0, 0.5]), np.array([3.0, -2.0, 3.0, -2.0])
    moved = one * scale + shift, two * scale + shift
    # Rounding moves the moved corners once more: the bound for corners of their size covers it.
    bound = giou_bound(one, two, dtype) + 2 * giou_bound(*moved, dtype)
    judge.close(giou(impl, *moved, dtype), giou(impl, one, two, dtype), bound, "GIoU of the moved boxes")


@property_of(
    "generalized_box_iou.iou_where_the_hull_is_the_union",
    "equals intersection over union where the boxes share two sides and overlap, and the hull is the union",
    GIOU,
    box_inputs(kind=st.sampled_from(["random", "large"])),
    into=PROPERTIES,
)
def iou_where_the_hull_is_the_union(impl: Any, recipe: BoxInputs, dtype: str, judge: Judge) -> None:
    one, _ = recipe.arrays(dtype)
    low, high = one[:1, :2], one[:1, 2:]
    rng = np.random.default_rng(recipe.seed)
    cut, axis = np.sort(rng.uniform(0.1, 0.9, 2)), int(rng.integers(2))
    left, right = one[:1].copy(), one[:1].copy()
    left[:, 2 + axis] = (low + (high - low) * cut[1])[:, axis]
    right[:, axis] = (low + (high - low) * cut[0])[:, axis]
    bound = giou_bound(left, right, dtype)
    # Expected from the boxes as rounded to this dtype, along the axis that differs.
    left, right = left.astype(np.float32 if dtype != "float64" else np.float64), right.astype(left.dtype)
    left, right = left.astype(np.float64), right.astype(np.float64)
    if dtype in HALVES:
        bound = bound + 2 * giou_bound(left, right, dtype)
    expected = (left[:, 2 + axis] - right[:, axis]) / (right[:, 2 + axis] - left[:, axis])
    judge.close(giou(impl, left, right, dtype), expected[:, None], bound, "GIoU")


Weights = dict[str, float]
Pairs = tuple[Array, Array, npt.NDArray[np.int64], Array, Weights]
"""Logits and boxes of one image's queries, labels and boxes of its objects, and the weights of the terms."""


def cost_bound(
    logits: Array, boxes: Array, labels: npt.NDArray[Any], truth: Array, weights: Weights, dtype: str
) -> Array:
    """u · (the size of each term): of the class term 1 + |logit|, of the L1 term all coordinates, of GIoU its own bound."""
    u = UNIT_ROUNDOFF[dtype]
    xyxy = [np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], -1) for b in (boxes, truth)]
    l1 = np.abs(boxes).sum(-1)[:, None] + np.abs(truth).sum(-1)[None]
    focal = 1 + np.abs(logits[:, labels])
    bound: Array = (
        weights["class"] * u * focal + weights["l1"] * u * l1 + weights["giou"] * giou_bound(xyxy[0], xyxy[1], dtype)
    )
    return bound


def one_image(recipe: LossInputs, dtype: str) -> Pairs:
    x = recipe.arrays(dtype)
    return x.logits[0, 0], x.boxes[0, 0], x.targets.labels[0], x.targets.boxes[0], x.weights


def cost(impl: Any, x: Pairs, dtype: str) -> Array:
    return np.asarray(impl.match_cost(*x, dtype=dtype), dtype=np.float64)


def parts_of_cost(x: Pairs, at: tuple[int, ...]) -> str:
    """The terms of which the oracle's cost of a pair is the sum."""
    logits, boxes, labels, truth, weights = x
    query, target = at
    parts = [
        oracle.match_cost(logits, boxes, labels, truth, {t: weights[t] * (t == wanted) for t in weights})[query, target]
        for wanted in weights
    ]
    apart = (weights["l1"] * np.abs(boxes[query] - truth[target])).round(6).tolist()
    return (
        f"expected = class {parts[0]:.6g} + L1 {parts[1]:.6g} + GIoU {parts[2]:.6g}; L1 by coordinate (cx, cy, w, h) {apart}; "
        f"logit {logits[query, labels[target]]:.6g}"
    )


ONE_IMAGE = loss_inputs(layers=1, batch=1, filled=1.0)
USUAL_IMAGES = [
    LossInputs(queries=5, classes=3, targets=4, weighting=(1.0, 0.25, 5.0), seed=4),
    LossInputs(queries=3, classes=100, targets=2, weighting=(5.0, 0.0, 2.0), seed=6),
]
"""Always tried: weights that differ; the last of many classes."""


@property_of("match_cost.equals_the_oracle", "equals the oracle", COST, ONE_IMAGE, into=PROPERTIES, always=USUAL_IMAGES)
def cost_equals_the_oracle(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = one_image(recipe, dtype)
    judge.note = lambda at: parts_of_cost(x, at)
    judge.close(cost(impl, x, dtype), oracle.match_cost(*x), cost_bound(*x, dtype), "cost")


@property_of(
    "match_cost.pair_by_pair",
    "the cost of a pair depends on that pair alone: queries, targets and classes reordered reorder it",
    COST,
    ONE_IMAGE,
    into=PROPERTIES,
)
def pair_by_pair(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    logits, boxes, labels, truth, weights = x = one_image(recipe, dtype)
    rng = np.random.default_rng(recipe.seed)
    query, target, column = (rng.permutation(n) for n in (len(boxes), len(truth), logits.shape[1]))
    other = logits[query][:, column], boxes[query], np.argsort(column)[labels[target]], truth[target], weights
    expected = cost(impl, x, dtype)[query][:, target]
    bound = 2 * cost_bound(*x, dtype)[query][:, target]
    judge.close(cost(impl, other, dtype), expected, bound, "cost of the reordered pairs")


@property_of(
    "match_cost.falls_with_the_logit",
    "the cost of a pair falls as the logit of its target's class rises, and no other class's logit affects it",
    COST,
    loss_inputs(layers=1, batch=1, filled=1.0, logit=1.0, targets=st.integers(1, 9), weighting=WITH_CLASS),
    into=PROPERTIES,
)
def falls_with_the_logit(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    logits, boxes, labels, truth, weights = x = one_image(recipe, dtype)
    before = cost(impl, x, dtype)
    raised = logits.copy()
    raised[:, labels[0]] += 1
    after = cost(impl, (raised, boxes, labels, truth, weights), dtype)
    judge.holds(bool((after[:, labels == labels[0]] < before[:, labels == labels[0]]).all()), "a cost did not fall")
    judge.holds(bool((after == before)[:, labels != labels[0]].all()), "a cost of another class changed")


def assignment(impl: Any, matrix: Array, dtype: str, judge: Judge) -> tuple[Array, float]:
    """Column of each row (−1 = none), checked to be an assignment, and its total cost."""
    rows, cols = (np.asarray(x).astype(np.int64) for x in impl.assign(matrix, dtype=dtype))
    count = min(matrix.shape)
    judge.holds(
        rows.shape == cols.shape == (count,), f"got {rows.shape} rows and {cols.shape} columns, expected {count} each"
    )
    judge.holds(len(set(rows.tolist())) == count, f"a row is taken twice: {rows.tolist()}")
    judge.holds(len(set(cols.tolist())) == count, f"a column is taken twice: {cols.tolist()}")
    inside = ((rows >= 0) & (rows < matrix.shape[0]) & (cols >= 0) & (cols < matrix.shape[1])).all()
    judge.holds(bool(inside), f"an index is out of range: rows {rows.tolist()}, columns {cols.tolist()}")
    column = np.full(matrix.shape[0], -1)
    column[rows] = cols
    return column, float(matrix[rows, cols].sum())


def total_bound(matrix: Array, dtype: str) -> float:
    """Dual variables are sums of costs along a path: as many roundings as there are rows, of numbers of that size."""
    return float(
        UNIT_ROUNDOFF[at_least_float32(dtype)]
        * (min(matrix.shape) + 1) ** 2
        * np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0)
    )


@property_of(
    "assign.equals_the_oracle",
    "the total cost is the optimum; ties may be assigned differently",
    ASSIGNED,
    cost_inputs(),
    into=PROPERTIES,
    examples_factor=4,
    always=CLOSE_COSTS,
)
def assignment_is_optimal(impl: Any, recipe: CostInputs, dtype: str, judge: Judge) -> None:
    matrix = recipe.array(dtype)
    _, total = assignment(impl, matrix, dtype, judge)
    best = float(matrix[oracle.linear_sum_assignment(matrix)].sum())
    judge.close(total, best, total_bound(matrix, dtype), "total cost")


@property_of(
    "match_cost.weights",
    "the cost is the sum of its terms, each times its own weight; a term whose weight is 0 adds nothing",
    COST,
    ONE_IMAGE,
    into=PROPERTIES,
    always=USUAL_IMAGES,
)
def weights_of_the_cost(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = one_image(recipe, dtype)
    weights = x[-1]
    apart = {term: cost(impl, (*x[:-1], {t: float(t == term) for t in weights}), dtype) for term in weights}
    expected = sum(weights[term] * value for term, value in apart.items())
    judge.close(cost(impl, x, dtype), expected, 2 * cost_bound(*x, dtype), "cost by its terms")


@property_of(
    "assign.forbidden_pairs",
    "pairs that cost +inf are left alone where an assignment without them is possible, and the total is the optimum",
    ASSIGNED + "; reference/matching.py: a cost of +inf forbids a pair",
    cost_inputs(kind=st.just("forbidden")),
    into=PROPERTIES,
    examples_factor=2,
    always=[CostInputs(5, 5, "forbidden", 1), CostInputs(3, 7, "forbidden", 2), CostInputs(8, 4, "forbidden", 3)],
)
def forbidden_pairs(impl: Any, recipe: CostInputs, dtype: str, judge: Judge) -> None:
    matrix = recipe.array(dtype)
    _, total = assignment(impl, matrix, dtype, judge)
    judge.holds(bool(np.isfinite(total)), "a forbidden pair is assigned")
    best = float(matrix[oracle.linear_sum_assignment(matrix)].sum())
    judge.close(total, best, total_bound(matrix, dtype), "total cost")


@property_of(
    "assign.reordering", "reordered or transposed costs have the same optimum", ASSIGNED, cost_inputs(), into=PROPERTIES
)
def reordering(impl: Any, recipe: CostInputs, dtype: str, judge: Judge) -> None:
    matrix = recipe.array(dtype)
    rng = np.random.default_rng(recipe.seed)
    other = matrix[rng.permutation(matrix.shape[0])][:, rng.permutation(matrix.shape[1])]
    total, bound = assignment(impl, matrix, dtype, judge)[1], 2 * total_bound(matrix, dtype)
    judge.close(assignment(impl, other, dtype, judge)[1], total, bound, "total of the reordered costs")
    turned = np.ascontiguousarray(matrix.T)
    judge.close(assignment(impl, turned, dtype, judge)[1], total, bound, "total of the transposed costs")


@property_of(
    "assign.constants",
    "a constant added to each row changes the optimum by their sum where every row is assigned, and so for columns",
    ASSIGNED,
    cost_inputs(least=1),
    into=PROPERTIES,
)
def constants(impl: Any, recipe: CostInputs, dtype: str, judge: Judge) -> None:
    matrix, rng = recipe.array(dtype), np.random.default_rng(recipe.seed)
    before = assignment(impl, matrix, dtype, judge)[1]
    for axis, name in ((0, "rows"), (1, "columns")):
        if matrix.shape[axis] > matrix.shape[1 - axis]:
            continue  # some of them have no partner, and which ones may change
        added = np.round(rng.uniform(-64, 64, matrix.shape[axis]))
        other = matrix + (added[:, None] if axis == 0 else added)
        bound = total_bound(matrix, dtype) + 2 * total_bound(other, dtype)
        after = assignment(impl, round_to(other, at_least_float32(dtype)), dtype, judge)[1]
        judge.close(after, before + added.sum(), bound, f"total with constants added to {name}")
