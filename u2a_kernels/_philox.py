"""Philox4x32-10 in torch integers: the counter-based random words that every device shares.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAG = 0x55324153
LOW = 0xFFFFFFFF


def philox(seed: int, c0: Tensor, c1: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Four words for counters (c0, c1, stream, TAG) and key `seed`, int64 holding 32 bits each."""

    def mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a 32 x 32 bit product, in int64 without overflow."""
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & LOW

    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2, c3 = torch.full_like(c0, stream), torch.full_like(c0, TAG)
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        hi0, lo0 = mul(0xD2511F53, c0)
        hi1, lo1 = mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3
