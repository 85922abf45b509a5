"""Rows, right-padded batches and answer log-probabilities: what the application passes around.

Masks come from lengths, never from pad ids. In a causal model a real token never sees the padding
to its right, so a bucketed right-padded batch needs no attention mask and is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One (prompt, answer). `uid` is a content hash, `source` is "file:line" for messages."""

    uid: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Pair:
    """One preference: the same prompt with a chosen and a rejected answer."""

    uid: str
    chosen: Row
    rejected: Row

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Batch:
    """`ids [B, T]` int64 right-padded; `answer [B, T]` bool, True where the token is a target;
    `length [B]`, `index [B]` int64 (row numbers in the data set the batch was cut from)."""

    ids: Tensor
    answer: Tensor
    length: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device) for t in (self.ids, self.answer, self.length, self.index)))

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probability of every answer token of a batch, flat.

    `logp [n]`; `row [n]` int64, the example each token belongs to; `count [B]` answer tokens per
    example; `ref` reference log-probabilities, `[B]` summed or `[B, L]` per token with zeros after
    a row's last, or None; `index [B]` row numbers or None.
    """

    logp: Tensor
    row: Tensor
    count: Tensor
    ref: Tensor | None = None
    index: Tensor | None = None

    def sequence(self) -> Tensor:
        """Summed log-probability per example, `[B]`."""
        return self.logp.new_zeros(self.count.shape[0]).index_add(0, self.row, self.logp)

    def mean(self) -> Tensor:
        """Mean log-probability per answer token, `[B]`; 0 for an example without answer tokens."""
        return self.sequence() / self.count.clamp_min(1)

    def position(self) -> Tensor:
        """Number of each token within its example's answer, `[n]`."""
        start = self.count.cumsum(0) - self.count
        return torch.arange(len(self.row), device=self.row.device) - start[self.row]

    def with_logp(self, logp: Tensor) -> AnswerLogps:
        return replace(self, logp=logp)


def collate(rows: Sequence[Row], index: Sequence[int] | None = None) -> Batch:
    """One right-padded batch. The first token of a row is never a target (nothing predicts it)."""
    if not rows:
        raise ValueError("collate: rows must hold at least one Row, got none")
    length = torch.tensor([len(r) for r in rows])
    width = int(length.max())
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    answer = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, r in enumerate(rows):
        ids[b, : len(r)] = torch.tensor(r.prompt_ids + r.answer_ids)
        answer[b, max(len(r.prompt_ids), 1) : len(r)] = True
    idx = torch.tensor(list(index) if index is not None else range(len(rows)))
    return Batch(ids, answer, length, idx)


def buckets(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers grouped by length (stable) so that rows x longest row <= batch_tokens.

    A row longer than `batch_tokens` gets a group of its own.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def row_batches(rows: Sequence[Row], batch_tokens: int) -> list[Batch]:
    """All rows once, bucketed by length; `Batch.index` leads back to the order of `rows`."""
    groups = buckets([len(r) for r in rows], batch_tokens)
    return [collate([rows[i] for i in g], g) for g in groups]


def pair_batches(pairs: Sequence[Pair], batch_tokens: int) -> list[Batch]:
    """P pairs become 2P rows: the P chosen, then their P rejected; `index` holds pair numbers."""
    groups = buckets([2 * len(p) for p in pairs], batch_tokens)
    return [
        collate([pairs[i].chosen for i in g] + [pairs[i].rejected for i in g], g + g)
        for g in groups
    ]


def total(batches: Iterable[Batch]) -> int:
    """Number of rows in all batches."""
    return sum(len(b) for b in batches)


Batches = Batch | Sequence[Batch]
Refs = Tensor | Sequence[Tensor] | None


def sequence(batches: Batches) -> Sequence[Batch]:
    found = [batches] if isinstance(batches, Batch) else batches
    if not len(found):
        raise ValueError("batches must hold at least one Batch, got none")
    return found


def with_refs(batches: Sequence[Batch], ref: Refs) -> Iterator[tuple[Batch, Tensor | None]]:
    """`ref`: `[N]` looked up by Batch.index, or one `[B]` per batch."""
    if ref is not None and not isinstance(ref, Tensor) and len(ref) != len(batches):
        raise ValueError(f"ref must hold one tensor per batch ({len(batches)}), got {len(ref)}")
    for i, batch in enumerate(batches):
        if isinstance(ref, Tensor):
            yield batch, ref[batch.index.to(ref.device)]
        else:
            yield batch, None if ref is None else ref[i]


def score_index(batches: Sequence[Batch], scores: Sequence[Tensor]) -> Tensor:
    """Row number of each score, partners left out."""
    return torch.cat([b.index[: len(s)] for b, s in zip(batches, scores, strict=True)])
