"""dual_linear_cross_entropy in plain torch, in row chunks; float64 on a GPU is served from here.

No host synchronisation: rows without a target are computed on zeros and masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._dual import halves
from u2a_kernels._segments import accum_dtype

IGNORED = -100


class Chunk(NamedTuple):
    """Tokens `rows`; `u` = p (a_t - e), `residual` = p - 1y, both 0 where the target is ignored."""

    rows: slice
    h: Tensor
    h_t: Tensor
    z_t: Tensor
    slope: Tensor | float
    bend: Tensor | float
    u: Tensor
    residual: Tensor
    values: tuple[Tensor, Tensor, Tensor]
    stats: tuple[Tensor, Tensor, Tensor]


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows whose logits stay near the cache on a CPU and fill the GEMMs of a GPU."""
    budget = 1 << 26 if device.type == "cuda" else 1 << 22
    return max(16, min(2048, budget // vocab))


def _tiles(weight: Tensor, acc: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of weight in the accumulation type; a narrow weight is widened 8192 rows at a time."""
    vocab = weight.shape[0]
    step = vocab if weight.dtype == acc else 8192
    for v in range(0, vocab, step):
        yield slice(v, v + step), weight[v : v + step].to(acc)


def _project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h W^T + b, [n, V]."""
    out = h.new_empty(h.shape[0], weight.shape[0])
    for at, w in _tiles(weight, h.dtype):
        out[:, at] = h @ w.T
    return out if bias is None else out.add_(bias)


def _pull(g: Tensor, weight: Tensor) -> Tensor:
    """g W, [n, d]."""
    out = g.new_zeros(g.shape[0], weight.shape[1])
    for at, w in _tiles(weight, g.dtype):
        out.addmm_(g[:, at], w)
    return out


def _cap(z: Tensor, softcap: float) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """c tanh(z / c) with its first two derivatives; softcap 0: none."""
    if softcap == 0:
        return z, 1.0, 0.0
    t = torch.tanh(z / softcap)
    slope = 1 - t * t
    return softcap * t, slope, -2 / softcap * t * slope


def _chunks(
    h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None,
    bias: Tensor | None, bias_t: Tensor | None, softcap: float,
) -> Iterator[Chunk]:  # fmt: skip
    acc = accum_dtype(h)
    primal, tangent = halves(h)
    step = chunk_rows(weight.shape[0], h.device)
    for start in range(0, targets.shape[0], step):
        rows = slice(start, start + step)
        used = (targets[rows] != IGNORED)[:, None]
        x, x_t = (torch.where(used, half[rows], 0).to(acc) for half in (primal, tangent))
        z_t = _project(x_t, weight, bias_t)
        if weight_t is not None:
            z_t += _project(x, weight_t, None)
        a, slope, bend = _cap(_project(x, weight, bias), softcap)
        yield _statistics(rows, used, targets[rows, None], x, x_t, a, z_t, slope, bend)


def _statistics(
    rows: slice, used: Tensor, y: Tensor, x: Tensor, x_t: Tensor, a: Tensor, z_t: Tensor,
    slope: Tensor | float, bend: Tensor | float,
) -> Chunk:  # fmt: skip
    y = y.clamp_min(0)
    top = a.amax(1, keepdim=True)
    a = a - top  # keeps the rounding of a - lse small
    norm = torch.logsumexp(a, 1, keepdim=True)
    loss = norm - a.gather(1, y)
    p = a.sub_(norm).exp_()
    a_t = z_t * slope
    own = a_t.gather(1, y)
    a_t = a_t - own
    loss_t = (p * a_t).sum(1, keepdim=True)
    a_t -= loss_t
    u = p * a_t
    curvature = (u * a_t).sum(1, keepdim=True)
    p.scatter_add_(1, y, -torch.ones_like(own))
    u, p = (torch.where(used, t, 0) for t in (u, p))
    per_row = (loss, loss_t, curvature, top, torch.exp(-norm), own + loss_t)
    columns = [torch.where(used, t, 0)[:, 0] for t in per_row]
    values, stats = tuple(columns[:3]), tuple(columns[3:])
    return Chunk(rows, x, x_t, z_t, slope, bend, u, p, values, stats)  # type: ignore[arg-type]


def forward(
    h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None, bias: Tensor | None,
    bias_t: Tensor | None, softcap: float, mode: str, rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, loss_t, curvature, stats, kept = outputs(h, targets, mode, rows)
    for c in _chunks(h, weight, targets, weight_t, bias, bias_t, softcap):
        for out, value in zip(
            (loss, loss_t, curvature, *stats), (*c.values, *c.stats), strict=True
        ):
            out[c.rows] = value
        if not rows:
            continue
        first, second = _unit(c, mode)
        r2 = _pull(second, weight)
        if mode == "hvp":
            kept[1, c.rows] = _pull(first, weight).to(h.dtype)
            if weight_t is not None:
                r2 += _pull(first, weight_t)
        kept[0, c.rows] = r2.to(h.dtype)
    return loss, loss_t, curvature, stats, kept


def outputs(
    h: Tensor, targets: Tensor, mode: str, rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty loss, loss_t, curvature [N], statistics [3, N] (max, 1 / sum of
    exp(a - max), mean tangent) and kept rows [0, 1 or 2, N, d]."""
    n, acc = targets.shape[0], accum_dtype(h)
    loss, loss_t, curvature = (h.new_empty(n, dtype=acc) for _ in range(3))
    count = 0 if not rows else 1 if mode == "ggn" else 2
    kept = h.new_empty(count, n, h.shape[1])
    return loss, loss_t, curvature, h.new_empty(3, n, dtype=acc), kept


def _unit(c: Chunk, mode: str) -> tuple[Tensor, Tensor]:
    """s (p - 1y) and s u + s' z_t (p - 1y): what a cotangent of loss_t sends to z_t and to z."""
    if mode == "ggn":
        return c.residual, c.slope * c.u
    return c.slope * c.residual, c.slope * c.u + c.bend * c.z_t * c.residual


def backward(
    a: Tensor, b: Tensor, h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None,
    bias: Tensor | None, bias_t: Tensor | None, stats: Tensor, softcap: float, mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accum_dtype(h)
    dw = weight.new_zeros(weight.shape, dtype=acc)
    db = weight.new_zeros(0 if bias is None else bias.shape[0], dtype=acc)
    for c in _chunks(h, weight, targets, weight_t, bias, bias_t, softcap):
        first, second = _unit(c, mode)
        g = b[c.rows, None] * second
        if mode == "hvp":
            g += a[c.rows, None] * first
            dw.addmm_((b[c.rows, None] * first).T, c.h_t)
        dw.addmm_(g.T, c.h)
        if bias is not None:
            db += g.sum(0)
    return dw.to(weight.dtype), db.to(weight.dtype)
