"""Mixtures of experts on stacked rows [h; h_t]; handlers as in `dual_modules`.

The primal rows choose the experts, their tangents follow: the choice is constant almost everywhere.
Tokens are sorted by expert, stably. Sums over a token's experts are gathers: the same bits twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u2a.dual_mlp import named
from u2a.dual_modules import Refused, Site, attention, path
from u2a.grouped import grouped
from u2a_kernels import dual_glu, dual_linear, dual_softmax


def top_scores(logits: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax of dual logits `[2N, E]`, the top k per row, their sum made 1 if `normalise`:
    scores `[2N, k]` and the experts chosen by the primal rows, twice."""
    p, p_t = dual_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32))).chunk(2)
    s, chosen = torch.topk(p, top_k, dim=-1)
    s_t = p_t.gather(-1, chosen)
    if normalise:
        total = s.sum(-1, keepdim=True)
        s = s / total
        s_t = (s_t - s * s_t.sum(-1, keepdim=True)) / total
    return torch.cat([s, s_t]), torch.cat([chosen, chosen])


def router(module: Any, site: Site) -> dict[str, Any]:
    """Softmax over the experts, the top k, their sum made 1 where the model does so."""
    normalise, weight_t = getattr(module, "norm_topk_prob", True), site.tangent(module.weight)

    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = h.reshape(-1, h.shape[-1])
        logits = dual_linear(h, module.weight, weight_t, mode=site.mode)
        return logits, *top_scores(logits, module.top_k, normalise)

    return {"forward": forward}


def _linear(x: Tensor, weight: Tensor, weight_t: Tensor | None, ends: Tensor, mode: str) -> Tensor:
    """x `[2M, d_in]`, both halves in groups that end at `ends`, times weight `[E, d_out, d_in]`^T.

    Gauss-Newton takes nothing from the tangent half.
    """
    primal, tangent = x.chunk(2)
    y = grouped(primal, weight, ends)
    with torch.set_grad_enabled(torch.is_grad_enabled() and mode == "hvp"):
        y_t = grouped(tangent, weight, ends)
        if weight_t is not None:
            y_t = y_t + grouped(primal, weight_t, ends)
    return torch.cat([y, y_t])


def experts(module: Any, site: Site) -> dict[str, Any]:
    """Gate-and-up and down projections of all experts, no bias, weights as nn.Linear keeps them."""
    wanted = ("gate_up_proj", "down_proj")
    if {n for n, _ in module.named_parameters(recurse=False)} != set(wanted):
        raise Refused(f"experts with parameters other than {wanted}")
    if module._is_expert_parallel:
        raise Refused("experts spread over devices")
    activation = named(module.act_fn)
    both_t, down_t = site.tangent(module.gate_up_proj), site.tangent(module.down_proj)

    def forward(h: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        n, top_k = h.shape[0] // 2, chosen.shape[1]
        expert = chosen[:n].reshape(-1)
        order = torch.argsort(expert, stable=True)
        experts = torch.arange(module.gate_up_proj.shape[0], device=h.device)
        ends = torch.searchsorted(expert[order], experts, right=True, out_int32=True)
        x = h.unflatten(0, (2, n))[:, order // top_k].flatten(0, 1)
        both = _linear(x, module.gate_up_proj, both_t, ends, site.mode)
        inner = dual_glu(both, activation=activation)
        y = _linear(inner, module.down_proj, down_t, ends, site.mode).unflatten(0, (2, -1))
        y = y[:, torch.argsort(order)].reshape(2 * n, top_k, -1)
        weighted = dual_glu(scores[..., None].expand_as(y), y.to(scores.dtype), "identity")
        return weighted.sum(1).to(h.dtype)

    return {"forward": forward}


def sparse(module: Any, site: Site) -> dict[str, Any]:
    """A block that leaves all of its routing to its router and fused experts."""
    router, experts = path(type(module.gate)), path(type(module.experts))
    if not (router.endswith("TopKRouter") and experts.endswith("Experts")):
        raise Refused(f"router {router} and experts {experts}, wanted a TopKRouter and Experts")
    if module.training and getattr(module, "jitter_noise", 0.0) > 0:
        raise Refused(f"jitter_noise={module.jitter_noise} in training mode; model.eval()")
    return {}


def shared_and_sparse(module: Any, site: Site) -> dict[str, Any]:
    """Qwen2-MoE: an expert that sees every token, under a sigmoid gate of its own."""
    sparse(module, site)

    def forward(h: Tensor) -> Tensor:
        flat = h.flatten(0, -2)
        _, scores, chosen = module.gate(flat)
        gate, shared = module.shared_expert_gate(flat), module.shared_expert(flat)
        shared = dual_glu(gate.expand_as(shared), shared, "sigmoid")
        return (module.experts(flat, chosen, scores) + shared).view_as(h)

    return {"forward": forward}


def olmoe_attention(module: Any, site: Site) -> dict[str, Any]:
    if module.config.clip_qkv is not None:
        raise Refused(f"clip_qkv={module.config.clip_qkv}")
    return attention(module, site)
