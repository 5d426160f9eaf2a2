"""Matching: which query answers for which object.

Every ground-truth object of an image gets one query of its own; the others stand for "no object". Which, is decided by
the least total cost (method.md §5; DETR, "Object detection set prediction loss"):

    (A1) positive(x) = α·(1 − p)^γ·(−ln p)            negative(x) = (1 − α)·p^γ·(−ln(1 − p))          p = σ(x)
    (A2) cost(n, t) = w_class·( positive(x_n,label(t)) − negative(x_n,label(t)) )
                    + w_l1·‖b_n − b_t‖₁  +  w_giou·( −GIoU(b_n, b_t) )
    (A3) the pairs (n, t), each n and each t at most once, as many as fit, that minimise Σ cost(n, t)

with α = ¼ and γ = 2. The focal loss (`losses`) is made of the same two functions (A1): the class cost is what the loss
would change by if query n took on the object. DETR's own cost, for its own loss (classification="softmax"), has in place of
the bracket

    (A4) −p_n,label(t)          p = σ(x), the softmax's probability (`softmax_scores` (K3))

(A3) is the assignment problem. `linear_sum_assignment` solves it by shortest augmenting paths with dual prices, for a
cost matrix with n ≤ m (a taller one is transposed):

    1.  Keep a price u_i for every row and v_j for every column with u_i + v_j ≤ c_ij, and equality on matched pairs.
        c_ij − u_i − v_j ≥ 0 is then a length, and Dijkstra's algorithm applies.
    2.  Add the rows one by one. From the new row, find the shortest path that alternates between unmatched and matched
        pairs and ends at a free column: Dijkstra over columns; reaching a taken column continues from its row for free.
    3.  Move the prices of the rows and columns settled on the way by what the path was longer than their own distance:
        step 1's conditions hold again and every pair on the path has length 0.
    4.  Flip the path: its unmatched pairs become matched and the reverse. One more row is matched.

Each of the n searches settles at most n columns, and settling one costs O(m): O(n²·m). Equality on the matched pairs
makes the result optimal, because no assignment can cost less than Σu + Σv over what it uses.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from smca.reference.arrays import FloatArray, IntArray, require_shape
from smca.reference.boxes import cxcywh_to_xyxy, generalized_box_iou
from smca.reference.layers import sigmoid, softplus

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0

TERMS = ("class", "l1", "giou")
CLASSIFICATIONS = ("focal", "matchability", "softmax")


def focal_terms(
    logits: FloatArray, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA
) -> tuple[FloatArray, FloatArray]:
    """(positive, negative): what a logit costs where the class is present, and where it is absent. Equation (A1).

    Written with σ(−x) for 1 − p and softplus for the logarithms, so that no logit of any size overflows, or rounds
    1 − p to 0. Source: focal loss, arXiv 1708.02002, equation (5).

    Args:
        logits: any shape.
        alpha: weight of presence, in [0, 1]; absence has 1 − alpha.
        gamma: how much less an easy example counts, ≥ 0.

    Returns:
        Two arrays of the same shape, each ≥ 0.

    At p = ½: ¼·¼·ln 2 and ¾·¼·ln 2.

    >>> positive, negative = focal_terms(np.array([0.0]))
    >>> positive.round(4).tolist(), negative.round(4).tolist()
    ([0.0433], [0.13])
    """
    positive = alpha * sigmoid(-logits) ** gamma * softplus(-logits)
    negative = (1.0 - alpha) * sigmoid(logits) ** gamma * softplus(logits)
    return positive, negative


def match_cost(
    logits: FloatArray,
    boxes_cxcywh: FloatArray,
    labels: IntArray,
    target_boxes_cxcywh: FloatArray,
    weights: Mapping[str, float],
    classification: str = "focal",
) -> FloatArray:
    """The cost of every pair of a query and an object of one image. Equations (A2) and (A4); method.md §5.

    Args:
        logits: [N, K].
        boxes_cxcywh: [N, 4], predicted, in [0, 1] of the unpadded image.
        labels: [T], in [0, K).
        target_boxes_cxcywh: [T, 4], in [0, 1] of the unpadded image.
        weights: "class", "l1" and "giou".
        classification: of the loss that is matched for: "softmax" has a cost of its own, (A4).

    Returns:
        [N, T]. T = 0 is legal.

    Raises:
        ValueError: shapes that don't fit, a label outside [0, K), another classification, or weights with other names.

    A query at p = ½ whose box is the target's own: 2·(0.0433 − 0.1300) + 5·0 + 2·(−1). And one whose box is off by a
    quarter in x, so that it covers half of the target: L1 0.25, IoU 1/3, hull = union, so GIoU 1/3:

    >>> target = np.array([[0.5, 0.5, 0.5, 0.5]])
    >>> boxes = np.array([[0.5, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 0.5]])
    >>> weights = {"class": 2.0, "l1": 5.0, "giou": 2.0}
    >>> match_cost(np.zeros((2, 1)), boxes, np.array([0]), target, weights).round(4).tolist()
    [[-2.1733], [0.41]]

    DETR's cost, with its weight of 1: −½ in place of 2·(0.0433 − 0.1300).

    >>> match_cost(np.zeros((2, 1)), boxes, np.array([0]), target, weights | {"class": 1.0}, "softmax").round(4).tolist()
    [[-2.5], [0.0833]]
    """
    check_weights(weights)
    check_classification(classification)
    require_shape("logits", logits, (None, None), "Give those of one image: [N, K].")
    queries, classes = logits.shape
    require_shape("boxes_cxcywh", boxes_cxcywh, (queries, 4), "Give one box per query, as many as logits has rows.")
    require_shape("labels", labels, (None,), "Give those of one image: [T].")
    require_shape("target_boxes_cxcywh", target_boxes_cxcywh, (labels.shape[0], 4), "Give one box per label.")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise ValueError(
            f"labels: expected each in [0, {classes}), the number of classes of the logits, got "
            f"{int(labels[outside][0])}. Map category ids to contiguous labels first, and leave padding out."
        )
    if classification == "softmax":
        cost_class = -sigmoid(logits[:, labels])  # (A4) [N, T]
    else:
        positive, negative = focal_terms(logits[:, labels])
        cost_class = positive - negative
    cost_l1: FloatArray = np.abs(boxes_cxcywh[:, None, :] - target_boxes_cxcywh[None, :, :]).sum(axis=-1)
    cost_giou = -generalized_box_iou(cxcywh_to_xyxy(boxes_cxcywh)[:, None], cxcywh_to_xyxy(target_boxes_cxcywh))
    return weights["class"] * cost_class + weights["l1"] * cost_l1 + weights["giou"] * cost_giou


def linear_sum_assignment(cost: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    """The assignment with the least total cost. Equation (A3) and steps 1 to 4 of this module.

    Args:
        cost: [n, m], any shape, also with n or m = 0. +inf forbids a pair.

    Returns:
        (rows, cols), min(n, m) each, rows ascending: row rows[k] has column cols[k]. As SciPy's function of this name;
        where several assignments cost the same, it may return another one of them.

    Raises:
        ValueError: not a matrix; a NaN or −inf; or so many pairs forbidden that no complete assignment is left.

    The greedy choice, 1 for the first row, would leave 9 for the second; 2 + 3 is less than 1 + 9:

    >>> rows, cols = linear_sum_assignment([[1.0, 2.0], [3.0, 9.0]])
    >>> rows.tolist(), cols.tolist()
    ([0, 1], [1, 0])

    More rows than columns: the row that would cost most stays alone.

    >>> rows, cols = linear_sum_assignment([[7.0], [5.0], [6.0]])
    >>> rows.tolist(), cols.tolist()
    ([1], [0])
    """
    cost = np.asarray(cost, dtype=np.float64)
    require_shape("cost", cost, (None, None), "Give a matrix, rows × columns.")
    bad = np.isnan(cost) | (cost == -np.inf)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"cost[{row}, {column}]: expected a number or +inf (a forbidden pair), got {cost[row, column]}. "
            "Find where the prediction that it was computed from stopped being finite."
        )
    if cost.shape[0] > cost.shape[1]:
        rows = _columns_of_rows(cost.T)  # rows[j] is the row that column j has
        cols = np.argsort(rows)
        return rows[cols], cols
    return np.arange(cost.shape[0]), _columns_of_rows(cost)


def _columns_of_rows(cost: FloatArray) -> IntArray:
    """The column of every row, [n], for a checked cost [n, m] with n ≤ m. Steps 1 to 4."""
    n, m = cost.shape
    price_row, price_col = np.zeros(n), np.zeros(m)  # u, v of step 1
    col_of_row, row_of_col = np.full(n, -1), np.full(m, -1)  # −1: free
    for new_row in range(n):
        # Step 2. distance: of the shortest path found so far; came_from: the last row on it.
        distance, came_from, settled = np.full(m, np.inf), np.full(m, -1), np.zeros(m, dtype=bool)
        row, walked = new_row, 0.0
        while True:
            through_row = walked + (cost[row] - price_row[row] - price_col)
            shorter = ~settled & (through_row < distance)
            distance[shorter], came_from[shorter] = through_row[shorter], row
            nearest = int(np.argmin(np.where(settled, np.inf, distance)))
            if settled[nearest] or distance[nearest] == np.inf:
                raise ValueError(
                    "cost: expected a complete assignment to be possible, got a matrix in which too many pairs are "
                    "+inf. Give every row (or column, if they are fewer) a pair of its own that is allowed."
                )
            walked = distance[nearest]
            if row_of_col[nearest] == -1:
                break
            settled[nearest] = True
            row = row_of_col[nearest]
        # Step 3. The new row was at distance 0; every settled column, and its row, at that column's distance.
        surplus = walked - distance[settled]
        price_row[new_row] += walked
        price_row[row_of_col[settled]] += surplus
        price_col[settled] -= surplus
        # Step 4. From the free column back to the new row, give each row the column that the path reached through it.
        col = nearest
        while True:
            row = came_from[col]
            row_of_col[col] = row
            col_of_row[row], col = col, col_of_row[row]
            if row == new_row:
                break
    return col_of_row


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise a ValueError unless `weights` has exactly the terms of (A2), each finite and ≥ 0."""
    if set(weights) != set(TERMS):
        raise ValueError(
            f"weights: expected the terms {list(TERMS)}, got {list(weights)}. Name each of them, no other."
        )
    for term in TERMS:
        if not 0 <= weights[term] < np.inf:
            raise ValueError(f"weights[{term!r}]: expected a finite number ≥ 0, got {weights[term]}.")


def check_classification(classification: str) -> None:
    """Raise a ValueError unless `classification` is a loss of classes that there is."""
    if classification not in CLASSIFICATIONS:
        raise ValueError(f"classification: expected one of {list(CLASSIFICATIONS)}, got {classification!r}.")
