"""The linear system that a solve works on: [k, p] vectors, counted products, options, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from u2a.curvature.base import Operator, undamped
from u2a.errors import GuardError
from u2a.tree import Tree, flatten, unflatten

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class State:
    """Where an iteration stands. `tensors` and `method` are all of it, ready for safetensors."""

    method: str
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): t
            for name, t in self.tensors.items()
            if name.startswith(prefix)
        }


@dataclass(frozen=True)
class Options:
    """How an iteration runs: `stop [k]` residual norms, products at most, preconditioner."""

    stop: Tensor
    max_iter: int
    raises: bool
    precond: Rows | None = None
    step: float | None = None


@dataclass
class Found:
    """What a method found: `x [k, p]`, iterations and extreme curvatures of every column."""

    x: Tensor
    iterations: list[int]
    low: list[float]
    high: list[float]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class System:
    """(A + lam I) x = b on rows of `[k, p]`. `lam` is a number, or `[p]` for "datainf"."""

    def __init__(self, operator: Operator | None, like: Mapping[str, Tensor]) -> None:
        self.operator, self.own = undamped(operator)
        self.like = dict(like)
        self.vector = flatten(self.like)
        self.lam: float | Tensor = 0.0
        self.products = 0

    @property
    def base(self) -> Any:
        assert self.operator is not None
        return self.operator

    @property
    def stochastic(self) -> bool:
        return bool(getattr(self.operator, "stochastic", False))

    @property
    def definite(self) -> bool:
        return bool(getattr(self.operator, "definite", True))

    def flat(self, tree: Mapping[str, Tensor]) -> Tensor:
        """A tree as a vector, its names checked and put in order."""
        if tree.keys() != self.like.keys():
            names = sorted(tree.keys() ^ self.like.keys())[:3]
            raise ValueError(
                f"solve: operator and right-hand side differ in parameters, e.g. {names}"
            )
        return flatten({name: tree[name] for name in self.like}).to(self.vector)

    def tree(self, vector: Tensor) -> Tree:
        return unflatten(vector, self.like)

    def product(self, x: Tensor) -> Tensor:
        """A x for every row of `[k, p]`, without damping."""
        if self.operator is None:
            return torch.zeros_like(x)
        self.products += len(x)
        trees = [self.tree(row) for row in x]
        many = getattr(self.operator, "matmat", None)
        found = many(trees) if many else [self.operator.matvec(tree) for tree in trees]
        return torch.stack([self.flat(tree) for tree in found])

    def apply(self, x: Tensor) -> Tensor:
        """(A + lam I) x for every row."""
        return self.product(x) + self.lam * x


def negative(curvature: float, raises: bool) -> None:
    if raises:
        raise GuardError(
            f"solve: negative curvature {curvature:.3e} along a search direction, the system is "
            f"not positive definite. Raise the damping by more than {-curvature:.3e}, use "
            "damping='auto', on_negative='damp', method 'minres' or GaussNewton"
        )


def rayleigh(d: Tensor, product: Tensor) -> list[float]:
    """d.Ad / d.d of every row. Raises GuardError when one is not finite."""
    values: list[float] = ((d * product).sum(1) / (d * d).sum(1)).tolist()
    if not all(map(math.isfinite, values)):
        raise GuardError("solve: a curvature product holds non-finite values")
    return values


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def each_column(
    run: Callable[[Tensor, float, dict[str, Tensor] | None], tuple[Found, dict[str, Tensor]]],
    b: Tensor,
    stop: Tensor,
    state: State | None,
) -> Found:
    """A method for one vector, applied to every row of b."""
    found: list[Found] = []
    tensors: dict[str, Tensor] = {}
    for j, row in enumerate(b):
        one, own = run(row, float(stop[j]), state.part(f"{j}.") if state else None)
        found.append(one)
        tensors |= {f"{j}.{name}": t for name, t in own.items()}
    return Found(
        torch.cat([f.x for f in found]),
        [f.iterations[0] for f in found],
        [f.low[0] for f in found],
        [f.high[0] for f in found],
        tensors,
    )
