"""dual_linear_cross_entropy on a GPU: cuBLAS makes z and z_t of some rows (the backward: of some
tokens) in fp32 scratch, one row kernel takes the statistics in one read and overwrites both in
place by what the next products need, in the type of h; cuBLAS multiplies on.

fp32 logits: bf16 ones would save 8 of 28 bytes per logit, at d = 4096 an estimated 5 % of the time,
and cost the losses five digits. Tiles that are never stored would need 6 products for 4.
Every sum has a fixed order, without atomics. No host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._dual import halves
from u2a_kernels._logits import SCRATCH_ELEMENTS, capped, mm32, share
from u2a_kernels._triton import cast_to, tl, triton
from u2a_kernels.ops.dual_linear_cross_entropy.reference import outputs


@triton.jit
def _load(
    z, z_t, bias, bias_t, c, C, softcap,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Logits a, their tangents a_t, a'(z) and a''(z) z_t in columns c; a is -inf beyond C."""
    x = tl.load(z + c, mask=c < C, other=0.0)
    x_t = tl.load(z_t + c, mask=c < C, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BIAS_T:
        x_t += tl.load(bias_t + c, mask=c < C, other=0.0).to(tl.float32)
    x = capped(x, softcap, HAS_CAP)
    slope = tl.full(x.shape, 1.0, tl.float32)
    bend = tl.zeros(x.shape, tl.float32)
    if HAS_CAP:
        t = x / softcap
        slope = 1.0 - t * t
        x_t = x_t * slope
        bend = -2.0 / softcap * t * x_t
    return tl.where(c < C, x, float("-inf")), x_t, slope, bend


@triton.jit
def _statistics(
    z, z_t, bias, bias_t, t, C, softcap,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Over one row: max a; with p = exp(a - max), sum p, p-weighted mean of a_t and sum of its
    squared distance from it; a and a_t at the target. Blocks merge as in Chan et al. (1979)."""
    top = float("-inf")
    total = 0.0
    mean = 0.0
    square = 0.0
    y = 0.0
    y_t = 0.0
    for c0 in range(0, C, BV):
        c = c0 + tl.arange(0, BV)
        a, a_t, _, _ = _load(
            z, z_t, bias, bias_t, c, C, softcap, HAS_BIAS, HAS_BIAS_T, HAS_CAP
        )  # fmt: skip
        new = tl.maximum(top, tl.max(a, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)  # no -inf - -inf
        p = tl.exp(a - shift)
        part = tl.sum(p, axis=0)
        own = tl.sum(p * a_t, axis=0) / tl.where(part == 0.0, 1.0, part)
        spread = tl.sum(p * (a_t - own) * (a_t - own), axis=0)
        old = total * tl.exp(top - shift)
        square = square * tl.exp(top - shift) + spread
        total = old + part
        ratio = part / tl.where(total == 0.0, 1.0, total)
        square += (own - mean) * (own - mean) * old * ratio
        mean += (own - mean) * ratio
        y += tl.sum(tl.where(c == t, a, 0.0), axis=0)
        y_t += tl.sum(tl.where(c == t, a_t, 0.0), axis=0)
        top = new
    return top, total, mean, square, y, y_t


@triton.jit
def _row_kernel(
    z, z_t, out, out_t, bias, bias_t, targets, ca, cb, values, stats, v0, C, V, N, softcap, sz, so,
    HAS_BIAS: tl.constexpr, HAS_BIAS_T: tl.constexpr, HAS_CAP: tl.constexpr,
    WHOLE: tl.constexpr, WRITE: tl.constexpr, GGN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Row n of z and z_t, columns v0 .. v0 + C of the vocabulary; out and out_t may be z and z_t in
    a narrower type.

    WHOLE: the row is complete. Its loss, loss_t and curvature (values) and max, 1 / sum p and mean
    tangent (stats) are computed first; out = f and, with WRITE, out_t = g of a unit cotangent.
    Else out = a f + b g, out_t = b f from the statistics. Ignored rows give zeros.
    """
    n = tl.program_id(0).to(tl.int64)
    t = tl.load(targets + n)
    used = (t != -100).to(tl.int32)
    z += n * sz
    z_t += n * sz
    out += n * so
    out_t += n * so
    if WHOLE:
        top, total, mean, square, y, y_t = _statistics(
            z, z_t, bias, bias_t, t, C * used, softcap, HAS_BIAS, HAS_BIAS_T, HAS_CAP, BV
        )  # fmt: skip
        scale = 1.0 / total
        bad = tl.where((t >= 0) & (t < V), 0.0, float("nan"))
        tl.store(values + n, tl.where(used != 0, (top - y) + tl.log(total) + bad, 0.0))
        tl.store(values + N + n, tl.where(used != 0, mean - y_t + bad, 0.0))
        tl.store(values + 2 * N + n, tl.where(used != 0, square * scale + bad, 0.0))
        tl.store(stats + n, tl.where(used != 0, top, 0.0))
        tl.store(stats + N + n, tl.where(used != 0, scale, 0.0))
        tl.store(stats + 2 * N + n, tl.where(used != 0, mean, 0.0))
    else:
        top = tl.load(stats + n)
        scale = tl.load(stats + N + n)
        mean = tl.load(stats + 2 * N + n)
        a_n = tl.load(ca + n).to(tl.float32)
        b_n = tl.load(cb + n).to(tl.float32)
    if WRITE:
        for c0 in range(0, C, BV):
            c = c0 + tl.arange(0, BV)
            a, a_t, slope, bend = _load(
                z, z_t, bias, bias_t, c, C, softcap, HAS_BIAS, HAS_BIAS_T, HAS_CAP
            )  # fmt: skip
            p = tl.exp(a - top) * scale
            residual = p - tl.where(c + v0 == t, 1.0, 0.0)
            f = slope * residual
            g = slope * p * (a_t - mean)
            if not GGN:
                g += bend * residual
            if not WHOLE:
                first = b_n * f
                g = b_n * g
                if not GGN:
                    g += a_n * f
                f = first
            tl.debug_barrier()  # out lies on what this and earlier rounds have read
            f = tl.where(used != 0, f, 0.0)
            g = tl.where(used != 0, g, 0.0)
            tl.store(out + c, cast_to(g, out.dtype.element_ty), mask=c < C)
            if not GGN:
                tl.store(out_t + c, cast_to(f, out.dtype.element_ty), mask=c < C)


def _rows(
    z: Tensor, z_t: Tensor, like: Tensor, bias: Tensor | None, bias_t: Tensor | None,
    targets: Tensor, cotangents: tuple[Tensor, Tensor] | None, values: Tensor | None,
    stats: Tensor, v0: int, v: int, softcap: float, write: bool, ggn: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the row kernel in place; the results are views of z and z_t in the type of `like`."""
    r, c = z.shape
    out, out_t = (b.view(like.dtype)[:, :c] for b in (z, z_t))
    a, b = (stats, stats) if cotangents is None else cotangents
    _row_kernel[(r,)](
        z, z_t, out, out_t, z if bias is None else bias, z if bias_t is None else bias_t,
        targets, a, b, stats if values is None else values, stats, v0, c, v, stats.stride(0),
        softcap, z.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_BIAS_T=bias_t is not None, HAS_CAP=softcap != 0,
        WHOLE=values is not None, WRITE=write, GGN=ggn,
        BV=min(2048, triton.next_power_of_2(c)), num_warps=8,
    )  # fmt: skip
    return out, out_t


def _operand(g: Tensor) -> Tensor:
    """A narrow view of wider rows. Off the GPU it is copied: there bf16 products (oneDNN, torch
    2.13) let NaN bits that lie between the rows into the result."""
    return g if g.is_cuda else g.contiguous()


def forward(
    h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None, bias: Tensor | None,
    bias_t: Tensor | None, softcap: float, mode: str, rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    stats, kept = outputs(h, targets, mode, rows)[3:]
    values = torch.empty_like(stats)
    n, v = targets.shape[0], weight.shape[0]
    primal, tangent = halves(h)
    targets = targets.contiguous()
    bias, bias_t = (None if x is None else x.contiguous() for x in (bias, bias_t))
    # fewer rows than about 200 would wait for the weight's bytes
    size = max(1, min(SCRATCH_ELEMENTS // 2 // v, max(512, -(-n // 8))))
    for s in range(0, n, size):
        at = slice(s, min(n, s + size))
        z, z_t = mm32(primal[at], weight.T), mm32(tangent[at], weight.T)
        if weight_t is not None:
            z_t += mm32(primal[at], weight_t.T)
        g, f = _rows(
            z, z_t, h, bias, bias_t, targets[at], None, values[:, at], stats[:, at],
            0, v, softcap, rows, mode == "ggn",
        )  # fmt: skip
        if not rows:
            continue
        g, f = _operand(g), _operand(f)
        if mode == "ggn":
            torch.mm(g, weight, out=kept[0, at])
            continue
        torch.mm(f, weight, out=kept[1, at])
        if weight_t is None:
            torch.mm(g, weight, out=kept[0, at])
        else:
            kept[0, at] = mm32(g, weight).add_(mm32(f, weight_t))
    loss, loss_t, curvature = (row.clone() for row in values)
    return loss, loss_t, curvature, stats, kept


def backward(
    a: Tensor, b: Tensor, h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None,
    bias: Tensor | None, bias_t: Tensor | None, stats: Tensor, softcap: float, mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, v = targets.shape[0], weight.shape[0]
    dw = weight.new_empty(weight.shape)
    db = weight.new_empty(0 if bias is None else v)
    if n == 0:
        return dw.zero_(), db.zero_()
    ggn = mode == "ggn"
    targets, a, b = targets.contiguous(), a.contiguous(), b.contiguous()
    used = (targets != -100).repeat(2)[:, None]
    x = torch.where(used, h, 0)  # an ignored row may hold anything
    pulled = x[:n] if ggn else x
    size = share(v, 2 * n, SCRATCH_ELEMENTS)
    for c in (slice(s, min(v, s + size)) for s in range(0, v, size)):
        both = mm32(x, weight[c].T)  # [2N, C]
        z, z_t = halves(both)
        if weight_t is not None:
            z_t += mm32(x[:n], weight_t[c].T)
        bias_c, bias_tc = (None if t is None else t[c].contiguous() for t in (bias, bias_t))
        g, _ = _rows(
            z, z_t, h, bias_c, bias_tc, targets, (a, b), None, stats,
            c.start, v, softcap, True, ggn,
        )  # fmt: skip
        cotangents = both.view(h.dtype)[: len(pulled), : z.shape[1]]
        torch.mm(_operand(cotangents).T, pulled, out=dw[c])
        if bias is not None:
            db[c] = g.sum(0, dtype=torch.float32).to(db.dtype)
    return dw, db
