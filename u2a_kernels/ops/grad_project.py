"""P_out G_b P_in^T for the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

The Kronecker projection of LoGra: tokens are projected first, so G_b never exists and an example
costs 2 T (d_in k_in + d_out k_out + k_in k_out) operations. Saved for backward: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, segments


def grad_project(x: Tensor, g: Tensor, offsets: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    """Project every example's weight gradient on both sides.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        p_in: [k_in, d_in] projection of the inputs, dtype of x.
        p_out: [k_out, d_out] projection of the output gradients, dtype of x.

    Returns:
        [B, k_out, k_in], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x, g, p_in and p_out.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    On CUDA the reference reads `offsets` back: one host synchronisation a call.

    Equivalent torch: ``torch.stack([p_out @ (g[s:e].T @ x[s:e]) @ p_in.T for s, e in segments])``.

    Source: LoGra, Choe et al., arXiv 2405.13954, equation 5.
    """
    op = "grad_project"
    check_floats(op, x=x, g=g, p_in=p_in, p_out=p_out)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_dim(op, "p_in", p_in, "[k_in, d_in]", 2)
    check_dim(op, "p_out", p_out, "[k_out, d_out]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    check_size(op, "p_in", p_in, "[k_in, d_in]", (p_in.shape[0], x.shape[1]))
    check_size(op, "p_out", p_out, "[k_out, d_out]", (p_out.shape[0], g.shape[1]))
    check_offsets(op, offsets, x.shape[0])
    return _grad_project(x, g, offsets, p_in, p_out)


def reference(x: Tensor, g: Tensor, offsets: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    acc = accum_dtype(x)
    xp, gp = x.to(acc) @ p_in.to(acc).T, g.to(acc) @ p_out.to(acc).T  # [N, k_in], [N, k_out]
    out = xp.new_zeros(offsets.shape[0] - 1, p_out.shape[0], p_in.shape[0])
    for b, t in segments(offsets):
        torch.mm(gp[t].T, xp[t], out=out[b])
    return out


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, p_in: Tensor, p_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accum_dtype(x)
    xa, ga, pi, po, w = x.to(acc), g.to(acc), p_in.to(acc), p_out.to(acc), grad.to(acc)
    xp, gp = xa @ pi.T, ga @ po.T
    dxp, dgp = torch.zeros_like(xp), torch.zeros_like(gp)
    for b, t in segments(offsets):
        dxp[t] = gp[t] @ w[b]
        dgp[t] = xp[t] @ w[b].T
    return (
        (dxp @ pi).to(x.dtype),
        (dgp @ po).to(g.dtype),
        (dxp.T @ xa).to(p_in.dtype),
        (dgp.T @ ga).to(p_out.dtype),
    )


def _fake(x: Tensor, g: Tensor, offsets: Tensor, p_in: Tensor, p_out: Tensor) -> Tensor:
    shape = (offsets.shape[0] - 1, p_out.shape[0], p_in.shape[0])
    return x.new_empty(shape, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, p_in: Tensor, p_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        g.new_empty(g.shape),
        p_in.new_empty(p_in.shape),
        p_out.new_empty(p_out.shape),
    )


_grad_project_bwd = define(
    "grad_project_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, Tensor p_in, Tensor p_out)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    dx, dg, dp_in, dp_out = _grad_project_bwd(grad, *ctx.saved_tensors)
    return dx, dg, None, dp_in, dp_out


_grad_project = define(
    "grad_project(Tensor x, Tensor g, Tensor offsets, Tensor p_in, Tensor p_out) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
