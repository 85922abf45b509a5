"""Parts of an unlearning step around a loss: dual variable, harmonised gradients, model mixing,
and the combinations of PMPO, TRACE and C3PO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from u2a.tree import Tree, dot


@dataclass
class Dual:
    """PDU's Lagrangian L_f + lam (L_r - eps) of "forget while the retain loss is at most eps".

    `eps`: a bit above the start model's retain loss; `lam` 50 to 100 at first. For the first
    `warmup` calls of `update` the primal learns alone and lam stays. Source: arXiv 2506.05314.
    """

    eps: float
    lam: float = 50.0
    step: float = 1.0
    warmup: int = 5
    seen: int = 0

    def __post_init__(self) -> None:
        if self.lam < 0 or not self.step > 0:
            raise ValueError(f"Dual: wanted lam >= 0, step > 0, got {self.lam}, {self.step}")

    def loss(self, forget: Tensor, retain: Tensor) -> Tensor:
        """The primal loss; lam is a constant in it."""
        return forget + self.lam * (retain - self.eps)

    def update(self, retain: float) -> float:
        """lam <- max(0, lam + step (L_r - eps)), once per epoch; returns lam."""
        if not math.isfinite(retain):
            raise ValueError(f"Dual.update: retain loss must be finite, got {retain}")
        self.seen += 1
        if self.seen > self.warmup:
            self.lam = max(0.0, self.lam + self.step * (retain - self.eps))
        return self.lam


def harmonise(retain: Mapping[str, Tensor], forget: Mapping[str, Tensor]) -> Tree:
    """LTU's gradient: the sum, each first rid of what opposes the other if their dot is negative.

    g_r - <g_r, g_f>/|g_f|^2 g_f plus g_f - <g_f, g_r>/|g_r|^2 g_r over all parameters at once.
    Source: arXiv 2407.10494; the projection is that of PCGrad, arXiv 2001.06782.
    """
    if retain.keys() != forget.keys():
        odd = sorted(retain.keys() ^ forget.keys())
        raise ValueError(f"harmonise: gradients differ in {len(odd)} names, first {odd[0]}")
    cross = float(dot(retain, forget))
    if cross >= 0:
        return {n: g + forget[n] for n, g in retain.items()}
    a = 1 - cross / float(dot(retain, retain))
    b = 1 - cross / float(dot(forget, forget))
    return {n: a * g + b * forget[n] for n, g in retain.items()}


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], a: float) -> dict[str, Tensor]:
    """Trainable parameters of the model (1 - a) theta_start + a theta_end.

    Of a LoRA whose B factors are 0 at the start B alone is scaled, which mixes the weights exactly.
    Raises ValueError for a outside [0, 1], differing names, and a LoRA that is not fresh (its
    mixture is no LoRA of this rank: merge it first).
    """
    if not 0 <= a <= 1:
        raise ValueError(f"mixed: a must be in [0, 1], got {a}")
    if start.keys() != end.keys():
        odd = sorted(start.keys() ^ end.keys())
        raise ValueError(f"mixed: snapshots differ in {len(odd)} names, first {odd[0]}")
    out = {}
    for name, s in start.items():
        if "lora_B" in name and bool(s.any()):
            raise ValueError(f"mixed: {name} is not 0 at the start; merge the LoRA first")
        frozen = "lora_A" in name or "lora_embedding_A" in name
        out[name] = end[name].clone() if frozen else torch.lerp(s, end[name], a)
    return out


def calibrate(utility: Callable[[float], float], tau: float, *, steps: int = 12) -> float:
    """UWC's a: the largest mixture with utility(a) >= (1 - tau) utility(0), by bisection.

    `utility` is higher-better and takes a in [0, 1] (restore `mixed(...)`, then measure). 1 where
    the whole unlearning keeps it; the answer always passed the test itself. Takes utility to cross
    the bar once: with several crossings it finds one of them. Source: arXiv 2406.09179.
    """
    if not 0 <= tau < 1:
        raise ValueError(f"calibrate: tau must be in [0, 1), got {tau}")
    base = utility(0.0)
    if not base > 0:
        raise ValueError(f"calibrate: utility(0) must be > 0 for a relative bar, got {base}")
    bar = (1 - tau) * base
    if utility(1.0) >= bar:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if utility(middle) >= bar else (low, middle)
    return low


def _weighted(values: Tensor, weights: Tensor | None, who: str) -> Tensor:
    """sum w x, the mean where there are no weights."""
    if weights is None:
        return values.mean()
    if weights.shape != values.shape:
        raise ValueError(f"{who}: {list(weights.shape)} weights, wanted {list(values.shape)}")
    return (weights.to(values) * values).sum()


def pmpo(
    lp: Tensor, accepted: Tensor, kl: Tensor, alpha: float, beta: float,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """PMPO's loss, a scalar: -alpha E_acc[lp] + (1 - alpha) E_rej[lp] + beta mean kl.

    `lp [B]` summed log-probabilities of sampled answers, `accepted [B]` bool, `kl` of
    KL(pi_ref || pi) on reference samples ("kl_retain" per token, or r - lp per answer). alpha 0
    learns from rejected answers alone, stable if beta is large enough. `weights [B]` in place of
    1 / (number of accepted answers) on those, and of rejected ones on these.
    Source: arXiv 2410.04166.
    """
    if not (0 <= alpha <= 1 and beta >= 0):
        raise ValueError(f"pmpo: wanted alpha in [0, 1] and beta >= 0, got {alpha}, {beta}")
    good, bad = accepted.to(lp), (~accepted).to(lp)
    if weights is None:
        weights = good / good.sum().clamp_min(1) + bad / bad.sum().clamp_min(1)
    signed = ((1 - alpha) * bad - alpha * good) * lp
    return _weighted(signed, weights, "pmpo") + beta * kl.mean()


class Verdict(Enum):
    """TRACE's triage of a preference pair under a new policy."""

    INVERT = "invert"
    PUNISH = "punish"
    RETAIN = "retain"


def triage(chosen_ok: Sequence[bool], rejected_ok: Sequence[bool]) -> list[Verdict]:
    """RETAIN a pair whose chosen answer the policy allows; else INVERT it if it allows the other
    answer, PUNISH both if it allows neither. Source: arXiv 2511.02623."""
    return [
        Verdict.RETAIN if c else Verdict.INVERT if r else Verdict.PUNISH
        for c, r in zip(chosen_ok, rejected_ok, strict=True)
    ]


def trace_weights(gain: Tensor) -> Tensor:
    """max(0, gain) / sum: TRACE's weights of the impact scores <grad L_gold, grad l_i> `[n]`.

    All 0 where no gain is positive. Source: arXiv 2511.02623.
    """
    positive = gain.clamp_min(0)
    return positive / positive.sum().clamp_min(torch.finfo(gain.dtype).tiny)


def trace_loss(
    inverted: Tensor, inverted_weights: Tensor, punished: Tensor, punished_weights: Tensor,
    kl: Tensor, alpha: float = 0.1,
) -> Tensor:  # fmt: skip
    """sum w DPO(inverted pairs) + sum w NPO(both answers of punished pairs) + alpha mean KL.

    Per-pair losses: "dpo" with the answers swapped `[I]`, "npo" of both summed `[P]`, and
    "kl_retain" on pairs to retain `[R]`. Source: arXiv 2511.02623.
    """
    total = (inverted * inverted_weights).sum() + (punished * punished_weights).sum()
    return total + alpha * kl.mean()


def c3po(
    dpo: Tensor, unrelated: Tensor, near: Tensor, s1: float = 0.2, s2: float = 0.1,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """DPO where feedback applies, and the original answers' NLL (or distillation) elsewhere.

    mean dpo `[P]` + s1 mean unrelated `[U]` + s2 mean near `[M]`: prompts out of scope, and nearly
    in scope. Distillation is "kl_retain" with beta as temperature. `weights [P]` of the pairs in
    place of 1/P. Source: arXiv 2402.10893.
    """
    return _weighted(dpo, weights, "c3po") + s1 * unrelated.mean() + s2 * near.mean()
