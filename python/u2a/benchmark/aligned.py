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
