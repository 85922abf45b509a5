"""Plain torch: one piece of queries after another, against the keys that the piece can see.

A piece's scores are whole rows, so the backward makes softmax and the row sums of its gradient
again from them, as autograd would, and uses none of the saved statistics. Keeping the sums of the
very products that are summed holds the float32 error near torch's own; with P = exp(S - lse) and
D = rowsum(g o O) gradients were up to 4 times as far off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from u2a_kernels._dual import halves
from u2a_kernels._segments import accum_dtype

PIECE = 1 << 18  # scores held at once
QUERIES = 128  # at most, in a piece
Pair = tuple[Tensor, Tensor]  # primal, tangent
Options = tuple[Any, ...]  # offsets, scale, causal, window, softcap, mode


@dataclass(frozen=True)
class Group:
    """Rows and key heads whose keys and values are at hand; `rep` queries share a key head."""

    rows: slice
    heads: slice
    rep: int
    packed: bool

    def view(self, half: Tensor, rep: int = 1) -> Tensor:
        """[b, heads * rep, T, ...] of one half; rep is 1 for keys and values."""
        part = half[self.rows, self.heads.start * rep : self.heads.stop * rep]
        return part.transpose(0, 1)[None] if self.packed else part

    def flat(self, half: Tensor, acc: torch.dtype, at: slice, rep: int = 1) -> Tensor:
        """[b * heads, rep * T, ...] of the tokens `at`: all queries of a key head are rows of one
        product."""
        part = self.view(half, rep)[:, :, at].to(acc)
        b, h, t, *rest = part.shape
        return part.reshape(b * h // rep, rep * t, *rest)

    def pair(self, x: Tensor, acc: torch.dtype, at: slice = slice(None), rep: int = 1) -> Pair:
        primal, tangent = halves(x)
        return self.flat(primal, acc, at, rep), self.flat(tangent, acc, at, rep)

    def store(self, half: Tensor, flat: Tensor, at: slice = slice(None), rep: int = 1) -> None:
        target = self.view(half, rep)[:, :, at]
        target.copy_(flat.view(target.shape))


def _groups(q: Tensor, k: Tensor, offsets: Tensor | None) -> Iterator[Group]:
    """As many rows, or key heads of one row, as PIECE allows with pieces of QUERIES."""
    h_kv = k.shape[1]
    rep = q.shape[1] // h_kv
    if offsets is None:
        scores = max(1, rep * min(q.shape[2], QUERIES) * k.shape[2])  # of one row and key head
        step = max(1, PIECE // (scores * h_kv))
        blocks = [(b, b + step, scores) for b in range(0, q.shape[0] // 2, step)]
    else:
        ends = offsets.tolist()
        lengths = ((s, e, e - s) for s, e in pairwise(ends) if e > s)
        blocks = [(s, e, rep * min(n, QUERIES) * n) for s, e, n in lengths]
    for start, end, scores in blocks:
        heads = max(1, min(h_kv, PIECE // scores))
        for h in range(0, h_kv, heads):
            yield Group(slice(start, end), slice(h, min(h + heads, h_kv)), rep, offsets is not None)


class Piece(NamedTuple):
    """Queries, and the keys that one of them sees; `hidden` [queries, keys], `blind` rows."""

    at: slice
    keys: slice
    hidden: Tensor | None
    blind: Tensor | None


def _pieces(group: Group, q: Tensor, k: Tensor, options: Options) -> Iterator[Piece]:
    _, _, causal, window, _, _ = options
    t, s = (group.view(halves(x)[0], rep).shape[2] for x, rep in ((q, group.rep), (k, 1)))
    size = max(1, min(QUERIES, PIECE // max(1, group.rep * s)))
    for start in range(0, t, size):
        end = min(start + size, t)
        if not causal:
            yield Piece(slice(start, end), slice(0, s), None, None)
            continue
        last = torch.arange(start, end, device=q.device)[:, None] + (s - t)
        low = 0 if window is None else max(0, start + s - t - window + 1)
        high = max(low, end + s - t)
        key = torch.arange(low, high, device=q.device)
        hidden = key > last
        if window is not None:
            hidden |= key <= last - window
        blind = (last < 0).repeat(group.rep, 1) if start + s < t else None
        yield Piece(slice(start, end), slice(low, high), hidden.repeat(group.rep, 1), blind)


class Scores(NamedTuple):
    """Capped scores with -inf where a key is not seen, and their tangent; the cap's derivative
    and the tangent of that."""

    s: Tensor
    s_t: Tensor
    d1: Tensor | None
    d1_t: Tensor | None


def _product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha a b, the factor applied by the product itself."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


def _tangent(a: Pair, b: Pair, alpha: float = 1.0) -> Tensor:
    """alpha (a_t b + a b_t)."""
    out = _product(a[1], b[0], alpha)
    return out.baddbmm_(a[0], b[1], alpha=alpha)


def _scores(
    qs: Pair, ks: Pair, hidden: Tensor | None, options: Options, tangent: bool = True
) -> Scores:
    _, scale, _, _, softcap, _ = options
    keys = ks[0].mT, ks[1].mT
    s = _product(qs[0], keys[0], scale)
    s_t = _tangent(qs, keys, scale) if tangent else s.new_empty(0)
    d1 = d1_t = None
    if softcap is not None:
        th = torch.tanh(s / softcap)
        d1 = 1 - th * th
        if tangent:
            s_t.mul_(d1)
            d1_t = th * s_t * (-2 / softcap)
        s = th.mul_(softcap)
    if hidden is not None:
        s.masked_fill_(hidden, -math.inf)
    return Scores(s, s_t, d1, d1_t)


def _softmax(s: Tensor, blind: Tensor | None) -> Tensor:
    p = torch.softmax(s, -1)
    return p if blind is None else p.masked_fill_(blind, 0.0)


def _row_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    acc = accum_dtype(q)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    stats = q.new_zeros(3, q.shape[0] // 2, *q.shape[1:-1], dtype=acc)
    stats[1] = -math.inf
    if 0 in q.shape or 0 in k.shape:
        return out, stats
    for group in _groups(q, k, options[0]):
        rep, ks, vs = group.rep, group.pair(k, acc), group.pair(v, acc)
        for piece in _pieces(group, q, k, options):
            if piece.keys.start == piece.keys.stop:
                continue
            k_pair, v_pair = ((x[:, piece.keys], y[:, piece.keys]) for x, y in (ks, vs))
            s, p_t, _, _ = _scores(group.pair(q, acc, piece.at, rep), k_pair, piece.hidden, options)
            p = _softmax(s, piece.blind)
            mu = _row_sum(p, p_t)
            p_t.sub_(mu).mul_(p)
            top, rest = s.amax(-1), p.amax(-1).log().neg_()
            if piece.blind is not None:
                top, rest = (
                    x.masked_fill(piece.blind[:, 0], f) for x, f in ((top, 0.0), (rest, -math.inf))
                )
            rows = (p @ v_pair[0], _tangent((p, p_t), v_pair))
            for half, part in zip(
                (*halves(out), *stats), (*rows, top, rest, mu[..., 0]), strict=True
            ):
                group.store(half, part, piece.at, rep)
    return out, stats


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(q)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    if 0 in q.shape or 0 in k.shape:
        return dq, dk, dv
    hvp = options[-1] != "ggn"
    step = _hvp if hvp else _ggn
    for group in _groups(q, k, options[0]):
        rep, ks, vs = group.rep, group.pair(k, acc), group.pair(v, acc)
        sums = [[torch.zeros_like(x) for x in pair] for pair in (ks, vs)]
        for piece in _pieces(group, q, k, options):
            k_pair, v_pair = ((x[:, piece.keys], y[:, piece.keys]) for x, y in (ks, vs))
            qs, gs = (group.pair(x, acc, piece.at, rep) for x in (q, grad))
            scores = _scores(qs, k_pair, piece.hidden, options, hvp)
            p = _softmax(scores.s, piece.blind)
            at_keys = [[x[:, piece.keys] for x in pair] for pair in sums]
            parts = step(p, scores, qs, k_pair, v_pair, gs, at_keys, options[1])
            for half, part in zip(halves(dq), parts, strict=False):
                group.store(half, part, piece.at, rep)
        for x, pair in zip((dk, dv), sums, strict=True):
            for half, part in zip(halves(x), pair, strict=True):
                group.store(half, part)
    return dq, dk, dv


Sums = list[list[Tensor]]  # of dk, dv: primal, tangent


def _ggn(
    p: Tensor, scores: Scores, qs: Pair, ks: Pair, vs: Pair, gs: Pair, sums: Sums, scale: float
) -> tuple[Tensor, ...]:
    """Plain attention backward of the primal half: (dq,)."""
    ds = gs[0] @ vs[0].mT
    ds.sub_(_row_sum(p, ds)).mul_(p)
    if scores.d1 is not None:
        ds.mul_(scores.d1)
    sums[0][0].baddbmm_(ds.mT, qs[0], alpha=scale)
    sums[1][0].baddbmm_(p.mT, gs[0])
    return (_product(ds, ks[0], scale),)


def _hvp(
    p: Tensor, scores: Scores, qs: Pair, ks: Pair, vs: Pair, gs: Pair, sums: Sums, scale: float
) -> tuple[Tensor, ...]:
    """Tangent of the attention backward: (dq, dq_t)."""
    g_t, g = gs
    values = vs[0].mT, vs[1].mT
    p_t = scores.s_t.sub_(_row_sum(p, scores.s_t))
    ds, ds_t = g @ values[0], _tangent((g, g_t), values)
    ds.sub_(_row_sum(p, ds))
    ds_t.addcmul_(p_t, ds)
    ds_t.sub_(_row_sum(p, ds_t)).mul_(p)
    ds.mul_(p)
    p_t.mul_(p)
    if scores.d1 is not None and scores.d1_t is not None:
        ds_t.mul_(scores.d1).addcmul_(ds, scores.d1_t)
        ds.mul_(scores.d1)
    for (primal, tangent), a, a_t, (b, b_t), factor in (
        (sums[0], ds, ds_t, qs, scale),
        (sums[1], p, p_t, (g, g_t), 1.0),
    ):
        primal.baddbmm_(a_t.mT, b, alpha=factor).baddbmm_(a.mT, b_t, alpha=factor)
        tangent.baddbmm_(a.mT, b, alpha=factor)
    return _tangent((ds, ds_t), ks, scale), _product(ds, ks[0], scale)
