"""Per-example gradients as rows of a matrix, and the empirical Fisher of stored ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from u2a.batch import Batch, Row
from u2a.curvature.base import Curvature
from u2a.dual_modules import path
from u2a.index.engine import capture
from u2a.index.packed import Packed, pack
from u2a.index.spec import Full
from u2a.losses.base import refuse_partner
from u2a.products import Loss, Refs, with_refs
from u2a.tree import Tree, flatten, numel, trainable, unflatten


def packed(batch: Batch) -> Packed:
    """A padded batch as the capture engine takes it. Answers must end their rows."""
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    first = batch.length - batch.answer.sum(1)
    if not torch.equal(batch.answer, (at >= first[:, None]) & (at < batch.length[:, None])):
        raise ValueError("batch.answer: answer tokens must be the last ones of their row")
    rows = [
        Row("", tuple(ids[:start]), tuple(ids[start:stop]))
        for ids, start, stop in zip(
            batch.ids.tolist(), first.tolist(), batch.length.tolist(), strict=True
        )
    ]
    return pack(rows, batch.index.tolist())


def turned(model: nn.Module) -> set[str]:
    """Parameters kept as [d_in, d_out] where captures speak of [d_out, d_in]: GPT-2's Conv1D."""
    return {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if path(type(module)) == "transformers.pytorch_utils.Conv1D"
    }


def row_features(model: nn.Module, batches: Sequence[Batch], loss: Loss, ref: Refs) -> Tensor:
    """Gradients of every row's loss `[n, p]`, columns in the order of `trainable`."""
    refuse_partner(loss, "row_features")
    like, flipped = trainable(model), turned(model)
    parts = []
    with capture(model, Full()) as run:
        for batch, r in with_refs(batches, ref):
            parts.append(run.features(packed(batch), loss, r))
        run.check_used()
        layout = run.layout
    found = torch.cat(parts)
    columns = []
    for name, p in like.items():
        start, stop = layout[name]
        block = found[:, start:stop]
        if name in flipped:
            block = block.unflatten(1, (p.shape[1], p.shape[0])).transpose(1, 2).flatten(1)
        columns.append(block)
    return torch.cat(columns, 1)


class Features(Curvature):
    """sum_i w_i g_i g_i^T of stored gradients.

    Args:
        g: `[n, p]`, columns in the order of `like`, e.g. `EmpiricalFisher.roots()` with weights 1,
            or `u2a.index.features(..., Full())`.
        like: {parameter name: tensor}.
        weights: `[n]`, at least 0; default 1/n.
    """

    probes = 0

    def __init__(
        self, g: Tensor, like: Mapping[str, Tensor], weights: Tensor | None = None
    ) -> None:
        if g.ndim != 2 or g.shape[1] != numel(like):
            raise ValueError(f"Features: g must be [n, {numel(like)}], got {list(g.shape)}")
        if weights is None:
            weights = g.new_full((len(g),), 1 / max(len(g), 1))
        if weights.shape != (len(g),) or not bool((weights >= 0).all()):
            raise ValueError(f"Features: weights must be [{len(g)}] and at least 0")
        self._like, self._roots = like, g * weights.to(g).sqrt()[:, None]

    @property
    def like(self) -> Mapping[str, Tensor]:
        return self._like

    def roots(self) -> Tensor:
        """Rows sqrt(w_i) g_i `[n, p]`."""
        return self._roots

    def matvec(self, v: Tree) -> Tree:
        return self.matmat([v])[0]

    def matmat(self, vs: Sequence[Tree]) -> list[Tree]:
        ordered = [{n: v[n] for n in self.like} for v in vs]
        rows = torch.stack([flatten(v) for v in ordered]).to(self._roots)
        products = (rows @ self._roots.T) @ self._roots
        return [unflatten(row, v) for row, v in zip(products, ordered, strict=True)]

    def mean_eigenvalue(self) -> float:
        return float(self._roots.double().square().sum()) / self.shape[0]

    def diagonal(self) -> Tree:
        return unflatten(self._roots.square().sum(0), self.like)


class Diagonal(Curvature):
    """A diagonal matrix, e.g. Adam's second moments, or a Fisher diagonal."""

    probes = 0

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries = dict(entries)
        self.definite = all(bool((t >= 0).all()) for t in self.entries.values())

    @property
    def like(self) -> Mapping[str, Tensor]:
        return self.entries

    def matvec(self, v: Tree) -> Tree:
        return {name: self.entries[name] * t for name, t in v.items()}

    def mean_eigenvalue(self) -> float:
        return float(flatten(self.entries).double().mean())

    def diagonal(self) -> Tree:
        return {name: t.clone() for name, t in self.entries.items()}

    def inverse(self, v: Tree, damping: float) -> Tree:
        return {name: t / (self.entries[name] + damping) for name, t in v.items()}
