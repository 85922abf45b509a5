"""Selection with interactions: J(w) - J(0) ~ s^T w + w^T Q w / 2 over a set of weights.

s are the gains at w = 0 and Q the Hessian of J in the weights (`u2a.interactions`). A matching
pursuit is the case Q = -K / c with K the Gram matrix of the candidates' gradients: it looks for the
weighted sum of gradients nearest to c grad J, so that near-duplicates share one weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a.select.base import Round, Selection, check_budget, check_gain
from u2a.select.sets import WeightSet

STEPS = 2000


def best_single_weight(gain: Tensor, bend: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(w_i*, J gained), `[n]` float64: the best weight in [0, cap] of every candidate alone.

    J_i(w) - J(0) = gain_i w + bend_i w^2 / 2, so w* = -gain / bend where the bracket is concave,
    else the better end. `bend` is the diagonal of Q.
    """
    s = check_gain(gain, len(gain), None, "best_single_weight")
    q = check_gain(bend, len(gain), None, "best_single_weight")
    inner = torch.where(q < 0, -s / q, torch.full_like(s, cap)).clamp(0, cap)
    at = torch.stack([torch.zeros_like(s), inner, torch.full_like(s, cap)])
    value = s * at + q * at**2 / 2
    best = value.argmax(0, keepdim=True)
    return at.gather(0, best)[0], value.gather(0, best)[0]


def quadratic_programme(
    gain: Tensor,
    Q: Tensor,
    into: WeightSet,
    *,
    alpha: float = 0.0,
    start: Tensor | None = None,
    tol: float = 1e-10,
) -> Tensor:
    """Weights `[n]` float64 that maximise s^T w + w^T Q w / 2 - alpha sum w over `into`.

    Accelerated projected ascent from `start` (default 0, projected) with restarts: the maximum
    where Q is negative semidefinite, a stationary point where it is not. Stops when a step moves
    no weight by more than `tol` of the largest.

    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    n = len(gain)
    s = check_gain(gain, n, None, "quadratic_programme") - alpha
    if Q.shape != (n, n) or not bool(Q.isfinite().all()):
        raise ValueError(f"quadratic_programme: Q wanted finite [{n}, {n}], got {list(Q.shape)}")
    q = Q.detach().double().cpu()
    q = (q + q.T) / 2
    rate = 1 / max(float(torch.linalg.matrix_norm(q, 2)), 1e-300)
    w = into.project(torch.zeros_like(s) if start is None else start.double().cpu())
    return _ascend(s, q, into, w, rate, tol)


def _ascend(s: Tensor, q: Tensor, into: WeightSet, w: Tensor, rate: float, tol: float) -> Tensor:
    def value(x: Tensor) -> float:
        return float(s @ x + x @ q @ x / 2)

    y, best, momentum = w, value(w), 1.0
    for _ in range(STEPS):
        new = into.project(y + rate * (s + q @ y))
        found = value(new)
        if found < best and momentum > 1.0:
            y, momentum = w, 1.0
            continue
        moved = float((new - w).abs().max())
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y, w, best = new + (momentum - 1) / after * (new - w), new, found
        momentum = after
        if moved <= tol * max(float(w.abs().max()), 1e-300):
            break
    return w


def matching_pursuit(
    gain: Tensor,
    gram: Tensor,
    *,
    budget: int,
    total: float,
    cap: float | None = None,
    blocks: int | None = None,
    alpha: float = 0.0,
) -> Selection:
    """Orthogonal matching pursuit with nonnegative weights, scaled to sum to `total`.

    min over w >= 0 of ||a_J - sum_i w_i a_i||^2 / 2 + alpha sum w, where <a_J, a_i> = gain_i and
    <a_i, a_j> = gram_ij: -grad J against grad l_i in the metric of the solve. In `blocks` steps
    (default one candidate each) the best of gain - gram w over the norm of a_i join the support and
    all its weights are fitted again. Stops early when nothing is left that raises J.

    Args:
        gain: `[n]`; gram: `[n, n]` symmetric positive semidefinite.
        total: sum of the result; the fit fixes relative weights only. cap: largest weight.

    Raises ValueError for shapes, a budget or a block count out of range, or no positive gain.
    """
    n = len(gain)
    s = check_gain(gain, n, None, "matching_pursuit")
    check_budget(budget, n, "matching_pursuit")
    if gram.shape != (n, n):
        raise ValueError(f"matching_pursuit: gram wanted [{n}, {n}], got {list(gram.shape)}")
    if blocks is not None and not 1 <= blocks <= budget:
        raise ValueError(f"matching_pursuit: blocks must be in [1, {budget}], got {blocks}")
    k = gram.detach().double().cpu()
    norm = k.diagonal().clamp_min(1e-300).sqrt()
    size = -(-budget // (blocks or budget))
    w, rounds, stopped = torch.zeros_like(s), list[Round](), "budget"
    order = list[int]()
    while len(order) < budget:
        left = s - alpha - k @ w
        rest = (left / norm).masked_fill(_member(order, n), -torch.inf)
        added = [
            i for i in rest.topk(min(size, budget - len(order))).indices.tolist() if left[i] > 0
        ]
        if not added:
            stopped = "no positive gain"
            break
        order += added
        rounds.append(Round(tuple(added), tuple(left[added].tolist()), None))
        at = torch.tensor(order)
        w = torch.zeros_like(s)
        w[at] = quadratic_programme(s[at], -k[at][:, at], WeightSet(), alpha=alpha)
    if not w.any():
        raise ValueError(f"matching_pursuit: none of {n} gains is positive")
    w = w * (total / w.sum())
    if cap is not None:
        at = w.nonzero().flatten()
        w[at] = WeightSet(total, cap).project(w[at])
    return Selection(w.float(), tuple(order), tuple(rounds), stopped)


def _member(order: list[int], n: int) -> Tensor:
    out = torch.zeros(n, dtype=torch.bool)
    out[order] = True
    return out
