"""u2a.solve: x with (A + damping I) x = rhs for a curvature operator A, and how far to trust it.

Every solution carries the true residual of a fresh product and what curvature was met on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from u2a.errors import GuardError
from u2a.operators import GaussNewton, Hessian, Operator, Sum
from u2a.tree import Tree, flatten, unflatten

Method = Literal["cg", "neumann", "identity", "diagonal"]
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """`x` like the right-hand side; `residual` = ||(A + damping I) x - b|| / ||b||, recomputed.

    `min_curvature` is the smallest d.(A + damping I)d / d.d over the directions d tried (for
    "diagonal" the smallest entry, for "identity" the damping).
    """

    x: Tree
    residual: float
    iterations: int
    negative_curvature: bool
    damping: float
    min_curvature: float


def solve(
    operator: Operator | None,
    rhs: Mapping[str, Tensor],
    method: Method = "cg",
    *,
    damping: str | float = "rel:0.1",
    tol: float = 1e-6,
    max_iter: int = 200,
    on_negative: Literal["raise", "stop"] = "raise",
) -> Solution:
    """Solve (A + damping I) x = rhs.

    Args:
        operator: A, with `matvec`, `mean_eigenvalue` and `diagonal` on {name: tensor}; None stands
            for A = 0 and goes with "identity".
        rhs: {parameter name: tensor}; the solution has its names, shapes, dtypes and devices.
            Inside, one float32 vector (float64 if rhs is).
        method: "cg": conjugate gradients. "neumann": x += eta (rhs - A x), eta = 1 / the largest
            eigenvalue found by 20 power iterations (converges for eta < 2 / lambda_max; equals
            differentiating that many gradient-descent steps). "identity": rhs / damping, the
            gamma-approximation with gamma = damping. "diagonal": rhs / (diag A + damping).
        damping: a number, or "rel:r" for r times the mean eigenvalue of A.
        tol: "cg" and "neumann" stop when the recursive residual falls below tol ||rhs||.
        max_iter: products at most; running out is no error, the residual tells.
        on_negative: on d.(A + damping I)d <= 0, "raise" GuardError with the damping that direction
            asks for, or "stop" and return what is reached so far, flagged.

    Raises:
        ValueError: unknown method or option, a damping that cannot be used.
        GuardError: negative curvature under on_negative="raise", or non-finite products.

    Source: Hestenes and Stiefel 1952; Neumann series as in LiSSA, arXiv 1602.03943.
    """
    _check(method, on_negative, operator)
    b = flatten(rhs)
    lam = _damping(damping, operator)

    def apply(x: Tensor) -> Tensor:
        if operator is None:
            return lam * x
        return flatten(_ordered(operator.matvec(unflatten(x, rhs)), rhs)) + lam * x

    size = b.norm().item()
    if not math.isfinite(size):
        raise GuardError("solve: the right-hand side holds non-finite values")
    if size == 0.0:
        return Solution(unflatten(b, rhs), 0.0, 0, False, lam, lam)
    if method in ("cg", "neumann"):
        step = _cg if method == "cg" else _neumann
        x, count, low = step(apply, b, tol * size, max_iter, on_negative == "raise")
    else:
        x, low = _direct(method, operator, rhs, b, lam)
        count = 0
        if low <= 0:
            _negative(low, on_negative == "raise")
    residual = ((apply(x) - b).norm() / size).item()
    if not math.isfinite(residual):
        raise GuardError(f"solve: {method} gave non-finite values after {count} products")
    return Solution(unflatten(x, rhs), residual, count, low <= 0, lam, low)


def _check(method: str, on_negative: str, operator: Operator | None) -> None:
    if method not in ("cg", "neumann", "identity", "diagonal"):
        raise ValueError(
            f"solve: method must be 'cg', 'neumann', 'identity' or 'diagonal', got {method!r}"
        )
    if on_negative not in ("raise", "stop"):
        raise ValueError(f"solve: on_negative must be 'raise' or 'stop', got {on_negative!r}")
    if operator is None and method != "identity":
        raise ValueError(f"solve: operator None goes with method 'identity', got {method!r}")


def _damping(damping: str | float, operator: Operator | None) -> float:
    """The absolute damping; relative ones need an operator with a positive mean eigenvalue."""
    if not isinstance(damping, str):
        value = float(damping)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"solve: damping must be finite and at least 0, got {damping}")
        return value
    kind, _, number = damping.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if kind != "rel" or not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"solve: damping must be a number or 'rel:<positive>', got {damping!r}")
    if operator is None:
        raise ValueError(f"solve: damping {damping!r} needs an operator, got None")
    mean = operator.mean_eigenvalue()
    if not mean > 0:
        raise ValueError(
            f"solve: damping {damping!r} needs a positive mean eigenvalue, got {mean:.3e}; "
            "give an absolute damping"
        )
    return factor * mean


def _ordered(tree: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tree:
    if tree.keys() != like.keys():
        names = sorted(tree.keys() ^ like.keys())[:3]
        raise ValueError(f"solve: operator and right-hand side differ in parameters, e.g. {names}")
    return {name: tree[name] for name in like}


def _negative(curvature: float, raises: bool) -> None:
    if raises:
        raise GuardError(
            f"solve: negative curvature {curvature:.3e} along a search direction, the system is "
            f"not positive definite. Raise the damping by more than {-curvature:.3e} or use "
            "GaussNewton"
        )


def _curvature(d: Tensor, product: Tensor) -> float:
    value = (d.dot(product) / d.dot(d)).item()
    if not math.isfinite(value):
        raise GuardError("solve: a curvature product holds non-finite values")
    return value


def _cg(
    apply: Apply, b: Tensor, stop: float, max_iter: int, raises: bool
) -> tuple[Tensor, int, float]:
    x, r, low = torch.zeros_like(b), b.clone(), math.inf
    d, rr = r.clone(), r.dot(r)
    for k in range(max_iter):
        if rr.sqrt().item() <= stop:
            return x, k, low
        product = apply(d)
        curvature = _curvature(d, product)
        low = min(low, curvature)
        if curvature <= 0:
            _negative(curvature, raises)
            return x, k + 1, low
        alpha = rr / d.dot(product)
        x.addcmul_(alpha, d)
        r.addcmul_(-alpha, product)
        rr, before = r.dot(r), rr
        d.mul_(rr / before).add_(r)
    return x, max_iter, low


def _neumann(
    apply: Apply, b: Tensor, stop: float, max_iter: int, raises: bool
) -> tuple[Tensor, int, float]:
    eta = 1 / _largest_eigenvalue(apply, b)
    x, r, low = torch.zeros_like(b), b.clone(), math.inf
    for k in range(max_iter):
        if r.norm().item() <= stop:
            return x, k, low
        product = apply(r)
        curvature = _curvature(r, product)
        low = min(low, curvature)
        if curvature <= 0:
            _negative(curvature, raises)
            return x, k + 1, low
        x.add_(r, alpha=eta)
        r.sub_(product, alpha=eta)
    return x, max_iter, low


def _largest_eigenvalue(apply: Apply, like: Tensor, steps: int = 20) -> float:
    """||A u|| after power iteration from a fixed start; at most the true value in modulus."""
    u = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u.to(like)
    size = u.norm()
    for _ in range(steps):
        u = apply(u / size)
        size = u.norm()
    value = size.item()
    if not (math.isfinite(value) and value > 0):
        raise GuardError(f"solve: neumann needs a largest eigenvalue above 0, got {value:.3e}")
    return value


def _direct(
    method: str, operator: Operator | None, rhs: Mapping[str, Tensor], b: Tensor, lam: float
) -> tuple[Tensor, float]:
    """x = b / d and the smallest entry of d."""
    if method == "identity":
        if lam == 0:
            raise ValueError("solve: method 'identity' divides by the damping, got 0")
        return b / lam, lam
    assert operator is not None
    d = flatten(_ordered(operator.diagonal(), rhs)) + lam
    low = d.min().item()
    return b / d, low


__all__ = ["GaussNewton", "Hessian", "Operator", "Solution", "Sum", "solve"]
