"""Log-probability of one target per row, straight from hidden states: no [N, V] tensor is held.

z = m(h W^T + b), m(a) = softcap tanh(a / softcap) / temperature; logp = z_y - lse(z).
dlogp/dh = ((1_y - p) o m') W has the row's own weight as a factor only, so the forward returns it
(`unit`) when h needs a gradient: with a frozen head nothing is recomputed. The weight's and bias's
gradients recompute z by tiles from the saved h, weight and lse.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from u2a_kernels._library import define, refusal
from u2a_kernels._segments import accum_dtype
from u2a_kernels._triton import cuda_launcher
from u2a_kernels.ops.linear_logp import triton as _triton

IGNORE = -100
CHUNK_ELEMENTS = 1 << 22


def linear_logp(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(z)[target] per row, z = softcap * tanh((h W^T + bias) / softcap) / temperature.

    The soft cap bounds the logits as in Gemma 2, then the temperature divides, as in sampling.

    Args:
        h: [N, d] hidden states; float32, bfloat16, float16 (float64 on CPU).
        weight: [V, d] head, dtype of h.
        targets: [N] int64 in [0, V), or -100: logp 0 and no gradient, whatever the row holds.
            Values are checked on the CPU; on a GPU a target out of range gives NaN.
        bias: [V], dtype of h. -inf entries remove tokens.
        softcap: positive, or None.
        temperature: positive.

    Returns:
        [N] float32 (float64 for float64), natural log. Accumulation in the result's dtype;
        deterministic. Differentiable once in h, weight and bias.
        Held beside inputs and gradients: [N, d] when h needs a gradient, and a bounded scratch.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value that does not fit, by name.

    Equivalent torch: ``F.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]``.

    Source: online softmax, arXiv 1805.02867; over the vocabulary, arXiv 2411.09009.
    """
    op = "linear_logp"
    check_head(op, h, weight, targets, bias)
    check_softcap(op, softcap)
    if not 0 < temperature < float("inf"):
        raise wanted(op, "temperature", "a positive number", temperature)
    grad_h = torch.is_grad_enabled() and h.requires_grad
    return _fwd(h, weight, targets, bias, softcap or 0.0, temperature, grad_h)[0]


def check_head(
    op: str, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None
) -> None:
    check_floats(op, h=h, weight=weight, bias=bias)
    check_dim(op, "h", h, "[N, d]", 2)
    check_dim(op, "weight", weight, "[V, d] with V >= 1", 2)
    check_size(op, "weight", weight, "[V, d]", (max(1, weight.shape[0]), h.shape[1]))
    if bias is not None:
        check_size(op, "bias", bias, "[V]", (weight.shape[0],))
    check_targets(op, targets, h.shape[0], weight.shape[0])
    if targets.device != h.device:
        raise wanted(op, "targets", f"on the device of h, {h.device}", targets.device)


def _logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, temperature: float
) -> tuple[Tensor, Tensor | float]:
    """z and dz/d(h W^T), both [n, V]."""
    z = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
    if softcap == 0:
        return z / temperature, 1 / temperature
    t = torch.tanh(z / softcap)
    return t * (softcap / temperature), (1 - t * t) / temperature


def _grad_z(z: Tensor, slope: Tensor | float, lse: Tensor, targets: Tensor) -> Tensor:
    """dlogp/d(h W^T), zero rows where the target is ignored."""
    g = -torch.exp(z - lse[:, None])
    g.scatter_add_(1, targets.clamp_min(0)[:, None], torch.ones_like(g[:, :1]))
    return torch.where((targets != IGNORE)[:, None], g * slope, 0)


def _chunks(h: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row slices, their h (0 where the target is ignored) and targets; at most 2^22 logits each."""
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, h.shape[0], size):
        rows = slice(start, start + size)
        t = targets[rows]
        yield rows, torch.where((t != IGNORE)[:, None], h[rows], 0).to(weight.dtype), t


def reference(
    h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    softcap: float, temperature: float, grad_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accum_dtype(h)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    logp, lse = h.new_empty(h.shape[0], dtype=acc), h.new_empty(h.shape[0], dtype=acc)
    unit = h.new_empty(h.shape[0] if grad_h else 0, h.shape[1])
    for rows, x, t in _chunks(h, w, targets):
        z, slope = _logits(x, w, b, softcap, temperature)
        lse[rows] = z.logsumexp(1)
        y = z.gather(1, t.clamp_min(0)[:, None])[:, 0]
        logp[rows] = torch.where(t != IGNORE, y - lse[rows], 0)
        if grad_h:
            unit[rows] = (_grad_z(z, slope, lse[rows], t) @ w).to(h.dtype)
    return logp, lse, unit


def reference_bwd(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor,
    softcap: float, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = accum_dtype(h)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)
    dw, db = torch.zeros_like(w), w.new_zeros(0 if bias is None else bias.shape[0])
    for rows, x, t in _chunks(h, w, targets):
        z, slope = _logits(x, w, b, softcap, temperature)
        g = _grad_z(z, slope, lse[rows], t) * grad[rows, None].to(acc)
        dw.addmm_(g.T, x)
        if bias is not None:
            db += g.sum(0)
    return dw.to(weight.dtype), db.to(weight.dtype)


def forward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    return (reference if args[0].dtype == torch.float64 else _triton.forward)(*args)


def backward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return (reference_bwd if args[1].dtype == torch.float64 else _triton.backward)(*args)


def _fake(h, weight, targets, bias, softcap, temperature, grad_h):
    n, d, acc = h.shape[0], h.shape[1], accum_dtype(h)
    unit = h.new_empty(n if grad_h else 0, d)
    return h.new_empty(n, dtype=acc), h.new_empty(n, dtype=acc), unit


def _fake_bwd(grad, h, weight, targets, bias, lse, softcap, temperature):
    return weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape[0])


_bwd = define(
    "linear_logp_bwd(Tensor grad, Tensor h, Tensor weight, Tensor targets, Tensor? bias,"
    " Tensor lse, float softcap, float temperature) -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
    cuda=cuda_launcher(backward_cuda),
)


class _Scale(torch.autograd.Function):
    """grad * unit. h, unread, makes the result differentiable, so a second order is refused."""

    @staticmethod
    def forward(ctx, grad, unit, h):
        return (grad[:, None] * unit).to(unit.dtype)

    backward = staticmethod(refusal("linear_logp"))


def _setup(ctx, inputs, output):
    h, weight, targets, bias, ctx.softcap, ctx.temperature, ctx.grad_h = inputs
    _, lse, unit = output
    ctx.mark_non_differentiable(lse, unit)
    ctx.head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    ctx.save_for_backward(h, unit, *((weight, targets, bias, lse) if ctx.head else ()))


def _backward(ctx, grad, grad_lse, grad_unit):
    h, unit, *head = ctx.saved_tensors
    dh = dw = db = None
    if ctx.needs_input_grad[0]:
        if not ctx.grad_h:
            raise RuntimeError("linear_logp_fwd: h needs a gradient, so grad_h must be True")
        dh = _Scale.apply(grad, unit, h)
    if ctx.head:
        dw, db = _bwd(grad, h, *head, ctx.softcap, ctx.temperature)
    return dh, dw, None, db if ctx.needs_input_grad[3] else None, None, None, None


_fwd = define(
    "linear_logp_fwd(Tensor h, Tensor weight, Tensor targets, Tensor? bias, float softcap,"
    " float temperature, bool grad_h) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_cuda),
    backward=_backward,
    setup_context=_setup,
)
