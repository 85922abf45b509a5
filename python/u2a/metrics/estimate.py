"""A mean over rows with its standard error; whether two samples are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """`value` over `n` rows; `stderr` is nan where it has none (one row, not a mean)."""

    value: float
    stderr: float
    n: int


def mean(values: Tensor | Sequence[float]) -> Estimate:
    """Mean and s / sqrt(n), s with n - 1 in the denominator. Raises ValueError for no values, or a
    non-finite one."""
    x = torch.as_tensor(values).detach().double().flatten()
    if not len(x):
        raise ValueError("mean: wanted at least one value, got none")
    if not bool(x.isfinite().all()):
        at = int((~x.isfinite()).nonzero()[0])
        raise ValueError(f"mean: value {at} of {len(x)} is {float(x[at])}, wanted finite ones")
    error = float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(float(x.mean()), error, len(x))


def same_distribution(a: Tensor, b: Tensor) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test, `[R]` against `[S]`."""
    return float(stats.ks_2samp(a.double().numpy(), b.double().numpy()).pvalue)
