"""The settings of the outer loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from u2a.interactions import Inverse
from u2a.select import Penalty

Growth = Literal["greedy", "pursuit", "quadratic", "topk", "official"]
Update = Literal["mirror", "projected", "proximal"]
Finished = Callable[[Any, list[Any]], Tensor]


@dataclass(frozen=True)
class Plan:
    """What `bilevel` does.

    Args:
        budget: most candidates in the support; total_weight: sum of the weights when all `blocks`
            have been added, total_weight / blocks with each.
        growth: how a block of ceil(budget / blocks) candidates joins. "greedy": those of largest
            gain, equal weights. "pursuit": `matching_pursuit` on gains and inner products, so that
            near-duplicates share one weight; candidates already in may get more. "quadratic": the
            maximum of the quadratic model of J (Hessian products of every candidate: small pools).
            "topk": everything at once, equal weights. "official": the authors' public code, top-k
            by grad J . grad l with A = I, then updates with its reversed sign.
        inverse: of A inside "pursuit" and "quadratic"; see `u2a.interactions`.
        min_gain: candidates at or below it never join.
        rounds, update, eta: weight updates on the support after growth; "mirror": exponentiated
            gradient, eta the largest change of a log-weight; "projected": projected ascent, eta the
            largest change as a share of the equal weight; "proximal": the same ascent, but the
            total may fall: an "l1" penalty is taken as its proximal step, which sets weights whose
            gain is below alpha to 0. Round k takes eta / sqrt(k).
        cap: largest weight of one candidate (default 4 times the equal share).
        penalty: subtracted from J in the updates.
        tolerance: the loop ends when J has fallen by more than this since the last round; the
            weights of that round are dropped.
        max_retain_ratio: bound on the perplexity of the retain rows, times what it was at the
            start. A round beyond it is judged, and kept, as the model mixed back to it
            (`u2a.mixing`); the loop ends when such a round is no better than the best before.
        finished: (model, rows) -> bool per row; rows that are unlearnt far enough leave the support
            for good after a round (early exit per example, arXiv 2407.20271).
    """

    budget: int
    total_weight: float
    blocks: int = 4
    growth: Growth = "greedy"
    inverse: Inverse = "ekfac"
    min_gain: float = 0.0
    rounds: int = 0
    update: Update = "mirror"
    eta: float = 1.0
    cap: float | None = None
    penalty: Penalty | None = None
    tolerance: float = float("inf")
    max_retain_ratio: float = float("inf")
    finished: Finished | None = None

    def __post_init__(self) -> None:
        if self.growth not in get_args(Growth):
            raise ValueError(f"bilevel: growth must be one of {get_args(Growth)}: {self.growth!r}")
        if self.update not in get_args(Update):
            raise ValueError(f"bilevel: update must be one of {get_args(Update)}: {self.update!r}")
        if self.update == "proximal" and (self.penalty is None or self.penalty.kind != "l1"):
            raise ValueError(f"bilevel: update 'proximal' needs an l1 penalty, got {self.penalty}")
        if not 1 <= self.blocks <= self.budget:
            raise ValueError(f"bilevel: blocks must be in [1, {self.budget}], got {self.blocks}")
        if not self.max_retain_ratio > 1:
            raise ValueError(f"bilevel: max_retain_ratio must be > 1, got {self.max_retain_ratio}")
        if not self.total_weight > 0:
            raise ValueError(f"bilevel: total_weight must be > 0, got {self.total_weight}")

    @property
    def share(self) -> float:
        return self.total_weight / self.budget

    @property
    def largest(self) -> float:
        return 4 * self.share if self.cap is None else self.cap
