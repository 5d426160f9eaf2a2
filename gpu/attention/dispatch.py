"""Spatially modulated co-attention by one of several backends, over one level or several (docs/method.md §2, §4 and §6).

    A = softmax_over_keys( q·kᵀ/√d + log G )        log G = −½·λ_x·(x − c_x)² − ½·λ_y·(y − c_y)²

``eager``   (``eager``) writes log G out as a tensor of shape [B, h, N, H·W] and adds it to the logits: the definition.
``lifted``  (``lifted``) plain attention with four more channels, by any fused attention kernel; half precision in float32.
``triton``  (``fused``) fused kernels of our own: in float32 they form log G from (x − c), in half precision they take it as
            channels of bfloat16 that lose nothing, beside q and k as they are. For CUDA, and for tests in Triton's
            interpreter. The fastest and most exact on the GPU that it was measured on (docs/benchmarks).

Shape letters: B images, N queries, h heads, d channels per head, size = (H, W) of the map, L = H·W keys, row-major.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smca.gpu.attention import fused
from smca.gpu.attention.eager import eager_smca_attention
from smca.gpu.attention.lifted import lifted_smca_attention
from smca.gpu.attention.shapes import check_shapes

BACKENDS = ("auto", "eager", "lifted", "triton")

LIFTED_LOGIT_LIMIT = 512.0
"""Largest λ·(extent/2)² at which ``auto`` still takes the lifted form. There x²·λ cancels against x·λ·c, which costs about unit
roundoff × that product: in float32 512 × 6e-8 = 3e-5 in a logit, no more than the rounding of q·k in common use."""


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
        backend: "eager", "lifted", "triton", or "auto": the fastest that is known to be as exact as "eager" for these
            inputs: "triton" on an NVIDIA GPU (from Ampere on, and on any that ``torch.compile`` compiles for) in float32 and half
            precision with d up to 128, "lifted" on a CPU for priors so wide that it errs by no more than 3e-5 in a float32 logit
            (``LIFTED_LOGIT_LIMIT``), else "eager".
            (On other GPUs "lifted" by name takes less time and memory; how exact it is depends on the priors, which "auto" could
            only look at by waiting for the device.)

    Returns:
        [B, h, N, d]; differentiable in q, k, v, center_xy and precision_xy.

    Raises:
        ValueError: shapes that do not fit each other, an unknown backend, or one that cannot run here.
    """
    check_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    chosen = _choose_backend(q, precision_xy, size) if backend == "auto" else backend
    arguments = (q, k, v, center_xy, precision_xy, size, key_padding_mask)
    if chosen == "eager":
        return eager_smca_attention(*arguments)
    if chosen == "lifted":
        return lifted_smca_attention(*arguments)
    if chosen == "triton":
        by_name = backend == "triton" and not torch.compiler.is_compiling()
        if by_name and (missing := fused.available(q.device)) is not None:
            raise ValueError(f"attention backend 'triton' cannot run here: {missing}")
        return fused.fused_smca_attention(*arguments)
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
        attended = smca_attention(
            q,
            level.k,
            level.v,
            level.center_xy,
            level.precision_xy,
            level.size,
            level.key_padding_mask,
            backend=backend,
        )
        weighted = attended * weight[:, None, :, None].to(attended.dtype)
        out = weighted if out is None else out + weighted
    assert out is not None
    return out


def _choose_backend(q: Tensor, precision_xy: Tensor, size: tuple[int, int]) -> str:
    """The kernels on a GPU that runs them, which are as exact as eager for any prior. On a CPU lifted, unless it would be less
    exact: for priors that are narrow and far from the middle. Where neither can be had: the definition."""
    fits = q.dtype in fused.DTYPES and q.shape[-1] <= fused.MAX_HEAD_WIDTH
    if q.is_cuda and fits and (torch.compiler.is_compiling() or _runs_triton(q.device)):
        return "triton"
    # Reading one number is free on a CPU. Elsewhere it would wait for the device, and while tracing nothing can be read.
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return "eager"
    reach = precision_xy.detach().amax().item() * (max(size) / 2) ** 2 if precision_xy.numel() else 0.0
    return "lifted" if reach <= LIFTED_LOGIT_LIMIT else "eager"


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    """Whether the kernels run here: on NVIDIA GPUs from Ampere on. (What is compiled needs Triton anyway.)"""
    installed = importlib.util.find_spec("triton") is not None and torch.version.cuda is not None
    return installed and torch.cuda.get_device_capability(device) >= (8, 0)
