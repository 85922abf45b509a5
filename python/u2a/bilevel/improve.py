"""Weight updates on the support, and the procedure of the authors' public code."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from u2a.adapter import snapshot
from u2a.bilevel.loop import Loop
from u2a.select import (
    WeightSet,
    equal_weights,
    exponentiated_gradient,
    l1_proximal,
    projected_ascent,
    topk,
)


def improve(loop: Loop) -> None:
    """Weight updates on the support."""
    plan = loop.plan
    for k in range(0 if loop.stopped in ("J fell", "retain perplexity") else plan.rounds):
        support = loop.weights > 0
        if not support.any():
            return
        scores, solution = loop.gains()
        gain = scores.gain.double()
        if not loop.settle(f"{plan.update} {k + 1}", _update(loop, gain, k), scores.gain, solution):
            return


def _update(loop: Loop, gain: Tensor, k: int) -> Tensor:
    plan, w = loop.plan, loop.weights
    eta = plan.eta / (k + 1) ** 0.5
    support, total = w > 0, float(w.sum())
    new = torch.zeros_like(w)
    if plan.update == "proximal":
        assert plan.penalty is not None
        step = eta * plan.share / _size(gain[support])
        near = l1_proximal(w[support], gain[support], step, plan.penalty.alpha, plan.largest)
        if near.any():
            new[support] = (
                WeightSet(plan.total_weight, plan.largest, exact=False).project(near).to(w)
            )
        return new
    if plan.penalty is not None:
        gain = gain - plan.penalty.gradient(w)
    centred = gain - gain[support].mean()
    size = _size(centred[support])
    if plan.update == "mirror":
        return exponentiated_gradient(w, gain, eta / size, total, cap=plan.largest)
    into = WeightSet(total, max(plan.largest, total / int(support.sum())))
    step = eta * plan.share / size
    new[support] = projected_ascent(w[support], centred[support], step, into)
    return new


def _size(gain: Tensor) -> float:
    return float(gain.abs().max().clamp_min(1e-30))


def official(loop: Loop) -> None:
    """Stage A: top-k, w = total / k. Stage B: w <- w exp(-eta gain) on the support, mean weight
    as before; gains with A = I, as published. The last weights are the answer: nothing is kept
    from before, nothing ends it early."""
    plan = loop.plan = replace(loop.plan, tolerance=math.inf, max_retain_ratio=math.inf)
    for k in range(1 + plan.rounds):
        scores, solution = loop.gains()
        gain = scores.gain
        if k == 0:
            chosen = topk(gain, plan.budget, float("-inf"))
            new = equal_weights(len(gain), chosen, plan.total_weight)
        else:
            new = exponentiated_gradient(
                loop.weights, gain, plan.eta, plan.total_weight, compat="official"
            )
        loop.settle(f"official {k}", new, gain, solution)
        loop.J, loop.best = loop.records[-1]["J_validation"], new
        loop.state = snapshot(loop.outer.model)
