"""How much of an answer the model still has by heart."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a.metrics.tokens import by_row


def exact_memorisation(hit: Tensor, count: Tensor) -> Tensor:
    """Share of answer tokens that are the model's most likely one, `[R]` float64; low = forgotten.

    `hit [n]` bool, `count [R]` of `AnswerTokens`. Raises ValueError for a row without token.
    Source: Tirumala et al., arXiv 2205.10770.
    """
    return torch.stack([h.double().mean() for h in by_row("exact_memorisation", hit, count)])


def extraction_strength(hit: Tensor, count: Tensor) -> Tensor:
    """1 - k/|y|, `[R]` float64: k is the shortest prefix of the answer after which the model says
    the rest by itself; low = forgotten.

    0 where not even the last token follows from all before it. OpenUnlearning gives 1/|y| there,
    the value of a model that knows the last token. Arguments as `exact_memorisation`.
    Source: Carlini et al., arXiv 2012.07805; as a metric of unlearning, arXiv 2406.09179.
    """
    out = []
    for h in by_row("extraction_strength", hit, count):
        missed = (~h).nonzero()
        k = int(missed[-1]) + 1 if len(missed) else 0
        out.append(1 - k / len(h))
    return torch.tensor(out, dtype=torch.float64)
