"""Ends and mean size of a spectrum from a few products, by the Lanczos process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from u2a.errors import GuardError

SLACK = 2e-3
LEAST = 12  # steps: before, a small residual may belong to an eigenvalue inside the spectrum


@dataclass(frozen=True)
class Spectrum:
    """`low`, `high`: bounds of the eigenvalues; `mean_abs`, `mean`: of |eigenvalue| and eigenvalue,
    estimated from one random vector; `products` spent."""

    low: float
    high: float
    mean_abs: float
    mean: float
    products: int


def lanczos(
    apply: Callable[[Tensor], Tensor], like: Tensor, *, steps: int = 80, seed: int = 0
) -> Spectrum:
    """Spectrum of a symmetric `apply` on vectors like `like` (at most `steps` products).

    The lowest Ritz value lies within its residual beta_m |s_m| of an eigenvalue; iteration ends
    when that residual is below 0.2 % of the spectral radius, and `low` is the Ritz value less the
    residual and 0.2 % of the radius, `high` likewise: bounds of the ends of the spectrum unless the
    random start misses them (probability tiny, not zero; solvers check every direction they meet).
    No reorthogonalisation: copies of Ritz values change neither the ends nor the quadrature.

    Raises GuardError for a non-finite product.

    Source: Paige 1972 (residuals in floating point); quadrature: Golub and Welsch 1969.
    """
    p = like.numel()
    start = torch.randn(p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = start.to(like)
    v = v / v.norm()
    before = torch.zeros_like(v)
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        w = apply(v)
        alpha = float(w.dot(v))
        if not math.isfinite(alpha):
            raise GuardError("lanczos: a curvature product holds non-finite values")
        w = w.sub_(v, alpha=alpha).sub_(before, alpha=betas[-1] if betas else 0.0)
        beta = float(w.norm())
        alphas.append(alpha)
        theta, s = eigh_tridiagonal(alphas, betas)
        radius = max(abs(theta[0]), abs(theta[-1]))
        exact = beta <= 10 * torch.finfo(v.dtype).eps * radius  # an invariant subspace
        near = len(alphas) >= LEAST and beta * abs(s[-1, 0]) <= SLACK * radius
        if exact or near or len(alphas) >= min(steps, p):
            break
        betas.append(beta)
        before, v = v, w / beta
    weight = s[0] ** 2
    low = theta[0] - beta * abs(s[-1, 0]) - SLACK * radius
    high = theta[-1] + beta * abs(s[-1, -1]) + SLACK * radius
    mean_abs, mean = float(weight @ abs(theta)), float(weight @ theta)
    return Spectrum(float(low), float(high), mean_abs, mean, len(alphas))
