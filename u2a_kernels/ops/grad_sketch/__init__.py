"""Sketches of the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

TensorSketch with XOR: hashes and signs of an entry (o, i) are those of o and i combined by XOR and
by product, so that in the Walsh-Hadamard domain the sketch of G_b is
sum_t (H C_out g_t) * (H C_in x_t), elementwise: it needs x and g only, and features stay in that
domain, where any module adds into the same k numbers. sjlt and rademacher hash every entry of G_b,
whose tiles are formed and dropped. Saved for backward: the inputs, without x where g is one-hot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import (
    _is_fake,
    check_dim,
    check_floats,
    check_offsets,
    check_size,
    wanted,
)
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.grad_sketch.maps import (
    KINDS,
    RADEMACHER,
    TENSORSKETCH,
    philox,
    reference,
    reference_bwd,
    reference_entries,
    reference_entries_bwd,
    reference_rows,
    reference_rows_bwd,
    sketch_hash,
)
from u2a_kernels.ops.grad_sketch.triton import forward_triton
from u2a_kernels.ops.grad_sketch.triton_entries import entries_triton, rows_triton

__all__ = [
    "entries_triton",
    "forward_triton",
    "grad_sketch",
    "philox",
    "reference",
    "reference_entries",
    "reference_rows",
    "rows_triton",
    "sketch_hash",
]


def grad_sketch(
    x: Tensor,
    g: Tensor,
    offsets: Tensor,
    k: int,
    seed: int,
    *,
    kind: str = "tensorsketch",
    out: Tensor | None = None,
) -> Tensor:
    """Sketch every example's weight gradient into k numbers whose inner products are unbiased.

    E <sketch(G), sketch(G')> = <G, G'>, with a variance of about (|G|^2 |G'|^2 + <G, G'>^2) / k
    for "tensorsketch", of that less 2 sum (G * G')^2 / k for the others.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x. Or int64 [N]: the
            number, 0 to 2^31 - 1, of each token's one output whose gradient is 1, as in an
            embedding [V, d_in], where x is the gradient at its output. Not differentiable then.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        k: number of features, a power of two from 2 to 65536.
        seed: 0 <= seed < 2^63. One seed a module: with equal seeds, entries of two modules that
            share o and i would collide always.
        kind: "tensorsketch"; "sjlt", one non-zero per entry of G_b; "rademacher", k signs per
            entry, for comparison: k / 2T times the cost of a training step with T tokens.
        out: [B, k], dtype of the result: added to in place and returned, for the sum over modules.

    Returns:
        [B, k], float32 (float64 for float64 inputs), accumulated in that type. Differentiable once
        in x and g; with `out` as torch's in-place add is. Deterministic on one machine; ways that
        form G_b use torch's GEMM, others have the same bits on every CPU. On CUDA sjlt sums 64-bit
        integers, 2^-60 of an example's sum_t |g_t|_1 |x_t|_1 apart; where that is not finite in
        float32 the example's features are NaN.

    Raises:
        ValueError, TypeError: a shape, dtype, device, offset, k, seed or kind that does not fit,
            by name.

    The streams, on every device and version: Philox4x32-10 with key (seed mod 2^32, seed >> 32)
    and counter (c0, c1, c2, 0x55324153). TensorSketch: word 0 of (c mod 2^32, c >> 32, stream) for
    coordinate c of g (stream 0, "outputs") or of x (stream 1, "inputs"). Bucket h(c) is the word's
    low log2(k) bits, sign s(c) is -1 where its bit 31 is set. sjlt: bucket and sign likewise, of
    word 0 of (i, o, 4). rademacher: r_j(o, i) is -1 where bit j mod 32 of word (j div 32) mod 4 of
    (i, o, 4 + 8 (1 + j div 128)) is set. With P[j, c] = s(c) (-1)^popcount(j & h(c)):

    Equivalent torch: ``torch.stack([((P_out @ g[s:e].T) * (P_in @ x[s:e].T)).sum(1) / k**0.5 for
    s, e in segments])``, which is ``((P_out @ G_b) * P_in).sum(1) / k**0.5``; for "sjlt"
    ``zeros(k).index_add(0, h.flatten(), (s * G_b).flatten())``, for "rademacher"
    ``torch.einsum("joi,oi->j", r, G_b) / k**0.5``. One-hot g: ``g = one_hot(g, V).to(x)``.

    Source: TensorSketch (Pham and Pagh, KDD 2013) with XOR in place of addition modulo k and the
    Walsh-Hadamard in place of the Fourier transform; sparse JL with one non-zero (Kane and Nelson,
    J. ACM 2014), as GraSS (arXiv 2505.18976) applies to formed gradients; Rademacher projection
    (Achlioptas, JCSS 2003), as TRAK (arXiv 2303.14186); Philox: Salmon et al., SC 2011.
    """
    op = "grad_sketch"
    rows = isinstance(g, Tensor) and g.dtype == torch.int64
    _check_pair(op, x, g, rows)
    check_offsets(op, offsets, x.shape[0])
    if not isinstance(k, int) or not 2 <= k <= 65536 or k & (k - 1):
        raise wanted(op, "k", "a power of two from 2 to 65536", k)
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise wanted(op, "seed", "an integer from 0 to 2^63 - 1", seed)
    if kind not in KINDS:
        raise wanted(op, "kind", " or ".join(repr(name) for name in KINDS), repr(kind))
    if out is not None:
        _check_out(op, out, x, (offsets.shape[0] - 1, k))
    number = KINDS.index(kind)
    if rows:
        features = _grad_sketch_rows(x, g, offsets, k, seed, number)
    elif number == TENSORSKETCH:
        features = _grad_sketch(x, g, offsets, k, seed)
    else:
        features = _grad_sketch_entries(x, g, offsets, k, seed, number == RADEMACHER)
    return features if out is None else out.add_(features)


def _check_pair(op: str, x: Tensor, g: Tensor, rows: bool) -> None:
    if not rows:
        check_floats(op, x=x, g=g)
        check_dim(op, "x", x, "[N, d_in]", 2)
        check_dim(op, "g", g, "[N, d_out] (or int64 [N])", 2)
        check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
        return
    check_floats(op, x=x)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_size(op, "g", g, "[N] where it is int64", (x.shape[0],))
    if g.device != x.device:
        raise wanted(op, "g", f"on the device of x, {x.device}", g.device)
    if g.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(g) or not len(g):
        return
    low, high = (int(v) for v in g.aminmax())
    if low < 0 or high >= 1 << 31:
        raise wanted(op, "g", "row numbers from 0 to 2^31 - 1", low if low < 0 else high)


def _check_out(op: str, out: Tensor, x: Tensor, size: tuple[int, int]) -> None:
    if not isinstance(out, Tensor) or out.dtype != accum_dtype(x) or out.device != x.device:
        got = f"{out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{op}: out must be {accum_dtype(x)} on {x.device}, got {got}")
    check_size(op, "out", out, "[B, k]", size)


def _fake(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, *_: int) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, k, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, *_: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape)


def _fake_rows_bwd(
    grad: Tensor, g: Tensor, offsets: Tensor, d_in: int, k: int, seed: int, kind: int
) -> Tensor:
    return grad.new_empty(g.shape[0], d_in)


_grad_sketch_bwd = define(
    "grad_sketch_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, int k, int seed)"
    " -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)
_grad_sketch_entries_bwd = define(
    "grad_sketch_entries_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, int k, int seed,"
    " bool dense) -> (Tensor, Tensor)",
    reference=reference_entries_bwd,
    fake=_fake_bwd,
)
_grad_sketch_rows_bwd = define(
    "grad_sketch_rows_bwd(Tensor grad, Tensor g, Tensor offsets, int d_in, int k, int seed,"
    " int kind) -> Tensor",
    reference=reference_rows_bwd,
    fake=_fake_rows_bwd,
)


def _setup(ctx, inputs, output):
    x, g, offsets, *ctx.rest = inputs
    ctx.save_for_backward(x, g, offsets)


def _setup_rows(ctx, inputs, output):
    x, g, offsets, *ctx.rest = inputs
    ctx.d_in, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(g, offsets)


def _backward(ctx, grad):
    dx, dg = _grad_sketch_bwd(grad, *ctx.saved_tensors, *ctx.rest)
    return dx, dg, None, None, None


def _backward_entries(ctx, grad):
    dx, dg = _grad_sketch_entries_bwd(grad, *ctx.saved_tensors, *ctx.rest)
    return dx, dg, None, None, None, None


def _backward_rows(ctx, grad):
    dx = _grad_sketch_rows_bwd(grad, *ctx.saved_tensors, ctx.d_in, *ctx.rest)
    return dx.to(ctx.dtype), None, None, None, None, None


_grad_sketch = define(
    "grad_sketch(Tensor x, Tensor g, Tensor offsets, int k, int seed) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    cuda_library=True,
    backward=_backward,
    setup_context=_setup,
)
_grad_sketch_entries = define(
    "grad_sketch_entries(Tensor x, Tensor g, Tensor offsets, int k, int seed, bool dense)"
    " -> Tensor",
    reference=reference_entries,
    fake=_fake,
    cuda=cuda_launcher(entries_triton),
    backward=_backward_entries,
    setup_context=_setup,
)
_grad_sketch_rows = define(
    "grad_sketch_rows(Tensor x, Tensor g, Tensor offsets, int k, int seed, int kind) -> Tensor",
    reference=reference_rows,
    fake=_fake,
    cuda=cuda_launcher(rows_triton),
    backward=_backward_rows,
    setup_context=_setup_rows,
)
