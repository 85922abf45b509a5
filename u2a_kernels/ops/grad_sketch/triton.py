"""Triton kernel of the TensorSketch: both factors as products with sign matrices made on chip."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._philox import TAG
from u2a_kernels._triton import dot_dtype, dot_precision, tl, triton
from u2a_kernels.ops.grad_sketch.maps import reference, reference_rows


@triton.jit
def _signs(seed, c, j, STREAM: tl.constexpr, MAGIC: tl.constexpr):
    """P[c, j] = s(c) (-1)^popcount(j & h(c)); features j < k mask the word to its bucket bits."""
    zero = c * 0
    word, _, _, _ = tl.philox(seed, c, zero, zero + STREAM, zero + MAGIC)
    bits = word[:, None] & j[None, :]
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    parity = (bits ^ (word >> 31)[:, None]) & 1
    return 1.0 - 2.0 * parity.to(tl.float32)


@triton.jit
def _factor(
    rows, n, end, j, seed, D, s_n, s_d,
    STREAM: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(H C rows)[n, j] as a product with the sign matrix, made tile by tile from the hash."""
    z = tl.zeros((BN, BJ), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD).to(tl.int64)
        block = tl.load(
            rows + n[:, None] * s_n + d[None, :] * s_d,
            mask=(n[:, None] < end) & (d[None, :] < D),
            other=0.0,
        )  # [BN, BD]
        signs = _signs(seed, d.to(tl.uint32), j, STREAM, MAGIC)  # [BD, BJ]
        z = tl.dot(block.to(DOT), signs.to(DOT), z, input_precision=PREC)
    return z


@triton.jit(do_not_specialize=["seed"])
def _sketch_kernel(
    x, g, offsets, out, D_in, D_out, K, seed, scale, sx_n, sx_i, sg_n, sg_o,
    MAGIC: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[b, j] for BJ features of one example: both factors of its tokens, multiplied, summed.

    With ROWS, g [N] holds the one non-zero output of each token.
    """
    b = tl.program_id(0).to(tl.int64)
    j = (tl.program_id(1) * BJ + tl.arange(0, BJ)).to(tl.uint32)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    total = tl.zeros((BJ,), tl.float32)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        zx = _factor(x, n, end, j, seed, D_in, sx_n, sx_i, 1, MAGIC, BN, BJ, BD, DOT, PREC)
        if ROWS:
            row = tl.load(g + n * sg_n, mask=n < end, other=0)
            zg = _signs(seed, row.to(tl.uint32), j, 0, MAGIC)  # [BN, BJ]
        else:
            zg = _factor(g, n, end, j, seed, D_out, sg_n, sg_o, 0, MAGIC, BN, BJ, BD, DOT, PREC)
        total += tl.sum(zx * zg, axis=0)
    tl.store(out + b * K + j, total * scale, mask=j < K)


def config(n: int, b: int, k: int) -> dict[str, int]:
    """Tiles: tokens of a mean example (16 to 64), 64 features, 16 coordinates (32 would spill)."""
    mean = triton.cdiv(n, max(1, b))
    return dict(BN=16 if mean <= 16 else 32 if mean <= 32 else 64, BJ=64 if k >= 64 else 16, BD=16)


def forward_triton(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there. Row numbers in g too."""
    rows = g.ndim == 1
    if x.dtype == torch.float64:
        if rows:
            return reference_rows(x, g, offsets, k, seed, 0)
        return reference(x, g, offsets, k, seed)
    b = offsets.shape[0] - 1
    out = torch.empty(b, k, device=x.device, dtype=torch.float32)
    if b == 0:
        return out
    c = config(x.shape[0], b, k)
    _sketch_kernel[(b, triton.cdiv(k, c["BJ"]))](
        x, g, offsets.contiguous(), out, x.shape[1], 1 if rows else g.shape[1], k, seed, k**-0.5,
        *x.stride(), g.stride(0), 1 if rows else g.stride(1),
        MAGIC=TAG, **c, DOT=dot_dtype(x), PREC=dot_precision(), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out
