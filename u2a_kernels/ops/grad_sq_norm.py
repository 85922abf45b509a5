"""||G_b||_F^2 for the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

Two equal forms, the cheaper one per example: short examples use token Grams,
sum_{t,s} (x_t . x_s)(g_t . g_s), long ones form G_b. One example's intermediate lives at a time.
Saved for backward: the inputs.
"""

from __future__ import annotations

from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, ghost_is_cheaper, segments


def grad_sq_norm(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """Squared Frobenius norm of every example's weight gradient.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.

    Returns:
        [B], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x and g. Where the tokens of an example cancel, token
        Grams may round a zero to a small negative number.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    On CUDA the reference reads `offsets` back: one host synchronisation a call.

    Equivalent torch: ``torch.stack([(g[s:e].T @ x[s:e]).square().sum() for s, e in segments])``.

    Source: ghost norm, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679, section 4.
    """
    op = "grad_sq_norm"
    check_floats(op, x=x, g=g)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    check_offsets(op, offsets, x.shape[0])
    return _grad_sq_norm(x, g, offsets)


def reference(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    acc = accum_dtype(x)
    out = x.new_zeros(offsets.shape[0] - 1, dtype=acc)
    for b, t in segments(offsets):
        xb, gb = x[t].to(acc), g[t].to(acc)
        if ghost_is_cheaper(len(xb), x.shape[1], g.shape[1]):
            out[b] = ((xb @ xb.T) * (gb @ gb.T)).sum()
        else:
            out[b] = (gb.T @ xb).square().sum()
    return out


def reference_bwd(grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    acc = accum_dtype(x)
    dx, dg = x.new_zeros(x.shape), g.new_zeros(g.shape)
    twice = 2 * grad.to(acc)
    for b, t in segments(offsets):
        xb, gb = x[t].to(acc), g[t].to(acc)
        if ghost_is_cheaper(len(xb), x.shape[1], g.shape[1]):
            dx[t] = twice[b] * (gb @ gb.T @ xb)
            dg[t] = twice[b] * (xb @ xb.T @ gb)
        else:
            whole = gb.T @ xb
            dx[t] = twice[b] * (gb @ whole)
            dg[t] = twice[b] * (xb @ whole.T)
    return dx, dg


def _fake(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, dtype=accum_dtype(x))


def _fake_bwd(grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape)


_grad_sq_norm_bwd = define(
    "grad_sq_norm_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets) -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    dx, dg = _grad_sq_norm_bwd(grad, *ctx.saved_tensors)
    return dx, dg, None


_grad_sq_norm = define(
    "grad_sq_norm(Tensor x, Tensor g, Tensor offsets) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
