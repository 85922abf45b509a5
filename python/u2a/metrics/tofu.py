"""TOFU: truth ratio, forget quality, model utility. Source: arXiv 2401.06121."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from u2a.metrics.answers import _options
from u2a.metrics.estimate import same_distribution

Mean = Literal["geometric", "arithmetic"]
UTILITY = tuple(
    f"{data}_{what}"
    for data in ("retain", "ra", "wf")
    for what in (
        "Q_A_Prob" if data == "retain" else "Q_A_Prob_normalised",
        "Q_A_ROUGE",
        "Truth_Ratio",
    )
)


def log_truth_ratio(right: Tensor, wrong: Sequence[Tensor], mean: Mean = "geometric") -> Tensor:
    """log(p_wrong / p_right) `[R]` float64, p = exp(lp/|y|) of one answer.

    Args:
        right: `[R]` lp/|y| of the (paraphrased) right answers.
        wrong: of every row the lp/|y| of its perturbed answers, `[W_i]`.
        mean: of the wrong answers' p; "geometric" in the public code, "arithmetic" in the paper.

    A low ratio says that the model prefers the truth. In logarithms, so that nothing overflows; the
    public code divides by p_right + 1e-10.
    """
    _options("truth_ratio", right, wrong)
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f"truth_ratio: mean {mean!r}, wanted 'geometric' or 'arithmetic'")
    if mean == "geometric":
        of_wrong = [w.double().mean() for w in wrong]
    else:
        of_wrong = [w.double().logsumexp(0) - math.log(len(w)) for w in wrong]
    return torch.stack(of_wrong) - right.double()


def truth_ratio(right: Tensor, wrong: Sequence[Tensor], mean: Mean = "geometric") -> Tensor:
    """p_wrong / p_right `[R]`: exp of `log_truth_ratio`."""
    return log_truth_ratio(right, wrong, mean).exp()


def closer_to_one(log_ratio: Tensor) -> Tensor:
    """min(TR, 1/TR) `[R]`, for the forget set: 1 when truth and untruth are equally likely."""
    return (-log_ratio.double().abs()).exp()


def truth_preferred(log_ratio: Tensor) -> Tensor:
    """max(0, 1 - TR) `[R]`, for all other sets: 1 when the truth is certain."""
    return (-torch.expm1(log_ratio.double())).clamp_min(0)


def forget_quality(unlearned: Tensor, retrained: Tensor) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget set
    of the unlearned model and of one trained without that set; high = not to be told apart.

    `[R]`, `[S]`, ratios or their logarithms (the test sees ranks only; also the same for 1/TR).
    Raises ValueError for an empty or non-finite side.
    """
    for name, x in (("unlearned", unlearned), ("retrained", retrained)):
        if x.ndim != 1 or not len(x) or not bool(x.isfinite().all()):
            raise ValueError(f"forget_quality: {name} must be [R >= 1] finite ratios")
    return same_distribution(unlearned, retrained)


def model_utility(values: Mapping[str, float]) -> float:
    """Harmonic mean of the nine numbers {probability, ROUGE, truth ratio} x {retain, real authors,
    world facts}, named as in `UTILITY`; 0 when one of them is.

    Raises ValueError for a missing, unknown, negative or non-finite one.
    """
    odd = sorted(set(UTILITY) ^ set(values))
    if odd:
        raise ValueError(f"model_utility: wanted the nine {', '.join(UTILITY)}; differs in {odd}")
    for name, x in values.items():
        if not (math.isfinite(x) and x >= 0):
            raise ValueError(f"model_utility: {name} must be >= 0 and finite, got {x}")
    if min(values.values()) == 0:
        return 0.0
    return len(values) / sum(1 / x for x in values.values())
