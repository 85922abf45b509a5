"""Outer objectives on the model's own answers: their expected reward, or how far their
distribution is from a target."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from u2a.adapter import reference_logps, sequence_logps
from u2a.batch import AnswerLogps, Row, row_batches
from u2a.errors import ConfigError
from u2a.generate import Sampling, sampled_rows
from u2a.losses.fdpg import DIVERGENCES, FDPG, Samples, binary, rlhf
from u2a.products import gradient
from u2a.tree import Tree

RewardFn = Callable[..., Sequence[float | None]]


def load_reward(name: str, where: str = "objective.reward") -> RewardFn:
    """The function named "module:function"; modules of the working directory are found too.

    Raises ConfigError naming the key `where`: no such module, or no such function in it.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        raise ConfigError(f"{where}: {name!r}, wanted a module that can be imported: {e}") from None
    finally:
        sys.path.remove(here)
    made = getattr(found, function, None)
    if not callable(made):
        near = difflib.get_close_matches(function, dir(found), n=1, cutoff=0.5)
        words = f", nearest {near[0]!r}" if near else ""
        raise ConfigError(f"{where}: {name!r}, wanted a function of {module}{words}")
    return made  # type: ignore[no-any-return]


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


class ToTarget(Reward):
    """J = -D_f(pi || p), p the target answer distribution known up to its normaliser Z.

    p is proportional to a(y|x) exp(r(x, y) / beta) ("rlhf") or to a(y|x) where r > 0 ("binary"), a
    the model with its adapter disabled. grad J = E[(r' - b) grad log pi], r' = -f'(pi/p), b as in
    `Reward`; Z of every prompt is the mean of P/pi over its answers, so that both are biased by
    O(1 / samples). Source: f-DPG, arXiv 2302.08215.

    Args:
        divergence: a key of `u2a.losses.fdpg.DIVERGENCES`.
        beta: of "rlhf".

    Raises ValueError for an unknown divergence or target. Others as `Reward`.
    """

    def __init__(
        self,
        prompts: Sequence[Row],
        tokenizer: Any,
        reward: RewardFn,
        how: Sampling | None = None,
        batch_tokens: int = 8192,
        *,
        divergence: str = "js",
        target: Literal["rlhf", "binary"] = "rlhf",
        beta: float = 0.3,
    ) -> None:
        super().__init__(prompts, tokenizer, reward, how, batch_tokens)
        FDPG(divergence)  # refuses an unknown one
        if target not in ("rlhf", "binary"):
            raise ValueError(f"ToTarget: target must be 'rlhf' or 'binary', got {target!r}")
        self.divergence, self.target, self.beta = divergence, target, beta

    def _terms(self, model: nn.Module) -> tuple[list[Row], Tensor, Tensor, list[int]]:
        """(answers, log pi, log P, number of the prompt) of every drawn answer."""
        rows, r = super().draw(model)
        lp = sequence_logps(model, rows, self.batch_tokens).double().cpu()
        base = reference_logps(model, rows, self.batch_tokens).double().cpu()
        made = rlhf(base, r, self.beta) if self.target == "rlhf" else binary(base, r > 0)
        return rows, lp, made, [i // self.how.samples for i in range(len(rows))]

    def draw(self, model: nn.Module) -> tuple[list[Row], Tensor]:
        """Answers and their r'."""
        rows, lp, target, prompt = self._terms(model)
        log_t, _ = FDPG(self.divergence).ratios(Samples(lp, target, context=prompt))
        return rows, -DIVERGENCES[self.divergence].slope(log_t)

    def value(self, model: nn.Module) -> float:
        _, lp, target, prompt = self._terms(model)
        return -float(FDPG(self.divergence).estimate(Samples(lp, target, context=prompt)))
