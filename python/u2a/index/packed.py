"""Packed rows: a batch's tokens end to end, no padding in any linear layer, norm or activation.

Attention sees each example alone: between its projections and its output the rows are laid out as
`[B, T]` (views when all have one length), where padding to the right changes nothing under a causal
mask. It is reached through transformers' attention registry, so no model code is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from u2a.batch import Row

NAME = "u2a_packed"


def moved(t: Tensor, device: torch.device) -> Tensor:
    """t on `device`, through pinned memory so that nobody waits for a GPU."""
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


@dataclass(frozen=True)
class Packed:
    """B examples in N tokens.

    `ids`, `position` `[1, N]`; `offsets [B+1]` int32 (cu_seqlens). For the n answer tokens: `at`
    (the token whose hidden state predicts it), `target`, `row` (its example), `answers [B+1]`
    (offsets of the examples among them), `count [B]`. `pad [B*longest]`, `unpad [N]`: the padded
    layout inside attention, None when all lengths are equal. `index [B]`, on the CPU: row numbers.
    """

    ids: Tensor
    position: Tensor
    offsets: Tensor
    at: Tensor
    target: Tensor
    row: Tensor
    answers: Tensor
    count: Tensor
    pad: Tensor | None
    unpad: Tensor | None
    index: Tensor
    longest: int

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def to(self, device: torch.device) -> Packed:
        """On `device`; `index` stays on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, v in values.items():
            if isinstance(v, Tensor) and name != "index":
                values[name] = moved(v, device)
        return Packed(**values)


def pack(rows: Sequence[Row], index: Sequence[int] | None = None) -> Packed:
    """Rows end to end. The first token of a row is never a target; an empty row is refused."""
    if not rows:
        raise ValueError("pack: rows must hold at least one Row, got none")
    if empty := [r.source or r.uid for r in rows if not len(r)]:
        raise ValueError(f"pack: rows must hold at least one token each, got none in {empty[0]}")
    lengths = [len(r) for r in rows]
    length = torch.tensor(lengths)
    starts = length.cumsum(0) - length
    tokens = int(length.sum())
    row = torch.repeat_interleave(torch.arange(len(rows)), length)
    position = torch.arange(tokens) - starts[row]
    first = torch.tensor([max(len(r.prompt_ids), 1) for r in rows])
    target = (position >= first[row]).nonzero().flatten()
    ids = torch.tensor([t for r in rows for t in r.prompt_ids + r.answer_ids])
    count = torch.bincount(row[target], minlength=len(rows))
    pad = unpad = None
    longest = max(lengths)
    if min(lengths) < longest:
        inside = torch.arange(longest)[None].minimum(length[:, None] - 1)
        pad = (starts[:, None] + inside).flatten()
        unpad = row * longest + position
    return Packed(
        ids[None], position[None], _offsets(length), target - 1, ids[target], row[target],
        _offsets(count), count, pad, unpad,
        torch.tensor(list(index) if index is not None else range(len(rows))), longest,
    )  # fmt: skip


def _offsets(count: Tensor) -> Tensor:
    return F.pad(count.cumsum(0), (1, 0)).to(torch.int32)


_running: list[Packed] = []


@contextmanager
def running(packed: Packed) -> Iterator[None]:
    """The rows that attention answers for: open over the forward, and over the backward as well
    when activation checkpointing runs the forward again there."""
    _running.append(packed)
    try:
        yield
    finally:
        _running.pop()


def hidden_states(backbone: Callable[..., Any], packed: Packed) -> Tensor:
    """Last hidden states `[N, d]` of a backbone whose attention implementation is `NAME`."""
    out = backbone(input_ids=packed.ids, position_ids=packed.position, use_cache=False)
    return out.last_hidden_state[0]


def _to_rows(t: Tensor, packed: Packed) -> Tensor:
    """[1, H, N, D] -> [B, H, T, D]"""
    rows = t[0].transpose(0, 1)  # [N, H, D]
    if packed.pad is not None:
        rows = rows.index_select(0, packed.pad)
    return rows.unflatten(0, (len(packed), packed.longest)).transpose(1, 2)


def _to_tokens(t: Tensor, packed: Packed) -> Tensor:
    """[B, H, T, D] -> [1, N, H, D]"""
    tokens = t.transpose(1, 2).flatten(0, 1)
    return (tokens if packed.unpad is None else tokens.index_select(0, packed.unpad))[None]


def _window(t: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal sliding-window mask `[T, T]`, True where a key is seen; None where causal says all."""
    if window is None or window >= t:
        return None
    i = torch.arange(t, device=device)
    return (i[None] <= i[:, None]) & (i[None] > i[:, None] - window)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, cap: float
) -> Tensor:
    """Softmax attention with soft-capped scores, in the open: no fused kernel of torch has it."""
    t = q.shape[2]
    if seen is None:
        seen = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    score = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))
    return torch.softmax(score.masked_fill(~seen, -math.inf), -1, dtype=_wide(q)).to(q.dtype) @ v


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, N, D] in, [1, N, H, D] out."""
    if not _running or attention_mask is not None or dropout or kwargs.get("s_aux") is not None:
        raise RuntimeError(
            f"{NAME}: this attention answers only packed rows inside u2a.index, without mask, "
            f"dropout and sinks; got mask {attention_mask is not None}, dropout {dropout}, "
            f"sinks {kwargs.get('s_aux') is not None}"
        )
    packed = _running[-1]
    q, k, v = (_to_rows(t, packed) for t in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    seen = _window(packed.longest, sliding_window, q.device)
    if softcap is not None:
        return _to_tokens(_capped(q, k, v, seen, scale, softcap), packed), None
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return _to_tokens(out, packed), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *args, **kwargs: None)
