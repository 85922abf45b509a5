"""grad_gram on a GPU. What is summed over segments is Triton's; the products between whole sets are
torch's own matmuls (cuBLAS), on scratch of at most 64 MB that the kernels write or read."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._tiles import gradient_tile
from u2a_kernels._triton import dot_dtype, dot_precision, tl, triton

SCRATCH = 1 << 24  # fp32 numbers
SIDE = 64  # tiles of a formed gradient are SIDE x SIDE


@triton.jit
def _form_kernel(
    x, g, offsets, out, D_in, D_out, TILES_O, TILES, o_first, rows, i_first, cols,
    sx_n, sx_i, sg_n, sg_o,
    BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[b, o - o_first, i - i_first] = G_b[o, i] for one tile of a block of rows x cols."""
    b = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    at_o = (tile % TILES_O) * BO + tl.arange(0, BO).to(tl.int64)
    at_i = (tile // TILES_O) * BI + tl.arange(0, BI).to(tl.int64)
    acc = gradient_tile(
        x, g, start, end, o_first + at_o, i_first + at_i, D_in, D_out,
        sx_n, sx_i, sg_n, sg_o, BO, BI, BN, DOT, PREC,
    )  # fmt: skip
    tl.store(
        out + (b * rows + at_o[:, None]) * cols + at_i[None, :],
        acc,
        mask=(at_o[:, None] < rows) & (at_i[None, :] < cols),
    )


@triton.jit
def _column_kernel(
    p, q, offsets2, sums, first, M, N2, B2, SYMMETRIC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """sums[t, c] = sum of p * q over the tokens n < N2 of example c, for rows t of one strip.

    In a symmetric Gram a strip meets no token after it: a pair inside one example whose other
    order is left out counts twice.
    """
    c = (tl.program_id(0) % B2).to(tl.int64)
    t = (tl.program_id(0) // B2).to(tl.int64) * BM + tl.arange(0, BM)
    start = tl.load(offsets2 + c).to(tl.int64)
    end = tl.load(offsets2 + c + 1).to(tl.int64)
    inside = (first + t >= start) & (first + t < end)
    total = tl.zeros((BM,), tl.float32)
    for n0 in range(start, tl.minimum(end, N2), BN):
        n = n0 + tl.arange(0, BN)
        mask = (t[:, None] < M) & (n[None, :] < tl.minimum(end, N2))
        product = tl.load(p + t[:, None] * N2 + n[None, :], mask=mask, other=0.0)
        product *= tl.load(q + t[:, None] * N2 + n[None, :], mask=mask, other=0.0)
        if SYMMETRIC:
            product *= tl.where(inside[:, None] & (n[None, :] < first), 2.0, 1.0)
        total += tl.sum(product, axis=1)
    tl.store(sums + t * B2 + c, total, mask=t < M)


@triton.jit
def _row_kernel(sums, offsets, out, first, M, B2, TILES, BC: tl.constexpr):
    """out[b, c] += sum of sums[t, c] over the tokens of example b that lie in the strip."""
    b = (tl.program_id(0) // TILES).to(tl.int64)
    c = (tl.program_id(0) % TILES).to(tl.int64) * BC + tl.arange(0, BC)
    start = tl.maximum(tl.load(offsets + b).to(tl.int64) - first, 0)
    end = tl.minimum(tl.load(offsets + b + 1).to(tl.int64) - first, M)
    total = tl.zeros((BC,), tl.float32)
    for t in range(start, end):
        total += tl.load(sums + t * B2 + c, mask=c < B2, other=0.0)
    at = out + b * B2 + c
    mask = (c < B2) & (start < end)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def config(n: int, n2: int, b2: int) -> dict[str, int]:
    """Rows of a strip, so that both products of it fit the scratch; the tile that sums it."""
    mean = triton.cdiv(n2, b2)
    bn = 16 if mean <= 16 else 64
    return dict(strip=max(1, min(n, SCRATCH // (2 * n2 + b2))), BM=1024 // bn, BN=bn)


def block_of(d_out: int, d_in: int, examples: int) -> tuple[int, int]:
    """Rows and columns of every gradient that are formed at a time, multiples of the tile."""
    entries = max(SIDE * SIDE, SCRATCH // examples)
    cols = min(d_in, max(SIDE, entries // SIDE // SIDE * SIDE))
    return min(d_out, max(SIDE, entries // cols // SIDE * SIDE)), cols


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; on a GPU without fp32 copies of half-precision operands."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def by_tokens(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    n, (b, b2) = x.shape[0], out.shape
    c = config(n, x2.shape[0], b2)
    tiles = triton.cdiv(b2, 128)
    for t in range(0, n, c["strip"]):
        end = min(n, t + c["strip"])
        m, n2 = end - t, end if same else x2.shape[0]
        p, q = _mm_fp32(x[t:end], x2[:n2].T), _mm_fp32(g[t:end], g2[:n2].T)
        sums = torch.empty(m, b2, device=x.device, dtype=torch.float32)
        _column_kernel[(triton.cdiv(m, c["BM"]) * b2,)](
            p, q, offsets2, sums, t, m, n2, b2, SYMMETRIC=same, BM=c["BM"], BN=c["BN"], num_warps=4
        )
        _row_kernel[(b * tiles,)](sums, offsets, out, t, m, b2, tiles, BC=128, num_warps=4)
    return out.tril() + out.tril(-1).T if same else out


def by_gradients(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool, out: Tensor,
) -> Tensor:  # fmt: skip
    b, b2 = out.shape
    d_in, d_out, held = x.shape[1], g.shape[1], b if same else b + b2
    rows, cols = block_of(d_out, d_in, held)
    scratch = torch.empty(held * rows * cols, device=x.device, dtype=torch.float32)
    for o in range(0, d_out, rows):
        for i in range(0, d_in, cols):
            block = o, min(rows, d_out - o), i, min(cols, d_in - i)
            size = block[1] * block[3]
            first = scratch[: b * size].view(b, size)
            _form(x, g, offsets, first, block)
            second = first
            if not same:
                second = scratch[b * size : (b + b2) * size].view(b2, size)
                _form(x2, g2, offsets2, second, block)
            out.addmm_(first, second.T)
    return out


def _form(
    x: Tensor, g: Tensor, offsets: Tensor, out: Tensor, block: tuple[int, int, int, int]
) -> None:
    o, rows, i, cols = block
    tiles_o = triton.cdiv(rows, SIDE)
    tiles = tiles_o * triton.cdiv(cols, SIDE)
    _form_kernel[(out.shape[0] * tiles,)](
        x, g, offsets, out, x.shape[1], g.shape[1], tiles_o, tiles, o, rows, i, cols,
        *x.stride(), *g.stride(),
        BO=SIDE, BI=SIDE, BN=32 if x.element_size() == 2 else 16,
        DOT=dot_dtype(x), PREC=dot_precision(), num_warps=4,
    )  # fmt: skip
