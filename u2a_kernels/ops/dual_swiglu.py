"""y = silu(a) b on dual rows: [silu(a) b; silu'(a) a_t b + silu(a) b_t].

Backward, with g the cotangent of the tangent half and g_t of the primal half (f = silu):
da_t = g b f', db_t = g f, da = g_t b f' + g b_t f' + g b f'' a_t, db = g_t f + g f' a_t.
Saved for backward: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_floats, check_size
from u2a_kernels._dual import check_halves, fresh, halves, join
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype


def dual_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU, silu(gate) * up, of primal rows and of their tangents.

    Args:
        gate: [2B, ..., f], B primal rows and then their B tangent rows; float32, bfloat16, float16
            or float64.
        up: shape and dtype of gate, same layout.

    Returns:
        [2B, ..., f] in the dtype of gate; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in gate and up; the gradient of the tangent half is the second-order
        product (reverse over forward).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda a, b: F.silu(a) * b, (a, b), (a_t, b_t)))``
    with ``a, a_t = gate.chunk(2)`` and ``b, b_t = up.chunk(2)``.

    Source: Shazeer, arXiv 2002.05202; second derivative s(1-s)(2 + a(1-2s)), s the sigmoid of a.
    """
    op = "dual_swiglu"
    check_floats(op, gate=gate, up=up)
    check_halves(op, "gate", gate, "[2B, ..., f]")
    check_size(op, "up", up, "[2B, ..., f]", tuple(gate.shape))
    return _dual_swiglu(gate, up)


def _silu(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a) and its first two derivatives."""
    s = torch.sigmoid(a)
    return a * s, s * (1 + a * (1 - s)), s * (1 - s) * (2 + a * (1 - 2 * s))


def reference(gate: Tensor, up: Tensor) -> Tensor:
    acc = accum_dtype(gate)
    a, a_t = halves(gate.to(acc))
    b, b_t = halves(up.to(acc))
    s = torch.sigmoid(a)
    f = a * s
    f1 = torch.addcmul(s, f, 1 - s)
    return join(f * b, f1.mul_(a_t).mul_(b).addcmul_(f, b_t), gate)


def reference_bwd(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    acc = accum_dtype(gate)
    a, a_t = halves(gate.to(acc))
    b, b_t = halves(up.to(acc))
    g_t, g = halves(grad.to(acc))
    f, f1, f2 = _silu(a)
    da = f1 * (g_t * b + g * b_t) + g * b * f2 * a_t
    db = g_t * f + g * f1 * a_t
    return join(da, g * b * f1, gate), join(db, g * f, up)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return fresh(gate)


def _fake_bwd(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return fresh(gate), fresh(up)


_dual_swiglu_bwd = define(
    "dual_swiglu_bwd(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _dual_swiglu_bwd(grad, *ctx.saved_tensors)


_dual_swiglu = define(
    "dual_swiglu(Tensor gate, Tensor up) -> Tensor",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
