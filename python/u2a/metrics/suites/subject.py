"""One model under evaluation, and what is found about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import Row
from u2a.config import Config
from u2a.errors import GuardError
from u2a.evaluate import token_nll
from u2a.metrics import generation
from u2a.metrics.alignment import Classifier, Compare, Judge, rate
from u2a.metrics.estimate import Estimate, mean
from u2a.metrics.tokens import AnswerTokens, answer_tokens, without_end
from u2a.rewards import RewardFn


@dataclass
class Findings:
    """One model on one data set: `values` by metric; `samples`, per row uid, source and numbers."""

    task: str
    rows: Sequence[Row]
    values: dict[str, Estimate] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples = [{"uid": r.uid, "source": r.source} for r in self.rows]

    def per_row(self, name: str, values: Tensor) -> None:
        """A metric that is the mean of one number per row (of the first rows, if fewer)."""
        self.values[name] = mean(values)
        for sample, value in zip(self.samples, values.tolist(), strict=False):
            sample[name] = value

    def single(self, name: str, value: float, n: int | None = None) -> None:
        """A metric of the whole set."""
        self.values[name] = Estimate(value, math.nan, len(self.rows) if n is None else n)

    def wins(self, name: str, verdict: Tensor) -> None:
        """Win rate of verdicts 1, 0, -1, with the ends of its Wilson interval."""
        self.per_row(name, (1 + verdict) / 2)
        found = rate(verdict)
        self.single(f"{name}_low", found.low, len(verdict))
        self.single(f"{name}_high", found.high, len(verdict))

    def texts(self, name: str, texts: Sequence[str]) -> None:
        for sample, text in zip(self.samples, texts, strict=False):
            sample[name] = text


@dataclass(frozen=True)
class Judges:
    """Functions of the user: a TRL reward; (prompts, answers) -> harm in [0, 1]; texts -> P(sound);
    (prompts, first, second) -> 1 where the first answer is better, -1 or 0. None: what needs it is
    not measured (attacks: told by refusal words; wins: by the reward)."""

    reward: RewardFn | None = None
    judge: Judge | None = None
    classifier: Classifier | None = None
    compare: Compare | None = None

    def names(self) -> dict[str, str]:
        """What was asked, for the record."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        return {
            k: f"{v.__module__}:{getattr(v, '__qualname__', type(v).__qualname__)}"
            for k, v in given.items()
        }


@dataclass
class Subject:
    """`name`: base, unlearned or retrained. `show`: samples hold texts too."""

    name: str
    model: nn.Module
    tokenizer: Any
    cfg: Config
    show: bool = False
    judges: Judges = Judges()

    @property
    def batch_tokens(self) -> int:
        return self.cfg.unlearn.batch_tokens

    def tokens(self, rows: Sequence[Row]) -> AnswerTokens:
        found = answer_tokens(self.model, rows, self.batch_tokens)
        owner = torch.repeat_interleave(torch.arange(len(rows)), found.count)
        self.check(rows, owner[~found.logp.isfinite()])
        return found

    def trimmed(self, tokens: AnswerTokens, rows: Sequence[Row]) -> AnswerTokens:
        return without_end(tokens, rows, self.tokenizer.eos_token_id)

    def nll(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(summed NLL `[R]`, answer tokens `[R]`)."""
        nll, count = token_nll(self.model, rows, self.batch_tokens)
        self.check(rows, (~nll.isfinite()).nonzero().flatten())
        return nll, count

    def check(self, rows: Sequence[Row], bad: Tensor) -> None:
        """Raises GuardError for rows whose log-probability is not finite."""
        if len(bad):
            row = rows[int(bad[0])]
            raise GuardError(
                f"eval: the {self.name} model gives a non-finite log-probability to uid {row.uid} "
                f"({row.source}), and {len(bad.unique()) - 1} other rows"
            )

    def written(
        self, rows: Sequence[Row], tokens: int | None = None, stop: Sequence[str] = ()
    ) -> list[str]:
        """Greedy answers to the rows' prompts."""
        how = generation.greedy(tokens or self.cfg.eval.max_new_tokens)
        return generation.written(self.model, self.tokenizer, rows, how, stop)


def pooled_perplexity(nll: Tensor, count: Tensor) -> float:
    """exp(sum NLL / sum tokens)."""
    each = float(nll.sum() / count.sum())
    return math.exp(each) if each < 700 else math.inf


def summed(tokens: AnswerTokens) -> Tensor:
    """NLL of every row `[R]`."""
    return torch.stack([-x.sum() for x in tokens.logp.split(tokens.count.tolist())])


Entries = dict[str, Mapping[str, Any]]
