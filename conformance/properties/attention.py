"""What must be true of smca_attention (docs/method.md §2, §3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import (
    LAYOUTS,
    RING,
    SEEDS,
    STEEP,
    USUAL,
    AttentionArrays,
    AttentionInputs,
    attention_inputs,
)
from smca.conformance.inputs.distance import ManyInputs
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.protocol import expanded_up_to, skips_below
from smca.conformance.tolerances import HALVES, UNIT_ROUNDOFF, AttentionBounds, attention_bounds
from smca.reference import attention as oracle
from smca.reference.attention import Level

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

DEFINITION = "method.md §2: A = softmax over keys(QKᵀ/√d + log G), O = A·V, log G = −½λ_x(x − c_x)² − ½λ_y(y − c_y)²"
PADDED = "method.md §2: padded keys get a logit of −∞, so their weight is 0 and nothing they hold is read"


def bounds(impl: Any, x: AttentionArrays, dtype: str) -> AttentionBounds:
    return attention_bounds(x.q, x.level, x.grad_out, dtype, expanded_up_to(impl, dtype), skips_below(impl))


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
    """The map inside a larger one, whose additional cells are padded and hold NaN; centres move with the map."""
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
    """Standard attention, without a prior."""
    logits = x.q @ np.swapaxes(x.level.k, -1, -2) / np.sqrt(x.q.shape[-1])
    if x.level.key_padding_mask is not None:
        logits[np.broadcast_to(x.level.key_padding_mask[:, None, None], logits.shape)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ x.level.v)


def real_keys(x: AttentionArrays) -> npt.NDArray[np.bool_]:
    """[B, L] bool, True where the key is not padded."""
    mask = x.level.key_padding_mask
    return np.ones((x.q.shape[0], x.level.k.shape[2]), dtype=np.bool_) if mask is None else ~mask


@property_of(
    "smca_attention.equals_the_oracle",
    "equals the oracle",
    DEFINITION,
    attention_inputs(),
    into=PROPERTIES,
    always=[*USUAL, *LAYOUTS, STEEP, RING],
)
def equals_the_oracle(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.small_weights_add_up",
    "however many keys of small weight there are, values that are all the same come out as they are",
    "method.md §2: the weights of A add up to 1; sums over keys are accumulated in at least float32",
    st.builds(ManyInputs, st.sampled_from([(40, 64), (64, 33)]), seed=SEEDS),
    into=PROPERTIES,
    dtypes=HALVES,
    examples_factor=0.1,
    always=[ManyInputs()],
)
def small_weights_add_up(impl: Any, recipe: ManyInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), x.level.v[:, :, :1], bounds(impl, x, dtype).out, "output")


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
    beta = 8.0
    with np.errstate(divide="ignore"):  # an axis without a prior has a Gaussian of infinite width
        scale = np.sqrt(2 / (beta * x.level.precision_xy))
    weight = oracle.gaussian_weight_map(x.level.center_xy, scale, beta, x.level.size)
    weight = weight.reshape(*weight.shape[:3], -1) * real_keys(x)[:, None, None]
    total = weight.sum(-1, keepdims=True)
    # A Gaussian can underflow where its logarithm does not (all keys but far ones padded): not compared.
    usable = total > 1e-200
    expected = np.where(usable, weight @ x.level.v / np.where(usable, total, 1.0), 0.0)
    got = np.where(usable, forward(impl, x, dtype), 0.0)
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
    "smca_attention.output_inside_the_hull",
    "the output lies inside the convex hull of the values",
    "method.md §2: O = A·V, A ≥ 0, ΣA = 1",
    attention_inputs(),
    into=PROPERTIES,
)
def output_inside_the_hull(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    got, keep = forward(impl, x, dtype), real_keys(x)[:, None, :, None]
    judge.all_finite(got, "output")
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
