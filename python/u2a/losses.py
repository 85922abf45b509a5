"""Unlearning losses `AnswerLogps -> [B]` (minimised) and the preference objective (maximised).

Both see the model only through answer log-probabilities, so their tangents and Hessian products
follow by the chain rule from those of `logp`. In formulas lp = log pi(y|x), summed over |y| tokens.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps


@dataclass(frozen=True)
class Loss:
    """`loss(lp) -> [B]`, one value per example, minimised by unlearning.

    `beta` is the value in use (None: the loss has none); `retain_weight` is the customary weight of
    the retain term. `vector` is a test vector: lp, reference lp, |y|, beta, loss, dloss/dlp.
    """

    name: str
    formula: str
    source: str
    fn: Callable[[AnswerLogps, float], Tensor]
    vector: tuple[float, float, int, float, float, float]
    beta: float | None = None
    needs_reference: bool = False
    retain_weight: float = 0.0

    def __call__(self, lp: AnswerLogps) -> Tensor:
        return self.fn(lp, 0.0 if self.beta is None else self.beta)


def _reference(lp: AnswerLogps, name: str) -> Tensor:
    if lp.ref is None:
        raise ValueError(f"{name}: lp.ref must hold reference log-probabilities [B], got None")
    return lp.ref.to(lp.logp)


def _ga(lp: AnswerLogps, beta: float) -> Tensor:
    return lp.mean()


def _ga_sum(lp: AnswerLogps, beta: float) -> Tensor:
    return lp.sequence()


def _nll(lp: AnswerLogps, beta: float) -> Tensor:
    return -lp.mean()


def _npo(lp: AnswerLogps, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * (lp.sequence() - _reference(lp, "npo")))


def _simnpo(lp: AnswerLogps, beta: float) -> Tensor:
    return 2 / beta * F.softplus(beta * lp.mean())


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("ga", "lp / |y|", "GradAscent, TOFU, arXiv 2401.06121", _ga, (-10, 0, 5, 0, -2, 0.2)),
        Loss("ga_sum", "lp", "GradAscent on sums", _ga_sum, (-10, 0, 5, 0, -10, 1)),
        Loss("nll", "-lp / |y|", "supervised fine-tuning", _nll, (-10, 0, 5, 0, 2, -0.2)),
        Loss(
            "graddiff",
            "lp / |y|, and the retain NLL at weight 1",
            "GradDiff, TOFU, arXiv 2401.06121",
            _ga,
            (-10, 0, 5, 0, -2, 0.2),
            retain_weight=1.0,
        ),
        Loss(
            "npo",
            "2/beta softplus(beta (lp - lp_ref))",
            "NPO, arXiv 2404.05868",
            _npo,
            (-10, -8, 5, 0.1, 11.9627773876, 0.9003320),
            beta=0.1,
            needs_reference=True,
            retain_weight=1.0,
        ),
        Loss(
            "simnpo",
            "2/beta softplus(beta lp / |y|)",
            "SimNPO with margin 0, arXiv 2410.07163",
            _simnpo,
            (-30, 0, 20, 4.5, 0.0005200865, 0.1 / (1 + math.exp(6.75))),
            beta=4.5,
            retain_weight=1.0,
        ),
    )
}


def get_loss(name: str, beta: float | None = None) -> Loss:
    """The loss called `name`; `beta` replaces its default where it has one.

    Raises ValueError for an unknown name (with the nearest one) and for beta <= 0.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.0)[0]
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}, nearest {near!r}")
    loss = LOSSES[name]
    if loss.beta is None or beta is None:
        return loss
    if not beta > 0:
        raise ValueError(f"{name}: beta must be > 0, got {beta}")
    return replace(loss, beta=float(beta))


def dpo_margins(lp: AnswerLogps) -> Tensor:
    """`[P]` margins (lp - ref)(chosen) - (lp - ref)(rejected); P chosen rows, then P rejected."""
    rows = lp.count.shape[0]
    if rows % 2:
        raise ValueError(f"dpo_margins: the batch must hold P chosen then P rejected, got {rows}")
    gain = lp.sequence() - _reference(lp, "dpo_margins")
    return gain[: rows // 2] - gain[rows // 2 :]


def dpo_terms(lp: AnswerLogps, beta: float = 0.3) -> Tensor:
    """`[P]` log sigmoid(beta margin): their mean over all pairs is J."""
    return F.logsigmoid(beta * dpo_margins(lp))


def dpo_objective(lp: AnswerLogps, beta: float = 0.3) -> Tensor:
    """J = mean log sigmoid(beta margin), a scalar, higher is better: minus the DPO loss.

    A mean over this batch: for J over several batches sum `dpo_terms` and divide by all pairs.
    """
    return dpo_terms(lp, beta).mean()
