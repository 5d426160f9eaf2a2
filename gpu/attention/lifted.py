"""SMCA attention as plain attention with four more channels (docs/method.md §6).

log G is a quadratic form in the key's position, and softmax ignores what is constant over the keys. With positions taken relative
to the middle of the map,

    q̃ = [ q/√d ;  −½λ_x ;  −½λ_y ;  λ_x·c_x ;  λ_y·c_y ]        k̃ = [ k ;  x² ;  y² ;  x ;  y ]

q̃·k̃ is the modulated logit up to a constant per query, so any fused attention kernel computes SMCA and nothing of size N × H·W is
ever stored. Key padding is one more channel. (A bias of low rank carried by the kernel's own channels: FlashBias, arXiv
2505.12044; a squared distance is exactly of low rank.) Half precision is lifted, and attended to, in float32:
in half precision, the cancellation of x²·λ against 2x·λ·c would leave nothing useful.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from smca.gpu.attention.shapes import PADDED_LOGIT, cell_centers, is_autocast


def lifted_smca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> Tensor:
    """[B, h, N, d]; arguments of ``smca_attention``."""
    dtype, device = v.dtype, q.device.type
    autocast = is_autocast(device)
    if dtype != torch.float64 and (dtype != torch.float32 or autocast):
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            q, k, v, center_xy, precision_xy = (tensor.float() for tensor in (q, k, v, center_xy, precision_xy))
            return lifted_smca_attention(q, k, v, center_xy, precision_xy, size, key_padding_mask).to(dtype)
    batch, heads, queries, channels = q.shape
    x, y = cell_centers(size, k)
    x, y = x - size[1] / 2, y - size[0] / 2  # relative to the middle of the map: the smallest x² there can be
    center = torch.stack([center_xy[..., 0] - size[1] / 2, center_xy[..., 1] - size[0] / 2], dim=-1).to(q.dtype)
    precision = precision_xy.to(q.dtype)

    q_channels = [q * channels**-0.5, -0.5 * precision, precision * center]
    key_terms = torch.stack([x.square(), y.square(), x, y], dim=-1)  # [L, 4]
    if key_padding_mask is not None:
        padded = key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)
        mask_term = key_padding_mask[..., None].to(k.dtype) * PADDED_LOGIT
        key_terms = torch.cat([key_terms.expand(batch, -1, -1), mask_term], dim=-1)[:, None]  # [B, 1, L, 5]
        q_channels.append(q.new_ones(()).expand(batch, heads, queries, 1))
    # Fused kernels want a width that is a multiple of 8: CUDA's need the alignment, and the CPU's takes longer for 37 than for 40.
    extra = key_terms.shape[-1]
    align = -(channels + extra) % 8
    zero = q.new_zeros(())
    q_lifted = torch.cat([*q_channels, zero.expand(batch, heads, queries, align)], dim=-1)
    key_terms = functional.pad(key_terms, (0, align)).expand(batch, heads, -1, -1)
    k_lifted = torch.cat([k, key_terms], dim=-1)
    # Fused kernels want q, k and v equally wide; the extra value channels are zeros and are cut off again.
    v_lifted = torch.cat([v, zero.expand(*v.shape[:-1], extra + align)], dim=-1)
    out = functional.scaled_dot_product_attention(q_lifted, k_lifted, v_lifted, scale=1.0)
    return out[..., :channels]
