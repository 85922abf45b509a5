"""How candidates join the support, a block at a time, at fresh gains."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a.bilevel.loop import Loop
from u2a.select import WeightSet, matching_pursuit, quadratic_programme, topk
from u2a.solve import Solution


def grow(loop: Loop) -> None:
    """Adds the blocks; ends early when no gain is positive or J fell."""
    step = {
        "greedy": _greedy, "topk": _greedy, "pursuit": _pursuit,
        "quadratic": _quadratic,
    }[loop.plan.growth]  # fmt: skip
    blocks = 1 if loop.plan.growth == "topk" else loop.plan.blocks
    for k in range(blocks):
        scores, solution = loop.gains()
        gain = scores.gain.double().masked_fill(loop.gone, float("-inf"))
        left = loop.plan.budget - int((loop.weights > 0).sum())
        size = min(left, -(-loop.plan.budget // blocks))
        new = step(loop, gain, solution, size, (k + 1) / blocks)
        if new is None:
            loop.stopped = "no positive gain"
            return
        if not loop.settle(f"block {k + 1}", new, scores.gain, solution):
            return


def _greedy(loop: Loop, gain: Tensor, _: Solution, size: int, share: float) -> Tensor | None:
    added = topk(gain.masked_fill(loop.weights > 0, float("-inf")), size, loop.plan.min_gain)
    new = loop.weights.clone()
    new[added] = loop.plan.share
    return new if added else None


def _pursuit(
    loop: Loop, gain: Tensor, solution: Solution, size: int, share: float
) -> Tensor | None:
    open_ = _open(loop, gain, size)
    if not len(open_):
        return None
    found = loop.outer.interactions(loop.weights, solution, inverse=loop.plan.inverse)
    at = open_[:, None], open_
    total = share * loop.plan.total_weight - float(loop.weights.sum())
    chosen = matching_pursuit(gain[open_], found.gram[at], budget=min(size, len(open_)) or 1,
                              total=total)  # fmt: skip
    step = torch.zeros_like(gain)
    step[open_] = chosen.weights.double()
    return _fitted(loop, loop.weights + step, share)


def _quadratic(
    loop: Loop, gain: Tensor, solution: Solution, size: int, share: float
) -> Tensor | None:
    open_ = _open(loop, gain, size)
    if not len(open_):
        return None
    found = loop.outer.interactions(
        loop.weights, solution, inverse=loop.plan.inverse, second_order=True
    )
    assert found.curvature is not None
    w = loop.weights.double()
    q = found.curvature
    # in w rather than in the step: s^T (w - w0) + (w - w0)^T Q (w - w0) / 2
    slope = gain.masked_fill(gain.isinf(), 0.0) - q @ w
    held = torch.zeros_like(gain, dtype=torch.bool)
    held[open_] = True
    held |= w > 0
    at = held.nonzero().flatten()
    into = WeightSet(share * loop.plan.total_weight, loop.plan.largest,
                     int((w > 0).sum()) + size, exact=False)  # fmt: skip
    new = torch.zeros_like(w)
    new[at] = quadratic_programme(slope[at], q[at[:, None], at], into, start=w[at])
    return new.to(loop.weights) if new.any() else None


def _open(loop: Loop, gain: Tensor, size: int) -> Tensor:
    """Candidates that may get weight now: above min_gain; when no room is left, those in."""
    able = gain > loop.plan.min_gain
    return (able if size > 0 else able & (loop.weights > 0)).nonzero().flatten()


def _fitted(loop: Loop, w: Tensor, share: float) -> Tensor:
    """Onto the cap and the budget, keeping the total reached so far."""
    support = w.nonzero().flatten()
    total = min(float(w.sum()), share * loop.plan.total_weight)
    into = WeightSet(min(total, loop.plan.largest * len(support)), loop.plan.largest,
                     loop.plan.budget)  # fmt: skip
    new = torch.zeros_like(w, dtype=torch.float64)
    new[support] = into.project(w[support])
    return new.to(loop.weights)
