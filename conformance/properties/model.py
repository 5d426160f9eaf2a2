"""What must be true of the whole model, from backbone features to logits and boxes, and of the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.model import CONFIGURATIONS, PADDING_APART, ModelArrays, ModelInputs, model_inputs
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF
from smca.reference import model as oracle
from smca.reference.config import has_anchors
from smca.reference.position import key_padding_mask

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

MODEL = (
    "method.md §1 to §5; reference/model.py, equations (M1) to (M7), with those of decoder, encoder and softmax_scores"
)
PADDED = "method.md §2 and §5: padded keys get a logit of −∞; boxes are relative to the unpadded image"
NAMES = ("logits", "boxes")
"""What every configuration has; with class_scores="softmax" there is "class_logits", too."""
WHOLE = ("float64", "float32")
"""Not half precision, in which only parts of a model run (autocast): no single dtype applies to the whole."""
PERTURBATION = 2.0**-30


def forward(impl: Any, x: ModelArrays, dtype: str, padded_size: tuple[int, int] | None = None) -> dict[str, Array]:
    batch = {} if padded_size is None else {"padded_size": padded_size}
    outputs = impl.forward(x.params, x.features, x.valid_sizes, x.config, dtype=dtype, **batch)
    return {name: np.asarray(outputs[name], dtype=np.float64) for name in names_of(x)}


def names_of(x: ModelArrays) -> tuple[str, ...]:
    return (*NAMES, "class_logits") if x.config.class_scores == "softmax" else NAMES


def bounds(
    x: ModelArrays,
    seed: int,
    dtype: str,
    expected: dict[str, Array] | None = None,
    padded_size: tuple[int, int] | None = None,
) -> dict[str, Array]:
    """u · the condition number, measured: how far the oracle's answer moves when every parameter and every feature is
    moved by a relative amount, of random sign, per unit of that amount; times the number of layers, each of which rounds.
    `expected`: the oracle's answer, if it is known.
    """
    rng, expected = np.random.default_rng(seed), expected or oracle.forward(*x, padded_size=padded_size)
    moved = {name: np.zeros(()) for name in names_of(x)}
    for _ in range(2):

        def nudge(values: Array) -> Array:
            return values * (1 + PERTURBATION * rng.choice([-1, 1], values.shape))

        params = {name: nudge(value) for name, value in x.params.items()}
        features = [nudge(f) for f in x.features]
        nudged = oracle.forward(params, features, x.valid_sizes, x.config, padded_size=padded_size)
        for name in moved:
            # The largest entry per image: a single entry may happen not to move.
            change = np.abs(nudged[name] - expected[name]).max(axis=(0, 2, 3), keepdims=True) / PERTURBATION
            moved[name] = np.maximum(moved[name], change)
    layers = x.config.encoder_layers + x.config.decoder_layers + 1
    return {name: UNIT_ROUNDOFF[dtype] * layers * (moved[name] + np.abs(expected[name]) + 1) for name in moved}


def compare(
    got: dict[str, Array], want: dict[str, Array], limits: dict[str, Array], judge: Judge, prefix: str = ""
) -> None:
    for name in got:
        judge.close(got[name], want[name], limits[name], prefix + name)


@property_of(
    "forward.equals_the_oracle",
    "logits and boxes of every layer equal the oracle's",
    MODEL,
    model_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.5,
    always=CONFIGURATIONS,
)
def model_equals_the_oracle(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    size = x.padded_size
    expected = oracle.forward(*x, padded_size=size)
    compare(forward(impl, x, dtype, size), expected, bounds(x, recipe.seed, dtype, expected, size), judge)


@property_of(
    "forward.padding_changes_nothing",
    "an image beside a larger one, with NaN in its padded cells, gives the same result as alone",
    PADDED + ' (with encoder="conv" it does not: reference/encoder_conv.py)',
    model_inputs(encoder=st.sampled_from(PADDING_APART)),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def padding_changes_nothing(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    # The first image alone, on maps that just hold it; then on maps with more rows and columns, full of NaN.
    size = x.valid_sizes[:1]
    strides = x.config.strides[: x.levels_given]
    cells = [tuple(int(-(-side // stride)) for side in size[0]) for stride in strides]
    alone = [f[:1, :, : c[0], : c[1]].copy() for f, c in zip(x.features, cells, strict=True)]
    coarsest, factor = x.config.strides[-1], 1 + recipe.seed % 2
    room = (np.ceil(size[0] / coarsest) + factor) * coarsest  # whole cells of every level
    padded_features = []
    for feature, stride in zip(alone, strides, strict=True):
        rows, columns = (int(-(-side // stride)) for side in room)
        larger = np.full((1, feature.shape[1], rows, columns), np.nan)
        larger[:, :, : feature.shape[2], : feature.shape[3]] = feature
        padded_features.append(larger)
    one = x._replace(features=alone, valid_sizes=size)
    limits = {name: 2 * value for name, value in bounds(one, recipe.seed, dtype).items()}
    compare(
        forward(impl, x._replace(features=padded_features, valid_sizes=size), dtype),
        forward(impl, one, dtype),
        limits,
        judge,
    )


@property_of(
    "forward.padded_cells_are_never_read",
    "what the features hold in padded cells, NaN included, changes nothing",
    PADDED + "; reference/encoder_conv.py, equation (C1)",
    model_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
    always=[recipe for recipe in CONFIGURATIONS if ("encoder", "conv") in recipe.options],
)
def padded_cells_are_never_read(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    hidden = []
    for feature, stride in zip(x.features, x.config.strides, strict=False):
        mask = key_padding_mask(x.valid_sizes / stride, (feature.shape[2], feature.shape[3]))
        hidden.append(np.where(mask.reshape(-1, 1, *feature.shape[2:]), np.nan, feature))
    limits = {name: 2 * value for name, value in bounds(x, recipe.seed, dtype).items()}
    compare(forward(impl, x._replace(features=hidden), dtype), forward(impl, x, dtype), limits, judge)


@property_of(
    "forward.batch_equals_singles",
    "each image of a batch gives the same result as alone on the same maps",
    PADDED,
    model_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def batch_equals_singles(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole, limits = forward(impl, x, dtype), bounds(x, recipe.seed, dtype)
    for b in range(len(x.valid_sizes)):
        one = slice(b, b + 1)
        alone = forward(impl, x._replace(features=[f[one] for f in x.features], valid_sizes=x.valid_sizes[one]), dtype)
        part = {name: whole[name][:, one] for name in whole}
        compare(part, alone, {name: 2 * limits[name][:, one] for name in whole}, judge, f"of image {b}, ")


@property_of(
    "forward.reordering_queries",
    "queries reordered, with what is learned for them, reorder the output: they are a set",
    "method.md, first paragraph: learned object queries in a set; nothing in the decoder knows their order",
    model_inputs(),
    into=PROPERTIES,
    dtypes=WHOLE,
    examples_factor=0.25,
)
def reordering_queries(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    order = np.random.default_rng(recipe.seed).permutation(x.config.num_queries)
    params = {
        n: v[order] if n in ("decoder.query_position", "decoder.query_center") else v for n, v in x.params.items()
    }
    limits = {name: 2 * value for name, value in bounds(x, recipe.seed, dtype).items()}
    expected = {name: value[:, :, order] for name, value in forward(impl, x, dtype).items()}
    limits = {name: np.broadcast_to(limits[name], expected[name].shape)[:, :, order] for name in expected}
    compare(forward(impl, x._replace(params=params), dtype), expected, limits, judge)


def taken_as_given(x: ModelArrays, boxes: Array, further_logits: Array | None = None) -> list[Array] | None:
    """The box logits through which no gradient passes, for every layer of the oracle: `reference.decoder`, (D9) and (D10).

    Args:
        x: the model.
        boxes: that it gives, [M, B, N, 4], of further queries as well.
        further_logits: [B, D, 4], what these start on.
    """
    if not (x.config.box_refinement or has_anchors(x.config)):
        return None
    first = np.zeros(boxes.shape[1:])
    if has_anchors(x.config):
        anchors = np.broadcast_to(x.params["decoder.query_anchor"], (len(first), x.config.num_queries, 4))
        first = anchors if further_logits is None else np.concatenate([anchors, further_logits], axis=1)
    if not x.config.box_refinement:
        return [first] * len(boxes)
    return [first, *(np.log(boxes) - np.log1p(-boxes))[:-1]]


def groups_of(names: Iterable[str], count: int, rng: np.random.Generator) -> list[list[str]]:
    """All of them, in `count` groups."""
    shuffled = rng.permutation(sorted(names)).tolist()
    return [group for group in (shuffled[start::count] for start in range(count)) if group]


def check_derivative(
    along: Callable[[dict[str, Array], float], float],
    gradients: Mapping[str, Any],
    params: Mapping[str, Array],
    size: float,
    rng: np.random.Generator,
    judge: Judge,
) -> None:
    """Gradients of these parameters, along one random direction in all of them, against central differences.

    Args:
        along: the function that is differentiated, so far from where it is along a direction.
        gradients: under test, by name.
        params: those that are moved together.
        size: of the terms of which the function is the sum.
    """
    step = 2.0**-17
    # Together they move what comes after them as far as one alone would.
    moved = {name: rng.normal(size=value.shape) / len(params) ** 0.5 for name, value in params.items()}
    ahead, here, behind = along(moved, step), along(moved, 0.0), along(moved, -step)
    far_ahead, far_behind = along(moved, 2 * step), along(moved, -2 * step)
    wanted, coarse = (ahead - behind) / (2 * step), (far_ahead - far_behind) / (4 * step)
    noise = 2.0**-53 / step * (size + 1)
    # Slopes ahead and behind differ in proportion to the step, unless a ReLU switches in between: then they are not comparable.
    bend, far_bend = ahead - 2 * here + behind, (far_ahead - 2 * here + far_behind) / 2
    if abs(bend) / step > 0.75 * abs(far_bend) / step + 4 * noise:
        return
    # Many ReLUs that switch look like a bend. Of three estimates of their effect, each may be small by chance, hardly all.
    limit = abs(coarse - wanted) + (abs(bend) + abs(far_bend)) / step + noise + 1e-6 * abs(wanted)
    parts = [(gradients[name], direction) for name, direction in moved.items()]
    judge.along(parts, wanted, limit, f"gradient of {', '.join(params)}")


@property_of(
    "forward_vjp.every_parameter",
    "the gradient of every parameter agrees with central differences of the oracle, boxes held fixed where they are taken as given",
    "the definition of a derivative; reference/decoder.py, (D9): with box refinement none passes from a layer's boxes to the next",
    model_inputs(decoder_layers=st.integers(1, 3), encoder_layers=st.integers(0, 1)),
    into=PROPERTIES,
    dtypes=["float64"],
    examples_factor=0.1,
    always=CONFIGURATIONS,
)
def gradient_of_every_parameter(impl: Any, recipe: ModelInputs, dtype: str, judge: Judge) -> None:
    x, rng = recipe.arrays(dtype), np.random.default_rng(recipe.seed)
    expected = oracle.forward(*x)
    given = taken_as_given(x, expected["boxes"])
    seeds = [rng.normal(size=expected[name].shape) for name in NAMES]
    gradients = impl.forward_vjp(*seeds, *x, dtype=dtype)
    judge.holds(
        sorted(gradients) == sorted(x.params), f"got gradients of {sorted(gradients)}, expected {sorted(x.params)}"
    )
    size = float(sum(np.abs(seed * expected[name]).sum() for seed, name in zip(seeds, NAMES, strict=True)))

    def along(moved: dict[str, Array], t: float) -> float:
        params = {**x.params, **{name: x.params[name] + t * direction for name, direction in moved.items()}}
        nudged = oracle.forward(params, x.features, x.valid_sizes, x.config, given=given)
        return float(sum((seed * nudged[key]).sum() for seed, key in zip(seeds, NAMES, strict=True)))

    for group in groups_of(x.params, 5 if recipe in CONFIGURATIONS else 2, rng):
        check_derivative(along, gradients, {name: x.params[name] for name in group}, size, rng, judge)
