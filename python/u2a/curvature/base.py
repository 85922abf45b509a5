"""What every curvature operator answers, and the ways to combine operators.

An operator belongs to the parameters' present values; after an update make a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from u2a.tree import (
    Tree,
    add_,
    cast_like,
    dot,
    flatten,
    numel,
    scaled,
    signs_like,
    sums_like,
    unflatten,
)


class Operator(Protocol):
    """A symmetric linear map on {parameter name: tensor}: all that `u2a.solve` asks for."""

    def matvec(self, v: Tree) -> Tree: ...

    def mean_eigenvalue(self) -> float:
        """trace / number of parameters."""
        ...

    def diagonal(self) -> Tree: ...


class Curvature:
    """A symmetric p x p matrix that is known by its products with parameter trees.

    A subclass gives `like` (a tree with the names, shapes, dtypes and devices of the parameters)
    and `matvec`. `definite`: positive semidefinite by construction. `stochastic`: every product is
    that of another sample.

    `mean_eigenvalue` and `diagonal` are Hutchinson and Bekas estimates from `probes` Rademacher
    vectors z of a fixed `seed`: the means of z.Az / p and of z * Az. Variance: for the trace
    2 sum_{i != j} A_ij^2 / probes, for entry i of the diagonal sum_{j != i} A_ij^2 / probes.
    Operators that know their diagonal say probes = 0.
    """

    definite: bool = True
    stochastic: bool = False
    probes: int = 16
    seed: int = 0

    @property
    def like(self) -> Mapping[str, Tensor]:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        p = numel(self.like)
        return p, p

    def matvec(self, v: Tree) -> Tree:
        """A v, a tree like v."""
        raise NotImplementedError

    def matmat(self, vs: Sequence[Tree]) -> list[Tree]:
        """A v for several v; together where an operator has a cheaper way."""
        return [self.matvec(v) for v in vs]

    def quadratic(self, v: Tree) -> float:
        """v^T A v."""
        return dot(v, self.matvec(v)).item()

    def _signs(self) -> list[Tree]:
        generator = torch.Generator().manual_seed(self.seed)
        return [signs_like(self.like, generator) for _ in range(self.probes)]

    def mean_eigenvalue(self) -> float:
        return sum(self.quadratic(z) for z in self._signs()) / (self.probes * self.shape[0])

    def diagonal(self) -> Tree:
        total = sums_like(self.like, self.probes)
        for z in self._signs():
            product = self.matvec(z)
            add_(total, {name: z[name] * t for name, t in product.items()}, 1 / self.probes)
        total = cast_like(total, self.like)
        if self.definite:
            return {name: t.clamp_min(0) for name, t in total.items()}
        return total


class Sum(Curvature):
    """sum_j coef_j A_j, e.g. ``Sum([(1.0, Hessian(...)), (mu, GaussNewton(...))])``."""

    def __init__(self, terms: Sequence[tuple[float, Operator]]) -> None:
        if not terms:
            raise ValueError("Sum: terms must hold at least one (coefficient, operator), got none")
        self.terms = list(terms)
        operators = [op for _, op in self.terms]
        self.definite = all(c >= 0 and getattr(op, "definite", False) for c, op in self.terms)
        self.stochastic = any(getattr(op, "stochastic", False) for op in operators)
        self.probes = sum(getattr(op, "probes", 0) for op in operators)

    @property
    def like(self) -> Mapping[str, Tensor]:
        first: Any = self.terms[0][1]
        found: Mapping[str, Tensor] = first.like
        return found

    def _sum(self, parts: Sequence[Mapping[str, Tensor]]) -> Tree:
        total = scaled(parts[0], self.terms[0][0])
        for (coef, _), part in zip(self.terms[1:], parts[1:], strict=True):
            add_(total, part, coef)
        return total

    def matvec(self, v: Tree) -> Tree:
        return self._sum([op.matvec(v) for _, op in self.terms])

    def mean_eigenvalue(self) -> float:
        return sum(coef * op.mean_eigenvalue() for coef, op in self.terms)

    def diagonal(self) -> Tree:
        return self._sum([op.diagonal() for _, op in self.terms])

    def roots(self) -> Tensor:
        """S `[n, p]` with S^T S = this, of terms that have one; see `Features.roots`."""
        parts: list[Tensor] = []
        for coef, op in self.terms:
            if coef < 0 or not hasattr(op, "roots"):
                raise ValueError(
                    "Sum: stored features need terms with features and coefficients of at least "
                    f"0, got {coef:g} x {type(op).__name__}"
                )
            parts.append(op.roots() * coef**0.5)
        return torch.cat(parts)


class Damped(Curvature):
    """A + damping I. `u2a.solve` adds its own damping to it."""

    def __init__(self, operator: Operator, damping: float) -> None:
        if not (damping >= 0 and damping < float("inf")):
            raise ValueError(f"Damped: damping must be finite and at least 0, got {damping}")
        self.operator, self.damping = operator, float(damping)
        self.definite = getattr(operator, "definite", False)
        self.stochastic = getattr(operator, "stochastic", False)

    @property
    def like(self) -> Mapping[str, Tensor]:
        inner: Any = self.operator
        found: Mapping[str, Tensor] = inner.like
        return found

    def matvec(self, v: Tree) -> Tree:
        return add_(self.operator.matvec(v), v, self.damping)

    def mean_eigenvalue(self) -> float:
        return self.operator.mean_eigenvalue() + self.damping

    def diagonal(self) -> Tree:
        return {name: t + self.damping for name, t in self.operator.diagonal().items()}


def undamped(operator: Operator | None) -> tuple[Operator | None, float]:
    """The operator inside all `Damped`, and the sum of their dampings."""
    own = 0.0
    while isinstance(operator, Damped):
        own += operator.damping
        operator = operator.operator
    return operator, own


def dense(operator: Any) -> Tensor:
    """The matrix `[p, p]`, by p products, in float64 on the CPU: for small problems and checks."""
    like = operator.like
    eye = torch.eye(numel(like), dtype=torch.float64)
    columns = [flatten(operator.matvec(unflatten(e, like))).double().cpu() for e in eye]
    return torch.stack(columns, 1)


def as_scipy(operator: Any) -> Any:
    """The operator as a `scipy.sparse.linalg.LinearOperator` on numpy vectors of its parameters in
    the order of `operator.like`, for SciPy's own solvers and eigenvalue routines."""
    from scipy.sparse.linalg import LinearOperator

    like = operator.like
    dtype = str(flatten(like).dtype).removeprefix("torch.")

    def matvec(x: Any) -> Any:
        v = unflatten(torch.as_tensor(x.reshape(-1).copy()), like)
        return flatten(operator.matvec(v)).cpu().numpy()

    return LinearOperator(operator.shape, matvec=matvec, rmatvec=matvec, dtype=dtype)
