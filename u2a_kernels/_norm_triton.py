"""Triton kernels of dual_rms_norm and dual_layer_norm; formulas and letters as in `_norm`.

A program holds whole rows, so that every input is read once; rows wider than `config` allows are
read in pieces, the second time from the cache. Gradients of weight and bias are summed in at most
256 partial rows that have one owner each: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels import _norm
from u2a_kernels._triton import cast_to, tl, triton

PROGRAMS = 256


@triton.jit
def _rows(x, n, d, N, D):
    """Primal and tangent rows n of x [2N, D] as fp32 [BR, BD], zeros outside."""
    mask = (n[:, None] < N) & (d[None, :] < D)
    p = x + n[:, None] * D + d[None, :]
    t = x + (n + N)[:, None] * D + d[None, :]
    a = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    return a, tl.load(t, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(x, n, d, N, D, primal, tangent):
    mask = (n[:, None] < N) & (d[None, :] < D)
    p = x + n[:, None] * D + d[None, :]
    t = x + (n + N)[:, None] * D + d[None, :]
    tl.store(p, cast_to(primal, x.dtype.element_ty), mask=mask)
    tl.store(t, cast_to(tangent, x.dtype.element_ty), mask=mask)


@triton.jit
def _vector(w, d, D, HAS: tl.constexpr):
    """w as fp32 [1, BD], zeros where there is none."""
    if HAS:
        return tl.load(w + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    else:
        return tl.zeros_like(d).to(tl.float32)[None, :]


@triton.jit
def _centre(x, x_t, mean, mean_t, d, D, CENTRED: tl.constexpr):
    """x less its mean [BR], zeros past D."""
    if CENTRED:
        x = tl.where(d[None, :] < D, x - mean[:, None], 0.0)
        x_t = tl.where(d[None, :] < D, x_t - mean_t[:, None], 0.0)
    return x, x_t


@triton.jit
def _deviation(square, product, D, eps):
    s = tl.rsqrt(square / D + eps)
    return s, -s * s * s * (product / D)


@triton.jit
def _write(x, x_t, y, w, b, w_t, b_t, s, s_t, n, d, N, D,
           HAS_B: tl.constexpr, HAS_WT: tl.constexpr, HAS_BT: tl.constexpr):  # fmt: skip
    n_x = x * s[:, None]
    n_t = x_t * s[:, None] + x * s_t[:, None]
    bw = _vector(w, d, D, True)
    out_t = n_t * bw + n_x * _vector(w_t, d, D, HAS_WT) + _vector(b_t, d, D, HAS_BT)
    _put(y, n, d, N, D, n_x * bw + _vector(b, d, D, HAS_B), out_t)


@triton.jit
def _forward_kernel(
    x, y, w, b, w_t, b_t, N, D, eps,
    HAS_B: tl.constexpr, HAS_WT: tl.constexpr, HAS_BT: tl.constexpr, CENTRED: tl.constexpr,
    WIDE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BR rows held on chip; WIDE: in pieces of BD columns, read again from the cache."""
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mean = tl.zeros((BR,), tl.float32)
    mean_t = tl.zeros((BR,), tl.float32)
    if not WIDE:
        bx, bx_t = _rows(x, n, d, N, D)
        if CENTRED:
            mean = tl.sum(bx, 1) / D
            mean_t = tl.sum(bx_t, 1) / D
        bx, bx_t = _centre(bx, bx_t, mean, mean_t, d, D, CENTRED)
        s, s_t = _deviation(tl.sum(bx * bx, 1), tl.sum(bx * bx_t, 1), D, eps)
        _write(bx, bx_t, y, w, b, w_t, b_t, s, s_t, n, d, N, D, HAS_B, HAS_WT, HAS_BT)
    else:
        if CENTRED:
            for d0 in range(0, D, BD):
                bx, bx_t = _rows(x, n, d0 + d, N, D)
                mean += tl.sum(bx, 1)
                mean_t += tl.sum(bx_t, 1)
            mean = mean / D
            mean_t = mean_t / D
        square = tl.zeros((BR,), tl.float32)
        product = tl.zeros((BR,), tl.float32)
        for d0 in range(0, D, BD):
            bx, bx_t = _rows(x, n, d0 + d, N, D)
            bx, bx_t = _centre(bx, bx_t, mean, mean_t, d0 + d, D, CENTRED)
            square += tl.sum(bx * bx, 1)
            product += tl.sum(bx * bx_t, 1)
        s, s_t = _deviation(square, product, D, eps)
        for d0 in range(0, D, BD):
            bx, bx_t = _rows(x, n, d0 + d, N, D)
            bx, bx_t = _centre(bx, bx_t, mean, mean_t, d0 + d, D, CENTRED)
            _write(bx, bx_t, y, w, b, w_t, b_t, s, s_t, n, d0 + d, N, D, HAS_B, HAS_WT, HAS_BT)


@triton.jit
def _cotangents(g, w, w_t, n, d, N, D, HAS_WT: tl.constexpr):
    """g, g_t and the cotangents a, a_t of the normalised halves."""
    bg_t, bg = _rows(g, n, d, N, D)
    bw = _vector(w, d, D, True)
    return bg, bg_t, bg * bw, bg_t * bw + bg * _vector(w_t, d, D, HAS_WT)


@triton.jit
def _scalars(square, product, along, along_t, D, eps):
    """s, s_t, c2, c2_t from sums of xc^2, xc xc_t, xc a and xc_t a + xc a_t."""
    s, s_t = _deviation(square, product, D, eps)
    return s, s_t, s * (along / D), s * (along_t / D) + s_t * (along / D)


@triton.jit
def _apply(x, x_t, g, g_t, a, a_t, dx, s, s_t, c1, c1_t, c2, c2_t, n, d, N, D):
    """Stores dx and dx_t; returns what the rows add to dw, nothing past row N."""
    s, s_t = s[:, None], s_t[:, None]
    n_x = x * s
    n_t = x_t * s + x * s_t
    u = a - c1[:, None] - n_x * c2[:, None]
    u_t = a_t - c1_t[:, None] - n_t * c2[:, None] - n_x * c2_t[:, None]
    _put(dx, n, d, N, D, s_t * u + s * u_t, s * u)
    return tl.where(n[:, None] < N, g_t * n_x + g * n_t, 0.0)


@triton.jit
def _backward_kernel(
    g, x, dx, w, w_t, part_w, part_b, N, D, eps,
    HAS_WT: tl.constexpr, CENTRED: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th block of BR whole rows."""
    pid = tl.program_id(0)
    d = tl.arange(0, BD)
    sum_w = tl.zeros((BR, BD), tl.float32)
    sum_b = tl.zeros((BR, BD), tl.float32)
    zero = tl.zeros((BR,), tl.float32)
    for tile in range(pid, tl.cdiv(N, BR), tl.num_programs(0)):
        n = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        bx, bx_t = _rows(x, n, d, N, D)
        bg, bg_t, a, a_t = _cotangents(g, w, w_t, n, d, N, D, HAS_WT)
        c1, c1_t = zero, zero
        if CENTRED:
            c1, c1_t = tl.sum(a, 1) / D, tl.sum(a_t, 1) / D
            bx, bx_t = _centre(bx, bx_t, tl.sum(bx, 1) / D, tl.sum(bx_t, 1) / D, d, D, True)
        s, s_t, c2, c2_t = _scalars(
            tl.sum(bx * bx, 1), tl.sum(bx * bx_t, 1), tl.sum(bx * a, 1),
            tl.sum(bx_t * a + bx * a_t, 1), D, eps,
        )  # fmt: skip
        rows_w = _apply(bx, bx_t, bg, bg_t, a, a_t, dx, s, s_t, c1, c1_t, c2, c2_t, n, d, N, D)
        if NEED_W:
            sum_w += rows_w
        if NEED_B:
            sum_b += bg_t
    if NEED_W:
        tl.store(part_w + pid.to(tl.int64) * D + d, tl.sum(sum_w, 0), mask=d < D)
    if NEED_B:
        tl.store(part_b + pid.to(tl.int64) * D + d, tl.sum(sum_b, 0), mask=d < D)


@triton.jit
def _backward_wide_kernel(
    g, x, dx, w, w_t, part_w, part_b, N, D, eps,
    HAS_WT: tl.constexpr, CENTRED: tl.constexpr, NEED_W: tl.constexpr, NEED_B: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The same by pieces of BD columns; partial sums are added where they are kept."""
    pid = tl.program_id(0)
    zero = tl.zeros((BR,), tl.float32)
    for tile in range(pid, tl.cdiv(N, BR), tl.num_programs(0)):
        n = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        mean, mean_t, c1, c1_t = zero, zero, zero, zero
        if CENTRED:
            for d0 in range(0, D, BD):
                d = d0 + tl.arange(0, BD)
                bx, bx_t = _rows(x, n, d, N, D)
                bg, bg_t, a, a_t = _cotangents(g, w, w_t, n, d, N, D, HAS_WT)
                mean += tl.sum(bx, 1) / D
                mean_t += tl.sum(bx_t, 1) / D
                c1 += tl.sum(a, 1) / D
                c1_t += tl.sum(a_t, 1) / D
        square, product, along, along_t = zero, zero, zero, zero
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            bx, bx_t = _rows(x, n, d, N, D)
            bx, bx_t = _centre(bx, bx_t, mean, mean_t, d, D, CENTRED)
            bg, bg_t, a, a_t = _cotangents(g, w, w_t, n, d, N, D, HAS_WT)
            square += tl.sum(bx * bx, 1)
            product += tl.sum(bx * bx_t, 1)
            along += tl.sum(bx * a, 1)
            along_t += tl.sum(bx_t * a + bx * a_t, 1)
        s, s_t, c2, c2_t = _scalars(square, product, along, along_t, D, eps)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            bx, bx_t = _rows(x, n, d, N, D)
            bx, bx_t = _centre(bx, bx_t, mean, mean_t, d, D, CENTRED)
            bg, bg_t, a, a_t = _cotangents(g, w, w_t, n, d, N, D, HAS_WT)
            rows_w = _apply(bx, bx_t, bg, bg_t, a, a_t, dx, s, s_t, c1, c1_t, c2, c2_t, n, d, N, D)
            at = pid.to(tl.int64) * D + d
            if NEED_W:
                kept = tl.load(part_w + at, mask=d < D, other=0.0)
                tl.store(part_w + at, kept + tl.sum(rows_w, 0), mask=d < D)
            if NEED_B:
                kept = tl.load(part_b + at, mask=d < D, other=0.0)
                tl.store(part_b + at, kept + tl.sum(bg_t, 0), mask=d < D)


def config(n: int, d: int, held: int, limit: int) -> dict[str, int]:
    """Blocks of whole rows, about `held` elements of each tensor on chip; pieces of 2048 columns
    where a row has more than `limit`, the most that was compiled without spills."""
    width = max(16, triton.next_power_of_2(d if d <= limit else 2048))
    rows = max(1, min(held // width, triton.next_power_of_2(n)))
    return dict(BR=rows, BD=width, num_warps=max(4, min(16, rows * width * 4 // held)))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_t: Tensor | None,
    bias_t: Tensor | None, eps: float, centred: bool,
) -> Tensor:  # fmt: skip
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return _norm.reference(x, weight, bias, weight_t, bias_t, eps, centred)
    x, vectors = x.contiguous(), _contiguous(weight, bias, weight_t, bias_t)
    y = torch.empty_like(x)
    if x.numel():
        d = x.shape[-1]
        n = x.numel() // d // 2
        c = config(n, d, held=4096, limit=8192)
        _forward_kernel[(triton.cdiv(n, c["BR"]),)](
            x, y, *vectors, n, d, eps,
            HAS_B=bias is not None, HAS_WT=weight_t is not None, HAS_BT=bias_t is not None,
            CENTRED=centred, WIDE=d > c["BD"], **c,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float, centred: bool,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return _norm.reference_bwd(grad, x, weight, weight_t, eps, centred, weight_grad, bias_grad)
    grad, x, vectors = grad.contiguous(), x.contiguous(), _contiguous(weight, weight_t)
    dx, d = torch.empty_like(x), x.shape[-1]
    n = x.numel() // max(1, d) // 2
    c = config(n, d, held=2048, limit=4096 if weight_grad or bias_grad else 8192)
    programs = triton.cdiv(n, c["BR"])
    if weight_grad or bias_grad:
        programs = min(programs, PROGRAMS)
    parts = [
        weight.new_zeros(programs, d * k, dtype=torch.float32) for k in (weight_grad, bias_grad)
    ]
    if x.numel():
        kernel = _backward_wide_kernel if d > c["BD"] else _backward_kernel
        kernel[(programs,)](
            grad, x, dx, *vectors, *parts, n, d, eps,
            HAS_WT=weight_t is not None, CENTRED=centred, NEED_W=weight_grad, NEED_B=bias_grad, **c,
        )  # fmt: skip
    dw, db = (part.sum(0).to(weight.dtype) for part in parts)
    return dx, dw, db


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in vectors]
