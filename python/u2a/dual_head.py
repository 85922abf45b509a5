"""A language-model head with a bias or a soft cap, and cross-entropy, on dual rows.

z = W h + b, z_t = W h_t + W_t h + b_t; a = c tanh(z / c), a_t = s z_t with s = a'(z);
p = softmax a, e = sum p a_t, u = p (a_t - e). For cotangents (x, y) of (loss, loss_t), with 1 the
one-hot target: dz_t = y s (p - 1), dz = s (x (p - 1) + y u) + y a''(z) z_t (p - 1).
The backward redoes the forward, some tokens at a time: never [N, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # held at once, about
TILE = 8192  # rows of a narrow weight that are widened at once


class Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    weight_t: Tensor | None
    bias_t: Tensor | None
    softcap: float | None


class _Chunk(NamedTuple):
    rows: slice
    h: Tensor
    h_t: Tensor
    z_t: Tensor
    slope: Tensor | float
    bend: Tensor | float
    p: Tensor
    u: Tensor
    residual: Tensor  # p - one-hot
    values: tuple[Tensor, Tensor, Tensor]


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    step = weight.shape[0] if weight.dtype == dtype else TILE
    for v in range(0, weight.shape[0], step):
        yield slice(v, v + step), weight[v : v + step].to(dtype)


def _project(h: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([h @ w.T for _, w in _tiles(weight, h.dtype)], 1)


def _pull(g: Tensor, weight: Tensor) -> Tensor:
    out = g.new_zeros(g.shape[0], weight.shape[1])
    for at, w in _tiles(weight, g.dtype):
        out.addmm_(g[:, at], w)
    return out


def _cap(z: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """c tanh(z / c) with its first two derivatives."""
    if softcap is None:
        return z, 1.0, 0.0
    t = torch.tanh(z / softcap)
    slope = 1 - t * t
    return softcap * t, slope, -2 / softcap * t * slope


def _chunks(h: Tensor, targets: Tensor, head: Head) -> Iterator[_Chunk]:
    acc = torch.promote_types(h.dtype, torch.float32)
    primal, tangent = h.chunk(2)
    step = max(16, LOGITS.get(h.device.type, 1 << 22) // head.weight.shape[0])
    for start in range(0, targets.shape[0], step):
        rows = slice(start, start + step)
        x, x_t, y = primal[rows].to(acc), tangent[rows].to(acc), targets[rows, None]
        z, z_t = _project(x, head.weight), _project(x_t, head.weight)
        if head.bias is not None:
            z += head.bias
        if head.weight_t is not None:
            z_t += _project(x, head.weight_t)
        if head.bias_t is not None:
            z_t += head.bias_t
        a, slope, bend = _cap(z, head.softcap)
        logp = torch.log_softmax(a, 1)
        p, centred = logp.exp(), z_t * slope
        own = centred.gather(1, y)
        mean = (p * (centred - own)).sum(1, keepdim=True)  # of a_t, above the target's own
        centred = centred - own - mean
        u = p * centred
        residual = p.scatter_add(1, y, -torch.ones_like(own))
        values = -logp.gather(1, y)[:, 0], mean[:, 0], (u * centred).sum(1)
        yield _Chunk(rows, x, x_t, z_t, slope, bend, p, u, residual, values)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        weight_t: Tensor | None, bias_t: Tensor | None, softcap: float | None, mode: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        head = Head(weight, bias, weight_t, bias_t, softcap)
        acc = torch.promote_types(h.dtype, torch.float32)
        out = h.new_empty(3, targets.shape[0], dtype=acc)
        for c in _chunks(h, targets, head):
            for row, value in zip(out, c.values, strict=True):
                row[c.rows] = value
        ctx.save_for_backward(h, weight, bias, targets, weight_t, bias_t)
        ctx.softcap, ctx.mode = softcap, mode
        loss, loss_t, curvature = (row.clone() for row in out)
        ctx.mark_non_differentiable(curvature)
        return loss, loss_t, curvature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.mode == "jvp":
            raise RuntimeError("u2a.dual: mode 'jvp' is forward only, got a backward")
        h, weight, bias, targets, weight_t, bias_t = ctx.saved_tensors
        head = Head(weight, bias, weight_t, bias_t, ctx.softcap)
        acc = torch.promote_types(h.dtype, torch.float32)
        dh = torch.zeros_like(h)
        dw = torch.zeros_like(weight, dtype=acc) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias, dtype=acc) if ctx.needs_input_grad[2] else None
        for c in _chunks(h, targets, head):
            dz, dz_t = _cotangents(c, x[c.rows, None], y[c.rows, None], ctx.mode)
            _accumulate(c, dz, dz_t, head, dh, dw, db)
        dw, db = (None if g is None else g.to(weight.dtype) for g in (dw, db))
        return dh, dw, db, None, None, None, None, None


def _cotangents(c: _Chunk, x: Tensor, y: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """(dz, dz_t); Gauss-Newton: the curvature at the logits alone, and no dz_t."""
    if mode == "ggn":
        return c.slope * (y * c.u), None
    dz = c.slope * (x * c.residual + y * c.u) + c.bend * c.z_t * (y * c.residual)
    return dz, c.slope * (y * c.residual)


def _accumulate(
    c: _Chunk, dz: Tensor, dz_t: Tensor | None, head: Head,
    dh: Tensor, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    primal, tangent = dh.chunk(2)
    d = _pull(dz, head.weight)
    if dz_t is not None:
        tangent[c.rows] = _pull(dz_t, head.weight).to(dh.dtype)
        if head.weight_t is not None:
            d += _pull(dz_t, head.weight_t)
    primal[c.rows] = d.to(dh.dtype)
    if dw is not None:
        dw.addmm_(dz.T, c.h)
        if dz_t is not None:
            dw.addmm_(dz_t.T, c.h_t)
    if db is not None:
        db += dz.sum(0)


def dual_head_loss(
    h: Tensor, targets: Tensor, head: Head, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`u2a_kernels.dual_linear_cross_entropy` for a head with a bias or a soft cap.

    h `[2N, d]`, targets `[N]` int64, all of them in [0, V). Returns loss, loss_t, curvature `[N]`,
    float32 (float64 for float64). The Gauss-Newton matrix has its curvature at the capped logits.
    """
    weight, bias, weight_t, bias_t, softcap = head
    found = _Loss.apply(h, weight, bias, targets, weight_t, bias_t, softcap, mode)
    return found  # type: ignore[no-any-return]
