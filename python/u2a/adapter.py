"""The trainable parameters of a model (usually a peft adapter), and what it says with them off.

The reference model is the same model with its adapter disabled; its log-probabilities are computed
once and kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from u2a.batch import Row, row_batches
from u2a.products import answer_logps
from u2a.tree import trainable


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {n: p.detach().clone() for n, p in trainable(model).items()}


def restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Writes a `snapshot` back. Raises ValueError when the names differ."""
    params = trainable(model)
    if params.keys() != values.keys():
        odd = sorted(params.keys() ^ values.keys())
        raise ValueError(f"restore: snapshot and model differ in {len(odd)} names, first {odd[0]}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(values[name])


def distance(model: nn.Module, values: dict[str, Tensor]) -> float:
    """||theta - values|| over the trainable parameters, in float64."""
    with torch.no_grad():
        params = trainable(model).items()
        return math.sqrt(
            sum(float((p.double() - values[n].to(p).double()).square().sum()) for n, p in params)
        )


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model of a peft model. Raises ValueError for a model without adapter.

    peft makes every adapter parameter trainable again when the adapter comes back; the flags of a
    partly frozen adapter (B only) are kept here.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"model: {type(model).__name__} has no adapter to disable; wanted a peft model, "
            "or pass reference_model"
        )
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        with model.disable_adapter():  # type: ignore[operator]
            yield model
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval mode and no_grad, the training mode put back afterwards."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def sequence_logps(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> Tensor:
    """Summed answer log-probabilities of `rows`, `[n]` on the model's device; no gradient."""
    device = device_of(model)
    out: Tensor | None = None
    with evaluating(model):
        for batch in row_batches(rows, batch_tokens):
            lp = answer_logps(model, batch).sequence()
            out = lp.new_zeros(len(rows)) if out is None else out
            out[batch.index.to(device)] = lp
    return torch.zeros(0, device=device) if out is None else out


def token_logps(model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192) -> Tensor:
    """Log-probability of every answer token, `[n, L]` on the model's device, L the most tokens of
    an answer, zeros after a row's last; no gradient."""
    device = device_of(model)
    width = max((len(r) - max(len(r.prompt_ids), 1) for r in rows), default=0)
    out: Tensor | None = None
    with evaluating(model):
        for batch in row_batches(rows, batch_tokens):
            lp = answer_logps(model, batch)
            out = lp.logp.new_zeros(len(rows), width) if out is None else out
            out[batch.index.to(device)[lp.row], lp.position()] = lp.logp
    return torch.zeros(0, 0, device=device) if out is None else out


def reference_logps(
    model: nn.Module,
    rows: Sequence[Row],
    batch_tokens: int = 8192,
    *,
    reference_model: nn.Module | None = None,
    per_token: bool = False,
) -> Tensor:
    """Reference answer log-probabilities `[n]`: adapter disabled, or those of `reference_model`.

    `per_token`: as `token_logps`, `[n, L]`.
    Compute once and keep (`InnerProblem.reference`, `evaluate.preference(ref=...)`). Raises
    ValueError for a model without adapter when no reference model is given.
    """
    logps = token_logps if per_token else sequence_logps
    if reference_model is not None:
        return logps(reference_model, rows, batch_tokens)
    with adapter_disabled(model):
        return logps(model, rows, batch_tokens)
