"""What must be true of smca_attention (docs/method.md §2, §3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs_attention import AttentionArrays, AttentionInputs, attention_inputs
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.protocol import expanded_up_to
from smca.conformance.tolerances import UNIT_ROUNDOFF, AttentionBounds, attention_bounds
from smca.reference import attention as oracle
from smca.reference.attention import Level

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

DEFINITION = "method.md §2: A = softmax over keys(QKᵀ/√d + log G), O = A·V, log G = −½λ_x(x − c_x)² − ½λ_y(y − c_y)²"
PADDED = "method.md §2: padded keys get a logit of −∞, so their weight is 0 and nothing they hold is read"
HEADS = "method.md §3: G_i enters the logits of head i only; queries, heads and images don't see each other"
CELLS = "method.md, Notation: the cell in column i and row j has its centre at (i + ½, j + ½), index = row·W + column"


def bounds(impl: Any, x: AttentionArrays, dtype: str) -> AttentionBounds:
    return attention_bounds(x.q, x.level, x.grad_out, dtype, expanded_up_to(impl, dtype))


def forward(impl: Any, x: AttentionArrays, dtype: str) -> Array:
    return np.asarray(impl.smca_attention(*x.arguments, dtype=dtype), dtype=np.float64)


def poisoned(x: AttentionArrays) -> AttentionArrays:
    """NaN in the padded keys, inf in their values."""
    mask = x.level.key_padding_mask
    if mask is None:
        return x
    padded = mask[:, None, :, None]
    return x._replace(
        level=x.level._replace(k=np.where(padded, np.nan, x.level.k), v=np.where(padded, np.inf, x.level.v))
    )


def framed(x: AttentionArrays, before: tuple[int, int], after: tuple[int, int]) -> AttentionArrays:
    """The map inside a larger one, whose further cells are padded and hold NaN; centres move with the map."""
    rows, columns = x.level.size
    size = (before[0] + rows + after[0], before[1] + columns + after[1])
    inner = (slice(before[0], before[0] + rows), slice(before[1], before[1] + columns))

    def place(keys: Array) -> Array:
        b, h, _, d = keys.shape
        larger = np.full((b, h, *size, d), np.nan)
        larger[:, :, inner[0], inner[1]] = keys.reshape(b, h, rows, columns, d)
        return larger.reshape(b, h, -1, d)

    batch = x.q.shape[0]
    mask = np.ones((batch, *size), dtype=np.bool_)
    old = x.level.key_padding_mask
    mask[:, inner[0], inner[1]] = False if old is None else old.reshape(batch, rows, columns)
    center = x.level.center_xy + np.array([before[1], before[0]])
    level = Level(place(x.level.k), place(x.level.v), center, x.level.precision_xy, size, mask.reshape(batch, -1))
    return x._replace(level=level)


def plain_attention(x: AttentionArrays) -> Array:
    """Attention as everybody knows it, without a prior."""
    logits = x.q @ np.swapaxes(x.level.k, -1, -2) / np.sqrt(x.q.shape[-1])
    if x.level.key_padding_mask is not None:
        logits[np.broadcast_to(x.level.key_padding_mask[:, None, None], logits.shape)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ x.level.v)


def real_keys(x: AttentionArrays) -> npt.NDArray[np.bool_]:
    """[B, L]."""
    mask = x.level.key_padding_mask
    return np.ones((x.q.shape[0], x.level.k.shape[2]), dtype=np.bool_) if mask is None else ~mask


@property_of("smca_attention.equals_the_oracle", "equals the oracle", DEFINITION, attention_inputs(), into=PROPERTIES)
def equals_the_oracle(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.precision_zero_is_plain_attention",
    "a precision of 0 is exactly plain attention",
    "method.md §1: r = 0 is exactly DETR's attention",
    attention_inputs(precision=0.0),
    into=PROPERTIES,
)
def precision_zero_is_plain_attention(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), plain_attention(x), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.equal_keys_leave_the_gaussian",
    "where all keys are alike, the weights are the paper's Gaussian map",
    "method.md §1: "
    "G(x, y) = exp(−(x − c_x)²/(β·s_x²) − (y − c_y)²/(β·s_y²)) with λ = 2/(β·s²), normalised over the keys",
    attention_inputs(logit=st.sampled_from([0.0, 10.0]), precision=st.sampled_from([0.05, 0.5, 4.0]), centers="inside"),
    into=PROPERTIES,
)
def equal_keys_leave_the_gaussian(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    x = x._replace(level=x.level._replace(k=np.broadcast_to(x.level.k[:, :, :1], x.level.k.shape).copy()))
    scale, beta = np.sqrt(2 / (8.0 * x.level.precision_xy)), 8.0
    weight = oracle.gaussian_weight_map(x.level.center_xy, scale, beta, x.level.size)
    weight = weight.reshape(*weight.shape[:3], -1) * real_keys(x)[:, None, None]
    expected = weight @ x.level.v / weight.sum(-1, keepdims=True)
    # A Gaussian underflows where its logarithm doesn't: all padded but far keys. The bound then says nothing.
    usable = weight.sum(-1, keepdims=True) > 1e-200
    expected, got = np.where(usable, expected, 0.0), np.where(usable, forward(impl, x, dtype), 0.0)
    judge.close(got, expected, 2 * bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.padded_keys_are_never_read",
    "what padded keys hold changes nothing, NaN and inf included",
    PADDED,
    attention_inputs(padding=st.sampled_from(["some", "edge", "all but one"])),
    into=PROPERTIES,
)
def padded_keys_are_never_read(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, poisoned(x), dtype), forward(impl, x, dtype), bounds(impl, x, dtype).out, "output")


FRAMES = st.tuples(st.integers(0, 2), st.integers(0, 2))


@property_of(
    "smca_attention.padding_a_map_changes_nothing",
    "more padded rows and columns behind the map change nothing",
    PADDED,
    attention_inputs(),
    into=PROPERTIES,
)
def padding_a_map_changes_nothing(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    larger = framed(x, (0, 0), (1 + recipe.seed % 2, 2))
    limit = bounds(impl, x, dtype).out + bounds(impl, larger, dtype).out
    judge.close(forward(impl, larger, dtype), forward(impl, x, dtype), limit, "output")


@property_of(
    "smca_attention.shifting_grid_and_centers_changes_nothing",
    "shifting grid and centres together changes nothing",
    CELLS,
    attention_inputs(),
    into=PROPERTIES,
)
def shifting_grid_and_centers_changes_nothing(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    larger = framed(x, (1, 2), (0, 1))
    # x − c is the same difference of shifted numbers: c + 2 is rounded once more, which moves c by an ulp of the map.
    moved = larger.level.center_xy - np.array([2, 1])
    x = x._replace(level=x.level._replace(center_xy=moved))
    slack = _center_slack(x, larger, dtype)
    limit = bounds(impl, x, dtype).out + bounds(impl, larger, dtype).out + slack
    judge.close(forward(impl, larger, dtype), forward(impl, x, dtype), limit, "output")


def _center_slack(x: AttentionArrays, larger: AttentionArrays, dtype: str) -> Array:
    """What rounding the shifted centres to the implementation's dtype can change in the output, at most: λ·|x − c|·ulp."""
    u = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    moved = u * np.abs(larger.level.center_xy).max(initial=1.0)
    reach = np.abs(larger.level.center_xy).max(initial=1.0) + max(larger.level.size)
    change = 4 * x.level.precision_xy.sum(-1, keepdims=True) * reach * moved
    size = np.abs(np.where(real_keys(x)[:, None, :, None], x.level.v, 0)).max(axis=2, keepdims=True)
    return np.asarray(np.minimum(change, 2.0) * size)


@property_of(
    "smca_attention.swapping_axes_with_the_map_transposed",
    "transposing the map and swapping x and y changes nothing",
    CELLS,
    attention_inputs(),
    into=PROPERTIES,
)
def swapping_axes_with_the_map_transposed(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    rows, columns = x.level.size

    def transposed(keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
        ahead, behind = (keys.shape[:1], ()) if keys.ndim == 2 else (keys.shape[:2], keys.shape[3:])
        grid = keys.reshape(*ahead, rows, columns, *behind)
        return np.swapaxes(grid, len(ahead), len(ahead) + 1).reshape(keys.shape)

    mask = x.level.key_padding_mask
    other = Level(
        transposed(x.level.k),
        transposed(x.level.v),
        x.level.center_xy[..., ::-1].copy(),
        x.level.precision_xy[..., ::-1].copy(),
        (columns, rows),
        None if mask is None else transposed(mask),
    )
    swapped = forward(impl, x._replace(level=other), dtype)
    judge.close(swapped, forward(impl, x, dtype), 2 * bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.mirroring_changes_nothing",
    "mirroring the map and the centres changes nothing: the prior is symmetric",
    "method.md §2: log G depends on (x − c)² alone",
    attention_inputs(),
    into=PROPERTIES,
)
def mirroring_changes_nothing(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    rows, columns = x.level.size
    axis = recipe.seed % 2  # 0: left and right, 1: top and bottom
    extent = columns if axis == 0 else rows
    center = x.level.center_xy.copy()
    center[..., axis] = extent - center[..., axis]  # exact up to an ulp, so recompute the original from it
    original = x.level.center_xy.copy()
    original[..., axis] = extent - center[..., axis]
    cells = np.arange(rows * columns).reshape(rows, columns)
    order = (cells[:, ::-1] if axis == 0 else cells[::-1]).reshape(-1)
    mask = x.level.key_padding_mask
    mirrored = x._replace(
        level=Level(
            x.level.k[:, :, order],
            x.level.v[:, :, order],
            center,
            x.level.precision_xy,
            x.level.size,
            None if mask is None else mask[:, order],
        )
    )
    x = x._replace(level=x.level._replace(center_xy=original))
    limit = 2 * bounds(impl, x, dtype).out + _center_slack(x, x, dtype)
    judge.close(forward(impl, mirrored, dtype), forward(impl, x, dtype), limit, "output")


def _reordered(x: AttentionArrays, axis: int, order: npt.NDArray[np.int64]) -> AttentionArrays:
    """Images (axis 0), heads (1) or queries (2) in another order."""
    level, mask = x.level, x.level.key_padding_mask

    def take(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.take(array, order, axis=axis)

    if axis < 2:
        level = level._replace(k=take(level.k), v=take(level.v))
    if axis == 0 and mask is not None:
        level = level._replace(key_padding_mask=take(mask))
    level = level._replace(center_xy=take(level.center_xy), precision_xy=take(level.precision_xy))
    return AttentionArrays(take(x.q), level, take(x.grad_out))


def _check_order(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge, axis: int) -> None:
    x = recipe.arrays(dtype)
    order = np.random.default_rng(recipe.seed).permutation(x.q.shape[axis])
    expected = np.take(forward(impl, x, dtype), order, axis=axis)
    limit = 2 * np.take(bounds(impl, x, dtype).out, order, axis=axis)
    judge.close(forward(impl, _reordered(x, axis, order), dtype), expected, limit, "output")


@property_of(
    "smca_attention.reordering_queries",
    "reordering queries reorders the output",
    HEADS,
    attention_inputs(),
    into=PROPERTIES,
)
def reordering_queries(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    _check_order(impl, recipe, dtype, judge, axis=2)


@property_of(
    "smca_attention.reordering_heads",
    "reordering heads reorders the output",
    HEADS,
    attention_inputs(),
    into=PROPERTIES,
)
def reordering_heads(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    _check_order(impl, recipe, dtype, judge, axis=1)


@property_of(
    "smca_attention.reordering_images",
    "reordering images reorders the output",
    HEADS,
    attention_inputs(),
    into=PROPERTIES,
)
def reordering_images(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    _check_order(impl, recipe, dtype, judge, axis=0)


@property_of(
    "smca_attention.batch_equals_singles",
    "each image, head and query alone gives what it gives among others",
    HEADS,
    attention_inputs(),
    into=PROPERTIES,
)
def batch_equals_singles(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    whole, limit = forward(impl, x, dtype), 2 * bounds(impl, x, dtype).out
    rng = np.random.default_rng(recipe.seed)
    alone, at = x, []
    for axis in range(3):
        index = int(rng.integers(x.q.shape[axis]))
        at.append(index)
        alone = _reordered(alone, axis, np.array([index]))
    where = tuple(slice(i, i + 1) for i in at)
    judge.close(forward(impl, alone, dtype), whole[where], limit[where], f"output of image, head, query {at}")


@property_of(
    "smca_attention.output_inside_the_hull",
    "the output lies inside the convex hull of the values",
    "method.md §2: O = A·V, A ≥ 0, ΣA = 1",
    attention_inputs(),
    into=PROPERTIES,
)
def output_inside_the_hull(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    got, keep = forward(impl, x, dtype), real_keys(x)[:, None, :, None]
    judge.finite(got, "output")
    low = np.where(keep, x.level.v, np.inf).min(axis=2, keepdims=True)
    high = np.where(keep, x.level.v, -np.inf).max(axis=2, keepdims=True)
    u = UNIT_ROUNDOFF[dtype]
    slack = (2 * u + (x.level.k.shape[2] + 8) * min(u, 2.0**-24)) * np.maximum(np.abs(low), np.abs(high))
    clipped = np.clip(got, low, high)
    judge.close(got, clipped, np.broadcast_to(slack, got.shape), "output against the nearest value in the hull,")


@property_of(
    "smca_attention.large_logits",
    "logits of 10⁴ neither overflow nor lose the output",
    "method.md §2: softmax does not "
    "see a constant, so no exponential need exceed 1; nor q·k the range of its dtype, if it is divided by √d in time",
    attention_inputs(logit=1e4, channels=st.sampled_from([40, 8, 64])),
    into=PROPERTIES,
)
def large_logits(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.far_centers",
    "a centre far outside the map still tells its keys apart: log G is as exact as in its middle",
    "method.md §6: in half precision the logit must be formed from (x − c) directly, in float32",
    attention_inputs(logit=0.0, centers="outside", precision=st.sampled_from([4.0, 50.0, 0.5])),
    into=PROPERTIES,
)
def far_centers(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.infinite_precision_picks_the_nearest_key",
    "a precision without bounds picks the value of the nearest key",
    "method.md §2: as λ → ∞, log G of every key but the nearest falls behind without bounds",
    attention_inputs(
        logit=st.sampled_from([0.0, 1.0, 10.0]),
        precision=1e3,
        centers="cell",
        padding=st.sampled_from(["none", "some", "edge"]),
    ),
    into=PROPERTIES,
)
def infinite_precision_picks_the_nearest_key(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    column = np.floor(x.level.center_xy).astype(int)
    index = column[..., 1] * x.level.size[1] + column[..., 0]  # [B, h, N]
    expected = np.take_along_axis(x.level.v, index[..., None], axis=2)
    # Where the centre's own cell is padded, another key is nearest, and two may be equally near: not compared.
    usable = np.take_along_axis(np.broadcast_to(real_keys(x)[:, None], x.level.k.shape[:3]), index, axis=2)[..., None]
    got = forward(impl, x, dtype)
    # λ ≥ 200 and a distance of 1 cell: the next key is behind by 100 − 20, a factor of e⁻⁸⁰.
    limit = UNIT_ROUNDOFF[dtype] * 2 * np.abs(expected) + 1e-30
    judge.close(np.where(usable, got, 0.0), np.where(usable, expected, 0.0), limit, "output")
