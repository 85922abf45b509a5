"""The products of a loss with a direction: per-example tangents, Hessian, Gauss-Newton.

A loss sees token log-probabilities only, so its derivatives are chain rule on `[n]` numbers and one
dual pass of the model; no per-example gradient, no double backward, no logits.
Unless said otherwise a per-row loss is averaged over all rows of all batches (of all ranks, where
the model is in DDP or sharded by FSDP2: `u2a.parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch, Batches, Refs, score_index, sequence, with_refs
from u2a.dual import Dual, dual
from u2a.logps import answer_logps, dual_answer_logps, dual_logps
from u2a.parallel import all_rows, gradients, sum_, summed, unwrapped
from u2a.tree import Tree, add_, cast_like, sums_like, trainable

Loss = Callable[[AnswerLogps], Tensor]


def _per_row(loss: Loss, lp: AnswerLogps) -> Tensor:
    """`[B]`; `[B/2]` of a loss on answers and their partners."""
    value, rows = loss(lp), lp.count.shape[0]
    if value.shape != (rows,) and (rows % 2 or value.shape != (rows // 2,)):
        raise ValueError(f"loss must return [B] = [{rows}], got {list(value.shape)}")
    return value


def _weighted(loss: Loss, weights: Tensor | None, rows: int) -> Callable[[AnswerLogps], Tensor]:
    """A batch's part of sum_i w_i l_i; a scalar loss counts as the mean over its batch's rows."""

    def part(lp: AnswerLogps) -> Tensor:
        if weights is not None:
            assert lp.index is not None
            found = _per_row(loss, lp)
            w = weights[lp.index[: len(found)].to(weights.device)]
            return (found * w.to(lp.logp)).sum()
        value = loss(lp)
        if value.ndim == 0:
            return value * (lp.count.shape[0] / rows)
        found = _per_row(lambda _: value, lp)
        return found.sum() / (rows if len(found) == lp.count.shape[0] else rows / 2)

    return part


def _adjoint(
    part: Callable[[AnswerLogps], Tensor], lp: AnswerLogps, logp_t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(d part / d logp, its derivative along logp_t), both `[n]`."""
    with torch.enable_grad():
        leaf = lp.logp.detach().requires_grad_()
        total = part(lp.with_logp(leaf))
        first = second = torch.zeros_like(leaf)
        if total.requires_grad:
            (first,) = torch.autograd.grad(total, leaf, create_graph=logp_t is not None)
        if logp_t is not None and first.requires_grad:
            along = (first * logp_t.detach()).sum()
            found = torch.autograd.grad(along, leaf, allow_unused=True)[0]
            second = second if found is None else found
    return first.detach(), second.detach()


def _accumulate(out: Tree, total: Tensor, params: Mapping[str, Tensor]) -> None:
    if total.requires_grad:
        add_(out, gradients(total, params))


def gradient(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    weights: Tensor | None = None,
    ref: Refs = None,
) -> Tree:
    """Gradient of sum_i w_i l_i over the trainable parameters, accumulated over the batches.

    Args:
        loss: returns `[B]` (one value per row), `[B/2]` on a batch of answers and then their
            partners (weights and index those of the answers), or a scalar that is a mean over its
            batch's rows.
        weights: `[N]` looked up by Batch.index; default 1/N, the mean over all rows.
        ref: reference log-probabilities for the loss, `[N]` by Batch.index or one `[B]` per batch.
    """
    found = sequence(batches)
    part = _weighted(loss, weights, all_rows(model, found))
    params = trainable(model)
    out = sums_like(params, len(found))
    for batch, r in with_refs(found, ref):
        with torch.enable_grad():
            _accumulate(out, part(answer_logps(unwrapped(model), batch, ref=r)), params)
    return sum_(model, cast_like(out, params))


def hvp(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    *,
    weights: Tensor | None = None,
    ref: Refs = None,
) -> Tree:
    """Exact Hessian-vector product of sum_i w_i l_i; arguments as in `gradient`.

    Returns {name: tensor} over the trainable parameters. Equivalent:
    ``autograd.grad(dot(autograd.grad(L, params, create_graph=True), v), params)``.
    """
    found = sequence(batches)
    part = _weighted(loss, weights, all_rows(model, found))
    params = trainable(model)
    out = sums_like(params, len(found))
    with dual(unwrapped(model), v, "hvp") as run, torch.enable_grad():
        for batch, r in with_refs(found, ref):
            lp, logp_t, _ = dual_logps(run, batch, r)
            first, second = _adjoint(part, lp, logp_t)
            _accumulate(out, (first * logp_t).sum() + (second * lp.logp).sum(), params)
    return sum_(model, cast_like(out, params))


def ggnvp(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    *,
    weights: Tensor | None = None,
    ref: Refs = None,
) -> Tree:
    """Gauss-Newton product sum_t |dL/dlogp_t| J_t^T (diag p_t - p_t p_t^T) J_t v; as `gradient`.

    J_t is the Jacobian of the logits at answer token t, L = sum_i w_i l_i. For L = mean NLL this is
    the Gauss-Newton matrix itself. Losses that push log-probabilities down (gradient ascent, NPO)
    have a negative semidefinite one, useless for a solve; the absolute weights make a positive
    surrogate of it, a deliberate departure from the implicit-function formula.
    """
    found = sequence(batches)
    part = _weighted(loss, weights, all_rows(model, found))
    params = trainable(model)
    out = sums_like(params, len(found))
    with dual(unwrapped(model), v, "ggn") as run, torch.enable_grad():
        for batch, r in with_refs(found, ref):
            lp, logp_t, _ = dual_logps(run, batch, r)
            first, _ = _adjoint(part, lp)
            _accumulate(out, -(first.abs() * logp_t).sum(), params)
    return sum_(model, cast_like(out, params))


@torch.no_grad()
def quadratic(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    *,
    weights: Tensor | None = None,
    ref: Refs = None,
) -> float:
    """v^T G v for the G of `ggnvp`, from dual forwards alone."""
    found = sequence(batches)
    part = _weighted(loss, weights, all_rows(model, found))
    total = torch.zeros((), dtype=torch.float64)
    with dual(unwrapped(model), v, "jvp") as run:
        for batch, r in with_refs(found, ref):
            lp, _, curvature = dual_logps(run, batch, r)
            first, _ = _adjoint(part, lp)
            total = total.to(first.device) + (first.abs() * curvature).double().sum()
    return summed(model, total.item())[0]


@torch.no_grad()
def row_tangents(run: Dual, batch: Batch, loss: Loss, ref: Tensor | None = None) -> Tensor:
    """<v, grad l_i> of one batch, `[B]` on the model's device, without synchronising with it.

    `[B/2]` of a loss on answers and their partners.
    """
    lp, logp_t, _ = dual_logps(run, batch, ref)
    found = 0

    def total(x: AnswerLogps) -> Tensor:
        nonlocal found
        value = _per_row(loss, x)
        found = len(value)
        return value.sum()

    first, _ = _adjoint(total, lp)
    return lp.with_logp(first * logp_t).sequence().unflatten(0, (-1, found)).sum(0)


def jvp_scores(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    *,
    ref: Refs = None,
) -> Tensor:
    """Per-example tangents <v, grad l_i>, exact, `[N]` in ascending order of Batch.index.

    One dual forward per batch; no backward, no stored activations, no per-example gradient.
    The loss must be per row: its value for a row may depend on that row's log-probabilities only.
    """
    found = sequence(batches)
    all_rows(model, found)
    with dual(unwrapped(model), v, "jvp") as run:
        scores = [row_tangents(run, batch, loss, r) for batch, r in with_refs(found, ref)]
    order = score_index(found, scores).argsort(stable=True)
    joined = torch.cat(scores)
    return joined[order.to(joined.device)]


__all__ = [
    "Batches",
    "Loss",
    "Refs",
    "answer_logps",
    "dual_answer_logps",
    "ggnvp",
    "gradient",
    "hvp",
    "jvp_scores",
    "quadratic",
    "row_tangents",
    "score_index",
    "with_refs",
]
