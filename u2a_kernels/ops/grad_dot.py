"""<G_b, V_q> for the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

The influence of every example along a fixed direction, in ghost form: sum_t g_t^T (V x_t). One GEMM
tile of V x_t is dotted with g_t while it is still on chip, so neither G_b nor [N, d_out] exists.
Saved for backward: the inputs. The backward is three GEMMs with outputs as large as the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, segment_ids, segment_sum
from u2a_kernels._triton import cuda_launcher, dot_dtype, dot_precision, tl, triton


def grad_dot(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
    """Inner products of per-example weight gradients with one or several directions.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        v: [d_out, d_in] or [Q, d_out, d_in] directions, dtype of x.

    Returns:
        [B] or [B, Q], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x, g and v.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    Equivalent torch: ``torch.stack([(v * (g[s:e].T @ x[s:e])).sum() for s, e in segments])``.

    Source: ghost inner product, arXiv 2504.06659's outer score with a shared direction; see also
    Goodfellow, arXiv 1510.01799.
    """
    op = "grad_dot"
    check_floats(op, x=x, g=g, v=v)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_dim(op, "v", v, "[d_out, d_in] or [Q, d_out, d_in]", (2, 3))
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    want = (g.shape[1], x.shape[1])
    check_size(op, "v", v, "[..., d_out, d_in]", (*v.shape[:-2], *want))
    check_offsets(op, offsets, x.shape[0])
    if v.ndim == 2:
        return _grad_dot(x, g, offsets, v[None])[:, 0]
    return _grad_dot(x, g, offsets, v)


def reference(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
    acc = accum_dtype(x)
    y = torch.einsum("ni,qoi->nqo", x.to(acc), v.to(acc))
    return segment_sum((y * g.to(acc)[:, None]).sum(-1), offsets)


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


@triton.jit
def _token_kernel(
    x, g, v, part, N, D_in, D_out, o_per_split,
    sx_n, sx_i, sg_n, sg_o, sv_q, sv_o, sv_i,
    BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[q, split, n] = sum over the split's outputs o of g[n, o] * (V_q x_n)[o]."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    q = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for o0 in range(split * o_per_split, tl.minimum((split + 1) * o_per_split, D_out), BO):
        o = o0 + tl.arange(0, BO).to(tl.int64)
        y = tl.zeros((BN, BO), tl.float32)
        for i0 in range(0, D_in, BI):
            i = i0 + tl.arange(0, BI).to(tl.int64)
            bx = tl.load(
                x + n[:, None] * sx_n + i[None, :] * sx_i,
                mask=(n[:, None] < N) & (i[None, :] < D_in),
                other=0.0,
            )  # [BN, BI]
            bv = tl.load(
                v + q * sv_q + o[None, :] * sv_o + i[:, None] * sv_i,
                mask=(o[None, :] < D_out) & (i[:, None] < D_in),
                other=0.0,
            )  # [BI, BO]
            y = tl.dot(bx.to(DOT), bv.to(DOT), y, input_precision=PREC)
        bg = tl.load(
            g + n[:, None] * sg_n + o[None, :] * sg_o,
            mask=(n[:, None] < N) & (o[None, :] < D_out),
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(y * bg, axis=1)
    splits = tl.num_programs(1)
    tl.store(part + (q * splits + split) * N + n, total, mask=n < N)


@triton.jit
def _segment_kernel(part, offsets, out, N, Q, SPLITS, BN: tl.constexpr):
    """out[b, q] = sum of part[q, :, n] over the tokens n of example b, in a fixed order."""
    b = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for split in range(0, SPLITS):
        for n0 in range(start, end, BN):
            n = n0 + tl.arange(0, BN)
            total += tl.load(part + (q * SPLITS + split) * N + n, mask=n < end, other=0.0)
    tl.store(out + b * Q + q, tl.sum(total, axis=0))


def config(n: int, d_in: int, d_out: int) -> dict[str, int]:
    """Tile sizes and the number of splits of d_out that fill a GPU when there are few tokens.

    With 8 warps the fp32 tile spills no register on sm_80, 90, 100; with 4 up to 2.6 KB.
    """
    bn = 64 if n >= 64 else 16
    bo = 128 if d_out >= 128 else 64 if d_out >= 64 else 16
    bi = 64 if d_in >= 64 else 16
    tiles = triton.cdiv(d_out, bo)
    splits = max(1, min(tiles, 512 // max(1, triton.cdiv(n, bn))))
    return dict(BN=bn, BO=bo, BI=bi, splits=splits, o_per_split=triton.cdiv(tiles, splits) * bo)


def forward_triton(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference(x, g, offsets, v)
    n, d_in, d_out, q, b = x.shape[0], x.shape[1], g.shape[1], v.shape[0], offsets.shape[0] - 1
    out = torch.empty(b, q, device=x.device, dtype=torch.float32)
    if b == 0 or q == 0:
        return out
    if n == 0 or d_in == 0 or d_out == 0:
        return out.zero_()
    c = config(n, d_in, d_out)
    part = torch.empty(q, c["splits"], n, device=x.device, dtype=torch.float32)
    _token_kernel[(triton.cdiv(n, c["BN"]), c["splits"], q)](
        x, g, v, part, n, d_in, d_out, c["o_per_split"],
        *x.stride(), *g.stride(), *v.stride(),
        BN=c["BN"], BO=c["BO"], BI=c["BI"], DOT=dot_dtype(x), PREC=dot_precision(), num_warps=8,
    )  # fmt: skip
    _segment_kernel[(b, q)](part, offsets.contiguous(), out, n, q, c["splits"], BN=128, num_warps=4)
    return out


def _fake(x: Tensor, g: Tensor, offsets: Tensor, v: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, v.shape[0], dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape), v.new_empty(v.shape)


_grad_dot_bwd = define(
    "grad_dot_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, Tensor v)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, g, offsets, v = ctx.saved_tensors
    dx, dg, dv = _grad_dot_bwd(grad, x, g, offsets, v)
    return dx, dg, None, dv


_grad_dot = define(
    "grad_dot(Tensor x, Tensor g, Tensor offsets, Tensor v) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    backward=_backward,
    setup_context=_setup,
)
