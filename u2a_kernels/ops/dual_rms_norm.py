"""RMSNorm on dual rows: r = (mean x^2 + eps)^-1/2, r_t = -r^3 mean(x x_t);
y = w x r, y_t = w (x_t r + x r_t) + w_t x r.

LayerNorm without centring: code and backward in `_norm`, where r is s. Saved: the inputs.
"""

from __future__ import annotations

from torch import Tensor

from u2a_kernels import _norm, _norm_triton
from u2a_kernels._checks import check_floats, check_size
from u2a_kernels._dual import check_directions, check_halves, fresh
from u2a_kernels._library import define
from u2a_kernels._triton import cuda_launcher


def dual_rms_norm(
    x: Tensor, weight: Tensor, weight_t: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """RMSNorm over the last dimension of primal rows and of their tangents.

    Args:
        x: [2B, ..., d], B primal rows and then their B tangent rows; float32, bfloat16, float16 or
            float64.
        weight: [d], dtype of x.
        weight_t: [d] direction of weight, or None for zero. It is not differentiated.
        eps: added to the mean square.

    Returns:
        [2B, ..., d] in the dtype of x; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in x and weight; the gradient of the tangent half is the second-order
        product.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, or a weight_t that
            requires grad, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda x, w: F.rms_norm(x, (d,), w, eps),
    (x[:B], weight), (x[B:], weight_t)))``.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    op = "dual_rms_norm"
    check_floats(op, x=x, weight=weight, weight_t=weight_t)
    check_halves(op, "x", x, "[2B, ..., d]")
    check_size(op, "weight", weight, "[d]", (x.shape[-1],))
    if weight_t is not None:
        check_size(op, "weight_t", weight_t, "[d]", (x.shape[-1],))
    check_directions(op, weight_t=weight_t)
    return _dual_rms_norm(x, weight, weight_t, eps)


def reference(x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float) -> Tensor:
    return _norm.reference(x, weight, None, weight_t, None, eps, False)


def reference_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return _norm.reference_bwd(grad, x, weight, weight_t, eps, False, weight_grad, False)[:2]


def triton(x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float) -> Tensor:
    return _norm_triton.forward(x, weight, None, weight_t, None, eps, False)


def triton_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return _norm_triton.backward(grad, x, weight, weight_t, eps, False, weight_grad, False)[:2]


def _fake(x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float) -> Tensor:
    return fresh(x)


def _fake_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return fresh(x), fresh(weight) if weight_grad else weight.new_empty(0)


_dual_rms_norm_bwd = define(
    "dual_rms_norm_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? weight_t, float eps,"
    " bool weight_grad) -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
    cuda=cuda_launcher(triton_bwd),
)


def _setup(ctx, inputs, output):
    x, weight, weight_t, ctx.eps = inputs
    ctx.save_for_backward(x, weight, weight_t)


def _backward(ctx, grad):
    need = ctx.needs_input_grad[1]
    dx, dw = _dual_rms_norm_bwd(grad, *ctx.saved_tensors, ctx.eps, need)
    return dx, dw if need else None, None, None


_dual_rms_norm = define(
    "dual_rms_norm(Tensor x, Tensor weight, Tensor? weight_t, float eps) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(triton),
    backward=_backward,
    setup_context=_setup,
)
