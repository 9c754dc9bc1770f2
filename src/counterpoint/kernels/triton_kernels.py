"""FlashAttention-2 (arXiv 2307.08691) as Triton kernels. Imported when first used: the package does without Triton.

Symbols of the paper: S = scale Q K^T, P = softmax(S), O = P V, L = logsumexp of the rows of S, D = rowsum(dO O).
Exponentials have base 2, so that a row's statistics are scaled by log2(e) once: scale2 = scale log2(e), L2 = L log2(e).

A tile of rows walks along a list of areas: six int32 each, q0, q1, k0, k1, lo, hi. Query i in [q0, q1) sees key j
in [k0, k1) when lo <= j - i <= hi. Keys that every row of the tile sees are computed without a mask. Tile t has the
areas first[t] to first[t + 1]; programs take tiles in the order `order`, the largest first. So any mask that is cut
into areas, packed documents among them, is one launch, and no partial result leaves the chip.

Shapes: Q, O, dO (B, S, H, D) and K, V (B, T, G, D) by strides of the first three dims; L (B, S, H); L2, D (B, H, S).
Offsets of a tile are 64-bit; inside a tile they are 32-bit.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _area(areas, a):
    at = areas + 6 * a
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def _phases(start, stop, seen_start, seen_stop, whole, BLOCK: tl.constexpr):
    """Cut [start, stop) into masked, unmasked, masked: the middle is whole blocks within [seen_start, seen_stop)."""
    a = start + tl.cdiv(tl.maximum(seen_start - start, 0), BLOCK) * BLOCK
    blocks = tl.maximum(tl.minimum(seen_stop, stop) - a, 0) // BLOCK
    blocks = tl.where(whole, blocks, 0)
    a = tl.where(blocks > 0, a, start)
    return a, a + blocks * BLOCK


@triton.jit
def _tile(X, first, stride, index, dim, stop, MASKED: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """Rows first + index of X (rows x dims); outside of what is there, zeros."""
    at = X + tl.cast(first, tl.int64) * stride + index[:, None] * stride + dim[None, :]
    if MASKED and PADDED:
        return tl.load(at, mask=(first + index < stop)[:, None] & (dim < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(first + index < stop)[:, None], other=0.0)
    elif PADDED:
        return tl.load(at, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(X, first, stride, index, dim, stop, value, D: tl.constexpr):
    at = X + tl.cast(first, tl.int64) * stride + index[:, None] * stride + dim[None, :]
    tl.store(at, value.to(X.dtype.element_ty), mask=(first + index < stop)[:, None] & (dim < D)[None, :])


@triton.jit
def _seen(i, j, q0, q1, k0, k1, lo, hi):
    """Which key j each query i sees, for i and j that broadcast."""
    return (j - i >= lo) & (j - i <= hi) & (i >= q0) & (i < q1) & (j >= k0) & (j < k1)


# ---- forward -------------------------------------------------------------------------------------
@triton.jit
def _attend_keys(
    o, m, l, q, K, V, stride_k, stride_v, row, first_row, col, dim, start, stop, q0, q1, k0, k1, lo, hi, scale2,
    MASKED: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BLOCK_N):
        k = _tile(K, j, stride_k, col, dim, k1, MASKED, D, PADDED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = _seen((first_row + row)[:, None], (j + col)[None, :], q0, q1, k0, k1, lo, hi)
            s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1) * scale2)
        if MASKED:  # a row that has seen nothing keeps m = -inf
            base = tl.where(top == float("-inf"), 0.0, top)
        else:
            base = top
        p = tl.exp2(s * scale2 - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        v = _tile(V, j, stride_v, col, dim, k1, MASKED, D, PADDED)
        o = tl.dot(p.to(v.dtype), v, o * alpha[:, None], input_precision=PRECISION)
        m = top
    return o, m, l


@triton.jit
def forward(
    Q, K, V, O, L, areas, first, order, S, heads, group, scale2,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_os, stride_oh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O and L of one tile of queries of one head. L is (B, S, H) contiguous, float32."""
    tile = tl.load(order + tl.program_id(0))
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    PADDED: tl.constexpr = D_PAD != D
    top_row = tile * BLOCK_M
    end_row = tl.minimum(top_row + BLOCK_M, S)
    K += batch * stride_kb + (head // group) * stride_kh
    V += batch * stride_vb + (head // group) * stride_vh
    q = _tile(Q + batch * stride_qb + head * stride_qh, top_row, stride_qs, row, dim, S, True, D, PADDED)
    o = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for a in range(tl.load(first + tile), tl.load(first + tile + 1)):
        q0, q1, k0, k1, lo, hi = _area(areas, a)
        r0, r1 = tl.maximum(top_row, q0), tl.minimum(end_row, q1)
        start, stop = tl.maximum(k0, r0 + lo), tl.minimum(k1, r1 + hi)
        whole = (r0 == top_row) & (r1 == end_row)
        x, y = _phases(start, stop, r1 - 1 + lo, r0 + hi + 1, whole, BLOCK_N)
        if BANDED:
            o, m, l = _attend_keys(
                o, m, l, q, K, V, stride_kt, stride_vt, row, top_row, col, dim, start, x, q0, q1, k0, k1, lo, hi,
                scale2, True, D, PADDED, BLOCK_N, PRECISION,
            )  # fmt: skip
        o, m, l = _attend_keys(
            o, m, l, q, K, V, stride_kt, stride_vt, row, top_row, col, dim, x, y, q0, q1, k0, k1, lo, hi,
            scale2, False, D, PADDED, BLOCK_N, PRECISION,
        )  # fmt: skip
        o, m, l = _attend_keys(
            o, m, l, q, K, V, stride_kt, stride_vt, row, top_row, col, dim, y, stop, q0, q1, k0, k1, lo, hi,
            scale2, True, D, PADDED, BLOCK_N, PRECISION,
        )  # fmt: skip
    sees = l > 0.0
    l = tl.where(sees, l, 1.0)
    o = o / l[:, None]
    lse = tl.where(sees, (m + tl.log2(l)) * LN2, float("-inf"))
    _store(O + batch * stride_ob + head * stride_oh, top_row, stride_os, row, dim, S, o, D)
    at = L + (batch * S + top_row) * heads + head + row * heads
    tl.store(at, lse, mask=top_row + row < S)


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def row_statistics(
    O, dO, L, L2, Delta, S, heads, stride_ob, stride_os, stride_oh, stride_db, stride_ds, stride_dh,
    stride_lb, stride_ls, stride_lh, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    FROM_OUT: tl.constexpr,
):  # fmt: skip
    """L2 = L log2(e), +inf for rows that see nothing, so that P is 0; D = rowsum(dO O), or D given in place of O."""
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    first, row, dim = tl.program_id(0) * BLOCK_M, tl.arange(0, BLOCK_M), tl.arange(0, D_PAD)
    there = first + row < S
    if FROM_OUT:
        o = _tile(O + batch * stride_ob + head * stride_oh, first, stride_os, row, dim, S, True, D, True)
        do = _tile(dO + batch * stride_db + head * stride_dh, first, stride_ds, row, dim, S, True, D, True)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    else:
        at = O + batch * stride_ob + head * stride_oh + tl.cast(first, tl.int64) * stride_os + row * stride_os
        delta = tl.load(at, mask=there, other=0.0)
    at = L + batch * stride_lb + head * stride_lh + tl.cast(first, tl.int64) * stride_ls + row * stride_ls
    lse = tl.load(at, mask=there, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    at = tl.program_id(1).to(tl.int64) * S + first + row
    tl.store(L2 + at, lse, mask=there)
    tl.store(Delta + at, delta, mask=there)


@triton.jit
def _dq_keys(
    dq, q, do, l2, delta, K, V, stride_k, stride_v, row, first_row, col, dim, start, stop, q0, q1, k0, k1, lo, hi,
    scale2,
    MASKED: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for j in range(start, stop, BLOCK_N):
        k = _tile(K, j, stride_k, col, dim, k1, MASKED, D, PADDED)
        v = _tile(V, j, stride_v, col, dim, k1, MASKED, D, PADDED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            seen = _seen((first_row + row)[:, None], (j + col)[None, :], q0, q1, k0, k1, lo, hi)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * scale2 - l2[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_dq(
    Q, K, V, dO, L2, Delta, dQ, areas, first, order, S, heads, group, scale, scale2,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BANDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K, (B, S, H, D) contiguous, of one tile of queries of one head: three products a block."""
    tile = tl.load(order + tl.program_id(0))
    head = tl.cast(tl.program_id(1) % heads, tl.int64)
    batch = tl.cast(tl.program_id(1) // heads, tl.int64)
    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    PADDED: tl.constexpr = D_PAD != D
    top_row = tile * BLOCK_M
    end_row = tl.minimum(top_row + BLOCK_M, S)
    K += batch * stride_kb + (head // group) * stride_kh
    V += batch * stride_vb + (head // group) * stride_vh
    q = _tile(Q + batch * stride_qb + head * stride_qh, top_row, stride_qs, row, dim, S, True, D, PADDED)
    do = _tile(dO + batch * stride_db + head * stride_dh, top_row, stride_ds, row, dim, S, True, D, PADDED)
    at = (batch * heads + head) * S + top_row + row
    l2 = tl.load(L2 + at, mask=top_row + row < S, other=float("inf"))
    delta = tl.load(Delta + at, mask=top_row + row < S, other=0.0)
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for a in range(tl.load(first + tile), tl.load(first + tile + 1)):
        q0, q1, k0, k1, lo, hi = _area(areas, a)
        r0, r1 = tl.maximum(top_row, q0), tl.minimum(end_row, q1)
        start, stop = tl.maximum(k0, r0 + lo), tl.minimum(k1, r1 + hi)
        whole = (r0 == top_row) & (r1 == end_row)
        x, y = _phases(start, stop, r1 - 1 + lo, r0 + hi + 1, whole, BLOCK_N)
        if BANDED:
            dq = _dq_keys(
                dq, q, do, l2, delta, K, V, stride_kt, stride_vt, row, top_row, col, dim, start, x, q0, q1, k0, k1,
                lo, hi, scale2, True, D, PADDED, BLOCK_N, PRECISION,
            )  # fmt: skip
        dq = _dq_keys(
            dq, q, do, l2, delta, K, V, stride_kt, stride_vt, row, top_row, col, dim, x, y, q0, q1, k0, k1,
            lo, hi, scale2, False, D, PADDED, BLOCK_N, PRECISION,
        )  # fmt: skip
        dq = _dq_keys(
            dq, q, do, l2, delta, K, V, stride_kt, stride_vt, row, top_row, col, dim, y, stop, q0, q1, k0, k1,
            lo, hi, scale2, True, D, PADDED, BLOCK_N, PRECISION,
        )  # fmt: skip
    _store(dQ + (batch * S * heads + head) * D, top_row, heads * D, row, dim, S, dq * scale, D)


@triton.jit
def _dkv_queries(
    dk, dv, k, v, Q, dO, L2, Delta, dQ, stride_q, stride_d, stride_dq, col, first_col, row, dim, start, stop,
    q0, q1, k0, k1, lo, hi, scale, scale2,
    MASKED: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Transposed blocks, keys x queries, so that no operand of the sums dK and dV has to be transposed."""
    for i in range(start, stop, BLOCK_M):
        q = _tile(Q, i, stride_q, row, dim, q1, MASKED, D, PADDED)
        if MASKED:
            l2 = tl.load(L2 + i + row, mask=i + row < q1, other=float("inf"))
            delta = tl.load(Delta + i + row, mask=i + row < q1, other=0.0)
        else:
            l2 = tl.load(L2 + i + row)
            delta = tl.load(Delta + i + row)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            seen = _seen((i + row)[None, :], (first_col + col)[:, None], q0, q1, k0, k1, lo, hi)
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s * scale2 - l2[None, :])
        do = _tile(dO, i, stride_d, row, dim, q1, MASKED, D, PADDED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if ATOMIC:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * scale
            at = dQ + tl.cast(i, tl.int64) * stride_dq + row[:, None] * stride_dq + dim[None, :]
            there = (i + row < q1)[:, None] & (dim < D)[None, :]
            tl.atomic_add(at, dq, mask=there, sem="relaxed")
    return dk, dv


@triton.jit
def backward_dkv(
    Q, K, V, dO, L2, Delta, dQ, dK, dV, areas, first, order, S, T, heads, kv_heads, batches, share, scale, scale2,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_ds, stride_dh,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T dO of one tile of keys, summed over `share` query heads: four products a block.

    dK, dV: (H / G / share, B, T, G, D) contiguous. ATOMIC: a fifth product adds dQ to memory, in no certain order.
    """
    tile = tl.load(order + tl.program_id(0))
    kv_head = tl.cast(tl.program_id(1) % kv_heads, tl.int64)
    batch = tl.cast(tl.program_id(1) // kv_heads, tl.int64)
    part = tl.cast(tl.program_id(2), tl.int64)
    row, col, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    PADDED: tl.constexpr = D_PAD != D
    top_col = tile * BLOCK_N
    end_col = tl.minimum(top_col + BLOCK_N, T)
    k = _tile(K + batch * stride_kb + kv_head * stride_kh, top_col, stride_kt, col, dim, T, True, D, PADDED)
    v = _tile(V + batch * stride_vb + kv_head * stride_vh, top_col, stride_vt, col, dim, T, True, D, PADDED)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for n in range(share):
        head = kv_head * (heads // kv_heads) + part * share + n
        Qh = Q + batch * stride_qb + head * stride_qh
        dOh = dO + batch * stride_db + head * stride_dh
        L2h = L2 + (batch * heads + head) * S
        Deltah = Delta + (batch * heads + head) * S
        dQh = dQ + (batch * S * heads + head) * D
        for a in range(tl.load(first + tile), tl.load(first + tile + 1)):
            q0, q1, k0, k1, lo, hi = _area(areas, a)
            c0, c1 = tl.maximum(top_col, k0), tl.minimum(end_col, k1)
            start, stop = tl.maximum(q0, c0 - hi), tl.minimum(q1, c1 - lo)
            whole = (c0 == top_col) & (c1 == top_col + BLOCK_N)
            x, y = _phases(start, stop, c1 - 1 - hi, c0 - lo + 1, whole, BLOCK_M)
            dk, dv = _dkv_queries(
                dk, dv, k, v, Qh, dOh, L2h, Deltah, dQh, stride_qs, stride_ds, heads * D, col, top_col, row, dim,
                start, x, q0, q1, k0, k1, lo, hi, scale, scale2, True, D, PADDED, BLOCK_M, ATOMIC, PRECISION,
            )  # fmt: skip
            dk, dv = _dkv_queries(
                dk, dv, k, v, Qh, dOh, L2h, Deltah, dQh, stride_qs, stride_ds, heads * D, col, top_col, row, dim,
                x, y, q0, q1, k0, k1, lo, hi, scale, scale2, False, D, PADDED, BLOCK_M, ATOMIC, PRECISION,
            )  # fmt: skip
            dk, dv = _dkv_queries(
                dk, dv, k, v, Qh, dOh, L2h, Deltah, dQh, stride_qs, stride_ds, heads * D, col, top_col, row, dim,
                y, stop, q0, q1, k0, k1, lo, hi, scale, scale2, True, D, PADDED, BLOCK_M, ATOMIC, PRECISION,
            )  # fmt: skip
    at = ((part * batches + batch) * T * kv_heads + kv_head) * D
    _store(dK + at, top_col, kv_heads * D, col, dim, T, dk * scale, D)
    _store(dV + at, top_col, kv_heads * D, col, dim, T, dv, D)
