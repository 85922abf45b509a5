"""v^T G_i v and v^T H_i v of every example, without any per-example gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from u2a.batch import Batches, Refs, sequence, with_refs
from u2a.dual import dual
from u2a.linearize import Linearized
from u2a.logps import dual_logps
from u2a.losses.base import refuse_partner
from u2a.products import Loss, _adjoint, _per_row

Kind = Literal["ggn", "hessian"]


def per_example_curvature(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    v: Mapping[str, Tensor],
    kind: Kind = "ggn",
    *,
    ref: Refs = None,
) -> Tensor:
    """Curvature of every row's own loss along v, `[N]` in ascending order of Batch.index.

    Args:
        model, batches, ref: as in `u2a.jvp_scores`.
        loss: per row; its value for a row may depend on that row's log-probabilities only.
        v: {parameter name: direction}; for "hessian" of trainable parameters.
        kind: "ggn": v^T G_i v, G_i the Gauss-Newton matrix of `u2a.ggnvp` for row i alone, by one
            dual forward. "hessian": v^T H_i v by a gradient of activations and one sweep of
            tangents (3 units of LoRA forward, against 4 for a Hessian product), in which each layer
            adds <g_i, its own second derivative along its tangents>.

    Raises:
        UnsupportedModel, ValueError: as `u2a.jvp_scores`, and for another kind.

    Equivalent: ``dot(v, hvp(model, collate([row_i]), loss, v))`` for every row i. Source: second
    order forward mode, the chain rule of Faa di Bruno for one direction.
    """
    if kind not in ("ggn", "hessian"):
        raise ValueError(f"per_example_curvature: kind must be 'ggn' or 'hessian', got {kind!r}")
    refuse_partner(loss, "per_example_curvature")
    found = sequence(batches)
    parts = []
    if kind == "ggn":
        with torch.no_grad(), dual(model, v, "jvp") as run:
            for batch, r in with_refs(found, ref):
                lp, _, curvature = dual_logps(run, batch, r)
                first, _ = _adjoint(lambda x: _per_row(loss, x).sum(), lp)
                parts.append(lp.with_logp(first.abs() * curvature).sequence())
    else:
        for batch, r in with_refs(found, ref):
            each = torch.ones(int(batch.index.max()) + 1, device=batch.ids.device)
            refs = None if r is None else [r]
            lin = Linearized(model, [batch], loss, weights=each, ref=refs, mode="hvp")
            parts.append(lin.row_quadratics([v])[0][0])
    order = torch.cat([b.index for b in found]).argsort(stable=True)
    joined = torch.cat(parts)
    return joined[order.to(joined.device)]
