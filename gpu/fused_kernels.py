"""Triton kernels of spatially modulated co-attention, forward and backward (docs/method.md §2).

They compute equations (4) to (12) of ``smca.reference.attention`` block by block. The position of a key comes from its
index and log G from that position, in float32 inside the kernel; nothing of size N × L is stored, no coordinates are,
and neither is the prior. What is kept from the forward pass is, per query,

    LSE_n = log₂ Σ_l 2^(S_nl·log₂e)            so that (5) is A_nl = 2^(S_nl·log₂e − LSE_n)

and the output itself in float32, since Σ_l A_nl·Ā_nl of (9) is Ō_n·O_n, the query's "delta". The backward pass runs twice
over the logits: once by blocks of queries for q̄, c̄, λ̄ (and delta), once by blocks of keys for k̄ and v̄. Each result is
summed by one program in a fixed order, so there are no atomics and two runs agree bit for bit.

Positions are taken relative to p, the point of the map nearest to the query's centre c (c itself, if it's on the map). Per
axis, with u = x − p and t = 2·(p − c),

    −½·λ·(x − c)² = −½·λ·u·(u + t) + a constant of the query,        Σ_l S̄_nl·(x − c) = Σ_l S̄_nl·u,
                                                                     Σ_l S̄_nl·(x − c)² = Σ_l S̄_nl·u·(u + t)

since softmax does not see the constant and S̄_n sums to 0. For a centre off the map, neither the rounding of a large logit
nor, in half precision, that of delta times a large distance gets into the result.

Letters: N queries, L keys of a map W cells wide, D channels a head (BLOCK_D: a power of two ≥ D), bh = b·heads + h. Strides are
in elements, over (b, h, row); channels are adjacent. DOT is the dtype of the matrix products' operands; they accumulate in
float32. The launches, with the reasons for the block sizes, are in ``fused_attention``, which also checks the inputs.

With SKIP a block of keys is passed over where log G and |q|·|k| bound every weight in it below 2^−(40 + log₂ L) of the
query's largest so far: all that is left out stays under 2^−40 of the sum, far under float32's 2^−24.
"""

# Kernels are traced, not called: their arguments have no Python types, nor has the decorator.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(pointer, row, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """[rows, BLOCK_D] in DOT; 0 in the channels from D on and in the rows that `keep` leaves out, whatever they hold."""
    channel = tl.arange(0, BLOCK_D)
    return tl.load(
        pointer + row[:, None] * stride + channel[None, :], mask=keep[:, None] & (channel < D)[None, :], other=0.0
    ).to(DOT)


@triton.jit
def _store_rows(pointer, row, stride, keep, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    tl.store(
        pointer + row[:, None] * stride + channel[None, :],
        value.to(pointer.dtype.element_ty),
        mask=keep[:, None] & (channel < D)[None, :],
    )


@triton.jit
def _head(pointer, strides, b, h):
    return pointer + b * strides[0] + h * strides[1]


@triton.jit
def _keys(key, mask_ptr, first, L, W, HAS_MASK: tl.constexpr):
    """Centres (x, y) of these keys' cells, and which keys there are: within the map and not padded."""
    there = key < L
    if HAS_MASK:
        there = there & (tl.load(mask_ptr + first + key, mask=there, other=1) == 0)
    return (key % W).to(tl.float32) + 0.5, (key // W).to(tl.float32) + 0.5, there


@triton.jit
def _prior(center_ptr, precision_ptr, bh, query, real, N, extent, AXIS: tl.constexpr):
    """(p, t, λ) of these queries along one axis of the map; center and precision are [B, h, N, 2], float32, contiguous."""
    at = (bh * N + query) * 2 + AXIS
    center = tl.load(center_ptr + at, mask=real, other=0.5)
    near = tl.minimum(tl.maximum(center, 0.5), extent - 0.5)
    return near, 2.0 * (near - center), tl.load(precision_ptr + at, mask=real, other=0.0)


@triton.jit
def _logits(rows, columns, ux, uy, tx, ty, lx, ly, there, scale, PRECISION: tl.constexpr):
    """Equation (4) times log₂e, less its constant: queries by keys, or keys by queries if the operands come that way."""
    product = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    logits = product * (scale * LOG2_E) - (0.5 * LOG2_E) * (lx * ux * (ux + tx) + ly * uy * (uy + ty))
    return tl.where(there, logits, float("-inf"))


@triton.jit
def _kept(seed, bh, query, key, dropout):
    """True where dropout keeps the weight: one Philox number per (seed, bh, query, key), the same in every pass."""
    zero = query * 0 + key * 0
    random, _, _, _ = tl.philox(seed, zero + key, zero + query, zero + bh.to(tl.int32), zero)
    return tl.random.uint_to_uniform_float(random) >= dropout


@triton.jit
def _largest_log_g(low, high, near, t, precision):
    """Upper bound of one axis's part of log G, less its constant, for keys in [low, high]: at the nearest (λ < 0: farthest)."""
    c = near - 0.5 * t
    nearest = tl.maximum(tl.maximum(low - c, c - high), 0.0)
    farthest = tl.maximum(tl.abs(low - c), tl.abs(high - c))
    distance = tl.where(precision < 0, farthest, nearest)
    return -0.5 * precision * (distance * distance - 0.25 * t * t)


# fmt: off
@triton.jit
def _matters(
    start, norms_ptr, bh, limit, real, q_norm, px, py, tx, ty, lx, ly, L, W, scale,
    BLOCK_L: tl.constexpr, SKIP: tl.constexpr,
):
    # fmt: on
    """Whether a key of the block from `start` may have a logit over `limit` for one of these queries; True without SKIP."""
    if SKIP:
        key = start + tl.arange(0, BLOCK_L)
        k_norm = tl.max(tl.load(norms_ptr + bh * L + key, mask=key < L, other=float("-inf")), axis=0)
        last = tl.minimum(start + BLOCK_L, L) - 1
        top, bottom = start // W, last // W
        left, right = tl.where(top == bottom, start % W, 0), tl.where(top == bottom, last % W, W - 1)
        bound = q_norm * k_norm * scale
        bound += _largest_log_g(left.to(tl.float32) + 0.5, right.to(tl.float32) + 0.5, px, tx, lx)
        bound += _largest_log_g(top.to(tl.float32) + 0.5, bottom.to(tl.float32) + 0.5, py, ty, ly)
        below = bound * LOG2_E < limit  # False for NaN: what isn't known to be small is computed
        matters = tl.max((real & (below == 0)).to(tl.int32), axis=0) > 0
    else:
        matters = True  # folded away by the compiler, with the branch on it
    return matters


@triton.jit
def _norm(rows):
    rows = rows.to(tl.float32)
    return tl.sqrt(tl.sum(rows * rows, axis=1))


# fmt: off
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, norms_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides,
    heads, N, L, W, scale, dropout, margin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, SKIP: tl.constexpr,
):
    # fmt: on
    """(4) to (6) for BLOCK_N queries of one head, over a running maximum. Writes out and LSE."""
    blocks = tl.cdiv(N, BLOCK_N)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h, real = bh // heads, bh % heads, query < N
    q = _rows(_head(q_ptr, q_strides, b, h), query, q_strides[2], real, D, BLOCK_D, DOT)
    px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, real, N, W, 0)
    py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, real, N, L // W, 1)
    k_head, v_head = _head(k_ptr, k_strides, b, h), _head(v_ptr, v_strides, b, h)
    q_norm = _norm(q)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    summed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, L, BLOCK_L):
        if _matters(start, norms_ptr, bh, largest - margin, real, q_norm, px, py, tx, ty, lx, ly, L, W, scale, BLOCK_L, SKIP):
            key = start + tl.arange(0, BLOCK_L)
            x, y, there = _keys(key, mask_ptr, b * L, L, W, HAS_MASK)
            k = _rows(k_head, key, k_strides[2], there, D, BLOCK_D, DOT)
            ux, uy = x[None, :] - px[:, None], y[None, :] - py[:, None]
            logits = _logits(
                q, k, ux, uy, tx[:, None], ty[:, None], lx[:, None], ly[:, None], there[None, :], scale, PRECISION
            )
            raised = tl.maximum(largest, tl.max(logits, axis=1))
            base = tl.where(raised == float("-inf"), 0.0, raised)  # −∞ − −∞ while every key so far is padded
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(weights, axis=1)
            if HAS_DROPOUT:  # of A, after the softmax: the dropped weights count in the denominator
                weights = tl.where(_kept(seed, bh, query[:, None], key[None, :], dropout), weights, 0.0)
            v = _rows(v_head, key, v_strides[2], there, D, BLOCK_D, DOT)
            summed = summed * shrink[:, None] + tl.dot(weights.to(DOT), v, input_precision=PRECISION)
            largest = raised
    out = summed / total[:, None]
    if HAS_DROPOUT:
        out = out / (1.0 - dropout)
    _store_rows(_head(out_ptr, out_strides, b, h), query, out_strides[2], real, out, D, BLOCK_D)
    tl.store(lse_ptr + bh * N + query, largest + tl.log2(total), mask=real)


# fmt: off
@triton.jit
def backward_query_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, norms_ptr, out_ptr, lse_ptr, grad_ptr,
    delta_ptr, dq_ptr, dcenter_ptr, dprecision_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides,
    heads, N, L, W, scale, dropout, margin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, SKIP: tl.constexpr,
):
    # fmt: on
    """q̄ of (10), c̄ of (11) and λ̄ of (12) for BLOCK_N queries of one head; writes delta for the other pass too."""
    blocks = tl.cdiv(N, BLOCK_N)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h, real = bh // heads, bh % heads, query < N
    q = _rows(_head(q_ptr, q_strides, b, h), query, q_strides[2], real, D, BLOCK_D, DOT)
    px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, real, N, W, 0)
    py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, real, N, L // W, 1)
    k_head, v_head = _head(k_ptr, k_strides, b, h), _head(v_ptr, v_strides, b, h)
    q_norm = _norm(q)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    out = _rows(_head(out_ptr, out_strides, b, h), query, out_strides[2], real, D, BLOCK_D, tl.float32)
    grad = _rows(_head(grad_ptr, grad_strides, b, h), query, grad_strides[2], real, D, BLOCK_D, tl.float32)
    delta = tl.sum(out * grad, axis=1)
    tl.store(delta_ptr + bh * N + query, delta, mask=real)
    lse = tl.load(lse_ptr + bh * N + query, mask=real, other=0.0)
    grad = grad.to(DOT)

    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_x, sum_xx = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    sum_y, sum_yy = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, L, BLOCK_L):
        if _matters(start, norms_ptr, bh, lse - margin, real, q_norm, px, py, tx, ty, lx, ly, L, W, scale, BLOCK_L, SKIP):
            key = start + tl.arange(0, BLOCK_L)
            x, y, there = _keys(key, mask_ptr, b * L, L, W, HAS_MASK)
            k = _rows(k_head, key, k_strides[2], there, D, BLOCK_D, DOT)
            v = _rows(v_head, key, v_strides[2], there, D, BLOCK_D, DOT)
            ux, uy = x[None, :] - px[:, None], y[None, :] - py[:, None]
            logits = _logits(
                q, k, ux, uy, tx[:, None], ty[:, None], lx[:, None], ly[:, None], there[None, :], scale, PRECISION
            )
            weights = tl.exp2(logits - lse[:, None])
            dweights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (8)
            if HAS_DROPOUT:
                kept = _kept(seed, bh, query[:, None], key[None, :], dropout)
                dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)
            dlogits = weights * (dweights - delta[:, None])  # (9)
            dq += tl.dot(dlogits.to(DOT), k, input_precision=PRECISION)
            sum_x += tl.sum(dlogits * ux, axis=1)
            sum_xx += tl.sum(dlogits * ux * (ux + tx[:, None]), axis=1)
            sum_y += tl.sum(dlogits * uy, axis=1)
            sum_yy += tl.sum(dlogits * uy * (uy + ty[:, None]), axis=1)
    _store_rows(_head(dq_ptr, dq_strides, b, h), query, dq_strides[2], real, dq * scale, D, BLOCK_D)
    at = (bh * N + query) * 2
    tl.store(dcenter_ptr + at, lx * sum_x, mask=real)
    tl.store(dcenter_ptr + at + 1, ly * sum_y, mask=real)
    tl.store(dprecision_ptr + at, -0.5 * sum_xx, mask=real)
    tl.store(dprecision_ptr + at + 1, -0.5 * sum_yy, mask=real)


# fmt: off
@triton.jit
def backward_key_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, norms_ptr, lse_ptr, grad_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    heads, N, L, W, scale, dropout, margin,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, SKIP: tl.constexpr,
):
    # fmt: on
    """v̄ of (7) and k̄ of (10) for BLOCK_L keys of one head; 0 at padded keys. All blocks here are keys by queries."""
    blocks = tl.cdiv(L, BLOCK_L)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_L
    key = first + tl.arange(0, BLOCK_L)
    b, h = bh // heads, bh % heads
    x, y, there = _keys(key, mask_ptr, b * L, L, W, HAS_MASK)
    k = _rows(_head(k_ptr, k_strides, b, h), key, k_strides[2], there, D, BLOCK_D, DOT)
    v = _rows(_head(v_ptr, v_strides, b, h), key, v_strides[2], there, D, BLOCK_D, DOT)
    q_head, grad_head = _head(q_ptr, q_strides, b, h), _head(grad_ptr, grad_strides, b, h)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)

    dk = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        query = start + tl.arange(0, BLOCK_N)
        real = query < N
        q = _rows(q_head, query, q_strides[2], real, D, BLOCK_D, DOT)
        px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, real, N, W, 0)
        py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, real, N, L // W, 1)
        lse = tl.load(lse_ptr + bh * N + query, mask=real, other=0.0)
        limit = lse - margin
        if _matters(first, norms_ptr, bh, limit, real, _norm(q), px, py, tx, ty, lx, ly, L, W, scale, BLOCK_L, SKIP):
            grad = _rows(grad_head, query, grad_strides[2], real, D, BLOCK_D, DOT)
            delta = tl.load(delta_ptr + bh * N + query, mask=real, other=0.0)
            ux, uy = x[:, None] - px[None, :], y[:, None] - py[None, :]
            logits = _logits(
                k, q, ux, uy, tx[None, :], ty[None, :], lx[None, :], ly[None, :], there[:, None], scale, PRECISION
            )
            weights = tl.exp2(logits - lse[None, :])  # 1 beyond the last query, to no effect: its grad and delta are 0
            dweights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (8)
            dropped = weights
            if HAS_DROPOUT:
                kept = _kept(seed, bh, query[None, :], key[:, None], dropout)
                dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)
                dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)
            dlogits = weights * (dweights - delta[None, :])  # (9)
            dv += tl.dot(dropped.to(DOT), grad, input_precision=PRECISION)
            dk += tl.dot(dlogits.to(DOT), q, input_precision=PRECISION)
    _store_rows(_head(dk_ptr, dk_strides, b, h), key, dk_strides[2], key < L, dk * scale, D, BLOCK_D)
    _store_rows(_head(dv_ptr, dv_strides, b, h), key, dv_strides[2], key < L, dv, D, BLOCK_D)
