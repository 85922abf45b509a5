"""The text a model writes after a prompt, and the text that was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from u2a.batch import Row
from u2a.generate import Sampling, continuations


def greedy(max_new_tokens: int, batch: int = 8) -> Sampling:
    """Always the most likely token."""
    return Sampling(top_k=1, max_new_tokens=max_new_tokens, batch=batch)


def prompts(tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    return [tokenizer.decode(r.prompt_ids, skip_special_tokens=True).strip() for r in rows]


def wanted(tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """The rows' own answers as text."""
    return [tokenizer.decode(r.answer_ids, skip_special_tokens=True).strip() for r in rows]


def written(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    how: Sampling,
    stop: Sequence[str] = (),
) -> list[str]:
    """The model's own answers to the rows' prompts, cut before the first of the `stop` strings.

    Prompts of like length go together. Raises ValueError for a row without prompt.
    """
    empty = [r.uid for r in rows if not r.prompt_ids]
    if empty:
        raise ValueError(f"written: {len(empty)} rows have no prompt to answer, first {empty[0]}")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    out = [""] * len(rows)
    for at in range(0, len(order), how.batch):
        group = order[at : at + how.batch]
        asked = [rows[i].prompt_ids for i in group]
        found = continuations(model, tokenizer, asked, how, how.seed + at)
        for i, ids in zip(group, found, strict=True):
            out[i] = _cut(tokenizer.decode(ids, skip_special_tokens=True).strip(), stop)
    return out


def _cut(text: str, stop: Sequence[str]) -> str:
    for word in stop:
        text = text.partition(word)[0]
    return text.strip()
