"""The model's own answers, and the expected reward of them as an outer objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from u2a.adapter import adapter_disabled, device_of, evaluating, sequence_logps
from u2a.batch import AnswerLogps, Row, row_batches
from u2a.errors import DataError
from u2a.products import gradient
from u2a.tree import Tree

RewardFn = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Draw:
    """How answers are drawn: `per_prompt` of each, `temperature` (0: greedy), `top_p`."""

    per_prompt: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def answers(model: nn.Module, prompts: Sequence[Row], tokenizer: Any, how: Draw) -> list[Row]:
    """`per_prompt` answers to each row's prompt, prompt by prompt, cut after the end token.

    Prompts of one length form one batch, so nothing is padded on the left. The random state of the
    caller is left alone; the same seed and parameters give the same answers. Rows without prompt
    tokens raise DataError.
    """
    empty = [r.uid for r in prompts if not r.prompt_ids]
    if empty:
        raise DataError(f"answers: {len(empty)} rows have no prompt, first uid {empty[0]}")
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(prompts):
        by_length.setdefault(len(row.prompt_ids), []).append(i)
    found: dict[int, list[Row]] = {}
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model):
        torch.manual_seed(how.seed)
        for length in sorted(by_length):
            group = by_length[length]
            ids = torch.tensor([prompts[i].prompt_ids for i in group], device=device)
            out = _generate(model, ids, tokenizer, how)[:, length:].tolist()
            for n, i in enumerate(group):
                these = out[n * how.per_prompt : (n + 1) * how.per_prompt]
                found[i] = [
                    _row(prompts[i], a, tokenizer.eos_token_id, k) for k, a in enumerate(these)
                ]
    return [row for i in range(len(prompts)) for row in found[i]]


def _generate(model: Any, ids: Tensor, tokenizer: Any, how: Draw) -> Tensor:
    sampled: dict[str, Any] = {"do_sample": how.temperature > 0}
    if how.temperature > 0:
        sampled |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=how.max_new_tokens,
        num_return_sequences=how.per_prompt, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id, use_cache=True, **sampled,
    )  # fmt: skip
    return found


def _row(prompt: Row, answer: list[int], eos: int, k: int) -> Row:
    if eos in answer:
        answer = answer[: answer.index(eos) + 1]
    uid = f"{prompt.uid}#{k}"
    return Row(uid, prompt.prompt_ids, tuple(answer), prompt.source, prompt.meta)


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
        how: Draw | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.how = how or Draw()
        if self.how.per_prompt < 2:
            raise ValueError(
                f"Reward: per_prompt must be at least 2 (leave-one-out), got {self.how.per_prompt}"
            )
        self.prompts, self.tokenizer, self.reward = prompts, tokenizer, reward
        self.batch_tokens = batch_tokens

    def draw(self, model: nn.Module) -> tuple[list[Row], Tensor]:
        rows = answers(model, self.prompts, self.tokenizer, self.how)
        return rows, rewards(rows, self.tokenizer, self.reward)

    def value(self, model: nn.Module) -> float:
        return float(self.draw(model)[1].mean())

    def advantages(self, r: Tensor) -> Tensor:
        """r minus the mean of the same prompt's other answers."""
        k = self.how.per_prompt
        grouped = r.view(-1, k)
        others = (grouped.sum(1, keepdim=True) - grouped) / (k - 1)
        return (grouped - others).flatten()

    def gradient(self, model: nn.Module) -> Tree:
        rows, r = self.draw(model)
        return weighted_gradient(model, rows, self.advantages(r) / len(rows), self.batch_tokens)

    def hvp(self, model: nn.Module, v: Mapping[str, Tensor]) -> Tree:
        raise ValueError(
            "Reward: an expectation over drawn answers has no Hessian product here; wanted a "
            "method that needs only its gradient"
        )


def weighted_gradient(
    model: nn.Module, rows: Sequence[Row], coef: Tensor, batch_tokens: int
) -> Tree:
    """sum_i coef_i grad log pi(row i)."""
    return gradient(model, row_batches(rows, batch_tokens), AnswerLogps.sequence, weights=coef)


def reference_logps_of(model: nn.Module, rows: Sequence[Row], batch_tokens: int) -> Tensor:
    """Log-probabilities of drawn answers under the model without its adapter, `[n]` float64."""
    with adapter_disabled(model):
        return sequence_logps(model, rows, batch_tokens).double()
