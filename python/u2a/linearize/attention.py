"""Causal attention whose probabilities are few enough to be held between products.

S = s q k^T, P = softmax S, o = P v; A = S_t - <P, S_t> per row: P_t = P A, o_t = P v_t + P_t v.
With g the gradient at o: C = g v^T - <P, g v^T>, dS = P C; W = A C + g_t v^T + g v_t^T,
dS_t = P (W - <P, W>). Queries in pieces, against the keys that a piece can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from u2a.linearize.nonlinear import Stacked
from u2a.linearize.session import Session
from u2a_kernels import dual_attention

HELD = 1 << 22  # probabilities of a call, at most
QUERIES, SCORES = 128, 1 << 18  # of a piece, at most and about


class Piece(NamedTuple):
    """Rows [groups, queries, keys] of the scores; a group is a key head of an example."""

    groups: slice
    queries: slice
    keys: slice
    p: Tensor


Parts = tuple[Tensor, Tensor, Tensor]  # of q, k and v


def make_attention(
    session: Session, q: Tensor, k: Tensor, scale: float | None, window: int | None,
    softcap: float | None,
) -> Stacked:  # fmt: skip
    """The op of one call; on a GPU, with a soft cap or many scores the dual kernel itself."""
    fn = partial(dual_attention, scale=scale, window=window, softcap=softcap, mode=session.mode)
    scores = q[..., 0].numel() * k.shape[2]
    if q.device.type != "cpu" or softcap is not None or scores > HELD:
        return Stacked(session, fn)
    return Attention(session, fn, q.shape[-1] ** -0.5 if scale is None else scale, window)


class Attention(Stacked):
    def __init__(self, session: Session, fn: Any, scale: float, window: int | None) -> None:
        super().__init__(session, fn)
        self.scale, self.window = scale, window

    def record(self, *xs: Tensor) -> Tensor:
        y = super().record(*xs)
        q, k, v = xs
        self.rep, self.shape = q.shape[1] // k.shape[1], q.shape
        with torch.no_grad():
            self.q, self.k, self.v = self.flat(q), self.flat(k), self.flat(v)
            self.pieces = list(self._pieces())
        self.inputs = ()
        return y

    def flat(self, x: Tensor) -> Tensor:
        """[..., B, H, T, D] by key head: [..., B Hkv, rep, T, D], wide."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rep = self.rep if x.shape[-3] == self.shape[1] else 1
        return wide.unflatten(-3, (-1, rep)).flatten(-5, -4)

    def at(self, x: Tensor, groups: slice, tokens: slice) -> Tensor:
        """[g, rep * tokens, D]."""
        return x[groups, :, tokens].flatten(1, 2)

    def _pieces(self) -> Iterator[Piece]:
        t, s = self.q.shape[2], self.k.shape[2]
        for start in range(0, t, QUERIES):
            end = min(start + QUERIES, t)
            last = torch.arange(start, end)[:, None] + s - t
            low = 0 if self.window is None else max(0, start + s - t - self.window + 1)
            keys = slice(low, end + s - t)
            key = torch.arange(keys.start, keys.stop)
            hidden = key > last
            if self.window is not None:
                hidden |= key <= last - self.window
            hidden = hidden.repeat(self.rep, 1)
            step = max(1, SCORES // hidden.numel())
            for g in range(0, self.q.shape[0], step):
                groups, queries = slice(g, g + step), slice(start, end)
                scores = self.at(self.q, groups, queries) @ self.at(self.k, groups, keys).mT
                scores.mul_(self.scale).masked_fill_(hidden, -torch.inf)
                yield Piece(groups, queries, keys, torch.softmax(scores, -1))

    def seen(self, g: Tensor) -> None:
        super().seen(g)
        self.g = self.flat(g)
        self.centred = []
        for piece in self.pieces:
            c = self.at(self.g, piece.groups, piece.queries) @ self.values(piece).mT
            self.centred.append(c.sub_(_dot(piece.p, c)))

    def values(self, piece: Piece) -> Tensor:
        return self.at(self.v, piece.groups, piece.keys)

    def sweep(self, *x_ts: Tensor) -> Tensor:
        y_t: Tensor = _Attention.apply(self, *x_ts)
        return y_t

    def forward(self, x_ts: Parts) -> tuple[Tensor, list[Tensor]]:
        """o_t `[G, rep, T, D]`, and A of every piece."""
        q_t, k_t, v_t = x_ts
        out = torch.empty(*q_t.shape[:-1], v_t.shape[-1], dtype=q_t.dtype)
        moved = []
        for piece in self.pieces:
            q, k = self._sides(self.q, self.k, piece)
            q1, k1 = self._sides(q_t, k_t, piece)
            a = torch.baddbmm(q1 @ k.mT, q, k1.mT).mul_(self.scale)
            a.sub_(_dot(piece.p, a))
            o = piece.p @ self.at(v_t, piece.groups, piece.keys)
            o.baddbmm_(piece.p * a, self.values(piece))
            part = out[piece.groups, :, piece.queries]
            part.copy_(o.view(part.shape))
            moved.append(a if self.g is not None else a.new_empty(0))
        return out, moved

    def _sides(self, q: Tensor, k: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        return self.at(q, piece.groups, piece.queries), self.at(k, piece.groups, piece.keys)

    def backward(self, gy: Tensor, x_ts: Parts | None, moved: list[Tensor]) -> Parts:
        """Cotangents of the tangents; `x_ts` None for the transpose alone."""
        dq, dk, dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
        for i, piece in enumerate(self.pieces):
            q, k = self._sides(self.q, self.k, piece)
            g, keys = self.at(gy, piece.groups, piece.queries), (piece.groups, 0, piece.keys)
            w = g @ self.values(piece).mT
            dvs = piece.p.mT @ g
            if x_ts is not None and self.g is not None:
                g0, a, c = self.at(self.g, piece.groups, piece.queries), moved[i], self.centred[i]
                w.baddbmm_(g0, self.at(x_ts[2], piece.groups, piece.keys).mT).addcmul_(a, c)
                dvs.baddbmm_((piece.p * a).mT, g0)
            ds_t = w.sub_(_dot(piece.p, w)).mul_(piece.p)
            dqs, dks = ds_t @ k, ds_t.mT @ q
            if x_ts is not None and self.g is not None:
                ds, (q1, k1) = piece.p * self.centred[i], self._sides(x_ts[0], x_ts[1], piece)
                dqs.baddbmm_(ds, k1)
                dks.baddbmm_(ds.mT, q1)
            part = dq[piece.groups, :, piece.queries]
            part.copy_(dqs.view(part.shape))
            dk[keys] += dks
            dv[keys] += dvs
        return dq.mul_(self.scale), dk.mul_(self.scale), dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Attention, *x_ts: Tensor) -> Tensor:
        session = op.session
        ctx.op, ctx.second = op, session.hvp and op.g is not None
        ctx.save_for_backward(*(x_ts if ctx.second else ()))
        ctx.like = [(x.shape, x.dtype) for x in x_ts]
        ctx.moved, outs = [], []
        flat = [op.flat(session.split(x)) for x in x_ts]
        for i in range(session.k):
            one = flat[0][i], flat[1][i], flat[2][i]
            out, moved = op.forward(one)
            outs.append(out)
            ctx.moved.append(moved)
            if ctx.second and session.second is not None:
                parts = op.backward(torch.zeros_like(out), one, moved)
                for x, d in zip(one, parts, strict=True):
                    session.second[i] += (x * d).reshape(session.rows, -1).sum(-1)
        y = torch.stack(outs)
        return y.view(*x_ts[0].shape[:-1], y.shape[-1]).to(x_ts[0].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = ctx.op
        split = op.session.split
        gy = op.flat(split(grads[0]))
        flat = [op.flat(split(x)) for x in ctx.saved_tensors]
        parts = [
            op.backward(gy[i], tuple(x[i] for x in flat) if ctx.second else None, moved)
            for i, moved in enumerate(ctx.moved)
        ]
        ctx.moved = []
        joined = (torch.stack(p) for p in zip(*parts, strict=True))
        return None, *(
            x.view(shape).to(dtype) for x, (shape, dtype) in zip(joined, ctx.like, strict=True)
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
