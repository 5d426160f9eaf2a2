"""Triton kernels of spatially modulated co-attention, forward and backward (docs/method.md §2, §6).

They compute equations (4) to (12) of ``smca.reference``'s ``attention_forward`` and ``attention_backward`` block by block; nothing
of size N × L is stored, and neither is the prior. The forward pass keeps, per query,

    LSE_n = log₂ Σ_l 2^(S_nl·log₂e)            so that (5) is A_nl = 2^(S_nl·log₂e − LSE_n)

and the output itself in float32, since Σ_l A_nl·Ā_nl of (9) is Ō_n·O_n, the query's "delta". The backward pass runs twice
over the logits: once by blocks of queries for q̄, c̄, λ̄ (and delta), once by blocks of keys for k̄ and v̄. Each result is
summed by one program in a fixed order, so there are no atomics and two runs agree bit for bit.

log G comes in one of two ways. *From differences*, in float32: positions are taken relative to p, the point of the map nearest
to the query's centre c (c itself, if it's on the map). Per axis, with u = x − p and t = 2·(p − c),

    −½·λ·(x − c)² = −½·λ·u·(u + t) + a constant of the query,        Σ_l S̄_nl·(x − c) = Σ_l S̄_nl·u,
                                                                     Σ_l S̄_nl·(x − c)² = Σ_l S̄_nl·u·(u + t)

since softmax does not see the constant and S̄_n sums to 0. For a centre off the map, neither the rounding of a large logit
nor, in half precision, that of delta times a large distance gets into the result.

*Lifted*, in half precision (LIFT), where arithmetic on every pair of query and key would take longer than everything else:
relative to the middle m of the map, with ξ = x − m,

    −½·λ·(x − c)² = −½·λ·ξ² + λ·(c − m)·ξ + a constant of the query

is a product of channels, which tensor cores sum in float32. Each factor is split into parts that bfloat16 holds exactly: ξ (one
part), ξ² (two), λ (two: it moves by 2⁻¹⁶ of itself, and the centre does not) and λ·(c − m) (three). ``_lift`` makes the queries'
16 channels, ``fused_attention`` a table of the keys'. S̄ times the same table, in three exact parts, gives the sums over ξ and
ξ², from which those over u follow. Cancellation costs 2⁻²⁴·λ·ξ² in a logit, so a head with a Gaussian that is too narrow for the
map (see ``_is_wide``) uses differences.

Letters: N queries, L keys of a map W cells wide, D channels per head (BLOCK_D: a power of two ≥ D), bh = b·heads + h. Strides are
in elements, over (b, h, row); channels are adjacent. DOT is the dtype of the matrix products' operands, LIFTED that of the lifted
prior's; all accumulate in float32. The launches, with the reasons for the block sizes, are in ``fused_attention``, which also
checks the inputs.
"""

# Kernels are traced, not called: their arguments have no Python types, nor has the decorator.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(512)
"""Queries of a head that ``_is_wide`` examines at once."""
BEYOND_MAP = tl.constexpr(-1e30)
"""Logit of a key beyond the map in the lifted form: finite, since 0 · −∞ is NaN."""


@triton.jit
def _rows(pointer, row, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """[rows, BLOCK_D] in DOT; 0 in the channels from D on and in the rows that `keep` leaves out; neither is read."""
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
def _real_keys(key, mask_ptr, first, L, HAS_MASK: tl.constexpr):
    """Which of these keys are real: within the map and not padded."""
    real_keys = key < L
    if HAS_MASK:
        real_keys = real_keys & (tl.load(mask_ptr + first + key, mask=real_keys, other=1) == 0)
    return real_keys


@triton.jit
def _prior(center_ptr, precision_ptr, bh, query, real, N, extent, AXIS: tl.constexpr):
    """(p, t, λ) of these queries along one axis of the map; center and precision are [B, h, N, 2], float32, contiguous."""
    at = (bh * N + query) * 2 + AXIS
    center = tl.load(center_ptr + at, mask=real, other=0.5)
    near = tl.minimum(tl.maximum(center, 0.5), extent - 0.5)
    return near, 2.0 * (near - center), tl.load(precision_ptr + at, mask=real, other=0.0)


@triton.jit
def _from_middle(near, t, extent):
    """c − m of these queries along one axis."""
    return near - 0.5 * t - 0.5 * extent


@triton.jit
def _coarse(x):
    """x without what bfloat16 cannot hold: the first 8 bits of 24."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _lift(px, tx, lx, py, ty, ly, L, W, scale, LIFTED: tl.constexpr):
    """The channels of q̃ that multiply those of k̃'s positions: [rows, 16], of numbers that bfloat16 holds exactly."""
    channel = tl.arange(0, 16)[None, :]
    along_x, part = channel < 8, channel % 8
    precision = tl.where(along_x, lx[:, None], ly[:, None]) / scale
    first = _coarse(precision)  # −½λ in two parts: λ moves by 2⁻¹⁶ of itself, and the centre does not move with it
    second = _coarse(precision - first)
    offset = tl.where(along_x, _from_middle(px, tx, W)[:, None], _from_middle(py, ty, L // W)[:, None])
    product = (first + second) * offset
    one = _coarse(product)
    two = _coarse(product - one)
    square = -0.5 * tl.where(part < 2, first, second)
    linear = tl.where(part == 4, one, tl.where(part == 5, two, product - one - two))
    constant = tl.where(channel == 15, BEYOND_MAP, 0.0)
    return tl.where(part < 4, square, tl.where(part < 7, linear, constant)).to(LIFTED)


@triton.jit
def _is_wide(center_ptr, precision_ptr, bh, N, L, W, limit):
    """Whether the lifted form is exact enough for all queries of this head: bounds λ·|x − m|·max(|x − m|, |c − m|), both axes."""
    half_x, half_y = 0.5 * W, 0.5 * (L // W)
    largest = tl.zeros([CHUNK], tl.float32)
    for start in range(0, N, CHUNK):
        query = start + tl.arange(0, CHUNK)
        px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, query < N, N, W, 0)
        py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, query < N, N, L // W, 1)
        reach = tl.abs(lx) * half_x * tl.maximum(tl.abs(_from_middle(px, tx, W)), half_x)
        reach += tl.abs(ly) * half_y * tl.maximum(tl.abs(_from_middle(py, ty, L // W)), half_y)
        largest = tl.maximum(largest, reach)  # ignores NaN, which either form passes on
    return tl.max(largest, axis=0) <= limit


@triton.jit
def _positions(pointer, key, LIFT: tl.constexpr):
    """The channels of k̃ that hold these keys' positions, [keys, 16]; there are rows for those beyond the map, too."""
    return tl.load(pointer + key[:, None] * 16 + tl.arange(0, 16)[None, :]) if LIFT else key  # unused otherwise


@triton.jit
def _cell_x(key, W):
    return (key % W).to(tl.float32) + 0.5


@triton.jit
def _cell_y(key, W):
    return (key // W).to(tl.float32) + 0.5


@triton.jit
def _unit(scale, LIFT: tl.constexpr):
    """The factor from the result of ``_with_prior`` to log₂e times equation (4)."""
    return scale * LOG2_E if LIFT else 1.0


# fmt: off
@triton.jit
def _with_prior(
    logits, rows, columns, key, real_keys, px, tx, lx, py, ty, ly, W, scale, LIFT: tl.constexpr, HAS_MASK: tl.constexpr
):
    # fmt: on
    """Equation (4) from q·k, less a constant of the query, in units of `_unit`: by additional channels, or from differences."""
    if LIFT:
        logits = tl.dot(rows, tl.trans(columns), acc=logits)
    else:
        ux, uy = _cell_x(key, W) - px, _cell_y(key, W) - py
        logits = logits * (scale * LOG2_E) - (0.5 * LOG2_E) * (lx * ux * (ux + tx) + ly * uy * (uy + ty))
    if HAS_MASK or not LIFT:
        logits = tl.where(real_keys, logits, float("-inf"))
    return logits


@triton.jit
def _moment(moments, CHANNEL: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == CHANNEL, moments, 0.0), axis=1)


@triton.jit
def _sums(moments, FIRST: tl.constexpr, near, t, extent):
    """Σ S̄·u and Σ S̄·u·(u + t) along one axis, from the sums over positions from the middle of the map."""
    way = near - 0.5 * extent
    nothing = _moment(moments, 7)  # Σ S̄, which should be 0, counts times the way to p
    sums = _moment(moments, FIRST + 4)
    squares = _moment(moments, FIRST) + _moment(moments, FIRST + 1) - way * (2.0 * sums - way * nothing)
    sums -= way * nothing
    return sums, squares + t * sums


@triton.jit
def _kept(seed, bh, query, key, dropout):
    """True where dropout keeps the weight: one Philox number per (seed, bh, query, key), the same in every pass."""
    zero = query * 0 + key * 0
    random, _, _, _ = tl.philox(seed, zero + key, zero + query, zero + bh.to(tl.int32), zero)
    return tl.random.uint_to_uniform_float(random) >= dropout


# fmt: off
@triton.jit
def _attend(
    q, lift, k_head, k_stride, v_head, v_stride, mask_ptr, seed_ptr, positions_ptr, b, bh, query,
    px, tx, lx, py, ty, ly, L, W, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):
    # fmt: on
    """Over all keys, with weights relative to the largest: log₂ of the largest, the sum of weights, and their sum times v."""
    unit = _unit(scale, LIFT)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    summed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, L, BLOCK_L):
        key = start + tl.arange(0, BLOCK_L)
        real_keys = _real_keys(key, mask_ptr, b * L, L, HAS_MASK)
        k = _rows(k_head, key, k_stride, real_keys, D, BLOCK_D, DOT)
        v = _rows(v_head, key, v_stride, real_keys, D, BLOCK_D, DOT)
        positions = _positions(positions_ptr, key, LIFT)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _with_prior(
            logits, lift, positions, key[None, :], real_keys[None, :], px[:, None], tx[:, None], lx[:, None],
            py[:, None], ty[:, None], ly[:, None], W, scale, LIFT, HAS_MASK,
        )  # fmt: skip
        raised = tl.maximum(largest, tl.max(logits, axis=1) * unit)
        base = tl.where(raised == float("-inf"), 0.0, raised)  # −∞ − −∞ while every key so far is padded
        weights = tl.exp2(logits * unit - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if HAS_DROPOUT:  # of A, after the softmax: the dropped weights count in the denominator
            weights = tl.where(_kept(seed, bh, query[:, None], key[None, :], dropout), weights, 0.0)
        summed = tl.dot(weights.to(DOT), v, acc=summed * shrink[:, None], input_precision=PRECISION)
        largest = raised
    return largest, total, summed


# fmt: off
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, positions_ptr, out_ptr, exact_ptr,
    lse_ptr, lift_ptr,
    q_strides, k_strides, v_strides, out_strides,
    heads, N, L, W, scale, dropout, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # fmt: on
    """(4) to (6) for BLOCK_N queries of one head, over a running maximum. Writes out, the same unrounded (unless exact_ptr is
    None), LSE and, with LIFT, the prior's channels."""
    blocks = tl.cdiv(N, BLOCK_N)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    query = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h, real = bh // heads, bh % heads, query < N
    q = _rows(_head(q_ptr, q_strides, b, h), query, q_strides[2], real, D, BLOCK_D, DOT)
    px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, real, N, W, 0)
    py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, real, N, L // W, 1)
    k_head, v_head = _head(k_ptr, k_strides, b, h), _head(v_ptr, v_strides, b, h)
    wide, lift = False, query
    NARROW_L: tl.constexpr = 32 if LIFT and BLOCK_L > 32 else BLOCK_L  # otherwise the kernel needs the registers of both branches
    if LIFT:
        wide = _is_wide(center_ptr, precision_ptr, bh, N, L, W, limit)
        lift = _lift(px, tx, lx, py, ty, ly, L, W, scale, LIFTED)
        tl.store(lift_ptr + (bh * N + query)[:, None] * 16 + tl.arange(0, 16)[None, :], lift, mask=real[:, None])
    if wide:
        largest, total, summed = _attend(
            q, lift, k_head, k_strides[2], v_head, v_strides[2], mask_ptr, seed_ptr, positions_ptr, b, bh,
            query, px, tx, lx, py, ty, ly, L, W, scale, dropout,
            D, BLOCK_D, BLOCK_N, BLOCK_L, DOT, PRECISION, LIFT, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    else:
        largest, total, summed = _attend(
            q, lift, k_head, k_strides[2], v_head, v_strides[2], mask_ptr, seed_ptr, positions_ptr, b, bh,
            query, px, tx, lx, py, ty, ly, L, W, scale, dropout,
            D, BLOCK_D, BLOCK_N, NARROW_L, DOT, PRECISION, False, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    out = summed / total[:, None]
    if HAS_DROPOUT:
        out = out / (1.0 - dropout)
    _store_rows(_head(out_ptr, out_strides, b, h), query, out_strides[2], real, out, D, BLOCK_D)
    if exact_ptr is not None:
        _store_rows(_head(exact_ptr, out_strides, b, h), query, out_strides[2], real, out, D, BLOCK_D)
    tl.store(lse_ptr + bh * N + query, largest + tl.log2(total), mask=real)


# fmt: off
@triton.jit
def _query_gradients(
    q, lift, grad, delta, lse, k_head, k_stride, v_head, v_stride, mask_ptr, seed_ptr, positions_ptr,
    b, bh, query, px, tx, lx, py, ty, ly, L, W, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # fmt: on
    """Over all keys: q̄ over 1/√d, and the sums of S̄ times x − c, (x − c)², y − c and (y − c)²."""
    unit = _unit(scale, LIFT)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    moments = tl.zeros([BLOCK_N, 16], tl.float32)
    sum_x, sum_xx = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    sum_y, sum_yy = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, L, BLOCK_L):
        key = start + tl.arange(0, BLOCK_L)
        real_keys = _real_keys(key, mask_ptr, b * L, L, HAS_MASK)
        k = _rows(k_head, key, k_stride, real_keys, D, BLOCK_D, DOT)
        v = _rows(v_head, key, v_stride, real_keys, D, BLOCK_D, DOT)
        positions = _positions(positions_ptr, key, LIFT)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = _with_prior(
            logits, lift, positions, key[None, :], real_keys[None, :], px[:, None], tx[:, None], lx[:, None],
            py[:, None], ty[:, None], ly[:, None], W, scale, LIFT, HAS_MASK,
        )  # fmt: skip
        weights = tl.exp2(logits * unit - lse[:, None])
        dweights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (8)
        if HAS_DROPOUT:
            kept = _kept(seed, bh, query[:, None], key[None, :], dropout)
            dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)
        dlogits = weights * (dweights - delta[:, None])  # (9)
        dq = tl.dot(dlogits.to(DOT), k, acc=dq, input_precision=PRECISION)
        if LIFT:  # times k̃'s positions, without rounding: the terms have both signs
            coarse = _coarse(dlogits)
            rest = dlogits - coarse
            fine = _coarse(rest)
            moments = tl.dot(coarse.to(LIFTED), positions, acc=moments)
            moments = tl.dot(fine.to(LIFTED), positions, acc=moments)
            moments = tl.dot((rest - fine).to(LIFTED), positions, acc=moments)
        else:
            ux, uy = _cell_x(key, W)[None, :] - px[:, None], _cell_y(key, W)[None, :] - py[:, None]
            sum_x += tl.sum(dlogits * ux, axis=1)
            sum_xx += tl.sum(dlogits * ux * (ux + tx[:, None]), axis=1)
            sum_y += tl.sum(dlogits * uy, axis=1)
            sum_yy += tl.sum(dlogits * uy * (uy + ty[:, None]), axis=1)
    if LIFT:
        sum_x, sum_xx = _sums(moments, 0, px, tx, W)
        sum_y, sum_yy = _sums(moments, 8, py, ty, L // W)
    return dq, sum_x, sum_xx, sum_y, sum_yy


# fmt: off
@triton.jit
def backward_query_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, positions_ptr, out_ptr, lse_ptr,
    lift_ptr, grad_ptr, delta_ptr, dq_ptr, dcenter_ptr, dprecision_ptr,
    q_strides, k_strides, v_strides, out_strides, grad_strides, dq_strides,
    heads, N, L, W, scale, dropout, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
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

    out = _rows(_head(out_ptr, out_strides, b, h), query, out_strides[2], real, D, BLOCK_D, tl.float32)
    grad = _rows(_head(grad_ptr, grad_strides, b, h), query, grad_strides[2], real, D, BLOCK_D, tl.float32)
    delta = tl.sum(out * grad, axis=1)
    tl.store(delta_ptr + bh * N + query, delta, mask=real)
    lse = tl.load(lse_ptr + bh * N + query, mask=real, other=0.0)
    grad = grad.to(DOT)

    wide, lift = False, query
    NARROW_L: tl.constexpr = 32 if LIFT and BLOCK_L > 32 else BLOCK_L  # otherwise the kernel needs the registers of both branches
    if LIFT:
        wide = _is_wide(center_ptr, precision_ptr, bh, N, L, W, limit)
        lift = _lift(px, tx, lx, py, ty, ly, L, W, scale, LIFTED)
    if wide:
        dq, sum_x, sum_xx, sum_y, sum_yy = _query_gradients(
            q, lift, grad, delta, lse, k_head, k_strides[2], v_head, v_strides[2], mask_ptr, seed_ptr,
            positions_ptr, b, bh, query, px, tx, lx, py, ty, ly, L, W, scale, dropout,
            D, BLOCK_D, BLOCK_N, BLOCK_L, DOT, PRECISION, LIFTED, LIFT, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    else:
        dq, sum_x, sum_xx, sum_y, sum_yy = _query_gradients(
            q, lift, grad, delta, lse, k_head, k_strides[2], v_head, v_strides[2], mask_ptr, seed_ptr,
            positions_ptr, b, bh, query, px, tx, lx, py, ty, ly, L, W, scale, dropout,
            D, BLOCK_D, BLOCK_N, NARROW_L, DOT, PRECISION, LIFTED, False, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    _store_rows(_head(dq_ptr, dq_strides, b, h), query, dq_strides[2], real, dq * scale, D, BLOCK_D)
    at = (bh * N + query) * 2
    tl.store(dcenter_ptr + at, lx * sum_x, mask=real)
    tl.store(dcenter_ptr + at + 1, ly * sum_y, mask=real)
    tl.store(dprecision_ptr + at, -0.5 * sum_xx, mask=real)
    tl.store(dprecision_ptr + at + 1, -0.5 * sum_yy, mask=real)


# fmt: off
@triton.jit
def _key_gradients(
    k, v, positions, key, real_keys, q_head, q_stride, grad_head, grad_stride, center_ptr, precision_ptr, seed_ptr,
    lse_ptr, lift_ptr, delta_ptr, bh, N, L, W, scale, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # fmt: on
    """Over all queries: k̄ over 1/√d, and v̄."""
    unit = _unit(scale, LIFT)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dk = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        query = start + tl.arange(0, BLOCK_N)
        real = query < N
        q = _rows(q_head, query, q_stride, real, D, BLOCK_D, DOT)
        lse = tl.load(lse_ptr + bh * N + query, mask=real, other=0.0)
        px, tx, lx = _prior(center_ptr, precision_ptr, bh, query, real, N, W, 0)
        py, ty, ly = _prior(center_ptr, precision_ptr, bh, query, real, N, L // W, 1)
        grad = _rows(grad_head, query, grad_stride, real, D, BLOCK_D, DOT)
        delta = tl.load(delta_ptr + bh * N + query, mask=real, other=0.0)
        lift = query
        if LIFT:
            at = (bh * N + query)[:, None] * 16 + tl.arange(0, 16)[None, :]
            lift = tl.load(lift_ptr + at, mask=real[:, None], other=0.0).to(LIFTED)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        logits = _with_prior(
            logits, positions, lift, key[:, None], real_keys[:, None], px[None, :], tx[None, :], lx[None, :],
            py[None, :], ty[None, :], ly[None, :], W, scale, LIFT, HAS_MASK,
        )  # fmt: skip
        weights = tl.exp2(logits * unit - lse[None, :])  # 1 beyond the last query: its grad and delta are 0
        dweights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (8)
        dropped = weights
        if HAS_DROPOUT:
            kept = _kept(seed, bh, query[None, :], key[:, None], dropout)
            dropped = tl.where(kept, weights / (1.0 - dropout), 0.0)
            dweights = tl.where(kept, dweights / (1.0 - dropout), 0.0)
        dlogits = weights * (dweights - delta[None, :])  # (9)
        dv = tl.dot(dropped.to(DOT), grad, acc=dv, input_precision=PRECISION)
        dk = tl.dot(dlogits.to(DOT), q, acc=dk, input_precision=PRECISION)
    return dk, dv


# fmt: off
@triton.jit
def backward_key_kernel(
    q_ptr, k_ptr, v_ptr, center_ptr, precision_ptr, mask_ptr, seed_ptr, positions_ptr, lse_ptr, lift_ptr,
    grad_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, dk_strides, dv_strides,
    heads, N, L, W, scale, dropout, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # fmt: on
    """v̄ of (7) and k̄ of (10) for BLOCK_L keys of one head; 0 at padded keys. All blocks here are keys by queries."""
    blocks = tl.cdiv(L, BLOCK_L)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_L
    key = first + tl.arange(0, BLOCK_L)
    b, h = bh // heads, bh % heads
    real_keys = _real_keys(key, mask_ptr, b * L, L, HAS_MASK)
    k = _rows(_head(k_ptr, k_strides, b, h), key, k_strides[2], real_keys, D, BLOCK_D, DOT)
    v = _rows(_head(v_ptr, v_strides, b, h), key, v_strides[2], real_keys, D, BLOCK_D, DOT)
    q_head, grad_head = _head(q_ptr, q_strides, b, h), _head(grad_ptr, grad_strides, b, h)
    positions = _positions(positions_ptr, key, LIFT)
    wide = False
    NARROW_N: tl.constexpr = 16 if LIFT and BLOCK_N > 16 else BLOCK_N  # otherwise the kernel needs the registers of both branches
    if LIFT:
        wide = _is_wide(center_ptr, precision_ptr, bh, N, L, W, limit)
    if wide:
        dk, dv = _key_gradients(
            k, v, positions, key, real_keys, q_head, q_strides[2], grad_head, grad_strides[2], center_ptr, precision_ptr,
            seed_ptr, lse_ptr, lift_ptr, delta_ptr, bh, N, L, W, scale, dropout,
            D, BLOCK_D, BLOCK_N, BLOCK_L, DOT, PRECISION, LIFTED, LIFT, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    else:
        dk, dv = _key_gradients(
            k, v, positions, key, real_keys, q_head, q_strides[2], grad_head, grad_strides[2], center_ptr, precision_ptr,
            seed_ptr, lse_ptr, lift_ptr, delta_ptr, bh, N, L, W, scale, dropout,
            D, BLOCK_D, NARROW_N, BLOCK_L, DOT, PRECISION, LIFTED, False, HAS_MASK, HAS_DROPOUT,
        )  # fmt: skip
    _store_rows(_head(dk_ptr, dk_strides, b, h), key, dk_strides[2], key < L, dk * scale, D, BLOCK_D)
    _store_rows(_head(dv_ptr, dv_strides, b, h), key, dv_strides[2], key < L, dv, D, BLOCK_D)
