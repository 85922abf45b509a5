"""One matrix per group of rows, for mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x `[M, d_in]` in groups that end at `ends [E]` int32, times weight `[E, d_out, d_in]`^T.

    The grouped kernel takes no float64 and wants d_in and d_out to fill multiples of 16 bytes;
    elsewhere the groups are multiplied one by one (a synchronisation).
    """
    if x.dtype != torch.float64 and not any(d * x.element_size() % 16 for d in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])
