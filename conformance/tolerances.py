"""How far an implementation may be from the oracle: derived from the input, by a running error analysis.

    bound = CONSTANTS[operation] · roundings · unit roundoff · condition number of the input,       entry by entry

Two unit roundoffs appear: u, of the dtype that holds the inputs and the result, and a, of the dtype in which
sums are accumulated (float32 for half precision, else u). The condition number is what the equations of the reference give
when every term is replaced by its magnitude and every error by its worst sign; so entries that the
arithmetic determines well are held tightly, in the same array as entries that it does not.

Attention (reference/attention_….py, equations (4) to (12)). The error of a logit is at most

    (16) κ_l = (|q|·|k_l|/√d)·(2u + u² + (d + 2)·a) + g_l·8a

(q is scaled and q·k is stored: two roundings, whose product matters in bfloat16 at logits of 10⁴)

with g_l = ½λ_x·X² + ½λ_y·Y², where X = |x − c| if the prior is formed from the difference, or X = |x| + |c| (from the
middle of the map) in the expanded form, whose terms of that size cancel. A weight A_l then has the relative error

    (17) ε_l = κ_l + log Σ_l' A_l'·exp(κ_l') + (L + 8)·a + 2u,      an absolute one of α_l = min(1, A_l·(exp(ε_l) − 1))

and the output at most Σ_l (α_l + 2u·A_l)·|v_l|. The backward pass propagates α through (7) to (12) likewise.
In addition, every stored number may be off by η, half the dtype's smallest number above 0: smaller numbers underflow.

A bound above twice the largest value is more than an error can be; there, twice the largest value is the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smca.reference.attention import Level
from smca.reference.gaussian import key_minus_center

Array = npt.NDArray[np.float64]

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""u: the largest relative error of rounding to nearest."""

HALVES = ("float16", "bfloat16")
"""The dtypes of half precision."""

UNDERFLOW = {"float64": 2.0**-1075, "float32": 2.0**-127, "float16": 2.0**-25, "bfloat16": 2.0**-127}
"""η: the largest absolute error of rounding a number that underflows. In float32 and bfloat16, that of a number flushed
to 0: processors may flush below 2⁻¹²⁶, and vector units do."""

CONSTANTS: dict[str, tuple[float, str]] = {
    "smca_attention": (1.0, "every rounding is counted"),
    "smca_attention_vjp": (2.0, "half precision stores weights and their gradients once more than is counted"),
    "smca_attention_dropout": (2.0, "as smca_attention_vjp; and divided by 1 − rate"),
    "multi_scale_smca_attention": (2.0, "each level's output is stored once more"),
    "multi_scale_smca_attention_vjp": (2.0, "as smca_attention_vjp"),
    "match_cost": (4.0, "sigmoid, logarithm and power: some four roundings per factor"),
    "assign": (1.0, "every sum of dual variables is counted"),
    "generalized_box_iou": (1.0, "every rounding is counted"),
    "set_loss": (2.0, "powers: two roundings per factor"),
    "set_loss_vjp": (4.0, "compared along a random direction: steps are not counted one by one"),
    "forward": (8.0, "a condition number that is measured on random nudges misses the worst ones"),
    "forward_vjp": (4.0, "truncation of the differences is estimated, not bounded"),
    "anchored_forward": (8.0, "as forward"),
    "anchored_forward_vjp": (4.0, "as forward_vjp"),
    "noised_queries": (1.0, "every rounding is counted"),
    "training_loss": (1.0, "sums of at most a few hundred terms, each of the size of their sum"),
    "training_loss_vjp": (4.0, "as set_loss_vjp"),
    "log_odds": (2.0, "exponential and logarithm: two roundings"),
    "log_odds_vjp": (4.0, "as log_odds, and again on the way back"),
    "softmax_match_cost": (4.0, "as match_cost"),
    "softmax_set_loss": (2.0, "exponential and logarithm: two roundings"),
    "softmax_set_loss_vjp": (4.0, "as set_loss_vjp"),
    "train": (64.0, "as forward; and each nudge is one rounding, where a step has dozens, forward and backward"),
}
"""Operation → (constant, its reason): 1 where the bound counts every rounding."""

TINY = 1e-290
"""Added to every bound: a bound of 0 would demand exact equality of numbers that underflow."""


def at_least_float32(dtype: str) -> str:
    """The dtype of centres, precisions and level weights that go with queries and keys in `dtype`, and of costs and losses."""
    return "float32" if dtype in HALVES else dtype


def accumulation_roundoff(dtype: str) -> float:
    """a: the unit roundoff of the dtype in which sums are accumulated."""
    return UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]


def round_to(values: Array, dtype: str) -> Array:
    """The nearest values that `dtype` represents, ties to even, as float64."""
    if dtype == "float64":
        return values
    if dtype == "bfloat16":
        bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
        kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        rounded = kept.astype(np.uint32).view(np.float32).astype(np.float64)
        return np.where(np.isfinite(values), rounded, values)
    return np.asarray(values, dtype=dtype).astype(np.float64)


@dataclass(frozen=True)
class AttentionBounds:
    """Bounds of the output of smca_attention and of its five gradients, shaped like them."""

    out: Array
    dq: Array
    dk: Array
    dv: Array
    dcenter_xy: Array
    dprecision_xy: Array

    @property
    def gradients(self) -> tuple[Array, ...]:
        """In the order of `smca_attention_vjp`."""
        return self.dq, self.dk, self.dv, self.dcenter_xy, self.dprecision_xy


def attention_bounds(
    q: Array, level: Level, grad_out: Array, dtype: str, expanded_up_to: float, skips_below: float = 0.0
) -> AttentionBounds:
    """Equations (16) and (17), and what follows from them for the output and the gradients.

    Args:
        q: [B, h, N, d]. level: keys, values, priors. grad_out: [B, h, N, d] (anything, if only `out` is wanted).
        dtype: of the arithmetic.
        expanded_up_to: largest λ·(extent/2)² at which log G is in the expanded form; 0 = never.
        skips_below: what the weights of skipped keys may add up to; none of them is larger than this / L.
    """
    u, a, eta = UNIT_ROUNDOFF[dtype], accumulation_roundoff(dtype), UNDERFLOW[dtype]
    mask = level.key_padding_mask
    keep = np.ones((1, 1, 1, 1)) if mask is None else (~mask)[:, None, None, :] * 1.0  # [B, 1, 1, L]
    k, v = (np.where(keep[:, :, 0, :, None] > 0, np.abs(x), 0.0) for x in (level.k, level.v))
    real_k = np.where(keep[:, :, 0, :, None] > 0, level.k, 0.0)
    root_d, d, keys = q.shape[-1] ** 0.5, q.shape[-1], level.k.shape[2]
    difference = key_minus_center(level.center_xy, level.size)  # [B, h, N, L, 2]
    log_g = -0.5 * np.einsum("bhna,bhnla->bhnl", level.precision_xy, difference**2)
    logits = np.where(keep > 0, q @ np.swapaxes(real_k, -1, -2) / root_d + log_g, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)

    reach = np.abs(difference)
    if level.precision_xy.max(initial=0.0) * (max(level.size) / 2) ** 2 <= expanded_up_to > 0:
        middle = np.array([level.size[1], level.size[0]]) / 2
        center = np.abs(level.center_xy - middle)[..., None, :]
        reach = np.abs(difference + level.center_xy[..., None, :] - middle) + center
    prior = 0.5 * np.einsum("bhna,bhnla->bhnl", level.precision_xy, reach**2)
    dots = np.abs(q) @ np.swapaxes(k, -1, -2) / root_d
    kappa = dots * (2 * u + u**2 + (d + 2) * a) + prior * 8 * a  # (16)
    spread = np.log(np.sum(weights * np.exp(np.minimum(kappa, 600)), axis=-1, keepdims=True))
    epsilon = kappa + spread + (keys + 8) * a + 2 * u  # (17)
    off = np.minimum(weights * np.expm1(np.minimum(epsilon, 600)), 1.0) + np.minimum(weights, skips_below / keys) + eta

    size = np.max(v, axis=2, keepdims=True)
    out = (off + 2 * u * weights) @ v + eta
    back = np.abs(grad_out)
    dv = np.swapaxes(off + weights * (q.shape[2] * a + 2 * u), -1, -2) @ back + eta
    dweights = back @ np.swapaxes(v, -1, -2)
    mean = np.sum(weights * dweights, axis=-1, keepdims=True)
    mean_error = np.sum(off * dweights, axis=-1, keepdims=True)
    rounding = (d + keys + q.shape[2] + 8) * a + 4 * u
    dlogits = off * (dweights + mean + 1) + (weights + off) * ((dweights + mean) * rounding + mean_error)
    return AttentionBounds(
        out=np.minimum(out, 2 * size),
        dq=dlogits @ k / root_d + eta,
        dk=np.swapaxes(dlogits, -1, -2) @ np.abs(q) / root_d + eta,
        dv=dv,
        dcenter_xy=np.abs(level.precision_xy) * np.einsum("bhnl,bhnla->bhna", dlogits, reach),
        dprecision_xy=0.5 * np.einsum("bhnl,bhnla->bhna", dlogits, reach**2),
    )


def giou_bound(boxes1_xyxy: Array, boxes2_xyxy: Array, dtype: str) -> Array:
    """[n, m]: a corner off by three roundings of the largest coordinate moves an area by that much times its sides."""
    u = UNIT_ROUNDOFF[dtype]
    one, two = boxes1_xyxy[:, None], boxes2_xyxy[None]
    corner = 3 * u * max(float(np.abs(x).max(initial=0.0)) for x in (one, two))
    sides1, sides2 = one[..., 2:] - one[..., :2], two[..., 2:] - two[..., :2]
    overlap = np.clip(np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2]), 0, None)
    hull = np.maximum(one[..., 2:], two[..., 2:]) - np.minimum(one[..., :2], two[..., :2])
    union = sides1.prod(-1) + sides2.prod(-1) - overlap.prod(-1)
    off_overlap = 2 * corner * overlap.sum(-1) + 4 * corner**2
    off_union = 2 * corner * (sides1 + sides2).sum(-1) + off_overlap + 8 * corner**2 + 4 * u * union
    off_hull = 2 * corner * hull.sum(-1) + 4 * corner**2
    safe_union = np.maximum(union, off_union)
    safe_hull = np.maximum(hull.prod(-1), off_hull)
    ratio = (off_overlap + off_union * overlap.prod(-1) / np.maximum(safe_union, TINY)) / np.maximum(safe_union, TINY)
    rest = (off_union + off_hull * union / np.maximum(safe_hull, TINY)) / np.maximum(safe_hull, TINY)
    bound: Array = np.minimum(ratio + rest + 4 * u, 2.0)
    return bound
