"""Linear layers, one matrix or one per group of rows, and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.dual_modules import UnsupportedModel
from u2a.grouped import grouped
from u2a.linearize.session import Op, Session, Sink
from u2a.lookup import lookup

Rows = Callable[..., Tensor]


class Linear(Op):
    """y = x W^T + b. `turned`: W is stored as [d_in, d_out]."""

    x: Tensor | None = None

    def __init__(
        self, session: Session, weight: Tensor, bias: Tensor | None, turned: bool = False
    ) -> None:
        super().__init__(session)
        self.weight, self.bias, self.turned = weight, bias, turned

    @property
    def w(self) -> Tensor:
        return self.weight.detach().mT if self.turned else self.weight.detach()

    def record(self, x: Tensor) -> Tensor:
        if self.session.learns(self.weight):
            self.x = x.detach().flatten(0, -2)
        y = self.apply(x, self.w)
        return self.watched(y if self.bias is None else y + self.bias.detach())

    def seen(self, g: Tensor) -> None:
        if self.session.learns(self.weight):
            self.g = g.flatten(0, -2)

    def sweep(self, x_t: Tensor) -> Tensor:
        w_t, b_t = (self.session.direction(p) for p in (self.weight, self.bias))
        if w_t is not None and self.turned:
            w_t = w_t.mT
        y_t: Tensor = _Linear.apply(self, x_t, w_t, b_t)
        return y_t

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def spread(self, y: Tensor, x: Tensor, w: Tensor) -> None:
        """y[k] += x w[k]^T."""
        y.baddbmm_(x.expand(y.shape[0], *x.shape), w.mT)

    def pull(self, g: Tensor, w: Tensor) -> Tensor:
        return g @ w

    def spread_pull(self, y: Tensor, g: Tensor, w: Tensor) -> None:
        """y[k] += g w[k]."""
        y.baddbmm_(g.expand(y.shape[0], *g.shape), w)

    def outer(self, g: Tensor, x: Tensor) -> Tensor:
        """sum_t g[k, t] x[k, t]^T."""
        return g.mT @ x

    def deliver(self, sink: Sink, x: Tensor, g: Tensor) -> None:
        sink.outer(self.weight, x, g)


class Grouped(Linear):
    """A stack of weights [E, d_out, d_in], x `[M, d_in]` sorted into groups that end at `ends`."""

    def __init__(self, session: Session, weight: Tensor, ends: Tensor) -> None:
        super().__init__(session, weight, None)
        self.ends, self.owner = ends, session.owner

    def deliver(self, sink: Sink, x: Tensor, g: Tensor) -> None:
        assert self.owner is not None
        sink.grouped(self.weight, x, g, self.ends, self.owner)

    def _each(self, call: Rows, a: Tensor, w: Tensor) -> Tensor:
        """call(a[k], w[k]) of every k; a and w may lack the k."""
        k = self.session.k
        a = a if a.ndim == 3 else a.expand(k, *a.shape)
        w = w if w.ndim == 4 else w.expand(k, *w.shape)
        return torch.stack([call(p, q) for p, q in zip(a, w, strict=True)])

    def _forward(self, x: Tensor, w: Tensor) -> Tensor:
        return grouped(x, w, self.ends)

    def _back(self, g: Tensor, w: Tensor) -> Tensor:
        return grouped(g, w.mT.contiguous(), self.ends)

    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        if self.session.at is None:
            return self._forward(x, w)
        return self._each(self._forward, self.session.split(x), w).flatten(0, 1)

    def spread(self, y: Tensor, x: Tensor, w: Tensor) -> None:
        y += self._each(self._forward, x, w)

    def pull(self, g: Tensor, w: Tensor) -> Tensor:
        return self._each(self._back, self.session.split(g), w).flatten(0, 1)

    def spread_pull(self, y: Tensor, g: Tensor, w: Tensor) -> None:
        y += self._each(self._back, g, w)

    def outer(self, g: Tensor, x: Tensor) -> Tensor:
        k = self.session.k
        cut = self.ends[:-1].cpu().long()
        g, x = (t if t.ndim == 3 else t.expand(k, *t.shape) for t in (g, x))
        parts = zip(g.tensor_split(cut, 1), x.tensor_split(cut, 1), strict=True)
        return torch.stack([a.mT @ b for a, b in parts], 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: Linear, x_t: Tensor, w_t: Tensor | None, b_t: Tensor | None
    ) -> Tensor:
        y = op.apply(x_t, op.w)
        ys = op.session.split(y).flatten(1, -2)
        if w_t is not None:
            assert op.x is not None
            op.spread(ys, op.x, w_t)
        if b_t is not None:
            ys += b_t[:, None]
        second = op.session.hvp and w_t is not None and op.g is not None
        ctx.op, ctx.second = op, second
        ctx.save_for_backward(*((x_t, w_t) if second else ()))
        if second and op.session.second is not None:
            assert op.g is not None and w_t is not None
            turn = torch.zeros_like(op.session.split(x_t).flatten(1, -2))
            op.spread_pull(turn, op.g, w_t)
            op.session.add_second(2 * turn * x_t.reshape(turn.shape))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op, (gy,) = ctx.op, grads
        split = op.session.split
        flat = split(gy).flatten(1, -2)
        x_t, w_t = ctx.saved_tensors if ctx.second else (gy, None)
        gx = gw = gb = None
        if ctx.needs_input_grad[1]:
            gx = op.pull(gy.contiguous(), op.w)
            if ctx.second:
                op.spread_pull(split(gx).flatten(1, -2), op.g, w_t)
        if ctx.needs_input_grad[2] and op.session.sink is not None:
            op.deliver(op.session.sink, op.x, flat[0])
            if ctx.second:
                op.deliver(op.session.sink, x_t.flatten(0, -2), op.g)
        elif ctx.needs_input_grad[2]:
            gw = op.outer(flat, op.x)
            if ctx.second:
                gw += op.outer(op.g, split(x_t).flatten(1, -2))
        if ctx.needs_input_grad[3] and op.session.sink is not None:
            op.session.sink.rows(op.bias, flat[0])
        elif ctx.needs_input_grad[3]:
            gb = flat.sum(1)
        return None, gx, gw, gb


class Embedding(Op):
    """Rows of a table, `turned`: its columns; the row `padding_idx` gets no gradient, so it gets no
    tangent either. `root`: gradients of what comes after it are wanted."""

    def __init__(
        self,
        session: Session,
        weight: Tensor,
        padding_idx: int | None,
        root: bool,
        turned: bool = False,
    ) -> None:
        super().__init__(session)
        self.weight, self.padding_idx, self.root = weight, padding_idx, root
        self.turned = turned

    def record(self, ids: Tensor) -> Tensor:
        self.ids = ids
        table = self.weight.detach()
        e = F.embedding(ids, table.mT if self.turned else table)
        if self.root and self.session.hvp:
            self.session.roots.append(e.requires_grad_())
        return e

    def sweep(self, _: Tensor) -> Tensor:
        w_t, k = self.session.direction(self.weight), self.session.k
        if w_t is None:
            width = self.weight.shape[0 if self.turned else 1]
            return self.weight.new_zeros(k * self.ids.shape[0], *self.ids.shape[1:], width)
        if self.turned:
            w_t = w_t.mT
        e_t = torch.cat([lookup(self.ids, w, self.padding_idx) for w in w_t])
        sink = self.session.sink
        if sink is not None and self.turned:
            raise UnsupportedModel("LoRA on an embedding", "u2a.index: features of products")
        if sink is not None and e_t.requires_grad:
            e_t.register_hook(
                lambda g: sink.lookup(self.weight, self.ids, g.flatten(0, -2), self.padding_idx)
            )
        if self.padding_idx is not None:
            hidden = (self.ids == self.padding_idx)[..., None]
            e_t = e_t.masked_fill(hidden.repeat(k, *[1] * self.ids.ndim), 0.0)
        return e_t
