"""How candidates act together: inner products and the Hessian of J in the weights, for small pools.

With u_i = A^-1 grad l_i and v = A^-1 grad J at the inner optimum, d theta*/dw_i = -u_i and
  gain_i = -v^T grad l_i,   gram_ij = grad l_i^T u_j,
  Q_ij = d2J/dw_i dw_j = u_i^T H_J u_j + v^T (H_j u_i + H_i u_j).
Q leaves out the change of the retain term's own curvature along the way (its third derivative).
Memory: two [n, p] matrices, three with Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from u2a.curvature import EKFAC
from u2a.curvature.features import row_features
from u2a.outer import Outer
from u2a.products import hvp
from u2a.solve import Solution, solve
from u2a.tree import Tree, flatten, trainable, unflatten

Inverse = Literal["ekfac", "cg", "identity"]


@dataclass(frozen=True)
class Interactions:
    """`gram [n, n]` = G A^-1 G^T, `curvature [n, n]` = Q or None, float64 on the CPU."""

    gram: Tensor
    curvature: Tensor | None = None


def interactions(
    outer: Outer,
    weights: Tensor,
    solution: Solution,
    *,
    inverse: Inverse = "ekfac",
    second_order: bool = False,
) -> Interactions:
    """At the model's present parameters, which should be the inner optimum for `weights`.

    Args:
        solution: v = A^-1 grad J and its damping, `Outer.gains(weights)[1]`.
        inverse: of A in u_i: "ekfac" (one factorisation), "cg" (n solves, with the settings'
            tolerance) or "identity" (grad l_i / (damping + mean eigenvalue)).
        second_order: also Q: n Hessian products of J and one of every candidate.
    """
    like = trainable(outer.model)
    g = pool_gradients(outer)
    u = _inverse(outer, weights, g, inverse, solution.damping)
    gram = (g.double() @ u.double().T).cpu()
    gram = (gram + gram.T) / 2
    if not second_order:
        return Interactions(gram)
    hj = torch.stack([flatten(outer.objective.hvp(outer.model, unflatten(x, like))) for x in u])
    cross = _pool_products(outer, solution.x).double() @ u.double().T
    q = (u.double() @ hj.double().T + cross + cross.T).cpu()
    return Interactions(gram, (q + q.T) / 2)


def pool_gradients(outer: Outer) -> Tensor:
    """grad l_i of every candidate, `[n, p]`, in the order of the pool."""
    p = outer.problem
    batches = p.batches()
    found = row_features(outer.model, batches, p.loss, p.reference)
    return found[torch.cat([b.index for b in batches]).argsort().to(found.device)]


def _inverse(outer: Outer, weights: Tensor, g: Tensor, inverse: Inverse, lam: float) -> Tensor:
    like, settings = trainable(outer.model), outer.settings
    operator = outer.operator(weights)
    if operator is None:
        return g / lam
    trees = [unflatten(row, like) for row in g]
    if inverse == "cg":
        found = solve(
            operator, trees, "cg", damping=lam, precond="ekfac", tol=settings.tol,
            max_iter=settings.max_iter,
        )  # fmt: skip
        return torch.stack([flatten(s.x) for s in found])
    if inverse == "identity":
        return g / (lam + operator.mean_eigenvalue())
    factors = EKFAC.of(operator)
    return torch.stack([flatten(factors.inverse(t, lam)) for t in trees])


def _pool_products(outer: Outer, v: Tree) -> Tensor:
    """H_i v of every candidate, `[n, p]`."""
    p, out = outer.problem, []
    one = torch.zeros(len(p.forget))
    for i in range(len(p.forget)):
        one[i] = 1.0
        found = hvp(outer.model, p.batches([i]), p.loss, v, weights=one, ref=p.reference)
        out.append(flatten(found))
        one[i] = 0.0
    return torch.stack(out)
