"""What is lifted, and what the lifted functions share: stacked rows, saving, vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

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


def third(rule: Rule) -> RuntimeError:
    return RuntimeError(
        f"{rule.name}: this is right to second order; a third derivative is not defined through it"
    )


def chosen(flags: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, flag in enumerate(flags) if flag)


def present(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(i for i, t in enumerate(tensors) if t is not None)


def spread(values: Sequence[Tensor], at: Sequence[int], n: int) -> list[Tensor | None]:
    out: list[Tensor | None] = [None] * n
    for i, value in zip(at, values, strict=True):
        out[i] = value
    return out


def keep(ctx: Any, tensors: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def stacked(
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


class Lifted(Function):
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
