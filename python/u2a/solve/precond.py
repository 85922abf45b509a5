"""Preconditioners M^-1 on `[k, p]`: jacobi, nystrom:R, kfac, ekfac, or the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from u2a.curvature.kfac import EKFAC, KFAC, positive_diagonal
from u2a.errors import GuardError
from u2a.solve.system import Rows, System

NAMES = "None, 'jacobi', 'nystrom:<rank>', 'kfac', 'ekfac', an operator with inverse, or a callable"


def preconditioner(precond: Any, system: System, seed: int = 0) -> Rows | None:
    """`precond` as in `u2a.solve`, for the system with its damping set.

    Raises ValueError for another name or a rank out of range.
    """
    if precond is None:
        return None
    if isinstance(precond, str):
        kind, _, rank = precond.partition(":")
        if kind == "nystrom" and rank.isascii() and rank.isdigit():
            return nystrom(system, int(rank), seed)
        if precond == "jacobi":
            return jacobi(system)
        if precond in ("kfac", "ekfac"):
            made = {"kfac": KFAC, "ekfac": EKFAC}[precond].of(system.base, draws=4, seed=seed)
            return by_inverse(made, system)
    elif hasattr(precond, "inverse"):
        return by_inverse(precond, system)
    elif callable(precond):
        return _by_trees(precond, system)
    raise ValueError(f"solve: precond must be {NAMES}; got {precond!r}")


def _by_trees(inverse: Callable[[Any], Any], system: System) -> Rows:
    return lambda r: torch.stack([system.flat(inverse(system.tree(row))) for row in r])


def by_inverse(operator: Any, system: System) -> Rows:
    """(B + mu I)^-1 of an operator B that knows its inverse. mu is the damping lam, at least 1e-4
    of B's mean eigenvalue, so that an undamped system can be preconditioned too.

    For K-FAC and EK-FAC mu = 3 sqrt(lam x B's largest eigenvalue), about the middle of the damped
    spectrum on a log scale: their small eigenvalues are mostly noise of the draws, and with
    mu = lam plain CG is faster (measured on the matrix of benchmarks/bench_solve.py).
    """
    assert isinstance(system.lam, float)
    lam = max(system.lam, 1e-4 * operator.mean_eigenvalue())
    if isinstance(operator, KFAC):
        lam = 3 * (lam * float(operator.eigenvalues().max())) ** 0.5
    return _by_trees(lambda tree: operator.inverse(tree, lam), system)


def jacobi(system: System) -> Rows:
    """1 / (diag A + lam), diagonal as `positive_diagonal`; entries below 0 count as 0."""
    d = system.flat(positive_diagonal(system.base)).clamp_min(0) + system.lam
    if not bool((d > 0).all()):
        raise GuardError(
            f"solve: jacobi needs a positive diagonal, {int((d <= 0).sum())} entries are not; "
            "give a damping"
        )
    return lambda r: r / d


def nystrom(system: System, rank: int, seed: int = 0) -> Rows:
    """U (Lambda + lam)^-1 (lambda_R + lam) U^T + I - U U^T, lambda_R the least of Lambda.

    Source: Frangella, Tropp and Udell, arXiv 2110.02820, section 5.
    """
    u, values = sketch(system, rank, seed)
    lam = system.lam
    if not float(values[-1]) + lam > 0:
        raise ValueError(f"solve: nystrom:{rank} of a matrix of lower rank needs a damping above 0")
    scale = (values[-1] + lam) / (values + lam) - 1
    return lambda r: r + ((r @ u) * scale) @ u.T


def sketch(system: System, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U `[p, R]`, Lambda `[R]` with A ~ U diag(Lambda) U^T, from R products with random vectors.

    For positive semidefinite A; raises GuardError where the sketch shows that A is not.

    Source: Frangella, Tropp and Udell, arXiv 2110.02820, algorithm 2.1.
    """
    p = len(system.vector)
    if not 1 <= rank <= p:
        raise ValueError(f"solve: the rank of nystrom must be in [1, {p}] (parameters), got {rank}")
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(p, rank, generator=generator, dtype=torch.float64)
    omega = torch.linalg.qr(omega.to(system.vector))[0]
    y = system.product(omega.T.contiguous()).T
    shift = torch.finfo(y.dtype).eps * y.norm() * p**0.5
    y = y + shift * omega
    core = (omega.T @ y).double()
    factor, bad = torch.linalg.cholesky_ex((core + core.T) / 2)
    if int(bad):
        raise GuardError(
            "solve: nystrom needs a positive semidefinite operator, its sketch is not; use jacobi, "
            "ekfac or GaussNewton"
        )
    b = torch.linalg.solve_triangular(factor, y.T.double(), upper=False).T
    u, s, _ = torch.linalg.svd(b, full_matrices=False)
    values = (s.square() - shift.double()).clamp_min(0)
    return u.to(system.vector), values.to(system.vector)
