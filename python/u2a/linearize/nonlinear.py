"""Activations, products, norms, and dual ops as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.linearize.session import Op, Session

Rows = Callable[..., Tensor]  # a function of dual rows [x; x_t]


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
            if w_t is not None and op.g is not None:
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
