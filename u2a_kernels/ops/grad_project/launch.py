"""Launches of grad_project on a GPU. A side that several output tiles or maps would project again
is projected to memory first, [N, k] in fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._triton import INTERPRET, dot_dtype, dot_precision, triton
from u2a_kernels.ops.grad_project.rademacher import INPUTS, OUTPUTS, TAG
from u2a_kernels.ops.grad_project.reference import reference, width
from u2a_kernels.ops.grad_project.triton import project_kernel, rows_kernel, sum_kernel

MATRIX, SIGNS, IDENTITY, HOT_MATRIX, HOT_SIGNS = range(5)


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
    n = width(rows, p, k, seed)
    scale, matrix = 1.0, rows
    d = 1 << 32 if hot else rows.shape[1]
    if p is not None and p.ndim == 2:
        kind, matrix, d = MATRIX, p, p.shape[1]
    elif seed >= 0:
        kind, scale = SIGNS, 1 / math.sqrt(k)
    else:
        kind = IDENTITY
    kind += HOT_MATRIX if hot else 0
    return _Side(
        rows, matrix, n, d, max(seed, 0), kind, scale, stream, dtype if hot else rows.dtype
    )


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
    warps = 8 if bn == 128 or bi + bo > 128 or itemsize == 4 else 4
    return dict(BN=bn, BI=bi, BO=bo, BD=bd, splits=max(1, splits), num_warps=warps)


def _to_memory(side: _Side) -> _Side:
    """The side under the identity, its tokens projected (unscaled) into [N, k] fp32."""
    n, itemsize = side.rows.shape[0], side.dtype.itemsize
    out = torch.empty(n, side.k, device=side.rows.device, dtype=torch.float32)
    bn, bj = 64 if itemsize == 2 else 32, _tile(side.k, itemsize)
    if n and side.k:
        rows_kernel[(triton.cdiv(n, bn), triton.cdiv(side.k, bj))](
            side.rows, side.p, out, n, *side.args(),
            KIND=side.kind, STREAM=side.stream, MAGIC=TAG, BN=bn, BJ=bj,
            BD=64 if itemsize == 2 else 32, DOT=_operand(side.dtype), PREC=dot_precision(),
            num_warps=8,
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
    project_kernel[(b * splits, tiles_in * tiles_out)](
        x.rows, x.p, g.rows, g.p, offsets, part, *x.args(), *g.args(), splits, tiles_in,
        x.scale * g.scale,
        KIND_IN=x.kind, KIND_OUT=g.kind, MAGIC=TAG, BN=c["BN"], BI=c["BI"], BO=c["BO"], BD=c["BD"],
        DOT_IN=_operand(x.dtype), DOT_OUT=_operand(g.dtype), PREC=dot_precision(), SUM=total,
        num_warps=c["num_warps"],
    )  # fmt: skip
    if splits > 1:
        size = g.k * x.k
        sum_kernel[(b, triton.cdiv(size, 1024))](part, out, size, splits, BE=1024, num_warps=4)
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
