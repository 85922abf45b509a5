"""Which candidates to unlearn and how much: selectors and weight updates on plain tensors.

A gain is dJ/dw_i: larger is better, so weights grow with it (the U2A authors' public code
reverses the sign of the multiplicative update, available as compat="official").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Round:
    """One block: the candidates added, their gains when added, J measured after the re-solve."""

    added: tuple[int, ...]
    gain: tuple[float, ...]
    J: float | None


@dataclass(frozen=True)
class Selection:
    """`weights [n]` (0 off the support), `order` of selection, one Round per block, and why it
    `stopped`: "budget", "no positive gain", "J fell"."""

    weights: Tensor
    order: tuple[int, ...]
    rounds: tuple[Round, ...] = field(default=())
    stopped: str = "budget"


def _check_gain(gain: Tensor, n: int, uids: Sequence[str] | None, op: str) -> Tensor:
    if gain.shape != (n,):
        raise ValueError(f"{op}: scores wanted shape [{n}], got {list(gain.shape)}")
    bad = (~gain.isfinite()).nonzero().flatten().tolist()
    if bad:
        names = [f"uid {uids[i]}" if uids else f"row {i}" for i in bad[:3]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"{op}: scores are not finite at {', '.join(names)}{more}")
    return gain.detach().double().cpu()


def _check_budget(budget: int, n: int, op: str) -> int:
    if not 1 <= budget <= n:
        raise ValueError(f"{op}: budget must be in [1, {n}] (candidates), got {budget}")
    return budget


def _check_box(total: float, cap: float | None, room: int, op: str) -> None:
    if not 0 < total < float("inf"):
        raise ValueError(f"{op}: total weight must be positive and finite, got {total}")
    if cap is not None and not cap * room >= total * (1 - 1e-12):
        raise ValueError(
            f"{op}: {room} rows of at most cap {cap:g} hold {cap * room:g}, wanted total {total:g}"
        )


def topk(gain: Tensor, budget: int, min_gain: float = 0.0) -> list[int]:
    """Up to `budget` rows of largest gain above `min_gain`, best first; ties by row number."""
    _check_budget(budget, len(gain), "topk")
    order = gain.argsort(descending=True, stable=True)[:budget]
    return [i for i in order.tolist() if gain[i] > min_gain]


def random_k(n: int, budget: int, seed: int = 0) -> list[int]:
    """`budget` rows drawn without replacement, the same for a seed on every machine."""
    _check_budget(budget, n, "random_k")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:budget].tolist()


def low_likelihood_k(nll: Tensor, budget: int) -> list[int]:
    """The `budget` rows the model finds least likely (largest mean NLL per answer token)."""
    return topk(nll, budget, float("-inf"))


def equal_weights(n: int, index: Sequence[int], total: float) -> Tensor:
    """`[n]` float32: total / len(index) on `index`, 0 elsewhere."""
    weights = torch.zeros(n)
    if index:
        weights[torch.tensor(list(index))] = total / len(index)
    return weights


def uniform(n: int, total: float = 1.0) -> Tensor:
    """`[n]` float32, total / n each."""
    return equal_weights(n, range(n), total)


def project_box_budget(a: Tensor, cap: float, total: float) -> Tensor:
    """Euclidean projection of `a [n]` onto {0 <= w <= cap, sum w = total}.

    w_i = clip(a_i - nu, 0, cap), nu by bisection on [min a - cap, max a]. Raises ValueError when
    n cap < total.
    """
    a = _check_gain(a, len(a), None, "project_box_budget")
    _check_box(total, cap, len(a), "project_box_budget")
    low, high = float(a.min()) - cap, float(a.max())
    for _ in range(200):
        nu = 0.5 * (low + high)
        if float((a - nu).clamp(0, cap).sum()) > total:
            low = nu
        else:
            high = nu
    return (a - high).clamp(0, cap)


def exponentiated_gradient(
    w: Tensor,
    gain: Tensor,
    eta: float,
    total: float,
    cap: float | None = None,
    *,
    compat: str | None = None,
    uids: Sequence[str] | None = None,
) -> Tensor:
    """One mirror-ascent step w_i <- c min(cap/c, w_i exp(eta gain_i)) with sum w = total.

    The entropy mirror step on the capped simplex {0 <= w_i <= cap, sum w = total}, in the log
    domain and exact (no iteration). Rows of weight 0 stay 0. `compat="official"` reproduces the
    authors' sign exp(-eta gain), under which J falls. Returns the dtype and device of `w`.

    Raises ValueError for non-finite gains (named by uid), negative weights, or too small a cap.
    """
    if compat not in (None, "official"):
        raise ValueError(f"exponentiated_gradient: compat must be None or 'official': {compat!r}")
    g = _check_gain(gain, len(w), uids, "exponentiated_gradient")
    old = w.detach().double().cpu()
    if not bool((old.isfinite() & (old >= 0)).all()):
        raise ValueError("exponentiated_gradient: weights must be finite and >= 0")
    support = old > 0
    _check_box(total, cap, int(support.sum()), "exponentiated_gradient")
    sign = -1.0 if compat == "official" else 1.0
    log = (old.log() + sign * eta * g)[support]
    new = torch.zeros_like(old)
    new[support] = _capped(log, total, cap)
    return new.to(w)


def _capped(log: Tensor, total: float, cap: float | None) -> Tensor:
    """min(cap, c exp(log)) summing to total: the k largest at the cap, k the first that fits."""
    log, order = log.sort(descending=True)
    tail = log.flip(0).logcumsumexp(0).flip(0)
    out = torch.empty_like(log)
    if cap is None:
        out[order] = total * (log - tail[0]).exp()
        return out
    k = torch.arange(len(log), dtype=log.dtype)
    largest = (total - k * cap).clamp_min(0) * (log - tail).exp()
    fits = (largest <= cap * (1 + 1e-12)).nonzero().flatten()
    first = int(fits[0]) if len(fits) else len(log)
    values = torch.full_like(log, cap)
    if first < len(log):
        values[first:] = max(total - first * cap, 0.0) * (log[first:] - tail[first]).exp()
    out[order] = values
    return out


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
    _check_budget(budget, n, "block_greedy")
    if not 1 <= blocks <= budget:
        raise ValueError(f"block_greedy: blocks must be in [1, {budget}] (budget), got {blocks}")
    _check_box(weight, None, n, "block_greedy")
    size = -(-budget // blocks)
    weights, order, rounds, best = torch.zeros(n), list[int](), list[Round](), start
    while len(order) < budget:
        gain = _check_gain(gain_fn(weights), n, None, "block_greedy")
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
    _check_budget(budget, n, "select")
    _check_box(total_weight, None, n, "select")
    if method == "uniform":
        order = list(range(n))
    elif method == "random":
        order = random_k(n, budget, seed)
    else:
        checked = _check_gain(scores, n, uids, "select")
        floor = min_gain if method == "topk" else float("-inf")
        order = topk(checked, budget, floor)
        if not order:
            raise ValueError(f"select: none of {n} gains is above min_gain {min_gain:g}")
    return Selection(equal_weights(n, order, total_weight), tuple(order))
