"""A bi-level problem whose optimum, gains and Hessian in the weights are known in closed form.

l_i = g_i.theta + theta^T B_i theta / 2, J = c.theta - q |theta|^2 / 2 and
F = sum_i w_i l_i + lambda |theta|^2 / 2, so theta*(w) = -A^-1 sum_i w_i g_i, A = lambda I +
sum_i w_i B_i. It answers like `u2a.outer.Outer`, and its curvature is an operator for `u2a.solve`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from u2a.curvature import Curvature
from u2a.interactions import Interactions
from u2a.scan import Scores
from u2a.solve import solve


class Theta(nn.Module):
    def __init__(self, p: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(p, dtype=torch.float64))


class Dense(Curvature):
    """A given symmetric matrix."""

    probes = 0

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    @property
    def like(self):
        return {"theta": torch.zeros(len(self.matrix), dtype=torch.float64)}

    def matvec(self, v):
        return {"theta": self.matrix @ v["theta"]}

    def mean_eigenvalue(self):
        return float(self.matrix.diagonal().mean())

    def diagonal(self):
        return {"theta": self.matrix.diagonal().clone()}


class Toy:
    def __init__(self, n=12, p=5, q=0.0, lam=0.7, curved=0.0, seed=0, duplicates=0, method="cg"):
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.g, self.c = randn(n, p), randn(p)
        self.g[n - duplicates :] = self.g[:duplicates]
        root = randn(n, p, p)
        self.B = curved * root @ root.mT / p
        self.B[n - duplicates :] = self.B[:duplicates]
        self.q, self.lam, self.method = q, lam, method
        self.model = Theta(p)
        self.problem = SimpleNamespace(
            forget=[SimpleNamespace(uid=f"row{i}", number=i) for i in range(n)],
            with_weights=lambda w: w,
        )
        self.objective = self.validation = None
        self.said: list[Any] = []

    def A(self, w):
        eye = torch.eye(len(self.c), dtype=torch.float64)
        return self.lam * eye + torch.einsum("i,ipq->pq", w.double(), self.B)

    def optimum(self, w):
        return -torch.linalg.solve(self.A(w), w.double() @ self.g)

    def J(self, w):
        """J(theta*(w)), differentiable in w."""
        theta = self.optimum(w)
        return self.c @ theta - self.q / 2 * theta @ theta

    def value(self, objective=None):
        theta = self.model.theta.detach()
        return float(self.c @ theta - self.q / 2 * theta @ theta)

    def retain_perplexity(self):
        """Rises with the distance from theta*(0) = 0."""
        return 2.0 + float(self.model.theta.detach().norm())

    def resolve(self, w):
        self.last = w
        with torch.no_grad():
            self.model.theta.copy_(self.optimum(w))
        return {}

    def slopes(self):
        theta = self.model.theta.detach()
        return self.g + torch.einsum("ipq,q->ip", self.B, theta), self.c - self.q * theta

    def operator(self, w) -> Curvature:
        """sum_i w_i B_i."""
        return Dense(torch.einsum("i,ipq->pq", w.double(), self.B))

    def gains(self, w):
        slope, up = self.slopes()
        found = solve(
            self.operator(w), {"theta": up}, self.method, damping=self.lam, tol=1e-12
        )  # fmt: skip
        gain = -(slope @ found.x["theta"])
        return Scores(gain, gain.isfinite(), [r.uid for r in self.problem.forget]), found

    def interactions(self, w, solution, inverse="ekfac", second_order=False):
        slope, _ = self.slopes()
        u = torch.linalg.solve(self.A(w), slope.T).T
        if not second_order:
            return Interactions(slope @ u.T)
        cross = torch.einsum("ipq,q,jp->ij", self.B, solution.x["theta"], u)
        return Interactions(slope @ u.T, -self.q * u @ u.T + cross + cross.T)

    def say(self, kind, **facts):
        self.said.append((kind, facts))
