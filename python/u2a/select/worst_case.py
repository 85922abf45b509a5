"""Worst-case forget sets: the candidates that are hardest to unlearn together, or the easiest.

min over w in [0, 1]^n, sum w = m, of sum_i w_i l_i(theta_u(w)) + g ||w||^2, theta_u(w) the model
unlearnt with w and l the NLL. Where unlearning goes by sign steps its result does not depend on w
to first order, so the hypergradient is l_i(theta_u) + 2 g w_i: no Hessian. Source: Fan et al.,
arXiv 2403.07362.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from u2a.adapter import restore, snapshot
from u2a.evaluate import mean_nll
from u2a.outer import Outer
from u2a.select.base import Selection, check_budget, check_gain
from u2a.select.sets import WeightSet

Unlearn = Callable[[Tensor], Tensor]
"""Weights `[n]` in [0, 1] -> the unlearnt model's loss on every candidate, `[n]`."""


def worst_case(
    unlearn: Unlearn,
    n: int,
    budget: int,
    *,
    hardest: bool = True,
    rounds: int = 10,
    lr: float = 0.01,
    ridge: float = 0.0,
) -> Selection:
    """The `budget` candidates of largest weight after `rounds` of projected descent, weight 1 each.

    Args:
        unlearn: see `Unlearn`; `unlearner` makes one. Called once per round.
        hardest: those whose loss stays low although they are unlearnt; False ascends instead, to
            those whose loss rises most.
        lr, ridge: step and g; the defaults are the authors'.

    Every step is w <- P(w - lr (l + 2 g w)) with P the projection onto the capped simplex. Starts
    at w = budget / n. Raises ValueError for a budget or rounds out of range and losses that are not
    finite.
    """
    check_budget(budget, n, "worst_case")
    if rounds < 1:
        raise ValueError(f"worst_case: rounds must be at least 1, got {rounds}")
    into, sign = WeightSet(float(budget), 1.0), 1.0 if hardest else -1.0
    w = torch.full((n,), budget / n, dtype=torch.float64)
    for _ in range(rounds):
        loss = check_gain(unlearn(w), n, None, "worst_case")
        w = into.project(w - lr * (sign * loss + 2 * ridge * w))
    order = w.argsort(descending=True, stable=True)[:budget].tolist()
    weights = torch.zeros(n)
    weights[order] = 1.0
    return Selection(weights, tuple(order))


def unlearner(outer: Outer, total: float) -> Unlearn:
    """Unlearns from the model's present parameters with weights scaled to sum to `total`, measures
    the mean NLL per answer token of every candidate and puts the parameters back."""
    start, problem = snapshot(outer.model), outer.problem

    def unlearn(w: Tensor) -> Tensor:
        try:
            outer.resolve(problem.with_weights((w * (total / w.sum())).float()))
            return mean_nll(outer.model, problem.forget, problem.batch_tokens)
        finally:
            restore(outer.model, start)

    return unlearn
