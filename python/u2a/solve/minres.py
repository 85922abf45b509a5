"""MINRES: the smallest residual over the Krylov space, for symmetric A of any sign.

SciPy's has neither a state to go on from nor tensors on a device; the iterates are the same.
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from u2a.errors import GuardError
from u2a.solve.system import Found, Options, State, System, each_column, numbers, rayleigh

VECTORS = ("x", "r", "r1", "r2", "y", "w", "w1", "q", "q1")
SCALARS = ("beta", "oldb", "dbar", "eps", "cs", "sn", "phi", "low", "high", "count")


def minres(system: System, b: Tensor, options: Options, state: State | None) -> Found:
    """Paige and Saunders 1975, preconditioned by a positive definite M."""

    def run(
        row: Tensor, stop: float, old: dict[str, Tensor] | None
    ) -> tuple[Found, dict[str, Tensor]]:
        it = _Iteration(system, row, options, old)
        for _ in range(options.max_iter):
            if it.n["beta"] == 0 or float(it.v["r"].norm()) <= stop:
                break
            it.step()
        n = it.n
        tensors = {**it.v, "scalars": numbers(*(n[k] for k in SCALARS))}
        tensors["diagonal"], tensors["beside"] = numbers(*it.diagonal), numbers(*it.beside)
        low, high = it.curvature()
        return Found(it.v["x"][None], [int(n["count"])], [low], [high]), tensors

    return each_column(run, b, options.stop, state)


class _Iteration:
    """One column: Lanczos vectors r1, r2 with y = M^-1 r2, search directions w, w1 with their
    products q, q1, a Givens rotation (cs, sn), and the tridiagonal matrix so far."""

    def __init__(
        self, system: System, b: Tensor, options: Options, old: dict[str, Tensor] | None
    ) -> None:
        self.system, self.options = system, options
        self.diagonal: list[float] = []
        self.beside: list[float] = []
        if old is not None:
            self.v = {k: old[k].to(b, copy=True) for k in VECTORS}
            self.n = dict(zip(SCALARS, old["scalars"].tolist(), strict=True))
            self.diagonal, self.beside = old["diagonal"].tolist(), old["beside"].tolist()
            return
        zero = torch.zeros_like(b)
        self.v = {k: zero.clone() for k in VECTORS}
        self.v |= {"r": b.clone(), "r1": b.clone(), "r2": b.clone(), "y": self._inverse(b)}
        self.n = dict.fromkeys(SCALARS, 0.0) | {"cs": -1.0, "low": math.inf, "high": -math.inf}
        self.n["beta"] = self.n["phi"] = self._root(b, self.v["y"])

    def _inverse(self, r: Tensor) -> Tensor:
        m = self.options.precond
        return r.clone() if m is None else m(r[None])[0]

    def _root(self, r: Tensor, y: Tensor) -> float:
        square = float(r.dot(y))
        if square < 0 or math.isnan(square):
            raise GuardError(
                "solve: the preconditioner is not positive definite or a product is not finite"
            )
        return math.sqrt(square)

    def step(self) -> None:
        v, n = self.v, self.n
        unit = v["y"] / n["beta"]
        product = self.system.apply(unit[None])[0]
        seen = rayleigh(unit[None], product[None])[0]
        n["low"], n["high"], n["count"] = min(n["low"], seen), max(n["high"], seen), n["count"] + 1
        y = product.clone()
        if n["oldb"]:
            y.sub_(v["r1"], alpha=n["beta"] / n["oldb"])
        alpha = float(unit.dot(y))
        y.sub_(v["r2"], alpha=alpha / n["beta"])
        v["r1"], v["r2"], v["y"] = v["r2"], y, self._inverse(y)
        n["oldb"], n["beta"] = n["beta"], self._root(y, v["y"])
        self.diagonal.append(alpha)
        self.beside.append(n["beta"])
        self._rotate(unit, product, alpha)

    def curvature(self) -> tuple[float, float]:
        """Extreme Ritz values; with a preconditioner the quotients met, unless these missed a
        negative Ritz value of M^-1 A (as many eigenvalues of it are negative as of A)."""
        low, high = self.n["low"], self.n["high"]
        if not self.diagonal:
            return low, high
        ritz = eigvalsh_tridiagonal(self.diagonal, self.beside[:-1])
        if self.options.precond is None:
            return min(low, float(ritz[0])), max(high, float(ritz[-1]))
        return (float(ritz[0]) if ritz[0] < 0 < low else low), high

    def _rotate(self, unit: Tensor, product: Tensor, alpha: float) -> None:
        v, n = self.v, self.n
        oldeps = n["eps"]
        delta = n["cs"] * n["dbar"] + n["sn"] * alpha
        gbar = n["sn"] * n["dbar"] - n["cs"] * alpha
        n["eps"], n["dbar"] = n["sn"] * n["beta"], -n["cs"] * n["beta"]
        gamma = max(math.hypot(gbar, n["beta"]), torch.finfo(unit.dtype).tiny)
        n["cs"], n["sn"] = gbar / gamma, n["beta"] / gamma
        tau, n["phi"] = n["cs"] * n["phi"], n["sn"] * n["phi"]
        for new, now, last in ((unit, "w", "w1"), (product, "q", "q1")):
            fresh = (new - oldeps * v[last] - delta * v[now]) / gamma
            v[last], v[now] = v[now], fresh
        v["x"] = v["x"] + tau * v["w"]
        v["r"] = v["r"] - tau * v["q"]
