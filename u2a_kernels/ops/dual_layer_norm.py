"""LayerNorm on dual rows: s = (var x + eps)^-1/2, s_t = -s^3 mean(xc xc_t), n = xc s,
n_t = xc_t s + xc s_t; y = w n + b, y_t = w n_t + w_t n + b_t. xc is x less its mean.

Written by hand because torch's own layer_norm tangent is wrong under nested jvp.
Saved for backward: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_floats, check_size
from u2a_kernels._dual import check_directions, check_halves, fresh, halves, join
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype


def dual_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_t: Tensor | None = None,
    bias_t: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last dimension of primal rows and of their tangents.

    Args:
        x: [2B, ..., d], B primal rows and then their B tangent rows; float32, bfloat16, float16 or
            float64.
        weight: [d], dtype of x.
        bias: [d], dtype of x, or None; added to the primal half only.
        weight_t, bias_t: [d] directions of weight and bias, or None for zero. Not differentiated.
        eps: added to the variance.

    Returns:
        [2B, ..., d] in the dtype of x; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in x, weight and bias; the gradient of the tangent half is the
        second-order product.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, a direction that requires
            grad, or bias_t without bias, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda x, w, b: F.layer_norm(x, (d,), w, b, eps),
    (x[:B], weight, bias), (x[B:], weight_t, bias_t)))``.

    Source: Ba, Kiros and Hinton, arXiv 1607.06450.
    """
    op = "dual_layer_norm"
    check_floats(op, x=x, weight=weight, bias=bias, weight_t=weight_t, bias_t=bias_t)
    check_halves(op, "x", x, "[2B, ..., d]")
    for name, t in dict(weight=weight, bias=bias, weight_t=weight_t, bias_t=bias_t).items():
        if t is not None:
            check_size(op, name, t, "[d]", (x.shape[-1],))
    if bias is None and bias_t is not None:
        raise ValueError(f"{op}: bias_t must be None without bias, got a direction")
    check_directions(op, weight_t=weight_t, bias_t=bias_t)
    return _dual_layer_norm(x, weight, bias, weight_t, bias_t, eps)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, s_t and the normalised halves n, n_t."""
    xa, x_t = halves(x.to(accum_dtype(x)))
    xc, xc_t = xa - _mean(xa), x_t - _mean(x_t)
    s = torch.rsqrt(_mean(xc * xc) + eps)
    s_t = -(s**3) * _mean(xc * xc_t)
    return s, s_t, xc * s, xc_t * s + xc * s_t


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    eps: float,
) -> Tensor:
    acc = accum_dtype(x)
    _, _, n, n_t = _normalise(x, eps)
    w = weight.to(acc)
    y, y_t = n * w, n_t * w
    if bias is not None:
        y += bias.to(acc)
    if weight_t is not None:
        y_t.addcmul_(n, weight_t.to(acc))
    if bias_t is not None:
        y_t += bias_t.to(acc)
    return join(y, y_t, x)


def reference_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_t: Tensor | None,
    eps: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(x)
    s, s_t, n, n_t = _normalise(x, eps)
    g_t, g = halves(grad.to(acc))
    w = weight.to(acc)
    a, a_t = g * w, g_t * w
    if weight_t is not None:
        a_t.addcmul_(g, weight_t.to(acc))
    c1, c2 = _mean(a), _mean(a * n)
    c1_t, c2_t = _mean(a_t), _mean(a_t * n + a * n_t)
    u = a - c1 - n * c2
    u_t = a_t - c1_t - n_t * c2 - n * c2_t
    dw, db = weight.new_empty(0), weight.new_empty(0)
    if weight_grad:
        dw = (g_t * n + g * n_t).flatten(0, -2).sum(0).to(weight.dtype)
    if bias_grad:
        db = g_t.flatten(0, -2).sum(0).to(weight.dtype)
    return join(s_t * u + s * u_t, s * u, x), dw, db


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    eps: float,
) -> Tensor:
    return fresh(x)


def _fake_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_t: Tensor | None,
    eps: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d = weight.shape[0]
    return fresh(x), weight.new_empty(d * weight_grad), weight.new_empty(d * bias_grad)


_dual_layer_norm_bwd = define(
    "dual_layer_norm_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? weight_t, float eps,"
    " bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    x, weight, _, weight_t, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight, weight_t)


def _backward(ctx, grad):
    need_w, need_b = ctx.needs_input_grad[1:3]
    dx, dw, db = _dual_layer_norm_bwd(grad, *ctx.saved_tensors, ctx.eps, need_w, need_b)
    return dx, dw if need_w else None, db if need_b else None, None, None, None


_dual_layer_norm = define(
    "dual_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_t, Tensor? bias_t,"
    " float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
