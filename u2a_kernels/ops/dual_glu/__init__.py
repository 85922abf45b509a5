"""y = f(a) b on dual rows, f an activation: [f b; f' a_t b + f b_t]. Without a gate b = 1, b_t = 0.

Backward, with g the cotangent of the tangent half and g_t of the primal half:
da_t = g b f', db_t = g f, da = (g_t b + g b_t) f' + g b a_t f'', db = g_t f + g a_t f'.
Saved for backward: the inputs. One op serves gated and plain activations, in every form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_floats, check_size, shape, wanted
from u2a_kernels._dual import check_halves, fresh
from u2a_kernels._library import define
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.dual_glu import reference
from u2a_kernels.ops.dual_glu import triton as _triton

ACTIVATIONS = tuple(reference.CURVES)


def dual_glu(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """A gated activation, f(gate) * up, of primal rows and of their tangents.

    Args:
        gate: [2B, ..., F], B primal rows and then their B tangent rows; float32, bfloat16, float16
            or float64. Without `up`: [2B, ..., 2F], gate and up side by side, as one projection
            gives them; their gradient then comes back side by side too.
        up: shape and dtype of gate, same layout. Views with a row stride, and a last dimension that
            is expanded from one column, are read where they are.
        activation: f, one of "silu" (SwiGLU), "gelu" (GeGLU, erf form), "gelu_tanh",
            "quick_gelu" (a times the sigmoid of 1.702 a), "relu" (ReGLU), "relu2", "sigmoid" (GLU),
            "tanh", "identity" (the plain product). relu and relu2 have slope and curvature 0 at 0.

    Returns:
        [2B, ..., F] in the dtype of gate; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in gate and up; the gradient of the tangent half is the second-order
        product (reverse over forward). On a GPU float64 is served by the reference.

    Raises:
        ValueError, TypeError: a shape, dtype, device or activation that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda a, b: f(a) * b, (a, b), (a_t, b_t)))``
    with ``a, a_t = gate.chunk(2)`` and ``b, b_t = up.chunk(2)``.

    Source: Shazeer, arXiv 2002.05202; product rule.
    """
    op = "dual_glu"
    check_floats(op, gate=gate, up=up)
    _check_activation(op, activation)
    if up is not None:
        check_halves(op, "gate", gate, "[2B, ..., F]")
        check_size(op, "up", up, "[2B, ..., F]", tuple(gate.shape))
        return _dual_glu(gate, up, activation, True)
    check_halves(op, "gate", gate, "[2B, ..., 2F] without up")
    if gate.shape[-1] % 2:
        raise wanted(op, "gate", "[2B, ..., 2F] without up", shape(gate))
    return _dual_glu(gate, None, activation, True)


def dual_act(x: Tensor, activation: str) -> Tensor:
    """An activation, f(x), of primal rows and of their tangents.

    Args:
        x: [2B, ..., F], B primal rows and then their B tangent rows; float32, bfloat16, float16 or
            float64.
        activation: f, as in `dual_glu`.

    Returns:
        [2B, ..., F] in the dtype of x; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once in x; the gradient of the tangent half is the second-order product.

    Raises:
        ValueError, TypeError: a shape, dtype or activation that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(f, (x[:B],), (x[B:],)))``.

    Source: chain rule; f' and f'' of each activation are in `reference.py`.
    """
    op = "dual_act"
    check_floats(op, x=x)
    _check_activation(op, activation)
    check_halves(op, "x", x, "[2B, ..., F]")
    return _dual_glu(x, None, activation, False)


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise wanted(op, "activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))


def forward_cuda(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Triton has no float64 form: the reference answers."""
    serve = reference.forward if gate.dtype == torch.float64 else _triton.forward
    return serve(gate, up, activation, gated)


def backward_cuda(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    serve = reference.backward if gate.dtype == torch.float64 else _triton.backward
    return serve(grad, gate, up, activation, gated)


def _fake(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    width = gate.shape[-1] // 2 if gated and up is None else gate.shape[-1]
    return gate.new_empty(*gate.shape[:-1], width)


def _fake_bwd(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    return fresh(gate), gate.new_empty(0) if up is None else fresh(up)


_dual_glu_bwd = define(
    "dual_glu_bwd(Tensor grad, Tensor gate, Tensor? up, str activation, bool gated)"
    " -> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_bwd,
    cuda=cuda_launcher(backward_cuda),
)


def _setup(ctx, inputs, output):
    gate, up, ctx.activation, ctx.gated = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad):
    gate, up = ctx.saved_tensors
    d_gate, d_up = _dual_glu_bwd(grad, gate, up, ctx.activation, ctx.gated)
    return d_gate, None if up is None else d_up, None, None


_dual_glu = define(
    "dual_glu(Tensor gate, Tensor? up, str activation, bool gated) -> Tensor",
    reference=reference.forward,
    fake=_fake,
    cuda=cuda_launcher(forward_cuda),
    backward=_backward,
    setup_context=_setup,
)
