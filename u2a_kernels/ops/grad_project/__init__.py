"""P_out G_b P_in^T for the per-example gradients G_b = sum_{t in b} g_t x_t^T of linear layers.

The Kronecker projection of LoGra: tokens are projected first, so G_b never exists and an example
costs 2 T (d_in k_in + d_out k_out + k_in k_out) operations. Saved for backward: the inputs.
In the operator a projection that is not a tensor is None (p_in) or an empty vector (p_out), with a
seed >= 0 for Rademacher signs and -1 for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from u2a_kernels.ops.grad_project.launch import forward as forward_triton
from u2a_kernels.ops.grad_project.rademacher import Rademacher, check_rademacher, rademacher
from u2a_kernels.ops.grad_project.reference import reference, reference_bwd, width

__all__ = ["Rademacher", "forward_triton", "grad_project", "rademacher", "reference"]

OP = "grad_project"
Projection = Tensor | Rademacher | None


def grad_project(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    offsets: Tensor,
    p_in: Projection,
    p_out: Projection | Sequence[Projection],
) -> Tensor | list[Tensor]:
    """Project every example's weight gradient on both sides.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, any of these dtypes (float64
            with float64 only). Or int64 [N]: row t is the unit vector e_{g[t]} (the gradient of an
            embedding; g = token ids, x = gradient at its output). Or a list of such: layers that
            share the input x, which is projected once.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        p_in: [k_in, d_in] projection of the inputs, dtype of x; or `Rademacher(k_in, seed)`, whose
            entries +-1 / sqrt(k_in) are made in the kernel and equal
            `rademacher(k_in, d_in, seed, "in")`; or None, the identity (k_in = d_in).
        p_out: the same for the outputs: [k_out, d_out], dtype of g (of x for integer g);
            `Rademacher(k_out, seed)`, equal to `rademacher(k_out, d_out, seed, "out")`; or None.
            A list of them where g is a list. Integer g needs one: None says no d_out.

    Returns:
        [B, k_out, k_in], float32 (float64 for float64 inputs), or the list of them. Accumulation
        in the result's dtype (on a GPU with 16-bit inputs, sums over tokens in TF32).
        Deterministic. Differentiable once in x, float g and tensor p_in and p_out.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    The bits, on every device and version: entry (j, c) is (1 - 2 bit) / sqrt(k), bit = bit (j & 31)
    of word ((j >> 5) & 3) of Philox4x32-10 with key (seed mod 2^32, seed >> 32) and counter
    (c, j >> 7, stream, 0x55324153); stream 2 for outputs, 3 for inputs.

    Equivalent torch: ``torch.stack([p_out @ (g[s:e].T @ x[s:e]) @ p_in.T for s, e in segments])``.

    Source: LoGra, Choe et al., arXiv 2405.13954, equation 5; Philox: Salmon et al., SC 2011.
    """
    many = isinstance(g, (list, tuple))
    gs, ps = _lists(g, p_out)
    _check_inputs(x, p_in)
    for i, (rows, p) in enumerate(zip(gs, ps, strict=True)):
        _check_map(x, rows, p, f"[{i}]" if many else "")
    check_offsets(OP, offsets, x.shape[0])
    seeds = [p.seed if isinstance(p, Rademacher) else -1 for p in (p_in, *ps)]
    widths = [p.k if isinstance(p, Rademacher) else 0 for p in (p_in, *ps)]
    out = _grad_project(
        x,
        gs,
        offsets,
        p_in if isinstance(p_in, Tensor) else None,
        [p if isinstance(p, Tensor) else x.new_empty(0) for p in ps],
        widths[0],
        widths[1:],
        seeds[0],
        seeds[1:],
    )
    return out if many else out[0]


def _lists(g: Any, p_out: Any) -> tuple[list[Tensor], list[Projection]]:
    if not isinstance(g, (list, tuple)):
        return [g], [p_out]
    if isinstance(p_out, Rademacher) or not isinstance(p_out, (list, tuple)):
        raise TypeError(f"{OP}: p_out must be a list where g is, got {type(p_out).__name__}")
    if len(g) != len(p_out):
        raise wanted(OP, "p_out", f"a list of {len(g)}, one a map", len(p_out))
    return list(g), list(p_out)


def _matrix(name: str, p: Projection) -> Tensor | None:
    """The projection if it is a tensor; otherwise it is a valid seed or None."""
    if isinstance(p, Rademacher):
        check_rademacher(OP, name, *p)
    elif p is not None and not isinstance(p, Tensor):
        raise TypeError(
            f"{OP}: {name} must be a torch.Tensor, Rademacher(k, seed) or None, "
            f"got {type(p).__name__}"
        )
    return p if isinstance(p, Tensor) else None


def _check_inputs(x: Tensor, p_in: Projection) -> None:
    matrix = _matrix("p_in", p_in)
    check_floats(OP, x=x, p_in=matrix)
    check_dim(OP, "x", x, "[N, d_in]", 2)
    if matrix is not None:
        check_dim(OP, "p_in", matrix, "[k_in, d_in]", 2)
        check_size(OP, "p_in", matrix, "[k_in, d_in]", (matrix.shape[0], x.shape[1]))


def _check_map(x: Tensor, g: Tensor, p: Projection, at: str) -> None:
    name, p_name = f"g{at}", f"p_out{at}"
    matrix = _matrix(p_name, p)
    hot = isinstance(g, Tensor) and g.dtype == torch.int64
    check_floats(OP, **({"x": x} if hot else {name: g}), **{p_name: matrix})
    if matrix is not None:
        check_dim(OP, p_name, matrix, "[k_out, d_out]", 2)
    if hot:
        check_size(OP, name, g, "[N]", (x.shape[0],))
        if p is None:
            raise wanted(OP, p_name, "a projection where g is int64 (d_out is unknown)", None)
        _check_ids(name, g, 1 << 32 if matrix is None else matrix.shape[1])
    else:
        check_dim(OP, name, g, "[N, d_out]", 2)
        check_size(OP, name, g, "[N, d_out]", (x.shape[0], g.shape[1]))
        if matrix is not None:
            check_size(OP, p_name, matrix, "[k_out, d_out]", (matrix.shape[0], g.shape[1]))
        if (g.dtype == torch.float64) != (x.dtype == torch.float64):
            raise TypeError(f"{OP}: {name} must be float64 where x is, got {g.dtype} and {x.dtype}")
    if g.device != x.device:
        raise wanted(OP, name, f"on the device of x, {x.device}", g.device)


def _check_ids(name: str, g: Tensor, d_out: int) -> None:
    """Values are checked on the CPU only; on a GPU a wrong one gives NaN."""
    if g.device.type != "cpu" or torch.compiler.is_compiling() or _is_fake(g):
        return
    wrong = ((g < 0) | (g >= d_out)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise wanted(OP, name, f"in [0, d_out = {d_out})", f"{int(g[at])} at {at}")


def _fake(x, g, offsets, p_in, p_out, k_in, k_out, seed_in, seed_out):
    columns = width(x, p_in, k_in, seed_in)
    rows = [width(*side) for side in zip(g, p_out, k_out, seed_out, strict=True)]
    return [x.new_empty(offsets.shape[0] - 1, k, columns, dtype=accum_dtype(x)) for k in rows]


def _fake_bwd(grad, x, g, offsets, p_in, p_out, k_in, k_out, seed_in, seed_out):
    like = [t if t.is_floating_point() else x.new_empty(0) for t in (x, *g)]
    dx, *dg = (t.new_empty(t.shape) for t in like)
    dp_in = x.new_empty(0 if p_in is None else p_in.shape)
    return dx, dg, dp_in, [p.new_empty(p.shape) for p in p_out]


SIDES = "Tensor? p_in, Tensor[] p_out, int k_in, int[] k_out, int seed_in, int[] seed_out"

_grad_project_bwd = define(
    f"grad_project_bwd(Tensor[] grad, Tensor x, Tensor[] g, Tensor offsets, {SIDES})"
    " -> (Tensor, Tensor[], Tensor, Tensor[])",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    x, g, offsets, p_in, p_out, *ctx.rest = inputs
    ctx.maps = len(g)
    ctx.save_for_backward(x, offsets, p_in, *g, *p_out)


def _backward(ctx, grads):
    x, offsets, p_in, *both = ctx.saved_tensors
    g, p_out = both[: ctx.maps], both[ctx.maps :]
    k = width(x, p_in, ctx.rest[0], ctx.rest[2])
    shapes = [width(*s) for s in zip(g, p_out, ctx.rest[1], ctx.rest[3], strict=True)]
    b = offsets.shape[0] - 1
    full = [
        x.new_zeros(b, o, k, dtype=accum_dtype(x)) if w is None else w
        for w, o in zip(grads, shapes, strict=True)
    ]
    dx, dg, dp_in, dp_out = _grad_project_bwd(full, x, g, offsets, p_in, p_out, *ctx.rest)
    dg = [d if t.is_floating_point() else None for d, t in zip(dg, g, strict=True)]
    dp_out = [d if p.ndim == 2 else None for d, p in zip(dp_out, p_out, strict=True)]
    return dx, dg, None, None if p_in is None else dp_in, dp_out, None, None, None, None


_grad_project = define(
    f"grad_project(Tensor x, Tensor[] g, Tensor offsets, {SIDES}) -> Tensor[]",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    backward=_backward,
    setup_context=_setup,
)
