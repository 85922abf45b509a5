"""Softmax attention on dual rows, flash style: only o and the row statistics lse, mu are kept.

S = cap(s q k^T), P = exp(S - lse), o = P v; P_t = P (S_t - mu), mu = sum P S_t the tangent of lse;
o_t = P v_t + P_t v. The backward (`_piece_bwd`) is the tangent of the flash backward.
The reference holds the scores of a few heads at a time, never those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, shape, wanted
from u2a_kernels._dual import check_halves, check_mode, fresh, halves, refuse_jvp
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype

PIECE = 1 << 21  # scores held at once


def dual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    offsets: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mode: str = "hvp",
) -> Tensor:
    """Attention of primal rows and the tangents of its output.

    Args:
        q: [2B, H, T, D], B primal rows and then their B tangent rows; or packed [2N, H, D] with
            `offsets`. float32, bfloat16, float16 or float64.
        k, v: [2B, Hkv, S, D], or packed [2N, Hkv, D]; dtype of q. Hkv divides H (grouped queries);
            v may have its own last dimension.
        scale: factor of q k^T; 1/sqrt(D) when None.
        causal: query t sees keys up to t + S - T. A query that sees no key gives zeros.
        offsets: [B+1] int32/int64, segments of the N packed tokens; each attends to itself only.
        window: with causal, query t sees only the last `window` of those keys (keys > t - window).
        softcap: scores become softcap * tanh(score / softcap).
        mode: "hvp"; "ggn": the plain attention backward on the primal half, zeros on the tangent
            half (Gauss-Newton); "jvp": forward only, a backward raises RuntimeError.

    Returns:
        [2B, H, T, Dv] or [2N, H, Dv] in the dtype of q; fp32 inside (fp64 for float64).
        Deterministic. Differentiable once in q, k and v; the gradient of the tangent half is the
        second-order product.

    Raises:
        ValueError, TypeError: a shape, dtype, device, offset or option that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(attention, (q[:B], k[:B], v[:B]),
    (q[B:], k[B:], v[B:])))`` with eager softmax attention under an explicit mask.

    Source: tangent of Dao, arXiv 2307.08691, forward and backward; D and D_t, the row sums of the
    backward, are known before its sweep.
    """
    op = "dual_attention"
    check_floats(op, q=q, k=k, v=v)
    _check_shapes(op, q, k, v, packed=offsets is not None)
    if offsets is not None:
        check_offsets(op, offsets, q.shape[0] // 2, rows="q's primal half")
    if window is not None and (window < 1 or not causal):
        raise wanted(op, "window", "at least 1, with causal=True", f"{window}, causal={causal}")
    if softcap is not None and not softcap > 0:
        raise wanted(op, "softcap", "positive or None", softcap)
    check_mode(op, mode)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _dual_attention(q, k, v, offsets, factor, causal, window, softcap, mode)[0]


def _check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    wants = ("[2N, H, D]", "[2N, Hkv, D]") if packed else ("[2B, H, T, D]", "[2B, Hkv, S, D]")
    check_dim(op, "q", q, wants[0], 3 if packed else 4)
    check_halves(op, "q", q, wants[0])
    for name, t in dict(k=k, v=v).items():
        check_dim(op, name, t, wants[1], q.ndim)
        if t.shape[0] != q.shape[0]:
            raise wanted(op, name, f"{wants[1]} with {q.shape[0]} rows as q has", shape(t))
    if k.shape[-1] != q.shape[-1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        want = f"{wants[1]} with D = {q.shape[-1]} and Hkv dividing H = {q.shape[1]}"
        raise wanted(op, "k", want, shape(k))
    if v.shape[:-1] != k.shape[:-1]:
        raise wanted(
            op, "v", f"{wants[1]} with the rows, heads and keys of k, {shape(k)}", shape(v)
        )


class Cut(NamedTuple):
    """Rows of a half and key heads whose scores are held at once; `rep` queries per key head."""

    rows: slice
    heads: slice
    rep: int
    packed: bool

    def views(self, x: Tensor, queries: bool) -> tuple[Tensor, Tensor]:
        """[b, h, T, ...] views of both halves of x."""
        return self.view(halves(x)[0], queries), self.view(halves(x)[1], queries)

    def view(self, half: Tensor, queries: bool) -> Tensor:
        rep = self.rep if queries else 1
        heads = slice(self.heads.start * rep, self.heads.stop * rep)
        part = half[self.rows, heads]
        return part.transpose(0, 1)[None] if self.packed else part


def _cuts(q: Tensor, k: Tensor, offsets: Tensor | None) -> Iterator[Cut]:
    h_kv = k.shape[1]
    rep = q.shape[1] // h_kv
    if offsets is None:
        per_head = rep * q.shape[2] * k.shape[2]
        heads = max(1, min(h_kv, PIECE // max(1, per_head)))
        rows = max(1, PIECE // max(1, per_head * h_kv))
        blocks = [(b, b + rows, heads) for b in range(0, q.shape[0] // 2, rows)]
    else:
        ends = offsets.tolist()
        blocks = [
            (s, e, max(1, min(h_kv, PIECE // (rep * (e - s) ** 2))))
            for s, e in zip(ends[:-1], ends[1:], strict=True)
            if e > s
        ]
    for start, end, heads in blocks:
        for h in range(0, h_kv, heads):
            yield Cut(slice(start, end), slice(h, min(h + heads, h_kv)), rep, offsets is not None)


def _rows(x: Tensor, h_kv: int, acc: torch.dtype) -> Tensor:
    """[b, h_kv * rep, T, D] -> [b * h_kv, rep * T, D]: the queries of a key head, one matmul."""
    b, h, t, d = x.shape
    return x.to(acc).reshape(b * h_kv, h // h_kv * t, d)


def _hidden(t: int, s: int, rep: int, causal: bool, window: int | None, device) -> Tensor | None:
    """[rep * t, s], true where a query does not see a key."""
    if not causal:
        return None
    query = torch.arange(t, device=device)[:, None] + (s - t)
    key = torch.arange(s, device=device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return hidden.repeat(rep, 1)


class Scores(NamedTuple):
    """Capped scores and their tangent; d1 and d2 raw_t are the cap's derivative and its tangent."""

    s: Tensor
    s_t: Tensor
    d1: Tensor | None
    d1_t: Tensor | None


def _scores(
    q: Tensor, q_t: Tensor, k: Tensor, k_t: Tensor, scale: float, softcap: float | None
) -> Scores:
    s = q @ k.mT * scale
    s_t = torch.baddbmm(q_t @ k.mT, q, k_t.mT) * scale
    if softcap is None:
        return Scores(s, s_t, None, None)
    th = torch.tanh(s / softcap)
    d1 = 1 - th * th
    return Scores(softcap * th, d1 * s_t, d1, -2 / softcap * th * d1 * s_t)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(q)
    out, lse, mu = _fake(q, k, v, offsets, scale, causal, window, softcap, mode)
    for cut in _cuts(q, k, offsets):
        h_kv = cut.heads.stop - cut.heads.start
        qs = [_rows(x, h_kv, acc) for x in cut.views(q, True)]
        ks, vs = ([_rows(x, x.shape[1], acc) for x in cut.views(y, False)] for y in (k, v))
        o, o_t = cut.views(out, True)
        s, s_t, _, _ = _scores(*qs, *ks, scale, softcap)
        hidden = _hidden(o.shape[2], s.shape[2], cut.rep, causal, window, q.device)
        if hidden is not None:
            s.masked_fill_(hidden, -math.inf)
        row = torch.logsumexp(s, -1)
        p = torch.exp(s - _finite(row)[..., None])
        m = (p * s_t).sum(-1)
        p_t = p * (s_t - m[..., None])
        o.copy_((p @ vs[0]).view(o.shape))
        o_t.copy_(torch.baddbmm(p @ vs[1], p_t, vs[0]).view(o.shape))
        cut.view(lse, True).copy_(row.view(o.shape[:3]))
        cut.view(mu, True).copy_(m.view(o.shape[:3]))
    return out, lse, mu


def _finite(lse: Tensor) -> Tensor:
    """A query without keys has lse -inf; 0 instead makes its probabilities 0, not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def reference_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mu: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(q)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for cut in _cuts(q, k, offsets):
        h_kv = cut.heads.stop - cut.heads.start
        qs, os, gs = ([_rows(x, h_kv, acc) for x in cut.views(y, True)] for y in (q, out, grad))
        ks, vs = ([_rows(x, x.shape[1], acc) for x in cut.views(y, False)] for y in (k, v))
        scores = _scores(*qs, *ks, scale, softcap)
        t = cut.view(lse, True).shape[2]
        hidden = _hidden(t, ks[0].shape[1], cut.rep, causal, window, q.device)
        if hidden is not None:
            scores.s.masked_fill_(hidden, -math.inf)
        row, m = (cut.view(x, True).reshape(scores.s.shape[:2]) for x in (lse, mu))
        p = torch.exp(scores.s - _finite(row)[..., None])
        if mode == "ggn":
            parts = _piece_ggn(p, scores, qs[0], ks[0], vs[0], os[0], gs[0], scale)
        else:
            parts = _piece_bwd(p, m, scores, qs, ks, vs, os, gs, scale)
        targets = (*cut.views(dq, True), *cut.views(dk, False), *cut.views(dv, False))
        for target, part in zip(targets, parts, strict=True):
            if part is not None:
                target.copy_(part.view(target.shape))
    return dq, dk, dv


def _piece_ggn(p, scores, q, k, v, o, g, scale):
    """Plain flash backward of the primal half: (dq, None, dk, None, dv, None)."""
    ds = p * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
    if scores.d1 is not None:
        ds *= scores.d1
    return ds @ k, None, ds.mT @ q, None, p.mT @ g, None


def _piece_bwd(p, mu, scores, qs, ks, vs, os, gs, scale):
    """Tangent of the flash backward: (dq, dq_t, dk, dk_t, dv, dv_t)."""
    (q, q_t), (k, k_t), (v, v_t), (o, o_t), (g_t, g) = qs, ks, vs, os, gs
    p_t = p * (scores.s_t - mu[..., None])
    c = g @ v.mT - (g * o).sum(-1, keepdim=True)
    c_t = torch.baddbmm(g_t @ v.mT, g, v_t.mT) - (g_t * o + g * o_t).sum(-1, keepdim=True)
    ds, ds_t = scale * p * c, scale * (p_t * c + p * c_t)
    if scores.d1 is not None:
        ds, ds_t = ds * scores.d1, ds_t * scores.d1 + ds * scores.d1_t
    return (
        torch.baddbmm(ds_t @ k, ds, k_t),
        ds @ k,
        torch.baddbmm(ds_t.mT @ q, ds.mT, q_t),
        ds.mT @ q,
        torch.baddbmm(p_t.mT @ g, p.mT, g_t),
        p.mT @ g,
    )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stat = (q.shape[0] // 2, *q.shape[1:-1])
    acc = accum_dtype(q)
    return (
        q.new_empty(*q.shape[:-1], v.shape[-1]),
        q.new_empty(stat, dtype=acc),
        q.new_empty(stat, dtype=acc),
    )


def _fake_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(q), fresh(k), fresh(v)


_OPTIONS = "Tensor? offsets, float scale, bool causal, int? window, float? softcap, str mode"

_dual_attention_bwd = define(
    "dual_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" Tensor mu, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    q, k, v, offsets, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    if ctx.options[-1] != "jvp":
        ctx.save_for_backward(q, k, v, *output, offsets)


def _backward(ctx, grad, *_):
    refuse_jvp("dual_attention", ctx.options[-1])
    return *_dual_attention_bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


_dual_attention = define(
    f"dual_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
