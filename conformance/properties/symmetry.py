"""What must not change smca_attention: other coordinates, another order, other members of a batch (docs/method.md §2, §3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.inputs.attention import AttentionArrays, AttentionInputs, attention_inputs
from smca.conformance.properties.attention import bounds, forward, framed, real_keys
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF
from smca.reference.attention import Level

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

HEADS = "method.md §3: G_i enters the logits of head i only; queries, heads and images don't see each other"
CELLS = "method.md, Notation: the cell in column i and row j has its centre at (i + ½, j + ½), index = row·W + column"


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
    "each image, head and query alone gives the same result as among others",
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
