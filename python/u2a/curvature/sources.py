"""The data behind an operator, as losses whose squared gradients add up to its curvature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch
from u2a.curvature.base import Sum, undamped
from u2a.curvature.factors import sample_rows, uniform, wide
from u2a.curvature.features import packed
from u2a.curvature.model import EmpiricalFisher, ModelCurvature
from u2a.curvature.stream import Stream
from u2a.index.engine import Capture
from u2a.index.packed import Packed, hidden_states, running
from u2a.index.taps import LOGITS
from u2a.losses.base import refuse_partner
from u2a.products import Loss, Refs, _adjoint, _weighted, with_refs
from u2a_kernels import linear_logp

Labels = Literal["sampled", "data"]


@dataclass(frozen=True)
class Source:
    """coef times the curvature of sum_i w_i l_i, as `ModelCurvature` names it."""

    batches: Sequence[Batch]
    loss: Loss
    weights: Tensor | None
    ref: Refs
    labels: Labels
    coef: float = 1.0


def sources(operator: Any) -> tuple[nn.Module, list[Source]]:
    """The model and data behind an operator. Raises ValueError where there are none."""
    operator, _ = undamped(operator)
    if isinstance(operator, Stream):
        operator = operator.operator
    if isinstance(operator, Sum):
        parts = [(coef, *sources(op)) for coef, op in operator.terms]
        model = parts[0][1]
        if any(m is not model for _, m, _ in parts):
            raise ValueError("kfac: the terms of a Sum must be of one model")
        return model, [replace(s, coef=s.coef * abs(c)) for c, _, found in parts for s in found]
    if not isinstance(operator, ModelCurvature):
        raise ValueError(
            "kfac: factors are made from a model, wanted a GaussNewton, Hessian, EmpiricalFisher "
            f"or a Sum of them, got {type(operator).__name__}"
        )
    refuse_partner(operator.loss, "kfac")
    labels: Labels = "data" if isinstance(operator, EmpiricalFisher) else "sampled"
    op = operator
    return op.model, [Source(op._batches, op.loss, op.weights, op.ref, labels)]


class Roots:
    """Per-row losses r_i with sum_i grad r_i grad r_i^T = curvature, in expectation for "sampled".

    "data": r_i = sqrt(w_i) l_i, the empirical Fisher. "sampled": r_i = sum_t sqrt(c_t) logp(y'_t),
    y' drawn from the model and c_t = |d sum_i w_i l_i / d logp_t|: the Gauss-Newton matrix of
    `u2a.ggnvp`, since scores of different tokens are uncorrelated.
    """

    def __init__(self, source: Source, draws: int, seed: int) -> None:
        self.source, self.draws = source, draws
        self.rows = sum(map(len, source.batches))
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self, run: Capture) -> Iterator[tuple[Packed, Any, Tensor | None]]:
        """Packed batches, each with its root loss and reference."""
        s = self.source
        for batch, r in with_refs(s.batches, s.ref):
            found = packed(batch)
            if s.labels == "data":
                yield found, self._data, r
                continue
            for _ in range(self.draws):
                labelled, c = self._labelled(run, found, r)
                yield labelled, _scaled(c.sqrt()), None

    def _data(self, lp: AnswerLogps) -> Tensor:
        s = self.source
        w = lp.logp.new_full((len(lp.count),), s.coef / self.rows)
        if s.weights is not None:
            assert lp.index is not None
            w = s.coef * s.weights[lp.index.to(s.weights.device)].to(lp.logp)
        return s.loss(lp) * w.sqrt()

    @torch.no_grad()
    def _labelled(self, run: Capture, batch: Packed, ref: Tensor | None) -> tuple[Packed, Tensor]:
        batch = batch.to(run.head.weight.device)
        run.lay(batch)
        s, weight, bias = self.source, run.head.weight, run.head.bias
        with running(batch):
            h = hidden_states(run.backbone, batch).index_select(0, batch.at).to(weight.dtype)
        logp = linear_logp(h, weight, batch.target, bias=bias, softcap=run.softcap)
        r = None if ref is None else ref.to(logp)
        lp = AnswerLogps(logp, batch.row, batch.count, ref=r, index=batch.index)
        c, _ = _adjoint(_weighted(s.loss, s.weights, self.rows), lp)

        def logits() -> Iterator[Tensor]:
            step = max(1, LOGITS // weight.shape[0])
            for start in range(0, len(h), step):
                z = (h[start : start + step] @ weight.T).to(wide(h))
                z = z if bias is None else z + bias.to(z)
                yield z if run.softcap is None else run.softcap * torch.tanh(z / run.softcap)

        target = sample_rows(logits(), uniform(len(h), self.generator, h))
        return replace(batch, target=target), c.abs() * (s.coef / self.draws)


def _scaled(factor: Tensor) -> Loss:
    def loss(lp: AnswerLogps) -> Tensor:
        return lp.with_logp(factor * lp.logp).sequence()

    return loss
