"""dual_attention's backward on a GPU: the tangent of the flash backward, or with ggn the flash
backward itself. One kernel owns queries (dq, and the row sums D, D_t on its way), one owns keys
(dk, dv over the query heads of its key head, in their order): no atomics, the same bits every time.

With c = g V^T - D and z = S_t - mu: ds = P o c, ds_t = P o (z o c + g_t V^T + g V_t^T - D_t),
P_t = P o z.
"""

from u2a_kernels._triton import cast_to, tanh, tl, triton
from u2a_kernels.ops.dual_attention.triton import place, rows, visible


@triton.jit
def _product(a, b, a_t, b_t, PREC: tl.constexpr):
    """a_t b + a b_t."""
    return tl.dot(a, b_t, tl.dot(a_t, b, input_precision=PREC), input_precision=PREC)


@triton.jit
def _softmax(
    a, b, top, rest, seen, scale, softcap, CAPPED: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """P for S = a b, and the tanh of a cap."""
    s = tl.dot(a, b, input_precision=PREC) * scale
    th = s
    if CAPPED:
        th = tanh(s / softcap)
        s = softcap * th
    return tl.where(seen, tl.exp((s - top) - rest), 0.0), th


@triton.jit
def _slopes(p, th, z, mu, c, e, softcap, HVP: tl.constexpr, CAPPED: tl.constexpr):
    """P_t, ds, ds_t from z = scale S_t, c = g V^T - D, e = g_t V^T + g V_t^T - D_t; ds, ds_t are
    gradients over `scale`."""
    ds = p * c
    p_t, ds_t = ds, ds
    if HVP:
        if CAPPED:
            z = z * (1.0 - th * th)
        ds_t = p * ((z - mu) * c + e)
        p_t = p * (z - mu)
        if CAPPED:
            ds_t = ds_t * (1.0 - th * th) - ds * (th * z) * (2.0 / softcap)
    if CAPPED:
        ds = ds * (1.0 - th * th)
    return p_t, ds, ds_t


@triton.jit
def _diagonal(x, B: tl.constexpr):
    i = tl.arange(0, B)
    return tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), axis=1)


@triton.jit
def _store(x, n, N, stride, value, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    live = (n[:, None] < N) & (d[None, :] < D)
    p = x + n.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(p, cast_to(value, x.dtype.element_ty), mask=live)


@triton.jit
def query_kernel(
    grad, q, k, v, out, stats, dq, sums, spans, sg, sq, sk, sv, so, sdq, st, ss, tiles, T, S,
    scale, softcap, window, HVP: tl.constexpr, BOTH: tl.constexpr,
    REP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and sums[0], sums[1] = D, D_t. The cotangent of the tangent half is
    g, of the primal half g_t; with ggn the primal half's is g."""
    b, start, T, S, block = place(tl.program_id(0), spans, tiles, T, S, PACKED, CAUSAL)
    h = tl.program_id(1).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    at = m.to(tl.int64)
    grad += b * sg[1] + h * sg[2] + start * sg[3]
    q += b * sq[1] + h * sq[2] + start * sq[3]
    out += b * so[1] + h * so[2] + start * so[3]
    k += b * sk[1] + h // REP * sk[2] + start * sk[3]
    v += b * sv[1] + h // REP * sv[2] + start * sv[3]
    stats += b * st[1] + h * st[2] + (start + at) * st[3]
    sums += b * ss[1] + h * ss[2] + (start + at) * ss[3]
    bq = rows(q, m, T, sq[3], D, BD, DOT, True)
    # D by the product that makes g V^T: a query that sees one key gets ds = 0 and not a rounding.
    bo = tl.trans(rows(out, m, T, so[3], DV, BV, DOT, True))
    if HVP:
        bq_t = rows(q + sq[0], m, T, sq[3], D, BD, DOT, True)
        bg = rows(grad + sg[0], m, T, sg[3], DV, BV, DOT, True)
        bg_t = rows(grad, m, T, sg[3], DV, BV, DOT, True)
        bo_t = tl.trans(rows(out + so[0], m, T, so[3], DV, BV, DOT, True))
        total_t = _diagonal(_product(bg, bo, bg_t, bo_t, PREC), BM)
        tl.store(sums + ss[0], total_t, mask=m < T)
    else:
        bg = rows(grad, m, T, sg[3], DV, BV, DOT, True)
        bq_t, bg_t = bq, bg
        total_t = tl.zeros((BM,), tl.float32)
    total = _diagonal(tl.dot(bg, bo, input_precision=PREC), BM)
    tl.store(sums, total, mask=m < T)
    top = tl.load(stats, mask=m < T, other=0.0)[:, None]
    rest = tl.load(stats + st[0], mask=m < T, other=0.0)[:, None]
    mu = tl.load(stats + 2 * st[0], mask=m < T, other=0.0)[:, None]
    acc = tl.zeros((BM, BD), tl.float32)
    acc_t = tl.zeros((BM, BD), tl.float32)
    last = block * BM + (S - T)
    low, high = 0, S
    if CAUSAL:
        high = tl.maximum(0, tl.minimum(S, last + BM))
    if WINDOWED:
        low = tl.maximum(0, last - window + 1) // BN * BN
    for n0 in range(low, high, BN):
        n = n0 + tl.arange(0, BN)
        bk = rows(k, n, S, sk[3], D, BD, DOT, True)
        bv = tl.trans(rows(v, n, S, sv[3], DV, BV, DOT, True))
        bk_t, bv_t = bk, bv
        if HVP:
            bk_t = rows(k + sk[0], n, S, sk[3], D, BD, DOT, True)
            bv_t = tl.trans(rows(v + sv[0], n, S, sv[3], DV, BV, DOT, True))
        seen = visible(m[:, None], n[None, :], T, S, window, CAUSAL, WINDOWED)
        bk_tr = tl.trans(bk)
        p, th = _softmax(bq, bk_tr, top, rest, seen, scale, softcap, CAPPED, PREC)
        z, e = p, p
        if HVP:
            z = _product(bq, bk_tr, bq_t, tl.trans(bk_t), PREC) * scale
        c = tl.dot(bg, bv, input_precision=PREC) - total[:, None]
        if HVP:
            e = _product(bg, bv, bg_t, bv_t, PREC) - total_t[:, None]
        _, ds, ds_t = _slopes(p, th, z, mu, c, e, softcap, HVP, CAPPED)
        ds = ds.to(DOT)
        if HVP:
            acc = tl.dot(ds_t.to(DOT), bk, acc, input_precision=PREC)
            acc = tl.dot(ds, bk_t, acc, input_precision=PREC)
            if BOTH:
                acc_t = tl.dot(ds, bk, acc_t, input_precision=PREC)
        else:
            acc = tl.dot(ds, bk, acc, input_precision=PREC)
    dq += b * sdq[1] + h * sdq[2] + start * sdq[3]
    _store(dq, m, T, sdq[3], acc * scale, D, BD)
    if BOTH:
        _store(dq + sdq[0], m, T, sdq[3], acc_t * scale, D, BD)


@triton.jit
def key_kernel(
    grad, q, k, v, stats, dk, dv, sums, spans, sg, sq, sk, sv, sdk, sdv, st, ss, tiles, T, S,
    scale, softcap, window, HVP: tl.constexpr, BOTH: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    REP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk (KEYS) and dv (VALUES) of a block of keys, from scores with keys as rows."""
    b, start, T, S, block = place(tl.program_id(0), spans, tiles, T, S, PACKED, False)
    h_kv = tl.program_id(1).to(tl.int64)
    n = block * BN + tl.arange(0, BN)
    k += b * sk[1] + h_kv * sk[2] + start * sk[3]
    v += b * sv[1] + h_kv * sv[2] + start * sv[3]
    bk = rows(k, n, S, sk[3], D, BD, DOT, True)
    bv = rows(v, n, S, sv[3], DV, BV, DOT, True)
    bk_t, bv_t = bk, bv
    if HVP:
        bk_t = rows(k + sk[0], n, S, sk[3], D, BD, DOT, True)
        bv_t = rows(v + sv[0], n, S, sv[3], DV, BV, DOT, True)
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_k_t = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BV), tl.float32)
    acc_v_t = tl.zeros((BN, BV), tl.float32)
    low, high = 0, T
    if CAUSAL:
        low = tl.maximum(0, block * BN - (S - T)) // BM * BM
    if WINDOWED:
        high = tl.minimum(T, block * BN + BN - 1 - (S - T) + window)
    steps = tl.cdiv(tl.maximum(0, high - low), BM)
    for i in range(0, REP * steps):
        h = h_kv * REP + i // steps
        m = low + i % steps * BM + tl.arange(0, BM)
        at = m.to(tl.int64)
        here_q = q + b * sq[1] + h * sq[2] + start * sq[3]
        here_g = grad + b * sg[1] + h * sg[2] + start * sg[3]
        here = stats + b * st[1] + h * st[2] + (start + at) * st[3]
        here_s = sums + b * ss[1] + h * ss[2] + (start + at) * ss[3]
        # Each statistic is loaded where it is used: as columns they take many registers.
        bq = rows(here_q, m, T, sq[3], D, BD, DOT, True)
        bq_tr = tl.trans(bq)
        seen = visible(m[None, :], n[:, None], T, S, window, CAUSAL, WINDOWED)
        top = tl.load(here, mask=m < T, other=0.0)[None, :]
        rest = tl.load(here + st[0], mask=m < T, other=0.0)[None, :]
        p, th = _softmax(bk, bq_tr, top, rest, seen, scale, softcap, CAPPED, PREC)
        bg = rows(here_g, m, T, sg[3], DV, BV, DOT, True)
        z, e, mu, bq_t, bg_t = p, p, top, bq, bg
        if HVP:
            bg_t = bg
            bg = rows(here_g + sg[0], m, T, sg[3], DV, BV, DOT, True)
            bq_t = rows(here_q + sq[0], m, T, sq[3], D, BD, DOT, True)
            z = _product(bk, bq_tr, bk_t, tl.trans(bq_t), PREC) * scale
            mu = tl.load(here + 2 * st[0], mask=m < T, other=0.0)[None, :]
        bg_tr = tl.trans(bg)
        c = tl.dot(bv, bg_tr, input_precision=PREC)
        c -= tl.load(here_s, mask=m < T, other=0.0)[None, :]
        if HVP:
            e = _product(bv, bg_tr, bv_t, tl.trans(bg_t), PREC)
            e -= tl.load(here_s + ss[0], mask=m < T, other=0.0)[None, :]
        p_t, ds, ds_t = _slopes(p, th, z, mu, c, e, softcap, HVP, CAPPED)
        if VALUES:
            if HVP:
                acc_v = tl.dot(p_t.to(DOT), bg, acc_v, input_precision=PREC)
                acc_v = tl.dot(p.to(DOT), bg_t, acc_v, input_precision=PREC)
                if BOTH:
                    acc_v_t = tl.dot(p.to(DOT), bg, acc_v_t, input_precision=PREC)
            else:
                acc_v = tl.dot(p.to(DOT), bg, acc_v, input_precision=PREC)
        if KEYS:
            if HVP:
                acc_k = tl.dot(ds_t.to(DOT), bq, acc_k, input_precision=PREC)
                acc_k = tl.dot(ds.to(DOT), bq_t, acc_k, input_precision=PREC)
                if BOTH:
                    acc_k_t = tl.dot(ds.to(DOT), bq, acc_k_t, input_precision=PREC)
            else:
                acc_k = tl.dot(ds.to(DOT), bq, acc_k, input_precision=PREC)
    if KEYS:
        dk += b * sdk[1] + h_kv * sdk[2] + start * sdk[3]
        _store(dk, n, S, sdk[3], acc_k * scale, D, BD)
        if BOTH:
            _store(dk + sdk[0], n, S, sdk[3], acc_k_t * scale, D, BD)
    if VALUES:
        dv += b * sdv[1] + h_kv * sdv[2] + start * sdv[3]
        _store(dv, n, S, sdv[3], acc_v, DV, BV)
        if BOTH:
            _store(dv + sdv[0], n, S, sdv[3], acc_v_t, DV, BV)
