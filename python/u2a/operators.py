"""Curvature operators for `u2a.solve`: Gauss-Newton, exact Hessian, weighted sums of them.

An operator belongs to the parameters' present values; after an update make a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from u2a.products import Batches, Loss, Refs, ggnvp, hvp, quadratic
from u2a.tree import Tree, add_, dot, numel, scaled, signs_like, trainable, zeros_like


class Operator(Protocol):
    """A symmetric linear map on {parameter name: tensor}."""

    def matvec(self, v: Tree) -> Tree: ...

    def mean_eigenvalue(self) -> float:
        """trace / number of parameters."""
        ...

    def diagonal(self) -> Tree: ...


class _Curvature:
    """Curvature of sum_i w_i l_i (mean over rows without weights); arguments as `u2a.hvp`.

    `mean_eigenvalue` and `diagonal` are Hutchinson and Bekas estimates from `probes` Rademacher
    vectors z of a fixed `seed`: the means of z.Az / p and of z * Az. Variance: for the trace
    2 sum_{i != j} A_ij^2 / probes, for entry i of the diagonal sum_{j != i} A_ij^2 / probes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        *,
        weights: Tensor | None = None,
        ref: Refs = None,
        probes: int = 16,
        seed: int = 0,
    ) -> None:
        if probes < 1:
            raise ValueError(f"{type(self).__name__}: probes must be at least 1, got {probes}")
        self.model, self.batches, self.loss = model, batches, loss
        self.weights, self.ref = weights, ref
        self.probes, self.seed = probes, seed

    def matvec(self, v: Tree) -> Tree:
        raise NotImplementedError

    def quadratic(self, v: Tree) -> float:
        return dot(v, self.matvec(v)).item()

    def _signs(self) -> list[Tree]:
        generator = torch.Generator().manual_seed(self.seed)
        params = trainable(self.model)
        return [signs_like(params, generator) for _ in range(self.probes)]

    def mean_eigenvalue(self) -> float:
        signs = self._signs()
        return sum(self.quadratic(z) for z in signs) / (self.probes * numel(signs[0]))

    def diagonal(self) -> Tree:
        total = zeros_like(trainable(self.model))
        for z in self._signs():
            product = self.matvec(z)
            add_(total, {name: z[name] * t for name, t in product.items()}, 1 / self.probes)
        return total


class GaussNewton(_Curvature):
    """Positive semidefinite: see `u2a.ggnvp` for which matrix it is with which loss.

    `mean_eigenvalue` costs dual forwards only; `diagonal` estimates below 0 are set to 0.
    """

    def matvec(self, v: Tree) -> Tree:
        return ggnvp(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)

    def quadratic(self, v: Tree) -> float:
        return quadratic(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)

    def diagonal(self) -> Tree:
        return {name: t.clamp_min(0) for name, t in super().diagonal().items()}


class Hessian(_Curvature):
    """The exact Hessian. Indefinite for language models: `u2a.solve` needs a damping above that."""

    def matvec(self, v: Tree) -> Tree:
        return hvp(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)


class Sum:
    """sum_j coef_j A_j, e.g. ``Sum([(1.0, Hessian(...)), (mu, GaussNewton(...))])``."""

    def __init__(self, terms: Sequence[tuple[float, Operator]]) -> None:
        if not terms:
            raise ValueError("Sum: terms must hold at least one (coefficient, operator), got none")
        self.terms = list(terms)

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
