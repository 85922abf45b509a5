"""y = gelu(x) on dual rows: [f(x); f'(x) x_t], f the erf form or its tanh approximation.

Backward, with g the cotangent of the tangent half and g_t of the primal half:
dx_t = g f', dx = g_t f' + g f'' x_t. Saved for backward: x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from u2a_kernels._checks import check_floats, wanted
from u2a_kernels._dual import check_halves, fresh, halves, join
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype


def dual_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU of primal rows and of their tangents.

    Args:
        x: [2B, ..., d], B primal rows and then their B tangent rows; float32, bfloat16, float16 or
            float64.
        approximate: "none" (erf) or "tanh", as in ``torch.nn.functional.gelu``.

    Returns:
        [2B, ..., d] in the dtype of x; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in x; the gradient of the tangent half is the second-order product.

    Raises:
        ValueError, TypeError: a shape, dtype or `approximate` that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(F.gelu, (x[:B],), (x[B:],)))``.

    Source: Hendrycks and Gimpel, arXiv 1606.08415; f' = Phi + x phi, f'' = phi (2 - x^2).
    """
    op = "dual_gelu"
    check_floats(op, x=x)
    check_halves(op, "x", x, "[2B, ..., d]")
    if approximate not in ("none", "tanh"):
        raise wanted(op, "approximate", "'none' or 'tanh'", repr(approximate))
    return _dual_gelu(x, approximate)


def _erf(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    big = 0.5 * torch.erfc(x * -math.sqrt(0.5))
    small = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * big, big + x * small, small * (2 - x * x)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0.5 (1 + tanh u) is the sigmoid of 2 u, which keeps its tails."""
    k, c = 2 * math.sqrt(2 / math.pi), 0.044715
    u = k * (x + c * x**3)
    u1, u2 = k * (1 + 3 * c * x * x), k * 6 * c * x
    s = torch.sigmoid(u)
    slope = s * torch.sigmoid(-u)
    f1 = s + x * slope * u1
    return x * s, f1, slope * (2 * u1 + x * (u2 + (1 - 2 * s) * u1 * u1))


def _gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x) and its first two derivatives."""
    return _tanh(x) if approximate == "tanh" else _erf(x)


def reference(x: Tensor, approximate: str) -> Tensor:
    primal, tangent = halves(x.to(accum_dtype(x)))
    f, f1, _ = _gelu(primal, approximate)
    return join(f, f1 * tangent, x)


def reference_bwd(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    acc = accum_dtype(x)
    primal, tangent = halves(x.to(acc))
    g_t, g = halves(grad.to(acc))
    _, f1, f2 = _gelu(primal, approximate)
    return join(g_t * f1 + g * f2 * tangent, g * f1, x)


def _fake(x: Tensor, approximate: str) -> Tensor:
    return fresh(x)


def _fake_bwd(grad: Tensor, x: Tensor, approximate: str) -> Tensor:
    return fresh(x)


_dual_gelu_bwd = define(
    "dual_gelu_bwd(Tensor grad, Tensor x, str approximate) -> Tensor",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    return _dual_gelu_bwd(grad, *ctx.saved_tensors, ctx.approximate), None


_dual_gelu = define(
    "dual_gelu(Tensor x, str approximate) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
