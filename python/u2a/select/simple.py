"""Selectors that rank once, with equal weights on what they name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from u2a.select.base import Selection, check_box, check_budget, check_gain


def topk(gain: Tensor, budget: int, min_gain: float = 0.0) -> list[int]:
    """Up to `budget` rows of largest gain above `min_gain`, best first; ties by row number."""
    check_budget(budget, len(gain), "topk")
    order = gain.argsort(descending=True, stable=True)[:budget]
    return [i for i in order.tolist() if gain[i] > min_gain]


def random_k(n: int, budget: int, seed: int = 0) -> list[int]:
    """`budget` rows drawn without replacement, the same for a seed on every machine."""
    check_budget(budget, n, "random_k")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:budget].tolist()


def low_likelihood_k(nll: Tensor, budget: int) -> list[int]:
    """The `budget` rows the model finds least likely (largest mean NLL per answer token)."""
    return topk(nll, budget, float("-inf"))


def low_reward_k(reward: Tensor, budget: int) -> list[int]:
    """The `budget` rows of smallest reward, the smallest first; ties by row number."""
    return topk(-reward, budget, float("-inf"))


def equal_weights(n: int, index: Sequence[int], total: float) -> Tensor:
    """`[n]` float32: total / len(index) on `index`, 0 elsewhere."""
    weights = torch.zeros(n)
    if index:
        weights[torch.tensor(list(index))] = total / len(index)
    return weights


def uniform(n: int, total: float = 1.0) -> Tensor:
    """`[n]` float32, total / n each."""
    return equal_weights(n, range(n), total)


METHODS = ("topk", "uniform", "random", "low-likelihood")


def select(
    scores: Tensor,
    *,
    method: str = "topk",
    budget: int,
    total_weight: float = 1.0,
    min_gain: float = 0.0,
    uids: Sequence[str] | None = None,
    seed: int = 0,
) -> Selection:
    """One-shot selection with equal weights summing to `total_weight`.

    Args:
        scores: `[n]` gains for "topk"; mean NLL per token for "low-likelihood"; only its length
            counts for "random" (`budget` rows) and "uniform" (every row, whatever the budget).
        uids: names for messages.

    Top-k takes near-duplicates together and can lose to uniform: `u2a.bilevel`
    re-solves between blocks. Raises ValueError for an unknown method, a budget outside [1, n],
    non-finite scores (named), or no gain above `min_gain`.
    """
    n = len(scores)
    if method not in METHODS:
        raise ValueError(f"select: method must be one of {', '.join(METHODS)}; got {method!r}")
    check_budget(budget, n, "select")
    check_box(total_weight, None, n, "select")
    if method == "uniform":
        order = list(range(n))
    elif method == "random":
        order = random_k(n, budget, seed)
    else:
        checked = check_gain(scores, n, uids, "select")
        floor = min_gain if method == "topk" else float("-inf")
        order = topk(checked, budget, floor)
        if not order:
            raise ValueError(f"select: none of {n} gains is above min_gain {min_gain:g}")
    return Selection(equal_weights(n, order, total_weight), tuple(order))
