"""Ways to compute SMCA attention that ``smca benchmark`` compares: the backends of ``smca_attention``, and others.

Shape letters: B images, N queries, h heads, d channels per head, L keys of a map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from smca.gpu.attention import Level, multi_scale_smca_attention, smca_attention
from smca.gpu.attention.shapes import cell_centers
from smca.gpu.benchmark.cases import Case, Step

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""(q, k, v, center_xy, precision_xy, size) → [B, h, N, d], shapes as in ``smca_attention``."""

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels of scaled_dot_product_attention that store nothing of size N × L."""


@dataclass(frozen=True)
class Size:
    """Sizes of the compared attention."""

    batch: int | None = None
    """B, images; by default 2 on a CPU and 16 on a GPU."""
    heads: int = 8
    """h, attention heads."""
    queries: int = 300
    """N, object queries."""
    channels: int = 32
    """d, channels per head."""
    maps: tuple[tuple[int, int], ...] = ((50, 84), (25, 42), (13, 21))
    """(H, W) of each level, finest first: strides 16, 32 and 64 of an 800×1344 image. The single-scale part takes the
    first two, one at a time."""


def attention_case(name: str, dtype: torch.dtype, size: Size, device: str = "cpu", *, replayed: bool = False) -> Case:
    """SMCA attention over every level: "forward", and "forward+backward" with all gradients.

    q, k, v and the output's gradient are numbers that bfloat16 holds exactly, for any `dtype`, and the priors
    are float32: every case of a comparison computes on the same numbers, so that what differs is its arithmetic.

    Args:
        name: "eager", "lifted" or "triton" (of ``smca_attention``; "lifted" in float32 for any `dtype`), or a key of
            ``ATTENTIONS``.
        dtype: of q, k, v and the output.
        size: `batch` must be given.
        device: "cpu" or "cuda".
        replayed: each step as a CUDA graph, so that it includes no time of the host; on "cuda" only.

    Raises:
        ValueError: when run, an unknown name, or a backend that cannot run on `device`.
        RuntimeError: on CUDA, no fused kernel takes the inputs of "plain", "lifted" or "lifted-bf16-split".
    """
    start, maps, weights, grad_out = _attention_inputs(size)
    weights = weights.to(device, copy=True).requires_grad_()
    grad_out = grad_out.to(device, dtype)
    inputs = {"q": start.to(device, dtype, copy=True).requires_grad_()}
    levels = []
    for index, level in enumerate(maps):
        k, v = (t.to(device, dtype, copy=True).requires_grad_() for t in (level.k, level.v))
        center, precision = (t.to(device, copy=True).requires_grad_() for t in (level.center_xy, level.precision_xy))
        levels.append(Level(k, v, center, precision, level.size))
        suffix = f" of level {index}" * (len(maps) > 1)
        inputs |= {f"{n}{suffix}": t for n, t in levels[-1]._asdict().items() if isinstance(t, Tensor)}
    if len(levels) > 1:
        inputs["level_weights"] = weights
    if name == "plain":  # without a prior there is no gradient with respect to it
        inputs = {n: t for n, t in inputs.items() if "_xy" not in n}

    def attend() -> Tensor:
        if name in ATTENTIONS:
            attention = ATTENTIONS[name]
            outputs = [attention(inputs["q"], *level[:4], level.size) for level in levels]
            if len(levels) == 1:
                return outputs[0]
            parts = (o * w[:, None, :, None].to(o.dtype) for o, w in zip(outputs, weights.unbind(-1), strict=True))
            return functools.reduce(torch.add, parts)
        q, wide_levels, wide = inputs["q"], levels, torch.float32
        if name == "lifted" and dtype != wide:
            q, wide_levels = q.to(wide), [level._replace(k=level.k.to(wide), v=level.v.to(wide)) for level in levels]
        if len(levels) == 1:
            return smca_attention(q, *wide_levels[0], backend=name).to(dtype)
        return multi_scale_smca_attention(q, wide_levels, weights, backend=name).to(dtype)

    def forward() -> dict[str, Tensor]:
        # FlexAttention would be compiled anew for the other grad mode; what it keeps for a backward pass is negligible.
        with torch.set_grad_enabled(name == "flex"):
            return {"out": attend().detach()}

    def both() -> dict[str, Tensor]:
        out = attend()
        grads = torch.autograd.grad(out, list(inputs.values()), grad_out)
        return {"out": out.detach(), **{f"grad {n}": grad for n, grad in zip(inputs, grads, strict=True)}}

    if inputs["q"].is_cuda and name in ("plain", "lifted", "lifted-bf16-split"):
        with sdpa_kernel(FUSED):  # an error, rather than the fallback that stores N × L: that would be another case
            both()
    case: Case = {"forward": forward, "forward+backward": both}
    return {mode: _as_graph(step) for mode, step in case.items()} if replayed else case


def _as_graph(step: Step) -> Step:
    """`step`, recorded as a CUDA graph when first called, so that only the GPU's own time remains."""
    recorded: list[tuple[Any, dict[str, Tensor]]] = []

    def replay() -> dict[str, Tensor]:
        if not recorded:
            side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(2):  # compilation and allocation happen before the recording
                    step()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                values = step()
            recorded.append((graph, values))
        graph, values = recorded[0]
        graph.replay()
        return values

    return replay


@functools.lru_cache(maxsize=1)
def _attention_inputs(size: Size) -> tuple[Tensor, list[Level], Tensor, Tensor]:
    """q, levels, level weights and gradient of the output, in float32 on the host."""
    generator = torch.Generator().manual_seed(0)
    assert size.batch is not None
    b, h, n, d = size.batch, size.heads, size.queries, size.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    q, levels = normal(b, h, n, d), []
    for index, (height, width) in enumerate(size.maps):
        center = torch.rand(b, h, n, 2, generator=generator) * torch.tensor([width, height])
        # The same width in pixels on every level.
        precision = torch.rand(b, h, n, 2, generator=generator) * 0.25 * 4.0**index
        keys = height * width
        levels.append(Level(normal(b, h, keys, d), normal(b, h, keys, d), center, precision, (height, width)))
    weights = torch.rand(b, n, len(levels), generator=generator).softmax(dim=-1)
    return q, levels, weights, normal(b, h, n, d)


def plain(q: Tensor, k: Tensor, v: Tensor, _c: Tensor, _p: Tensor, _s: tuple[int, int]) -> Tensor:
    """Attention without a prior: the floor."""
    return functional.scaled_dot_product_attention(q, k, v)


def sdpa_mask(
    q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]
) -> Tensor:
    """log G written out as a mask, which the kernel wants in the dtype of q. PyTorch may choose any kernel."""
    x, y = cell_centers(size, center_xy)
    dx, dy = x - center_xy[..., 0, None], y - center_xy[..., 1, None]
    log_g = -0.5 * (precision_xy[..., 0, None] * dx.square() + precision_xy[..., 1, None] * dy.square())
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=log_g.to(q.dtype))


def lifted_bf16_split(
    q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]
) -> Tensor:
    """The lifted form in bfloat16, each extra factor a sum of bfloat16 parts, so that fused half-precision kernels apply.

    Positions x relative to the middle are exact in one part and x² in two, on maps of up to 256 cells per side; −½λ and λc take
    three parts. Products of bfloat16 are exact in the float32 that kernels sum in, so the forward logits are those of the
    lifted form in float32, except for the third part of −½λ times the second of x², about 2⁻²⁴ of the whole, which is left
    out: eight channels per axis. The backward pass is not as exact: kernels round the logits' gradient to bfloat16 before they sum
    it times x and x², which cancel. (Factors by low rank: arXiv 2505.12044. Sums of bfloat16: arXiv 1904.06376.)

    Raises:
        ValueError: a map of more than 256 cells per side.
    """
    if max(size) > 256:
        raise ValueError(f"lifted-bf16-split needs maps of at most 256 cells per side, got {size}")
    channels, half = q.shape[-1], torch.bfloat16
    q_extra, k_extra = [], []
    for axis, positions in enumerate(cell_centers(size, center_xy.float())):
        middle = size[1 - axis] / 2
        position = positions - middle
        # scaled_dot_product_attention divides all by √d: scaling q itself beforehand would round it again.
        precision = precision_xy[..., axis].float() * channels**0.5
        square = _split(position.square(), 2)
        narrow = _split(-0.5 * precision, 3)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
            q_extra.append(narrow[i])
            k_extra.append(square[j])
        for part in _split(precision * (center_xy[..., axis].float() - middle), 3):
            q_extra.append(part)
            k_extra.append(position.to(half))
    width = -(-(channels + len(q_extra)) // 8) * 8
    pad = width - channels - len(q_extra)
    key_terms = functional.pad(torch.stack(k_extra, dim=-1), (0, pad)).expand(*k.shape[:3], -1)
    q_lifted = torch.cat([q.to(half), functional.pad(torch.stack(q_extra, dim=-1), (0, pad))], dim=-1)
    k_lifted = torch.cat([k.to(half), key_terms], dim=-1)
    v_lifted = functional.pad(v.to(half), (0, width - channels))
    out = functional.scaled_dot_product_attention(q_lifted, k_lifted, v_lifted, scale=channels**-0.5)
    return out[..., :channels].to(q.dtype)


def _split(value: Tensor, parts: int) -> list[Tensor]:
    """bfloat16 tensors whose sum is `value`, up to the rounding of the last. Gradients reach `value` through the first."""
    pieces, rest = [], value
    for _ in range(parts):
        pieces.append(rest.to(torch.bfloat16))
        rest = (rest - pieces[-1].to(rest.dtype)).detach()
    return pieces


def flex(q: Tensor, k: Tensor, v: Tensor, center_xy: Tensor, precision_xy: Tensor, size: tuple[int, int]) -> Tensor:
    """FlexAttention with log G as its score_mod. Not compiled, it writes all scores out; for CUDA see ``ATTENTIONS``."""
    from torch.nn.attention.flex_attention import flex_attention

    width = size[1]
    # One number of each by (b, h, n): indexed by tensors alone, captured tensors have gradients in compiled kernels.
    center_x, center_y = (t.contiguous() for t in center_xy.unbind(-1))
    precision_x, precision_y = (t.contiguous() for t in precision_xy.unbind(-1))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, n: Tensor, key: Tensor) -> Tensor:
        dx = key % width + 0.5 - center_x[b, h, n]
        dy = key // width + 0.5 - center_y[b, h, n]
        return score - 0.5 * (precision_x[b, h, n] * dx * dx + precision_y[b, h, n] * dy * dy)

    out = flex_attention(q, k, v, score_mod=score_mod)
    assert isinstance(out, Tensor)
    return out


def _flex_compiled(*args: Any) -> Tensor:
    return _compiled_flex()(*args)


@functools.cache
def _compiled_flex() -> Attention:
    # Every shape, dtype and grad mode is a compilation of its own; past the limit of 8 Dynamo would give up.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex, dynamic=False, fullgraph=True)


ATTENTIONS: dict[str, Attention] = {
    "plain": plain,
    "sdpa-mask": sdpa_mask,
    "lifted-bf16-split": lifted_bf16_split,
    "flex": _flex_compiled,
}
"""Ways to compute SMCA attention besides the backends of ``smca_attention``."""
