"""Solutions in closed form: identity, diagonal, K-FAC, EK-FAC, Woodbury, DataInf."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u2a.curvature.kfac import EKFAC, KFAC, positive_diagonal
from u2a.solve.system import Found, System


def direct(method: str, system: System, b: Tensor) -> Found:
    """`x [k, p]`; `low` and `high` the ends of the spectrum of the matrix that was inverted."""
    made = {
        "identity": _identity, "diagonal": _diagonal, "kfac": _kronecker, "ekfac": _kronecker,
        "woodbury": _woodbury, "datainf": _datainf,
    }[method]  # fmt: skip
    x, low, high = made(system, b, method)
    return Found(x, [0] * len(b), [low] * len(b), [high] * len(b))


def _number(system: System, method: str) -> float:
    assert isinstance(system.lam, float)
    if system.lam == 0:
        raise ValueError(f"solve: method {method!r} divides by the damping, got 0")
    return system.lam


def _identity(system: System, b: Tensor, method: str) -> tuple[Tensor, float, float]:
    lam = _number(system, method)
    return b / lam, lam, lam


def _diagonal(system: System, b: Tensor, method: str) -> tuple[Tensor, float, float]:
    op = system.base
    d = system.flat(positive_diagonal(op) if system.definite else op.diagonal()) + system.lam
    return b / d, float(d.min()), float(d.max())


def _kronecker(system: System, b: Tensor, method: str) -> tuple[Tensor, float, float]:
    made = {"kfac": KFAC, "ekfac": EKFAC}[method].of(system.base)
    lam = system.lam
    assert isinstance(lam, float)
    x = torch.stack([system.flat(made.inverse(system.tree(row), lam)) for row in b])
    values = made.eigenvalues()
    return x, float(values.min()) + lam, float(values.max()) + lam


def roots(system: System, method: str) -> Tensor:
    """S `[n, p]` in the order of the right-hand side, S^T S = A."""
    op: Any = system.operator
    if not hasattr(op, "roots"):
        raise ValueError(
            f"solve: method {method!r} needs an operator with per-example gradients "
            f"(EmpiricalFisher, Features or a Sum of them), got {type(op).__name__}"
        )
    s: Tensor = op.roots().to(system.vector)
    sizes = [t.numel() for t in op.like.values()]
    parts = dict(zip(op.like, s.split(sizes, dim=1), strict=True))
    if list(parts) == list(system.like):
        return s
    system.flat(op.like)
    return torch.cat([parts[name] for name in system.like], 1)


def _woodbury(system: System, b: Tensor, method: str) -> tuple[Tensor, float, float]:
    """(lam I + S^T S)^-1 b = (b - S^T (lam I + S S^T)^-1 S b) / lam, the small system in
    float64."""
    lam = _number(system, method)
    s = roots(system, method)
    gram = (s @ s.T).double()
    top = float(torch.linalg.eigvalsh(gram)[-1]) if len(s) else 0.0
    gram.diagonal().add_(lam)
    inner = torch.cholesky_solve((s @ b.T).double(), torch.linalg.cholesky(gram))
    return (b - inner.T.to(b) @ s) / lam, lam, top + lam


def block_means(system: System, s: Tensor) -> Tensor:
    """Mean eigenvalue of every parameter's block of S^T S, spread over its entries `[p]`."""
    sizes = [t.numel() for t in system.like.values()]
    means = [part.double().square().sum() / max(part.shape[1], 1) for part in s.split(sizes, dim=1)]
    return torch.cat([m.expand(k) for m, k in zip(means, sizes, strict=True)]).to(s)


def _datainf(system: System, b: Tensor, method: str) -> tuple[Tensor, float, float]:
    """Per parameter: the mean of (n s_i s_i^T + lam)^-1 b over the n rows s_i of S, each by
    Sherman-Morrison. With s_i = g_i / sqrt(n) this is equation 5 of the paper.

    Source: DataInf, Kwon et al., arXiv 2310.00902.
    """
    s = roots(system, method)
    n = len(s)
    lam = system.lam if isinstance(system.lam, Tensor) else b.new_full((b.shape[1],), system.lam)
    if not bool((lam > 0).all()):
        raise ValueError("solve: method 'datainf' divides by the damping, got 0 for a block")
    sizes = [t.numel() for t in system.like.values()]
    found, high = [], 0.0
    for v, g, mu in zip(b.split(sizes, 1), s.split(sizes, 1), lam.split(sizes), strict=True):
        square = n * g.square().sum(1)
        c = n * (v @ g.T) / (mu[0] + square)  # [k, n]
        found.append((v - (c @ g) / n) / mu[0])
        high = max(high, float(square.max()) + float(mu[0])) if n else float(mu[0])
    return torch.cat(found, 1), float(lam.min()), high
