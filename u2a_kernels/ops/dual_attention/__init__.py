"""Softmax attention on dual rows, flash style: o and three numbers a row are kept, never [T, S].

S = cap(s q k^T), P = exp(S - lse), o = P v; P_t = P (S_t - mu), mu = sum P S_t the tangent of lse;
o_t = P v_t + P_t v. The backward is the tangent of the flash backward.
stats [3, B, H, T] holds max S, lse - max S and mu: one float of lse would put its rounding, up to
4e-7, into every P of the row. A query without keys has 0, -inf, 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, shape, wanted
from u2a_kernels._dual import check_halves, check_mode, fresh, refuse_jvp
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.dual_attention import reference
from u2a_kernels.ops.dual_attention import triton as _triton
from u2a_kernels.ops.dual_attention.backward import backward as _backward_triton


def dual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    offsets: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    mode: str = "hvp",
) -> Tensor:
    """Attention of primal rows and the tangents of its output.

    Args:
        q: [2B, H, T, D], B primal rows and then their B tangent rows; or packed [2N, H, D] with
            `offsets`. float32, bfloat16, float16 or float64.
        k, v: [2B, Hkv, S, D], or packed [2N, Hkv, D]; dtype of q. Hkv divides H (grouped queries);
            v may have its own last dimension.
        scale: factor of q k^T; 1/sqrt(D) when None.
        causal: query t sees keys up to t + S - T. A query that sees no key gives zeros.
        offsets: [B+1] int32/int64, segments of the N packed tokens; each attends to itself only.
        window: with causal, query t sees only the last `window` of those keys (keys > t - window).
        softcap: scores become softcap * tanh(score / softcap).
        mode: "hvp"; "ggn": the plain attention backward on the primal half, zeros on the tangent
            half (Gauss-Newton); "jvp": forward only, a backward raises RuntimeError.

    Returns:
        [2B, H, T, Dv] or [2N, H, Dv] in the dtype of q; fp32 inside (fp64 for float64), on a GPU
        with P and dS rounded to the dtype of q as factors of products. Deterministic.
        Differentiable once in q, k and v; the gradient of the tangent half is the second-order
        product. On a GPU float64 and heads wider than 256 are served by the reference.

    Raises:
        ValueError, TypeError: a shape, dtype, device, offset or option that does not fit, by name.

    Equivalent torch: ``torch.cat(torch.func.jvp(attention, (q[:B], k[:B], v[:B]),
    (q[B:], k[B:], v[B:])))`` with eager softmax attention under an explicit mask.

    Source: tangent of Dao, arXiv 2307.08691, forward and backward; D and D_t, the row sums of the
    backward, are known before its sweep.
    """
    op = "dual_attention"
    check_floats(op, q=q, k=k, v=v)
    _check_shapes(op, q, k, v, packed=offsets is not None)
    if offsets is not None:
        check_offsets(op, offsets, q.shape[0] // 2, rows="q's primal half")
    if window is not None and (window < 1 or not causal):
        raise wanted(op, "window", "at least 1, with causal=True", f"{window}, causal={causal}")
    if softcap is not None and not softcap > 0:
        raise wanted(op, "softcap", "positive or None", softcap)
    check_mode(op, mode)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _dual_attention(q, k, v, offsets, factor, causal, window, softcap, mode)[0]


def _check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    wants = ("[2N, H, D]", "[2N, Hkv, D]") if packed else ("[2B, H, T, D]", "[2B, Hkv, S, D]")
    check_dim(op, "q", q, wants[0], 3 if packed else 4)
    check_halves(op, "q", q, wants[0])
    for name, t in dict(k=k, v=v).items():
        check_dim(op, name, t, wants[1], q.ndim)
        if t.shape[0] != q.shape[0]:
            raise wanted(op, name, f"{wants[1]} with {q.shape[0]} rows as q has", shape(t))
    if k.shape[-1] != q.shape[-1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        want = f"{wants[1]} with D = {q.shape[-1]} and Hkv dividing H = {q.shape[1]}"
        raise wanted(op, "k", want, shape(k))
    if v.shape[:-1] != k.shape[:-1]:
        raise wanted(
            op, "v", f"{wants[1]} with the rows, heads and keys of k, {shape(k)}", shape(v)
        )


def _fused(q: Tensor, v: Tensor) -> bool:
    """On a GPU float64 and heads wider than 256 have no kernel: the reference answers."""
    return q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= 256


def forward_cuda(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return (_triton.forward if _fused(q, v) else reference.forward)(q, k, v, *options)


def backward_cuda(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (_backward_triton if _fused(q, v) else reference.backward)(grad, q, k, v, *rest)


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    stats = (3, q.shape[0] // 2, *q.shape[1:-1])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(stats, dtype=accum_dtype(q))


def _fake_bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(q), fresh(k), fresh(v)


_OPTIONS = "Tensor? offsets, float scale, bool causal, int? window, float? softcap, str mode"

_dual_attention_bwd = define(
    "dual_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats,"
    f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_bwd,
    cuda=cuda_launcher(backward_cuda),
)


def _setup(ctx, inputs, output):
    q, k, v, offsets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    if ctx.options[-1] != "jvp":
        ctx.save_for_backward(q, k, v, *output, offsets)


def _backward(ctx, grad, _):
    refuse_jvp("dual_attention", ctx.options[-1])
    return *_dual_attention_bwd(grad, *ctx.saved_tensors, *ctx.options), *[None] * 6


_dual_attention = define(
    f"dual_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=reference.forward,
    fake=_fake,
    cuda=cuda_launcher(forward_cuda),
    backward=_backward,
    setup_context=_setup,
)
