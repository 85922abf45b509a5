"""Steps of the weights towards larger gains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from u2a.select.base import check_box, check_gain
from u2a.select.sets import WeightSet


def exponentiated_gradient(
    w: Tensor,
    gain: Tensor,
    eta: float,
    total: float,
    cap: float | None = None,
    *,
    compat: str | None = None,
    uids: Sequence[str] | None = None,
) -> Tensor:
    """One mirror-ascent step w_i <- c min(cap/c, w_i exp(eta gain_i)) with sum w = total.

    The entropy mirror step on the capped simplex {0 <= w_i <= cap, sum w = total}, in the log
    domain and exact (no iteration). Rows of weight 0 stay 0. `compat="official"` reproduces the
    authors' sign exp(-eta gain), under which J falls. Returns the dtype and device of `w`.

    Raises ValueError for non-finite gains (named by uid), negative weights, or too small a cap.
    """
    if compat not in (None, "official"):
        raise ValueError(f"exponentiated_gradient: compat must be None or 'official': {compat!r}")
    g = check_gain(gain, len(w), uids, "exponentiated_gradient")
    old = w.detach().double().cpu()
    if not bool((old.isfinite() & (old >= 0)).all()):
        raise ValueError("exponentiated_gradient: weights must be finite and >= 0")
    support = old > 0
    check_box(total, cap, int(support.sum()), "exponentiated_gradient")
    sign = -1.0 if compat == "official" else 1.0
    log = (old.log() + sign * eta * g)[support]
    new = torch.zeros_like(old)
    new[support] = _capped(log, total, cap)
    return new.to(w)


def _capped(log: Tensor, total: float, cap: float | None) -> Tensor:
    """min(cap, c exp(log)) summing to total: the k largest at the cap, k the first that fits."""
    log, order = log.sort(descending=True)
    tail = log.flip(0).logcumsumexp(0).flip(0)
    out = torch.empty_like(log)
    if cap is None:
        out[order] = total * (log - tail[0]).exp()
        return out
    k = torch.arange(len(log), dtype=log.dtype)
    largest = (total - k * cap).clamp_min(0) * (log - tail).exp()
    fits = (largest <= cap * (1 + 1e-12)).nonzero().flatten()
    first = int(fits[0]) if len(fits) else len(log)
    values = torch.full_like(log, cap)
    if first < len(log):
        values[first:] = max(total - first * cap, 0.0) * (log[first:] - tail[first]).exp()
    out[order] = values
    return out


def projected_ascent(w: Tensor, gain: Tensor, eta: float, into: WeightSet) -> Tensor:
    """One step of projected gradient ascent, `into.project(w + eta gain)`, dtype and device of w.

    The Euclidean counterpart of `exponentiated_gradient`: weights of 0 may grow again.
    Raises ValueError for non-finite gains and for an empty set.
    """
    g = check_gain(gain, len(w), None, "projected_ascent")
    return into.project(w.detach().double().cpu() + eta * g).to(w)


def l1_proximal(
    w: Tensor, gain: Tensor, eta: float, alpha: float, cap: float | None = None
) -> Tensor:
    """One proximal step for the penalty alpha sum w over w >= 0: max(w + eta gain - eta alpha, 0),
    at most `cap`. Weights whose gain stays below alpha reach 0 exactly."""
    g = check_gain(gain, len(w), None, "l1_proximal")
    step = (w.detach().double().cpu() + eta * (g - alpha)).clamp(0, cap)
    return step.to(w)


def threshold(gain: Tensor, total: float) -> Tensor:
    """One shot, w_i = total max(0, gain_i) / sum_j max(0, gain_j), float64: the rule of TRACE
    (arXiv 2511.02623). Raises ValueError when no gain is positive."""
    g = check_gain(gain, len(gain), None, "threshold").clamp_min(0)
    check_box(total, None, len(g), "threshold")
    if not g.any():
        raise ValueError(f"threshold: none of {len(g)} gains is positive")
    return total * g / g.sum()
