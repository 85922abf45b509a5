"""Early exit per example: an answer the model no longer gives need not be unlearnt further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import Row
from u2a.generate import Sampling
from u2a.metrics.answers import rouge_l
from u2a.metrics.generation import greedy, wanted, written

Likeness = Callable[[Sequence[str], Sequence[str]], Tensor | Sequence[float]]


def rouge_l_f1(references: Sequence[str], texts: Sequence[str]) -> Tensor:
    return rouge_l(references, texts).f1


class Forgotten:
    """`Plan(finished=Forgotten(tokenizer))`: rows whose answer is written no more leave the loop.

    After a round the model answers the prompts of the support; a row is done once its score falls
    under the bar.

    Args:
        below: the bar.
        score: (the rows' answers, what the model wrote) -> likeness `[n]`, higher = more alike; the
            default is ROUGE-L f1. The paper takes BERTScore f1 < 0.3 or BLEU < 0.01.
        how: how answers are drawn, default greedy, 64 tokens.

    Calling it raises ValueError for scores of another number or not finite.
    Source: ICU, arXiv 2407.20271.
    """

    def __init__(
        self,
        tokenizer: Any,
        below: float = 0.3,
        *,
        score: Likeness = rouge_l_f1,
        how: Sampling | None = None,
    ) -> None:
        self.tokenizer, self.below, self.score = tokenizer, below, score
        self.how = how or greedy(64)

    def scores(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """Likeness of what the model writes to every row's answer, `[n]` float64 on the CPU."""
        texts = written(model, self.tokenizer, rows, self.how)
        found = torch.as_tensor(self.score(wanted(self.tokenizer, rows), texts)).double().cpu()
        if found.shape != (len(rows),) or not bool(found.isfinite().all()):
            raise ValueError(
                f"Forgotten: score must return [{len(rows)}] finite numbers, got "
                f"{list(found.shape)}, {int(found.isfinite().sum())} finite"
            )
        return found

    def __call__(self, model: nn.Module, rows: Sequence[Row]) -> Tensor:
        """`[n]` bool, True where the row is unlearnt far enough."""
        return self.scores(model, rows) < self.below
