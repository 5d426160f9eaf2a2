"""What must be true of multi_scale_smca_attention and of its gradients (docs/method.md §4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from smca.conformance.inputs.attention import USUAL_LEVELS, LevelsArrays, LevelsInputs, levels_inputs
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.protocol import expanded_up_to, skips_below
from smca.conformance.tolerances import AttentionBounds, accumulation_roundoff, attention_bounds
from smca.reference import attention as oracle

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

MIXED = (
    "method.md §4: O = Σ_j α_j·softmax over the keys of level j(QK_jᵀ/√d + log G_j)·V_j; α per query, shared by heads"
)
BACKWARD = "reference/attention_backward.py, equations (14) and (15): Ō_j = α_j·Ō, ᾱ_j = Σ over heads Ō·O_j"


def forward(impl: Any, x: LevelsArrays, dtype: str) -> Array:
    return np.asarray(impl.multi_scale_smca_attention(x.q, x.levels, x.level_weights, dtype=dtype), dtype=np.float64)


def of_levels(impl: Any, x: LevelsArrays, dtype: str) -> list[AttentionBounds]:
    """The bounds of each level, for the gradient that reaches it."""
    limit = expanded_up_to(impl, dtype)
    return [
        attention_bounds(x.q, level, x.level_weights[:, None, :, j, None] * x.grad_out, dtype, limit, skips_below(impl))
        for j, level in enumerate(x.levels)
    ]


def bound(impl: Any, x: LevelsArrays, dtype: str) -> Array:
    """Bound of the output: each level's bound, weighted, and one rounding per product and sum."""
    total, a = np.zeros(x.q.shape), accumulation_roundoff(dtype)
    for j, level in enumerate(of_levels(impl, x, dtype)):
        alpha = np.abs(x.level_weights)[:, None, :, j, None]
        magnitudes = np.abs(oracle.smca_attention(x.q, *x.levels[j]))
        rounding = (len(x.levels) + 2) * (2 * a if dtype in ("float64", "float32") else 2.0**-8)
        total += alpha * (level.out + rounding * magnitudes)
    return total


@property_of(
    "multi_scale_smca_attention.equals_the_oracle",
    "equals the oracle",
    MIXED,
    levels_inputs(),
    into=PROPERTIES,
    always=USUAL_LEVELS,
)
def equals_the_oracle(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected = oracle.multi_scale_smca_attention(x.q, x.levels, x.level_weights)
    judge.close(forward(impl, x, dtype), expected, bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention.one_level_is_single_scale",
    "one level with weight 1 equals single scale",
    MIXED,
    levels_inputs(),
    into=PROPERTIES,
    needs=["smca_attention"],
)
def one_level_is_single_scale(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    x = x._replace(levels=x.levels[:1], level_weights=np.ones_like(x.level_weights[..., :1]))
    single = impl.smca_attention(x.q, *x.levels[0], dtype=dtype)
    judge.close(forward(impl, x, dtype), single, 2 * bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention.one_hot_weights_pick_a_level",
    "one-hot weights pick a level, query by query",
    MIXED,
    levels_inputs(weights="one hot"),
    into=PROPERTIES,
    needs=["smca_attention"],
)
def one_hot_weights_pick_a_level(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    singles = [np.asarray(impl.smca_attention(x.q, *level, dtype=dtype), dtype=np.float64) for level in x.levels]
    picked = x.level_weights.argmax(-1)[:, None, :, None]
    expected = np.take_along_axis(np.stack(singles), picked[None], axis=0)[0]
    judge.close(forward(impl, x, dtype), expected, 2 * bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention.linear_in_the_weights",
    "doubled level weights double the output: nothing normalises them again, over levels or over keys",
    MIXED,
    levels_inputs(weights="any"),
    into=PROPERTIES,
)
def linear_in_the_weights(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    once, twice = forward(impl, x, dtype), forward(impl, x._replace(level_weights=2 * x.level_weights), dtype)
    judge.close(twice, 2 * once, 4 * bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention.reordering_levels",
    "reordering levels together with their weights changes nothing",
    MIXED,
    levels_inputs(),
    into=PROPERTIES,
)
def reordering_levels(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    other = x._replace(levels=x.levels[::-1], level_weights=x.level_weights[..., ::-1].copy())
    judge.close(forward(impl, other, dtype), forward(impl, x, dtype), 2 * bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention.padded_keys_are_never_read",
    "what padded keys of any level hold changes nothing",
    "method.md §2: padded keys get a logit of −∞",
    levels_inputs(padding="some"),
    into=PROPERTIES,
)
def padded_keys_are_never_read(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    levels = []
    for level in x.levels:
        padded = np.asarray(level.key_padding_mask)[:, None, :, None]
        levels.append(level._replace(k=np.where(padded, np.nan, level.k), v=np.where(padded, np.inf, level.v)))
    clean = forward(impl, x, dtype)
    judge.close(forward(impl, x._replace(levels=levels), dtype), clean, bound(impl, x, dtype), "output")


@property_of(
    "multi_scale_smca_attention_vjp.equals_the_oracle",
    "equals the oracle",
    BACKWARD,
    levels_inputs(),
    into=PROPERTIES,
    always=USUAL_LEVELS,
)
def gradients_equal_the_oracle(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    arguments = (x.grad_out, x.q, x.levels, x.level_weights)
    dq, per_level, dweights = impl.multi_scale_smca_attention_vjp(*arguments, dtype=dtype)
    want_q, want_levels, want_weights = oracle.multi_scale_smca_attention_vjp(*arguments)
    limits, choices = of_levels(impl, x, dtype), (expanded_up_to(impl, dtype), skips_below(impl))
    rounding = (len(x.levels) + 2) * accumulation_roundoff(dtype) if dtype in ("float64", "float32") else 2.0**-6
    # A level's weight multiplies the gradient before or after it is stored: one rounding per term either way.
    limit_q = sum(limit.dq for limit in limits) + rounding * sum(
        np.abs(oracle.smca_attention_vjp(x.level_weights[:, None, :, j, None] * x.grad_out, x.q, *level)[0])
        for j, level in enumerate(x.levels)
    )
    judge.close(dq, want_q, limit_q, "dq")
    for j, (got, want, limit) in enumerate(zip(per_level, want_levels, limits, strict=True)):
        for i, name in enumerate(("dk", "dv", "dcenter_xy", "dprecision_xy")):
            judge.close(got[i], want[i], limit.gradients[i + 1], f"level {j}: {name}")
    limit_weights = np.stack(
        [
            np.einsum(
                "bhnd,bhnd->bn",
                np.abs(x.grad_out),
                attention_bounds(x.q, level, x.grad_out, dtype, *choices).out
                + rounding * (2 + x.q.shape[1] * x.q.shape[3]) * np.abs(oracle.smca_attention(x.q, *level)),
            )
            for level in x.levels
        ],
        axis=-1,
    )
    judge.close(dweights, want_weights, limit_weights, "dlevel_weights")


@property_of(
    "multi_scale_smca_attention_vjp.weights_feel_their_level",
    "the gradient of a level's weight is that level's own output times the output's gradient, summed over heads and channels",
    BACKWARD,
    levels_inputs(),
    into=PROPERTIES,
    needs=["smca_attention"],
    dtypes=["float64", "float32"],
)
def weights_feel_their_level(impl: Any, recipe: LevelsInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    _, _, dweights = impl.multi_scale_smca_attention_vjp(x.grad_out, x.q, x.levels, x.level_weights, dtype=dtype)
    terms = x.q.shape[1] * x.q.shape[3] + 4
    for j, level in enumerate(x.levels):
        alone = np.asarray(impl.smca_attention(x.q, *level, dtype=dtype), dtype=np.float64)
        limit = attention_bounds(x.q, level, x.grad_out, dtype, expanded_up_to(impl, dtype), skips_below(impl)).out
        limit = limit + terms * accumulation_roundoff(dtype) * np.abs(alone)
        expected = np.einsum("bhnd,bhnd->bn", x.grad_out, alone)
        judge.close(
            np.asarray(dweights)[..., j], expected, np.einsum("bhnd,bhnd->bn", np.abs(x.grad_out), limit), f"level {j}:"
        )
