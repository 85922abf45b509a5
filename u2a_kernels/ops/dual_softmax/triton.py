"""Triton kernels of dual_softmax. A program holds whole rows, so that z and z_t are read once; a
wider row is read in pieces, once for its max, sum and mean of z_t, and again for the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._triton import cast_to, tl, triton


@triton.jit
def _rows(x, n, v, N, V, OTHER: tl.constexpr):
    """Primal and tangent rows n of x [2N, V] as fp32 [BR, BV], the primal ones OTHER outside."""
    mask = (n[:, None] < N) & (v[None, :] < V)
    p = x + n[:, None] * V + v[None, :]
    t = x + (n + N)[:, None] * V + v[None, :]
    a = tl.load(p, mask=mask, other=OTHER).to(tl.float32)
    return a, tl.load(t, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _put(x, n, v, N, V, primal, tangent):
    mask = (n[:, None] < N) & (v[None, :] < V)
    p = x + n[:, None] * V + v[None, :]
    t = x + (n + N)[:, None] * V + v[None, :]
    tl.store(p, cast_to(primal, x.dtype.element_ty), mask=mask)
    tl.store(t, cast_to(tangent, x.dtype.element_ty), mask=mask)


@triton.jit
def _finite(top):
    """The shift of exponents: no -inf - -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _forward_kernel(z, out, N, V, WIDE: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    v = tl.arange(0, BV)
    if not WIDE:
        bz, bz_t = _rows(z, n, v, N, V, float("-inf"))
        e = tl.exp(bz - _finite(tl.max(bz, 1))[:, None])
        p = e / tl.sum(e, 1)[:, None]
        _put(out, n, v, N, V, p, p * (bz_t - tl.sum(p * bz_t, 1)[:, None]))
    else:
        top = tl.full((BR,), float("-inf"), tl.float32)
        total = tl.zeros((BR,), tl.float32)
        along = tl.zeros((BR,), tl.float32)
        for v0 in range(0, V, BV):
            bz, bz_t = _rows(z, n, v0 + v, N, V, float("-inf"))
            new = tl.maximum(top, tl.max(bz, 1))
            e = tl.exp(bz - _finite(new)[:, None])
            rescale = tl.exp(top - _finite(new))
            total = rescale * total + tl.sum(e, 1)
            along = rescale * along + tl.sum(e * bz_t, 1)
            top = new
        mean = along / total
        for v0 in range(0, V, BV):
            bz, bz_t = _rows(z, n, v0 + v, N, V, float("-inf"))
            p = tl.exp(bz - _finite(top)[:, None]) / total[:, None]
            _put(out, n, v0 + v, N, V, p, p * (bz_t - mean[:, None]))


@triton.jit
def _products(p, p_t, g, g_t, GGN: tl.constexpr):
    """Per row the sums of p g, for GGN of p g_t; of p_t g + p g_t; of p_t."""
    if GGN:
        c = tl.sum(p * g_t, 1)
        return c, c, c
    else:
        return tl.sum(p * g, 1), tl.sum(p_t * g + p * g_t, 1), tl.sum(p_t, 1)


@triton.jit
def _finish(dz, n, v, N, V, p, p_t, g, g_t, c, both, total_t, GGN: tl.constexpr):
    if GGN:
        _put(dz, n, v, N, V, p * (g_t - c[:, None]), tl.zeros_like(p))
    else:
        c_t = both - c * total_t  # <p_t, g - c> + <p, g_t>
        u = g - c[:, None]
        _put(dz, n, v, N, V, p_t * u + p * (g_t - c_t[:, None]), p * u)


@triton.jit
def _backward_kernel(
    grad, out, dz, N, V, GGN: tl.constexpr, WIDE: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    v = tl.arange(0, BV)
    if not WIDE:
        p, p_t = _rows(out, n, v, N, V, 0.0)
        g_t, g = _rows(grad, n, v, N, V, 0.0)
        c, both, total_t = _products(p, p_t, g, g_t, GGN)
        _finish(dz, n, v, N, V, p, p_t, g, g_t, c, both, total_t, GGN)
    else:
        c = tl.zeros((BR,), tl.float32)
        both = tl.zeros((BR,), tl.float32)
        total_t = tl.zeros((BR,), tl.float32)
        for v0 in range(0, V, BV):
            p, p_t = _rows(out, n, v0 + v, N, V, 0.0)
            g_t, g = _rows(grad, n, v0 + v, N, V, 0.0)
            more = _products(p, p_t, g, g_t, GGN)
            c += more[0]
            both += more[1]
            total_t += more[2]
        for v0 in range(0, V, BV):
            p, p_t = _rows(out, n, v0 + v, N, V, 0.0)
            g_t, g = _rows(grad, n, v0 + v, N, V, 0.0)
            _finish(dz, n, v0 + v, N, V, p, p_t, g, g_t, c, both, total_t, GGN)


def config(n: int, v: int, held: int) -> dict[str, int]:
    """Blocks of whole rows, about `held` elements of each tensor on chip; pieces of 4096 columns
    where a row has more than 8192."""
    width = max(16, triton.next_power_of_2(v) if v <= 8192 else 4096)
    rows = max(1, min(held // width, triton.next_power_of_2(n)))
    return dict(BR=rows, BV=width, num_warps=max(4, min(16, rows * width * 4 // held)))


def forward(z: Tensor) -> Tensor:
    z = z.contiguous()
    out, v = torch.empty_like(z), z.shape[-1]
    if z.numel():
        n = z.numel() // v // 2
        c = config(n, v, held=4096)
        _forward_kernel[(triton.cdiv(n, c["BR"]),)](z, out, n, v, WIDE=v > c["BV"], **c)
    return out


def backward(grad: Tensor, out: Tensor, ggn: bool) -> Tensor:
    grad, out = grad.contiguous(), out.contiguous()
    dz, v = torch.empty_like(out), out.shape[-1]
    if out.numel():
        n = out.numel() // v // 2
        c = config(n, v, held=2048)
        grid = (triton.cdiv(n, c["BR"]),)
        _backward_kernel[grid](grad, out, dz, n, v, GGN=ggn, WIDE=v > c["BV"], **c)
    return dz
