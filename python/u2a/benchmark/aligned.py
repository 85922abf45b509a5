"""Preference alignment gained at equal utility, for every selector over the total weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from sklearn.metrics import roc_auc_score

from u2a.benchmark.selectors import chosen
from u2a.benchmark.task import Task
from u2a.tree import trainable


def epoch_seconds(task: Task) -> float:
    """One pass of forward and backward over all candidates: the unit of cost."""
    began = time.perf_counter()
    for part in task.work.problem.with_weights(torch.ones(task.n)).forget_parts():
        torch.autograd.grad(part.value(task.model), list(trainable(task.model).values()))
    return time.perf_counter() - began


def alignment(
    task: Task, totals: Sequence[float], budget: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per total weight and selector: test J gained, retain perplexity, cost, classes."""
    unit, rows = epoch_seconds(task), []
    for total in totals:
        for name in names:
            weights, seconds = chosen(task, name, total, budget)
            task.solve(weights)
            rows.append(
                {
                    "seed": task.seed, "loss": task.loss, "noise": task.noise, "total": total,
                    "selector": name, "support": int((weights > 0).sum()),
                    "epochs": seconds / unit, "shares": task.shares(weights),
                    **asdict(task.outcome()),
                }
            )  # fmt: skip
    return rows


def detection(task: Task) -> list[dict[str, Any]]:
    """AUROC of "is mislabelled" for every estimator's gain (low gain: mislabelled)."""
    from u2a.benchmark.predicted import predictions

    wrong = [k == "mislabelled" for k in task.planted]
    if not any(wrong):
        return []
    return [
        {
            "seed": task.seed, "loss": task.loss, "noise": task.noise, "estimator": name,
            "auroc": float(roc_auc_score(wrong, (-guess.gain).tolist())),
        }
        for name, guess in predictions(task).items()
        if guess.curvature is None
    ]  # fmt: skip


def upper_reference(task: Task, pulls: Sequence[float] = (1.0, 4.0, 16.0)) -> dict[str, Any]:
    """Preference optimisation itself, the best of `pulls`: pull J raised directly on the pairs with
    the same anchor and retain term. What unlearning is compared with, not a selector."""
    best: dict[str, Any] = {"gain": float("-inf")}
    for pull in pulls:
        task.back()
        _raise(task, pull)
        found = asdict(task.outcome()) | {"pull": pull}
        best = max(best, found, key=lambda row: row["gain"])
    return {"seed": task.seed, "loss": task.loss, "noise": task.noise, "selector": "DPO"} | best


def _raise(task: Task, pull: float) -> None:
    params, problem, J = trainable(task.model), task.work.problem, task.outer.objective
    optimizer = torch.optim.LBFGS(
        params.values(), max_iter=150, history_size=20, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = problem.loss_and_grad(task.model)
        for name, g in J.gradient(task.model).items():
            grad = params[name].grad
            params[name].grad = -pull * g if grad is None else grad - pull * g
        return value - pull * J.value(task.model)

    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.zero_grad()
