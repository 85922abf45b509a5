"""Neumann series x += eta M^-1 (b - A x): LiSSA, and with an EK-FAC M the iteration of ASTRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u2a.errors import GuardError
from u2a.solve.system import Found, Options, State, System, each_column, negative, numbers, rayleigh


def neumann(system: System, b: Tensor, options: Options, state: State | None) -> Found:
    """eta = 1 / the largest eigenvalue of M^-1 A unless given. A stochastic operator gives the
    residual by a product with x itself, a fixed one by the cheaper recursion."""
    eta = options.step
    if eta is None and state is None:
        eta = 1 / _largest(system, b[0], options)

    def run(
        row: Tensor, stop: float, old: dict[str, Tensor] | None
    ) -> tuple[Found, dict[str, Tensor]]:
        it = _Iteration(system, row, options, old, eta)
        it.go(stop)
        n = it.n
        tensors = {"x": it.x, "r": it.r, "scalars": numbers(*n)}
        return Found(it.x[None], [int(n[3])], [n[1]], [n[2]]), tensors

    return each_column(run, b, options.stop, state)


class _Iteration:
    """One column; `n`: eta, lowest and highest curvature, products, 1 after negative curvature."""

    def __init__(
        self,
        system: System,
        b: Tensor,
        options: Options,
        old: dict[str, Tensor] | None,
        eta: float | None,
    ) -> None:
        self.system, self.b, self.options = system, b, options
        if old is None:
            assert eta is not None
            self.x, self.r = torch.zeros_like(b), b.clone()
            self.n = [eta, math.inf, -math.inf, 0.0, 0.0]
        else:
            self.x, self.r = old["x"].to(b, copy=True), old["r"].to(b, copy=True)
            self.n = old["scalars"].tolist()

    def go(self, stop: float) -> None:
        n, fixed = self.n, not self.system.stochastic
        for _ in range(self.options.max_iter):
            if n[4] or (fixed and float(self.r.norm()) <= stop):
                return
            d = self.r if self.options.precond is None else self.options.precond(self.r[None])[0]
            if fixed:
                product = self.system.apply(d[None])[0]
                self._see(d, product)
                if n[4]:
                    return
                self.x = self.x + n[0] * d
                self.r = self.r - n[0] * product
            else:
                self.x = self.x + n[0] * d
                product = self.system.apply(self.x[None])[0]
                self._see(self.x, product)
                self.r = self.b - product

    def _see(self, d: Tensor, product: Tensor) -> None:
        curvature = rayleigh(d[None], product[None])[0]
        n = self.n
        n[1], n[2], n[3] = min(n[1], curvature), max(n[2], curvature), n[3] + 1
        if curvature <= 0:
            negative(curvature, self.options.raises)
            n[4] = 1.0


def _largest(system: System, like: Tensor, options: Options, steps: int = 20) -> float:
    """||M^-1 A u|| after power iteration from a fixed start; about the largest eigenvalue."""
    u = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u.to(like)
    size = u.norm()
    for _ in range(steps):
        u = system.apply((u / size)[None])[0]
        u = u if options.precond is None else options.precond(u[None])[0]
        size = u.norm()
    value = size.item()
    if not (math.isfinite(value) and value > 0):
        raise GuardError(f"solve: neumann needs a largest eigenvalue above 0, got {value:.3e}")
    return value
