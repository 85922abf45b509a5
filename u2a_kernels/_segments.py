"""Ragged segments in plain torch, for references: offsets [B+1] over N packed rows, no sync."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def accum_dtype(x: Tensor) -> torch.dtype:
    """Accumulation and result type: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def segment_ids(offsets: Tensor, n: int) -> Tensor:
    """The example each of the N rows belongs to, int64 `[N]`, without a host synchronisation."""
    rows = torch.arange(n, device=offsets.device)
    return torch.searchsorted(offsets[1:].to(torch.int64).contiguous(), rows, right=True)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows of each segment: `[N, ...] -> [B, ...]`."""
    out = values.new_zeros(offsets.shape[0] - 1, *values.shape[1:])
    return out.index_add_(0, segment_ids(offsets, values.shape[0]), values)


def segments(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Number and token range of each non-empty example; on CUDA one host synchronisation."""
    bounds = offsets.tolist()
    for b, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if end > start:
            yield b, slice(start, end)


def ghost_limit(d_in: int, d_out: int) -> int:
    """The longest example whose norm costs less by products of tokens than by its gradient.

    Multiplications: T^2 (d_in + d_out) / 2, a half by symmetry, against T d_in d_out.
    """
    return 2 * d_in * d_out // max(1, d_in + d_out)
