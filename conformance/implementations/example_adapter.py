"""A template: copy it, rename the class, keep the operations that you have, and put your own calls in place of NumPy's.

    smca conformance --implementation your_module:YourImplementation

An operation that is missing here is reported as not implemented. docs/conformance.md explains the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Example:
    """One head after the other, in plain NumPy."""

    name = "example"
    """Its name in reports."""
    dtypes = ("float64", "float32")
    """The dtypes that it can compute in; each operation gets one by its keyword."""
    expanded_up_to: dict[str, float] = {}  # noqa: RUF012 - a constant, as in every adapter
    """Only if you form log G from x²·λ and x·λ·c apart (docs/method.md §6): dtype → the largest λ·(extent/2)² for which you
    do. That form loses digits, and is held to a wider bound. Leave it out if you square (x − c)."""

    def smca_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        center_xy: Array,
        precision_xy: Array,
        size: tuple[int, int],
        key_padding_mask: Array | None,
        *,
        dtype: str,
    ) -> Array:
        """[B, h, N, d]. Inputs are float64 with values that `dtype` represents: convert them as you like."""
        q, k, v, center_xy, precision_xy = (x.astype(dtype) for x in (q, k, v, center_xy, precision_xy))
        row, column = np.divmod(np.arange(size[0] * size[1]), size[1])
        key_xy = np.stack([column, row], axis=-1).astype(dtype) + q.dtype.type(0.5)
        out = np.zeros_like(q)
        for b, i in np.ndindex(q.shape[:2]):
            real = slice(None) if key_padding_mask is None else ~key_padding_mask[b]
            distance = key_xy[real] - center_xy[b, i][:, None]  # [N, keys, 2]
            log_prior = -(precision_xy[b, i][:, None] * distance**2).sum(-1) / 2
            logits = q[b, i] / np.sqrt(q.dtype.type(q.shape[-1])) @ k[b, i, real].T + log_prior
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, i] = weights / weights.sum(-1, keepdims=True) @ v[b, i, real]
        return out

    def generalized_box_iou(self, boxes1: Array, boxes2: Array, *, dtype: str) -> Array:
        """[n, 4], [m, 4] as xyxy → [n, m]."""
        one, two = boxes1.astype(dtype)[:, None], boxes2.astype(dtype)[None]
        inner = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
        outer = np.maximum(one[..., 2:], two[..., 2:]) - np.minimum(one[..., :2], two[..., :2])
        overlap, hull = np.clip(inner, 0, None).prod(-1), outer.prod(-1)
        union = (one[..., 2:] - one[..., :2]).prod(-1) + (two[..., 2:] - two[..., :2]).prod(-1) - overlap
        tiny = np.finfo(dtype).tiny
        return np.asarray(overlap / np.maximum(union, tiny) - (hull - union) / np.maximum(hull, tiny))
