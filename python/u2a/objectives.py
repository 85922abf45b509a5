"""Outer objectives J: what alignment is, as a number to raise, with its gradient and Hessian.

Each is J = sum of per-row functions of answer log-probabilities, so its derivatives are those of
`u2a.products`. Objectives over the model's own answers draw them first (`u2a.sampling`) and hold
them until `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from u2a.adapter import evaluating, reference_logps
from u2a.batch import AnswerLogps, Batch, Pair, Row, pair_batches, row_batches
from u2a.losses import dpo_terms
from u2a.products import answer_logps, gradient, hvp, with_refs
from u2a.tree import Tree

Loss = Callable[[AnswerLogps], Tensor]


class Objective(Protocol):
    """J at the model's present parameters; higher is better."""

    def value(self, model: nn.Module) -> float: ...

    def gradient(self, model: nn.Module) -> Tree:
        """grad J over the trainable parameters."""
        ...

    def hvp(self, model: nn.Module, v: Mapping[str, Tensor]) -> Tree:
        """(Hessian of J) v."""
        ...


class RowSum:
    """J = sum over the rows of `batches` of loss(lp), `[B]`; refs as in `u2a.gradient`."""

    def __init__(
        self, batches: Sequence[Batch], loss: Loss, ref: Sequence[Tensor] | None = None
    ) -> None:
        self.batches, self.loss, self.ref = list(batches), loss, ref
        rows = 1 + max(int(b.index.max()) for b in self.batches)
        self.ones = torch.ones(rows)

    def value(self, model: nn.Module) -> float:
        with evaluating(model):
            parts = [
                self.loss(answer_logps(model, batch, ref=r)).double().sum()
                for batch, r in with_refs(self.batches, self.ref)
            ]
        return float(torch.stack(parts).sum())

    def gradient(self, model: nn.Module) -> Tree:
        return gradient(model, self.batches, self.loss, weights=self.ones, ref=self.ref)

    def hvp(self, model: nn.Module, v: Mapping[str, Tensor]) -> Tree:
        return hvp(model, self.batches, self.loss, v, weights=self.ones, ref=self.ref)


@dataclass(frozen=True)
class PairSet:
    """Preference pairs with their reference log-probabilities `[P]` chosen, `[P]` rejected."""

    pairs: Sequence[Pair]
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def build(cls, model: nn.Module, pairs: Sequence[Pair], batch_tokens: int) -> PairSet:
        chosen = reference_logps(model, [p.chosen for p in pairs], batch_tokens)
        rejected = reference_logps(model, [p.rejected for p in pairs], batch_tokens)
        return cls(pairs, chosen, rejected)


class Preference(RowSum):
    """Minus the DPO loss, mean over P pairs of log sigmoid(beta margin) (arXiv 2305.18290)."""

    def __init__(self, held: PairSet, beta: float = 0.3, batch_tokens: int = 8192) -> None:
        batches = pair_batches(held.pairs, batch_tokens)
        ref = [
            torch.cat([held.chosen[b.index[:half]], held.rejected[b.index[half:]]])
            for b in batches
            for half in [len(b) // 2]
        ]
        super().__init__(batches, _pair_terms(beta, len(held.pairs)), ref)


def _pair_terms(beta: float, pairs: int) -> Loss:
    """One value per row: each pair's term / P on its chosen row, 0 on the other."""

    def loss(lp: AnswerLogps) -> Tensor:
        terms = dpo_terms(lp, beta) / pairs
        return torch.cat([terms, torch.zeros_like(terms)])

    return loss


class Likelihood(RowSum):
    """Mean over rows of the wanted answers' log-probability, per token where `per_token`."""

    def __init__(
        self, rows: Sequence[Row], batch_tokens: int = 8192, *, per_token: bool = True
    ) -> None:
        n = len(rows)

        def loss(lp: AnswerLogps) -> Tensor:
            return (lp.mean() if per_token else lp.sequence()) / n

        super().__init__(row_batches(rows, batch_tokens), loss)


class Margin(RowSum):
    """Mean over P pairs of beta (log-ratio of chosen - log-ratio of rejected), the implicit
    reward margin."""

    def __init__(self, held: PairSet, beta: float = 0.3, batch_tokens: int = 8192) -> None:
        n = len(held.pairs)
        inner = Preference(held, beta, batch_tokens)

        def loss(lp: AnswerLogps) -> Tensor:
            assert lp.ref is not None
            gain = beta / n * (lp.sequence() - lp.ref.to(lp.logp))
            sign = torch.ones_like(gain)
            sign[len(gain) // 2 :] = -1
            return sign * gain

        super().__init__(inner.batches, loss, inner.ref)
