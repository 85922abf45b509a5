"""LayerNorm on dual rows: s = (var x + eps)^-1/2, s_t = -s^3 mean(xc xc_t), n = xc s,
n_t = xc_t s + xc s_t; y = w n + b, y_t = w n_t + w_t n + b_t. xc is x less its mean.

Written by hand because torch's own layer_norm tangent is wrong under nested jvp.
Code and backward in `_norm`. Saved for backward: the inputs.
"""

from __future__ import annotations

from torch import Tensor

from u2a_kernels import _norm, _norm_triton
from u2a_kernels._checks import check_floats, check_size
from u2a_kernels._dual import check_directions, check_halves, fresh
from u2a_kernels._library import define
from u2a_kernels._triton import cuda_launcher


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


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_t: Tensor | None,
    bias_t: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    return _norm.reference(x, weight, bias, weight_t, bias_t, eps, True)


def reference_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _norm.reference_bwd(grad, x, weight, weight_t, eps, True, weight_grad, bias_grad)


def triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_t: Tensor | None,
    bias_t: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    return _norm_triton.forward(x, weight, bias, weight_t, bias_t, eps, True)


def triton_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _norm_triton.backward(grad, x, weight, weight_t, eps, True, weight_grad, bias_grad)


def _fake(x: Tensor, *rest: Tensor | float | None) -> Tensor:
    return fresh(x)


def _fake_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d = weight.shape[0]
    return fresh(x), weight.new_empty(d * weight_grad), weight.new_empty(d * bias_grad)


_dual_layer_norm_bwd = define(
    "dual_layer_norm_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? weight_t, float eps,"
    " bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
    cuda=cuda_launcher(triton_bwd),
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
    cuda=cuda_launcher(triton),
    backward=_backward,
    setup_context=_setup,
)
