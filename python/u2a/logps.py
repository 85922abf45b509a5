"""Log-probabilities of answer tokens by an ordinary forward, or with tangents by a dual one.

Only answer positions meet the vocabulary, and no [B, T, V] tensor is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch
from u2a.dual import Dual, Mode, dual, final_softcap, is_open, parts
from u2a.dual_head import dual_widened, widened
from u2a.parallel import inside, whole_like
from u2a_kernels import dual_linear_cross_entropy, linear_logp


def _targets(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Per answer token: where in `[B*T]` the hidden state is that predicts it, its id, its row.

    Found where the batch lives: on the CPU this costs a GPU no synchronisation.
    """
    if batch.answer.device.type == "cpu" and bool(batch.answer[:, 0].any()):
        raise ValueError("Batch.answer: the first token of a row is never a target, got True there")
    row, position = batch.answer.nonzero(as_tuple=True)
    return row * batch.ids.shape[1] + position - 1, batch.ids[row, position], row


def _moved(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """(ids, at, target, row, count) on `device`."""
    at, target, row = _targets(batch)
    count = batch.answer.sum(1)
    return tuple(t.to(device, non_blocking=True) for t in (batch.ids, at, target, row, count))


def answer_logps(model: nn.Module, batch: Batch, *, ref: Tensor | None = None) -> AnswerLogps:
    """Log-probability of every answer token by an ordinary forward of the model; gradients flow.

    Args:
        model: a causal LM known to `u2a.dual`; the batch is moved to its device.
        batch: B right-padded rows; token t is predicted by the hidden state at t - 1.
        ref: `[B]` reference log-probabilities, kept in the result.

    Only answer positions meet the vocabulary, through `u2a_kernels.linear_logp`: no `[B, T, V]`.
    Equivalent: ``log_softmax(model(ids).logits[:, :-1])`` gathered at ``ids[:, 1:]`` where answer.
    """
    backbone, head = parts(model, sharded=True, adapted=True)
    if is_open(model):
        raise RuntimeError("answer_logps: the model is inside u2a.dual; use dual_answer_logps")
    ids, at, target, row, count = _moved(batch, head.weight.device)
    cap = final_softcap(model)

    def logps(ids: Tensor) -> Tensor:
        h = backbone(input_ids=ids, use_cache=False).last_hidden_state
        h = h.flatten(0, 1).index_select(0, at)
        x, weight = widened(head, h)
        return linear_logp(x, weight, target, bias=head.bias, softcap=cap)

    logp = inside(model, head, logps, ids)
    return AnswerLogps(logp, row, count, ref=_like(ref, logp), index=batch.index)


def _like(ref: Tensor | None, logp: Tensor) -> Tensor | None:
    return None if ref is None else ref.to(logp.device, logp.dtype)


def dual_logps(
    run: Dual, batch: Batch, ref: Tensor | None = None
) -> tuple[AnswerLogps, Tensor, Tensor]:
    ids, at, target, row, count = _moved(batch, run.head.weight.device)

    def losses(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = run(ids)  # [2B, T, d]
        h = h.unflatten(0, (2, ids.shape[0])).flatten(1, 2).index_select(1, at).flatten(0, 1)
        weight, bias = run.head.weight, run.head.bias
        weight_t, bias_t = whole_like(run.head_tangent, weight), whole_like(run.bias_tangent, bias)
        options: Any = dict(bias=bias, bias_t=bias_t, softcap=run.softcap, mode=run.mode)
        x, weight, weight_t = dual_widened(run.head, h, weight_t, run.direction, run.mode)
        return dual_linear_cross_entropy(x, weight, target, weight_t, **options)

    loss, loss_t, curvature = inside(run.model, run.head, losses, ids)
    return AnswerLogps(-loss, row, count, _like(ref, loss), batch.index), -loss_t, curvature


def dual_answer_logps(
    model: nn.Module,
    batch: Batch,
    tangents: Mapping[str, Tensor],
    mode: Mode = "jvp",
    *,
    ref: Tensor | None = None,
) -> tuple[AnswerLogps, Tensor, Tensor]:
    """(log-probabilities, their derivatives along `tangents` `[n]`, v^T G v per token `[n]`).

    G is the Gauss-Newton matrix of each token's negative log-probability, curvature at the logits.
    Differentiable once as `mode` says; under activation checkpointing use the products below, which
    run their backward while the model is still dual.
    """
    with dual(model, tangents, mode) as run:
        return dual_logps(run, batch, ref)
