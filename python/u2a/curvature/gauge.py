"""|u'Av - v'Au| / (|u| |Av|): a self-test of curvature products that needs no second opinion.

A Hessian and a Gauss-Newton matrix are symmetric. A product with a missing or a wrong term, or one
of a model whose forward is not the same twice, hardly ever is.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from u2a.errors import GuardError
from u2a.tree import Tree, dot, norm, signs_like

# Random errors of size eps in a product leave about eps / sqrt(p); a missing term leaves far more.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_log = logging.getLogger("u2a.curvature")


def gauge(u: Tree, au: Tree, v: Tree, av: Tree) -> float:
    """The gauge of two directions and their products; 0 where Av is 0, NaN or inf for products that
    are not finite."""
    size = (norm(u) * norm(av)).item()
    gap = abs(dot(u, av).item() - dot(v, au).item())
    return 0.0 if size == 0 and gap == 0 else gap / size if size else math.inf


def limit_of(tree: Any) -> float:
    """The gauge that the narrowest dtype of the parameters still explains."""
    return max(LIMITS.get(t.dtype, 1e-4) for t in tree.values())


def fault(value: float, limit: float) -> str:
    """What to say of a gauge above its limit; empty below."""
    if value <= limit:
        return ""
    return (
        f"the curvature products are not symmetric: |u'Av - v'Au| is {value:.1e} of |u| |Av|, "
        f"rounding explains {limit:.0e}. A term is wrong or missing, or the model's forward is not "
        "the same twice (dropout, random routing, parameters that changed); solutions with this "
        "operator mean nothing. `u2a doctor` compares the model with double backward"
    )


def symmetry(
    operator: Any, *, seed: int = 0, limit: float | None = None, raises: bool = True
) -> float:
    """Symmetry gauge |u'Av - v'Au| / (|u| |Av|) for two random sign vectors: two products.

    Args:
        operator: with `like` and `matvec` (`matmat` is used where there is one); fixed, not a
            `Stream`, whose two products are of two matrices.
        seed: of the directions.
        limit: the largest value that passes; default 1e-10 for float64 parameters, 1e-4 for
            float32, 1e-2 for narrower ones.
        raises: GuardError above the limit, else a warning in the log of u2a.curvature.

    Returns:
        The gauge; about the products' rounding error / sqrt(p) for a right operator.

    Raises:
        GuardError: a gauge above the limit or not finite. ValueError: a stochastic operator.

    Equivalent: ``abs(dot(u, A(v)) - dot(v, A(u))) / (norm(u) * norm(A(v)))``.
    """
    if getattr(operator, "stochastic", False):
        raise ValueError("symmetry: needs a fixed operator, got a stream")
    generator = torch.Generator().manual_seed(seed)
    u, v = (signs_like(operator.like, generator) for _ in range(2))
    many = getattr(operator, "matmat", None)
    au, av = many([u, v]) if many else (operator.matvec(u), operator.matvec(v))
    value = gauge(u, au, v, av)
    text = fault(value, limit_of(operator.like) if limit is None else limit)
    if not math.isfinite(value):
        text = "the curvature products are not finite, so they cannot be symmetric"
    if text and raises:
        raise GuardError(f"symmetry: {text}")
    if text:
        _log.warning(text)
    return value
