"""Features of a data set in memory, and of a preference objective as one query vector."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Pair, Row, buckets
from u2a.index.engine import Capture, Loss, capture
from u2a.index.packed import moved, pack
from u2a.index.spec import Spec
from u2a.losses.base import refuse_partner


@dataclass(frozen=True)
class Settings:
    """How batches run: `batch_tokens` a packed batch; `autocast` to torch.bfloat16 or float16;
    `compile` the model's backbone with torch.compile."""

    batch_tokens: int = 8192
    autocast: torch.dtype | None = None
    compile: bool = False


def _per_row(loss: Loss) -> Loss:
    def checked(lp: AnswerLogps) -> Tensor:
        value = loss(lp)
        if value.shape != lp.count.shape:
            want = list(lp.count.shape)
            raise ValueError(f"loss must return [B] = {want}, got {list(value.shape)}")
        return value

    return checked


def run_rows(
    run: Capture, rows: Sequence[Row], loss: Loss, ref: Tensor | None, settings: Settings
) -> Tensor:
    """Features `[n, dim]` of all rows, in their order, without waiting for the device."""
    device = run.head.weight.device
    mode: Any = nullcontext()
    if settings.autocast is not None:
        mode = torch.autocast(device.type, settings.autocast)
    refuse_partner(loss, "features")
    if not rows:
        raise ValueError("features: rows must hold at least one row, got none")
    found: Tensor | None = None
    for group in buckets([len(r) for r in rows], settings.batch_tokens):
        batch = pack([rows[i] for i in group], group)
        r = None if ref is None else ref[batch.index.to(ref.device)]
        with mode:
            f = run.features(batch, _per_row(loss), r, compile=settings.compile)
        if found is None:
            found = f.new_empty(len(rows), run.dim)
        found.index_copy_(0, moved(batch.index, device), f)
    run.check_used()
    assert found is not None
    return found


def features(
    model: nn.Module,
    rows: Sequence[Row],
    loss: Loss,
    spec: Spec,
    *,
    ref: Tensor | None = None,
    exclude: Sequence[str] = (),
    settings: Settings | None = None,
) -> Tensor:
    """Features of every row's gradient, `[n, dim]` in the order of the rows, on the model's device.

    Args:
        loss: per-row loss `AnswerLogps -> [B]`, as for `u2a.scan`.
        spec: `Sketch(k)`, `Kronecker(k_in, k_out)` or `Full()`.
        ref: reference log-probabilities `[n]` for the loss.
        exclude: patterns of parameter names to leave out.

    Raises:
        ValueError: no rows, nothing to capture, a loss that is not per row.
        UnsupportedModel: a module with captured parameters that is not known, by name.
    """
    with capture(model, spec, exclude=exclude) as run:
        return run_rows(run, rows, loss, ref, settings or Settings())


def query(
    model: nn.Module,
    pairs: Sequence[Pair],
    objective: Loss,
    spec: Spec,
    *,
    ref: Tensor | None = None,
    exclude: Sequence[str] = (),
    batch_tokens: int = 8192,
) -> Tensor:
    """Features `[dim]` of the gradient of the mean objective over preference pairs.

    Args:
        objective: a mean over the pairs of its batch (P chosen rows, then P rejected), as
            `u2a.losses.dpo_objective`.
        ref: reference log-probabilities of all pairs, `[2P]`: the chosen, then the rejected.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("query: pairs must hold at least one Pair, got none")
    parts = []
    with capture(model, spec, exclude=exclude) as run:
        for group in buckets([2 * len(p) for p in pairs], batch_tokens):
            both = [pairs[i].chosen for i in group] + [pairs[i].rejected for i in group]
            at = torch.tensor([*group, *(i + len(pairs) for i in group)])
            r = None if ref is None else ref[at.to(ref.device)]
            part = run.features(pack(both, at.tolist()), objective, r).sum(0)
            parts.append(part * (len(group) / len(pairs)))
        run.check_used()
    return torch.stack(parts).sum(0)
