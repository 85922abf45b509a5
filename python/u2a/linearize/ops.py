"""One call of one module on a fixed batch: what its tangent needs, held, and its tangent sweep.

`record` runs the primal rows, `seen` gets the loss gradient g at its output, `sweep` maps the
tangents of its inputs, K directions as K B rows, to those of its output. A sweep is linear in them.
Its backward is the transpose, which is all that Gauss-Newton needs; for the Hessian it adds what g
meets in the second derivative, so that an ordinary backward of the sweep is the tangent of the
gradient (Pearlmutter, Neural Computation 6, 1994).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.grouped import grouped

Rows = Callable[..., Tensor]  # a function of dual rows [x; x_t]


class Sink(Protocol):
    """Takes the parts of each parameter's product instead of their sum over the examples; with one
    direction. x `[M, d_in]`, g `[M, d_out]`, an example's rows together."""

    def outer(self, p: Tensor, x: Tensor, g: Tensor) -> None:
        """sum_t g_t x_t^T, seen as [d_out, d_in]."""

    def grouped(self, p: Tensor, x: Tensor, g: Tensor, ends: Tensor, owner: Tensor) -> None:
        """The same in groups that end at `ends`, rows of the examples `owner`."""

    def rows(self, p: Tensor, g: Tensor) -> None:
        """sum_t g_t."""

    def lookup(self, p: Tensor, ids: Tensor, g: Tensor, padding_idx: int | None) -> None:
        """sum_t e_id g_t^T."""


class Session:
    """What the handlers look at: the calls of the running batch in their order, the directions.

    `k` directions of `rows` examples; `second [k, rows]` collects v^T H_i v where it is set;
    `owner`: the examples of rows that are out of order.
    """

    def __init__(self, mode: str, trainable: set[int]) -> None:
        self.mode, self.trainable = mode, trainable
        self.calls: list[Op] = []
        self.at: int | None = None  # the next call of a sweep; None while recording
        self.k = self.rows = 1
        self.leaves: dict[int, Tensor] = {}
        self.root: Tensor | None = None
        self.second: Tensor | None = None
        self.owner: Tensor | None = None
        self.sink: Sink | None = None

    @property
    def hvp(self) -> bool:
        return self.mode == "hvp"

    def run(self, make: Callable[[], Op], *inputs: Any) -> Any:
        if self.at is None:
            op = make()
            self.calls.append(op)
            return op.record(*inputs)
        op = self.calls[self.at]
        self.at += 1
        return op.sweep(*inputs)

    def direction(self, p: Tensor | None) -> Tensor | None:
        return None if p is None else self.leaves.get(id(p))

    def learns(self, p: Tensor | None) -> bool:
        return p is not None and id(p) in self.trainable

    def split(self, x: Tensor) -> Tensor:
        """K directions apart: [K, R, ...]."""
        return x.unflatten(0, (self.k, -1))

    def add_second(self, parts: Tensor) -> None:
        """parts `[K, R, ...]`, R a multiple of the examples in their order, or as `owner` says."""
        if self.second is None:
            return
        if self.owner is None:
            self.second += parts.reshape(self.k, self.rows, -1).sum(-1)
        else:
            self.second.index_add_(1, self.owner, parts.flatten(2).sum(-1).to(self.second))


class Op:
    g: Tensor | None = None

    def __init__(self, session: Session) -> None:
        self.session = session

    def watched(self, y: Tensor) -> Tensor:
        """y, whose gradient `seen` will get."""
        if self.session.hvp and y.requires_grad:
            y.register_hook(self.seen)
        return y

    def seen(self, g: Tensor) -> None:
        raise NotImplementedError

    def record(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def sweep(self, *tangents: Any) -> Any:
        raise NotImplementedError


class Constant(Op):
    """A value that the primal rows choose; sweeps get the same."""

    def __init__(self, session: Session, make: Callable[..., Any]) -> None:
        super().__init__(session)
        self.make = make

    def record(self, *inputs: Any) -> Any:
        self.value = self.make(*inputs)
        return self.value

    def sweep(self, *_: Any) -> Any:
        return self.value


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
        x_t, w_t = ctx.saved_tensors if ctx.second else (None, None)
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
    """Rows of a table; the row `padding_idx` gets no gradient, so it gets no tangent either."""

    def __init__(
        self, session: Session, weight: Tensor, padding_idx: int | None, root: bool
    ) -> None:
        super().__init__(session)
        self.weight, self.padding_idx, self.root = weight, padding_idx, root

    def record(self, ids: Tensor) -> Tensor:
        self.ids = ids
        e = F.embedding(ids, self.weight.detach())
        if self.root and self.session.hvp:
            self.session.root = e.requires_grad_()
        return e

    def sweep(self, _: Tensor) -> Tensor:
        w_t, k = self.session.direction(self.weight), self.session.k
        if w_t is None:
            return self.weight.new_zeros(k * self.ids.shape[0], *self.ids.shape[1:],
                                         self.weight.shape[1])  # fmt: skip
        e_t = torch.cat([F.embedding(self.ids, w, self.padding_idx) for w in w_t])
        sink = self.session.sink
        if sink is not None and e_t.requires_grad:
            e_t.register_hook(
                lambda g: sink.lookup(self.weight, self.ids, g.flatten(0, -2), self.padding_idx)
            )
        if self.padding_idx is not None:
            hidden = (self.ids == self.padding_idx)[..., None]
            e_t = e_t.masked_fill(hidden.repeat(k, *[1] * self.ids.ndim), 0.0)
        return e_t


class Pointwise(Op):
    """y = f(x, ...) entry by entry, all of one shape: holds f's slopes and g times its bends."""

    def __init__(self, session: Session, fn: Rows) -> None:
        super().__init__(session)
        self.fn = fn

    def record(self, *xs: Tensor) -> Tensor:
        still = [torch.cat([x, torch.zeros_like(x)]) for x in xs]
        self.inputs = tuple(x.detach() for x in xs)
        self.slopes = [self._along(i)[0] for i in range(len(xs))]
        if not self.session.hvp:
            self.inputs = ()
        return self.watched(self.fn(*still).chunk(2)[0])

    def _along(self, i: int, g: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """df / dx_i, and g d(df / dx_i) / dx_j for all j."""
        xs = self.inputs
        rows = [
            torch.cat([x, torch.full_like(x, float(i == j))]).requires_grad_(g is not None)
            for j, x in enumerate(xs)
        ]
        with torch.set_grad_enabled(g is not None):
            slope = self.fn(*rows).chunk(2)[1]
        if g is None:
            return slope, ()
        bends = torch.autograd.grad(slope, rows, g)
        return slope, tuple(b.chunk(2)[0] for b in bends)

    def seen(self, g: Tensor) -> None:
        self.bends = {
            (i, j): bend
            for i in range(len(self.inputs))
            for j, bend in enumerate(self._along(i, g)[1])
            if i <= j and bool(bend.any())
        }
        self.g, self.inputs = g.new_empty(0), ()

    def sweep(self, *x_ts: Tensor) -> Tensor:
        y_t: Tensor = _Pointwise.apply(self, *x_ts)
        return y_t

    def bent(self, x_ts: list[Tensor], out: list[Tensor]) -> list[Tensor]:
        """out_i += sum_j bend_ij x_j."""
        for (i, j), bend in self.bends.items():
            out[i] = torch.addcmul(out[i], bend, x_ts[j])
            if i != j:
                out[j] = torch.addcmul(out[j], bend, x_ts[i])
        return out


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Pointwise, *x_ts: Tensor) -> Tensor:
        xs = [op.session.split(x) for x in x_ts]
        y = xs[0] * op.slopes[0]
        for x, slope in zip(xs[1:], op.slopes[1:], strict=True):
            y = torch.addcmul(y, x, slope)
        second = op.session.hvp and op.g is not None and bool(op.bends)
        ctx.op, ctx.second = op, second
        ctx.save_for_backward(*(x_ts if second else ()))
        ctx.dtypes = [x.dtype for x in x_ts]
        if second and op.session.second is not None:
            turn = op.bent(xs, [torch.zeros_like(x) for x in xs])
            for x, t in zip(xs, turn, strict=True):
                op.session.add_second(x * t)
        return y.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = ctx.op
        gy = op.session.split(grads[0])
        out = [gy * slope for slope in op.slopes]
        if ctx.second:
            out = op.bent([op.session.split(x) for x in ctx.saved_tensors], out)
        return None, *(o.flatten(0, 1).to(d) for o, d in zip(out, ctx.dtypes, strict=True))


class Norm(Op):
    """y = w n + b, n = r (x - m): LayerNorm with `centred` (m the mean), else RMSNorm (m = 0).

    n_t = r P x_t and r_t = -r^2 <n x_t> with P x = x - n <n x> [- <x>], <.> the mean of a row.
    `lift`: Gemma's factor is 1 + w. All of it in float32 at least.
    """

    def __init__(
        self, session: Session, weight: Tensor, bias: Tensor | None, eps: float,
        centred: bool = False, lift: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(session)
        self.weight, self.bias, self.eps = weight, bias, eps
        self.centred, self.lift = centred, lift

    @property
    def w(self) -> Tensor:
        wide = self.weight.detach().to(self.wide)
        return wide + 1 if self.lift else wide

    def record(self, x: Tensor) -> Tensor:
        self.wide, self.dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
        xw, shape = x.to(self.wide), x.shape[-1:]
        with torch.no_grad():
            n = xw - _mean(xw) if self.centred else xw
            self.r = torch.rsqrt(_mean(n * n) + self.eps)
            self.n = (n * self.r).to(x.dtype)
        if self.centred:
            b = None if self.bias is None else self.bias.detach().to(self.wide)
            y = F.layer_norm(xw, shape, self.w, b, self.eps)
        else:
            y = F.rms_norm(xw, shape, self.w, self.eps)
        return self.watched(y.to(x.dtype))

    def project(self, x: Tensor) -> Tensor:
        out = x - self.n * _mean(self.n * x)
        return out - _mean(x) if self.centred else out

    def seen(self, g: Tensor) -> None:
        a = self.w * g
        self.c, self.u = _mean(self.n * a), self.project(a).to(self.dtype)
        self.g = g if self.session.learns(self.weight) else g.new_empty(0)

    def sweep(self, x_t: Tensor) -> Tensor:
        w_t, b_t = (self.session.direction(p) for p in (self.weight, self.bias))
        y_t: Tensor = _Norm.apply(self, x_t, w_t, b_t)
        return y_t

    def summed(self, p: Tensor, parts: Tensor) -> Tensor | None:
        """[K, d], unless a sink takes the parts."""
        if self.session.sink is None:
            return parts.flatten(1, -2).sum(1).to(p.dtype)
        self.session.sink.rows(p, parts.flatten(0, -2))
        return None

    def bent(self, x: Tensor) -> Tensor:
        """g on the second derivative in x, times x: [K, R, ..., d]."""
        turn = _mean(self.n * x) * self.u + self.c * self.project(x) + self.n * _mean(x * self.u)
        return turn * -(self.r**2)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Norm, x_t: Tensor, w_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        x = op.session.split(x_t).to(op.wide)
        unit = op.project(x) * op.r
        y = unit * op.w
        if w_t is not None:
            y = torch.addcmul(y, op.n, _row(w_t, x))
        if b_t is not None:
            y = y + _row(b_t, x)
        ctx.op, ctx.second = op, op.session.hvp and op.g is not None
        ctx.save_for_backward(*((x_t, w_t) if ctx.second else ()))
        if ctx.second and op.session.second is not None:
            op.session.add_second(x * op.bent(x))
            if w_t is not None:
                op.session.add_second(2 * unit * _row(w_t, x) * op.g)
        return y.to(op.dtype).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = ctx.op
        gy = op.session.split(grads[0]).to(op.wide)
        x_t, w_t = ctx.saved_tensors if ctx.second else (None, None)
        x = None if x_t is None else op.session.split(x_t).to(op.wide)
        gx = gw = gb = None
        if ctx.needs_input_grad[1]:
            a = gy * op.w
            if w_t is not None:
                a = torch.addcmul(a, op.g, _row(w_t, a))
            out = op.project(a) * op.r
            gx = (out if x is None else out + op.bent(x)).to(op.dtype).flatten(0, 1)
        if ctx.needs_input_grad[2]:
            full = gy * op.n
            if x is not None:
                full = full + op.g * (op.project(x) * op.r)
            gw = op.summed(op.weight, full)
        if ctx.needs_input_grad[3]:
            gb = op.summed(op.bias, gy)
        return None, gx, gw, gb


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _row(w: Tensor, like: Tensor) -> Tensor:
    """[K, d] against [K, R, ..., d]."""
    return w.to(like.dtype).view(w.shape[0], *[1] * (like.ndim - 2), w.shape[1])


class Stacked(Op):
    """A dual op without weights, once per direction on its own rows [x; x_t]."""

    def __init__(self, session: Session, fn: Rows) -> None:
        super().__init__(session)
        self.fn = fn

    def record(self, *xs: Tensor) -> Tensor:
        self.inputs = tuple(x.detach() for x in xs)
        still = [torch.cat([x, torch.zeros_like(x)]) for x in xs]
        return self.watched(self.fn(*still).chunk(2)[0])

    def seen(self, g: Tensor) -> None:
        self.g = g

    def sweep(self, *x_ts: Tensor) -> Tensor:
        y_t: Tensor = _Stacked.apply(self, *x_ts)
        return y_t

    def pull(self, rows: list[Tensor], y: Tensor, gy: Tensor) -> list[Tensor]:
        """Gradients at the primal halves, for the cotangents gy and g of y's halves."""
        g = torch.zeros_like(gy) if self.g is None or not self.session.hvp else self.g
        found = torch.autograd.grad(y, rows, torch.cat([gy, g]))
        return [f.chunk(2)[0] for f in found]


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Stacked, *x_ts: Tensor) -> Tensor:
        session = op.session
        xs = [session.split(x) for x in x_ts]
        ctx.op, ctx.kept = op, []
        outs, tracked = [], any(ctx.needs_input_grad) or session.second is not None
        for k in range(session.k):
            pairs = zip(op.inputs, xs, strict=True)
            rows = [torch.cat([x, t[k]]).requires_grad_(tracked) for x, t in pairs]
            with torch.set_grad_enabled(tracked):
                y = op.fn(*rows)
            ctx.kept.append((rows, y))
            outs.append(y.detach().chunk(2)[1])
            if session.second is not None and session.hvp and op.g is not None:
                bent = op.pull(rows, y, torch.zeros_like(outs[-1]))
                for b, t in zip(bent, xs, strict=True):
                    part = (b * t[k]).reshape(session.rows, -1).sum(-1)
                    session.second[k] += part
        return torch.cat(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op = ctx.op
        gy = op.session.split(grads[0])
        parts = [op.pull(*kept, gy[k]) for k, kept in enumerate(ctx.kept)]
        ctx.kept = []
        return None, *(torch.cat(p) for p in zip(*parts, strict=True))
