"""The f-SFT family: supervised fine-tuning that limits itself, and its mirror image for forgetting.

L = -phi(h) on wanted answers, -phi(-h) on unwanted ones, h = beta (lp - lp_ref)/|y|; phi concave,
phi(u) = -f*(-u). Derived from the saddle form of arXiv 2507.00018 with the value term set to 0.
Below `floor` phi goes on along its tangent, so that no log-probability makes a pole or overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from u2a.batch import AnswerLogps
from u2a.losses.base import REFERENCE, Loss, Vector, reference


class Phi(NamedTuple):
    """phi, its derivative, and the point below which phi is its tangent there."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[float], float]
    floor: float
    words: str

    def __call__(self, u: Tensor) -> Tensor:
        inside = self.value(u.clamp_min(self.floor))
        tangent = inside.detach() + self.slope(self.floor) * (u - self.floor)
        return torch.where(u < self.floor, tangent, inside)


PHI: dict[str, Phi] = {
    "tv": Phi(lambda u: u, lambda u: 1.0, -1.0, "u"),
    "pearson": Phi(lambda u: u - u.square() / 4, lambda u: 1 - u / 2, -10.0, "u - u^2/4"),
    "sq_hellinger": Phi(lambda u: u / (1 + u), lambda u: (1 + u) ** -2, -0.5, "u/(1 + u)"),
    "js": Phi(
        lambda u: torch.log(2 - (-u).exp()),
        lambda u: math.exp(-u) / (2 - math.exp(-u)),
        -0.5,
        "log(2 - exp(-u))",
    ),
    "kl": Phi(lambda u: -(-1 - u).exp(), lambda u: math.exp(-1 - u), -5.0, "-exp(-(u + 1))"),
    "reverse_kl": Phi(lambda u: 1 + u.log(), lambda u: 1 / u, 0.1, "1 + log u"),
}


def _fsft(lp: AnswerLogps, beta: float, *, kind: str, sign: int) -> Tensor:
    h = beta * (lp.sequence() - reference(lp, "fsft")) / lp.count.clamp_min(1)
    return -PHI[kind](sign * h)


def _loss(kind: str, sign: int, value: float, slope: float) -> Loss:
    name, argument = ("fsft", "h") if sign > 0 else ("fforget", "-h")
    phi = PHI[kind]
    # h = +-0.4 with |y| = 2: the answer moved by 0.8 against its reference
    vector = Vector(value, (-1.0 + 0.4 * sign,) * 2, slope, ref=(-1.0, -1.0))
    return Loss(
        f"{name}_{kind}",
        f"-phi({argument}), phi(u) = {phi.words} (tangent below {phi.floor:g})",
        "f-SFT, derived from arXiv 2507.00018",
        partial(_fsft, kind=kind, sign=sign),
        vector,
        beta=1.0,
        needs=frozenset({REFERENCE}),
        retain_weight=1.0 if sign < 0 else 0.0,
    )


_VECTORS = {
    "tv": (-0.4, 0.5),
    "pearson": (-0.36, 0.4),
    "sq_hellinger": (-0.2857142857, 0.2551020408),
    "js": (-0.2849382772, 0.2520606722),
    "kl": (0.2465969639, 0.1232984820),
    "reverse_kl": (-0.0837092681, 1.25),
}
LOSSES = tuple(
    _loss(kind, sign, value, -sign * slope)
    for sign in (1, -1)
    for kind, (value, slope) in _VECTORS.items()
    if sign > 0 or kind not in ("tv", "reverse_kl")
)
