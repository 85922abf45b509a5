"""f-DPG: bring a policy towards a target known up to its normaliser, under any f-divergence.

grad D_f(pi || p) = E_{x~pi}[f'(pi(x)/p(x)) grad log pi(x)], p = P/Z: policy gradient with reward
-f'(pi/p). Source: arXiv 2302.08215; distributional targets: GDC, arXiv 2012.11635.
Everything is a function of summed log-probabilities of sampled answers and of log P.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CAP = 30.0
"""log(pi/p) is clipped to [-CAP, CAP]: a sample the target forbids is at the upper end."""


class Divergence(NamedTuple):
    """f'(t) and f(t)/t as functions of log t, t = pi/p; D_f = E_pi[f(t)/t]."""

    slope: Callable[[Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor]
    words: str


_LOG2 = math.log(2)
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(lambda u: -(-u).exp(), lambda u: -u * (-u).exp(), "KL(p||pi)"),
    "reverse_kl": Divergence(lambda u: u + 1, lambda u: u, "KL(pi||p)"),
    "tv": Divergence(lambda u: u.sign() / 2, lambda u: torch.expm1(-u).abs() / 2, "|pi - p|/2"),
    "js": Divergence(
        lambda u: _LOG2 - F.softplus(-u),
        lambda u: _LOG2 - F.softplus(-u) + (-u).exp() * (_LOG2 - F.softplus(u)),
        "KL(pi||m) + KL(p||m), m = (pi + p)/2",
    ),
    "chi2_forward": Divergence(
        lambda u: -torch.expm1(-2 * u), lambda u: torch.expm1(-u).square(), "chi2(p||pi)"
    ),
    "chi2_reverse": Divergence(
        lambda u: 2 * torch.expm1(u), lambda u: u.exp() + (-u).exp() - 2, "chi2(pi||p)"
    ),
}


def binary(base: Tensor, allowed: Tensor) -> Tensor:
    """log P of the base model restricted to `allowed` answers: a(x) b(x)."""
    return base.masked_fill(~allowed, -torch.inf)


def rlhf(base: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log P of a(x) exp(r(x)/beta): reward with a KL penalty of beta. Costs: give -cost."""
    if not beta > 0:
        raise ValueError(f"rlhf: beta must be > 0, got {beta}")
    return base + reward.to(base) / beta


def distributional(base: Tensor, features: Tensor, lam: Tensor) -> Tensor:
    """log P of a(x) exp(lam . phi(x)); `features [S, k]`, `lam [k]` of `fit_moments`."""
    return base + features.to(base) @ lam.to(base)


def fit_moments(
    features: Tensor, moments: Tensor, log_weights: Tensor | None = None, *, lr: float = 0.05,
    tol: float = 1e-5, max_iter: int = 1000,
) -> tuple[Tensor, float]:  # fmt: skip
    """(lam `[k]`, largest |moment error|) with E_p[phi] = moments, p = a exp(lam . phi).

    `features [S, k]` of samples; `log_weights [S]` = log a - log q where they are not of a. Plain
    descent lam -= lr (m - moments) on self-normalised importance weights. Look at the error.
    """
    lam = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    phi, mu = features.double(), moments.to(lam)
    base = phi.new_zeros(len(phi)) if log_weights is None else log_weights.double()
    error = mu.new_zeros(())
    for i in range(max_iter + 1):
        miss = (base + phi @ lam).softmax(0) @ phi - mu
        error = miss.abs().max()
        if error <= tol or i == max_iter:
            break
        lam = lam - lr * miss
    return lam, float(error)


class MovingAverage:
    """Mean of the last `window` values; 0 before the first."""

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values) if self.values else 0.0


@dataclass
class Normaliser:
    """log Z per context: the log of the running mean of P(x)/q(x), at most `log_cap`."""

    log_cap: float = math.inf
    sums: dict[Hashable, tuple[float, int]] = field(default_factory=dict)

    def update(self, log_ratio: Tensor, context: Sequence[Hashable]) -> None:
        for value, key in zip(log_ratio.double().tolist(), context, strict=True):
            total, count = self.sums.get(key, (-math.inf, 0))
            self.sums[key] = float(torch.logaddexp(_f64(total), _f64(value))), count + 1

    def log_z(self, context: Sequence[Hashable]) -> Tensor:
        """`[S]` float64; -inf for a context whose every sample was forbidden."""
        found = [self.sums[key] for key in context]
        return _f64([min(total - math.log(n), self.log_cap) for total, n in found])


def _f64(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Samples:
    """Sampled answers.

    Args:
        lp: `[S]` summed log-probabilities under the policy, with graph.
        target: `[S]` log P, -inf for a forbidden answer (`binary`, `rlhf`, `distributional`).
        proposal: `[S]` log q of the model that sampled; None: the policy itself.
        context: the prompt of each sample, any hashable; None: one context.
        log_z: `[S]`, replaces the estimate of log Z.

    Raises ValueError for shapes that differ.
    """

    lp: Tensor
    target: Tensor
    proposal: Tensor | None = None
    context: Sequence[Hashable] | None = None
    log_z: Tensor | None = None

    def __post_init__(self) -> None:
        if self.lp.ndim != 1 or self.target.shape != self.lp.shape:
            got = f"{list(self.lp.shape)}, {list(self.target.shape)}"
            raise ValueError(f"FDPG: lp and target must be [S], got {got}")


@dataclass
class FDPG:
    """A step's loss on answers sampled from the policy itself or from a proposal q.

    `divergence`: "js" (default), "forward_kl", "reverse_kl", "tv", "chi2_forward", "chi2_reverse".
    `window`: rewards in the moving baseline. Z is estimated per context from the samples seen so
    far, the present ones included.
    """

    divergence: str = "js"
    window: int = 1024
    log_cap: float = math.inf

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            names = ", ".join(DIVERGENCES)
            raise ValueError(f"divergence: wanted one of {names}, got {self.divergence!r}")
        self.baseline = MovingAverage(self.window)
        self.normaliser = Normaliser(self.log_cap)

    def loss(self, drawn: Samples) -> Tensor:
        """`[S]`, its mean is to be descended: sg(pi/q) (b - r) lp, r = -f'(pi/p).

        The baseline is that of earlier calls, so it does not bias this one.
        """
        log_t, ratio = self.ratios(drawn)
        reward = -DIVERGENCES[self.divergence].slope(log_t)
        scaled = ratio * (self.baseline.mean - reward) * drawn.lp
        self.baseline.values.extend(reward.double().tolist())
        return scaled

    def estimate(self, drawn: Samples) -> Tensor:
        """D_f(pi || p) estimated on the samples, a scalar; replaces the frozen proposal of offline
        sampling when lower for the policy than for the proposal. Learns Z, not the baseline."""
        log_t, ratio = self.ratios(drawn)
        return (ratio * DIVERGENCES[self.divergence].ratio(log_t)).mean()

    def ratios(self, drawn: Samples) -> tuple[Tensor, Tensor]:
        """(log pi/p within the clip, pi/q), `[S]` without graph; learns Z."""
        policy, target, log_z = drawn.lp.detach(), drawn.target.detach(), drawn.log_z
        q = policy if drawn.proposal is None else drawn.proposal.detach().to(policy)
        keys = [None] * len(policy) if drawn.context is None else drawn.context
        if log_z is None:
            self.normaliser.update(target - q, keys)
            log_z = self.normaliser.log_z(keys)
        log_t = policy - target + log_z.to(policy)
        log_t = torch.where(target == -torch.inf, CAP, log_t).clamp(-CAP, CAP)
        return log_t, (policy - q).exp()
