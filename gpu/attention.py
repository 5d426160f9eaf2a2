"""Spatially modulated co-attention, plain and fast side by side (docs/method.md §2 and §6).

    A = softmax_over_keys( q·kᵀ/√d + log G )        log G = −½·λ_x·(x − c_x)² − ½·λ_y·(y − c_y)²

``eager``   writes log G out as a tensor of shape [B, h, N, H·W] and adds it to the logits: the definition, in any dtype.
``lifted``  uses that log G is a quadratic form in the key's position and that softmax ignores what is constant over the
            keys. With positions taken relative to the middle of the map,

                q̃ = [ q/√d ;  −½λ_x ;  −½λ_y ;  λ_x·c_x ;  λ_y·c_y ]        k̃ = [ k ;  x² ;  y² ;  x ;  y ]

            q̃·k̃ is the modulated logit up to a constant per query, so any fused attention kernel computes SMCA and
            nothing of size N × H·W is ever stored. Key padding is one more channel. (A bias of low rank carried by the
            kernel's own channels: FlashBias, arXiv 2505.12044; a squared distance is exactly of low rank.) Half precision
            is lifted, and attended to, in float32: in half, x²·λ − 2x·λ·c cancels to nothing useful.
``triton``  fused kernels of our own (``fused_attention``): in float32 they form log G from (x − c), in half precision they
            take it as channels of bfloat16 that lose nothing, beside q and k as they are. For CUDA, and for tests in Triton's
            interpreter. The fastest and most exact on the GPU that it was measured on (docs/benchmarks).

Shape letters: B images, N queries, h heads, d channels a head, size = (H, W) of the map, L = H·W keys, row-major.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BACKENDS = ("auto", "eager", "lifted", "triton")

PADDED_LOGIT = -1e30
"""Logit that the lifted form gives padded keys: exp underflows to exactly 0 beside any real logit, while 0·(−1e30) stays 0
(−inf would turn it into NaN). Representable in bfloat16, float32 and float64."""

TRITON_MAX_HEAD_WIDTH = 128
"""Most channels a head of the fused kernels."""

LIFTED_LOGIT_LIMIT = 512.0
"""Largest λ·(extent/2)² at which ``auto`` still takes the lifted form in float32. There x²·λ cancels against x·λ·c, which
costs about unit roundoff × that product: 512 × 6e-8 = 3e-5 in a logit, no more than the rounding of q·k in common use."""


def smca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention whose logits carry the log of a Gaussian around each query's centre (docs/method.md §2).

    Args:
        q: [B, h, N, d] queries, not yet divided by √d.
        k: [B, h, H·W, d] keys of the map, row-major (index = y·W + x).
        v: [B, h, H·W, d] values.
        center_xy: [B, h, N, 2] centre (x, y) of each Gaussian in cells; the centre of the top left cell is (½, ½).
        precision_xy: [B, h, N, 2] inverse variance λ of each Gaussian per axis, in cells⁻²; 0 is plain attention.
        size: (H, W) of the map.
        key_padding_mask: [B, H·W] bool, True = padded. At least one key of each image must be unpadded.
        backend: "eager", "lifted", "triton", or "auto": the fastest that is as exact as "eager" for these inputs, "triton" on
            a GPU (from Ampere on).

    Returns:
        [B, h, N, d]; differentiable in q, k, v, center_xy and precision_xy.

    Raises:
        ValueError: shapes that do not fit each other, an unknown backend, or one that cannot run here.
    """
    check_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    if backend == "auto":
        backend = _choose_backend(q, precision_xy, size)
    if backend == "eager":
        return _eager(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    if backend == "lifted":
        return _lifted(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    if backend == "triton":
        from smca.gpu import fused_attention  # it imports this module

        missing = None if torch.compiler.is_compiling() else fused_attention.available(q.device)
        if missing is not None:
            raise ValueError(f"attention backend 'triton' cannot run here: {missing}")
        return fused_attention.fused_smca_attention(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    raise ValueError(f"unknown attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")


class Level(NamedTuple):
    """Keys, values and priors of one feature level; shapes as in ``smca_attention``, centre and precision in its own cells."""

    k: Tensor
    v: Tensor
    center_xy: Tensor
    precision_xy: Tensor
    size: tuple[int, int]
    key_padding_mask: Tensor | None = None


def multi_scale_smca_attention(
    q: Tensor, levels: Sequence[Level], level_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Σ_j α_j · SMCA attention over the keys of level j: each level has a softmax of its own (docs/method.md §4).

    Args:
        q: [B, h, N, d] queries, not yet divided by √d.
        levels: J feature levels, at least one.
        level_weights: [B, N, J] α, how much each query takes from each level; shared by the heads.
        backend: of ``smca_attention``.

    Returns:
        [B, h, N, d]; differentiable in q, in every level's k, v, centre and precision, and in level_weights.

    Raises:
        ValueError: shapes that do not fit each other, no level, or an unknown backend.
    """
    expected = (q.shape[0], q.shape[2], len(levels)) if q.dim() == 4 else None
    if not levels or tuple(level_weights.shape) != expected:
        raise ValueError(
            f"level_weights must be [B, N, J] = {expected} for q {tuple(q.shape)} and {len(levels)} levels (at least one), "
            f"got {tuple(level_weights.shape)}"
        )
    out: Tensor | None = None
    for level, weight in zip(levels, level_weights.unbind(-1), strict=True):
        found = smca_attention(
            q,
            level.k,
            level.v,
            level.center_xy,
            level.precision_xy,
            level.size,
            level.key_padding_mask,
            backend=backend,
        )
        weighted = found * weight[:, None, :, None].to(found.dtype)
        out = weighted if out is None else out + weighted
    assert out is not None
    return out


def _choose_backend(q: Tensor, precision_xy: Tensor, size: tuple[int, int]) -> str:
    """The kernels on a GPU that runs them, as exact as eager whatever the prior. Else lifted, unless it would be less exact: in
    float32, for priors that are narrow and far from the middle."""
    if q.dtype == torch.float64:
        return "lifted"
    if q.is_cuda and q.shape[-1] <= TRITON_MAX_HEAD_WIDTH and (torch.compiler.is_compiling() or _runs_triton(q.device)):
        return "triton"
    if q.device.type == "cpu":  # reading one number is free here; on a GPU it would wait for the device
        if torch.compiler.is_compiling():  # nothing can be read while tracing: take what is exact for any number
            return "eager"
        reach = precision_xy.detach().amax().item() * (max(size) / 2) ** 2 if precision_xy.numel() else 0.0
        return "lifted" if reach <= LIFTED_LOGIT_LIMIT else "eager"
    return "lifted"


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    """Whether the kernels run here: on NVIDIA GPUs from Ampere on. (What is compiled needs Triton anyway.)"""
    found = importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
    return found and torch.cuda.get_device_capability(device) >= (8, 0)


def cell_centers(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Centres (x, y), each [H·W], of the cells of a map in cells: cell (column i, row j) is at (i + ½, j + ½)."""
    height, width = size
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    return x.repeat(height), y.repeat_interleave(width)


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> Tensor:
    # Logits in at least float32 whatever the inputs are: log G reaches hundreds, where bfloat16 resolves whole units.
    logit_dtype = torch.promote_types(q.dtype, torch.float32)
    center_xy, precision_xy = center_xy.to(logit_dtype), precision_xy.to(logit_dtype)
    x, y = cell_centers(size, center_xy)
    dx = x - center_xy[..., 0, None]  # [B, h, N, L]
    dy = y - center_xy[..., 1, None]
    log_g = -0.5 * (precision_xy[..., 0, None] * dx.square() + precision_xy[..., 1, None] * dy.square())
    if key_padding_mask is not None:
        padded = key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)  # 0 · NaN would leak through A·V
    # Scaled before the product: q·k alone leaves the range of float16 at logits of a few thousand.
    logits = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).to(logit_dtype) + log_g
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None, :], -torch.inf)
    out: Tensor = logits.softmax(dim=-1).to(v.dtype) @ v
    return out


def _lifted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> Tensor:
    dtype, device = v.dtype, q.device.type
    autocast = is_autocast(device)
    if dtype != torch.float64 and (dtype != torch.float32 or autocast):
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            q, k, v, center_xy, precision_xy = (tensor.float() for tensor in (q, k, v, center_xy, precision_xy))
            return _lifted(q, k, v, center_xy, precision_xy, size, key_padding_mask).to(dtype)
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
    # Fused kernels want a width that is a multiple of 8: CUDA's for alignment, and the CPU's takes longer for 37 than for 40.
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


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on; also for devices that have none, as "meta"."""
    return device_type in _WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


# Asked once, here: PyTorch 2.11 cannot trace the question.
_WITH_AUTOCAST = {device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)}


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None,
) -> None:
    """Raise a ValueError that names the argument whose shape does not fit the others; arguments of ``smca_attention``."""
    if q.dim() != 4:
        raise ValueError(f"q must be [B, h, N, d], got shape {tuple(q.shape)}")
    batch, heads, queries, channels = q.shape
    keys = size[0] * size[1]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "k": (k, (batch, heads, keys, channels)),
        "v": (v, (batch, heads, keys, channels)),
        "center_xy": (center_xy, (batch, heads, queries, 2)),
        "precision_xy": (precision_xy, (batch, heads, queries, 2)),
    }
    if key_padding_mask is not None:
        expected["key_padding_mask"] = (key_padding_mask, (batch, keys))
        if key_padding_mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask must be bool (True = padded), got {key_padding_mask.dtype}")
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with q {tuple(q.shape)} and size (H, W) = {tuple(size)}, "
                f"got {tuple(tensor.shape)}"
            )
