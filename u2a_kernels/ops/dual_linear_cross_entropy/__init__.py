"""LM head and cross-entropy on dual rows; no [N, V] tensor is ever held.

z = h W^T + b, z_t = h_t W^T + h W_t^T + b_t; logits a = c tanh(z / c) (a = z without a soft cap)
have tangents a_t = s z_t, s = a'(z). With p = softmax a, e = sum p a_t, u = p (a_t - e):
loss = lse - a_y, loss_t = e - a_t,y, curvature = sum p (a_t - e)^2 = a_t . u.
A cotangent of loss_t sends f = s (p - 1y) to z_t and g = s u + a''(z) z_t (p - 1y) to z. The
forward keeps r1 = f W and r2 = g W + f W_t; for cotangents (a, b) of (loss, loss_t),
dh = a r1 + b r2, dh_t = b r1. The weight's gradient makes logits again, from saved statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u2a_kernels._checks import (
    check_dim,
    check_floats,
    check_size,
    check_softcap,
    check_targets,
    wanted,
)
from u2a_kernels._dual import check_directions, check_halves, check_mode, halves, refuse_jvp
from u2a_kernels._library import define, refusal
from u2a_kernels._segments import accum_dtype
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.dual_linear_cross_entropy import reference as _reference
from u2a_kernels.ops.dual_linear_cross_entropy import triton as _triton

NAME = "dual_linear_cross_entropy"


def dual_linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    bias_t: Tensor | None = None,
    softcap: float | None = None,
    mode: str = "hvp",
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses of an LM head, their tangents and their Gauss-Newton curvature.

    Args:
        h: [2N, d] hidden states, N primal rows and then their N tangent rows; float32, bfloat16,
            float16 or float64.
        weight: [V, d], dtype of h.
        targets: [N] int64 in [0, V), or -100: that token gives 0, 0, 0 and no gradient, whatever
            its rows hold. Values are checked on the CPU; on a GPU one out of range gives NaN.
        weight_t: [V, d] direction of weight, or None for zero. Not differentiated.
        bias: [V], dtype of h, or None.
        bias_t: [V] direction of bias, or None for zero. Not differentiated.
        softcap: positive c of logits c tanh(z / c), or None.
        mode: "hvp"; "ggn": only the cotangent b of loss_t is used, and gives the Gauss-Newton
            cotangent b s u of the logits: its pull-back on the primal half and in weight and bias,
            zeros on the tangent half; "jvp": forward only, a backward raises RuntimeError.

    Returns:
        loss, loss_t, curvature: [N] each, float32 (float64 for float64). curvature = v^T G v of the
        token along the tangent, the variance of the capped logits' tangents under p, not
        differentiable.
        Differentiable once in h, weight and bias through loss and loss_t. Deterministic.
        Held for a backward: two [N, d] tensors (one for ggn), rescaled then for any cotangents.

    Raises:
        ValueError, TypeError: a shape, dtype, device, target, cap or mode that does not fit, a
            direction that requires grad, or bias_t without bias, by name.

    Equivalent torch: ``loss, loss_t = torch.func.jvp(lambda h, w, b: F.cross_entropy(
    softcap * torch.tanh(F.linear(h, w, b) / softcap), targets, reduction="none"),
    (h[:N], weight, bias), (h[N:], weight_t, bias_t))``.

    Source: Pearlmutter (Neural Computation 6, 1994); Gauss-Newton term, Schraudolph (2002); online
    softmax, arXiv 1805.02867; merged variances, Chan, Golub and LeVeque (1979).
    """
    check_floats(NAME, h=h, weight=weight, weight_t=weight_t, bias=bias, bias_t=bias_t)
    check_dim(NAME, "h", h, "[2N, d]", 2)
    check_halves(NAME, "h", h, "[2N, d]")
    check_dim(NAME, "weight", weight, "[V, d] with V >= 1", 2)
    check_size(NAME, "weight", weight, "[V, d]", (max(1, weight.shape[0]), h.shape[1]))
    check_targets(NAME, targets, h.shape[0] // 2, weight.shape[0])
    if targets.device != h.device:
        raise wanted(NAME, "targets", f"on the device of h, {h.device}", targets.device)
    if weight_t is not None:
        check_size(NAME, "weight_t", weight_t, "[V, d]", tuple(weight.shape))
    for name, t in dict(bias=bias, bias_t=bias_t).items():
        if t is not None:
            check_size(NAME, name, t, "[V]", (weight.shape[0],))
    if bias is None and bias_t is not None:
        raise ValueError(f"{NAME}: bias_t must be None without bias, got a direction")
    check_softcap(NAME, softcap)
    check_directions(NAME, weight_t=weight_t, bias_t=bias_t)
    check_mode(NAME, mode)
    rows = torch.is_grad_enabled() and mode != "jvp" and h.requires_grad
    loss, loss_t, curvature, _, _ = _fwd(
        h, weight, targets, weight_t, bias, bias_t, softcap or 0.0, mode, rows
    )
    return loss, loss_t, curvature


def forward_cuda(*args: Any) -> tuple[Tensor, ...]:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    return (_reference if args[0].dtype == torch.float64 else _triton).forward(*args)


def backward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return (_reference if args[2].dtype == torch.float64 else _triton).backward(*args)


def _fake(h, weight, targets, weight_t, bias, bias_t, softcap, mode, rows):
    return _reference.outputs(h, targets, mode, rows)


def _fake_bwd(a, b, h, weight, targets, weight_t, bias, bias_t, stats, softcap, mode):
    return weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape[0])


_bwd = define(
    "dual_linear_cross_entropy_bwd(Tensor a, Tensor b, Tensor h, Tensor weight, Tensor targets,"
    " Tensor? weight_t, Tensor? bias, Tensor? bias_t, Tensor stats, float softcap, str mode)"
    " -> (Tensor, Tensor)",
    reference=_reference.backward,
    fake=_fake_bwd,
    cuda=cuda_launcher(backward_cuda),
)


class _Rescale(torch.autograd.Function):
    """dh = a r1 + b r2, dh_t = b r1. h, unread, makes the result differentiable, so a second order
    is refused."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kept: Tensor, h: Tensor) -> Tensor:
        acc = accum_dtype(h)
        dh = h.new_empty(h.shape)
        primal, tangent = halves(dh)
        if kept.shape[0] == 1:
            primal.copy_(b[:, None] * kept[0].to(acc))
            tangent.zero_()
            return dh
        r2, r1 = kept.to(acc)
        primal.copy_((b[:, None] * r2).addcmul_(a[:, None], r1))
        tangent.copy_(b[:, None] * r1)
        return dh

    backward = staticmethod(refusal(NAME))


def _setup(ctx, inputs, output):
    h, weight, targets, weight_t, bias, bias_t, ctx.softcap, ctx.mode, ctx.rows = inputs
    _, _, curvature, stats, kept = output
    ctx.mark_non_differentiable(curvature, stats, kept)
    if ctx.mode == "jvp":
        return
    ctx.head = ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
    head = (weight, targets, weight_t, bias, bias_t, stats) if ctx.head else ()
    ctx.save_for_backward(h, kept, *head)


def _backward(ctx, a, b, *_):
    refuse_jvp(NAME, ctx.mode)
    h, kept, *head = ctx.saved_tensors
    dh = dw = db = None
    if ctx.needs_input_grad[0]:
        if not ctx.rows:
            raise RuntimeError(
                "dual_linear_cross_entropy: h needs a gradient, so rows must be True"
            )
        dh = _Rescale.apply(a, b, kept, h)
    if ctx.head:
        dw, db = _bwd(a, b, h, *head, ctx.softcap, ctx.mode)
    dw, db = (
        g if needed else None
        for g, needed in ((dw, ctx.needs_input_grad[1]), (db, ctx.needs_input_grad[4]))
    )
    return dh, dw, None, None, db, None, None, None, None


_fwd = define(
    "dual_linear_cross_entropy(Tensor h, Tensor weight, Tensor targets, Tensor? weight_t,"
    " Tensor? bias, Tensor? bias_t, float softcap, str mode, bool rows)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference.forward,
    fake=_fake,
    cuda=cuda_launcher(forward_cuda),
    backward=_backward,
    setup_context=_setup,
)
