"""grad_project in plain torch: projections of all tokens, one product an example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u2a_kernels._segments import accum_dtype, segments
from u2a_kernels.ops.grad_project.rademacher import INPUTS, OUTPUTS, signs


def width(rows: Tensor, p: Tensor | None, k: int, seed: int) -> int:
    """k of a side: the projection's rows, or all columns under the identity."""
    if p is not None and p.ndim == 2:
        return p.shape[0]
    return k if seed >= 0 else rows.shape[1]


class Side:
    """`values` [N, k] of the tokens without the 1 / sqrt(k) of signs, which is `scale`."""

    def __init__(
        self, rows: Tensor, p: Tensor | None, k: int, seed: int, stream: int, acc: torch.dtype
    ) -> None:
        self.rows, self.p, self.acc = rows, p, acc
        self.hot = not rows.is_floating_point()
        self.matrix: Tensor | None = None  # [k, d], of one-hot rows their columns [k, N]
        self.scale = 1.0
        self.is_tensor = p is not None and p.ndim == 2
        if p is not None and self.is_tensor:
            self.matrix = (p[:, rows] if self.hot else p).to(acc)
        elif seed >= 0:
            columns = rows if self.hot else torch.arange(rows.shape[1], device=rows.device)
            self.matrix = signs(k, columns, seed, stream).to(acc)
            self.scale = 1 / math.sqrt(k)
        if self.matrix is None:
            self.values = rows.to(acc)
        else:
            self.values = self.matrix.T if self.hot else rows.to(acc) @ self.matrix.T

    def backward(self, grad: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the rows and of a tensor projection from that of `values`."""
        rows = like.new_empty(0)
        if not self.hot:
            rows = (grad if self.matrix is None else grad @ self.matrix).to(self.rows.dtype)
        if self.p is None or not self.is_tensor:
            return rows, like.new_empty(0)
        if self.hot:
            p = grad.new_zeros(self.p.shape).index_add_(1, self.rows, grad.T)
        else:
            p = grad.T @ self.rows.to(self.acc)
        return rows, p.to(self.p.dtype)


def _sides(x, g, p_in, p_out, k_in, k_out, seed_in, seed_out):
    acc = accum_dtype(x)
    maps = zip(g, p_out, k_out, seed_out, strict=True)
    return Side(x, p_in, k_in, seed_in, INPUTS, acc), [Side(*m, OUTPUTS, acc) for m in maps]


def reference(
    x: Tensor, g: list[Tensor], offsets: Tensor, p_in: Tensor | None, p_out: list[Tensor],
    k_in: int, k_out: list[int], seed_in: int, seed_out: list[int],
) -> list[Tensor]:  # fmt: skip
    """On CUDA `offsets` is read back: one host synchronisation a map."""
    a, sides = _sides(x, g, p_in, p_out, k_in, k_out, seed_in, seed_out)
    outs = []
    for s in sides:
        out = a.values.new_zeros(offsets.shape[0] - 1, s.values.shape[1], a.values.shape[1])
        for b, t in segments(offsets):
            torch.mm(s.values[t].T, a.values[t], out=out[b])
        outs.append(out.mul_(a.scale * s.scale))
    return outs


def reference_bwd(
    grad: list[Tensor], x: Tensor, g: list[Tensor], offsets: Tensor, p_in: Tensor | None,
    p_out: list[Tensor], k_in: int, k_out: list[int], seed_in: int, seed_out: list[int],
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    a, sides = _sides(x, g, p_in, p_out, k_in, k_out, seed_in, seed_out)
    d_in = torch.zeros_like(a.values)
    d_out = []
    for s, w in zip(sides, grad, strict=True):
        w = w.to(a.acc) * (a.scale * s.scale)
        d = torch.zeros_like(s.values)
        for b, t in segments(offsets):
            d_in[t] += s.values[t] @ w[b]
            d[t] = a.values[t] @ w[b].T
        d_out.append(s.backward(d, s.p if s.hot or s.is_tensor else x))
    dx, dp_in = a.backward(d_in, x)
    return dx, [rows for rows, _ in d_out], dp_in, [p for _, p in d_out]
