"""Losses of one answer's own log-probabilities: ascent, NPO and its kin, token weightings, TOPR."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.losses.base import REFERENCE, TOKENS, Loss, Vector, reference, token_mean, token_reference

WGA_PAPER = "WGA, arXiv 2502.19301"


def _ga(lp: AnswerLogps, beta: float) -> Tensor:
    return lp.mean()


def _ga_sum(lp: AnswerLogps, beta: float) -> Tensor:
    return lp.sequence()


def _nll(lp: AnswerLogps, beta: float) -> Tensor:
    return -lp.mean()


def _npo(lp: AnswerLogps, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * (lp.sequence() - reference(lp, "npo")))


def _simnpo(lp: AnswerLogps, beta: float, margin: float) -> Tensor:
    return 2 / beta * F.softplus(beta * (lp.mean() + margin))


def _wga(lp: AnswerLogps, beta: float) -> Tensor:
    return token_mean(lp, (beta * lp.logp).exp() / beta)


def _wga_published(lp: AnswerLogps, beta: float) -> Tensor:
    return token_mean(lp, (beta * lp.logp).exp().detach() * lp.logp)


def _tnpo(lp: AnswerLogps, beta: float) -> Tensor:
    ratio = lp.logp - token_reference(lp, "tnpo")
    return token_mean(lp, 2 / beta * F.softplus(beta * ratio))


def _tnpo_weight(lp: AnswerLogps, beta: float) -> Tensor:
    return 2 * torch.sigmoid(beta * (lp.logp - token_reference(lp, "tnpo")))


def _tnpo_published(lp: AnswerLogps, beta: float) -> Tensor:
    return token_mean(lp, _tnpo_weight(lp, beta).detach() * lp.logp)


class _Field(torch.autograd.Function):
    """Any value with the gradient `weight`, itself differentiable: for fields without integral."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] * weight, None, None


def _wtnpo(lp: AnswerLogps, beta: float, alpha: float) -> Tensor:
    weight = _tnpo_weight(lp, beta) * (alpha * lp.logp).exp()
    return token_mean(lp, _Field.apply(lp.logp, weight, (weight * lp.logp).detach()))


def _satimp(lp: AnswerLogps, beta: float, beta2: int) -> Tensor:
    if beta2 != int(beta2) or beta2 < 0:
        raise ValueError(f"satimp: beta2 must be a whole number >= 0, got {beta2}")
    terms = [
        (-1) ** k * math.comb(int(beta2), k) / (beta + k) * ((beta + k) * lp.logp).exp()
        for k in range(int(beta2) + 1)
    ]
    return token_mean(lp, torch.stack(terms).sum(0))


def _satimp_published(lp: AnswerLogps, beta: float, beta2: int) -> Tensor:
    weight = (beta * lp.logp).exp() * (-torch.expm1(lp.logp)) ** beta2
    return token_mean(lp, weight.detach() * lp.logp)


def _unlikelihood(lp: AnswerLogps, beta: float, floor: float) -> Tensor:
    return token_mean(lp, -torch.log(floor - torch.expm1(lp.logp)))


def tapered(log_ratio: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Integral of clip(exp(log_ratio), low, high): TOPR's weight as a slope.

    Raises ValueError unless 0 <= low <= high and high > 0.
    """
    if not (0 <= low <= high and high > 0):
        raise ValueError(f"topr: wanted 0 <= low <= high, high > 0, got [{low}, {high}]")
    top = math.log(high)
    above = log_ratio > top  # not clamps: at the reference itself the ratio sits on the edge
    out = torch.where(above, high * (1 + log_ratio - top), log_ratio.clamp_max(top).exp())
    if not low:
        return out
    bottom = math.log(low)
    return torch.where(log_ratio < bottom, low * (1 + log_ratio - bottom), out)


def topr(
    lp: AnswerLogps, reward: Tensor, low: float = 0.0, high: float = 1.0, *, baseline: float = 0.0
) -> Tensor:
    """Tapered off-policy REINFORCE, `[B]`: minimise -E_mu[w R lp], R = reward - baseline `[B]`.

    w = 1 where R >= 0, else clip(pi/mu, low, high), detached; mu's log-probabilities are `lp.ref`.
    Returned as an integral of that field (see `Loss`). Source: arXiv 2503.14286.
    """
    r = reward.to(lp.logp) - baseline
    ratio = lp.sequence() - reference(lp, "topr")
    return torch.where(r >= 0, -r * ratio, -r * tapered(ratio, low, high))


def _topr(lp: AnswerLogps, beta: float, low: float, high: float) -> Tensor:
    return topr(lp, lp.logp.new_full(lp.count.shape, -1.0), low, high)


def _topr_published(lp: AnswerLogps, beta: float, low: float, high: float) -> Tensor:
    weight = (lp.sequence() - reference(lp, "topr")).exp().clamp(low, high).detach()
    return weight * lp.sequence()


def effective_positive_share(p: float, baseline: float) -> float:
    """p(1 - c)/(1 + (1 - 2p)c): what a baseline c makes of a share p of rewards +1, rest -1."""
    return p * (1 - baseline) / (1 + (1 - 2 * p) * baseline)


_TOKENS = (-0.1, -1.0, -3.0)
_TOFU = "arXiv 2401.06121"

LOSSES = (
    Loss("ga", "lp / |y|", f"GradAscent, TOFU, {_TOFU}", _ga, Vector(-2, (-2.0,) * 5, 0.2)),
    Loss("ga_sum", "lp", "GradAscent on sums", _ga_sum, Vector(-10, (-2.0,) * 5, 1)),
    Loss("nll", "-lp / |y|", "supervised fine-tuning", _nll, Vector(2, (-2.0,) * 5, -0.2)),
    Loss(
        "graddiff", "lp / |y|, and the retain NLL at weight 1", f"GradDiff, TOFU, {_TOFU}", _ga,
        Vector(-2, (-2.0,) * 5, 0.2), retain_weight=1.0,
    ),
    Loss(
        "npo", "2/beta softplus(beta (lp - lp_ref))", "NPO, arXiv 2404.05868", _npo,
        Vector(11.9627773876, (-2.0,) * 5, 0.9003320, ref=(-1.6,) * 5),
        beta=0.1, needs=frozenset({REFERENCE}), retain_weight=1.0,
    ),
    Loss(
        "simnpo", "2/beta softplus(beta (lp / |y| + margin))", "SimNPO, arXiv 2410.07163", _simnpo,
        Vector(0.0005200865, (-1.5,) * 20, 0.1 / (1 + math.exp(6.75))),
        beta=4.5, options={"margin": 0.0}, retain_weight=1.0,
    ),
    Loss(
        "wga", "mean_t p_t^beta / beta; published: mean_t sg(p_t^beta) lp_t", WGA_PAPER, _wga,
        Vector(-0.2025747960, _TOKENS, math.exp(-0.1) / 3), beta=1.0, retain_weight=1.0,
        surrogate=_wga_published,
    ),
    Loss(
        "tnpo", "mean_t 2/beta softplus(beta (lp_t - lp_ref,t)); published: mean_t sg(w_t) lp_t, "
        "w_t = 2 p^beta/(p^beta + r^beta)", f"G-effect, {WGA_PAPER}", _tnpo,
        Vector(-0.4092182639, _TOKENS, 0.3991251067, ref=(-0.2, -1.0, -2.0)),
        beta=4.0, needs=frozenset({TOKENS}), retain_weight=1.0, surrogate=_tnpo_published,
    ),
    Loss(
        "wtnpo", "mean_t sg(p_t^alpha w_t) lp_t, w_t that of tnpo", f"G-effect, {WGA_PAPER}",
        _wtnpo, Vector(-0.1091293538, _TOKENS, 0.3435301630, ref=(-0.2, -1.0, -2.0)), beta=4.0,
        options={"alpha": 1.5}, needs=frozenset({TOKENS}), retain_weight=1.0, exact=False,
    ),
    Loss(
        "satimp", "mean_t of the integral of w_t by lp_t; published: mean_t sg(w_t) lp_t, "
        "w_t = p_t^beta (1 - p_t)^beta2", "SatImp, arXiv 2505.11953", _satimp,
        Vector(-0.0033439899, _TOKENS, math.exp(-0.5) * -math.expm1(-0.1) / 3), beta=5.0,
        options={"beta2": 1}, retain_weight=1.0, surrogate=_satimp_published,
    ),
    Loss(
        "unlikelihood", "-mean_t log(1 - p_t + floor)", "unlikelihood, arXiv 1908.04319",
        _unlikelihood, Vector(0.9539665482, _TOKENS, 3.1694106764),
        options={"floor": 1e-6}, retain_weight=1.0,
    ),
    Loss(
        "topr", "integral of clip(pi/pi_ref, low, high) by lp, the reward being -1; "
        "published: sg(clip(pi/pi_ref, low, high)) lp", "TOPR, arXiv 2503.14286", _topr,
        Vector(-1.3533528324, (-2.0,) * 5, 0.1353352832, ref=(-1.6,) * 5),
        needs=frozenset({REFERENCE}), options={"low": 0.0, "high": 1.0},
        retain_weight=1.0, surrogate=_topr_published,
    ),
)  # fmt: skip
