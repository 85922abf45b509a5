"""Sampled continuations by transformers' `generate`, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from u2a.adapter import device_of, evaluating
from u2a.batch import Row

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: `top_k` 0 and `top_p` 1 are the whole distribution.

    Raises ValueError for a value out of range. `batch` prompts are continued at once; it is part of
    the settings since the draws depend on it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 200
    samples: int = 1
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: wanted > 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: wanted in (0, 1], got {self.top_p}")
        for name in ("max_new_tokens", "samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted >= 1, got {getattr(self, name)}")
        if self.top_k < 0:
            raise ValueError(f"top_k: wanted >= 0, got {self.top_k}")


def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Ids], how: Sampling, seed: int,
    *, ended: bool = False,
) -> list[Ids]:  # fmt: skip
    """One continuation of each prompt, without its end-of-sequence token unless `ended`.

    All at once, padded on the left. The global random state is put back; the draws depend on `seed`
    and on the prompts of the call. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError("continuations: every prompt must hold at least one token, got an empty")
    device, width = device_of(model), max(map(len, prompts))
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        mask[b, width - len(prompt) :] = 1
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), evaluating(model):
        torch.manual_seed(seed)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=True,
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, num_beams=1,
            repetition_penalty=1.0, max_new_tokens=how.max_new_tokens, pad_token_id=pad,
            eos_token_id=eos, use_cache=True,
        )  # fmt: skip
    return [_until(row, eos, ended) for row in out[:, width:].tolist()]


def _until(row: list[int], eos: int, ended: bool) -> Ids:
    return tuple(row[: row.index(eos) + ended] if eos in row else row)


def sampled_rows(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], how: Sampling, seed: int
) -> list[Row]:
    """`how.samples` answers of the model to each row's prompt, as rows with the uid of theirs.

    For online objectives (`u2a.losses.fdpg`, `u2a.losses.steps.pmpo`): `u2a.answer_logps` of them
    is what the model sampled from, if `how` is the whole distribution at temperature 1.
    """
    asked = [row for row in rows for _ in range(how.samples)]
    out = []
    for i in range(0, len(asked), how.batch):
        group = asked[i : i + how.batch]
        found = continuations(
            model, tokenizer, [r.prompt_ids for r in group], how, seed + i, ended=True
        )
        out += [replace(r, answer_ids=ids) for r, ids in zip(group, found, strict=True)]
    return out
