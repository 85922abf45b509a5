"""LM head and cross-entropy on dual rows, in row chunks; no [N, V] tensor is ever held.

z = h W^T, z_t = h_t W^T + h W_t^T, p = softmax z, e = sum p z_t, u = p (z_t - e);
loss = lse - z_y, loss_t = sum p (z_t - z_t,y), curvature = sum p (z_t - e)^2 = z_t . u.
Frozen head: the forward forms r1 = (p - 1y) W and r2 = u W + (p - 1y) W_t; for cotangents (a, b) of
(loss, loss_t), dh = a r1 + b r2 and dh_t = b r1. Trainable head: the backward redoes the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_size, check_targets
from u2a_kernels._dual import check_directions, check_halves, check_mode, fresh, halves, refuse_jvp
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype

IGNORED = -100


def dual_linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None = None,
    *,
    mode: str = "hvp",
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses of an LM head, their tangents and their Gauss-Newton curvature.

    Args:
        h: [2N, d] hidden states, N primal rows and then their N tangent rows; float32, bfloat16,
            float16 or float64.
        weight: [V, d], dtype of h.
        targets: [N] int64 in [0, V), or -100: that token gives 0, 0, 0 and no gradient.
        weight_t: [V, d] direction of weight, or None for zero. Not differentiated.
        mode: "hvp"; "ggn": only the cotangent b of loss_t is used, and gives the Gauss-Newton
            cotangent b u W on the primal half, zeros on the tangent half, and (b u)^T h for weight;
            "jvp": forward only, a backward raises RuntimeError.

    Returns:
        loss, loss_t, curvature: [N] each, float32 (float64 for float64). curvature = v^T G v of the
        token along the tangent, the variance of z_t under p, not differentiable.
        Differentiable once in h and weight through loss and loss_t. Deterministic.
        With a weight that requires no grad the backward is a rescaling of two [N, d] tensors formed
        in the forward.

    Raises:
        ValueError, TypeError: a shape, dtype, device, target or mode that does not fit, or a
            weight_t that requires grad, by name.

    Equivalent torch: ``loss, loss_t = torch.func.jvp(lambda h, w: F.cross_entropy(h @ w.T, targets,
    reduction="none"), (h[:N], weight), (h[N:], weight_t))``.

    Source: Pearlmutter (Neural Computation 6, 1994); Gauss-Newton term, Schraudolph (2002).
    """
    op = "dual_linear_cross_entropy"
    check_floats(op, h=h, weight=weight, weight_t=weight_t)
    check_dim(op, "h", h, "[2N, d]", 2)
    check_halves(op, "h", h, "[2N, d]")
    check_dim(op, "weight", weight, "[V, d]", 2)
    check_size(op, "weight", weight, "[V, d]", (weight.shape[0], h.shape[1]))
    check_targets(op, targets, h.shape[0] // 2, weight.shape[0])
    if weight_t is not None:
        check_size(op, "weight_t", weight_t, "[V, d]", tuple(weight.shape))
    check_directions(op, weight_t=weight_t)
    check_mode(op, mode)
    tracked = torch.is_grad_enabled() and mode != "jvp"
    rows = tracked and h.requires_grad and not weight.requires_grad
    loss, loss_t, curvature, _ = _dual_linear_cross_entropy(
        h, weight, targets, weight_t, mode, rows
    )
    return loss, loss_t, curvature


class Chunk(NamedTuple):
    """Tokens `rows` that are not ignored; `centred` is z_t - e."""

    rows: Tensor
    h: Tensor
    h_t: Tensor
    y: Tensor
    loss: Tensor
    loss_t: Tensor
    p: Tensor
    centred: Tensor


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows whose logits stay near the cache on a CPU and fill the GEMMs of a GPU."""
    budget = 1 << 26 if device.type == "cuda" else 1 << 22
    return max(16, min(2048, budget // max(1, vocab)))


def _tiles(weight: Tensor, acc: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of weight in the accumulation type; a narrow weight is widened 8192 rows at a time."""
    vocab = weight.shape[0]
    step = vocab if weight.dtype == acc else 8192
    for v in range(0, vocab, max(1, step)):
        yield slice(v, v + step), weight[v : v + step].to(acc)


def _project(h: Tensor, weight: Tensor) -> Tensor:
    """h W^T, [n, V]."""
    out = h.new_empty(h.shape[0], weight.shape[0])
    for at, w in _tiles(weight, h.dtype):
        out[:, at] = h @ w.T
    return out


def _pull(g: Tensor, weight: Tensor) -> Tensor:
    """g W, [n, d]."""
    out = g.new_zeros(g.shape[0], weight.shape[1])
    for at, w in _tiles(weight, g.dtype):
        out.addmm_(g[:, at], w)
    return out


def _chunks(h: Tensor, weight: Tensor, targets: Tensor, weight_t: Tensor | None) -> Iterator[Chunk]:
    acc = accum_dtype(h)
    primal, tangent = halves(h)
    kept = (targets != IGNORED).nonzero()[:, 0]
    for rows in kept.split(chunk_rows(weight.shape[0], h.device)):
        a, a_t, y = primal[rows].to(acc), tangent[rows].to(acc), targets[rows][:, None]
        z, z_t = _project(a, weight), _project(a_t, weight)
        if weight_t is not None:
            z_t += _project(a, weight_t)
        z -= z.amax(1, keepdim=True)  # keeps the rounding of z - lse small
        lse = torch.logsumexp(z, 1, keepdim=True)
        loss = (lse - z.gather(1, y))[:, 0]
        p = z.sub_(lse).exp_()
        z_t -= z_t.gather(1, y)
        loss_t = (p * z_t).sum(1)
        z_t -= loss_t[:, None]
        yield Chunk(rows, a, a_t, y, loss, loss_t, p, z_t)


def reference(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None,
    mode: str,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = _fake(h, weight, targets, weight_t, mode, rows)
    loss, loss_t, curvature, kept = (o.zero_() for o in outs)
    for c in _chunks(h, weight, targets, weight_t):
        u = c.p * c.centred
        loss[c.rows], loss_t[c.rows] = c.loss, c.loss_t
        curvature[c.rows] = (u * c.centred).sum(1)
        if not rows:
            continue
        r2 = _pull(u, weight)
        if mode == "hvp":
            g = _minus_one_hot(c)
            kept[1, c.rows] = _pull(g, weight).to(h.dtype)
            if weight_t is not None:
                r2 += _pull(g, weight_t)
        kept[0, c.rows] = r2.to(h.dtype)
    return loss, loss_t, curvature, kept


def _minus_one_hot(c: Chunk) -> Tensor:
    """p - 1y, in place of p."""
    return c.p.scatter_add_(1, c.y, -torch.ones_like(c.y, dtype=c.p.dtype))


def reference_bwd(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None,
    kept: Tensor,
    mode: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    if kept.shape[0]:
        return _rescale(a, b, kept, h), weight.new_empty(0)
    acc = accum_dtype(h)
    dh = h.new_zeros(h.shape)
    primal, tangent = halves(dh)
    dw = weight.new_zeros(weight.shape if weight_grad else 0, dtype=acc)
    for c in _chunks(h, weight, targets, weight_t):
        first, second = a[c.rows][:, None], b[c.rows][:, None]
        g_t = second * c.p * c.centred
        if mode == "hvp":
            onehot = _minus_one_hot(c)
            g_t.addcmul_(onehot, first)
            g = onehot.mul_(second)
            tangent[c.rows] = _pull(g, weight).to(h.dtype)
        d = _pull(g_t, weight)
        if mode == "hvp" and weight_t is not None:
            d += _pull(g, weight_t)
        primal[c.rows] = d.to(h.dtype)
        if weight_grad:
            dw.addmm_(g_t.T, c.h)
            if mode == "hvp":
                dw.addmm_(g.T, c.h_t)
    return dh, dw.to(weight.dtype)


def _rescale(a: Tensor, b: Tensor, kept: Tensor, h: Tensor) -> Tensor:
    """dh = a r1 + b r2 and dh_t = b r1, from rows formed in the forward."""
    acc = accum_dtype(h)
    dh = h.new_zeros(h.shape)
    primal, tangent = halves(dh)
    d = b[:, None] * kept[0].to(acc)
    if kept.shape[0] == 2:
        r1 = kept[1].to(acc)
        d.addcmul_(a[:, None], r1)
        tangent.copy_(b[:, None] * r1)
    primal.copy_(d)
    return dh


def _fake(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None,
    mode: str,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, acc = targets.shape[0], accum_dtype(h)
    per_token = [h.new_empty(n, dtype=acc) for _ in range(3)]
    count = 0 if not rows else 1 if mode == "ggn" else 2
    return per_token[0], per_token[1], per_token[2], h.new_empty(count, n, h.shape[1])


def _fake_bwd(
    a: Tensor,
    b: Tensor,
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_t: Tensor | None,
    kept: Tensor,
    mode: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return fresh(h), weight.new_empty(weight.shape if weight_grad else 0)


_dual_linear_cross_entropy_bwd = define(
    "dual_linear_cross_entropy_bwd(Tensor a, Tensor b, Tensor h, Tensor weight, Tensor targets,"
    " Tensor? weight_t, Tensor kept, str mode, bool weight_grad) -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    h, weight, targets, weight_t, ctx.mode, ctx.rows = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    if ctx.mode != "jvp":
        ctx.save_for_backward(h, weight, targets, weight_t, output[3])


def _backward(ctx, a, b, *_):
    refuse_jvp("dual_linear_cross_entropy", ctx.mode)
    need_w = ctx.needs_input_grad[1]
    if ctx.rows and need_w:
        raise RuntimeError(
            "dual_linear_cross_entropy: rows=True is for a weight that requires no grad, got one "
            "that does"
        )
    dh, dw = _dual_linear_cross_entropy_bwd(a, b, *ctx.saved_tensors, ctx.mode, need_w)
    return dh, dw if need_w else None, None, None, None, None


_dual_linear_cross_entropy = define(
    "dual_linear_cross_entropy(Tensor h, Tensor weight, Tensor targets, Tensor? weight_t, str mode,"
    " bool rows) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
)
