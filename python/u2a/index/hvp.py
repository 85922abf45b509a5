"""Features of H_i v for every example, from one recorded gradient and one sweep of tangents.

A linear layer's part of H_i v is sum_t g_t,t x_t^T + g_t x_t,t^T (g_t,t and x_t,t the tangents of
output gradient and input): per-example outer products again, so the rules of the index apply as
they are and no example's product is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from u2a.batch import Batches, Refs, sequence, with_refs
from u2a.dual import parts
from u2a.index.engine import _chosen
from u2a.index.modules import weight_shape
from u2a.index.spec import Rule, Spec
from u2a.index.taps import _sums
from u2a.linearize import Linearized
from u2a.linearize.head import Parts
from u2a.losses.base import refuse_partner
from u2a.products import Loss


class _Sink:
    """Adds up the features of one batch; `found [B, dim]`."""

    def __init__(
        self, rules: Mapping[int, Rule], spans: Mapping[int, slice], answers: Tensor, dim: int,
        like: Tensor,
    ) -> None:  # fmt: skip
        self.rules, self.spans, self.answers = rules, spans, answers
        wide = torch.promote_types(like.dtype, torch.float32)
        self.found = torch.zeros(len(answers) - 1, dim, dtype=wide, device=like.device)

    def _add(self, p: Tensor, features: Tensor) -> None:
        self.found[:, self.spans[id(p)]] += features.flatten(1).to(self.found.dtype)

    def _offsets(self, m: int) -> Tensor:
        rows = len(self.found)
        return torch.arange(rows + 1, device=self.found.device, dtype=torch.int32) * (m // rows)

    def outer(self, p: Tensor, x: Tensor, g: Tensor) -> None:
        if (rule := self.rules.get(id(p))) is not None:
            kept = rule.keep(x.contiguous())
            self._add(p, rule.outer(kept, g.to(kept.dtype).contiguous(), self._offsets(len(x))))

    def grouped(self, p: Tensor, x: Tensor, g: Tensor, ends: Tensor, owner: Tensor) -> None:
        if (rule := self.rules.get(id(p))) is None:
            return
        row = torch.arange(len(x), device=x.device)
        expert = torch.searchsorted(ends.to(torch.int64), row, right=True)
        segment = expert * len(self.found) + owner
        count = len(ends) * len(self.found)
        each = torch.arange(count + 1, device=x.device)
        offsets = torch.searchsorted(segment, each).to(torch.int32)
        self._add(p, rule.experts(rule.keep(x), g.to(x.dtype), offsets, len(ends)))

    def rows(self, p: Tensor, g: Tensor) -> None:
        if (rule := self.rules.get(id(p))) is not None:
            self._add(p, rule.rows(_sums(g.contiguous(), self._offsets(len(g)))))

    def lookup(self, p: Tensor, ids: Tensor, g: Tensor, padding_idx: int | None) -> None:
        if (rule := self.rules.get(id(p))) is None:
            return
        ids = ids.reshape(-1)
        if padding_idx is not None:
            g = g.masked_fill((ids == padding_idx)[:, None], 0.0)
        self._add(p, rule.outer(rule.keep(g), ids, self._offsets(len(g))))

    def head(self, weight: Tensor, bias: Tensor | None) -> Parts:
        """The same for the answer tokens that a chunk of the head brings."""

        def each(at: slice, x: Tensor, g: Tensor, tangent: bool) -> None:
            inside = (self.answers - at.start).clamp(0, len(x)).to(torch.int32)
            if (rule := self.rules.get(id(weight))) is not None:
                self._add(weight, rule.outer(rule.keep(x), g, inside))
            if bias is not None and not tangent and (rule := self.rules.get(id(bias))) is not None:
                self._add(bias, rule.rows(_sums(g, inside)))

        return each


def hvp_features(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    spec: Spec,
    *,
    ref: Refs = None,
    exclude: Sequence[str] = (),
) -> Tensor:
    """Features of the Hessian product H_i v of every row's own loss, `[N, dim]` in ascending order
    of Batch.index, on the model's device; float32, or float64 for float64 models.

    Args:
        model, batches, ref: as in `u2a.jvp_scores`; parameters with requires_grad take part.
        loss: per row, as in `u2a.jvp_scores`.
        v: {name of a trainable parameter: direction}, also of excluded ones; missing means zero.
        spec: `Sketch`, `Kronecker` or `Full`: the features of `u2a.index.features`, in the same
            layout, so that <features of H_i v, features of grad l_j> estimates grad l_j . H_i v.
        exclude: patterns (fnmatch) of parameter names whose part of H_i v is left out.

    Costs a gradient of activations, one sweep of tangents and the features themselves, twice.

    Raises:
        UnsupportedModel, ValueError: as `u2a.linearize`; nothing left to capture.

    Equivalent: the features of ``u2a.hvp(model, collate([row_i]), loss, v)`` for every row i.
    """
    refuse_partner(loss, "hvp_features")
    chosen, found = _chosen(model, exclude), sequence(batches)
    at = {
        id(p): (weight_shape(module, p), p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
    }
    rules = {i: spec.rule(name, *at[i]) for i, name in chosen.items()}
    spans, end = {}, 0
    for i, rule in rules.items():
        size = torch.Size(rule.shape).numel()
        spans[i] = slice(0, size) if spec.shared else slice(end, end + size)
        end = spans[i].stop
    _, head = parts(model)
    features = []
    for batch, r in with_refs(found, ref):
        each = torch.ones(int(batch.index.max()) + 1, device=batch.ids.device)
        refs = None if r is None else [r]
        lin = Linearized(model, [batch], loss, weights=each, ref=refs, mode="hvp")
        answers = F.pad(batch.answer.sum(1).cumsum(0), (1, 0)).to(head.weight.device)
        sink = _Sink(rules, spans, answers, end, head.weight)
        lin.deliver(v, [(sink, sink.head(head.weight, head.bias))])
        features.append(sink.found)
    order = torch.cat([b.index for b in found]).argsort(stable=True)
    joined = torch.cat(features)
    return joined[order.to(joined.device)]
