"""<G_b, V_q> for the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

The influence of every example along fixed directions, in two equal forms chosen by shape.
By tokens: sum_t g_t^T (V_q x_t), a tile of V_q x_t dotted with g_t while it is on chip. By
gradients, for many directions: a tile of G_b formed once and dotted with every V_q. V = L R^T may
stay in its factors: sum_t (L^T g_t) . (R^T x_t). Saved for backward: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size, wanted
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, segment_ids, segment_sum, segments
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.grad_dot import triton as _triton


def grad_dot(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Inner products of per-example weight gradients with one or several directions.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        v: [d_out, d_in] or [Q, d_out, d_in] directions, dtype of x; or the factors (left, right) of
            directions V = left right^T of low rank: [d_out, rank] and [d_in, rank], or both with
            Q in front. Each costs 2 N rank (d_in + d_out) operations.

    Returns:
        [B] or [B, Q], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x, g and v (both factors).

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name; the
            factors are named v[0] and v[1].

    Equivalent torch: ``torch.stack([(v * (g[s:e].T @ x[s:e])).sum() for s, e in segments])``, with
    ``v = left @ right.mT`` for factors.

    Source: ghost inner product, arXiv 2504.06659's outer score with a shared direction; see also
    Goodfellow, arXiv 1510.01799.
    """
    op = "grad_dot"
    parts = dict(zip(("v[0]", "v[1]"), v, strict=False)) if isinstance(v, tuple) else {"v": v}
    if isinstance(v, tuple) and len(v) != 2:
        raise wanted(op, "v", "a tensor or two factors (left, right)", f"{len(v)} of them")
    check_floats(op, x=x, g=g, **parts)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    d_in, d_out = x.shape[1], g.shape[1]
    if isinstance(v, tuple):
        left, right = v
        check_dim(op, "v[0]", left, "[d_out, rank] or [Q, d_out, rank]", (2, 3))
        q, rank = left.shape[:-2], left.shape[-1]
        check_size(op, "v[0]", left, "[..., d_out, rank]", (*q, d_out, rank))
        check_size(op, "v[1]", right, "[..., d_in, rank]", (*q, d_in, rank))
        check_offsets(op, offsets, x.shape[0])
        if left.ndim == 2:
            return _grad_dot_low_rank(x, g, offsets, left[None], right[None])[:, 0]
        return _grad_dot_low_rank(x, g, offsets, left, right)
    check_dim(op, "v", v, "[d_out, d_in] or [Q, d_out, d_in]", (2, 3))
    check_size(op, "v", v, "[..., d_out, d_in]", (*v.shape[:-2], d_out, d_in))
    check_offsets(op, offsets, x.shape[0])
    if v.ndim == 2:
        return _grad_dot(x, g, offsets, v[None], True)[:, 0]
    by_tokens = tokens_are_cheaper(x.shape[0], offsets.shape[0] - 1, v.shape[0])
    return _grad_dot(x, g, offsets, v, by_tokens)


def tokens_are_cheaper(n: int, b: int, q: int) -> bool:
    """Multiplications per entry of the weight: Q N against forming B gradients and their products.

    A formed entry also costs a write and a read, here 8 multiplications; the products with V run
    at half the rate of the others.
    """
    return q * n <= n + b * (2 * q + 8)


def reference(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor, by_tokens: bool) -> Tensor:
    """By gradients, `segments` synchronises with the host once on CUDA."""
    acc = accum_dtype(x)
    if by_tokens:
        y = torch.einsum("ni,qoi->nqo", x.to(acc), v.to(acc))
        return segment_sum((y * g.to(acc)[:, None]).sum(-1), offsets)
    out = x.new_zeros(offsets.shape[0] - 1, v.shape[0], dtype=acc)
    for b, t in segments(offsets):
        whole = g[t].to(acc).T @ x[t].to(acc)
        out[b] = torch.stack([(whole * v_q.to(acc)).sum() for v_q in v])
    return out


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accum_dtype(x)
    w = grad.to(acc)[segment_ids(offsets, x.shape[0])]  # [N, Q]
    xa, ga, va = x.to(acc), g.to(acc), v.to(acc)
    dx, dg, dv = torch.zeros_like(xa), torch.zeros_like(ga), torch.empty_like(va)
    for q in range(v.shape[0]):
        scaled = ga * w[:, q : q + 1]
        dx.addmm_(scaled, va[q])
        dg.addcmul_(w[:, q : q + 1], xa @ va[q].T)
        dv[q] = scaled.T @ xa
    return dx.to(x.dtype), dg.to(g.dtype), dv.to(v.dtype)


def reference_low_rank(
    x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    acc = accum_dtype(x)
    zg = torch.einsum("no,qok->nqk", g.to(acc), left.to(acc))
    zx = torch.einsum("ni,qik->nqk", x.to(acc), right.to(acc))
    return segment_sum((zg * zx).sum(-1), offsets)


def reference_low_rank_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accum_dtype(x)
    w = grad.to(acc)[segment_ids(offsets, x.shape[0])][..., None]  # [N, Q, 1]
    xa, ga, ra, la = (t.to(acc) for t in (x, g, left, right))
    zg = w * torch.einsum("no,qok->nqk", ga, ra)
    zx = w * torch.einsum("ni,qik->nqk", xa, la)
    return (
        torch.einsum("nqk,qik->ni", zg, la).to(x.dtype),
        torch.einsum("nqk,qok->no", zx, ra).to(g.dtype),
        torch.einsum("no,nqk->qok", ga, zx).to(left.dtype),
        torch.einsum("ni,nqk->qik", xa, zg).to(right.dtype),
    )


def forward_triton(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor, by_tokens: bool) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference(x, g, offsets, v, by_tokens)
    out = x.new_empty(offsets.shape[0] - 1, v.shape[0], dtype=torch.float32)
    if out.numel() == 0 or x.numel() == 0 or g.numel() == 0:
        return out.zero_()
    form = _triton.by_tokens if by_tokens else _triton.by_gradients
    return form(x, g, offsets.contiguous(), v, out)


def low_rank_triton(x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `forward_triton`."""
    if x.dtype == torch.float64:
        return reference_low_rank(x, g, offsets, left, right)
    out = x.new_empty(offsets.shape[0] - 1, left.shape[0], dtype=torch.float32)
    if out.numel() == 0 or x.numel() == 0 or g.numel() == 0 or left.shape[2] == 0:
        return out.zero_()
    return _triton.low_rank(x, g, offsets.contiguous(), left, right, out)


def _fake(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor, by_tokens: bool) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, v.shape[0], dtype=accum_dtype(x))


def _fake_low_rank(x: Tensor, g: Tensor, offsets: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, left.shape[0], dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, *v: Tensor
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, g, *v))


_FACTORS = "Tensor x, Tensor g, Tensor offsets, Tensor left, Tensor right"

_grad_dot_bwd = define(
    "grad_dot_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, Tensor v)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)

_grad_dot_low_rank_bwd = define(
    f"grad_dot_low_rank_bwd(Tensor grad, {_FACTORS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_low_rank_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad):
    dx, dg, dv = _grad_dot_bwd(grad, *ctx.saved_tensors)
    return dx, dg, None, dv, None


def _setup_low_rank(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_low_rank(ctx, grad):
    dx, dg, dr, dl = _grad_dot_low_rank_bwd(grad, *ctx.saved_tensors)
    return dx, dg, None, dr, dl


_grad_dot = define(
    "grad_dot(Tensor x, Tensor g, Tensor offsets, Tensor v, bool by_tokens) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    backward=_backward,
    setup_context=_setup,
)

_grad_dot_low_rank = define(
    f"grad_dot_low_rank({_FACTORS}) -> Tensor",
    reference=reference_low_rank,
    fake=_fake_low_rank,
    cuda=cuda_launcher(low_rank_triton),
    backward=_backward_low_rank,
    setup_context=_setup_low_rank,
)
