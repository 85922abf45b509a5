"""What the loss heads share on a GPU: soft cap, products with fp32 results, shares of scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._triton import tanh, tl, triton

SCRATCH_ELEMENTS = 1 << 27


@triton.jit
def capped(a, softcap, HAS_CAP: tl.constexpr):
    """softcap tanh(a / softcap)."""
    if HAS_CAP:
        a = softcap * tanh(a / softcap)
    return a


def share(length: int, other: int, elements: int) -> int:
    """How much of one side of [N, V] is in scratch at once: an eighth of it at most."""
    return max(1, min(elements // other, -(-length // 8)))


def mm32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; on a GPU without fp32 copies of half-precision operands."""
    if a.dtype != torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
