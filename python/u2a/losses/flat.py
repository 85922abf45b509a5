"""FLAT: variational f-divergences between a refusal's and an answer's mean token probability.

L = -g*(P_e) + f*(g*(P_f)), P_e that of the partner (refusal), P_f that of the answer to forget,
probabilities averaged over answer tokens. g* increases for every divergence: descending L raises
P_e and lowers P_f. No reference and no retain data. Source: arXiv 2410.11143.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.batch import AnswerLogps
from u2a.losses.base import PARTNER, Loss, Vector
from u2a.losses.paired import halves

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

DIVERGENCES: dict[str, Pair] = {
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "tv": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "js": (lambda v: math.log(2) - F.softplus(-v), lambda v: F.softplus(v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
    "jeffrey": (lambda v: v, lambda v: v + v.square() / 4 + v**3 / 16),
    "reverse_kl": (lambda v: -(-v).exp(), lambda v: v - 1),
    "sq_hellinger": (lambda v: -torch.expm1(-v), torch.expm1),
    "neyman": (lambda v: -torch.expm1(-v), lambda v: -2 * torch.expm1(-v / 2)),
}
"""name -> (g*, f* of g*); "jeffrey" is its third-order series."""

_WORDS = {
    "kl": ("v", "exp(v - 1)", 0.4408182207, 0.51857275),
    "tv": ("tanh(v)/2", "tanh(v)/2", 0.1565275823, 0.22215886),
    "js": ("log 2 - softplus(-v)", "softplus(v) - log 2", 0.2712469322, 0.46773144),
    "pearson": ("v", "v^2/4 + v", 0.5225, 0.945),
    "jeffrey": ("v", "v + v^2/4 + v^3/16", 0.5439375, 1.0093125),
    "reverse_kl": ("-exp(-v)", "v - 1", 0.4408182207, 0.7),
    "sq_hellinger": ("1 - exp(-v)", "exp(v) - 1", 0.7545709282, 1.4096269),
    "neyman": ("1 - exp(-v)", "2 - 2 exp(-v/2)", 0.3314420412, 0.49328166),
}


def _flat(lp: AnswerLogps, beta: float, *, kind: str) -> Tensor:
    g, f_of_g = DIVERGENCES[kind]
    p = lp.with_logp(lp.logp.exp()).mean()
    forget, refusal = halves(lp, p, f"flat_{kind}")
    return f_of_g(forget) - g(refusal)


LOSSES = tuple(
    Loss(
        f"flat_{kind}", f"-g*(P_e) + f*(g*(P_f)), g*(v) = {g}, f*(g*(v)) = {f}",
        "FLAT, arXiv 2410.11143", partial(_flat, kind=kind),
        Vector(value, (math.log(0.7),), slope, partner=(math.log(0.3),)),
        needs=frozenset({PARTNER}),
    )
    for kind, (g, f, value, slope) in _WORDS.items()
)  # fmt: skip
