"""Ways to a Hessian or Gauss-Newton product or to scores, each as its users would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from _second_order import Problem, Setting, checkpointed, nll
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from u2a.linearize import linearize
from u2a.products import ggnvp, gradient, hvp, jvp_scores
from u2a.tree import Tree

Result = Tree | Tensor
Call = Callable[[], Result]


@dataclass(frozen=True)
class Way:
    """`make(setting)` prepares; `make(setting)()` computes what `of` names."""

    name: str
    of: str  # "gradient", "hvp", "ggn" or "scores"
    make: Callable[[Setting], Call]
    needs: str | None = None  # a package that may be absent

    @property
    def missing(self) -> bool:
        return self.needs is not None and find_spec(self.needs) is None


def _problem(s: Setting, attention: str = "sdpa", checkpoint: bool = False) -> Problem:
    p = Problem.of(s, attention)
    if checkpoint:
        checkpointed(p.model)
    return p


def _ours(product: Callable[..., Result], checkpoint: bool = False) -> Callable[[Setting], Call]:
    def make(s: Setting) -> Call:
        p = _problem(s, checkpoint=checkpoint)
        extra = () if product is gradient else (p.v,)
        return lambda: product(p.model, p.batch, nll, *extra)

    return make


def _held(mode: Any) -> Callable[[Setting], Call]:
    def make(s: Setting) -> Call:
        p = _problem(s)
        made = linearize(p.model, p.batch, nll, mode=mode)
        return lambda: made.matvec(p.v)

    return make


def _gradient(checkpoint: bool = False) -> Callable[[Setting], Call]:
    return lambda s: _problem(s, checkpoint=checkpoint).gradient


def _central(s: Setting) -> Call:
    p = _problem(s)
    return lambda: p.central(1e-3)


def _twice(attention: str, checkpoint: bool = False) -> Callable[[Setting], Call]:
    """Double backward."""

    def make(s: Setting) -> Call:
        p = _problem(s, attention.split()[0], checkpoint)

        def call() -> Tree:
            leaves = list(p.params.values())
            first = torch.autograd.grad(p.loss(), leaves, create_graph=True)
            return p.named(torch.autograd.grad(first, leaves, list(p.v.values())))

        def math() -> Tree:
            with sdpa_kernel(SDPBackend.MATH):
                return call()

        return math if attention.endswith("MATH") else call

    return make


def _forward_over_reverse(s: Setting) -> Call:
    p = _problem(s, "eager")
    point = {n: t.detach() for n, t in p.params.items()}
    return lambda: jvp(grad(p.loss), (point,), (p.v,))[1]


class _Logits(nn.Module):
    """Ids to the logits of predicting positions, as operators on a loss of logits want them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def _curvlinops(name: str) -> Callable[[Setting], Call]:
    def make(s: Setting) -> Call:
        import curvlinops

        p = _problem(s, "eager")
        data = [(p.ids, p.ids[:, 1:].flatten())]
        operator = getattr(curvlinops, name)(
            _Logits(p.model), nn.CrossEntropyLoss(), list(p.params.values()), data,
            check_deterministic=False, num_data=len(data[0][1]),
            batch_size_fn=lambda ids: ids.shape[0] * (ids.shape[1] - 1),
        )  # fmt: skip
        return lambda: p.named(operator @ list(p.v.values()))

    return make


def _forward(s: Setting) -> Call:
    """Forward mode through the whole model."""
    p = _problem(s, "eager")
    point = {n: t.detach() for n, t in p.params.items()}

    @torch.no_grad()
    def call() -> Tensor:
        return jvp(p.losses, (point,), (p.v,))[1]

    return call


def _row_by_row(s: Setting) -> Call:
    """A gradient for each example."""
    p = _problem(s)
    leaves = list(p.params.values())

    def one(ids: Tensor) -> Tensor:
        grads = torch.autograd.grad(p.losses(ids=ids).sum(), leaves)
        return sum((g * t).sum() for g, t in zip(grads, p.v.values(), strict=True))

    return lambda: torch.stack([one(ids) for ids in p.ids.split(1)])


def _vmapped(s: Setting) -> Call:
    """vmap of the gradient: all per-example gradients at once."""
    p = _problem(s, "eager")
    point = {n: t.detach() for n, t in p.params.items()}
    each = vmap(grad(lambda leaves, ids: p.losses(leaves, ids[None]).sum()), (None, 0))

    def call() -> Tensor:
        found = each(point, p.ids)
        return sum((found[n].flatten(1) @ t.flatten()) for n, t in p.v.items())

    return call


WAYS = [
    Way("gradient, SDPA, full logits (the unit)", "gradient", _gradient()),
    Way("gradient, SDPA, checkpointing", "gradient", _gradient(checkpoint=True)),
    Way("u2a.gradient", "gradient", _ours(gradient)),
    Way("u2a.hvp", "hvp", _ours(hvp)),
    Way("u2a.hvp, checkpointing", "hvp", _ours(hvp, checkpoint=True)),
    Way("u2a.linearize hvp", "hvp", _held("hvp")),
    Way("double backward, eager", "hvp", _twice("eager")),
    Way("double backward, SDPA", "hvp", _twice("sdpa")),
    Way("double backward, SDPA MATH", "hvp", _twice("sdpa MATH")),
    Way("double backward, eager, checkpointing", "hvp", _twice("eager", checkpoint=True)),
    Way("torch.func jvp of grad, eager", "hvp", _forward_over_reverse),
    Way("curvlinops Hessian, eager", "hvp", _curvlinops("HessianLinearOperator"), "curvlinops"),
    Way("central differences, SDPA", "hvp", _central),
    Way("u2a.ggnvp", "ggn", _ours(ggnvp)),
    Way("u2a.ggnvp, checkpointing", "ggn", _ours(ggnvp, checkpoint=True)),
    Way("u2a.linearize ggn", "ggn", _held("ggn")),
    Way("curvlinops GGN, eager", "ggn", _curvlinops("GGNLinearOperator"), "curvlinops"),
    Way("u2a.jvp_scores", "scores", _ours(jvp_scores)),
    Way("torch.func jvp, eager", "scores", _forward),
    Way("a gradient per example, SDPA", "scores", _row_by_row),
    Way("vmap of grad, eager", "scores", _vmapped),
]


@lru_cache(1)
def unit(s: Setting) -> Call:
    """One gradient of all trainable parameters by fused attention: what everything is told in. Has
    run once."""
    call = _gradient()(s)
    call()
    return call
