"""<G_b, G'_b'> for the per-example gradients of a linear layer over two sets of packed tokens.

Two equal forms, chosen by shape. Few tokens: (x x2^T) * (g g2^T) summed over both segments. Else
gradients: some rows of every G_b and G'_b' in bounded scratch, multiplied, added up. Neither
[N, N2] nor [B, d_out d_in] is held. A set against itself is read once and made symmetric.
Saved for backward: the inputs; the gradient of G_b, sum_b' w_bb' G'_b', is used the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, ghost_limit, segment_ids, segment_sum, segments
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.grad_gram import triton as _triton

BLOCK = 1 << 22


def grad_gram(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> Tensor:
    """Inner products of all pairs of per-example weight gradients of one layer.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        x2, g2, offsets2: the second set, [N2, d_in], [N2, d_out] and [B2+1], dtype of x. Passing
            the first set again (the same tensors) gives its Gram matrix for half the work.

    Returns:
        [B, B2], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x, g, x2 and g2.
        Held beside inputs and result: 8 MB of scratch on the CPU and 64 MB on CUDA, more only
        where 16 (on CUDA 4096) entries of every gradient would not fit.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    Equivalent torch: ``torch.einsum("boi,coi->bc", G, G2)`` with G_b = ``g[s:e].T @ x[s:e]``.

    Source: ghost inner products, Wang et al., arXiv 2406.11011, section 4.
    """
    op = "grad_gram"
    check_floats(op, x=x, g=g, x2=x2, g2=g2)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_dim(op, "x2", x2, "[N2, d_in]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    check_size(op, "x2", x2, "[N2, d_in]", (x2.shape[0], x.shape[1]))
    check_size(op, "g2", g2, "[N2, d_out]", (x2.shape[0], g.shape[1]))
    check_offsets(op, offsets, x.shape[0])
    check_offsets(op, offsets2, x2.shape[0], "offsets2", "x2")
    same = x2 is x and g2 is g and offsets2 is offsets
    sizes = x.shape[0], offsets.shape[0] - 1, x2.shape[0], offsets2.shape[0] - 1
    by_tokens = tokens_are_cheaper(*sizes, x.shape[1], g.shape[1])
    return _grad_gram(x, g, offsets, x2, g2, offsets2, same, by_tokens)


def tokens_are_cheaper(n: int, b: int, n2: int, b2: int, d_in: int, d_out: int) -> bool:
    """Multiplications of N x N2 tokens against those of forming all gradients and multiplying them.

    A formed entry also costs a write and a read, here 8 multiplications; the product of the
    gradients runs at half the rate of the others.
    """
    return n * n2 * (d_in + d_out) < d_in * d_out * (n + n2 + 8 * (b + b2) + 2 * b * b2)


def reference(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool, by_tokens: bool,
) -> Tensor:  # fmt: skip
    """Makes the whole square of a symmetric Gram. On CUDA `segments` synchronises once."""
    acc = accum_dtype(x)
    x2a, g2a = x2.to(acc), g2.to(acc)
    out = x.new_zeros(offsets.shape[0] - 1, offsets2.shape[0] - 1, dtype=acc)
    if by_tokens:
        for b, t in segments(offsets):
            tokens = ((x[t].to(acc) @ x2a.T) * (g[t].to(acc) @ g2a.T)).sum(0)  # [N2]
            out[b] = segment_sum(tokens, offsets2)
        return out
    rows = max(1, BLOCK // max(1, x.shape[1] * sum(out.shape)))
    for o in range(0, g.shape[1], rows):
        first = _formed(x.to(acc), g[:, o : o + rows].to(acc), offsets)
        out.addmm_(first, _formed(x2a, g2a[:, o : o + rows], offsets2).T)
    return out


def _formed(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """All gradients, `[B, d_out * d_in]`."""
    out = x.new_zeros(offsets.shape[0] - 1, g.shape[1], x.shape[1])
    for b, t in segments(offsets):
        torch.mm(g[t].T, x[t], out=out[b])
    return out.flatten(1)


def _side(
    weight: Tensor, x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients in x and g of sum_bc weight[b, c] <G_b, G2_c>."""
    acc = accum_dtype(x)
    x2a, g2a = x2.to(acc), g2.to(acc)
    dx, dg = x.new_zeros(x.shape), g.new_zeros(g.shape)
    ids = segment_ids(offsets2, x2.shape[0])
    for b, t in segments(offsets):
        xb, gb, w = x[t].to(acc), g[t].to(acc), weight[b].to(acc)[ids]  # w [N2]
        if 2 * len(xb) <= ghost_limit(x.shape[1], g.shape[1]):
            dx[t] = (gb @ g2a.T * w) @ x2a
            dg[t] = (xb @ x2a.T * w) @ g2a
        else:
            whole = (g2a * w[:, None]).T @ x2a  # [d_out, d_in]
            dx[t] = gb @ whole
            dg[t] = xb @ whole.T
    return dx, dg


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of one set with itself, all of the gradient is in the first two."""
    if same:
        dx, dg = _side(grad + grad.T, x, g, offsets, x, g, offsets)
        return dx, dg, torch.zeros_like(x2), torch.zeros_like(g2)
    dx, dg = _side(grad, x, g, offsets, x2, g2, offsets2)
    dx2, dg2 = _side(grad.T, x2, g2, offsets2, x, g, offsets)
    return dx, dg, dx2, dg2


def forward_triton(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool, by_tokens: bool,
) -> Tensor:  # fmt: skip
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference(x, g, offsets, x2, g2, offsets2, same, by_tokens)
    out = x.new_zeros(offsets.shape[0] - 1, offsets2.shape[0] - 1, dtype=torch.float32)
    if min(*out.shape, *x.shape, *x2.shape, g.shape[1]) == 0:
        return out
    form = _triton.by_tokens if by_tokens else _triton.by_gradients
    return form(x, g, offsets.contiguous(), x2, g2, offsets2.contiguous(), same, out)


def _fake(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool, by_tokens: bool,
) -> Tensor:  # fmt: skip
    shape = (offsets.shape[0] - 1, offsets2.shape[0] - 1)
    return x.new_empty(shape, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        g.new_empty(g.shape),
        x2.new_empty(x2.shape),
        g2.new_empty(g2.shape),
    )


_INPUTS = "Tensor x, Tensor g, Tensor offsets, Tensor x2, Tensor g2, Tensor offsets2, bool same"

_grad_gram_bwd = define(
    f"grad_gram_bwd(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.same, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    dx, dg, dx2, dg2 = _grad_gram_bwd(grad, *ctx.saved_tensors, ctx.same)
    return dx, dg, None, dx2, dg2, None, None, None


_grad_gram = define(
    f"grad_gram({_INPUTS}, bool by_tokens) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    backward=_backward,
    setup_context=_setup,
)
