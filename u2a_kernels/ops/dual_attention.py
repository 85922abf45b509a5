"""Softmax attention on dual rows, flash style: only o and the row statistics lse, mu are kept.

S = cap(s q k^T), P = exp(S - lse), o = P v; P_t = P (S_t - mu), mu = sum P S_t the tangent of lse;
o_t = P v_t + P_t v. The backward (`_hvp`) is the tangent of the flash backward.
The reference holds the scores of a few heads at a time, never those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, shape, wanted
from u2a_kernels._dual import check_halves, check_mode, fresh, halves, refuse_jvp
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype

PIECE = 1 << 21  # scores held at once
Pair = tuple[Tensor, Tensor]  # primal, tangent
Options = tuple[Any, ...]  # offsets, scale, causal, window, softcap, mode


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
    """Rows and key heads whose scores are held at once; `rep` queries share a key head."""

    rows: slice
    heads: slice
    rep: int
    packed: bool

    def view(self, half: Tensor, rep: int = 1) -> Tensor:
        """[b, heads * rep, T, ...] of one half; rep is 1 for keys and values."""
        part = half[self.rows, self.heads.start * rep : self.heads.stop * rep]
        return part.transpose(0, 1)[None] if self.packed else part

    def flat(self, half: Tensor, acc: torch.dtype, rep: int = 1) -> Tensor:
        """[b * heads, rep * T, ...]: all queries of a key head are rows of one product."""
        part = self.view(half, rep).to(acc)
        b, h, t, *rest = part.shape
        return part.reshape(b * h // rep, rep * t, *rest)

    def pair(self, x: Tensor, acc: torch.dtype, rep: int = 1) -> Pair:
        primal, tangent = halves(x)
        return self.flat(primal, acc, rep), self.flat(tangent, acc, rep)

    def store(self, half: Tensor, flat: Tensor, rep: int = 1) -> None:
        target = self.view(half, rep)
        target.copy_(flat.view(target.shape))


def _cuts(q: Tensor, k: Tensor, offsets: Tensor | None) -> Iterator[Cut]:
    h_kv = k.shape[1]
    rep = q.shape[1] // h_kv
    if offsets is None:
        scores = max(1, rep * q.shape[2] * k.shape[2])  # of one row and key head
        step = max(1, PIECE // (scores * h_kv))
        blocks = [(b, b + step, scores) for b in range(0, q.shape[0] // 2, step)]
    else:
        ends = offsets.tolist()
        blocks = [(s, e, rep * (e - s) ** 2) for s, e in pairwise(ends) if e > s]
    for start, end, scores in blocks:
        heads = max(1, min(h_kv, PIECE // scores))
        for h in range(0, h_kv, heads):
            yield Cut(slice(start, end), slice(h, min(h + heads, h_kv)), rep, offsets is not None)


class Scores(NamedTuple):
    """Capped scores with -inf where a key is not seen, and their tangent; the cap's derivative
    and the tangent of that."""

    s: Tensor
    s_t: Tensor
    d1: Tensor | None
    d1_t: Tensor | None


def _scores(qs: Pair, ks: Pair, rep: int, options: Options) -> Scores:
    _, scale, causal, window, softcap, _ = options
    (q, q_t), (k, k_t) = qs, ks
    q, q_t = q * scale, q_t * scale
    s = q @ k.mT
    s_t = torch.baddbmm(q_t @ k.mT, q, k_t.mT)
    d1 = d1_t = None
    if softcap is not None:
        th = torch.tanh(s / softcap)
        d1 = 1 - th * th
        s, s_t = softcap * th, d1 * s_t
        d1_t = -2 / softcap * th * s_t
    if causal:
        t, keys = q.shape[1] // rep, k.shape[1]
        query = torch.arange(keys - t, keys, device=q.device)[:, None]
        key = torch.arange(keys, device=q.device)
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        s = s.masked_fill_(hidden.repeat(rep, 1), -math.inf)
    return Scores(s, s_t, d1, d1_t)


def reference(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(q)
    out, lse, mu = _fake(q, k, v, *options)
    for cut in _cuts(q, k, options[0]):
        v0, v_t = cut.pair(v, acc)
        s, s_t, _, _ = _scores(cut.pair(q, acc, cut.rep), cut.pair(k, acc), cut.rep, options)
        row = torch.logsumexp(s, -1)
        p = torch.softmax(s, -1).masked_fill_((row == -math.inf)[..., None], 0.0)
        p_t = s_t.mul_(p)
        m = p_t.sum(-1)
        p_t.addcmul_(p, m[..., None], value=-1)
        o, o_t = halves(out)
        cut.store(o, p @ v0, cut.rep)
        cut.store(o_t, torch.baddbmm(p @ v_t, p_t, v0), cut.rep)
        cut.store(lse, row, cut.rep)
        cut.store(mu, m, cut.rep)
    return out, lse, mu


def reference_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mu: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(q)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for cut in _cuts(q, k, options[0]):
        rep = cut.rep
        qs, os, gs = (cut.pair(x, acc, rep) for x in (q, out, grad))
        ks, vs = cut.pair(k, acc), cut.pair(v, acc)
        scores = _scores(qs, ks, rep, options)
        row, m = cut.flat(lse, acc, rep)[..., None], cut.flat(mu, acc, rep)[..., None]
        p = torch.exp(scores.s - row.masked_fill(row == -math.inf, 0.0))
        if options[-1] == "ggn":
            parts = _ggn(p, scores, qs, ks, vs, os, gs, options[1])
        else:
            parts = _hvp(p, m, scores, qs, ks, vs, os, gs, options[1])
        for x, heads, pair in zip((dq, dk, dv), (rep, 1, 1), parts, strict=True):
            for half, part in zip(halves(x), pair, strict=False):
                cut.store(half, part, heads)
    return dq, dk, dv


def _ggn(
    p: Tensor, scores: Scores, qs: Pair, ks: Pair, vs: Pair, os: Pair, gs: Pair, scale: float
) -> tuple[tuple[Tensor, ...], ...]:
    """Plain flash backward of the primal half: (dq,), (dk,), (dv,)."""
    q, k, v, o, g = qs[0], ks[0], vs[0], os[0], gs[0]
    ds = scale * p * (g @ v.mT - (g * o).sum(-1, keepdim=True))
    if scores.d1 is not None:
        ds = ds * scores.d1
    return (ds @ k,), (ds.mT @ q,), (p.mT @ g,)


def _hvp(
    p: Tensor,
    mu: Tensor,
    scores: Scores,
    qs: Pair,
    ks: Pair,
    vs: Pair,
    os: Pair,
    gs: Pair,
    scale: float,
) -> tuple[tuple[Tensor, ...], ...]:
    """Tangent of the flash backward: (dq, dq_t), (dk, dk_t), (dv, dv_t)."""
    (q, q_t), (k, k_t), (v, v_t), (o, o_t), (g_t, g) = qs, ks, vs, os, gs
    p_t = p * (scores.s_t - mu)
    c = g @ v.mT - (g * o).sum(-1, keepdim=True)
    c_t = torch.baddbmm(g_t @ v.mT, g, v_t.mT) - (g_t * o + g * o_t).sum(-1, keepdim=True)
    ds, ds_t = scale * p * c, scale * (p_t * c + p * c_t)
    if scores.d1 is not None and scores.d1_t is not None:
        ds, ds_t = ds * scores.d1, ds_t * scores.d1 + ds * scores.d1_t
    return (
        (torch.baddbmm(ds_t @ k, ds, k_t), ds @ k),
        (torch.baddbmm(ds_t.mT @ q, ds.mT, q_t), ds.mT @ q),
        (torch.baddbmm(p_t.mT @ g, p.mT, g_t), p.mT @ g),
    )


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    stat, acc = (q.shape[0] // 2, *q.shape[1:-1]), accum_dtype(q)
    return (
        q.new_empty(*q.shape[:-1], v.shape[-1]),
        q.new_empty(stat, dtype=acc),
        q.new_empty(stat, dtype=acc),
    )


def _fake_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
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
