"""Building blocks of the encoder and the decoder.

Shape letters: B images, h heads, d channels per head, C = h·d; one level's map has size (H, W) and L = H·W cells, row-major;
tokens of several levels stand one level after another, ΣL in all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from smca.gpu.attention.shapes import PADDED_LOGIT, is_autocast
from smca.gpu.config import ModelConfig

TRUSTED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of plain attention on a GPU. Not cuDNN's: where L mod 128 = 64 and a query's logits all lie below −88, its backward pass
gives NaN, with a mask and without (PyTorch 2.11, cuDNN 9.19, Hopper GPUs; github.com/pytorch/pytorch/issues/196678)."""

CLASS_PRIOR = 0.01
"""π of docs/method.md §5: the score that every class starts from, so that the loss is not drowned by background."""


@dataclass(frozen=True)
class Grid:
    """The cells of one feature level."""

    size: tuple[int, int]
    """(H, W) of the map."""
    valid_cells: Tensor
    """[B, 2] (h, w) of the unpadded images in cells; fractional where they are no multiple of the stride."""
    key_padding_mask: Tensor | None
    """[B, L] bool, True = the cell holds no pixel of the image; None = no cell of the batch is padding."""

    @property
    def cells(self) -> int:
        """L."""
        return self.size[0] * self.size[1]


def split_levels(tokens: Tensor, grids: Sequence[Grid], dim: int = 1) -> tuple[Tensor, ...]:
    """Tokens of all levels along `dim` → views of each level's."""
    return torch.split(tokens, [grid.cells for grid in grids], dim=dim)


def map_of_tokens(tokens: Tensor, grid: Grid) -> Tensor:
    """Of one level: [B, L, C] → [B, C, H, W]."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid.size)


def tokens_of_map(x: Tensor) -> Tensor:
    """Of one level: [B, C, H, W] → [B, L, C]."""
    return x.flatten(2).transpose(1, 2)


def zero_padding(x: Tensor, grid: Grid) -> Tensor:
    """A level's map [B, C, H, W] with 0 in its padded cells, whatever they hold."""
    mask = grid.key_padding_mask
    return x if mask is None else x.masked_fill(mask.reshape(-1, 1, *grid.size), 0.0)


def joint_padding_mask(grids: Sequence[Grid]) -> Tensor | None:
    """The levels' padding masks one after another: [B, ΣL] bool, or None."""
    masks = [grid.key_padding_mask for grid in grids if grid.key_padding_mask is not None]
    return torch.cat(masks, dim=1) if masks else None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, n, h·a] → [B, h, n, a]."""
    return x.reshape(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, sees: Tensor | None = None
) -> Tensor:
    """softmax(q·kᵀ/√d)·v without the padded keys, or without those that a query does not see: q [B, h, N, d], k and v
    [B, h, L, d], mask [B, L] True = padded, or sees [B, N, L] bool in its place → [B, h, N, d]."""
    if sees is not None:
        with sdpa_kernel(TRUSTED):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None])
    if not q.is_cuda:
        keep = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    with sdpa_kernel(TRUSTED):
        if key_padding_mask is None:
            return functional.scaled_dot_product_attention(q, k, v)
        return attention_masked_by_a_channel(q, k, v, key_padding_mask)


def attention_masked_by_a_channel(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor) -> Tensor:
    """``plain_attention`` whose mask is one more channel, for CUDA: q·k of a padded key becomes −10³⁰. FlashAttention takes no
    mask, and the kernel that does takes nearly twice as long as FlashAttention with eight more channels."""
    channels, more = q.shape[-1], 8 - q.shape[-1] % 8  # fused kernels want a multiple of 8
    lowest = max(PADDED_LOGIT, torch.finfo(k.dtype).min)
    padded = torch.zeros_like(key_padding_mask, dtype=k.dtype).masked_fill(key_padding_mask, lowest)
    one, logit = q.new_ones(()).expand(*q.shape[:-1], 1), padded[:, None, :, None].expand(*k.shape[:-1], 1)
    # One copy each, into tensors as dense as a kernel wants them.
    zeros = [tensor.new_zeros(()).expand(*tensor.shape[:-1], more - 1) for tensor in (q, k)]
    wide_q, wide_k = torch.cat([q, one, zeros[0]], dim=-1), torch.cat([k, logit, zeros[1]], dim=-1)
    wide_v = functional.pad(v, (0, more))
    out = functional.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=channels**-0.5)
    return out[..., :channels]


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] → [..., widths[-1]]."""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return cast(Tensor, self.last(x))

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        return cast(nn.Linear, self.layers[-1])


def in_full_precision(head: nn.Module, x: Tensor) -> Tensor:
    """head(x) in the precision of the head's parameters, also under autocast: for what ends in positions. In bfloat16, which has
    three digits, a box in an image of 1333 pixels would move by up to four."""
    if not is_autocast(x.device.type):
        return cast(Tensor, head(x))
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, head(x.to(next(head.parameters()).dtype)))


def set_class_prior(class_head: nn.Linear) -> None:
    """Let every class start from a score of ``CLASS_PRIOR``."""
    nn.init.constant_(class_head.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))


def log_odds(z: Tensor) -> Tensor:
    """ln(p/(1 − p)) for the probabilities p = softmax(z) of all entries but the last, so that their sigmoid is p: [..., K + 1] →
    [..., K], in at least float32. Equation (K3) of ``smca.reference.softmax_scores``.

    ln p − ln(1 − p) would lose it where one entry has nearly all. Of a sum of exponentials of which the largest is 1, each of the
    others can be taken away and leaves at least 1; that of the others than the largest is computed by itself.
    """
    z = z if z.dtype == torch.float64 else z.float()
    best = z.detach().argmax(dim=-1, keepdim=True)
    is_best = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, best, True)
    z = z - z.detach().gather(-1, best)
    exponentials = z.exp()
    # The 1 stands for what is not taken: a gradient through the logarithm of 0 would be NaN times 0.
    others = (exponentials.sum(-1, keepdim=True) - exponentials).masked_fill(is_best, 1.0)
    others_of_best = z.masked_fill(is_best, -torch.inf).logsumexp(-1, keepdim=True)
    return (z - torch.where(is_best, others_of_best, others.log()))[..., :-1]


class Attention(nn.Module):
    """The projections around an attention kernel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        dim = config.hidden_dim
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    @torch.no_grad()
    def reset_as_published(self) -> None:
        """Draw q, k and v as PyTorch's own attention does, as one matrix [3C, C] whose Xavier bound is lower; biases 0."""
        dim = self.q_proj.in_features
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(projection.weight, -math.sqrt(6 / (4 * dim)), math.sqrt(6 / (4 * dim)))
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(projection.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [B, N, C], key and value [B, L, C] → q [B, h, N, d], k and v [B, h, L, d]."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def merge(self, out: Tensor) -> Tensor:
        """The heads' outputs joined and projected: [B, h, N, d] → [B, N, C]."""
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        sees: Tensor | None = None,
    ) -> Tensor:
        """``plain_attention`` of query [B, N, C], key and value [B, L, C] → [B, N, C]."""
        return self.merge(plain_attention(*self.project(query, key, value), key_padding_mask, sees))


def feed_forward_block(x: Tensor, linear1: nn.Module, linear2: nn.Module, dropout: nn.Module) -> Tensor:
    """linear2(relu(linear1(x))) with dropout after each: [..., C] → [..., C]."""
    return cast(Tensor, dropout(linear2(dropout(functional.relu(linear1(x))))))
