"""The state of the outer loop: weights so far, a record per round, the best state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u2a.adapter import restore, snapshot
from u2a.bilevel.plan import Plan
from u2a.mixing import mix_back
from u2a.outer import Outer
from u2a.scan import Scores
from u2a.solve import Solution


class Loop:
    """The weights so far, a record per round, and the best state by J on validation data, each
    judged within the bound on retain perplexity."""

    def __init__(self, outer: Outer, plan: Plan) -> None:
        self.outer, self.plan = outer, plan
        n = len(outer.problem.forget)
        self.weights = self.best = torch.zeros(n)
        self.first = torch.zeros(0)
        self.gone = torch.zeros(n, dtype=torch.bool)
        self.start = self.state = snapshot(outer.model)
        self.stopped = "budget"
        self.records: list[dict[str, Any]] = []
        self.retained = outer.retain_perplexity()
        values = self._values()
        self.J = values["J_validation"]
        self.records.append({"round": "start", "support": 0, "added": 0, **values})

    def _values(self) -> dict[str, float]:
        outer = self.outer
        return {
            "J": outer.value(),
            "J_validation": outer.value(outer.validation),
            "retain_ratio": outer.retain_perplexity() / self.retained,
        }

    def gains(self) -> tuple[Scores, Solution]:
        scores, solution = self.outer.gains(self.weights)
        self.first = scores.gain if not self.first.numel() else self.first
        return scores, solution

    def settle(self, name: str, new: Tensor, gain: Tensor, solution: Solution) -> bool:
        """Inner solve for the weights and a record of the round; False when the loop must end."""
        outer, before = self.outer, self.weights
        facts = outer.resolve(outer.problem.with_weights(new))
        values = self._values()
        mix, J, state = self._within(values)
        row = {
            "round": name,
            "support": int((new > 0).sum()),
            "effective_support": float(new.sum() ** 2 / new.square().sum()) if new.any() else 0.0,
            "added": int(((new > 0) & ~(before > 0)).sum()),
            **values,
            "mix": mix,
            "J_within": J,
            "predicted": float(((new - before) * gain).sum()),
            "realised": values["J"] - self.records[-1]["J"],
            "positive": float((gain > 0).float().mean()),
            "residual": solution.residual,
            "iterations": solution.iterations,
            "negative_curvature": solution.negative_curvature,
            "damping": solution.damping,
            "solve": solution.note,
            **facts,
        }
        self.records.append(row)
        outer.say("round", **row)
        if J > self.J:
            self.J, self.best, self.state = J, new.clone(), state
        elif mix < 1:
            self.stopped = "retain perplexity"
            return False
        if not row["realised"] >= -self.plan.tolerance:
            self.stopped = "J fell"
            return False
        self.weights = self._leave(new)
        return True

    def _within(self, values: dict[str, float]) -> tuple[float, float, dict[str, Tensor]]:
        """(a, J on validation data, state) mixed back to the bound; the model stays as it is."""
        outer, end = self.outer, snapshot(self.outer.model)
        if values["retain_ratio"] <= self.plan.max_retain_ratio:
            return 1.0, values["J_validation"], end
        a = mix_back(outer.model, self.start, outer.retain_perplexity, self.plan.max_retain_ratio)
        J, state = outer.value(outer.validation), snapshot(outer.model)
        restore(outer.model, end)
        return a, J, state

    def _leave(self, weights: Tensor) -> Tensor:
        """Without the rows that are finished."""
        support = weights.nonzero().flatten().tolist()
        if self.plan.finished is None or not support:
            return weights
        rows = [self.outer.problem.forget[i] for i in support]
        done = self.plan.finished(self.outer.model, rows).bool().cpu()
        gone = torch.tensor(support)[done]
        if len(gone):
            self.gone[gone] = True
            self.records[-1]["left"] = len(gone)
        kept = weights.clone()
        kept[gone] = 0
        return kept
