"""What must be true of smca_attention where distances are large: far keys get exactly the weight they are due."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smca.conformance.inputs.attention import AttentionInputs, attention_inputs
from smca.conformance.inputs.distance import TIGHT, DistantInputs, distant_inputs
from smca.conformance.properties.attention import bounds, forward, real_keys
from smca.conformance.properties.gradients import GRADIENTS, backward
from smca.conformance.property import Judge, Property, property_of
from smca.conformance.tolerances import UNIT_ROUNDOFF
from smca.reference import attention as oracle
from smca.reference.gaussian import key_minus_center

Array = npt.NDArray[np.float64]

PROPERTIES: list[Property] = []

FAVOURED = (
    "method.md §2: the weight of a key is exp(QKᵀ/√d + log G), however large −log G is. A kernel that skips far keys "
    "must bound the whole logit, and declares in `skips_below` what it may leave out"
)


@property_of(
    "smca_attention.far_centers",
    "a centre far outside the map still tells its keys apart: log G is as exact as in its middle",
    "method.md §6: in half precision the logit must be formed from (x − c) directly, in float32",
    attention_inputs(
        logit=0.0, centers=st.sampled_from(["outside", "far"]), precision=st.sampled_from([4.0, 50.0, 0.5])
    ),
    into=PROPERTIES,
)
def far_centers(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention.infinite_precision_picks_the_nearest_key",
    "a precision that grows without bound picks the value of the nearest key that is not padded",
    "method.md §2: as λ → ∞, log G of every key but the nearest falls behind without bound",
    attention_inputs(
        logit=st.sampled_from([0.0, 1.0, 10.0]),
        precision=1e3,
        spread="even",
        centers=st.sampled_from(["cell", "inside"]),
    ),
    into=PROPERTIES,
)
def infinite_precision_picks_the_nearest_key(impl: Any, recipe: AttentionInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    squared = key_minus_center(x.level.center_xy, x.level.size) ** 2
    behind = 0.5 * np.einsum("bhna,bhnla->bhnl", x.level.precision_xy, squared)  # −log G
    behind = np.where(real_keys(x)[:, None, None], behind, np.inf)
    expected = np.take_along_axis(x.level.v, behind.argmin(-1)[..., None], axis=2)
    # Compared where the second key is behind by more than q·k can make up for, and by 50 more: its weight is then e⁻⁵⁰.
    nearest, second = np.sort(np.pad(behind, [(0, 0)] * 3 + [(0, 1)], constant_values=np.inf), axis=-1)[..., :2].T
    clear = (second - nearest > 2 * recipe.logit + 50 + 1e-3 * nearest).T[..., None]
    largest = np.abs(np.where(real_keys(x)[:, None, :, None], x.level.v, 0.0)).max(axis=2, keepdims=True)
    limit = UNIT_ROUNDOFF[dtype] * 2 * np.abs(expected) + behind.shape[-1] * np.exp(-50) * largest
    got = forward(impl, x, dtype)
    judge.close(np.where(clear, got, 0.0), np.where(clear, expected, 0.0), limit, "output")


@property_of(
    "smca_attention.distant_keys_count",
    "a key far from the centre counts with all the weight that q·k gives it",
    FAVOURED,
    distant_inputs(),
    into=PROPERTIES,
    always=TIGHT,
)
def distant_keys_count(impl: Any, recipe: DistantInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    judge.close(forward(impl, x, dtype), oracle.smca_attention(*x.arguments), bounds(impl, x, dtype).out, "output")


@property_of(
    "smca_attention_vjp.distant_keys_count",
    "a key far from the centre gets and passes on all the gradient that its weight implies",
    FAVOURED,
    distant_inputs(),
    into=PROPERTIES,
    always=TIGHT,
)
def gradients_of_distant_keys(impl: Any, recipe: DistantInputs, dtype: str, judge: Judge) -> None:
    x = recipe.arrays(dtype)
    expected = oracle.smca_attention_vjp(x.grad_out, *x.arguments)
    limits = bounds(impl, x, dtype).gradients
    for name, got, want, limit in zip(GRADIENTS, backward(impl, x, dtype), expected, limits, strict=True):
        judge.close(got, want, limit, name)
