"""What a solve returns."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from u2a.curvature.gauge import fault, gauge, limit_of
from u2a.errors import GuardError
from u2a.solve.damping import mean_of
from u2a.solve.system import Found, State, System
from u2a.tree import Tree, signs_like

_log = logging.getLogger("u2a.solve")


@dataclass(frozen=True)
class Solution:
    """`x` like the right-hand side; `residual` = ||(A + damping I) x - b|| / ||b||, recomputed.

    `min_curvature`, `max_curvature`: extremes of d.(A + damping I)d / d.d over the directions d
    tried, in "minres" extreme Ritz values; for a closed form, ends of the spectrum of what was
    inverted. `products`: all products
    with A this call has spent, on preconditioner, damping, iterations and residual. `note`: how the
    damping was found. `symmetry`: |u'Ax - x'Au| / (|u| |Ax|) for a random u, where asked for.
    `state` continues an iteration: see `u2a.solve`.
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
    symmetry: float | None = None
    state: State | None = None

    def facts(self) -> dict[str, Any]:
        """What a log keeps: all but the tensors, and the symmetry only where it was measured."""
        found = {n: getattr(self, n) for f in fields(self) if (n := f.name) not in ("x", "state")}
        if self.symmetry is None:
            del found["symmetry"]
        return found


def report(
    method: str,
    system: System,
    b: Tensor,
    size: Tensor,
    found: Found,
    note: str,
    check: int | None = None,
) -> list[Solution]:
    """A solution per column, with the residual of a fresh product; `check`: the seed of a direction
    for the symmetry gauge, one more product."""
    gauges: list[Any] = [None] * len(b)
    residual = size
    if bool(size.any()):
        product = system.product(found.x)
        residual = (product + system.lam * found.x - b).norm(dim=1)
        if check is not None and system.operator is not None:
            gauges = _symmetry(system, found.x, product, check)
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
                system.products, method, note, gauges[j], state,
            )
        )  # fmt: skip
    return solutions


def _symmetry(system: System, x: Tensor, ax: Tensor, seed: int) -> list[float]:
    """The gauge of every solution against one random direction; warns of the worst."""
    u = signs_like(system.like, torch.Generator().manual_seed(seed))
    au = system.tree(system.product(system.flat(u)[None])[0])
    pairs = [(system.tree(a), system.tree(b)) for a, b in zip(x, ax, strict=True)]
    found = [gauge(u, au, a, b) for a, b in pairs]
    text = fault(max(found), limit_of(system.like))
    (_log.warning if text else _log.info)(text or f"symmetry gauge {max(found):.1e}")
    return found
