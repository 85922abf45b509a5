"""Rows of a table, with a gradient that does not lose the terms of frequent rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def lookup(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``; a bfloat16 or float16 weight's gradient is summed
    in float32 and rounded once. Torch adds up in the weight's type on a CPU: 4096 ones make 256.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16) or not weight.requires_grad:
        return F.embedding(ids, weight, padding_idx)
    found: Tensor = _Lookup.apply(ids, weight, padding_idx)
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding_idx = weight.shape[0], -1 if padding_idx is None else padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,), (g,) = ctx.saved_tensors, grads
        backward = torch.ops.aten.embedding_dense_backward
        return None, backward(g.float(), ids, ctx.rows, ctx.padding_idx, False).to(g), None
