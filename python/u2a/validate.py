"""Predicted against realised gain: the picture that shows whether the influence estimate holds.

At the optimum of F(theta, 0), single candidates get weight w, the inner problem is solved again
and the change of J is compared with w times the predicted gain. Rank correlation over w tells how
far from zero the linear estimate can be trusted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from u2a.adapter import restore, snapshot
from u2a.evaluate import spearman
from u2a.inner import inner_solve
from u2a.outer import Outer
from u2a.progress import track


def candidates(n: int, count: int, seed: int) -> list[int]:
    """`count` row numbers of n, drawn without looking at anything."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())


def identity_gain(outer: Outer, main: Tensor) -> Tensor:
    """Gains with A = (anchor + damping) I, what public U2A code uses; scaled like `main`."""
    settings = dataclasses.replace(outer.settings, method="identity", precond="none")
    plain = dataclasses.replace(outer, settings=settings)
    return plain.gains(torch.zeros(len(main)))[0].gain


def realised(
    outer: Outer, chosen: Sequence[int], weights: Sequence[float], tol: float, max_iter: int
) -> tuple[list[list[float]], float]:
    """J(theta*(w e_i)) - J(theta*(0)) for every weight (ascending) and candidate, and the largest
    inner gradient left. A solve starts from the candidate's optimum at the smaller weight."""
    start, base = snapshot(outer.model), outer.value()
    states = {i: start for i in chosen}
    rows: list[list[float]] = []
    worst = 0.0
    jobs = [(w, i) for w in weights for i in chosen]
    for w, i in track(jobs, len(jobs), "realised gain", "solves") if outer.progress else jobs:
        if i == chosen[0]:
            rows.append([])
        restore(outer.model, states[i])
        one = torch.zeros(len(outer.problem.forget))
        one[i] = w
        result = inner_solve(outer.model, outer.problem.with_weights(one), tol, max_iter)
        worst = max(worst, result.grad_max)
        states[i] = snapshot(outer.model)
        rows[-1].append(outer.value() - base)
    restore(outer.model, start)
    return rows, worst


def validate(
    outer: Outer,
    gain: dict[str, Tensor],
    *,
    count: int,
    weights: Sequence[float],
    run_weight: float,
    seed: int = 0,
    tol: float = 1e-5,
    max_iter: int = 60,
) -> dict[str, Any]:
    """The "validation" part of metrics.json; `gain`: solver -> gains of all candidates, main one
    first. The model must be at the optimum of F(theta, 0), and is left there."""
    weights = sorted({*weights, run_weight})
    chosen = candidates(len(outer.problem.forget), count, seed)
    changes, worst = realised(outer, chosen, weights, tol, max_iter)
    rho: dict[str, list[float]] = {name: [] for name in gain}
    interval: dict[str, list[tuple[float, float]]] = {name: [] for name in gain}
    for row in changes:
        for name, g in gain.items():
            found = spearman(g[chosen], torch.tensor(row), seed=seed)
            rho[name].append(found.rho)
            interval[name].append((found.low, found.high))
    points = [
        {
            "weight": w,
            "uid": outer.problem.forget[i].uid,
            "planted": str(outer.problem.forget[i].meta.get("planted", "candidate")),
            "realised": change,
            "predicted": {name: float(g[i]) for name, g in gain.items()},
        }
        for w, row in zip(weights, changes, strict=True)
        for i, change in zip(chosen, row, strict=True)
    ]
    return {
        "main": next(iter(gain)),
        "weights": weights,
        "run_weight": run_weight,
        "candidates": len(chosen),
        "spearman": rho,
        "interval": interval,
        "inner_gradient": worst,
        "points": points,
    }
