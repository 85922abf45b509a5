"""Where weights may lie, and what is charged for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from u2a.select.base import check_box, check_gain


@dataclass(frozen=True)
class WeightSet:
    """{w : 0 <= w <= cap, sum w = total, at most `support` of them positive}.

    `cap`, `total` or `support` None: no such bound. `exact=False`: sum w <= total, with no cap the
    L1 ball of nonnegative weights. Names of the field: simplex is `WeightSet(total)`, box is
    `WeightSet(cap=u)`, box with budget `WeightSet(total, cap)`, cardinality `support=k`.

    Raises ValueError for bounds that are not positive, or a set that is empty for `n` weights.
    """

    total: float | None = None
    cap: float | None = None
    support: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        for name in ("total", "cap", "support"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"WeightSet: {name} must be positive and finite, got {value}")

    def project(self, a: Tensor) -> Tensor:
        """Nearest point of the set to `a [n]` (Euclidean), float64.

        w_i = clip(a_i - nu, 0, cap) on the `support` largest entries, which an exchange argument
        shows to be the best ones. Source: Duchi et al. 2008; Kyrillidis et al., arXiv 1206.1529.
        """
        x = check_gain(a, len(a), None, "WeightSet.project")
        out = torch.zeros_like(x)
        kept = x.argsort(descending=True, stable=True)[: self.support]
        top = math.inf if self.cap is None else self.cap
        best = x[kept].clamp(0, top)
        if self.total is not None and (self.exact or float(best.sum()) > self.total):
            check_box(self.total, self.cap, len(kept), "WeightSet.project")
            best = _shifted(x[kept], top, self.total)
        out[kept] = best
        return out


def _shifted(a: Tensor, cap: float, total: float) -> Tensor:
    """clip(a - nu, 0, cap) with sum = total: nu by bisection, then exactly on its free entries."""
    low, high = float(a.min()) - total / len(a), float(a.max())
    if cap < math.inf:
        low = min(low, float(a.min()) - cap)
    for _ in range(100):
        nu = 0.5 * (low + high)
        low, high = (nu, high) if float((a - nu).clamp(0, cap).sum()) > total else (low, nu)
    free = (a > high) & (a - high < cap)
    if free.any():
        full = int((a - high >= cap).sum())
        high = float(a[free].sum() + (cap * full if full else 0.0) - total) / int(free.sum())
    return (a - high).clamp(0, cap)


Kind = Literal["l1", "sqrt", "entropy"]


@dataclass(frozen=True)
class Penalty:
    """alpha Psi(w), subtracted from the outer objective.

    Psi: "l1" sum w; "sqrt" sum sqrt(w + eps), which drives small weights to 0 (the form in the U2A
    authors' code); "entropy" sum w log w, which spreads weights for alpha > 0.
    """

    kind: Kind
    alpha: float
    eps: float = 1e-8

    def value(self, w: Tensor) -> Tensor:
        x = w.double()
        if self.kind == "l1":
            return self.alpha * x.sum()
        if self.kind == "sqrt":
            return self.alpha * (x + self.eps).sqrt().sum()
        return self.alpha * torch.special.xlogy(x, x).sum()

    def gradient(self, w: Tensor) -> Tensor:
        """alpha dPsi/dw, float64; at w = 0 that of "entropy" is taken at eps."""
        x = w.double()
        if self.kind == "l1":
            return torch.full_like(x, self.alpha)
        if self.kind == "sqrt":
            return self.alpha / 2 / (x + self.eps).sqrt()
        return self.alpha * (1 + x.clamp_min(self.eps).log())
