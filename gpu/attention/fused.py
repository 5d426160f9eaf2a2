"""SMCA attention in fused kernels: the torch ops around the Triton kernels of ``fused_kernels`` (docs/method.md §2, §6).

    A = softmax_over_keys( q·kᵀ/√d + log G )        log G = −½·λ_x·(x − c_x)² − ½·λ_y·(y − c_y)²

Half precision keeps the prior, which is never rounded to it. Nothing of size N × H·W is stored, forward or backward. Products
of float32 inputs are IEEE float32, not tf32. There are no atomics: on one machine, gradients agree bit for bit between runs.
Second derivatives are not implemented. Triton is imported when a kernel is first needed; importing this module needs none.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any, cast

import torch
from torch import Tensor

from smca.gpu.attention.shapes import check_shapes, is_autocast

MAX_HEAD_WIDTH = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LIFT_CHANNELS = 16
LIFT_MAX_SIDE = 256
"""Cells: up to here one bfloat16 holds a position from the middle, and two hold its square."""
LIFT_LIMITS = {torch.bfloat16: 2.0**15, torch.float16: 2.0**12}
"""Largest λ·(extent/2)², both axes together, up to which the prior is lifted: cancellation costs 2⁻²⁴ of it in a logit. Beyond the
limit, in heads with a narrow Gaussian on a large map, the prior comes from differences, which takes about twice as long."""

_MODULE = "smca.gpu.attention.fused_kernels"
_KERNELS = ("forward_kernel", "backward_query_kernel", "backward_key_kernel")

# For each kernel: (queries per block, keys per block, warps, stages of the loads' pipeline), by (bytes per number, padded d).
# For d ≤ 32 these are the fastest of some fifteen on an H200 at 300 queries and 50×84 keys, in half precision also of some seven at
# 25×42 and at 100×168. (For k̄ and v̄ in half precision: one that is within 3% of the fastest and spills no registers.) For wider
# heads nothing was measured: these are blocks for which the compiler spills almost no registers.
_CUDA_BLOCKS = {
    (2, 32): ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 1)),
    (2, 64): ((64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 2)),
    (2, 128): ((64, 64, 4, 1), (32, 32, 4, 2), (32, 32, 4, 2)),
    (4, 32): ((32, 128, 4, 2), (32, 128, 4, 2), (32, 128, 4, 1)),
    (4, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (4, 128): ((16, 32, 4, 1), (16, 16, 4, 2), (16, 32, 4, 1)),
}
_INTERPRETER_BLOCKS = ((16, 32, 1, 1),) * 3


def available(device: torch.device | str) -> str | None:
    """None if ``fused_smca_attention`` runs on this device; otherwise why it does not, and what to do about it."""
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    kernels = _kernels()
    if _interpreted(kernels):
        late = isinstance(kernels.tl.cdiv, kernels.triton.JITFunction)
        return "TRITON_INTERPRET was set after Triton was imported: set it before Python starts" if late else None
    if device.type != "cuda" or not torch.cuda.is_available():
        return (
            "the kernels need a CUDA device; on the CPU set TRITON_INTERPRET=1 before Python starts to run them in "
            "Triton's interpreter (slow; for tests)"
        )
    return None


def fused_smca_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    center_xy: Tensor,
    precision_xy: Tensor,
    size: tuple[int, int],
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """Attention whose logits carry the log of a Gaussian around each query's centre: equations (4) to (6).

    Args:
        q: [B, h, N, d] queries, not yet divided by √d; float32, float16 or bfloat16; d from 1 to 128.
        k, v: [B, h, H·W, d] keys and values, row-major (index = y·W + x), in the dtype of q. (Autocast casts all three.)
        center_xy: [B, h, N, 2] centre (x, y) in cells, any float dtype (read as float32); the top left cell's is (½, ½).
        precision_xy: [B, h, N, 2] inverse variance λ per axis in cells⁻², any float dtype; 0 is plain attention.
        size: (H, W) of the map.
        key_padding_mask: [B, H·W] bool, True = padded, where k and v may hold NaN. An image whose keys are all padded gets NaN.
        dropout: probability with which each weight of A is dropped; the others are divided by 1 − dropout.
        seed: of the dropout, 64 bits: an integer, or an int64 tensor of one element on the device of q (for which
            ``torch.compile`` never compiles again). Which weights are dropped depends on seed and the indices (bh, n, l) only.

    Returns:
        [B, h, N, d] in the dtype of q; differentiable once in q, k, v, center_xy and precision_xy.

    Raises:
        ValueError: shapes that do not fit each other; a dtype, head width, dropout or seed other than the above.
        RuntimeError: the kernels cannot run on this device; the message is that of ``available``.
    """
    check_shapes(q, k, v, center_xy, precision_xy, size, key_padding_mask)
    if is_autocast(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (tensor.to(dtype) if tensor.dtype in DTYPES else tensor for tensor in (q, k, v))
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v must have the same dtype, one of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}: cast them, "
            "or use backend 'eager'"
        )
    if not 1 <= q.shape[-1] <= MAX_HEAD_WIDTH or min(size) < 1:
        raise ValueError(
            f"d must be 1 to {MAX_HEAD_WIDTH} and (H, W) at least 1, got {q.shape[-1]} and {tuple(size)}: use backend "
            "'eager' for wider heads"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
    priors = center_xy.float().contiguous(), precision_xy.float().contiguous()
    seed_tensor = _seed_tensor(seed, q) if dropout > 0.0 else None
    args = (q, k, v, *priors, size[1], key_padding_mask, dropout, seed_tensor)
    if q.device.type == "meta" or torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        out, *_ = torch.ops.smca.fused_attention(*args)  # what is traced needs the op
    else:
        out = _Direct.apply(*args)  # type: ignore[no-untyped-call]
    return cast(Tensor, out)


def _seed_tensor(seed: int | Tensor, like: Tensor) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((1,), seed, dtype=torch.int64, device=like.device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
        raise ValueError(
            f"seed must be one int64 on {like.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return seed


def _run_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, h, N, d] in the dtype of q; the unrounded output in float32, which the backward pass needs (with no channels if
    the output is float32 itself); LSE [B, h, N] (base 2) in float32; and the prior's channels of q̃ [B, h, N, 16] in bfloat16
    (with no channels if the prior is not lifted)."""
    out, exact, lse, lift = _allocate_forward(*args)
    _launch("forward_kernel", args, (out, exact if exact.shape[3] else None, lse, lift), (out,))
    return out, exact, lse, lift


def _allocate_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, width = args[0], args[1], args[5]
    out, rows = _empty_like(q, q.dtype), q.shape[:3]
    exact = q.new_empty((*rows, 0)) if q.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    lift = q.new_empty((*rows, LIFT_CHANNELS if _lifts(q, k, width) else 0), dtype=torch.bfloat16)
    return out, exact, q.new_empty(rows, dtype=torch.float32), lift


def _lifts(q: Tensor, k: Tensor, width: int) -> bool:
    """Whether the kernels may take the prior as channels of bfloat16: in half precision, on maps whose positions bfloat16 holds."""
    return q.dtype != torch.float32 and max(width, k.shape[2] // width) <= LIFT_MAX_SIDE


def _run_backward(grad_out: Tensor, out: Tensor, lse: Tensor, lift: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, center_xy and precision_xy, equations (7) to (12), with their shapes and dtypes."""
    grads: tuple[Tensor, ...] = _allocate_backward(grad_out, out, lse, lift, *args)
    dq, dk, dv, *moments = grads
    grad_out, delta = _adjacent_channels(grad_out), torch.empty_like(lse)
    _launch("backward_query_kernel", args, (out, lse, lift, grad_out, delta, dq, *moments), (out, grad_out, dq))
    # Second, because it reads delta.
    _launch("backward_key_kernel", args, (lse, lift, grad_out, delta, dk, dv), (grad_out, dk, dv))
    return grads


def _allocate_backward(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, center_xy, precision_xy = args[4:9]
    moments = center_xy.new_empty(center_xy.shape), precision_xy.new_empty(precision_xy.shape)  # contiguous
    return _empty_like(q, q.dtype), _empty_like(k, k.dtype), _empty_like(v, v.dtype), *moments


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, center_xy, precision_xy, ctx.width, key_padding_mask, ctx.dropout, seed = inputs
    out, exact, lse, lift = output
    exact = out if out.dtype == torch.float32 else exact
    ctx.save_for_backward(exact, lse, lift, q, k, v, center_xy, precision_xy, key_padding_mask, seed)


def _kept(ctx: Any) -> tuple[Any, ...]:
    """The arguments of the backward pass after the output's gradient."""
    *tensors, key_padding_mask, seed = ctx.saved_tensors
    return (*tensors, ctx.width, key_padding_mask, ctx.dropout, seed)


class _Direct(torch.autograd.Function):
    """The kernels without PyTorch's dispatcher, whose ops cost the host as much time as small maps cost a GPU."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        output = _run_forward(*args)
        _keep(ctx, args, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = (None,) * 5 if grad_out is None else _run_backward(grad_out, *_kept(ctx))
        return *grads, None, None, None, None


# The ops, for traced code. Both take these arguments last:
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor center_xy, Tensor precision_xy, int width, Tensor? key_padding_mask, "
    "float dropout, Tensor? seed"
)
_forward = torch.library.custom_op(
    "smca::fused_attention", _run_forward, mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_forward.register_fake(_allocate_forward)
_backward = torch.library.custom_op(
    "smca::fused_attention_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor out, Tensor lse, Tensor lift, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_backward.register_fake(_allocate_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _autograd(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.smca.fused_attention_backward(grad_out, *_kept(ctx))
    return *grads, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


_COMPILED: dict[tuple[Any, ...], tuple[Any, int, tuple[Any, ...]]] = {}
"""(compiled kernel, programs, its last arguments: those compiled in) of each launch so far, by everything that it depends on.
Triton would find the kernel, too, but takes longer to do so than a small kernel runs."""
_MOST_COMPILED = 4096
"""At this many entries, forget all: every size of map is a key of its own."""


def _launch(
    name: str, args: tuple[Any, ...], tensors: tuple[Tensor | None, ...], by_stride: tuple[Tensor, ...]
) -> None:
    """Run one kernel on an op's arguments and on `tensors`; it gets the strides over (b, h, row) of those in `by_stride`."""
    q, k, v, center_xy, precision_xy, width, mask, dropout, seed = args
    q, k, v = _adjacent_channels(q), _adjacent_channels(k), _adjacent_channels(v)
    if not (q.is_cuda and _MODULE in sys.modules) and (reason := available(q.device)) is not None:
        raise RuntimeError(reason)
    (batch, heads, queries, channels), keys = q.shape, k.shape[2]
    positions = _positions((keys // width, width), q.device) if _lifts(q, k, width) else None
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    pointers = (q, k, v, center_xy.contiguous(), precision_xy.contiguous(), mask, seed, positions, *tensors)
    strides = tuple([tensor.stride()[:3] for tensor in (q, k, v, *by_stride)])
    numbers = (heads, queries, keys, width, channels**-0.5, dropout, LIFT_LIMITS.get(q.dtype, 0.0))

    # Triton compiles anew for addresses, strides and numbers that are a multiple of 16, and for those that are 1.
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in pointers]
    aligned = tuple([None if address is None else address % 16 == 0 for address in addresses])
    key = (name, q.device, q.dtype, batch, channels, strides, numbers, aligned)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        if key in _COMPILED:
            compiled, programs, constants = _COMPILED[key]
            compiled[programs, 1, 1](*addresses, *strides, *numbers, *constants)
            return
        programs, constants, options = _plan(name, q, k, width, mask is not None, dropout > 0.0)
        if programs == 0:
            return  # CUDA treats an empty grid as an error
        compiled = getattr(_kernels(), name)[(programs,)](*pointers, *strides, *numbers, *constants, **options)
        if compiled is not None:  # the interpreter compiles nothing
            if len(_COMPILED) >= _MOST_COMPILED:
                _COMPILED.clear()
            _COMPILED[key] = compiled, programs, constants


def _plan(
    name: str, q: Tensor, k: Tensor, width: int, has_mask: bool, has_dropout: bool
) -> tuple[int, tuple[Any, ...], dict[str, int]]:
    """The number of programs of a launch, the arguments that are compiled in, and the compiler's options."""
    kernels, (batch, heads, queries, channels) = _kernels(), q.shape
    padded = max(16, 1 << (channels - 1).bit_length())
    interpreted = _interpreted(kernels)
    by_kernel = _INTERPRETER_BLOCKS if interpreted else _CUDA_BLOCKS[q.element_size(), max(32, padded)]
    block_n, block_l, warps, stages = by_kernel[_KERNELS.index(name)]
    blocks = -(-k.shape[2] // block_l) if name == "backward_key_kernel" else -(-queries // block_n)
    # In the interpreter a product of bfloat16 blocks is garbage, silently.
    dot = torch.float32 if interpreted and q.dtype == torch.bfloat16 else q.dtype
    lifted = kernels.tl.float32 if interpreted else kernels.tl.bfloat16
    constants = (
        *(channels, padded, block_n, block_l, getattr(kernels.tl, str(dot).removeprefix("torch.")), "ieee"),
        *(lifted, _lifts(q, k, width), has_mask, has_dropout),
    )
    return batch * heads * blocks, constants, {"num_warps": warps, "num_stages": stages}


@functools.lru_cache(maxsize=256)
def _positions(size: tuple[int, int], device: torch.device) -> Tensor:
    """The channels of k̃ that follow those of k, [H·W and up to 128 more, 16], for positions ξ, η from the middle of the map:

    ξ² in two parts, the same again, ξ three times, 1,        η² in two parts, the same again, η three times, beyond the map
    """
    height, width = size
    rows = -(-height * width // 128) * 128
    key = torch.arange(rows, device=device)
    table = torch.zeros(rows, LIFT_CHANNELS, device=device)
    for first, position in ((0, key % width + 0.5 - width / 2), (8, key // width + 0.5 - height / 2)):
        square = position.square()
        coarse = square.bfloat16().float()
        table[:, first : first + 4] = torch.stack([coarse, square - coarse] * 2, dim=-1)
        table[:, first + 4 : first + 7] = position[:, None]
    table[:, 7] = 1.0
    table[:, 15] = (key >= height * width).float()
    return table if _interpreted(_kernels()) else table.bfloat16()


def _adjacent_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, in the layout of `tensor` if its channels are adjacent."""
    empty = torch.empty_like(tensor, dtype=dtype)
    return empty if empty.stride(-1) == 1 else empty.new_empty(empty.shape)


def _kernels() -> Any:
    """The module of kernels, imported here so that a machine without Triton can import this one."""
    return importlib.import_module(_MODULE)


def _interpreted(kernels: Any) -> bool:
    return not isinstance(kernels.forward_kernel, kernels.triton.JITFunction)
