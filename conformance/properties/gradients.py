"""What must be true of the gradients of smca_attention (reference/attention_backward.py, equations (7) to (12))."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import LAYOUTS, USUAL, AttentionArrays, AttentionInputs, attention_inputs
from smca.conformance.properties.attention import PADDED, bounds, forward, poisoned, real_keys
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.protocol import expanded_up_to
from smca.reference import attention as oracle

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

BACKWARD = "reference/attention_backward.py, equations (7) to (12)"
GRADIENTS = ("dq", "dk", "dv", "dcenter_xy", "dprecision_xy")


def backward(impl: Any, x: AttentionArrays, dtype: str) -> tuple[Array, ...]:
    gradients = impl.smca_attention_vjp(x.grad_out, *x.arguments, dtype=dtype)
    return tuple(np.asarray(gradient, dtype=np.float64) for gradient in gradients)


@property_of(
    "smca_attention_vjp.equals_the_oracle",
    "equals the oracle",
    BACKWARD,
    attention_inputs(),
    into=PROPERTIES,
    always=[*USUAL, *LAYOUTS],
)
def equals_the_oracle_of_gradients(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected = oracle.smca_attention_vjp(x.grad_out, *x.arguments)
    limits = bounds(impl, x, dtype).gradients
    for name, got, want, limit in zip(GRADIENTS, backward(impl, x, dtype), expected, limits, strict=True):
        judge.close(got, want, limit, name)


@property_of(
    "smca_attention_vjp.agrees_with_central_differences",
    "agrees with central differences of the implementation's own output",
    "the definition of a derivative",
    attention_inputs(
        logit=st.sampled_from([1.0, 0.0, 10.0]),
        precision=st.sampled_from([0.5, 0.0, 0.05, 4.0]),
        queries=st.sampled_from([1, 3]),
    ),
    into=PROPERTIES,
    dtypes=["float64"],
    needs=["smca_attention"],
)
def agrees_with_central_differences(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    gradients = backward(impl, x, dtype)
    rng, step = np.random.default_rng(recipe.seed), 1e-5
    leaves = {"q": x.q, **{name: getattr(x.level, name) for name in ("k", "v", "center_xy", "precision_xy")}}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        direction = rng.normal(size=leaf.shape)

        def along(t: float, name: str = name, moved: Array = direction, leaf: Array = leaf) -> float:
            changed: dict[str, Any] = {name: leaf + t * moved}
            q = changed.pop("q", x.q)
            arrays = AttentionArrays(q, x.level._replace(**changed), x.grad_out)
            return float((forward(impl, arrays, dtype) * x.grad_out).sum())

        wanted = (along(step) - along(-step)) / (2 * step)
        coarse = (along(2 * step) - along(-2 * step)) / (4 * step)
        # Truncation is a third of the change from step to 2·step; cancellation costs rounding / step.
        scale = float(np.abs(x.grad_out).sum() * np.abs(x.level.v).max())
        expanded = 1.0 + float(recipe.precision * sum(recipe.size) ** 2 * 4) * (expanded_up_to(impl, dtype) > 0)
        limit = abs(coarse - wanted) + 2.0**-53 / step * scale * (50 + recipe.logit * recipe.channels) * expanded
        judge.close((gradient * direction).sum(), wanted, limit, f"d{name} along a random direction, ")


@property_of(
    "smca_attention_vjp.padded_keys_get_no_gradient",
    "what padded keys hold changes no gradient, and their own gradients are 0",
    PADDED,
    attention_inputs(padding=st.sampled_from(["some", "edge", "all but one"])),
    into=PROPERTIES,
)
def padded_keys_get_no_gradient(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    clean, limits = backward(impl, x, dtype), bounds(impl, x, dtype).gradients
    for name, got, want, limit in zip(GRADIENTS, backward(impl, poisoned(x), dtype), clean, limits, strict=True):
        judge.close(got, want, limit, f"with NaN in padded keys, {name}")
    padded = ~real_keys(x)[:, None, :, None]
    for name, gradient in zip(("dk", "dv"), clean[1:3], strict=True):
        judge.holds(not np.any(np.where(padded, gradient, 0.0)), f"{name} is not 0 at a padded key")


@property_of(
    "smca_attention_vjp.flat_prior_has_no_center",
    "a centre gets no gradient where the precision is 0, and values that are all alike give none to q, k and λ",
    "reference/attention_backward.py (9) and (11): S̄ sums to 0 over the keys; c̄ is λ times a sum",
    attention_inputs(precision=0.0),
    into=PROPERTIES,
)
def flat_prior_has_no_center(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.holds(not backward(impl, x, dtype)[3].any(), "dcenter_xy is not 0 although precision_xy is")
    alike = x._replace(level=x.level._replace(v=np.broadcast_to(x.level.v[:, :, :1], x.level.v.shape).copy()))
    limits = bounds(impl, alike, dtype).gradients
    for i in (0, 1, 4):
        got = backward(impl, alike, dtype)[i]
        judge.close(got, np.zeros_like(got), limits[i], f"with all values alike, {GRADIENTS[i]}")
