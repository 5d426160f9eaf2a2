"""What must be true beyond the paper: of queries with boxes, of cells that become queries, and of the losses that teach both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.anchored import CONFIGURATIONS, AnchoredArrays, AnchoredInputs, anchored_inputs
from smca.conformance.inputs.matching import LossArrays
from smca.conformance.inputs.model import PADDING_APART, ModelArrays
from smca.conformance.properties.loss import clear_matching
from smca.conformance.properties.model import check_derivative, groups_of, taken_as_given
from smca.conformance.property import Judge, Property, assume, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF, at_least_float32, round_to
from smca.reference import model as oracle
from smca.reference.boxes import box_iou, cxcywh_to_xyxy, generalized_box_iou
from smca.reference.decoder import FurtherQueries
from smca.reference.denoising import denoising_loss, noised_queries
from smca.reference.dense_head import spread_points
from smca.reference.dense_loss import (
    CELLS_PER_OBJECT,
    CLASS_WEIGHT,
    NEAR_CELL,
    NEAR_SIDE,
    NEGATIVE_WEIGHT,
    assign_cells,
    dense_loss,
)
from smca.reference.layers import sigmoid, softplus
from smca.reference.losses import Targets, match, set_loss

Array = npt.NDArray[np.float64]
Outputs = dict[str, Any]

PROPERTIES: list[Property] = []

QUERIES = "method.md §8; reference/decoder.py, equations (D10) to (D12), and reference/dense_head.py, (H1) to (H6)"
CELLS = "method.md §8; reference/dense_loss.py, equations (T1) to (T7)"
NOISED = "method.md §8; reference/denoising.py, equations (N1) to (N6)"
DETACHED = "method.md §8: position, prior and selection take a query's box as given"
WHOLE = ("float64", "float32")
LEARNED_FROM = ("logits", "boxes", "further_logits", "further_boxes", "cell_logits", "cell_boxes")
"""Outputs that a loss may ask something of."""
PERTURBATION = 2.0**-30


def forward(impl: Any, x: ModelArrays, further: FurtherQueries | None, dtype: str) -> Outputs:
    outputs = impl.anchored_forward(*x, further, dtype=dtype)
    return {name: np.asarray(value, dtype=np.float64) for name, value in outputs.items()}


def bounds(
    x: ModelArrays, further: FurtherQueries | None, seed: int, dtype: str, expected: Outputs
) -> dict[str, Array]:
    """As `model.bounds`: u · the condition number, measured on random nudges, · the number of layers."""
    rng = np.random.default_rng(seed)

    def nudge(values: Array) -> Array:
        return values * (1 + PERTURBATION * rng.choice([-1, 1], values.shape))

    moved = {name: np.zeros(()) for name in expected}
    for _ in range(2):
        params = {name: nudge(value) for name, value in x.params.items()}
        nudged: Outputs = oracle.forward(params, [nudge(f) for f in x.features], x.valid_sizes, x.config, further)
        for name, values in expected.items():
            axes = (0, 2, 3) if values.ndim == 4 else tuple(range(1, values.ndim))
            change = np.abs(nudged[name] - values.astype(float)).max(axis=axes, keepdims=True) / PERTURBATION
            moved[name] = np.maximum(moved[name], change)
    layers = x.config.encoder_layers + x.config.decoder_layers + 1
    return {n: UNIT_ROUNDOFF[dtype] * layers * (moved[n] + np.abs(expected[n]) + 1) for n in expected}


def clear_selection(outputs: Outputs, dtype: str) -> bool:
    """Whether rounding could not change which cells are peaks, or their order: no two scores of an image are close."""
    if "cell_logits" not in outputs:
        return True
    score = sigmoid(outputs["cell_logits"].max(-1))
    for row, padding in zip(score, outputs["cell_padding"].astype(bool), strict=True):
        ordered = np.sort(row[~padding])
        if len(ordered) > 1 and np.diff(ordered).min() < 1e3 * UNIT_ROUNDOFF[dtype]:
            return False
    return True


def compare(got: Outputs, want: Outputs, limits: dict[str, Array], judge: Judge, prefix: str = "") -> None:
    judge.holds(sorted(got) == sorted(want), f"{prefix}got the outputs {sorted(got)}, expected {sorted(want)}")
    for name in sorted(want):
        judge.close(got[name], want[name], limits[name], prefix + name)


@property_of(
    "anchored_forward.equals_the_oracle",
    "every output equals the oracle's: those of queries, of further queries and of cells",
    QUERIES,
    anchored_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
    always=CONFIGURATIONS,
)
def forward_equals_the_oracle(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected: Outputs = oracle.forward(*x.model, x.further)
    assume(clear_selection(expected, dtype))
    limits = bounds(x.model, x.further, recipe.model.seed, dtype, expected)
    compare(forward(impl, x.model, x.further, dtype), expected, limits, judge)


@property_of(
    "anchored_forward.batch_equals_singles",
    "each image of a batch gives the same as alone, on maps without the rows and columns that are padding for it",
    QUERIES,
    anchored_inputs(encoder=st.sampled_from(PADDING_APART)),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
    always=CONFIGURATIONS[:2] + CONFIGURATIONS[4:],
)
def batch_equals_singles(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole = forward(impl, x.model, x.further, dtype)
    assume(clear_selection(whole, dtype))
    limits = bounds(x.model, x.further, recipe.model.seed, dtype, oracle.forward(*x.model, x.further))
    levels, strides = x.model.levels_given, x.model.config.strides
    for b, size in enumerate(x.model.valid_sizes):
        # Cells of the coarsest level, so that levels beyond the backbone's nest as before.
        room = np.ceil(size / strides[-1]) * strides[-1]
        cells = [tuple(int(-(-side // stride)) for side in room) for stride in strides[:levels]]
        features = [f[b : b + 1, :, : c[0], : c[1]] for f, c in zip(x.model.features, cells, strict=True)]
        alone = x.model._replace(features=features, valid_sizes=size[None])
        further = x.further and FurtherQueries(
            x.further[0][b : b + 1], x.further[1][b : b + 1], x.further[2][b : b + 1]
        )
        got = forward(impl, alone, further, dtype)
        for name in ("logits", "boxes", "further_logits", "further_boxes"):
            if name in whole:
                judge.close(
                    got[name], whole[name][:, b : b + 1], 2 * limits[name][:, b : b + 1], f"of image {b}, {name}"
                )


@property_of(
    "anchored_forward.selected_queries_are_anchored_ones",
    "a query that starts on a cell's box gives what a query gives whose own box that is; the cells are those with the highest "
    "scores, peaks first, and without enough of them the rest start on spread points",
    QUERIES,
    anchored_inputs(query_init="selected", denoising_groups=0),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
    always=[CONFIGURATIONS[i] for i in (1, 4, 5, 6, 7)],
)
def selected_queries_are_anchored_ones(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    model = x.model._replace(features=[f[:1] for f in x.model.features], valid_sizes=x.model.valid_sizes[:1])
    got = forward(impl, model, None, dtype)
    assume(clear_selection(got, dtype))
    limits = bounds(model, None, recipe.model.seed, dtype, oracle.forward(*model))
    anchored = forward(impl, anchored_at(model, start_boxes(model, got)), None, dtype)
    for name in ("logits", "boxes"):
        judge.close(got[name], anchored[name], 4 * limits[name], f"against anchored queries, {name}")


def start_boxes(x: ModelArrays, outputs: Outputs) -> Array:
    """Where the queries of one image start, in words: by loops over the cells."""
    score = sigmoid(outputs["cell_logits"][0].max(-1))
    padding, ranked, first = outputs["cell_padding"][0].astype(bool), [], 0
    for rows, columns in level_sizes(x):
        for cell in range(rows * columns):
            row, column = divmod(cell, columns)
            around = [
                score[first + r * columns + c]
                for r in range(max(0, row - 1), min(rows, row + 2))
                for c in range(max(0, column - 1), min(columns, column + 2))
                if not padding[first + r * columns + c]
            ]
            if not padding[first + cell]:
                peak = score[first + cell] >= max(around)
                ranked.append((not peak, -score[first + cell], first + cell))
        first += rows * columns
    boxes = [outputs["cell_boxes"][0, cell] for _, _, cell in sorted(ranked)][: x.config.num_queries]
    spread = np.concatenate(
        [spread_points(x.config.num_queries), np.full((x.config.num_queries, 2), sigmoid(np.array(-1.5)))], -1
    )
    return np.array([*boxes, *spread[len(boxes) :]])


def level_sizes(x: ModelArrays) -> list[tuple[int, int]]:
    """(H, W) of every level that decoder and cells read."""
    sizes = [(f.shape[2], f.shape[3]) for f in x.features]
    while len(sizes) < len(x.config.strides):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    if x.config.halve_finest:
        sizes[0] = (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2))
    return sizes


def anchored_at(x: ModelArrays, boxes: Array) -> ModelArrays:
    """The same model with queries that have these boxes of their own, [N, 4]."""
    inside = np.clip(boxes, 1e-300, 1 - 2.0**-53)
    params = {**x.params, "decoder.query_anchor": np.log(inside) - np.log1p(-inside)}
    return x._replace(params=params, config=replace(x.config, query_init="anchors"))


@property_of(
    "anchored_forward_vjp.nothing_passes_where_boxes_are_given",
    "queries teach neither the cells that they start on, nor, but through the boxes made from it, a learned box",
    DETACHED,
    anchored_inputs(box_refinement=False, denoising_groups=0),
    into=PROPERTIES,
    dtypes=["float64"],
    examples_factor=0.25,
    always=[CONFIGURATIONS[1], CONFIGURATIONS[5]],
)
def nothing_passes_where_boxes_are_given(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype).model
    expected: Outputs = oracle.forward(*x)
    rng = np.random.default_rng(recipe.model.seed)
    seeds = {name: rng.normal(size=expected[name].shape) for name in ("logits", "boxes")}
    gradients = impl.anchored_forward_vjp(seeds, *x, None, dtype=dtype)
    for name, gradient in gradients.items():
        if name.startswith("dense_head."):
            judge.holds(not np.asarray(gradient).any(), f"{name} has a gradient from the queries' outputs")
    if x.config.query_init == "anchors":
        p = expected["boxes"]
        wanted = (seeds["boxes"] * p * (1 - p)).sum((0, 1))  # through (D8) alone, in every layer
        judge.close(gradients["decoder.query_anchor"], wanted, 1e-11 * (1 + np.abs(wanted)), "gradient of query_anchor")


@property_of(
    "anchored_forward_vjp.every_parameter",
    "the gradient of every parameter agrees with central differences of the oracle, boxes held fixed where they are taken as given",
    "the definition of a derivative; " + DETACHED,
    anchored_inputs(query_init="anchors"),
    into=PROPERTIES,
    dtypes=["float64"],
    examples_factor=0.25,
    always=[CONFIGURATIONS[2], CONFIGURATIONS[3]],
)
def gradient_of_every_parameter(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    arrays, rng = recipe.arrays(dtype), np.random.default_rng(recipe.model.seed)
    x, further = arrays.model, arrays.further
    expected: Outputs = oracle.forward(*x, further)
    boxes = np.concatenate([expected[name] for name in ("boxes", "further_boxes") if name in expected], axis=2)
    given = taken_as_given(x, boxes, None if further is None else further.box_logits)
    seeds = {name: rng.normal(size=expected[name].shape) for name in LEARNED_FROM if name in expected}
    gradients = impl.anchored_forward_vjp(seeds, *x, further, dtype=dtype)
    judge.holds(
        sorted(gradients) == sorted(x.params), f"got gradients of {sorted(gradients)}, expected {sorted(x.params)}"
    )
    size = float(sum(np.abs(seed * expected[name]).sum() for name, seed in seeds.items()))

    def along(moved: dict[str, Array], t: float) -> float:
        params = {**x.params, **{name: x.params[name] + t * direction for name, direction in moved.items()}}
        nudged: Outputs = oracle.forward(params, x.features, x.valid_sizes, x.config, further, given=given)
        return float(sum((seed * nudged[key]).sum() for key, seed in seeds.items()))

    for group in groups_of(x.params, 5 if recipe in CONFIGURATIONS else 2, rng):
        check_derivative(along, gradients, {name: x.params[name] for name in group}, size, rng, judge)


# Further queries, and the losses


@property_of(
    "noised_queries.equals_the_oracle",
    "boxes, labels and who sees whom equal the oracle's, whatever the padding of targets holds",
    NOISED,
    anchored_inputs(denoising_groups=st.integers(1, 2)),
    into=PROPERTIES,
    dtypes=WHOLE,
)
def noised_queries_equal_the_oracle(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected = noised_queries(x.targets, x.noise)
    held = np.where(x.targets.valid[..., None], x.targets.boxes, np.nan)
    box_logits, labels, sees = impl.noised_queries(
        Targets(x.targets.labels, held, x.targets.valid), x.noise, dtype=dtype
    )
    p = sigmoid(expected.box_logits)
    judge.close(box_logits, expected.box_logits, 16 * UNIT_ROUNDOFF[dtype] / (p * (1 - p)), "box logits")
    judge.close(labels, expected.labels, 0.0, "labels")
    judge.close(sees, expected.sees, 0.0, "sees")


def outputs_of(x: AnchoredArrays, dtype: str, seed: int) -> Outputs:
    """The oracle's outputs as a loss sees them: with values that `dtype` represents, and boxes that are not all alike."""
    outputs: Outputs = oracle.forward(*x.model, x.further)
    rng = np.random.default_rng(seed)
    if "cell_boxes" in outputs:
        # A cell that has found an object, here and there: otherwise no IoU counts.
        for b, t in zip(*np.nonzero(x.targets.valid), strict=True):
            near = np.abs(outputs["cell_anchors"][b, :, :2] - x.targets.boxes[b, t, :2]).max(-1).argsort()[:8]
            center, sides = np.split(x.targets.boxes[b, t], 2)
            moved = center + sides * rng.uniform(-0.2, 0.2, (len(near), 2))
            outputs["cell_boxes"][b, near] = np.concatenate(
                [moved, sides * rng.uniform(0.7, 1.2, moved.shape)], axis=-1
            )
        outputs["cell_boxes"] = np.clip(outputs["cell_boxes"], 0.0, 1.0)
    return {name: value if value.dtype == bool else round_to(value, dtype) for name, value in outputs.items()}


def expected_terms(outputs: Outputs, x: AnchoredArrays, classification: str) -> dict[str, float]:
    terms = set_loss(outputs, x.targets, x.weights, classification)
    if groups := x.model.config.denoising_groups:
        terms |= denoising_loss(outputs, x.targets, x.weights, groups, classification)
    if "cell_logits" in outputs:
        terms |= dense_loss(outputs, x.targets, x.weights)
    return terms | {"loss": sum(value for name, value in terms.items() if name != "loss")}


def terms_of(impl: Any, outputs: Outputs, x: AnchoredArrays, classification: str, dtype: str) -> dict[str, float]:
    terms = impl.training_loss(outputs, x.targets, x.weights, classification, dtype=dtype)
    return {name: float(value) for name, value in terms.items()}


def clear_choices(outputs: Outputs, x: AnchoredArrays, dtype: str) -> bool:
    """Whether rounding could not change the matching, nor which object owns which cell."""
    targets, gap = x.targets, 1e4 * UNIT_ROUNDOFF[at_least_float32(dtype)]
    if not clear_matching(LossArrays(outputs["logits"], outputs["boxes"], targets, x.weights), dtype):
        return False
    if "cell_logits" not in outputs:
        return True
    owner, goal = assign_cells(outputs, targets)
    rng, image, cell = np.random.default_rng(0), *np.nonzero(owner >= 0)
    anchors, true = outputs["cell_anchors"][image, cell][:, None], targets.boxes[image]  # [P, 1, 4], [P, T, 4]
    reach = np.maximum(NEAR_SIDE * true[..., 2:], NEAR_CELL * anchors[..., 2:])
    near = (np.abs(anchors[..., :2] - true[..., :2]) <= reach).all(-1) & targets.valid[image]
    iou = box_iou(cxcywh_to_xyxy(outputs["cell_boxes"][image, cell])[:, None], cxcywh_to_xyxy(true))
    if ((near & (iou == 0)).sum(-1) > 1).any():
        return False  # of two objects that a cell is near to and has not found, either may own it
    for _ in range(3):
        nudged = dict(outputs)
        for name in ("cell_logits", "cell_boxes", "cell_anchors"):
            nudged[name] = outputs[name] * (1 + gap * rng.choice([-1, 1], outputs[name].shape))
        other, other_goal = assign_cells(nudged, targets)
        if (other != owner).any() or np.abs(other_goal - goal).max(initial=0.0) > 1e3 * gap:
            return False
    return True


CLASSIFICATION = ("focal", "matchability")


@property_of(
    "training_loss.equals_the_oracle",
    "every term equals the oracle's, of layers, noised queries and cells, with either loss of classes",
    "method.md §5 and §8; " + CELLS + "; " + NOISED + "; reference/losses.py, equations (S8) and (S9)",
    anchored_inputs(),
    into=PROPERTIES,
    examples_factor=0.5,
    always=CONFIGURATIONS,
)
def loss_equals_the_oracle(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    outputs, u = outputs_of(x, dtype, recipe.model.seed), UNIT_ROUNDOFF[at_least_float32(dtype)]
    assume(clear_choices(outputs, x, dtype))
    for classification in CLASSIFICATION:
        want = expected_terms(outputs, x, classification)
        got = terms_of(impl, outputs, x, classification, dtype)
        judge.holds(sorted(got) == sorted(want), f"got the terms {sorted(got)}, expected {sorted(want)}")
        for name, value in want.items():
            judge.close([got[name]], [value], 200 * u * (abs(value) + 1), f"term {name}, {classification}")


@property_of(
    "training_loss.padding_of_targets",
    "what stands in the padding of targets changes nothing, NaN included, nor does the order of objects",
    "method.md §5 and §8: the padding of targets is no object, and objects are a set",
    anchored_inputs(denoising_groups=0),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
    always=[CONFIGURATIONS[4], CONFIGURATIONS[5]],
)
def padding_of_targets(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    outputs = outputs_of(x, dtype, recipe.model.seed)
    assume(clear_choices(outputs, x, dtype))
    t, order = x.targets, np.random.default_rng(recipe.model.seed).permutation(x.targets.valid.shape[1])
    valid = np.pad(t.valid[:, order], ((0, 0), (1, 2)))
    boxes = np.where(valid[..., None], np.pad(t.boxes[:, order], ((0, 0), (1, 2), (0, 0))), np.nan)
    labels = np.where(valid, np.pad(t.labels[:, order], ((0, 0), (1, 2))), 0)
    padded = x._replace(targets=Targets(labels, boxes, valid))
    for classification in CLASSIFICATION:
        want = terms_of(impl, outputs, x, classification, dtype)
        got = terms_of(impl, outputs, padded, classification, dtype)
        for name, value in want.items():
            judge.close([got[name]], [value], 200 * UNIT_ROUNDOFF[dtype] * (abs(value) + 1), f"padded, term {name}")


@property_of(
    "training_loss_vjp.cells_that_learn_a_box",
    "at most six cells per object learn a box, each of them unpadded and near the middle of its object",
    CELLS,
    anchored_inputs(dense_head=True, denoising_groups=0),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
    always=[CONFIGURATIONS[1], CONFIGURATIONS[5]],
)
def cells_that_learn_a_box(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    outputs = outputs_of(x, dtype, recipe.model.seed)
    gradients = impl.training_loss_vjp(outputs, x.targets, x.weights, "focal", dtype=dtype)
    for b in range(len(x.targets.valid)):
        (learning,) = np.nonzero(np.asarray(gradients["cell_boxes"])[b].any(-1))
        (real,) = np.nonzero(x.targets.valid[b])
        judge.holds(
            len(learning) <= CELLS_PER_OBJECT * len(real),
            f"{len(learning)} cells learn for {len(real)} objects",
        )
        for cell in learning:
            anchor, true = outputs["cell_anchors"][b, cell], x.targets.boxes[b, real]
            reach = np.maximum(NEAR_SIDE * true[:, 2:], NEAR_CELL * anchor[2:]) * (1 + 1e-5)
            near = (np.abs(true[:, :2] - anchor[:2]) <= reach).all(-1).any()
            judge.holds(bool(near), f"cell {cell} of image {b} learns a box, and is near no object")
            judge.holds(not outputs["cell_padding"][b, cell], f"cell {cell} of image {b} learns a box, and is padding")


@property_of(
    "training_loss_vjp.agrees_with_central_differences",
    "agrees with central differences of the oracle's loss, with matching, owners, goals, qualities and weights held fixed",
    "the definition of a derivative; method.md §8: assignments, goals and weights are taken as given",
    anchored_inputs(),
    into=PROPERTIES,
    dtypes=["float64"],
    examples_factor=0.25,
    always=CONFIGURATIONS[:3],
)
def loss_agrees_with_central_differences(impl: Any, recipe: AnchoredInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    outputs, step = outputs_of(x, dtype, recipe.model.seed), 1e-6
    assume(clear_choices(outputs, x, dtype))
    rng = np.random.default_rng(recipe.model.seed)
    gradients = impl.training_loss_vjp(outputs, x.targets, x.weights, "matchability", dtype=dtype)
    names = [name for name in LEARNED_FROM if name in outputs]
    judge.holds(sorted(gradients) == sorted(names), f"got gradients of {sorted(gradients)}, expected {sorted(names)}")
    held = fixed_loss(outputs, x)
    for name in names:
        direction = rng.uniform(0.5, 1, outputs[name].shape) * rng.choice([-1, 1], outputs[name].shape)
        values = [held({**outputs, name: outputs[name] + t * direction}) for t in (-step, 0.0, step)]
        wanted = (values[2] - values[0]) / (2 * step)
        # L1 and GIoU have kinks: where the slopes of both sides differ, no difference quotient is the gradient.
        if abs(values[2] - 2 * values[1] + values[0]) / step > 1e-3 * (1 + abs(wanted)):
            continue
        limit = (
            1e-8 * (np.abs(gradients[name]).sum() + abs(values[1]) + 1)
            + abs(values[2] - 2 * values[1] + values[0]) / step
        )
        judge.along([(gradients[name], direction)], wanted, limit, f"gradient of {name}")


def fixed_loss(at: Outputs, given: AnchoredArrays) -> Callable[[Outputs], float]:
    """The loss with matchability as a function of the outputs, whatever is taken as given being that of `at`."""
    targets, weights, groups = given.targets, given.weights, given.model.config.denoising_groups
    number = max(1, int(targets.valid.sum()))
    query = match(at["logits"], at["boxes"], targets, weights)
    image, target = np.nonzero(targets.valid)

    def pairs_loss(
        x: Array, b: Array, x0: Array, b0: Array, which: Any, labels: Any, true: Array, divisor: float
    ) -> float:
        iou = box_iou(cxcywh_to_xyxy(b0[which]), cxcywh_to_xyxy(true))
        z, matched = np.zeros(x.shape), np.zeros(x.shape, dtype=bool)
        z[(*which, labels)], matched[(*which, labels)] = iou**1.5, True
        v = 0.5 * np.where(matched, 1.0, sigmoid(x0) ** 1.5)
        found = b[which]
        giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(true))
        total = weights["class"] * (v * (z * softplus(-x) + (1 - z) * softplus(x))).sum()
        return float(
            (total + weights["l1"] * np.abs(found - true).sum() + weights["giou"] * (1 - giou).sum()) / divisor
        )

    def loss(o: Outputs) -> float:
        total = 0.0
        for m in range(len(query)):
            i, t = np.nonzero(query[m] >= 0)
            which = i, query[m, i, t]
            arguments = (o["logits"][m], o["boxes"][m], at["logits"][m], at["boxes"][m])
            total += pairs_loss(*arguments, which, targets.labels[i, t], targets.boxes[i, t], number)
        if groups:
            layers, batch, _, classes = o["further_logits"].shape
            shape = (layers, batch, groups, 2, targets.valid.shape[1])
            for m, g in np.ndindex(layers, groups):
                parts = []
                for source in (o, at):
                    x = source["further_logits"].reshape(*shape, classes)[m, :, g][image, :, target]  # [P, 2, K]
                    b = source["further_boxes"].reshape(*shape, 4)[m, :, g][image, :, target]
                    parts += [x, b]
                first = np.arange(len(image)), np.zeros(len(image), dtype=int)
                labels, true = targets.labels[image, target], targets.boxes[image, target]
                total += pairs_loss(parts[0], parts[1], parts[2], parts[3], first, labels, true, number * groups)
        if "cell_logits" in o:
            owner, goal = assign_cells(at, targets)
            i, c = np.nonzero(owner >= 0)
            t, cells = owner[i, c], CELLS_PER_OBJECT * number
            z = np.zeros(o["cell_logits"].shape)
            z[i, c, targets.labels[i, t]] = goal[i, c]
            v = np.where(z > 0, 1.0, NEGATIVE_WEIGHT * sigmoid(at["cell_logits"]) ** 2)
            v = CLASS_WEIGHT * v * ~at["cell_padding"][..., None]
            x, found, true = o["cell_logits"], o["cell_boxes"][i, c], targets.boxes[i, t]
            giou = generalized_box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(true))
            total += weights["class"] * float((v * (z * softplus(-x) + (1 - z) * softplus(x))).sum()) / number
            total += (weights["l1"] * np.abs(found - true).sum() + weights["giou"] * (1 - giou).sum()) / cells
        return float(total)

    return loss
