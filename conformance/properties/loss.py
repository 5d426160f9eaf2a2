"""What must be true of set_loss and of its gradients (docs/method.md §5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.matching import USUAL_LOSSES, LossArrays, LossInputs, loss_inputs
from smca.conformance.property import Judge, Property, assume, property_of
from smca.conformance.tolerances import UNDERFLOW, UNIT_ROUNDOFF, at_least_float32, giou_bound
from smca.reference import boxes as oracle_boxes
from smca.reference import losses as oracle
from smca.reference import matching
from smca.reference.losses import Targets
from smca.reference.losses_backward import set_loss_backward

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

LOSS = (
    "method.md §5: sigmoid focal loss over queries and classes, L1 and 1 − GIoU over matched pairs, each divided by the "
    "number of boxes (at least 1), weights 2, 5, 2, summed over decoder layers, each matched by itself"
)
PADDING = "method.md §5: the padding of targets is no object; images with no object are legal everywhere"

CONTINUOUS = loss_inputs(logit=st.sampled_from([1.0, 0.1, 10.0]))
"""No logits so large that different queries cost the same: the matching, and with it the loss, could then differ."""


def terms_of(impl: Any, x: LossArrays, dtype: str) -> dict[str, float]:
    terms = impl.set_loss(x.logits, x.boxes, x.targets, x.weights, dtype=dtype)
    return {name: float(value) for name, value in terms.items()}


def gradients_of(impl: Any, x: LossArrays, dtype: str) -> tuple[Array, Array]:
    dlogits, dboxes = impl.set_loss_vjp(x.logits, x.boxes, x.targets, x.weights, dtype=dtype)
    return np.asarray(dlogits, dtype=np.float64), np.asarray(dboxes, dtype=np.float64)


def clear_matching(x: LossArrays, dtype: str, classification: str = "focal") -> bool:
    """Whether every matching survives the rounding of its costs: any other choice costs clearly more."""
    gap = 1e4 * UNIT_ROUNDOFF[at_least_float32(dtype)]
    for m, b in np.ndindex(*x.logits.shape[:2]):
        (real,) = np.nonzero(x.targets.valid[b])
        cost = matching.match_cost(
            x.logits[m, b],
            x.boxes[m, b],
            x.targets.labels[b, real],
            x.targets.boxes[b, real],
            x.weights,
            classification,
        )
        rows, cols = matching.linear_sum_assignment(cost)
        best = cost[rows, cols].sum()
        for row, col in zip(rows, cols, strict=True):
            without = cost.copy()
            without[row, col] += 1e6
            others = matching.linear_sum_assignment(without)
            if without[others].sum() - best < gap * max(1.0, float(np.abs(cost).max())):
                return False
    return True


def bounds(x: LossArrays, dtype: str, query: npt.NDArray[np.int64] | None = None) -> dict[str, float]:
    """Bound of every term: one rounding per logit and coordinate that enters, relative to its size, and one per sum. `query`: of
    each target, if it is not the focal loss's."""
    dtype = at_least_float32(dtype)
    u, number = UNIT_ROUNDOFF[dtype], max(1, int(x.targets.valid.sum()))
    query = oracle.match(x.logits, x.boxes, x.targets, x.weights) if query is None else query
    limits: dict[str, float] = {}
    for m in range(len(x.logits)):
        image, target = np.nonzero(query[m] >= 0)
        pred, true = x.boxes[m, image, query[m, image, target]], x.targets.boxes[image, target]
        pairs = [np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], -1) for b in (pred, true)]
        giou = np.diagonal(giou_bound(pairs[0], pairs[1], dtype)) if len(pred) else np.zeros(0)
        count = len(pred) + 4
        sums = {
            "class": u * ((1 + np.abs(x.logits[m])) * (1 + np.log2(x.logits[m].size + 1))).sum(),
            "l1": u * (np.abs(pred) + np.abs(true)).sum() * count,
            "giou": giou.sum() + u * 2 * count**2,
        }
        limits |= {f"{name}/{m}": float(x.weights[name] * value / number) for name, value in sums.items()}
    return {**limits, "loss": sum(limits.values()) + u * len(limits) ** 2}


def compare(got: dict[str, float], expected: dict[str, float], limits: dict[str, float], judge: Judge, of: str) -> None:
    names = sorted(expected)
    judge.holds(sorted(got) == names, f"{of}: got the terms {sorted(got)}, expected {names}")
    for name in names:
        judge.close([got[name]], [expected[name]], limits[name], f"{of} {name}")


@property_of(
    "set_loss.equals_the_oracle",
    "every term equals the oracle's",
    LOSS,
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_LOSSES,
)
def loss_equals_the_oracle(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    expected = oracle.set_loss({"logits": x.logits, "boxes": x.boxes}, x.targets, x.weights)
    compare(terms_of(impl, x, dtype), expected, bounds(x, dtype), judge, "term")


@property_of(
    "set_loss.reordering",
    "reordering targets, queries, images or classes changes nothing",
    LOSS,
    CONTINUOUS,
    into=PROPERTIES,
)
def reordering(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    rng = np.random.default_rng(recipe.seed)
    _, images, queries, classes = x.logits.shape
    image, query, column, target = (rng.permutation(n) for n in (images, queries, classes, x.targets.valid.shape[1]))
    t = Targets(
        np.argsort(column)[x.targets.labels[image][:, target]],
        x.targets.boxes[image][:, target],
        x.targets.valid[image][:, target],
    )
    moved = x.logits[:, image][:, :, query][..., column], x.boxes[:, image][:, :, query]
    other = LossArrays(*moved, t, x.weights)
    limits = {name: 2 * value for name, value in bounds(x, dtype).items()}
    compare(terms_of(impl, other, dtype), terms_of(impl, x, dtype), limits, judge, "reordered, term")


@property_of(
    "set_loss.layers_alone", "each layer's terms are what that layer alone gives", LOSS, CONTINUOUS, into=PROPERTIES
)
def layers_alone(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    whole, limits = terms_of(impl, x, dtype), bounds(x, dtype)
    for m in range(len(x.logits)):
        alone = terms_of(impl, x._replace(logits=x.logits[m : m + 1], boxes=x.boxes[m : m + 1]), dtype)
        for term in ("class", "l1", "giou"):
            limit = 2 * limits[f"{term}/{m}"]
            judge.close([whole[f"{term}/{m}"]], [alone[f"{term}/0"]], limit, f"{term}/{m} against that layer alone,")


ONE_PAIR = loss_inputs(queries=1, targets=1, logit=st.sampled_from([1.0, 10.0]))
"""One query and one object at most per image: the same matching with any weights."""


def with_one_term(x: LossArrays, term: str) -> LossArrays:
    return x._replace(weights={name: float(name == term) for name in x.weights})


@property_of(
    "set_loss.weights",
    "each term is its own weight times what it is with a weight of 1",
    LOSS,
    ONE_PAIR,
    into=PROPERTIES,
)
def weights_of_the_loss(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole, limits = terms_of(impl, x, dtype), bounds(x, dtype)
    for term, weight in x.weights.items():
        alone = terms_of(impl, with_one_term(x, term), dtype)
        for m in range(len(x.logits)):
            name = f"{term}/{m}"
            judge.close([whole[name]], [weight * alone[name]], 2 * limits[name], f"{name} by its weight of {weight:g}")


@property_of(
    "set_loss.padding_of_targets",
    "what stands in the padding of targets changes nothing, NaN included, and neither does more of it",
    PADDING,
    CONTINUOUS,
    into=PROPERTIES,
)
def padding_of_targets(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    valid = np.pad(x.targets.valid, ((0, 0), (1, 2)))
    boxes = np.where(valid[..., None], np.pad(x.targets.boxes, ((0, 0), (1, 2), (0, 0))), np.nan)
    labels = np.where(valid, np.pad(x.targets.labels, ((0, 0), (1, 2))), 0)
    other = x._replace(targets=Targets(labels, boxes, valid))
    limits = {name: 2 * value for name, value in bounds(x, dtype).items()}
    compare(terms_of(impl, other, dtype), terms_of(impl, x, dtype), limits, judge, "with more padding, term")


@property_of(
    "set_loss.perfect_boxes_cost_nothing",
    "where the predictions include all ground-truth boxes, with confident logits, L1 "
    "and GIoU terms are 0 and the class term is nearly 0",
    LOSS,
    loss_inputs(filled=1.0, logit=1.0, queries=st.integers(4, 7), targets=st.integers(1, 3), classes=1),
    into=PROPERTIES,
)
def perfect_boxes_cost_nothing(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    targets = recipe.targets
    boxes, logits = x.boxes.copy(), np.full_like(x.logits, -12.0)
    boxes[:, :, :targets], logits[:, :, :targets] = x.targets.boxes, 12.0
    terms, limits = terms_of(impl, x._replace(logits=logits, boxes=boxes), dtype), bounds(x, dtype)
    for m in range(recipe.layers):
        judge.close([terms[f"l1/{m}"]], [0.0], 2 * limits[f"l1/{m}"] + 1e-30, f"l1/{m}")
        judge.close([terms[f"giou/{m}"]], [0.0], 2 * limits[f"giou/{m}"] + 100 * UNIT_ROUNDOFF[dtype], f"giou/{m}")
        # The focal loss of a logit of ±12 on the right side: at most e⁻³⁶ and its rounding.
        judge.close([terms[f"class/{m}"]], [0.0], 1e-12, f"class/{m}")


CORNERS = loss_inputs(filled=st.sampled_from([0.0, 1.0]), logit=st.sampled_from([1e4, 1.0, 0.0]))


def corner(recipe: LossInputs, dtype: str) -> LossArrays:
    """Boxes without area, the same box for prediction and truth, boxes beyond the image, probabilities of 0 and 1."""
    x = recipe.arrays(dtype)
    boxes, truth = x.boxes.copy(), x.targets.boxes.copy()
    rng = np.random.default_rng(recipe.seed)
    boxes[rng.random(boxes.shape[:-1]) < 0.3, 2:] = 0.0
    truth[rng.random(truth.shape[:-1]) < 0.3, 2:] = 0.0
    if recipe.targets:
        boxes[..., 0, :] = truth[:, 0]
    boxes[rng.random(boxes.shape[:-1]) < 0.2] = [1.0, 0.0, 1.0, 1.0]
    return x._replace(boxes=boxes, targets=Targets(x.targets.labels, truth, x.targets.valid))


@property_of(
    "set_loss.finite_at_the_corners",
    "every term is finite and not negative without objects, for boxes without area and for saturated logits",
    PADDING,
    CORNERS,
    into=PROPERTIES,
)
def finite_at_the_corners(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    for name, value in terms_of(impl, corner(recipe, dtype), dtype).items():
        judge.all_finite(value, name)
        judge.holds(value >= -100 * UNIT_ROUNDOFF[dtype], f"{name} = {value} is negative")
        if not recipe.filled and name.partition("/")[0] in ("l1", "giou"):
            judge.holds(value == 0, f"{name} = {value} although there is no object")


@property_of(
    "set_loss_vjp.finite_at_the_corners",
    "every gradient is finite without objects, for boxes without area and for saturated logits",
    PADDING,
    CORNERS,
    into=PROPERTIES,
)
def gradients_finite_at_the_corners(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    dlogits, dboxes = gradients_of(impl, corner(recipe, dtype), dtype)
    judge.all_finite(dlogits, "gradient of logits")
    judge.all_finite(dboxes, "gradient of boxes")
    if not recipe.filled:
        judge.holds(not dboxes.any(), "boxes have a gradient although there is no object")


def gradient_limits(
    gradients: Callable[[Sequence[Array]], Sequence[Array]], leaves: Sequence[Array], dtype: str, seed: int
) -> list[Array]:
    """How far each entry of the gradients may be off: by what a rounding of every input moves it, and by the roundings of a sum
    of terms of the size of its row's largest. Beside a kink of L1 or GIoU, where rounding chooses the side, that is a lot."""
    u, rng = UNIT_ROUNDOFF[at_least_float32(dtype)], np.random.default_rng(seed)
    here = gradients(leaves)
    limits = [
        16 * u * np.abs(g).max(-1, keepdims=True) + UNIT_ROUNDOFF[dtype] * np.abs(g) + UNDERFLOW[dtype] for g in here
    ]
    moves = [np.zeros_like(g) for g in here]
    for _ in range(4):
        nudged = [leaf + 2 * u * (1 + np.abs(leaf)) * rng.choice([-1, 1], leaf.shape) for leaf in leaves]
        moves = [np.maximum(move, np.abs(g - h)) for move, g, h in zip(moves, gradients(nudged), here, strict=True)]
    return [limit + 4 * move for limit, move in zip(limits, moves, strict=True)]


@property_of(
    "set_loss_vjp.equals_the_oracle",
    "every entry equals the oracle's",
    "reference/losses_backward.py, equations (G1) to (G8); the matching is not differentiated",
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_LOSSES,
)
def gradients_equal_the_oracle(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))

    def gradients(leaves: Sequence[Array]) -> tuple[Array, Array]:
        found = set_loss_backward({"logits": leaves[0], "boxes": leaves[1]}, x.targets, x.weights)
        return found["logits"], found["boxes"]

    leaves = x.logits, x.boxes
    limits, want = gradient_limits(gradients, leaves, dtype, recipe.seed), gradients(leaves)
    per_box = UNIT_ROUNDOFF[at_least_float32(dtype)] / max(1, int(x.targets.valid.sum()))
    # A probability near 0 may come from 1 − (1 − p), off by a rounding of 1; each quotient of (G6) is at most 1 / side.
    limits[0] += 4 * per_box * x.weights["class"]
    limits[1] += 4 * per_box * x.weights["giou"] / np.tile(x.boxes[..., 2:], 2)
    for name, one, expected, limit in zip(("logits", "boxes"), gradients_of(impl, x, dtype), want, limits, strict=True):
        judge.close(one, expected, limit, f"gradient of {name}")


def fixed_loss(x: LossArrays, query: npt.NDArray[np.int64]) -> float:
    """The oracle's loss for a fixed matching [M, B, T]: the function whose gradient is meant."""
    total, number = 0.0, max(1, int(x.targets.valid.sum()))
    for m in range(len(x.logits)):
        image, target = np.nonzero(query[m] >= 0)
        present = np.zeros(x.logits.shape[1:])
        present[image, query[m, image, target], x.targets.labels[image, target]] = 1.0
        pred, true = x.boxes[m, image, query[m, image, target]], x.targets.boxes[image, target]
        pairs = oracle_boxes.cxcywh_to_xyxy(pred), oracle_boxes.cxcywh_to_xyxy(true)
        giou = oracle_boxes.generalized_box_iou(*pairs)
        total += x.weights["class"] * oracle.sigmoid_focal_loss(x.logits[m], present).sum() / number
        total += (x.weights["l1"] * np.abs(pred - true).sum() + x.weights["giou"] * (1 - giou).sum()) / number
    return float(total)


@property_of(
    "set_loss_vjp.agrees_with_central_differences",
    "agrees with central differences of the oracle's loss, the matching held fixed",
    "method.md §5, and the definition of a derivative; the matching is not differentiated",
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_LOSSES,
)
def loss_agrees_with_central_differences(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    gradients = dict(zip(("logits", "boxes"), gradients_of(impl, x, dtype), strict=True))
    query, rng, step = oracle.match(x.logits, x.boxes, x.targets, x.weights), np.random.default_rng(recipe.seed), 1e-6
    for name, gradient in gradients.items():
        leaf = getattr(x, name)
        direction = rng.uniform(0.5, 1, leaf.shape) * rng.choice([-1, 1], leaf.shape)

        def along(t: float, name: str = name, leaf: Array = leaf, moved: Array = direction) -> float:
            changed: dict[str, Any] = {name: leaf + t * moved}
            return fixed_loss(x._replace(**changed), query)

        ahead, here, behind, far = along(step), along(0.0), along(-step), along(2 * step)
        wanted = (ahead - behind) / (2 * step)
        # L1 and GIoU have kinks: where the slopes of both sides differ, no difference quotient is the gradient.
        assume(abs((ahead - here) - (here - behind)) / step < 1e-3 * (1 + abs(wanted)))
        assume(abs((far - ahead) - (ahead - here)) / step < 1e-3 * (1 + abs(wanted)))
        size = float(np.abs(gradient).sum())
        exact = UNIT_ROUNDOFF[at_least_float32(dtype)] * 50
        limit = (1e-8 + abs((far - ahead) - (ahead - here)) / step * step + exact) * (2 * size + 1)
        limit += (
            UNIT_ROUNDOFF[dtype] * size + UNDERFLOW[dtype] * gradient.size
        )  # what comes back is stored in this dtype
        judge.along([(gradient, direction)], wanted, limit, f"gradient of {name}")


@property_of(
    "set_loss_vjp.an_image_alone",
    "an image's gradient does not depend on the other images, except for the common divisor",
    LOSS,
    loss_inputs(batch=2, logit=st.sampled_from([1.0, 10.0])),
    into=PROPERTIES,
    dtypes=["float64", "float32"],
)
def an_image_alone(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear_matching(x, dtype))
    both, u = gradients_of(impl, x, dtype), UNIT_ROUNDOFF[dtype]
    for b in range(2):
        one = slice(b, b + 1)
        t = Targets(x.targets.labels[one], x.targets.boxes[one], x.targets.valid[one])
        single = gradients_of(impl, LossArrays(x.logits[:, one], x.boxes[:, one], t, x.weights), dtype)
        divisor = max(1, int(t.valid.sum())) / max(1, int(x.targets.valid.sum()))
        for name, whole, alone in zip(("logits", "boxes"), both, single, strict=True):
            limit = 16 * u * (np.abs(alone).max(initial=0.0) + 1)
            judge.close(whole[:, one], alone * divisor, limit, f"gradient of {name} of image {b}")


@property_of(
    "set_loss_vjp.weights",
    "the gradient is the sum of the terms' gradients, each times its own weight",
    LOSS,
    ONE_PAIR,
    into=PROPERTIES,
    dtypes=["float64", "float32"],
)
def gradients_by_their_weights(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x, u = recipe.arrays(dtype), UNIT_ROUNDOFF[dtype]
    apart = [(weight, gradients_of(impl, with_one_term(x, term), dtype)) for term, weight in x.weights.items()]
    for n, (name, whole) in enumerate(zip(("logits", "boxes"), gradients_of(impl, x, dtype), strict=True)):
        expected = sum(weight * gradients[n] for weight, gradients in apart)
        size = sum(weight * np.abs(gradients[n]) for weight, gradients in apart)
        judge.close(whole, expected, 16 * (u * size + UNDERFLOW[dtype]), f"gradient of {name}")
