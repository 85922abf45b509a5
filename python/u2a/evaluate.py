"""Measurements: preference alignment, perplexity, forgetting, win rate, rank correlation.

All model numbers come from answer log-probabilities, batched, without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from u2a.adapter import evaluating, sequence_logps
from u2a.batch import Pair, Row, row_batches
from u2a.products import answer_logps


@dataclass(frozen=True)
class Preference:
    """`objective` J = mean of `terms`; `accuracy` = share of margins > 0; `order_accuracy` = share
    with lp(chosen) > lp(rejected), no reference. `margins [P]` and `terms [P]` = log sigmoid(beta
    margin) are float64 on the CPU."""

    objective: float
    accuracy: float
    order_accuracy: float
    mean_margin: float
    margins: Tensor
    terms: Tensor


def preference(
    model: nn.Module,
    pairs: Sequence[Pair],
    ref: tuple[Tensor, Tensor],
    *,
    beta: float = 0.3,
    batch_tokens: int = 8192,
) -> Preference:
    """DPO margins of `pairs`; `ref` = reference log-probabilities (chosen [P], rejected [P]).

    At the reference itself every margin is 0: J = -log 2 and accuracy 0. Raises ValueError for no
    pairs or references of another length.
    """
    if not pairs:
        raise ValueError("preference: pairs must hold at least one Pair, got none")
    for name, values in zip(("chosen", "rejected"), ref, strict=True):
        if values.shape != (len(pairs),):
            raise ValueError(
                f"preference: ref {name} wanted [{len(pairs)}], got {list(values.shape)}"
            )
    chosen = sequence_logps(model, [p.chosen for p in pairs], batch_tokens).double()
    rejected = sequence_logps(model, [p.rejected for p in pairs], batch_tokens).double()
    margins = chosen - ref[0].to(chosen) - (rejected - ref[1].to(chosen))
    terms = F.logsigmoid(beta * margins)
    return Preference(
        float(terms.mean()),
        float((margins > 0).double().mean()),
        float((chosen > rejected).double().mean()),
        float(margins.mean()),
        margins.cpu(),
        terms.cpu(),
    )


def token_nll(
    model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192
) -> tuple[Tensor, Tensor]:
    """(summed NLL `[n]` float64, answer tokens `[n]` int64) per row, on the CPU."""
    nll = torch.zeros(len(rows), dtype=torch.float64)
    count = torch.zeros(len(rows), dtype=torch.int64)
    with evaluating(model):
        for batch in row_batches(rows, batch_tokens):
            lp = answer_logps(model, batch)
            nll[batch.index] = -lp.sequence().double().cpu()
            count[batch.index] = lp.count.cpu()
    return nll, count


def mean_nll(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> Tensor:
    """Mean NLL per answer token of each row, `[n]` float64: what low-likelihood-k ranks by."""
    nll, count = token_nll(model, rows, batch_tokens)
    return nll / count.clamp_min(1)


def forget_nll(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> float:
    """Pooled NLL per answer token, sum NLL / sum tokens; grows as rows are forgotten."""
    nll, count = token_nll(model, rows, batch_tokens)
    if not count.sum():
        raise ValueError(f"forget_nll: {len(rows)} rows hold no answer token")
    return float(nll.sum() / count.sum())


def perplexity(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> float:
    """exp(sum NLL / sum tokens), pooled over the answer tokens of all rows; inf on overflow."""
    mean = forget_nll(model, rows, batch_tokens)
    return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


def win_rate(wins: int, ties: int, n: int, confidence: float = 0.95) -> Interval:
    """(wins + ties/2) / n with the Wilson score interval; ValueError for impossible counts."""
    if not (n > 0 and wins >= 0 and ties >= 0 and wins + ties <= n):
        raise ValueError(f"win_rate: wanted 0 <= wins + ties <= n, got {wins} + {ties} of {n}")
    p, z = (wins + ties / 2) / n, float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(centre - half, 0.0), min(centre + half, 1.0))


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of `n` pairs with a bootstrap 95% percentile interval."""

    rho: float
    low: float
    high: float
    n: int


def spearman(
    x: Tensor | Sequence[float],
    y: Tensor | Sequence[float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Rank correlation of predicted and realised gains.

    Raises ValueError for fewer than 3 pairs, unequal lengths, non-finite or constant values.
    """
    a, b = (np.asarray(torch.as_tensor(v).detach().cpu().double()) for v in (x, y))
    if a.shape != b.shape or a.ndim != 1 or len(a) < 3:
        raise ValueError(f"spearman: wanted two [n >= 3] vectors, got {a.shape} and {b.shape}")
    for name, v in (("x", a), ("y", b)):
        if not np.isfinite(v).all() or np.ptp(v) == 0:
            raise ValueError(f"spearman: {name} must be finite and not constant")
    pick = np.random.default_rng(seed).integers(len(a), size=(resamples, len(a)))
    ranks = [stats.rankdata(v[pick], axis=1) for v in (a, b)]
    ranks = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    spread = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    draws = (ranks[0] * ranks[1]).sum(1)[spread > 0] / spread[spread > 0]
    low, high = np.quantile(draws, [0.025, 0.975])
    rho = stats.spearmanr(a, b).statistic
    return Correlation(float(rho), float(low), float(high), len(a))
