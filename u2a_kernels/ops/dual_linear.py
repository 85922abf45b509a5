"""y = x W^T + b on dual rows: [x W^T + b; x_t W^T + x W_t^T + b_t].

Both halves share one GEMM, so W is read once. Backward, with g the cotangent of the tangent half
and g_t of the primal half: dx_t = g W, dx = g_t W + g W_t, dW = g_t^T x + g^T x_t, db = sum g_t.
Saved for backward: the weights, and x only when W needs a gradient (its primal half alone in ggn).
Products go to torch's own GEMM, directions are added in place by it: no copy, no wider type. No
primal dW is formed: 3 products forward, 3 to x and 2 to W in the backward, 8 in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_size
from u2a_kernels._dual import check_directions, check_halves, check_mode, halves, refuse_jvp
from u2a_kernels._library import define


def dual_linear(
    x: Tensor,
    weight: Tensor,
    weight_t: Tensor | None = None,
    bias: Tensor | None = None,
    bias_t: Tensor | None = None,
    *,
    mode: str = "hvp",
) -> Tensor:
    """Linear layer on primal rows and on their tangents.

    Args:
        x: [2B, ..., d_in], B primal rows and then their B tangent rows; float32, bfloat16, float16
            or float64.
        weight: [d_out, d_in], dtype of x; any strides (pass a view for a transposed store).
        weight_t: [d_out, d_in] direction of weight, or None for zero. Not differentiated.
        bias: [d_out] or None; added to the primal half only.
        bias_t: [d_out] direction of bias, or None for zero. Not differentiated.
        mode: "hvp"; "ggn": the backward runs on the primal half alone and puts zeros on the tangent
            half (Gauss-Newton); "jvp": forward only, a backward raises RuntimeError.

    Returns:
        [2B, ..., d_out] in the dtype of x. GEMMs accumulate in fp32 (fp64 for float64); each term
        is rounded to the dtype of x. Differentiable once in x, weight and bias.

    Raises:
        ValueError, TypeError: a shape, dtype, device or mode that does not fit, a direction that
            requires grad, or bias_t without bias, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(F.linear, (x[:B], weight, bias),
    (x[B:], weight_t, bias_t)))``.

    Source: product rule; stacked rows as in Pearlmutter's R-operator (Neural Computation 6, 1994).
    """
    op = "dual_linear"
    check_floats(op, x=x, weight=weight, weight_t=weight_t, bias=bias, bias_t=bias_t)
    check_halves(op, "x", x, "[2B, ..., d_in]")
    check_dim(op, "weight", weight, "[d_out, d_in]", 2)
    check_size(op, "weight", weight, "[d_out, d_in]", (weight.shape[0], x.shape[-1]))
    if weight_t is not None:
        check_size(op, "weight_t", weight_t, "[d_out, d_in]", tuple(weight.shape))
    for name, t in dict(bias=bias, bias_t=bias_t).items():
        if t is not None:
            check_size(op, name, t, "[d_out]", (weight.shape[0],))
    if bias is None and bias_t is not None:
        raise ValueError(f"{op}: bias_t must be None without bias, got a direction")
    check_directions(op, weight_t=weight_t, bias_t=bias_t)
    check_mode(op, mode)
    return _dual_linear(x, weight, weight_t, bias, bias_t, mode)


def forward(
    x: Tensor,
    weight: Tensor,
    weight_t: Tensor | None,
    bias: Tensor | None,
    bias_t: Tensor | None,
    mode: str,
) -> Tensor:
    rows = x.flatten(0, -2)
    y = rows @ weight.mT
    primal, tangent = halves(y)
    if weight_t is not None:
        tangent.addmm_(halves(rows)[0], weight_t.mT)
    if bias_t is not None and bias is not None:
        y.unflatten(0, (2, -1)).add_(torch.stack([bias, bias_t])[:, None])
    elif bias is not None:
        primal += bias
    return y.view(*x.shape[:-1], weight.shape[0])


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    weight_t: Tensor | None,
    mode: str,
    x_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad.flatten(0, -2)
    g_t, g = halves(rows)
    dx, dw, db = (weight.new_empty(0) for _ in range(3))
    if x_grad and mode == "ggn":
        dx = rows.new_empty(len(rows), weight.shape[1])
        primal, tangent = halves(dx)
        torch.mm(g_t, weight, out=primal)
        tangent.zero_()
    elif x_grad:
        dx = rows @ weight
        if weight_t is not None:
            halves(dx)[0].addmm_(g, weight_t)
    if x_grad:
        dx = dx.view(*grad.shape[:-1], weight.shape[1])
    if x is not None:
        dw = (g_t if mode == "ggn" else rows).mT @ x.flatten(0, -2)
    if bias_grad:
        db = g_t.sum(0)
    return dx, dw, db


def _fake(
    x: Tensor,
    weight: Tensor,
    weight_t: Tensor | None,
    bias: Tensor | None,
    bias_t: Tensor | None,
    mode: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_bwd(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    weight_t: Tensor | None,
    mode: str,
    x_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if x_grad else weight.new_empty(0)
    dw = weight.new_empty(0 if x is None else weight.shape)
    return dx, dw, weight.new_empty(weight.shape[0] * bias_grad)


_dual_linear_bwd = define(
    "dual_linear_bwd(Tensor grad, Tensor? x, Tensor weight, Tensor? weight_t, str mode,"
    " bool x_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    reference=backward,
    fake=_fake_bwd,
    cuda=backward,
    cuda_owner="cuBLAS",
)


def _setup(ctx, inputs, output):
    x, weight, weight_t, _, _, ctx.mode = inputs
    if ctx.mode == "jvp":
        return
    kept = halves(x)[0] if ctx.mode == "ggn" else x
    ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, weight, weight_t)


def _backward(ctx, grad):
    refuse_jvp("dual_linear", ctx.mode)
    need_x, need_w, _, need_b = ctx.needs_input_grad[:4]
    dx, dw, db = _dual_linear_bwd(grad, *ctx.saved_tensors, ctx.mode, need_x, need_b)
    return (
        dx if need_x else None,
        dw if need_w else None,
        None,
        db if need_b else None,
        None,
        None,
    )


_dual_linear = define(
    "dual_linear(Tensor x, Tensor weight, Tensor? weight_t, Tensor? bias, Tensor? bias_t,"
    " str mode) -> Tensor",
    reference=forward,
    fake=_fake,
    cuda=forward,
    cuda_owner="cuBLAS",
    backward=_backward,
    setup_context=_setup,
)
