"""From one dual op to a function that is right at second order, however it is reached.

For y = F(x), D([x; x_t]) = [F(x); J(x) x_t] with a first-order backward is enough:

    Forward   F(x)           backward: Gradient        jvp: Tangent
    Gradient  J(x)^T g       backward: Second along c  jvp: Second along (x_t, g_t)
    Tangent   J(x) x_t       backward: Second, Gradient
    Second    the gradient of <g_t, F(x)> + <g, J(x) x_t> in x: the primal slot of D's backward with
              cotangent [g_t; g]; beside it J(x) x_t, which D's forward has made anyway.

Gradient along c: d<c, J^T g> is J(x) c in g, and in x what Second gives with g_t = 0. Only x, g and
directions are saved. What would be third order, and forward over forward, raises by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from u2a_kernels._dual import halves

Plain = Callable[..., Tensor]
Dual = Callable[[list[Tensor], list[Tensor | None], tuple[Any, ...], str], Tensor]


@dataclass(frozen=True)
class Rule:
    """A function of tensors: plain(*xs, *options) is differentiable once, dual(xs, ts, options,
    mode) takes stacked rows and returns stacked rows; ts are the directions of parameters.

    `kinds` has one letter an input: r, rows in the first dimension, independent of each other;
    p, a parameter that all rows share; c, constant rows without a derivative.
    """

    name: str
    kinds: str
    plain: Plain
    dual: Dual

    def lift(self, *xs: Tensor, options: tuple[Any, ...] = ()) -> Tensor:
        if torch.compiler.is_compiling():
            return self._compiled(xs, options)
        return Forward.apply(self, options, *xs)

    def _compiled(self, xs: tuple[Tensor, ...], options: tuple[Any, ...]) -> Tensor:
        """A compiled region is differentiated once: its own double backward raises. Under a
        transform inside of it torch would drop a custom tangent without a word."""
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(
                f"{self.name}: torch.compile over torch.func is not supported, it loses custom "
                "tangents; compile the function that is transformed, not the transform"
            )
        return self.plain(*xs, *options)


def _third(rule: Rule) -> RuntimeError:
    return RuntimeError(
        f"{rule.name}: this is right to second order; a third derivative is not defined through it"
    )


def _chosen(flags: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, flag in enumerate(flags) if flag)


def _given(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tensors) if t is not None)


def _spread(values: Sequence[Tensor], at: Sequence[int], n: int) -> list[Tensor | None]:
    out: list[Tensor | None] = [None] * n
    for i, value in zip(at, values, strict=True):
        out[i] = value
    return out


def _keep(ctx: Any, tensors: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _dual(
    rule: Rule,
    options: tuple[Any, ...],
    xs: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    need: Sequence[int],
    mode: str,
) -> tuple[Tensor, list[Tensor]]:
    """The stacked result, and its leaves: stacked rows and parameters."""
    leaves, ts = [], []
    for i, (kind, x, t) in enumerate(zip(rule.kinds, xs, directions, strict=True)):
        x = x.detach()
        if kind == "r":
            leaf = torch.cat([x, torch.zeros_like(x) if t is None else t.detach()])
        else:
            leaf = x
        leaves.append(leaf.requires_grad_() if i in need else leaf)
        ts.append(t.detach() if kind == "p" and t is not None else None)
    return rule.dual(leaves, ts, options, mode), leaves


class _Lifted(Function):
    """vmap for all: rows join the batch; with parameters of their own, samples go one by one."""

    @staticmethod
    def layout(*fixed: Any) -> tuple[str, str]:
        """Kinds of the tensor arguments and of the results."""
        raise NotImplementedError

    @classmethod
    def batched(cls, info: Any, in_dims: Any, args: Sequence[Any], fixed: int) -> tuple[Any, Any]:
        ins, outs = cls.layout(*args[:fixed])
        front = [
            t if d is None else t.movedim(d, 0)
            for t, d in zip(args[fixed:], in_dims[fixed:], strict=True)
        ]
        own = [d is not None for d in in_dims[fixed:]]
        n = info.batch_size
        if "p" in outs or any(o and kind == "p" for o, kind in zip(own, ins, strict=True)):
            rows = [
                cls.apply(*args[:fixed], *(t[i] if o else t for t, o in zip(front, own)))  # noqa: B905
                for i in range(n)
            ]
            if isinstance(rows[0], Tensor):
                return torch.stack(rows), 0
            out = tuple(torch.stack(part) for part in zip(*rows, strict=True))
            return out, (0,) * len(out)
        size = next(t.shape[o] for t, o, k in zip(front, own, ins, strict=True) if k != "p")
        folded = [
            t if k == "p" else (t if o else t.expand(n, *t.shape)).flatten(0, 1)
            for t, o, k in zip(front, own, ins, strict=True)
        ]
        got = cls.apply(*args[:fixed], *folded)
        if isinstance(got, Tensor):
            return got.unflatten(0, (n, size)), 0
        return tuple(t.unflatten(0, (n, size)) for t in got), (0,) * len(got)


class Forward(_Lifted):
    @staticmethod
    def forward(rule: Rule, options: tuple[Any, ...], *xs: Tensor) -> Tensor:
        return rule.plain(*(x.detach() for x in xs), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, *xs = inputs
        _keep(ctx, xs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        xs = ctx.saved_tensors
        need = _chosen(ctx.needs_input_grad[2:])
        if g is None or not need:
            return (None,) * (2 + len(xs))
        got = Gradient.apply(ctx.rule, ctx.options, need, g, *xs)
        return None, None, *_spread(got, need, len(xs))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *ts: Tensor | None) -> Tensor:
        given = _given(ts)
        return Tangent.apply(
            ctx.rule, ctx.options, given, *ctx.saved_tensors, *(ts[i] for i in given)
        )

    @staticmethod
    def layout(rule: Rule, options: Any) -> tuple[str, str]:
        return rule.kinds, "r"

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return Forward.batched(info, in_dims, args, 2)


class Gradient(_Lifted):
    """One gradient for each input in `need`."""

    @staticmethod
    def forward(rule: Rule, options: Any, need: Any, g: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(i in need) for i, x in enumerate(xs)]
        with torch.enable_grad():
            y = rule.plain(*leaves, *options)
        return torch.autograd.grad(y, [leaves[i] for i in need], g.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, ctx.need, *tensors = inputs
        _keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cs: Tensor | None) -> Any:
        g, *xs = ctx.saved_tensors
        _, _, _, want, *needs = ctx.needs_input_grad
        need, got = _chosen(needs), _given(cs)
        given, c = tuple(ctx.need[i] for i in got), [cs[i] for i in got]
        if not given or not (want or need):
            return (None,) * (4 + len(xs))
        if not need:
            dg = Tangent.apply(ctx.rule, ctx.options, given, *xs, *c)
            return None, None, None, dg, *[None] * len(xs)
        fixed = ctx.rule, ctx.options, need, given, want, False
        first, *rest = Second.apply(*fixed, g, *xs, *c)
        if not want:
            first, rest = None, [first, *rest]
        return None, None, None, first, *_spread(rest, need, len(xs))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, g_t: Tensor | None, *ts: Tensor | None) -> Any:
        g, *xs = ctx.saved_tensors
        given = _given(ts)
        if not given:
            return Gradient.apply(ctx.rule, ctx.options, ctx.need, g_t, *xs)
        fixed = ctx.rule, ctx.options, ctx.need, given, False, g_t is not None
        cotangents = (g,) if g_t is None else (g, g_t)
        return Second.apply(*fixed, *cotangents, *xs, *(ts[i] for i in given))

    @staticmethod
    def layout(rule: Rule, options: Any, need: Any) -> tuple[str, str]:
        return "r" + rule.kinds, "".join(rule.kinds[i] for i in need)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return Gradient.batched(info, in_dims, args, 3)


class Tangent(_Lifted):
    """J(x) x_t; directions of the inputs in `given`."""

    @staticmethod
    def forward(rule: Rule, options: Any, given: Any, *tensors: Tensor) -> Tensor:
        n = len(rule.kinds)
        directions = _spread(tensors[n:], given, n)
        y, _ = _dual(rule, options, tensors[:n], directions, (), "jvp")
        return halves(y)[1].clone()  # without its primal half

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, ctx.given, *tensors = inputs
        _keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        rule, n = ctx.rule, len(ctx.rule.kinds)
        needs = ctx.needs_input_grad[3:]
        if g is None:
            return (None,) * (3 + len(needs))
        xs, ts = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        at, at_t = _chosen(needs[:n]), _chosen(needs[n:])
        dx: list[Any] = [None] * n
        dt: list[Any] = [None] * len(ts)
        if at:
            fixed = rule, ctx.options, at, ctx.given, False, False
            dx = _spread(Second.apply(*fixed, g, *xs, *ts), at, n)
        if at_t:
            need = tuple(ctx.given[i] for i in at_t)
            dt = _spread(Gradient.apply(rule, ctx.options, need, g, *xs), at_t, len(ts))
        return None, None, None, *dx, *dt

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:
        raise RuntimeError(
            f"{ctx.rule.name}: forward mode over forward mode is not defined through it; take the "
            "gradient first: jvp of grad, or jacfwd of jacrev"
        )

    @staticmethod
    def layout(rule: Rule, options: Any, given: Any) -> tuple[str, str]:
        return rule.kinds + "".join(rule.kinds[i] for i in given), "r"

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return Tangent.batched(info, in_dims, args, 3)


class Second(_Lifted):
    """J(x) x_t if `want`, then the gradient for each input in `need`; tensors are g, g_t if
    `pushed`, xs, and the directions of the inputs in `given`."""

    @staticmethod
    def forward(
        rule: Rule, options: Any, need: Any, given: Any, want: bool, pushed: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        g, *rest = tensors
        g_t = rest.pop(0) if pushed else torch.zeros_like(g)
        n = len(rule.kinds)
        with torch.enable_grad():
            y, leaves = _dual(rule, options, rest[:n], _spread(rest[n:], given, n), need, "hvp")
        cotangent = torch.cat([g_t, g]).detach()
        grads = torch.autograd.grad(y, [leaves[i] for i in need], cotangent)
        first = (halves(y.detach())[1],) if want else ()
        return *first, *(
            halves(x)[0] if rule.kinds[i] == "r" else x for i, x in zip(need, grads, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, _, ctx.given, ctx.want, ctx.pushed, *tensors = inputs
        _keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cs: Tensor | None) -> Any:
        """J(x) x_t alone is still of first order: its gradient is Tangent's."""
        if not ctx.want or any(c is not None for c in cs[1:]):
            raise _third(ctx.rule)
        skip, n = 2 if ctx.pushed else 1, len(ctx.rule.kinds)
        nothing = (None,) * (6 + skip)
        if cs[0] is None:
            return *nothing, *[None] * (n + len(ctx.given))
        tensors = ctx.saved_tensors[skip:]
        needs = ctx.needs_input_grad[6 + skip :]
        at, at_t = _chosen(needs[:n]), _chosen(needs[n:])
        fixed = ctx.rule, ctx.options
        dx: list[Any] = [None] * n
        if at:
            got = Second.apply(*fixed, at, ctx.given, False, False, cs[0], *tensors)
            dx = _spread(got, at, n)
        dt: list[Any] = [None] * len(ctx.given)
        if at_t:
            need = tuple(ctx.given[i] for i in at_t)
            got = Gradient.apply(*fixed, need, cs[0], *tensors[:n])
            dt = _spread(got, at_t, len(dt))
        return *nothing, *dx, *dt

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:
        raise _third(ctx.rule)

    @staticmethod
    def layout(
        rule: Rule, options: Any, need: Any, given: Any, want: bool, pushed: bool
    ) -> tuple[str, str]:
        ins = "rr" if pushed else "r"
        ins += rule.kinds + "".join(rule.kinds[i] for i in given)
        return ins, ("r" if want else "") + "".join(rule.kinds[i] for i in need)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return Second.batched(info, in_dims, args, 6)
