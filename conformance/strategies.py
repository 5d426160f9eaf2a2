"""Hypothesis strategies: small inputs, drawn by shape and seed, that reach the corners.

Sizes go down to 1×1 maps, one query and one head; maps are not square; centres lie up to half a map outside; precisions
run from 0 (plain attention) to 4 (a Gaussian half a cell wide), where the lifted form in float32 still has digits left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of smca_attention, and a gradient of its output, in float64."""

    q: Array
    k: Array
    v: Array
    center_xy: Array
    precision_xy: Array
    size: tuple[int, int]
    key_padding_mask: npt.NDArray[np.bool_] | None
    grad_out: Array

    def __repr__(self) -> str:
        masked = None if self.key_padding_mask is None else int(self.key_padding_mask.sum())
        return f"AttentionInputs(q{self.q.shape}, size={self.size}, padded keys={masked}, precision≤{self.precision_xy.max():.3g})"


@st.composite
def attention_inputs(draw: st.DrawFn, max_side: int = 7) -> AttentionInputs:
    """Inputs of smca_attention, with and without padding."""
    batch, heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    channels, size = draw(st.integers(1, 8)), (draw(st.integers(1, max_side)), draw(st.integers(1, max_side)))
    logit_scale, precision = draw(st.sampled_from([0.1, 1.0, 5.0])), draw(st.sampled_from([0.0, 0.05, 0.5, 4.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys = size[0] * size[1]
    mask = None
    if draw(st.booleans()):
        mask = rng.random((batch, keys)) < 0.5
        mask[:, rng.integers(keys)] = False  # at least one key of each image is real
    return AttentionInputs(
        q=rng.normal(size=(batch, heads, queries, channels)) * logit_scale,
        k=rng.normal(size=(batch, heads, keys, channels)) * logit_scale,
        v=rng.normal(size=(batch, heads, keys, channels)),
        center_xy=rng.uniform(-0.5, 1.5, size=(batch, heads, queries, 2)) * [size[1], size[0]],
        precision_xy=rng.uniform(0, 1, size=(batch, heads, queries, 2)) * precision,
        size=size,
        key_padding_mask=mask,
        grad_out=rng.normal(size=(batch, heads, queries, channels)),
    )


@dataclass(frozen=True)
class CriterionInputs:
    """Outputs of a model and padded targets, in float64."""

    logits: Array
    boxes: Array
    labels: npt.NDArray[np.int64]
    target_boxes: Array
    valid: npt.NDArray[np.bool_]

    def __repr__(self) -> str:
        return f"CriterionInputs(logits{self.logits.shape}, boxes an image={self.valid.sum(1).tolist()} of {self.valid.shape[1]})"


@st.composite
def criterion_inputs(draw: st.DrawFn) -> CriterionInputs:
    """Inputs of matching and loss: images without objects, more targets than queries, confident and random logits."""
    layers, batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    classes, targets = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def boxes(*shape: int) -> Array:
        return np.concatenate([rng.uniform(0, 1, (*shape, 2)), rng.uniform(0.01, 0.8, (*shape, 2))], axis=-1)

    return CriterionInputs(
        logits=rng.normal(size=(layers, batch, queries, classes)) * scale,
        boxes=boxes(layers, batch, queries),
        labels=rng.integers(0, classes, (batch, targets)),
        target_boxes=boxes(batch, targets),
        valid=rng.random((batch, targets)) < draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
