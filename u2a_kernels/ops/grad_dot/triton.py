"""grad_dot on a GPU: partial sums of fixed tiles, added up in a fixed order. No input is empty."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._tiles import gradient_tile
from u2a_kernels._triton import dot_dtype, dot_precision, tl, triton


@triton.jit
def _token_kernel(
    x, g, v, part, N, D_in, D_out, o_per_split,
    sx_n, sx_i, sg_n, sg_o, sv_q, sv_o, sv_i,
    BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[q, split, n] = sum over the split's outputs o of g[n, o] * (V_q x_n)[o]."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    q = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for o0 in range(split * o_per_split, tl.minimum((split + 1) * o_per_split, D_out), BO):
        o = o0 + tl.arange(0, BO).to(tl.int64)
        y = tl.zeros((BN, BO), tl.float32)
        for i0 in range(0, D_in, BI):
            i = i0 + tl.arange(0, BI).to(tl.int64)
            bx = tl.load(
                x + n[:, None] * sx_n + i[None, :] * sx_i,
                mask=(n[:, None] < N) & (i[None, :] < D_in),
                other=0.0,
            )  # [BN, BI]
            bv = tl.load(
                v + q * sv_q + o[None, :] * sv_o + i[:, None] * sv_i,
                mask=(o[None, :] < D_out) & (i[:, None] < D_in),
                other=0.0,
            )  # [BI, BO]
            y = tl.dot(bx.to(DOT), bv.to(DOT), y, input_precision=PREC)
        bg = tl.load(
            g + n[:, None] * sg_n + o[None, :] * sg_o,
            mask=(n[:, None] < N) & (o[None, :] < D_out),
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(y * bg, axis=1)
    splits = tl.num_programs(1)
    tl.store(part + (q * splits + split) * N + n, total, mask=n < N)


@triton.jit
def _segment_kernel(part, offsets, out, N, Q, SPLITS, BN: tl.constexpr):
    """out[b, q] = sum of part[q, :, n] over the tokens n of example b, in a fixed order."""
    b = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for split in range(0, SPLITS):
        for n0 in range(start, end, BN):
            n = n0 + tl.arange(0, BN)
            total += tl.load(part + (q * SPLITS + split) * N + n, mask=n < end, other=0.0)
    tl.store(out + b * Q + q, tl.sum(total, axis=0))


@triton.jit
def _formed_kernel(
    x, g, offsets, v, part, Q, D_in, D_out, TILEsl_O, TILES,
    sx_n, sx_i, sg_n, sg_o, sv_q, sv_o, sv_i,
    BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[b, q, tile] = <G_b, V_q> on one tile of G_b, which is formed once for all directions."""
    b = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    o = (tile % TILEsl_O) * BO + tl.arange(0, BO).to(tl.int64)
    i = (tile // TILEsl_O) * BI + tl.arange(0, BI).to(tl.int64)
    acc = gradient_tile(
        x, g, start, end, o, i, D_in, D_out, sx_n, sx_i, sg_n, sg_o, BO, BI, BN, DOT, PREC
    )
    mask = (o[:, None] < D_out) & (i[None, :] < D_in)
    for q in range(0, Q):
        bv = tl.load(v + q * sv_q + o[:, None] * sv_o + i[None, :] * sv_i, mask=mask, other=0.0)
        total = tl.sum(acc * bv.to(tl.float32))
        tl.store(part + (b * Q + q) * TILES + tile, total)


@triton.jit
def _times_factor(
    rows, factor, n, q, k, N, Q, RANK, D, s_n, s_d, sf_q, sf_d, sf_k,
    BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """<rows_n, factor_q[:, k]> for the columns (q, k): [BN, BC]."""
    z = tl.zeros((BN, BC), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD).to(tl.int64)
        a = tl.load(
            rows + n[:, None] * s_n + d[None, :] * s_d,
            mask=(n[:, None] < N) & (d[None, :] < D),
            other=0.0,
        )  # [BN, BD]
        f = tl.load(
            factor + q[None, :] * sf_q + d[:, None] * sf_d + k[None, :] * sf_k,
            mask=(q[None, :] < Q) & (k[None, :] < RANK) & (d[:, None] < D),
            other=0.0,
        )  # [BD, BC]
        z = tl.dot(a.to(DOT), f.to(DOT), z, input_precision=PREC)
    return z


@triton.jit
def _low_rank_kernel(
    x, g, left, right, part, N, Q, RANK, D_in, D_out, sx_n, sx_i, sg_n, sg_o,
    sl_q, sl_o, sl_k, sr_q, sr_i, sr_k,
    BN: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[q, n] = sum over k of (g_n . left_q[:, k]) (x_n . right_q[:, k])."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * BQ
    column = tl.arange(0, BQ * BR)
    q = first + column // BR
    total = tl.zeros((BN, BQ), tl.float32)
    for k0 in range(0, RANK, BR):
        k = k0 + column % BR
        zg = _times_factor(
            g, left, n, q, k, N, Q, RANK, D_out, sg_n, sg_o, sl_q, sl_o, sl_k,
            BN, BQ * BR, BD, DOT, PREC,
        )  # fmt: skip
        zx = _times_factor(
            x, right, n, q, k, N, Q, RANK, D_in, sx_n, sx_i, sr_q, sr_i, sr_k,
            BN, BQ * BR, BD, DOT, PREC,
        )  # fmt: skip
        total += tl.sum(tl.reshape(zg * zx, (BN, BQ, BR)), axis=2)
    at = first + tl.arange(0, BQ)
    mask = (n[:, None] < N) & (at[None, :] < Q)
    tl.store(part + at[None, :] * N + n[:, None], total, mask=mask)


def config(n: int, d_in: int, d_out: int) -> dict[str, int]:
    """Tile sizes and the number of splits of d_out that fill a GPU when there are few tokens.

    With 8 warps the fp32 tile spills no register on sm_80, 90, 100; with 4 up to 2.6 KB.
    """
    bn = 64 if n >= 64 else 16
    bo = 128 if d_out >= 128 else 64 if d_out >= 64 else 16
    bi = 64 if d_in >= 64 else 16
    tiles = triton.cdiv(d_out, bo)
    splits = max(1, min(tiles, 512 // max(1, triton.cdiv(n, bn))))
    return dict(BN=bn, BO=bo, BI=bi, splits=splits, o_per_split=triton.cdiv(tiles, splits) * bo)


def formed_config(d_in: int, d_out: int, size: int) -> dict[str, int]:
    """The tile of a gradient, for an element of `size` bytes; half as large in fp32."""
    wide = 128 if size == 2 else 64
    bo, bi = (16 if d < 64 else min(wide, 64 if d < 128 else 128) for d in (d_out, d_in))
    return dict(BO=bo, BI=bi, BN=32 if size == 2 else 16)


def low_rank_config(n: int, q: int, rank: int, size: int) -> dict[str, int]:
    """16 to 64 columns of directions x ranks, so that x and g are read once per so many."""
    br = min(64, triton.next_power_of_2(rank))
    bq = max(min(triton.next_power_of_2(q), 64 // br), 16 // br)
    return dict(BN=32 if n >= 2048 else 16, BQ=bq, BR=br, BD=64 if size == 2 else 16)


def by_tokens(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor, out: Tensor) -> Tensor:
    n, d_in, d_out, (b, q) = x.shape[0], x.shape[1], g.shape[1], out.shape
    c = config(n, d_in, d_out)
    part = torch.empty(q, c["splits"], n, device=x.device, dtype=torch.float32)
    _token_kernel[(triton.cdiv(n, c["BN"]), c["splits"], q)](
        x, g, v, part, n, d_in, d_out, c["o_per_split"],
        *x.stride(), *g.stride(), *v.stride(),
        BN=c["BN"], BO=c["BO"], BI=c["BI"], DOT=dot_dtype(x), PREC=dot_precision(), num_warps=8,
    )  # fmt: skip
    _segment_kernel[(b, q)](part, offsets, out, n, q, c["splits"], BN=128, num_warps=4)
    return out


def by_gradients(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor, out: Tensor) -> Tensor:
    d_in, d_out, (b, q) = x.shape[1], g.shape[1], out.shape
    c = formed_config(d_in, d_out, x.element_size())
    tiles_o = triton.cdiv(d_out, c["BO"])
    tiles = tiles_o * triton.cdiv(d_in, c["BI"])
    part = torch.empty(b, q, tiles, device=x.device, dtype=torch.float32)
    _formed_kernel[(b * tiles,)](
        x, g, offsets, v, part, q, d_in, d_out, tiles_o, tiles,
        *x.stride(), *g.stride(), *v.stride(),
        **c, DOT=dot_dtype(x), PREC=dot_precision(), num_warps=8,
    )  # fmt: skip
    return torch.sum(part, -1, out=out)


def low_rank(
    x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor, out: Tensor
) -> Tensor:
    n, d_in, d_out, (b, q), rank = x.shape[0], x.shape[1], g.shape[1], out.shape, left.shape[2]
    c = low_rank_config(n, q, rank, x.element_size())
    part = torch.empty(q, n, device=x.device, dtype=torch.float32)
    _low_rank_kernel[(triton.cdiv(n, c["BN"]), triton.cdiv(q, c["BQ"]))](
        x, g, left, right, part, n, q, rank, d_in, d_out,
        *x.stride(), *g.stride(), *left.stride(), *right.stride(),
        **c, DOT=dot_dtype(x), PREC=dot_precision(), num_warps=4,
    )  # fmt: skip
    _segment_kernel[(b, q)](part, offsets, out, n, q, 1, BN=128, num_warps=4)
    return out
