"""grad_project on a GPU. One kernel projects the tokens of (example, split) on both sides, block by
block, and contracts them in registers; the splits' parts are summed in their order. A side that
several output tiles or maps would project again is projected to memory first, [N, k] in fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._triton import INTERPRET, dot_dtype, dot_precision, tl, triton
from u2a_kernels.ops.grad_project.rademacher import INPUTS, OUTPUTS, TAG
from u2a_kernels.ops.grad_project.reference import reference, width

MATRIX, SIGNS, IDENTITY, HOT_MATRIX, HOT_SIGNS = range(5)


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
def _rows_kernel(
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
def _project_kernel(
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
def _sum_kernel(part, out, size, splits, BE: tl.constexpr):
    """out[b] = sum of part[b, :] in the order of the splits."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.float32)
    for s in range(0, splits):
        total += tl.load(part + (b * splits + s) * size + e, mask=e < size, other=0.0)
    tl.store(out + b * size + e, total, mask=e < size)


class _Side(NamedTuple):
    """Kernel arguments of one side."""

    rows: Tensor
    p: Tensor
    k: int
    d: int
    seed: int
    kind: int
    scale: float
    stream: int
    dtype: torch.dtype  # of the products

    def args(self) -> tuple:
        s_d = self.rows.stride(1) if self.rows.ndim == 2 else 0
        sp = self.p.stride() if self.p.ndim == 2 else (0, 0)
        return self.k, self.d, self.seed, self.rows.stride(0), s_d, *sp


def _make(
    rows: Tensor, p: Tensor | None, k: int, seed: int, stream: int, dtype: torch.dtype
) -> _Side:
    hot = not rows.is_floating_point()
    is_tensor = p is not None and p.ndim == 2
    kind = MATRIX if is_tensor else SIGNS if seed >= 0 else IDENTITY
    scale = 1 / math.sqrt(k) if kind == SIGNS else 1.0
    d = rows.shape[1] if not hot else p.shape[1] if is_tensor else 1 << 32
    n = width(rows, p, k, seed)
    kind += HOT_MATRIX if hot else 0
    dtype = dtype if hot else rows.dtype
    return _Side(rows, p if is_tensor else rows, n, d, max(seed, 0), kind, scale, stream, dtype)


def _operand(dtype: torch.dtype) -> object:
    return dot_dtype(torch.empty(0, dtype=dtype, device="meta"))


def _tile(k: int, itemsize: int) -> int:
    """Columns of a side in one tile: all up to 128 (64 in fp32)."""
    return min(128 if itemsize == 2 else 64, max(16, triton.next_power_of_2(k)))


def config(n: int, b: int, k_in: int, k_out: int, itemsize: int) -> dict[str, int]:
    """Tiles, and splits of the examples that give two programs per SM of a large GPU.

    Every program reads all of P_in and P_out for BN tokens, hence 128 tokens where there are
    enough of them for that.
    """
    bi, bo = _tile(k_in, itemsize), _tile(k_out, itemsize)
    mean = triton.cdiv(n, max(1, b))
    large = bi + bo <= 128 and mean >= 128 and n >= 128 * 264 and itemsize == 2
    bn = 128 if large else 64 if mean > 32 and itemsize == 2 else 32 if mean > 16 else 16
    tiles = triton.cdiv(k_in, bi) * triton.cdiv(k_out, bo)
    splits = min(triton.cdiv(mean, bn), triton.cdiv(264, max(1, b * tiles)))
    bd = 64 if itemsize == 2 else 32
    return dict(BN=bn, BI=bi, BO=bo, BD=bd, splits=max(1, splits), num_warps=8 if bn == 128 else 4)


def _to_memory(side: _Side) -> _Side:
    """The side under the identity, its tokens projected (unscaled) into [N, k] fp32."""
    n, itemsize = side.rows.shape[0], side.dtype.itemsize
    out = torch.empty(n, side.k, device=side.rows.device, dtype=torch.float32)
    bn, bj = 64 if itemsize == 2 else 32, _tile(side.k, itemsize)
    if n and side.k:
        _rows_kernel[(triton.cdiv(n, bn), triton.cdiv(side.k, bj))](
            side.rows, side.p, out, n, *side.args(),
            KIND=side.kind, STREAM=side.stream, MAGIC=TAG, BN=bn, BJ=bj,
            BD=64 if itemsize == 2 else 32, DOT=_operand(side.dtype), PREC=dot_precision(),
            num_warps=4,
        )  # fmt: skip
    return side._replace(rows=out, p=out, d=side.k, kind=IDENTITY)


def _one_map(x: _Side, g: _Side, offsets: Tensor) -> Tensor:
    b, n = offsets.shape[0] - 1, x.rows.shape[0]
    out = torch.empty(b, g.k, x.k, device=x.rows.device, dtype=torch.float32)
    if out.numel() == 0 or n == 0:
        return out.zero_()
    itemsize = max(x.dtype.itemsize, g.dtype.itemsize)
    c = config(n, b, x.k, g.k, itemsize)
    total = "tf32" if itemsize == 2 and not INTERPRET else dot_precision()
    tiles_in, tiles_out = triton.cdiv(x.k, c["BI"]), triton.cdiv(g.k, c["BO"])
    if tiles_out > 1 and x.kind in (MATRIX, SIGNS):
        x = _to_memory(x)
    if tiles_in > 1 and g.kind in (MATRIX, SIGNS):
        g = _to_memory(g)
    splits = c["splits"]
    part = out if splits == 1 else out.new_empty(b, splits, g.k, x.k)
    _project_kernel[(b * splits, tiles_in * tiles_out)](
        x.rows, x.p, g.rows, g.p, offsets, part, *x.args(), *g.args(), splits, tiles_in,
        x.scale * g.scale,
        KIND_IN=x.kind, KIND_OUT=g.kind, MAGIC=TAG, BN=c["BN"], BI=c["BI"], BO=c["BO"], BD=c["BD"],
        DOT_IN=_operand(x.dtype), DOT_OUT=_operand(g.dtype), PREC=dot_precision(), SUM=total,
        num_warps=c["num_warps"],
    )  # fmt: skip
    if splits > 1:
        size = g.k * x.k
        _sum_kernel[(b, triton.cdiv(size, 1024))](part, out, size, splits, BE=1024, num_warps=4)
    return out


def forward(
    x: Tensor, g: list[Tensor], offsets: Tensor, p_in: Tensor | None, p_out: list[Tensor],
    k_in: int, k_out: list[int], seed_in: int, seed_out: list[int],
) -> list[Tensor]:  # fmt: skip
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference(x, g, offsets, p_in, p_out, k_in, k_out, seed_in, seed_out)
    a = _make(x, p_in, k_in, seed_in, INPUTS, x.dtype)
    if len(g) > 1 and a.kind != IDENTITY:
        a = _to_memory(a)
    offsets = offsets.contiguous()
    sides = (_make(*s, OUTPUTS, x.dtype) for s in zip(g, p_out, k_out, seed_out, strict=True))
    return [_one_map(a, s, offsets) for s in sides]
