"""Rademacher projections as a seed: entries +-1 / sqrt(k) from counter-based Philox, on any device
the same. Kernels make the signs where they use them; here they are made in torch integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._checks import FLOATS, wanted
from u2a_kernels._philox import philox

OUTPUTS, INPUTS = 2, 3
STREAMS = {"out": OUTPUTS, "in": INPUTS}


class Rademacher(NamedTuple):
    """A [k, d] projection with entries +-1 / sqrt(k), given by its seed, 0 <= seed < 2^63."""

    k: int
    seed: int


def check_rademacher(op: str, name: str, k: object, seed: object) -> None:
    for what, value, low in (("k", k, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or not low <= value < 1 << 63:
            raise wanted(op, f"{name} {what}", f"an integer from {low} to 2^63 - 1", value)


def rademacher(
    k: int,
    d: int,
    seed: int,
    side: str = "in",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The matrix that `Rademacher(k, seed)` stands for in `grad_project`.

    Args:
        k, d: rows and columns.
        seed: 0 <= seed < 2^63.
        side: "in" for p_in, "out" for p_out: two independent matrices of one seed.
        dtype: float32, bfloat16, float16 or float64; the entries are rounded to it.
        device: where to make it.

    Returns:
        [k, d] with E P^T P = I: P[j, c] = (1 - 2 bit) / sqrt(k), bit = bit (j & 31) of word
        ((j >> 5) & 3) of Philox4x32-10 with key (seed mod 2^32, seed >> 32) and counter
        (c, j >> 7, stream, 0x55324153); stream 2 for "out", 3 for "in".

    Raises:
        ValueError, TypeError: k, d, seed, side or dtype that does not fit, by name.

    Source: Achlioptas, JCSS 2003; Philox: Salmon et al., SC 2011.
    """
    op = "rademacher"
    check_rademacher(op, "argument", k, seed)
    if not isinstance(d, int) or not 0 <= d <= 1 << 32:
        raise wanted(op, "argument d", "an integer from 0 to 2^32", d)
    if side not in STREAMS:
        raise wanted(op, "side", '"in" or "out"', repr(side))
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    values = signs(k, torch.arange(d, device=device), seed, STREAMS[side])
    return values.to(torch.float64).mul_(1 / math.sqrt(k)).to(dtype)


def signs(k: int, columns: Tensor, seed: int, stream: int) -> Tensor:
    """sqrt(k) P at the given columns, int64 `[k, n]`."""
    j = torch.arange(k, device=columns.device)
    blocks = torch.arange((k + 127) // 128, device=columns.device)
    word = philox(seed, columns[None], blocks[:, None], stream)  # 4 of [blocks, n]
    rows = torch.stack(word, 1).flatten(0, 1)[j >> 5]
    return 1 - 2 * (rows >> (j & 31)[:, None] & 1)
