"""Triton blocks that several grad_* kernels are built of. Segments are token ranges of one example.

Called from kernels only; each loads in the input's type and accumulates in fp32.
"""

from __future__ import annotations

from u2a_kernels._triton import tl, triton


@triton.jit
def gradient_tile(
    x, g, start, end, o, i, D_in, D_out, sx_n, sx_i, sg_n, sg_o,
    BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """sum of g_t[o] x_t[i] over tokens start <= t < end: [BO, BI]."""
    acc = tl.zeros((BO, BI), tl.float32)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        bg = tl.load(
            g + n[None, :] * sg_n + o[:, None] * sg_o,
            mask=(n[None, :] < end) & (o[:, None] < D_out),
            other=0.0,
        )  # [BO, BN]
        bx = tl.load(
            x + n[:, None] * sx_n + i[None, :] * sx_i,
            mask=(n[:, None] < end) & (i[None, :] < D_in),
            other=0.0,
        )  # [BN, BI]
        acc = tl.dot(bg.to(DOT), bx.to(DOT), acc, input_precision=PREC)
    return acc


@triton.jit
def token_products(
    rows, r, c, end, D, s_n, s_d,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """<rows_r, rows_c> for tokens r and c below end, else 0: [BR, BC]."""
    acc = tl.zeros((BR, BC), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD).to(tl.int64)
        a = tl.load(
            rows + r[:, None] * s_n + d[None, :] * s_d,
            mask=(r[:, None] < end) & (d[None, :] < D),
            other=0.0,
        )  # [BR, BD]
        b = tl.load(
            rows + c[None, :] * s_n + d[:, None] * s_d,
            mask=(c[None, :] < end) & (d[:, None] < D),
            other=0.0,
        )  # [BD, BC]
        acc = tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PREC)
    return acc
