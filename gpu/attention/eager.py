"""SMCA attention as it is defined (docs/method.md §2): log G written out, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from smca.gpu.attention.shapes import cell_centers


def eager_smca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> Tensor:
    """[B, h, N, d]; arguments of ``smca_attention``. Adds log G, of shape [B, h, N, H·W], to the logits."""
    weights = attention_weights(q, k, center_xy, precision_xy, size, key_padding_mask)
    if key_padding_mask is not None:
        v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)  # 0 · NaN would leak through A·V
    out: Tensor = weights.to(v.dtype) @ v
    return out


def attention_weights(
    q: Tensor,
    k: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> Tensor:
    """A [B, h, N, H·W] in at least float32: equations (4) and (5) of ``smca.reference.attention_forward``."""
    # Logits in at least float32 for any inputs: log G reaches hundreds, where bfloat16 resolves whole units.
    logit_dtype = torch.promote_types(q.dtype, torch.float32)
    center_xy, precision_xy = center_xy.to(logit_dtype), precision_xy.to(logit_dtype)
    x, y = cell_centers(size, center_xy)
    dx = x - center_xy[..., 0, None]  # [B, h, N, L]
    dy = y - center_xy[..., 1, None]
    log_g = -0.5 * (precision_xy[..., 0, None] * dx.square() + precision_xy[..., 1, None] * dy.square())
    if key_padding_mask is not None:
        k = k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    # Scaled before the product: q·k alone leaves the range of float16 at logits of a few thousand.
    logits = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).to(logit_dtype) + log_g
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    weights: Tensor = logits.softmax(dim=-1)
    return weights
