"""Fused mixture-of-experts weights `[E, d_out, d_in]` and their routers, written out with taps.

Tokens are sorted by expert, stably, so that each expert's rows stay in the order of the examples:
(expert, example) segments of one packed array serve all experts in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a.dual_modules import Refused
from u2a.grouped import grouped
from u2a.index.modules import Forward, Site
from u2a.index.taps import Outer


class _Route:
    """One call's tokens sorted by expert, and the segments (expert, example) among them."""

    def __init__(self, site: Site, chosen: Tensor, experts: int) -> None:
        """chosen `[N, top_k]`: the experts of each token."""
        top_k, examples = chosen.shape[1], site.offsets.shape[0] - 1
        expert = chosen.reshape(-1)
        self.order = torch.argsort(expert, stable=True)
        self.token = self.order // top_k
        cell = expert * examples + site.owner.repeat_interleave(top_k)
        count = torch.zeros(experts * examples, dtype=torch.int64, device=cell.device)
        count.scatter_add_(0, cell, torch.ones_like(cell))
        self.offsets = F.pad(count.cumsum(0), (1, 0)).to(torch.int32)
        self.ends = self.offsets[examples::examples].contiguous()


def _tapped(site: Site, x: Tensor, weight: Tensor, route: _Route) -> Tensor:
    y = grouped(x, weight, route.ends)
    if not site.captured(weight):
        return y
    slot, rule = site.take(weight)
    kept = rule.keep(x.detach())
    return Outer.apply(y, slot, kept, route.offsets, rule, weight.shape[0])


def experts(module: Any, site: Site) -> Forward:
    """Gate-and-up and down projections of all experts, no bias, weights as nn.Linear keeps them."""
    wanted = ("gate_up_proj", "down_proj")
    if {n for n, _ in module.named_parameters(recurse=False)} != set(wanted):
        raise Refused(f"experts with parameters other than {wanted}")

    def forward(h: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        route = _Route(site, chosen, module.gate_up_proj.shape[0])
        both = _tapped(site, h[route.token], module.gate_up_proj, route)
        gate, up = both.chunk(2, dim=-1)
        down = _tapped(site, module.act_fn(gate) * up, module.down_proj, route)
        weighted = down * scores.reshape(-1)[route.order, None]
        return torch.zeros_like(h).index_add_(0, route.token, weighted.to(h.dtype))

    return forward


def router(module: Any, site: Site) -> Forward:
    """Softmax over the experts, the top k, their sum made 1 where the model does so."""
    normalise = getattr(module, "norm_topk_prob", True)

    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = h.reshape(-1, h.shape[-1])
        logits = site.outer(F.linear(h, module.weight), h, module.weight, module)
        probability = torch.softmax(logits, -1, dtype=torch.promote_types(h.dtype, torch.float32))
        score, chosen = torch.topk(probability, module.top_k, dim=-1)
        if normalise:
            score = score / score.sum(-1, keepdim=True)
        return logits, score, chosen

    return forward
