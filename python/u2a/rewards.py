"""The expected reward of the model's own answers as an outer objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Row, row_batches
from u2a.generate import Sampling, sampled_rows
from u2a.products import gradient
from u2a.tree import Tree

RewardFn = Callable[..., Sequence[float | None]]


def rewards(rows: Sequence[Row], tokenizer: Any, reward: RewardFn) -> Tensor:
    """`[n]` float64 from a function with the signature of TRL's reward functions.

    Called as ``reward(prompts=[str], completions=[str], completion_ids=[[int]], **columns)``, the
    columns being what all rows have in `meta`; None means not applicable and counts as 0.
    Raises ValueError for a wrong number of values or a non-finite one, by uid.
    """
    text = tokenizer.decode
    columns = set.intersection(*(set(r.meta) for r in rows)) if rows else set()
    found = list(
        reward(
            prompts=[text(r.prompt_ids, skip_special_tokens=True) for r in rows],
            completions=[text(r.answer_ids, skip_special_tokens=True) for r in rows],
            completion_ids=[list(r.answer_ids) for r in rows],
            **{c: [r.meta[c] for r in rows] for c in columns},
        )
    )
    if len(found) != len(rows):
        raise ValueError(f"reward: wanted one value per completion, {len(rows)}; got {len(found)}")
    out = torch.tensor([0.0 if x is None else float(x) for x in found], dtype=torch.float64)
    bad = (~out.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"reward: not finite for {len(bad)} completions, first {rows[bad[0]].uid}")
    return out


class Reward:
    """J = E over prompts and the model's answers of r(x, y), by REINFORCE.

    grad J = E[(r - b) grad log pi(y|x)], b the mean reward of the same prompt's other answers
    (leave-one-out, arXiv 2402.14740). Answers are drawn at the parameters present, with the same
    seed each time, so that two calls differ by the parameters only.
    """

    def __init__(
        self,
        prompts: Sequence[Row],
        tokenizer: Any,
        reward: RewardFn,
        how: Sampling | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.how = how or Sampling(samples=4)
        if self.how.samples < 2:
            raise ValueError(
                f"Reward: samples must be at least 2 (leave-one-out), got {self.how.samples}"
            )
        self.prompts, self.tokenizer, self.reward = prompts, tokenizer, reward
        self.batch_tokens = batch_tokens

    def draw(self, model: nn.Module) -> tuple[list[Row], Tensor]:
        rows = sampled_rows(model, self.tokenizer, self.prompts, self.how, self.how.seed)
        return rows, rewards(rows, self.tokenizer, self.reward)

    def value(self, model: nn.Module) -> float:
        return float(self.draw(model)[1].mean())

    def advantages(self, r: Tensor) -> Tensor:
        """r minus the mean of the same prompt's other answers."""
        k = self.how.samples
        grouped = r.view(-1, k)
        others = (grouped.sum(1, keepdim=True) - grouped) / (k - 1)
        return (grouped - others).flatten()

    def gradient(self, model: nn.Module) -> Tree:
        rows, r = self.draw(model)
        coef = self.advantages(r) / len(rows)
        return gradient(
            model, row_batches(rows, self.batch_tokens), AnswerLogps.sequence, weights=coef
        )

    def hvp(self, model: nn.Module, v: Mapping[str, Tensor]) -> Tree:
        raise ValueError(
            "Reward: an expectation over drawn answers has no Hessian product here; wanted a "
            "method that needs only its gradient"
        )
