"""Softmax on dual rows: p = softmax(z), p_t = p o (z_t - <p, z_t>), the Hessian of logsumexp at z
times z_t.

Backward, with g the cotangent of the tangent half and g_t of the primal half: c = <p, g>,
c_t = <p_t, g - c> + <p, g_t>; dz_t = p o (g - c), dz = p_t o (g - c) + p o (g_t - c_t).
ggn: dz = p o (g_t - <p, g_t>), dz_t = 0. Saved for backward: the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_floats, wanted
from u2a_kernels._dual import check_halves, check_mode, fresh, halves, join, refuse_jvp
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.dual_softmax import triton as _triton


def dual_softmax(z: Tensor, dim: int = -1, *, mode: str = "hvp") -> Tensor:
    """Softmax of primal rows and the tangents of its output.

    Args:
        z: [2B, ..., V], B primal rows and then their B tangent rows; float32, bfloat16, float16 or
            float64. -inf entries of the primal half have probability and tangent 0.
        dim: the dimension of the softmax, not 0.
        mode: "hvp"; "ggn": the plain softmax backward on the primal half, zeros on the tangent
            half (Gauss-Newton); "jvp": forward only, a backward raises RuntimeError.

    Returns:
        [2B, ..., V] in the dtype of z; fp32 inside (fp64 for float64). Deterministic.
        Differentiable once; the gradient of the tangent half is the second-order product.

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda z: torch.softmax(z, dim), (z[:B],),
    (z[B:],)))``.

    Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867, the mean of z_t carried along.
    """
    op = "dual_softmax"
    check_floats(op, z=z)
    check_halves(op, "z", z, "[2B, ..., V]")
    check_mode(op, mode)
    if not -z.ndim < dim < z.ndim or dim == 0:
        raise wanted(op, "dim", f"in [1, {z.ndim}) or [{1 - z.ndim}, 0)", dim)
    return _dual_softmax(z.movedim(dim, -1), mode).movedim(-1, dim)


def reference(z: Tensor, mode: str) -> Tensor:
    za, z_t = halves(z.to(accum_dtype(z)))
    p = torch.softmax(za, -1)
    return join(p, p * (z_t - (p * z_t).sum(-1, keepdim=True)), z)


def reference_bwd(grad: Tensor, out: Tensor, ggn: bool) -> Tensor:
    acc = accum_dtype(out)
    p, p_t = halves(out.to(acc))
    g_t, g = halves(grad.to(acc))
    if ggn:
        return join(p * (g_t - (p * g_t).sum(-1, keepdim=True)), None, out)
    u = g - (p * g).sum(-1, keepdim=True)
    c_t = (p_t * u + p * g_t).sum(-1, keepdim=True)
    return join(p_t * u + p * (g_t - c_t), p * u, out)


def triton(z: Tensor, mode: str) -> Tensor:
    """float64 has no Triton kernel: the reference answers there."""
    return reference(z, mode) if z.dtype == torch.float64 else _triton.forward(z)


def triton_bwd(grad: Tensor, out: Tensor, ggn: bool) -> Tensor:
    if out.dtype == torch.float64:
        return reference_bwd(grad, out, ggn)
    return _triton.backward(grad, out, ggn)


def _fake(z: Tensor, mode: str) -> Tensor:
    return fresh(z)


def _fake_bwd(grad: Tensor, out: Tensor, ggn: bool) -> Tensor:
    return fresh(out)


_dual_softmax_bwd = define(
    "dual_softmax_bwd(Tensor grad, Tensor out, bool ggn) -> Tensor",
    reference=reference_bwd,
    fake=_fake_bwd,
    cuda=cuda_launcher(triton_bwd),
    cuda_library=True,
)


def _setup(ctx, inputs, output):
    ctx.mode = inputs[1]
    if ctx.mode != "jvp":
        ctx.save_for_backward(output)


def _backward(ctx, grad):
    refuse_jvp("dual_softmax", ctx.mode)
    return _dual_softmax_bwd(grad, *ctx.saved_tensors, ctx.mode == "ggn"), None


_dual_softmax = define(
    "dual_softmax(Tensor z, str mode) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(triton),
    cuda_library=True,
    backward=_backward,
    setup_context=_setup,
)
