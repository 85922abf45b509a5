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

from typing import Any

import torch
from torch import Tensor

from u2a_kernels._dual import halves
from u2a_kernels.compat.rule import Lifted, Rule, chosen, keep, present, spread, stacked, third


def lift(rule: Rule, *xs: Tensor, options: tuple[Any, ...] = ()) -> Tensor:
    """The rule's function of xs, right to second order."""
    if torch.compiler.is_compiling():
        return _compiled(rule, xs, options)
    return Forward.apply(rule, options, *xs)


def _compiled(rule: Rule, xs: tuple[Tensor, ...], options: tuple[Any, ...]) -> Tensor:
    """A compiled region is differentiated once: its own double backward raises. Under a transform
    inside of it torch would drop a custom tangent without a word."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            f"{rule.name}: torch.compile over torch.func is not supported, it loses custom "
            "tangents; compile the function that is transformed, not the transform"
        )
    return rule.plain(*xs, *options)


class Forward(Lifted):
    @staticmethod
    def forward(rule: Rule, options: tuple[Any, ...], *xs: Tensor) -> Tensor:
        return rule.plain(*(x.detach() for x in xs), *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, *xs = inputs
        keep(ctx, xs)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        xs = ctx.saved_tensors
        need = chosen(ctx.needs_input_grad[2:])
        if g is None or not need:
            return (None,) * (2 + len(xs))
        got = Gradient.apply(ctx.rule, ctx.options, need, g, *xs)
        return None, None, *spread(got, need, len(xs))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *ts: Tensor | None) -> Tensor:
        given = present(ts)
        return Tangent.apply(
            ctx.rule, ctx.options, given, *ctx.saved_tensors, *(ts[i] for i in given)
        )

    @staticmethod
    def layout(rule: Rule, options: Any) -> tuple[str, str]:
        return rule.kinds, "r"

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return Forward.batched(info, in_dims, args, 2)


class Gradient(Lifted):
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
        keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cs: Tensor | None) -> Any:
        g, *xs = ctx.saved_tensors
        _, _, _, want, *needs = ctx.needs_input_grad
        need, got = chosen(needs), present(cs)
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
        return None, None, None, first, *spread(rest, need, len(xs))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, g_t: Tensor | None, *ts: Tensor | None) -> Any:
        g, *xs = ctx.saved_tensors
        given = present(ts)
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


class Tangent(Lifted):
    """J(x) x_t; directions of the inputs in `given`."""

    @staticmethod
    def forward(rule: Rule, options: Any, given: Any, *tensors: Tensor) -> Tensor:
        n = len(rule.kinds)
        directions = spread(tensors[n:], given, n)
        y, _ = stacked(rule, options, tensors[:n], directions, (), "jvp")
        return halves(y)[1].clone()  # without its primal half

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, ctx.given, *tensors = inputs
        keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        rule, n = ctx.rule, len(ctx.rule.kinds)
        needs = ctx.needs_input_grad[3:]
        if g is None:
            return (None,) * (3 + len(needs))
        xs, ts = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        at, at_t = chosen(needs[:n]), chosen(needs[n:])
        dx: list[Any] = [None] * n
        dt: list[Any] = [None] * len(ts)
        if at:
            fixed = rule, ctx.options, at, ctx.given, False, False
            dx = spread(Second.apply(*fixed, g, *xs, *ts), at, n)
        if at_t:
            need = tuple(ctx.given[i] for i in at_t)
            dt = spread(Gradient.apply(rule, ctx.options, need, g, *xs), at_t, len(ts))
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


class Second(Lifted):
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
            y, leaves = stacked(rule, options, rest[:n], spread(rest[n:], given, n), need, "hvp")
        cotangent = torch.cat([g_t, g]).detach()
        grads = torch.autograd.grad(y, [leaves[i] for i in need], cotangent)
        first = (halves(y.detach())[1],) if want else ()
        return *first, *(
            halves(x)[0] if rule.kinds[i] == "r" else x for i, x in zip(need, grads, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rule, ctx.options, _, ctx.given, ctx.want, ctx.pushed, *tensors = inputs
        keep(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cs: Tensor | None) -> Any:
        """J(x) x_t alone is still of first order: its gradient is Tangent's."""
        if not ctx.want or any(c is not None for c in cs[1:]):
            raise third(ctx.rule)
        skip, n = 2 if ctx.pushed else 1, len(ctx.rule.kinds)
        nothing = (None,) * (6 + skip)
        if cs[0] is None:
            return *nothing, *[None] * (n + len(ctx.given))
        tensors = ctx.saved_tensors[skip:]
        needs = ctx.needs_input_grad[6 + skip :]
        at, at_t = chosen(needs[:n]), chosen(needs[n:])
        fixed = ctx.rule, ctx.options
        dx: list[Any] = [None] * n
        if at:
            got = Second.apply(*fixed, at, ctx.given, False, False, cs[0], *tensors)
            dx = spread(got, at, n)
        dt: list[Any] = [None] * len(ctx.given)
        if at_t:
            need = tuple(ctx.given[i] for i in at_t)
            got = Gradient.apply(*fixed, need, cs[0], *tensors[:n])
            dt = spread(got, at_t, len(dt))
        return *nothing, *dx, *dt

    @staticmethod
    def jvp(ctx: Any, *ts: Any) -> Any:
        raise third(ctx.rule)

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
