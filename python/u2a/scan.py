"""u2a.scan: exact gains along one direction, or features for any number of directions later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from u2a.batch import Batch, Row, row_batches
from u2a.dual import dual
from u2a.parallel import all_rows, unwrapped
from u2a.products import Loss, Refs, row_tangents, score_index, with_refs
from u2a.progress import track
from u2a.tree import norm

if TYPE_CHECKING:
    from u2a.index import Index


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


@overload
def scan(
    model: nn.Module,
    data: Sequence[Row] | Sequence[Batch],
    v: Mapping[str, Tensor],
    loss: Loss,
    *,
    mode: Literal["exact"] = "exact",
    ref: Refs = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Scores: ...


@overload
def scan(
    model: nn.Module,
    data: Sequence[Row],
    v: None = None,
    loss: Loss | None = None,
    *,
    mode: Literal["index"],
    ref: Refs = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    **options: Any,
) -> Index: ...


def scan(
    model: nn.Module,
    data: Sequence[Row] | Sequence[Batch],
    v: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    *,
    mode: Literal["exact", "index"] = "exact",
    ref: Refs = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    **options: Any,
) -> Scores | Index:
    """One pass over all candidates: their exact gains along v, or an index of their gradients.

    Args:
        data: rows, bucketed by length into batches of at most `batch_tokens` tokens; for exact
            gains also ready batches.
        v: {parameter name: direction}; used at unit length and scaled back, so that its size does
            not matter to low precision. None for an index.
        loss: per-row loss `[B]`, see `u2a.jvp_scores`.
        mode: "exact": `Scores` -<v, grad l_i> by one dual forward, nothing stored but scores.
            "index": features of every gradient go to a folder, for queries by dot, cosine or
            preconditioned dot (`u2a.index.Index`, which is returned).
        ref: reference log-probabilities, `[N]` by row number, or one `[B]` per batch ("exact").
        progress: a bar on stderr with examples/s and time left.
        options: for an index `out` (folder, wanted), `spec` (`u2a.index.Sketch(k)` or
            `Kronecker`, default `Sketch()`), `exclude` (patterns of parameter names), `dtype`
            ("float16", "bfloat16", "float32"), `shard_rows`, `autocast`, `compile`.

    Raises:
        ValueError: no data, a direction that is zero or not finite, arguments of the other mode.
        MismatchError: `out` holds an index already. GuardError: every feature is 0.
    """
    if not len(data):
        raise ValueError("scan: data must hold at least one row, got none")
    if loss is None:
        raise ValueError("scan: loss must be a function AnswerLogps -> [B], got None")
    if mode == "index":
        return _index(model, data, v, loss, ref, batch_tokens, progress, **options)
    if mode != "exact":
        raise ValueError(f"scan: mode must be 'exact' or 'index', got {mode!r}")
    if options:
        raise TypeError(f"scan: {', '.join(options)} belong to mode='index'")
    if v is None:
        raise ValueError("scan: v must be a direction in parameter space, got None")
    return _exact(model, data, v, loss, ref, batch_tokens, progress)


def _exact(
    model: nn.Module,
    data: Sequence[Row] | Sequence[Batch],
    v: Mapping[str, Tensor],
    loss: Loss,
    ref: Refs,
    batch_tokens: int,
    progress: bool,
) -> Scores:
    batches = _batches(data, batch_tokens)
    uid = [row.uid for row in data if isinstance(row, Row)]
    size = norm(v).item()
    if not 0 < size < float("inf"):
        raise ValueError(f"scan: v must have a finite norm above 0, got {size}")
    unit = {name: t / size for name, t in v.items()}
    found = []
    all_rows(model, batches)
    with dual(unwrapped(model), unit, "jvp") as run:
        steps: Iterable[tuple[Batch, Tensor | None]] = with_refs(batches, ref)
        if progress:
            total = sum(map(len, batches))
            steps = track(steps, total, "scan", "ex", size=lambda step: len(step[0]))
        for batch, r in steps:
            found.append(row_tangents(run, batch, loss, r))
    index = score_index(batches, found)
    order = index.argsort(stable=True)
    gain = torch.cat(found).cpu()[order] * -size
    return Scores(gain, gain.isfinite(), uid or [str(i) for i in index[order].tolist()])


def _index(
    model: nn.Module,
    data: Sequence[Row] | Sequence[Batch],
    v: object,
    loss: Loss,
    ref: Refs,
    batch_tokens: int,
    progress: bool,
    *,
    out: str | Path | None = None,
    spec: Any = None,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    **options: Any,
) -> Index:
    from u2a.index import Index, Settings, Sketch
    from u2a.index.store import write_index

    if v is not None:
        raise ValueError("scan: mode='index' takes no direction v; query the index with one")
    if out is None:
        raise ValueError("scan: mode='index' needs out, a folder for the index")
    if not all(isinstance(row, Row) for row in data):
        raise TypeError("scan: data must hold u2a.batch.Row throughout for mode='index'")
    if ref is not None and not isinstance(ref, Tensor):
        raise TypeError("scan: ref must be a tensor [N] for mode='index'")
    path = write_index(
        model, data, loss, spec or Sketch(), out, ref=ref, progress=progress,  # type: ignore[arg-type]
        settings=Settings(batch_tokens, autocast, compile), **options,
    )  # fmt: skip
    return Index(path)


def _batches(data: Sequence[Row] | Sequence[Batch], batch_tokens: int) -> Sequence[Batch]:
    rows = [item for item in data if isinstance(item, Row)]
    batches = [item for item in data if isinstance(item, Batch)]
    if len(rows) != len(data) and len(batches) != len(data):
        raise TypeError("scan: data must hold u2a.batch.Row or Batch throughout")
    return row_batches(rows, batch_tokens) if rows else batches
