"""J and its hypergradient at the model's present parameters.

J(theta*(w)), theta*(w) = argmin F(theta, w), has gain_i = dJ/dw_i = -<v, grad l_i>, where
A v = grad J, A = sum_j w_j H_j + mu H_R + lambda I (arXiv 2504.06659; implicit function theorem).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from u2a.batch import Row, row_batches
from u2a.curvature import Damped, EmpiricalFisher, GaussNewton, Hessian, Sum
from u2a.evaluate import perplexity
from u2a.inner import InnerProblem
from u2a.losses import LOSSES
from u2a.objectives import Objective
from u2a.scan import Scores, scan
from u2a.solve import Method, Solution, solve
from u2a.tree import Tree

if TYPE_CHECKING:
    from u2a.interactions import Interactions

Report = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class SolveSettings:
    """As `u2a.solve`. `damping` is added to the anchor lambda: a number, or "rel:x" times the mean
    eigenvalue; "auto" counts the anchor in, and "rel:x" means it where `curvature` is "hessian"."""

    method: Method = "cg"
    curvature: Literal["ggn", "hessian", "fisher"] = "ggn"
    damping: float | str = "rel:0.1"
    precond: str = "none"
    tol: float = 1e-4
    max_iter: int = 100


@dataclass
class Outer:
    """J and its hypergradient at the model's present parameters.

    `problem` is the inner problem (its weights are replaced as the loop goes); `resolve(problem)`
    moves the model to the problem's optimum from where it is and returns facts for the log.
    """

    model: nn.Module
    problem: InnerProblem
    objective: Objective
    validation: Objective
    settings: SolveSettings
    resolve: Callable[[InnerProblem], dict[str, Any]]
    progress: bool = False
    report: Report | None = None

    def value(self, objective: Objective | None = None) -> float:
        """J at the present parameters; higher is better."""
        return (objective or self.objective).value(self.model)

    def retain_perplexity(self) -> float:
        """Of the inner problem's retain rows, pooled; 1 where there are none."""
        p = self.problem
        return perplexity(self.model, p.retain, p.batch_tokens) if p.retain else 1.0

    def gradient(self) -> Tree:
        """grad J over the trainable parameters."""
        return self.objective.gradient(self.model)

    def operator(self, weights: Tensor) -> Sum | None:
        """sum_j w_j H_j + mu H_R at the present parameters, without the damping; None when there is
        neither a weight nor a retain term (method "identity" solves with the damping alone)."""
        make: Any = {"ggn": GaussNewton, "hessian": Hessian, "fisher": EmpiricalFisher}[
            self.settings.curvature
        ]
        p = self.problem
        terms: list[tuple[float, Any]] = []
        if p.retain_weight:
            batches = row_batches(p.retain, p.batch_tokens)
            tokens = torch.tensor([_answers(r) for r in p.retain]) / p.retain_tokens
            terms.append(
                (p.retain_weight, make(self.model, batches, LOSSES["nll"], weights=tokens))
            )
        support = weights.nonzero().flatten().tolist()
        if support:
            batches = p.batches(support)
            terms.append((1.0, make(self.model, batches, p.loss, weights=weights, ref=p.reference)))
        return Sum(terms) if terms else None

    def gains(self, weights: Tensor) -> tuple[Scores, Solution]:
        """gain_i of every candidate at the present parameters, and the solve behind it."""
        s = self.settings
        operator, anchor, damping = self.operator(weights), self.problem.anchor, s.damping
        if operator is None and not isinstance(damping, str):
            damping += anchor
        damped = None if operator is None else Damped(operator, anchor)
        precond = None if s.precond == "none" else s.precond
        solution = solve(
            damped, self.gradient(), method=s.method, damping=damping, precond=precond, tol=s.tol,
            max_iter=s.max_iter,
        )  # fmt: skip
        return self.score(solution.x), solution

    def score(self, v: Tree) -> Scores:
        """gain_i = -<v, grad l_i> for every candidate: one dual forward of the pool."""
        p = self.problem
        scores = scan(self.model, p.batches(), v, p.loss, ref=p.reference, progress=self.progress)
        return replace(scores, uid=[row.uid for row in p.forget])

    def interactions(self, weights: Tensor, solution: Solution, **options: Any) -> Interactions:
        """Inner products of all candidates, and on request the Hessian of J in the weights."""
        from u2a.interactions import interactions

        return interactions(self, weights, solution, **options)

    def say(self, kind: str, **facts: Any) -> None:
        if self.report is not None:
            self.report(kind, facts)


def _answers(row: Row) -> int:
    return len(row) - max(len(row.prompt_ids), 1)
