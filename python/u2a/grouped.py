"""One matrix per group of rows, for mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x `[M, d_in]` in groups that end at `ends [E]` int32, times weight `[E, d_out, d_in]`^T.

    float64 has no grouped kernel: there the groups are multiplied one by one (a synchronisation).
    """
    if x.dtype != torch.float64:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.tensor_split(ends[:-1].cpu().long())
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])
