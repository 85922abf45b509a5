"""Preference alignment gained at equal utility, for every selector over the total weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from u2a.benchmark.selectors import chosen
from u2a.benchmark.task import Task
from u2a.objectives import RowSum
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


def upper_reference(task: Task, steps: int = 60) -> dict[str, Any]:
    """Preference optimisation itself: J raised directly on the pairs, by L-BFGS with the same
    anchor and retain term: what unlearning is compared with, not a selector."""
    task.back()
    _raise(task, task.outer.objective, steps)  # type: ignore[arg-type]
    out = asdict(task.outcome())
    return {"seed": task.seed, "loss": task.loss, "noise": task.noise, "selector": "DPO", **out}


def _raise(task: Task, J: RowSum, steps: int) -> None:
    params = trainable(task.model)
    problem = task.work.problem
    optimizer = torch.optim.LBFGS(
        params.values(), max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.loss_and_grad(task.model)
        for name, g in J.gradient(task.model).items():
            grad = params[name].grad
            params[name].grad = -g if grad is None else grad - g
        return torch.tensor(value - J.value(task.model))

    optimizer.step(closure)  # type: ignore[no-untyped-call]
