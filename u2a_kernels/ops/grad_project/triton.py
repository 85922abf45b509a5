"""grad_project's kernels for GPUs: one projects the tokens of (example, split) on both sides, block
by block, and contracts them in registers; the splits' parts are summed in their order.
"""

from __future__ import annotations

from u2a_kernels._triton import tl, triton


@triton.jit
def _signs(seed, c, j0, STREAM: tl.constexpr, MAGIC: tl.constexpr, BJ: tl.constexpr):
    """sqrt(k) P[j, c] as [columns c, rows j0 .. j0 + BJ]; j0 a multiple of BJ <= 128."""
    zero = c * 0
    block = (j0 // 128).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c, zero + block, zero + STREAM, zero + MAGIC)
    j = j0 + tl.arange(0, BJ)
    if BJ <= 32:
        q = (j0 >> 5) & 3
        w = tl.where(q == 0, w0, tl.where(q == 1, w1, tl.where(q == 2, w2, w3)))[:, None]
    else:
        q = ((j >> 5) & 3)[None, :]
        high = tl.where(q == 2, w2[:, None], w3[:, None])
        w = tl.where(q == 0, w0[:, None], tl.where(q == 1, w1[:, None], high))
    bit = (w >> (j & 31).to(tl.uint32)[None, :]) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@triton.jit
def _side(
    rows, p, n, end, j0, K, D, seed, s_n, s_d, sp_k, sp_d,
    KIND: tl.constexpr, STREAM: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Columns j0 .. j0 + BJ of the projected tokens n < end, [BN, BJ] fp32; other tokens 0.

    KIND: 0 matrix, 1 signs, 2 identity; of one-hot rows 3 matrix, 4 signs.
    """
    live = n < end
    j = j0 + tl.arange(0, BJ).to(tl.int64)
    if KIND <= 1:
        y = tl.zeros((BN, BJ), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD).to(tl.int64)
            block = tl.load(
                rows + n[:, None] * s_n + d[None, :] * s_d,
                mask=live[:, None] & (d[None, :] < D),
                other=0.0,
            )  # [BN, BD]
            if KIND == 0:
                factor = tl.load(
                    p + d[:, None] * sp_d + j[None, :] * sp_k,
                    mask=(d[:, None] < D) & (j[None, :] < K),
                    other=0.0,
                )  # [BD, BJ]
            else:
                factor = _signs(seed, d.to(tl.uint32), j0, STREAM, MAGIC, BJ)
            y = tl.dot(block.to(DOT), factor.to(DOT), y, input_precision=PREC)
    elif KIND == 2:
        y = tl.load(
            rows + n[:, None] * s_n + j[None, :] * s_d,
            mask=live[:, None] & (j[None, :] < K),
            other=0.0,
        ).to(tl.float32)
    else:
        c = tl.load(rows + n * s_n, mask=live, other=0)
        known = (c >= 0) & (c < D)
        if KIND == 3:
            y = tl.load(
                p + j[None, :] * sp_k + c[:, None] * sp_d,
                mask=(live & known)[:, None] & (j[None, :] < K),
                other=0.0,
            ).to(tl.float32)
        else:
            y = tl.where(live[:, None], _signs(seed, c.to(tl.uint32), j0, STREAM, MAGIC, BJ), 0.0)
        y = tl.where((live & (known == 0))[:, None], float("nan"), y)
    return y


@triton.jit(do_not_specialize=["seed"])
def rows_kernel(
    rows, p, out, N, K, D, seed, s_n, s_d, sp_k, sp_d,
    KIND: tl.constexpr, STREAM: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[n, j]: one side of all tokens, projected to memory."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    j0 = tl.program_id(1) * BJ
    y = _side(
        rows, p, n, N, j0, K, D, seed, s_n, s_d, sp_k, sp_d,
        KIND, STREAM, MAGIC, BN, BJ, BD, DOT, PREC,
    )  # fmt: skip
    j = j0 + tl.arange(0, BJ)
    tl.store(out + n[:, None] * K + j[None, :], y, mask=(n[:, None] < N) & (j[None, :] < K))


@triton.jit(do_not_specialize=["seed_in", "seed_out"])
def project_kernel(
    x, p_in, g, p_out, offsets, part, K_in, D_in, seed_in, sx_n, sx_d, si_k, si_d,
    K_out, D_out, seed_out, sg_n, sg_d, so_k, so_d, splits, tiles_in, scale,
    KIND_IN: tl.constexpr, KIND_OUT: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BD: tl.constexpr,
    DOT_IN: tl.constexpr, DOT_OUT: tl.constexpr, PREC: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """part[b, split, o, i] of one tile of one example, over the split's tokens."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    o0 = tl.program_id(1) // tiles_in * BO
    i0 = tl.program_id(1) % tiles_in * BI
    first = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    length = tl.cdiv(tl.cdiv(end - first, BN), splits) * BN
    start = first + split * length
    end = tl.minimum(end, start + length)
    total = tl.zeros((BO, BI), tl.float32)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        zx = _side(
            x, p_in, n, end, i0, K_in, D_in, seed_in, sx_n, sx_d, si_k, si_d,
            KIND_IN, 3, MAGIC, BN, BI, BD, DOT_IN, PREC,
        )  # fmt: skip
        zg = _side(
            g, p_out, n, end, o0, K_out, D_out, seed_out, sg_n, sg_d, so_k, so_d,
            KIND_OUT, 2, MAGIC, BN, BO, BD, DOT_OUT, PREC,
        )  # fmt: skip
        total = tl.dot(tl.trans(zg), zx, total, input_precision=SUM)
    o = o0 + tl.arange(0, BO)
    i = i0 + tl.arange(0, BI)
    tl.store(
        part + ((b * splits + split) * K_out + o[:, None]) * K_in + i[None, :],
        total * scale,
        mask=(o[:, None] < K_out) & (i[None, :] < K_in),
    )


@triton.jit
def sum_kernel(part, out, size, splits, BE: tl.constexpr):
    """out[b] = sum of part[b, :] in the order of the splits."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.float32)
    for s in range(0, splits):
        total += tl.load(part + (b * splits + s) * size + e, mask=e < size, other=0.0)
    tl.store(out + b * size + e, total, mask=e < size)
