"""The outer problem: choose weights w so that unlearning with them raises J most.

J(theta*(w)), theta*(w) = argmin F(theta, w), has gain_i = dJ/dw_i = -<v, grad l_i>, where
A v = grad J, A = sum_j w_j H_j + mu H_R + lambda I (arXiv 2504.06659; implicit function theorem).
Blocks are added greedily with an inner re-solve between them; then the weights move on the support
by exponentiated gradient. The best state on validation pairs is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from u2a.adapter import reference_logps, restore, snapshot
from u2a.batch import Pair, Row, pair_batches, row_batches
from u2a.curvature import Damped, EmpiricalFisher, GaussNewton, Hessian, Sum
from u2a.evaluate import preference
from u2a.inner import InnerProblem
from u2a.losses import LOSSES, dpo_terms
from u2a.products import gradient
from u2a.scan import Scores, scan
from u2a.select import Selection, block_greedy, exponentiated_gradient
from u2a.solve import Method, Solution, solve
from u2a.tree import Tree

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


@dataclass(frozen=True)
class PairSet:
    """Preference pairs with their reference log-probabilities `[P]` chosen, `[P]` rejected."""

    pairs: Sequence[Pair]
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def build(cls, model: nn.Module, pairs: Sequence[Pair], batch_tokens: int) -> PairSet:
        chosen = reference_logps(model, [p.chosen for p in pairs], batch_tokens)
        rejected = reference_logps(model, [p.rejected for p in pairs], batch_tokens)
        return cls(pairs, chosen, rejected)


@dataclass
class Outer:
    """J and its hypergradient at the model's present parameters.

    `problem` is the inner problem (its weights are replaced as the loop goes); `resolve(problem)`
    moves the model to the problem's optimum from where it is and returns facts for the log.
    """

    model: nn.Module
    problem: InnerProblem
    train: PairSet
    validation: PairSet
    settings: SolveSettings
    resolve: Callable[[InnerProblem], dict[str, Any]]
    beta: float = 0.3
    progress: bool = False
    report: Report | None = None

    def value(self, pairs: PairSet | None = None) -> float:
        """J: mean log sigmoid of beta times the preference margin; higher is better."""
        chosen = self.train if pairs is None else pairs
        return preference(
            self.model, chosen.pairs, (chosen.chosen, chosen.rejected), beta=self.beta,
            batch_tokens=self.problem.batch_tokens,
        ).objective  # fmt: skip

    def gradient(self) -> Tree:
        """grad J over the trainable parameters."""
        batches = pair_batches(self.train.pairs, self.problem.batch_tokens)
        total = len(self.train.pairs)
        ref = [
            torch.cat([self.train.chosen[b.index[:half]], self.train.rejected[b.index[half:]]])
            for b in batches
            for half in [len(b) // 2]
        ]
        ones = torch.ones(total)
        return gradient(self.model, batches, _per_row(self.beta, total), weights=ones, ref=ref)

    def operator(self, weights: Tensor) -> Sum:
        """sum_j w_j H_j + mu H_R at the present parameters, without the damping."""
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
        return Sum(terms)

    def gains(self, weights: Tensor) -> tuple[Scores, Solution]:
        """gain_i of every candidate at the present parameters, and the solve behind it."""
        s = self.settings
        solution = solve(
            Damped(self.operator(weights), self.problem.anchor), self.gradient(), method=s.method,
            damping=s.damping, precond=None if s.precond == "none" else s.precond, tol=s.tol,
            max_iter=s.max_iter,
        )  # fmt: skip
        return self.score(solution.x), solution

    def score(self, v: Tree) -> Scores:
        """gain_i = -<v, grad l_i> for every candidate: one dual forward of the pool."""
        p = self.problem
        scores = scan(self.model, p.batches(), v, p.loss, ref=p.reference, progress=self.progress)
        return replace(scores, uid=[row.uid for row in p.forget])

    def say(self, kind: str, **facts: Any) -> None:
        if self.report is not None:
            self.report(kind, facts)


def _answers(row: Row) -> int:
    return len(row) - max(len(row.prompt_ids), 1)


def _per_row(beta: float, pairs: int) -> Callable[..., Tensor]:
    """J with one value per row: each pair's term / P on its chosen row, 0 on the other."""

    def loss(lp: Any) -> Tensor:
        terms = dpo_terms(lp, beta) / pairs
        return torch.cat([terms, torch.zeros_like(terms)])

    return loss


@dataclass
class Bilevel:
    """Result: `weights [n]`, gains of the first scan, one record per round, J before and after."""

    weights: Tensor
    gain: Tensor
    rounds: list[dict[str, Any]] = field(default_factory=list)
    J_start: float = 0.0
    J_best: float = 0.0
    stopped: str = ""


def bilevel(
    outer: Outer,
    *,
    budget: int,
    blocks: int,
    total_weight: float,
    min_gain: float = 0.0,
    mirror_steps: int = 0,
    eta: float = 1.0,
    cap: float | None = None,
) -> Bilevel:
    """Greedy blocks with inner re-solve, then exponentiated-gradient rounds; keeps the best by J.

    The model must be at the optimum of F(theta, 0); it ends at that for the returned weights.

    Args:
        budget: most candidates in the support; every block adds budget / blocks of them.
        total_weight: sum of the weights when the support is full, equal shares while it grows.
        min_gain: candidates at or below it are never added.
        mirror_steps, eta: exponentiated-gradient rounds on the support; the step is
            eta / max |gain - mean gain|, so eta is the largest change of a log-weight per round.
        cap: largest weight of one candidate (default: 4 times the equal share).

    Raises ValueError for a budget, block count or weight out of range.
    """
    n = len(outer.problem.forget)
    if not 1 <= budget <= n:
        raise ValueError(f"bilevel: budget must be in [1, {n}] (candidates), got {budget}")
    keeper = _Keeper(outer)
    selection = _greedy(outer, keeper, budget, blocks, total_weight / budget, min_gain)
    weights = selection.weights
    share_cap = cap if cap is not None else 4 * total_weight / budget
    for k in range(mirror_steps if weights.any() else 0):
        scores, solution = outer.gains(weights)
        total = float(weights.sum())
        centred = scores.gain - scores.gain[weights > 0].mean()
        step = eta / float(centred[weights > 0].abs().max().clamp_min(1e-30))
        weights = exponentiated_gradient(weights, scores.gain, step, total, cap=share_cap)
        facts = outer.resolve(outer.problem.with_weights(weights))
        keeper.record(f"mirror {k + 1}", weights, scores.gain, solution, 0, facts)
    restore(outer.model, keeper.state)
    return Bilevel(
        keeper.weights,
        keeper.first,
        keeper.rounds,
        keeper.rounds[0]["J"],
        keeper.J,
        selection.stopped,
    )


def _greedy(
    outer: Outer, keeper: _Keeper, budget: int, blocks: int, share: float, min_gain: float
) -> Selection:
    last: list[Any] = []

    def gain_fn(weights: Tensor) -> Tensor:
        scores, solution = outer.gains(weights)
        last[:] = [scores.gain, solution]
        keeper.first = scores.gain if keeper.first.numel() == 0 else keeper.first
        return scores.gain

    def resolve_fn(weights: Tensor) -> float:
        facts = outer.resolve(outer.problem.with_weights(weights))
        added = int((weights > 0).sum() - (keeper.last > 0).sum())
        return keeper.record(f"block {len(keeper.rounds)}", weights, last[0], last[1], added, facts)

    return block_greedy(
        gain_fn, resolve_fn, n=len(outer.problem.forget), budget=budget, blocks=blocks,
        weight=share, min_gain=min_gain,
        start=keeper.rounds[0]["J"],
    )  # fmt: skip


class _Keeper:
    """Logs every round and holds the best state by J on validation pairs."""

    def __init__(self, outer: Outer) -> None:
        self.outer = outer
        self.rounds: list[dict[str, Any]] = []
        self.last = self.weights = torch.zeros(len(outer.problem.forget))
        self.first = torch.zeros(0)
        self.state = snapshot(outer.model)
        self.J = outer.value(outer.validation)
        self.rounds.append({"round": "start", "support": 0, "added": 0} | self._values(self.J))

    def _values(self, validation: float) -> dict[str, float]:
        return {"J": self.outer.value(), "J_validation": validation}

    def record(
        self,
        name: str,
        weights: Tensor,
        gain: Tensor,
        solution: Solution,
        added: int,
        facts: dict[str, Any],
    ) -> float:
        """Returns J after the round on the pairs it is maximised on."""
        validation = self.outer.value(self.outer.validation)
        predicted = float(((weights - self.last) * gain).sum())
        row = {"round": name, "support": int((weights > 0).sum()), "added": added}
        row |= self._values(validation)
        row |= {
            "predicted": predicted,
            "realised": row["J"] - self.rounds[-1]["J"],
            "positive": float((gain > 0).float().mean()),
            "residual": solution.residual,
            "iterations": solution.iterations,
            "negative_curvature": solution.negative_curvature,
            "damping": solution.damping,
            "solve": solution.note,
        }
        self.rounds.append(row | facts)
        self.outer.say("round", **self.rounds[-1])
        if validation > self.J:
            self.J, self.weights, self.state = (
                validation,
                weights.clone(),
                snapshot(self.outer.model),
            )
        self.last = weights.clone()
        return self.rounds[-1]["J"]
