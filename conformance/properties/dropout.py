"""What must be true of attention dropout: each weight kept or dropped, and the same in the backward pass as in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.inputs.attention import AttentionArrays
from smca.conformance.inputs.distance import MANY_WEIGHTS, DropoutInputs, dropout_inputs
from smca.conformance.properties.attention import bounds, real_keys
from smca.conformance.properties.gradients import GRADIENTS
from smca.conformance.property import Judge, Property, property_of
from smca.reference import attention as oracle
from smca.reference.gaussian import key_minus_center

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

PROPERTIES: list[Property] = []

DROPOUT = (
    "O = (A∘m/(1 − p))·V with m ∈ {0, 1}, P(m = 0) = p; backwards reference/attention_backward.py (7) to (12) with the same m: "
    "V̄ = (A∘m/(1 − p))ᵀ·Ō, Ā = (Ō·Vᵀ)∘m/(1 − p)"
)
WIDE = ("float64", "float32", "bfloat16")
"""Not float16, in which light weights underflow: a weight of 0 would not prove that it was dropped."""


def result(impl: Any, x: AttentionArrays, recipe: DropoutInputs, dtype: str, seed: int) -> list[Array]:
    results = impl.smca_attention_dropout(x.grad_out, *x.arguments, recipe.rate, seed, dtype=dtype)
    return [np.asarray(array, dtype=np.float64) for array in results]


def weights_by(attend: Callable[[AttentionArrays], Array], x: AttentionArrays) -> Array:
    """A [B, h, N, L], read off the output for values of 0 and 1, as many keys at a time as there are channels."""
    keys, channels = x.level.v.shape[2:]
    columns = []
    for start in range(0, keys, channels):
        v, count = np.zeros_like(x.level.v), min(channels, keys - start)
        v[:, :, np.arange(start, start + count), np.arange(count)] = 1.0
        columns.append(attend(x._replace(level=x.level._replace(v=v)))[..., :count])
    return np.concatenate(columns, axis=-1)


def kept_by(impl: Any, x: AttentionArrays, recipe: DropoutInputs, dtype: str, seed: int) -> tuple[Array, Mask]:
    seen = weights_by(lambda changed: result(impl, changed, recipe, dtype, seed)[0], x)
    return seen, seen != 0


@property_of(
    "smca_attention_dropout.equals_the_oracle",
    "output and gradients are the oracle's for those weights that are kept, the same ones forward and backward",
    DROPOUT,
    dropout_inputs(),
    into=PROPERTIES,
    dtypes=WIDE,
)
def dropout_equals_the_oracle(impl: Any, recipe: DropoutInputs, dtype: str, judge: Judge) -> None:
    x, rate = recipe.arrays(dtype), recipe.rate
    seen, kept = kept_by(impl, x, recipe, dtype, recipe.seed)
    weights = weights_by(lambda changed: oracle.smca_attention(*changed.arguments), x)
    real, limits = real_keys(x)[:, None, :, None], bounds(impl, x, dtype)
    reach = weights_by(lambda one: bounds(impl, one, dtype).out, x) / (1 - rate)
    judge.close(seen, weights * kept / (1 - rate), reach, "A with dropout,")

    k, v = (np.where(real, array, 0.0) for array in (x.level.k, x.level.v))
    dropped, root_d = weights * kept / (1 - rate), x.q.shape[-1] ** 0.5
    dweights = x.grad_out @ np.swapaxes(v, -1, -2) * kept / (1 - rate)
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))
    difference = key_minus_center(x.level.center_xy, x.level.size)
    expected = (
        dropped @ v,
        dlogits @ k / root_d,
        np.swapaxes(dlogits, -1, -2) @ x.q / root_d,
        np.swapaxes(dropped, -1, -2) @ x.grad_out,
        x.level.precision_xy * np.einsum("bhnl,bhnla->bhna", dlogits, difference),
        np.einsum("bhnl,bhnla->bhna", dlogits, -0.5 * difference**2),
    )
    results, names = result(impl, x, recipe, dtype, recipe.seed), ("output", *GRADIENTS)
    for name, got, want, limit in zip(names, results, expected, (limits.out, *limits.gradients), strict=True):
        judge.close(got, want, limit / (1 - rate), f"for the weights kept, {name}")


@property_of(
    "smca_attention_dropout.drops_at_the_rate",
    "as many weights are dropped as the rate says: the same ones again for the same seed, and independently of them for another "
    "seed, image, head or query",
    DROPOUT,
    dropout_inputs(),
    into=PROPERTIES,
    dtypes=WIDE,
    always=MANY_WEIGHTS,
)
def drops_at_the_rate(impl: Any, recipe: DropoutInputs, dtype: str, judge: Judge) -> None:
    x, rate = recipe.arrays(dtype), recipe.rate
    _, kept = kept_by(impl, x, recipe, dtype, recipe.seed)
    real = np.broadcast_to(real_keys(x)[:, None, None], kept.shape)
    # Six standard deviations, with the operation's constant of 2: one false alarm in 10⁹ examples.
    deviation = (rate * (1 - rate) / int(real.sum())) ** 0.5
    judge.close(kept[real].mean(), 1 - rate, 3 * deviation + 1e-9, "fraction of the weights kept")
    _, again = kept_by(impl, x, recipe, dtype, recipe.seed)
    judge.holds(bool((again == kept).all()), "the same seed dropped other weights the second time")
    pairs: dict[str, tuple[Mask, Mask]] = {}
    for name, seed in (
        ("the next seed", recipe.seed + 1),
        ("a seed with other upper 32 bits", recipe.seed ^ (1 << 40)),
    ):
        _, other = kept_by(impl, x, recipe, dtype, (seed + 2**63) % 2**64 - 2**63)
        pairs[name] = kept[real], other[real]
    keys = kept.shape[3]
    for axis, name in enumerate(("image", "head", "query")):
        for shift in (-1, 0, 1):  # also against the keys beside: what depends on the sum of two indices shows there
            one, two = np.moveaxis(kept, axis, 0)[:-1], np.moveaxis(kept, axis, 0)[1:]
            there = np.moveaxis(real, axis, 0)[:-1, ..., max(0, -shift) : keys - max(0, shift)]
            there = there & np.moveaxis(real, axis, 0)[1:, ..., max(0, shift) : keys - max(0, -shift)]
            cut = one[..., max(0, -shift) : keys - max(0, shift)], two[..., max(0, shift) : keys - max(0, -shift)]
            pairs[f"the next {name}" + (f", keys moved by {shift}," if shift else "")] = cut[0][there], cut[1][there]
    for name, (one, two) in pairs.items():
        # Independent draws agree in p² + (1 − p)² of n cases; seven standard deviations of neighbours that overlap.
        agree = rate**2 + (1 - rate) ** 2
        if len(one) >= 50:
            limit = 7 * (agree * (1 - agree) / len(one)) ** 0.5
            judge.holds(
                abs(float((one == two).mean()) - agree) <= limit + 1e-9,
                f"{name} has the same fate for {(one == two).mean():.1%} of the weights, expected {agree:.1%} ± {limit:.1%}",
            )
