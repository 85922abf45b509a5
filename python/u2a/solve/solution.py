"""What a solve returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from u2a.errors import GuardError
from u2a.solve.damping import mean_of
from u2a.solve.system import Found, State, System
from u2a.tree import Tree


@dataclass(frozen=True)
class Solution:
    """`x` like the right-hand side; `residual` = ||(A + damping I) x - b|| / ||b||, recomputed.

    `min_curvature`, `max_curvature`: extremes of d.(A + damping I)d / d.d over the directions d
    tried, in "minres" extreme Ritz values; for a closed form, ends of the spectrum of what was
    inverted. `products`: all products
    with A this call has spent, on preconditioner, damping, iterations and residual. `note`: how the
    damping was found. `state` continues an iteration: see `u2a.solve`.
    """

    x: Tree
    residual: float
    iterations: int
    negative_curvature: bool
    damping: float
    min_curvature: float
    max_curvature: float = math.nan
    products: int = 0
    method: str = ""
    note: str = ""
    state: State | None = None

    def facts(self) -> dict[str, Any]:
        """What a log keeps: all but the tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("x", "state")}


def report(
    method: str,
    system: System,
    b: Tensor,
    size: Tensor,
    found: Found,
    note: str,
) -> list[Solution]:
    """A solution per column, with the residual of a fresh product."""
    residual = (system.apply(found.x) - b).norm(dim=1) if bool(size.any()) else size
    relative = (residual / torch.where(size > 0, size, 1)).tolist()
    if not all(map(math.isfinite, relative)):
        raise GuardError(
            f"solve: {method} gave non-finite values after {max(found.iterations)} products"
        )
    state = State(method, found.tensors) if found.tensors else None
    lam = mean_of(system.lam)
    solutions = []
    for j, row in enumerate(found.x):
        low, high = found.low[j], found.high[j]
        low, high = (low, high) if math.isfinite(low) else (lam, lam)
        solutions.append(
            Solution(
                system.tree(row), relative[j], int(found.iterations[j]), low <= 0, lam, low, high,
                system.products, method, note, state,
            )
        )  # fmt: skip
    return solutions
