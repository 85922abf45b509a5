"""The outer loop: choose weights w so that unlearning with them raises J most.

Every round linearises at the inner optimum for the weights so far, moves the weights, solves the
inner problem again from where it is and measures J. The best state on validation data is kept.
Gains and their origin: `u2a.outer`; arXiv 2504.06659.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from u2a.adapter import restore
from u2a.bilevel.grow import grow
from u2a.bilevel.improve import improve, official
from u2a.bilevel.loop import Loop
from u2a.bilevel.plan import Finished, Growth, Plan, Update
from u2a.outer import Outer
from u2a.select.base import check_budget


@dataclass
class Bilevel:
    """Result: `weights [n]`, gains of the first scan, one record per round, J before and after."""

    weights: Tensor
    gain: Tensor
    rounds: list[dict[str, Any]] = field(default_factory=list)
    J_start: float = 0.0
    J_best: float = 0.0
    stopped: str = "budget"


def bilevel(outer: Outer, plan: Plan) -> Bilevel:
    """Blocks with inner re-solve, then weight updates on the support; keeps the best by validation.

    The model must be at the optimum of F(theta, 0); it ends at that for the returned weights.
    Raises ValueError for a budget outside the pool, GuardError from the solves.
    """
    check_budget(plan.budget, len(outer.problem.forget), "bilevel")
    loop = Loop(outer, plan)
    if plan.growth == "official":
        official(loop)
    else:
        grow(loop)
        improve(loop)
    restore(outer.model, loop.state)
    return Bilevel(loop.best, loop.first, loop.records, loop.records[0]["J"], loop.J, loop.stopped)


__all__ = ["Bilevel", "Finished", "Growth", "Plan", "Update", "bilevel"]
