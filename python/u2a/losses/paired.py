"""Losses of an answer and its partner: preference over an alternate, refusal or better answer.

A batch holds P answers to unlearn, then their P partners; every loss returns `[P]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.losses.base import PARTNER, REFERENCE, Loss, Vector, reference


def halves(lp: AnswerLogps, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(answers' `[P]`, partners' `[P]`) of `values [2P]`."""
    rows = lp.count.shape[0]
    if rows % 2:
        raise ValueError(f"{name}: the batch must hold P answers then P partners, got {rows} rows")
    return values[: rows // 2], values[rows // 2 :]


def _margin(lp: AnswerLogps, name: str) -> Tensor:
    """How much more the partner gained on the reference than the answer did, `[P]`."""
    answer, partner = halves(lp, lp.sequence() - reference(lp, name), name)
    return partner - answer


def _dpo(lp: AnswerLogps, beta: float) -> Tensor:
    return F.softplus(-beta * _margin(lp, "dpo"))


def _altpo(lp: AnswerLogps, beta: float) -> Tensor:
    return 2 / beta * F.softplus(-beta * _margin(lp, "altpo"))


def _llmu(lp: AnswerLogps, beta: float, forget: float, normal: float) -> Tensor:
    answer, partner = halves(lp, lp.mean(), "llmu")
    return forget * answer - normal * partner


def _exmate(lp: AnswerLogps, beta: float, c: float) -> Tensor:
    answer, partner = halves(lp, lp.mean(), "exmate")
    return -partner + c * answer.exp()


def _mate(lp: AnswerLogps, beta: float, c: float) -> Tensor:
    answer, partner = halves(lp, lp.mean(), "mate")
    return -partner + c * answer


def _neat(lp: AnswerLogps, beta: float) -> Tensor:
    answer, partner = halves(lp, lp.mean(), "neat")
    return (answer - partner).clamp_min(0) - partner


def neat_group(lp: AnswerLogps, rewards: Tensor, group: Tensor) -> Tensor:
    """Ranking loss over several answers to each prompt, `[G]`: rewards and prompt number per row.

    sum over r_i < r_j of max(0, s_i - s_j), minus s of the best (the first of equals), s = lp/|y|.
    A working form of the method of arXiv 2410.12194, of the RRHF type.
    """
    s = lp.mean()
    r, g = rewards.to(s), group.to(s.device)
    if r.shape != s.shape or g.shape != s.shape:
        raise ValueError(f"neat_group: wanted one reward and group per row [{len(s)}]")
    if not len(s):
        return s
    worse = (r[:, None] < r) & (g[:, None] == g)
    ranking = torch.where(worse, (s[:, None] - s).clamp_min(0), s.new_zeros(())).sum(1)
    out = s.new_zeros(int(g.max()) + 1).index_add(0, g, ranking)
    earlier = (r[:, None] == r) & (g[:, None] == g) & torch.ones_like(worse).tril(-1)
    best = ~(worse | earlier).any(1)
    return out.index_add(0, g[best], -s[best])


_PAIR = dict(ref=(-2.8,) * 5, partner=(-5.0,) * 4, partner_ref=(-5.5,) * 4)
_BOTH = frozenset({REFERENCE, PARTNER})
_ONE = frozenset({PARTNER})


def _vector(value: float, slope: float, paired: bool = True) -> Vector:
    given = _PAIR if paired else {"partner": (-5.0,) * 4}
    return Vector(value, (-3.0,) * 5, slope, **given)  # type: ignore[arg-type]


LOSSES = (
    Loss(
        "dpo", "softplus(-beta m), m = (lp - lp_ref)(y') - (lp - lp_ref)(y)",
        "DPO, arXiv 2305.18290", _dpo, _vector(0.5543552445, 0.0425557483),
        beta=0.1, needs=_BOTH, retain_weight=1.0,
    ),
    Loss(
        "altpo", "2/beta softplus(-beta m), y' the model's own alternate",
        "AltPO, arXiv 2409.13474", _altpo, _vector(11.0871048894, 0.8511149664),
        beta=0.1, needs=_BOTH, retain_weight=1.0,
    ),
    Loss(
        "idkpo", "2/beta softplus(-beta m), y' a refusal", "IdkPO, NPO, arXiv 2404.05868", _altpo,
        _vector(11.0871048894, 0.8511149664), beta=0.1, needs=_BOTH, retain_weight=1.0,
    ),
    Loss(
        "llmu", "forget lp(y)/|y| - normal lp(y')/|y'|, y' a random answer, "
        "and KL(pi_ref||pi) on retained text at weight 1", "LLMU, arXiv 2310.10683", _llmu,
        _vector(3.5, 0.1, False), options={"forget": 0.5, "normal": 1.0}, needs=_ONE,
        retain_weight=1.0,
    ),
    Loss(
        "exmate", "-lp(y')/|y'| + c exp(lp(y)/|y|)", "ExMATE, arXiv 2408.16751", _exmate,
        _vector(5.0024893534, 0.0004978707, False), options={"c": 0.05}, needs=_ONE,
    ),
    Loss(
        "mate", "-lp(y')/|y'| + c lp(y)/|y|", "MATE, arXiv 2408.16751", _mate,
        _vector(4.85, 0.01, False), options={"c": 0.05}, needs=_ONE,
    ),
    Loss(
        "neat", "max(0, s(y) - s(y')) - s(y'), s = lp/|y|, y' the better answer",
        "RRHF-type working form of NEAT, arXiv 2410.12194", _neat, _vector(7.0, 0.2, False),
        needs=_ONE,
    ),
)  # fmt: skip
