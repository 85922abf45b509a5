"""Taps: identities in the forward whose backward turns an output gradient into features.

A tap takes part in the graph through a `slot`, a zero tensor shaped like the features: the gradient
of the loss in the slot IS the features. So several uses of one weight add up, recomputation under
activation checkpointing counts once, torch.compile traces it, and no module needs a hook.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from u2a.index.spec import Rule
from u2a_kernels import grad_project

LOGITS = 1 << 22  # logits made again at a time in the backward of a trainable head


class Outer(torch.autograd.Function):
    """y -> y, a linear layer's output `[..., d_out]`; slot: features of sum_t gy_t x_t^T.

    `kept [M, ...]` is what the rule keeps of the inputs; `experts` > 0: M rows in (expert, example)
    segments of a stack of weights.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slot: Tensor, kept: Tensor, offsets: Tensor, rule: Rule, experts: int
    ) -> Tensor:
        ctx.save_for_backward(kept, offsets)
        ctx.rule, ctx.experts, ctx.like = rule, experts, slot.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, offsets = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1]).to(kept.dtype)
        if ctx.experts:
            found = ctx.rule.experts(kept, g, offsets, ctx.experts)
        else:
            found = ctx.rule.outer(kept, g, offsets)
        return grads[0], found.to(ctx.like), None, None, None, None


class Lookup(torch.autograd.Function):
    """y -> y, rows of a table `[..., d]`; slot: features of its gradient sum_t e_ids[t] gy_t^T."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slot: Tensor, ids: Tensor, offsets: Tensor, rule: Rule, skip: int
    ) -> Tensor:
        ctx.save_for_backward(ids, offsets)
        ctx.rule, ctx.skip, ctx.like = rule, skip, slot.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ids, offsets = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])
        if ctx.skip >= 0:  # torch gives the row of padding_idx no gradient
            g = g.masked_fill((ids == ctx.skip)[:, None], 0.0)
        found = ctx.rule.outer(ctx.rule.keep(g), ids, offsets)
        return grads[0], found.to(ctx.like), None, None, None, None


class Rows(torch.autograd.Function):
    """y -> y `[..., d]`; slot: features of the per-example sums of gy (bias) or gy * scale."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, slot: Tensor, scale: Tensor | None, offsets: Tensor, rule: Rule
    ) -> Tensor:
        ctx.save_for_backward(scale, offsets)
        ctx.rule, ctx.like = rule, slot.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale, offsets = ctx.saved_tensors
        g = grads[0] if scale is None else grads[0] * scale
        found = ctx.rule.rows(_sums(g.reshape(-1, g.shape[-1]), offsets))
        return grads[0], found.to(ctx.like), None, None, None


def _sums(g: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the rows `[M, d]` of every example, `[B, d]`, in a fixed order on every device."""
    return grad_project(g.new_ones(g.shape[0], 1), g, offsets, None, None)[:, :, 0]


class HeadFacts(NamedTuple):
    """Rules of a head's weight and bias, None where not captured, and its soft cap."""

    weight: Rule | None
    bias: Rule | None
    softcap: float | None


class Head(torch.autograd.Function):
    """logp `[n]` -> logp; slots: features of a trainable head's weight and bias.

    The logits' gradient is made again in the backward, a bounded number of rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, slot: Tensor | None, bias_slot: Tensor | None, h: Tensor,
        weight: Tensor, bias: Tensor | None, target: Tensor, offsets: Tensor, facts: HeadFacts,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(h, weight, bias, target, offsets)
        ctx.facts = facts
        ctx.slots = [None if s is None else (s.shape, s.dtype) for s in (slot, bias_slot)]
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, weight, bias, target, offsets = ctx.saved_tensors
        facts, (like, bias_like) = ctx.facts, ctx.slots
        found = sums = None
        if like:
            found = h.new_zeros(like[0], dtype=like[1])
        if bias_like:
            sums = h.new_zeros(offsets.shape[0] - 1, weight.shape[0], dtype=bias_like[1])
        step = max(1, LOGITS // weight.shape[0])
        for start in range(0, h.shape[0], step):
            rows = slice(start, min(start + step, h.shape[0]))
            gz = _logit_gradient(grads[0][rows], h[rows], weight, bias, target[rows], facts.softcap)
            inside = (offsets - start).clamp(0, gz.shape[0])
            if found is not None:
                found += facts.weight.outer(facts.weight.keep(h[rows]), gz, inside)
            if sums is not None:
                sums += _sums(gz, inside)
        bias_found = None if sums is None else facts.bias.rows(sums)
        return (grads[0], found, bias_found, *[None] * 6)


def _logit_gradient(
    g: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None
) -> Tensor:
    """Gradient of sum_t g_t logp_t in the logits, `[m, V]`, dtype of h."""
    wide = torch.promote_types(h.dtype, torch.float32)
    z = (h @ weight.T).to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    slope = None
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    gz = torch.softmax(z, -1).mul_(-g.to(wide)[:, None])
    gz.scatter_add_(1, target[:, None], g.to(wide)[:, None])
    return (gz if slope is None else gz.mul_(slope)).to(h.dtype)
