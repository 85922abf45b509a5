"""u2a.scan: exact gain of every candidate along one direction, one dual forward per batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from u2a.batch import Batch, Row, row_batches
from u2a.dual import dual
from u2a.products import Loss, Refs, row_tangents, with_refs
from u2a.progress import track
from u2a.tree import norm


@dataclass(frozen=True)
class Scores:
    """Per candidate, in the order of the rows (batches: ascending Batch.index), on the CPU.

    `gain [n]` = -<v, grad l_i>: with A v = grad J, the rise of J per unit of weight on row i.
    `finite [n]` bool; a row that is not finite keeps its value and leaves the others alone.
    `uid`: the rows' uids, or the row numbers as text when batches were given.
    """

    gain: Tensor
    finite: Tensor
    uid: list[str]


def scan(
    model: nn.Module,
    data: Sequence[Row] | Sequence[Batch],
    v: Mapping[str, Tensor],
    loss: Loss,
    *,
    ref: Refs = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Scores:
    """Exact gains -<v, grad l_i> of all candidates; nothing is stored per example but its score.

    Args:
        data: rows, bucketed by length into right-padded batches of at most `batch_tokens` tokens,
            or ready batches.
        v: {parameter name: direction}; used at unit length and scaled back, so that its size does
            not matter to low precision.
        loss: per-row loss `[B]`, see `u2a.jvp_scores`.
        ref: reference log-probabilities, `[N]` by row number, or one `[B]` per batch.
        progress: a bar on stderr with examples/s and time left.

    Raises:
        ValueError: no data, or a direction that is zero or not finite.
    """
    if not len(data):
        raise ValueError("scan: data must hold at least one row, got none")
    batches = _batches(data, batch_tokens)
    uid = [row.uid for row in data if isinstance(row, Row)]
    size = norm(v).item()
    if not 0 < size < float("inf"):
        raise ValueError(f"scan: v must have a finite norm above 0, got {size}")
    unit = {name: t / size for name, t in v.items()}
    found = []
    with dual(model, unit, "jvp") as run:
        steps: Iterable[tuple[Batch, Tensor | None]] = with_refs(batches, ref)
        if progress:
            total = sum(map(len, batches))
            steps = track(steps, total, "scan", "ex", size=lambda step: len(step[0]))
        for batch, r in steps:
            found.append(row_tangents(run, batch, loss, r))
    index = torch.cat([b.index for b in batches])
    order = index.argsort(stable=True)
    gain = torch.cat(found).cpu()[order] * -size
    return Scores(gain, gain.isfinite(), uid or [str(i) for i in index[order].tolist()])


def _batches(data: Sequence[Row] | Sequence[Batch], batch_tokens: int) -> Sequence[Batch]:
    rows = [item for item in data if isinstance(item, Row)]
    batches = [item for item in data if isinstance(item, Batch)]
    if len(rows) != len(data) and len(batches) != len(data):
        raise TypeError("scan: data must hold u2a.batch.Row or Batch throughout")
    return row_batches(rows, batch_tokens) if rows else batches
