"""<G_b, G'_b'> for the per-example gradients of a linear layer over two sets of packed tokens.

One example b at a time against all of the second set, in the cheaper of two forms: token products
(x x2^T) * (g g2^T) when the example is short, else G_b once and <g2_s, G_b x2_s> per token s.
Saved for backward: the inputs; the gradient of G_b, sum_b' w_bb' G'_b', is used the same way.
"""

from __future__ import annotations

from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import (
    accum_dtype,
    ghost_limit,
    segment_ids,
    segment_sum,
    segments,
)


def grad_gram(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> Tensor:
    """Inner products of all pairs of per-example weight gradients of one layer.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        x2, g2, offsets2: the second set, [N2, d_in], [N2, d_out] and [B2+1], dtype of x. Passing
            the first set again gives its Gram matrix.

    Returns:
        [B, B2], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x, g, x2 and g2.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    On CUDA the reference reads `offsets` back: one host synchronisation a call.

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
    return _grad_gram(x, g, offsets, x2, g2, offsets2)


def reference(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> Tensor:
    acc = accum_dtype(x)
    x2a, g2a = x2.to(acc), g2.to(acc)
    out = x.new_zeros(offsets.shape[0] - 1, offsets2.shape[0] - 1, dtype=acc)
    for b, t in segments(offsets):
        xb, gb = x[t].to(acc), g[t].to(acc)
        if len(xb) <= ghost_limit(x.shape[1], g.shape[1]):
            tokens = ((xb @ x2a.T) * (gb @ g2a.T)).sum(0)  # [N2]
        else:
            tokens = (g2a * (x2a @ (gb.T @ xb).T)).sum(1)
        out[b] = segment_sum(tokens, offsets2)
    return out


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
        if len(xb) <= ghost_limit(x.shape[1], g.shape[1]):
            dx[t] = (gb @ g2a.T * w) @ x2a
            dg[t] = (xb @ x2a.T * w) @ g2a
        else:
            whole = (g2a * w[:, None]).T @ x2a  # [d_out, d_in]
            dx[t] = gb @ whole
            dg[t] = xb @ whole.T
    return dx, dg


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dg = _side(grad, x, g, offsets, x2, g2, offsets2)
    dx2, dg2 = _side(grad.T, x2, g2, offsets2, x, g, offsets)
    return dx, dg, dx2, dg2


def _fake(
    x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> Tensor:
    shape = (offsets.shape[0] - 1, offsets2.shape[0] - 1)
    return x.new_empty(shape, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, x2: Tensor, g2: Tensor, offsets2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        g.new_empty(g.shape),
        x2.new_empty(x2.shape),
        g2.new_empty(g2.shape),
    )


_INPUTS = "Tensor x, Tensor g, Tensor offsets, Tensor x2, Tensor g2, Tensor offsets2"

_grad_gram_bwd = define(
    f"grad_gram_bwd(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    dx, dg, dx2, dg2 = _grad_gram_bwd(grad, *ctx.saved_tensors)
    return dx, dg, None, dx2, dg2, None


_grad_gram = define(
    f"grad_gram({_INPUTS}) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
