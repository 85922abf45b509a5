"""Unlearning losses (minimised) as one table, and the preference objective (maximised).

`LOSSES[name]` are small functions; those of answer log-probabilities work everywhere, since their
tangents and Hessian products follow by the chain rule from those of `logp`. What needs the whole
vocabulary, hidden states, samples or state of its own is here for training loops of your own.
"""

from __future__ import annotations

import difflib

from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.losses import divergences, flat, hidden, paired, rowwise, vocabulary
from u2a.losses.base import Loss, Vector, reference

__all__ = [
    "LOSSES",
    "Loss",
    "Vector",
    "dpo_margins",
    "dpo_objective",
    "dpo_terms",
    "get_loss",
]

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for family in (rowwise, divergences, paired, flat, vocabulary, hidden)
    for loss in family.LOSSES
}


def get_loss(name: str, beta: float | None = None, **options: float) -> Loss:
    """The loss called `name`; `beta` and `options` replace its defaults where it has them.

    Raises ValueError for an unknown name (with the nearest one), beta <= 0 or an unknown option.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.0)[0]
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {name!r}, nearest {near!r}")
    return LOSSES[name].with_settings(beta, options)


def dpo_margins(lp: AnswerLogps) -> Tensor:
    """`[P]` margins (lp - ref)(chosen) - (lp - ref)(rejected); P chosen rows, then P rejected."""
    rows = lp.count.shape[0]
    if rows % 2:
        raise ValueError(f"dpo_margins: the batch must hold P chosen then P rejected, got {rows}")
    gain = lp.sequence() - reference(lp, "dpo_margins")
    return gain[: rows // 2] - gain[rows // 2 :]


def dpo_terms(lp: AnswerLogps, beta: float = 0.3) -> Tensor:
    """`[P]` log sigmoid(beta margin): their mean over all pairs is J."""
    return F.logsigmoid(beta * dpo_margins(lp))


def dpo_objective(lp: AnswerLogps, beta: float = 0.3) -> Tensor:
    """J = mean log sigmoid(beta margin), a scalar, higher is better: minus the DPO loss.

    A mean over this batch: for J over several batches sum `dpo_terms` and divide by all pairs.
    """
    return dpo_terms(lp, beta).mean()
