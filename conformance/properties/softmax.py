"""What must be true of DETR's own scores: of the odds that logits are, of the match cost and of the loss with its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.matching import WITH_CLASS, LossArrays, LossInputs, loss_inputs
from smca.conformance.inputs.softmax import (
    USUAL_ODDS,
    USUAL_SOFTMAX_LOSSES,
    OddsInputs,
    SoftmaxArrays,
    SoftmaxLossInputs,
    odds_inputs,
    softmax_loss_inputs,
)
from smca.conformance.properties.loss import CORNERS, bounds, clear_matching, compare, corner, fixed_loss
from smca.conformance.properties.matching import ONE_IMAGE, USUAL_IMAGES, Pairs, cost_bound, one_image
from smca.conformance.property import Judge, Property, assume, property_of
from smca.conformance.tolerances import UNDERFLOW, UNIT_ROUNDOFF, accumulation_roundoff, at_least_float32
from smca.reference import losses, matching
from smca.reference import softmax_scores as oracle
from smca.reference.layers import sigmoid, softmax
from smca.reference.losses import Targets

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

ODDS = "reference/softmax_scores.py, equation (K3): logit_k = z_k − ln Σ_{j≠k} e^z_j, so that σ(logit_k) = softmax(z)_k"
COST = "reference/matching.py, equation (A4): −p for the class, p = σ(logit), in place of the focal cost"
LOSS = (
    "reference/softmax_scores.py, equations (K4) to (K6): cross-entropy over K + 1, the mean over the queries with a weight of "
    '0.1 for "no object"; L1 and 1 − GIoU as in method.md §5'
)


def odds(impl: Any, z: Array, dtype: str) -> Array:
    return np.asarray(impl.log_odds(z, dtype=dtype), dtype=np.float64)


def odds_bound(z: Array, dtype: str) -> float:
    """A rounding per term of the sum, each of a number of the size of the outputs."""
    return float(accumulation_roundoff(dtype) * z.shape[-1] * (1 + np.abs(z).max()))


@property_of("log_odds.equals_the_oracle", "equals the oracle", ODDS, odds_inputs(), into=PROPERTIES, always=USUAL_ODDS)
def odds_equal_the_oracle(impl: Any, recipe: OddsInputs, dtype: str, judge: Judge) -> None:
    z = recipe.array(dtype)
    judge.close(odds(impl, z, dtype), oracle.log_odds(z), odds_bound(z, dtype), "odds")


@property_of(
    "log_odds.scores_are_the_softmax",
    "the sigmoid of the odds is the softmax, also of an output that has nearly all of it",
    ODDS,
    odds_inputs(),
    into=PROPERTIES,
    always=USUAL_ODDS,
)
def scores_are_the_softmax(impl: Any, recipe: OddsInputs, dtype: str, judge: Judge) -> None:
    z = recipe.array(dtype)
    logits, p = odds(impl, z, dtype), softmax(z)[..., :-1]
    judge.all_finite(logits, "odds")
    # σ' = p·(1 − p); and the rest of what is left is as exact as p itself.
    limit = odds_bound(z, dtype) + 8 * UNIT_ROUNDOFF["float64"]
    judge.close(sigmoid(logits), p, limit * np.minimum(p, 1 - p) + 1e-15, "score")
    # Of all but one output with the rest: the odds of "the rest" are those of the output, turned around.
    if z.shape[-1] == 2:
        judge.close(logits, z[:, :1] - z[:, 1:], odds_bound(z, dtype), "odds of one class")


@property_of(
    "log_odds.reordering",
    "classes reordered reorder the odds, and a constant added to all outputs changes nothing",
    ODDS,
    odds_inputs(shift=0.0),
    into=PROPERTIES,
    always=USUAL_ODDS[1:2],
)
def reordering_of_odds(impl: Any, recipe: OddsInputs, dtype: str, judge: Judge) -> None:
    z = recipe.array(dtype)
    column = np.random.default_rng(recipe.seed).permutation(recipe.classes)
    turned, expected = np.concatenate([z[:, column], z[:, -1:]], axis=-1), odds(impl, z, dtype)
    judge.close(
        odds(impl, turned, dtype), expected[:, column], 2 * odds_bound(z, dtype), "odds of the reordered classes"
    )
    far = OddsInputs(recipe.queries, recipe.classes, "ties", 1.0, 0.0, recipe.seed)
    whole = far.array(dtype)  # small integers: exact with another one added
    judge.close(
        odds(impl, whole + 64.0, dtype), odds(impl, whole, dtype), 2 * odds_bound(whole + 64.0, dtype), "odds, shifted,"
    )


@property_of(
    "log_odds_vjp.is_the_softmax_of_the_others",
    "the derivative of the odds of k is 1 by its own output, and minus the softmax over the others by theirs; always finite",
    "differentiating (K3)",
    odds_inputs(),
    into=PROPERTIES,
    always=USUAL_ODDS,
)
def odds_have_the_gradient_of_their_definition(impl: Any, recipe: OddsInputs, dtype: str, judge: Judge) -> None:
    z, rng = recipe.array(dtype), np.random.default_rng(recipe.seed)
    grad = rng.choice([-1.0, 0.5, 2.0], (len(z), recipe.classes))
    got = np.asarray(impl.log_odds_vjp(grad, z, dtype=dtype), dtype=np.float64)
    judge.all_finite(got, "gradient of z")
    want = np.zeros_like(z)
    for k in range(recipe.classes):
        rest = np.delete(np.arange(z.shape[-1]), k)
        want[:, k] += grad[:, k]
        want[:, rest] -= grad[:, k : k + 1] * softmax(z[:, rest])
    # What comes back is stored in the dtype of z.
    limit = odds_bound(z, dtype) * np.abs(grad).sum(-1, keepdims=True) + UNIT_ROUNDOFF[dtype] * np.abs(want)
    judge.close(got, want, limit, "gradient of z")


def cost(impl: Any, x: Pairs, dtype: str) -> Array:
    return np.asarray(impl.softmax_match_cost(*x, dtype=dtype), dtype=np.float64)


@property_of(
    "softmax_match_cost.equals_the_oracle", "equals the oracle", COST, ONE_IMAGE, into=PROPERTIES, always=USUAL_IMAGES
)
def cost_equals_the_oracle(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    x = one_image(recipe, dtype)
    judge.close(cost(impl, x, dtype), matching.match_cost(*x, "softmax"), cost_bound(*x, dtype), "cost")


@property_of(
    "softmax_match_cost.falls_by_the_probability",
    "against a probability of 0 the class takes off at most its weight, in proportion to the probability, and no other class's "
    "logit affects it",
    COST,
    loss_inputs(layers=1, batch=1, filled=1.0, targets=st.integers(1, 9), weighting=WITH_CLASS),
    into=PROPERTIES,
)
def cost_falls_by_the_probability(impl: Any, recipe: LossInputs, dtype: str, judge: Judge) -> None:
    logits, boxes, labels, truth, weights = x = one_image(recipe, dtype)
    none = cost(impl, (np.full_like(logits, -1e4), boxes, labels, truth, weights), dtype)
    own = cost(impl, x, dtype)
    limit = 2 * cost_bound(np.zeros_like(logits), boxes, labels, truth, weights, dtype) / weights["class"]
    limit = limit + 16 * UNIT_ROUNDOFF[dtype]
    judge.close((none - own) / weights["class"], sigmoid(logits[:, labels]), limit, "what the class takes off")
    raised = logits.copy()
    raised[:, labels[0]] += 1
    after = cost(impl, (raised, boxes, labels, truth, weights), dtype)
    judge.holds(bool((after == own)[:, labels != labels[0]].all()), "a cost of another class changed")


CONTINUOUS = softmax_loss_inputs()


def terms_of(impl: Any, x: SoftmaxArrays, dtype: str) -> dict[str, float]:
    terms = impl.softmax_set_loss(x.z, x.boxes, x.targets, x.weights, dtype=dtype)
    return {name: float(value) for name, value in terms.items()}


def gradients_of(impl: Any, x: SoftmaxArrays, dtype: str) -> tuple[Array, Array]:
    dz, dboxes = impl.softmax_set_loss_vjp(x.z, x.boxes, x.targets, x.weights, dtype=dtype)
    return np.asarray(dz, dtype=np.float64), np.asarray(dboxes, dtype=np.float64)


def clear(x: SoftmaxArrays, dtype: str) -> bool:
    return clear_matching(x.with_odds, dtype, "softmax")


def matched(x: SoftmaxArrays) -> npt.NDArray[np.int64]:
    odds_of = x.with_odds
    return losses.match(odds_of.logits, x.boxes, x.targets, x.weights, "softmax")


def limits_of(x: SoftmaxArrays, dtype: str) -> dict[str, float]:
    """As of the set loss for boxes; for the classes a rounding per output and query, of numbers of the size of the outputs."""
    dtype = at_least_float32(dtype)
    query, number = matched(x), x.z[0, ..., 0].size
    of_class = UNIT_ROUNDOFF[dtype] * (1 + float(np.abs(x.z).max())) * (x.z.shape[-1] + np.log2(number + 1))
    limits = bounds(x.with_odds, dtype, query)
    limits |= {f"class/{m}": x.weights["class"] * of_class for m in range(len(x.z))}
    names = [name for name in limits if name != "loss"]
    return limits | {"loss": sum(limits[name] for name in names) + UNIT_ROUNDOFF[dtype] * len(names) ** 2}


@property_of(
    "softmax_set_loss.equals_the_oracle",
    "every term equals the oracle's",
    LOSS,
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_SOFTMAX_LOSSES,
)
def loss_equals_the_oracle(impl: Any, recipe: SoftmaxLossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear(x, dtype))
    outputs = {"logits": x.with_odds.logits, "boxes": x.boxes, "class_logits": x.z}
    expected = losses.set_loss(outputs, x.targets, x.weights, "softmax")
    compare(terms_of(impl, x, dtype), expected, limits_of(x, dtype), judge, "term")


@property_of(
    "softmax_set_loss.counts_queries",
    "equal outputs of all queries for all columns cost ln(K + 1), however many queries have an object; without any object, the "
    'mean of what "no object" costs',
    LOSS,
    softmax_loss_inputs(logit=st.sampled_from([1.0, 10.0])),
    into=PROPERTIES,
    always=USUAL_SOFTMAX_LOSSES,
)
def loss_counts_queries(impl: Any, recipe: SoftmaxLossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    equal, limits = x._replace(z=np.full_like(x.z, 3.0)), limits_of(x, dtype)
    none = x._replace(targets=x.targets.__class__(x.targets.labels, x.targets.boxes, np.zeros_like(x.targets.valid)))
    of_equal, of_none = terms_of(impl, equal, dtype), terms_of(impl, none, dtype)
    for m in range(len(x.z)):
        want = x.weights["class"] * float(np.log(x.z.shape[-1]))
        judge.close([of_equal[f"class/{m}"]], [want], limits[f"class/{m}"], f"class/{m} of equal outputs")
        p = softmax(x.z[m])[..., -1]
        want = x.weights["class"] * float(-np.log(p).mean())
        judge.close([of_none[f"class/{m}"]], [want], limits[f"class/{m}"], f"class/{m} without objects")


@property_of(
    "softmax_set_loss.reordering",
    "reordering targets, queries, images or classes changes nothing, and neither does padding, NaN included",
    LOSS,
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_SOFTMAX_LOSSES[:1],
)
def reordering_of_loss(impl: Any, recipe: SoftmaxLossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear(x, dtype))
    rng, t = np.random.default_rng(recipe.loss.seed), x.targets
    _, images, queries, columns = x.z.shape
    image, query, column, target = (rng.permutation(n) for n in (images, queries, columns - 1, t.valid.shape[1]))
    valid = np.pad(t.valid[image][:, target], ((0, 0), (1, 2)))
    boxes = np.pad(t.boxes[image][:, target], ((0, 0), (1, 2), (0, 0)))
    labels = np.pad(np.argsort(column)[t.labels[image][:, target]], ((0, 0), (1, 2)))
    moved = Targets(np.where(valid, labels, 0), np.where(valid[..., None], boxes, np.nan), valid)
    z = x.z[:, image][:, :, query][..., [*column.tolist(), columns - 1]]
    other = SoftmaxArrays(z, x.boxes[:, image][:, :, query], moved, x.weights)
    limits = {name: 2 * value for name, value in limits_of(x, dtype).items()}
    compare(terms_of(impl, other, dtype), terms_of(impl, x, dtype), limits, judge, "reordered, term")


def at_the_corners(recipe: SoftmaxLossInputs, dtype: str) -> SoftmaxArrays:
    """Boxes without area, equal boxes, boxes beyond the image, probabilities of 0 and 1."""
    x = recipe.arrays(dtype)
    y: LossArrays = corner(recipe.loss, dtype)
    return x._replace(boxes=y.boxes, targets=y.targets)


@st.composite
def corners(draw: st.DrawFn) -> SoftmaxLossInputs:
    return SoftmaxLossInputs(draw(CORNERS), draw(st.sampled_from([0.0, 1e4])))


@property_of(
    "softmax_set_loss_vjp.finite_at_the_corners",
    "terms and gradients are finite, and terms not negative, without objects, for boxes without area and for saturated scores",
    "method.md §5: images with no object are legal everywhere",
    corners(),
    into=PROPERTIES,
    needs=["softmax_set_loss"],
)
def finite_at_the_corners(impl: Any, recipe: SoftmaxLossInputs, dtype: str, judge: Judge) -> None:
    x = at_the_corners(recipe, dtype)
    for name, value in terms_of(impl, x, dtype).items():
        judge.all_finite(value, name)
        judge.holds(value >= -100 * UNIT_ROUNDOFF[dtype] * (1 + np.abs(x.z).max()), f"{name} = {value} is negative")
    dz, dboxes = gradients_of(impl, x, dtype)
    judge.all_finite(dz, "gradient of z")
    judge.all_finite(dboxes, "gradient of boxes")
    if not x.targets.valid.any():
        judge.holds(not dboxes.any(), "boxes have a gradient although there is no object")


@property_of(
    "softmax_set_loss_vjp.is_the_derivative",
    "the gradient of z is that of the weighted cross-entropy, v·(p − one-hot)/Σv; that of boxes agrees with central differences",
    "differentiating (K6); the matching is not differentiated",
    CONTINUOUS,
    into=PROPERTIES,
    always=USUAL_SOFTMAX_LOSSES,
)
def loss_has_the_gradient_of_its_definition(impl: Any, recipe: SoftmaxLossInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    assume(clear(x, dtype))
    dz, dboxes = gradients_of(impl, x, dtype)
    query, want = matched(x), softmax(x.z)
    for m in range(len(x.z)):
        image, target = np.nonzero(query[m] >= 0)
        wanted = np.full(x.z.shape[1:3], x.z.shape[-1] - 1)
        wanted[image, query[m, image, target]] = x.targets.labels[image, target]
        v = np.where(wanted == x.z.shape[-1] - 1, 0.1, 1.0)
        want[m] -= np.eye(x.z.shape[-1])[wanted]
        want[m] *= x.weights["class"] * v[..., None] / v.sum()
    exact = UNIT_ROUNDOFF[at_least_float32(dtype)]
    of_z = exact * (1 + float(np.abs(x.z).max())) * x.z.shape[-1]
    stored = UNIT_ROUNDOFF[dtype] * np.abs(want) + UNDERFLOW[dtype]
    judge.close(dz, want, of_z * x.weights["class"] + stored, "gradient of z")

    rng, step = np.random.default_rng(recipe.loss.seed), 1e-6
    direction = rng.uniform(0.5, 1, x.boxes.shape) * rng.choice([-1, 1], x.boxes.shape)
    # Whatever its class term says does not change with the boxes.
    odds_of = LossArrays(np.zeros_like(x.z[..., :-1]), x.boxes, x.targets, x.weights)
    values = [fixed_loss(odds_of._replace(boxes=x.boxes + t * direction), query) for t in (-step, 0.0, step)]
    slope, bend = (values[2] - values[0]) / (2 * step), abs(values[2] - 2 * values[1] + values[0]) / step
    assume(bend < 1e-3 * (1 + abs(slope)))  # L1 and GIoU have kinks, where no difference quotient is the gradient
    size = float(np.abs(dboxes).sum())
    limit = (1e-8 + exact * 50) * (2 * size + 1) + bend + UNIT_ROUNDOFF[dtype] * size + UNDERFLOW[dtype] * dboxes.size
    judge.along([(dboxes, direction)], slope, limit, "gradient of boxes")
