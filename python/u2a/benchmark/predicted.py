"""Predicted against realised gain, single candidates and groups, for every estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from u2a.benchmark.task import Task
from u2a.evaluate import spearman
from u2a.interactions import interactions
from u2a.outer import SolveSettings
from u2a.select import sketch_gain, uniform
from u2a.validate import candidates

SOLVERS: dict[str, SolveSettings] = {
    "identity": SolveSettings("identity", "ggn", 0.0),
    "diagonal": SolveSettings("diagonal", "ggn", 0.0),
    "kfac": SolveSettings("kfac", "ggn", 0.0),
    "ekfac": SolveSettings("ekfac", "ggn", 0.0),
    "datainf": SolveSettings("datainf", "fisher", 0.0),
    "ggn": SolveSettings("cg", "ggn", 0.0, tol=1e-4, max_iter=300),
    "hessian": SolveSettings("minres", "hessian", 0.0, tol=1e-4, max_iter=300),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """J(theta*(w)) - J ~ gain.w + w.curvature.w / 2."""

    gain: Tensor
    curvature: Tensor | None = None

    def of(self, w: Tensor) -> float:
        value = float(self.gain.double() @ w.double())
        if self.curvature is not None:
            value += float(w.double() @ self.curvature @ w.double()) / 2
        return value


def predictions(task: Task) -> dict[str, Prediction]:
    """Every estimator at theta*(0)."""
    outer, zero = task.outer, torch.zeros(task.n)
    found: dict[str, Prediction] = {}
    for name, settings in SOLVERS.items():
        scores, solution = dataclasses.replace(outer, settings=settings).gains(zero)
        found[name] = Prediction(scores.gain)
        if name == "ggn":
            both = interactions(outer, zero, solution, inverse="ekfac", second_order=True)
            found["second order"] = Prediction(scores.gain, both.curvature)
    found["sketch index"] = Prediction(sketch_gain(outer, task.work.data.pa))
    return found


def designs(n: int, seed: int, singles: int, groups: dict[int, int]) -> dict[str, list[list[int]]]:
    """Sets of candidates to unlearn, drawn without looking: singles, and `count` groups of each
    `size`."""
    draw = torch.Generator().manual_seed(seed)
    found = {"single": [[i] for i in candidates(n, singles, seed)]}
    for size, count in groups.items():
        found[f"group of {size}"] = [
            torch.randperm(n, generator=draw)[:size].tolist() for _ in range(count)
        ]
    return found


def realised(
    task: Task, sets: Sequence[list[int]], weight: float
) -> tuple[list[Tensor], list[float]]:
    """The weights `[n]` of each set and J(theta*(w)) - J(theta*(0)) on the pairs that J is for."""
    base, ws, changes = task.outer.value(), [], []
    for chosen in sets:
        w = torch.zeros(task.n)
        w[chosen] = weight
        task.solve(w, tol=1e-7, max_iter=200)
        ws.append(w)
        changes.append(task.outer.value() - base)
    task.back()
    return ws, changes


def relinearised(task: Task, total: float) -> dict[str, Prediction]:
    """Gains at theta*(w), w uniform of this total: where groups of that total lie around, and what
    the loop uses, which scores afresh at the weights so far."""
    at = uniform(task.n, total)
    task.solve(at)
    found = {}
    for name in ("identity", "ggn", "hessian"):
        outer = dataclasses.replace(task.outer, settings=SOLVERS[name])
        scores, solution = outer.gains(at)
        found[f"{name}, re-linearised"] = Prediction(scores.gain)
        if name == "ggn":
            both = interactions(outer, at, solution, inverse="ekfac", second_order=True)
            assert both.curvature is not None
            slope = scores.gain.double() - both.curvature @ at.double()  # in w, not in w - at
            found["second order, re-linearised"] = Prediction(slope, both.curvature)
    task.back()
    return found


def predicted_against_realised(
    task: Task, weights: Sequence[float], singles: int, groups: dict[int, int]
) -> list[dict[str, Any]]:
    """A row per design, weight of each member and estimator: Spearman with its interval. For groups
    it is the linear datamodelling score (arXiv 2303.14186)."""
    at_start, rows = predictions(task), []
    for design, sets in designs(task.n, task.seed, singles, groups).items():
        for weight in weights:
            ws, changes = realised(task, sets, weight)
            guesses = at_start
            if len(sets[0]) > 1:
                guesses = at_start | relinearised(task, len(sets[0]) * weight)
            for name, guess in guesses.items():
                rho = spearman([guess.of(w) for w in ws], changes, seed=task.seed)
                rows.append(
                    {
                        "seed": task.seed, "loss": task.loss, "design": design, "weight": weight,
                        "estimator": name, "rho": rho.rho, "low": rho.low, "high": rho.high,
                    }
                )  # fmt: skip
    return rows
