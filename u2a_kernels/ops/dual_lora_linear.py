"""y = x W^T + b + s (x A^T) B^T on dual rows; W and b are frozen, A and B have directions.

With u = x A^T and u_t = x_t A^T + x A_t^T: y_t = x_t W^T + s (u_t B^T + u B_t^T). Backward, with g
the cotangent of the tangent half and g_t of the primal half: v = s g B, v_t = s (g_t B + g B_t),
dx_t = g W + v A, dx = g_t W + v_t A + v A_t, dA = v_t^T x + v^T x_t, dB = s (g_t^T u + g^T u_t).
One GEMM with W; the adapter's products add onto its result in place. Each skinny product reads its
tall factor once: A and A_t, B and B_t are side by side. Saved for backward: the weights; u when B
needs a gradient, x when A does (their primal halves alone in ggn).
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_size
from u2a_kernels._dual import check_directions, check_halves, check_mode, halves, refuse_jvp
from u2a_kernels._library import define


def dual_lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a_t: Tensor | None = None,
    b_t: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    mode: str = "hvp",
) -> Tensor:
    """Linear layer with a low-rank adapter on primal rows and on their tangents.

    Args:
        x: [2B, ..., d_in], B primal rows and then their B tangent rows; float32, bfloat16, float16
            or float64.
        weight: [d_out, d_in], frozen, dtype of x; any strides (a view for a transposed store).
        a: [r, d_in]. b: [d_out, r].
        a_t: [r, d_in] direction of a, or None for zero. b_t: [d_out, r] direction of b, or None.
            Not differentiated.
        bias: [d_out], frozen, or None; added to the primal half only.
        scale: s, the adapter's factor.
        mode: "hvp"; "ggn": the backward runs on the primal half alone and puts zeros on the tangent
            half (Gauss-Newton); "jvp": forward only, a backward raises RuntimeError.

    Returns:
        [2B, ..., d_out] in the dtype of x. GEMMs accumulate in fp32 (fp64 for float64); each term
        is rounded to the dtype of x. Differentiable once in x, a and b.

    Raises:
        ValueError, TypeError: a shape, dtype, device or mode that does not fit, or a weight, bias
            or direction that requires grad, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(lambda x, a, b: F.linear(x, weight, bias) + scale *
    F.linear(F.linear(x, a), b), (x[:B], a, b), (x[B:], a_t, b_t)))``.

    Source: Hu et al., arXiv 2106.09685; product rule.
    """
    op = "dual_lora_linear"
    check_floats(op, x=x, weight=weight, a=a, b=b, a_t=a_t, b_t=b_t, bias=bias)
    check_halves(op, "x", x, "[2B, ..., d_in]")
    check_dim(op, "weight", weight, "[d_out, d_in]", 2)
    check_size(op, "weight", weight, "[d_out, d_in]", (weight.shape[0], x.shape[-1]))
    check_dim(op, "a", a, "[r, d_in]", 2)
    check_size(op, "a", a, "[r, d_in]", (a.shape[0], x.shape[-1]))
    check_size(op, "b", b, "[d_out, r]", (weight.shape[0], a.shape[0]))
    for name, t, like, want in (("a_t", a_t, a, "[r, d_in]"), ("b_t", b_t, b, "[d_out, r]")):
        if t is not None:
            check_size(op, name, t, want, tuple(like.shape))
    if bias is not None:
        check_size(op, "bias", bias, "[d_out]", (weight.shape[0],))
    check_directions(op, a_t=a_t, b_t=b_t)
    for name, t in dict(weight=weight, bias=bias).items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad, it is frozen here; got a tensor that does "
                "(use dual_linear for each factor)"
            )
    check_mode(op, mode)
    return _dual_lora_linear(x, weight, a, b, a_t, b_t, bias, scale, mode)[0]


def _through(rows: Tensor, w: Tensor, w_t: Tensor | None, swap: bool) -> Tensor:
    """[p w; t w + p w_t] of rows [p; t], w [d, r] skinny; with `swap` w_t goes the other way,
    [p w + t w_t; t w]."""
    if w_t is None:
        return rows @ w
    first, second = halves(rows)
    with_direction, other = (second, first) if swap else (first, second)
    plain, extra = (with_direction @ torch.cat([w, w_t], 1)).chunk(2, 1)
    mixed = torch.addmm(extra, other, w)
    return torch.cat([mixed, plain] if swap else [plain, mixed])


def _add_through(
    y: Tensor, u: Tensor, w: Tensor, w_t: Tensor | None, scale: float, swap: bool
) -> None:
    """y += scale times the same map on skinny rows u, w [r, d] wide: one product for each half."""
    if w_t is None:
        y.addmm_(u, w, alpha=scale)
        return
    (y0, y1), (u0, u1) = halves(y), halves(u)
    both = torch.cat([w, w_t])
    if swap:
        y0.addmm_(torch.cat([u0, u1], 1), both, alpha=scale)
        y1.addmm_(u1, w, alpha=scale)
    else:
        y0.addmm_(u0, w, alpha=scale)
        y1.addmm_(torch.cat([u1, u0], 1), both, alpha=scale)


def _t(w: Tensor | None) -> Tensor | None:
    return None if w is None else w.mT


def forward(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a_t: Tensor | None,
    b_t: Tensor | None,
    bias: Tensor | None,
    scale: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """y, and u [rows, r]."""
    rows = x.flatten(0, -2)
    y = rows @ weight.mT
    u = _through(rows, a.mT, _t(a_t), swap=False)
    _add_through(y, u, b.mT, _t(b_t), scale, swap=False)
    if bias is not None:
        halves(y)[0].add_(bias)
    return y.view(*x.shape[:-1], weight.shape[0]), u


def backward(
    grad: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    a_t: Tensor | None,
    b_t: Tensor | None,
    scale: float,
    mode: str,
    x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA when x is given, dB when u is given."""
    rows = grad.flatten(0, -2)
    ggn = mode == "ggn"
    used = halves(rows)[0] if ggn else rows
    if ggn:
        a_t = b_t = None
    v = _through(used, b, b_t, swap=True).mul_(scale)
    dx, da, db = (weight.new_empty(0) for _ in range(3))
    if x_grad:
        dx = rows.new_empty(len(rows), weight.shape[1])
        part = halves(dx)[0] if ggn else dx
        torch.mm(used, weight, out=part)
        _add_through(part, v, a, a_t, 1.0, swap=True)
        if ggn:
            halves(dx)[1].zero_()
        dx = dx.view(*grad.shape[:-1], weight.shape[1])
    if x is not None:
        da = v.mT @ x.flatten(0, -2)
    if u is not None:
        db = (used.mT @ u).mul_(scale)
    return dx, da, db


def _fake(x, weight, a, b, a_t, b_t, bias, scale, mode):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(x.shape[:-1].numel(), a.shape[0])


def _fake_bwd(grad, x, u, weight, a, b, a_t, b_t, scale, mode, x_grad):
    dx = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if x_grad else weight.new_empty(0)
    da = weight.new_empty(0 if x is None else a.shape)
    return dx, da, weight.new_empty(0 if u is None else b.shape)


_dual_lora_linear_bwd = define(
    "dual_lora_linear_bwd(Tensor grad, Tensor? x, Tensor? u, Tensor weight, Tensor a, Tensor b,"
    " Tensor? a_t, Tensor? b_t, float scale, str mode, bool x_grad) -> (Tensor, Tensor, Tensor)",
    reference=backward,
    fake=_fake_bwd,
    cuda=backward,
    cuda_owner="cuBLAS",
)


def _setup(ctx, inputs, output):
    x, weight, a, b, a_t, b_t, _, ctx.scale, ctx.mode = inputs
    u = output[1]
    ctx.mark_non_differentiable(u)
    if ctx.mode == "jvp":
        return
    if ctx.mode == "ggn":
        x, u = halves(x)[0], halves(u)[0]
    need_a, need_b = ctx.needs_input_grad[2:4]
    kept = (x if need_a else None, u if need_b else None)
    ctx.save_for_backward(*kept, weight, a, b, a_t, b_t)


def _backward(ctx, grad, _):
    refuse_jvp("dual_lora_linear", ctx.mode)
    need_x, _, need_a, need_b = ctx.needs_input_grad[:4]
    dx, da, db = _dual_lora_linear_bwd(grad, *ctx.saved_tensors, ctx.scale, ctx.mode, need_x)
    got = (dx if need_x else None, None, da if need_a else None, db if need_b else None)
    return *got, *[None] * 5


_dual_lora_linear = define(
    "dual_lora_linear(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? a_t, Tensor? b_t,"
    " Tensor? bias, float scale, str mode) -> (Tensor, Tensor)",
    reference=forward,
    fake=_fake,
    cuda=forward,
    cuda_owner="cuBLAS",
    backward=_backward,
    setup_context=_setup,
)
