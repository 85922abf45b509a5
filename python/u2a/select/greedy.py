"""Greedy selection in blocks, with a fresh solve between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from u2a.select.base import Round, Selection, check_box, check_budget, check_gain
from u2a.select.simple import topk


def block_greedy(
    gain_fn: Callable[[Tensor], Tensor],
    resolve_fn: Callable[[Tensor], float | None],
    *,
    n: int,
    budget: int,
    blocks: int,
    weight: float,
    min_gain: float = 0.0,
    start: float | None = None,
    tolerance: float = 0.0,
) -> Selection:
    """Adds the best block, re-solves, scores afresh, and so on: near-duplicates lose their gain as
    soon as one of them is in.

    Args:
        gain_fn: weights `[n]` -> gains `[n]` at the present parameters (those of the last resolve).
        resolve_fn: weights -> J after moving the parameters to the optimum for them (or None).
        budget, blocks: most rows in all; each block adds ceil(budget / blocks) of them.
        weight: weight of every selected row, so the total grows with the support and is
            budget * weight only when the budget is used up.
        min_gain: rows at or below it are never added.
        start: J before the first block, which otherwise is not compared with anything.
        tolerance: J may fall by this much before the block is dropped and the search ends.

    A dropped block leaves the parameters at its own optimum: the caller restores what it keeps.
    Raises ValueError for a budget or block count out of range, a weight <= 0, non-finite gains.
    """
    check_budget(budget, n, "block_greedy")
    if not 1 <= blocks <= budget:
        raise ValueError(f"block_greedy: blocks must be in [1, {budget}] (budget), got {blocks}")
    check_box(weight, None, n, "block_greedy")
    size = -(-budget // blocks)
    weights, order, rounds, best = torch.zeros(n), list[int](), list[Round](), start
    while len(order) < budget:
        gain = check_gain(gain_fn(weights), n, None, "block_greedy")
        open_gain = gain.masked_fill(weights.bool(), float("-inf"))
        added = topk(open_gain, min(size, budget - len(order)), min_gain)
        if not added:
            return Selection(weights, tuple(order), tuple(rounds), "no positive gain")
        trial = weights.clone()
        trial[added] = weight
        J = resolve_fn(trial)
        rounds.append(Round(tuple(added), tuple(gain[added].tolist()), J))
        if J is not None and best is not None and not J >= best - tolerance:
            return Selection(weights, tuple(order), tuple(rounds), "J fell")
        weights, best = trial, J
        order += added
    return Selection(weights, tuple(order), tuple(rounds), "budget")
