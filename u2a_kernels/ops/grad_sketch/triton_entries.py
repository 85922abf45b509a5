"""Triton kernels of the sketches that hash every entry of a gradient: its tiles are formed on chip.

sjlt adds them as 64-bit integers, whose sum no order changes; rademacher's partial sums have one
owner each. A one-hot gradient's tiles are tiles of x. No float atomics, no gradient in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._philox import TAG
from u2a_kernels._tiles import gradient_tile
from u2a_kernels._triton import dot_dtype, dot_precision, tl, triton
from u2a_kernels.ops.grad_sketch.maps import (
    RADEMACHER,
    TENSORSKETCH,
    reference_entries,
    reference_rows,
)
from u2a_kernels.ops.grad_sketch.triton import forward_triton


@triton.jit
def _l1(rows, n, N, D, s_n, s_d, BN: tl.constexpr, BD: tl.constexpr):
    """Sum of magnitudes of BN rows."""
    total = tl.zeros((BN,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD).to(tl.int64)
        mask = (n[:, None] < N) & (d[None, :] < D)
        block = tl.load(rows + n[:, None] * s_n + d[None, :] * s_d, mask=mask, other=0.0)
        total += tl.sum(tl.abs(block.to(tl.float32)), axis=1)
    return total


@triton.jit
def _bound_kernel(
    x, g, part, N, D_in, D_out, sx_n, sx_i, sg_n, sg_o,
    ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """part[n] = |g_n|_1 |x_n|_1, the sum of the magnitudes a token adds to the gradient."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    bound = _l1(x, n, N, D_in, sx_n, sx_i, BN, BD)
    if not ROWS:
        bound *= _l1(g, n, N, D_out, sg_n, sg_o, BN, BD)
    tl.store(part + n, bound, mask=n < N)


@triton.jit
def _exponent_kernel(part, offsets, exponent, BN: tl.constexpr):
    """exponent[b]: entries times 2^exponent are integers whose sum stays below 2^61.

    -128 marks an example whose bound is infinite or NaN.
    """
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        total += tl.load(part + n, mask=n < end, other=0.0)
    biased = (tl.sum(total, axis=0).to(tl.int32, bitcast=True) >> 23) & 255
    tl.store(exponent + b, tl.where(biased == 255, -128, 60 + 127 - biased))


@triton.jit
def _power(e):
    """2^e for a normal float32's e."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _one_hot(x, g, n, end, i, D_in, sx_n, sx_i, sg_n):
    """The rows that tokens n hold of a one-hot gradient, and their numbers."""
    label = tl.load(g + n * sg_n, mask=n < end, other=0)
    mask = (n[:, None] < end) & (i[None, :] < D_in)
    tile = tl.load(x + n[:, None] * sx_n + i[None, :] * sx_i, mask=mask, other=0.0)
    return tile.to(tl.float32), label


@triton.jit
def _philox(seed, label, i, stream, MAGIC: tl.constexpr):
    """Words [BO, BI] of the entries (label, i)."""
    column = (i[None, :] + label[:, None] * 0).to(tl.uint32)
    row = (label[:, None] + i[None, :] * 0).to(tl.uint32)
    return tl.philox(seed, column, row, column * 0 + stream, column * 0 + MAGIC)


@triton.jit
def _add(acc, tile, label, i, exponent, K, seed, inside, MAGIC: tl.constexpr):
    """Entries of a tile into their buckets, as integers; two factors, as one could overflow."""
    word, _, _, _ = _philox(seed, label, i, 4, MAGIC)
    half = exponent >> 1
    value = (tile * _power(half) * _power(exponent - half)).to(tl.int64)
    value = tl.where(word >> 31 == 1, -value, value)
    tl.atomic_add(acc + (word & (K - 1)).to(tl.int64), value, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["seed"])
def _sjlt_kernel(
    x, g, offsets, exponent, acc, D_in, D_out, K, seed, sx_n, sx_i, sg_n, sg_o,
    ROWS: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """acc[b] += one tile of the gradient; with ROWS, every num_programs(1)-th tile of BO tokens."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(2).to(tl.int64) * BI + tl.arange(0, BI)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    e = tl.load(exponent + b)
    o0 = tl.program_id(1).to(tl.int64) * BO
    if ROWS:
        for n0 in range(start + o0, end, tl.num_programs(1) * BO):
            n = n0 + tl.arange(0, BO)
            tile, label = _one_hot(x, g, n, end, i, D_in, sx_n, sx_i, sg_n)
            inside = (n[:, None] < end) & (i[None, :] < D_in) & (e != -128)
            _add(acc + b * K, tile, label, i, e, K, seed, inside, MAGIC)
    else:
        o = o0 + tl.arange(0, BO)
        tile = gradient_tile(
            x, g, start, end, o, i, D_in, D_out, sx_n, sx_i, sg_n, sg_o, BO, BI, BN, DOT, PREC
        )
        inside = (o[:, None] < D_out) & (i[None, :] < D_in) & (e != -128)
        _add(acc + b * K, tile, o, i, e, K, seed, inside, MAGIC)


@triton.jit
def _convert_kernel(acc, exponent, out, K, BJ: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    e = -tl.load(exponent + b)
    half = e >> 1
    value = tl.load(acc + b * K + j, mask=j < K, other=0).to(tl.float32)
    value = value * _power(half) * _power(e - half)
    tl.store(out + b * K + j, tl.where(e == 128, float("nan"), value), mask=j < K)


@triton.jit
def _octets(sums, tile, word, first: tl.constexpr):
    """sums[first + q, :] += the tile's sums under the signs of the word's q-th octet of bits."""
    octet = tl.arange(0, 16)
    for q in range(4):
        shift = (q * 8 + tl.arange(0, 8)).to(tl.uint32)
        bits = (word[None, :, :] >> shift[:, None, None]) & 1
        some = tl.sum(tl.sum(tl.where(bits == 1, -tile[None, :, :], tile[None, :, :]), 2), 1)
        sums += tl.where(octet[:, None] == first + q, some[None, :], 0.0)
    return sums


@triton.jit
def _signed_sums(tile, label, i, seed, block, MAGIC: tl.constexpr):
    """[16, 8]: sums of the tile under the signs of features 128 block and following."""
    w0, w1, w2, w3 = _philox(seed, label, i, 4 + 8 * (1 + block), MAGIC)
    sums = tl.zeros((16, 8), tl.float32)
    sums = _octets(sums, tile, w0, 0)
    sums = _octets(sums, tile, w1, 4)
    sums = _octets(sums, tile, w2, 8)
    return _octets(sums, tile, w3, 12)


@triton.jit(do_not_specialize=["seed"])
def _dense_kernel(
    x, g, offsets, part, D_in, D_out, K, seed, sx_n, sx_i, sg_n, sg_o,
    ROWS: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    BI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[split, b, j] for 128 features: every num_programs(2)-th tile of the gradient."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(2)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    columns = tl.cdiv(D_in, BI)
    height = end - start if ROWS else D_out
    sums = tl.zeros((16, 8), tl.float32)
    for tile_number in range(split, tl.cdiv(height, BO) * columns, splits):
        i = (tile_number % columns).to(tl.int64) * BI + tl.arange(0, BI)
        o = (tile_number // columns).to(tl.int64) * BO + tl.arange(0, BO)
        if ROWS:
            tile, label = _one_hot(x, g, start + o, end, i, D_in, sx_n, sx_i, sg_n)
            sums += _signed_sums(tile, label, i, seed, block, MAGIC)
        else:
            tile = gradient_tile(
                x, g, start, end, o, i, D_in, D_out, sx_n, sx_i, sg_n, sg_o, BO, BI, BN, DOT, PREC
            )
            sums += _signed_sums(tile, o, i, seed, block, MAGIC)
    j = block * 128 + tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(part + (split * tl.num_programs(0) + b) * K + j, sums, mask=j < K)


def config(n: int, b: int, dense: bool) -> dict[str, int]:
    """Tokens of a mean example at a time (16 to 64); small tiles for the signs of 128 features."""
    mean = triton.cdiv(n, max(1, b))
    tokens = 16 if mean <= 16 else 32 if mean <= 32 else 64
    return dict(BN=tokens, BO=16, BI=64) if dense else dict(BN=tokens, BO=64, BI=64)


def _arguments(x: Tensor, g: Tensor) -> tuple[list[int], bool]:
    rows = g.ndim == 1
    sizes = [x.shape[1], 1 if rows else g.shape[1]]
    return [*sizes, *x.stride(), g.stride(0), 1 if rows else g.stride(1)], rows


def _sjlt(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    b, n, device = offsets.shape[0] - 1, x.shape[0], x.device
    (d_in, d_out, *strides), rows = _arguments(x, g)
    c = config(n, b, dense=False)
    part = torch.empty(n, device=device, dtype=torch.float32)
    exponent = torch.empty(b, device=device, dtype=torch.int32)
    acc = torch.zeros(b, k, device=device, dtype=torch.int64)
    out = torch.empty(b, k, device=device, dtype=torch.float32)
    if n > 0:
        _bound_kernel[(triton.cdiv(n, 16),)](
            x, g, part, n, d_in, d_out, *strides, ROWS=rows, BN=16, BD=128, num_warps=4
        )
    _exponent_kernel[(b,)](part, offsets, exponent, BN=256, num_warps=4)
    tall = triton.cdiv(max(1, n // b), c["BO"]) if rows else triton.cdiv(d_out, c["BO"])
    if n > 0 and d_in > 0 and d_out > 0:
        _sjlt_kernel[(b, tall, triton.cdiv(d_in, c["BI"]))](
            x, g, offsets, exponent, acc, d_in, d_out, k, seed, *strides,
            ROWS=rows, MAGIC=TAG, **c, DOT=dot_dtype(x), PREC=dot_precision(), num_warps=4,
        )  # fmt: skip
    _convert_kernel[(b, triton.cdiv(k, 256))](acc, exponent, out, k, BJ=256, num_warps=4)
    return out


def _rademacher(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    b, n = offsets.shape[0] - 1, x.shape[0]
    (d_in, d_out, *strides), rows = _arguments(x, g)
    c = config(n, b, dense=True)
    blocks = triton.cdiv(k, 128)
    height = triton.cdiv(n, b) if rows else d_out
    tiles = triton.cdiv(height, c["BO"]) * triton.cdiv(d_in, c["BI"])
    splits = max(1, min(tiles, 1024 // (b * blocks)))
    part = torch.empty(splits, b, k, device=x.device, dtype=torch.float32)
    _dense_kernel[(b, blocks, splits)](
        x, g, offsets, part, d_in, d_out, k, seed, *strides,
        ROWS=rows, MAGIC=TAG, **c, DOT=dot_dtype(x), PREC=dot_precision(), num_warps=4,
    )  # fmt: skip
    return part.sum(0).mul_(k**-0.5)


def entries_triton(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, dense: bool) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference_entries(x, g, offsets, k, seed, dense)
    if offsets.shape[0] == 1:
        return torch.empty(0, k, device=x.device, dtype=torch.float32)
    return (_rademacher if dense else _sjlt)(x, g, offsets.contiguous(), k, seed)


def rows_triton(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, kind: int) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference_rows(x, g, offsets, k, seed, kind)
    if kind == TENSORSKETCH:
        return forward_triton(x, g, offsets, k, seed)
    return entries_triton(x, g, offsets, k, seed, kind == RADEMACHER)
