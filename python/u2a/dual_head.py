"""Language-model heads with LoRA: h W^T + s (h A^T) B^T is one linear map, weight [W, B], of
[h, s h A^T]. So the loss head's ops serve it, at the price of a copy of W for every batch.

Factors in another dtype than W and h are rounded to theirs where peft adds up in the factors' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from u2a.dual_modules import path
from u2a.parallel import plain
from u2a_kernels import dual_linear

LORA = "peft.tuners.lora.layer.Linear"


def fault(head: Any) -> str | None:
    """Why a head is not known: neither nn.Linear nor plain LoRA around one."""
    if plain(type(head)) is nn.Linear:
        return None
    if path(type(head)) != LORA or type(head.base_layer) is not nn.Linear:
        return f"output head {path(type(head))}, wanted torch.nn.Linear"
    if head.lora_variant or any(head.lora_bias.values()):
        return "output head with a LoRA variant or a bias in its adapter, wanted plain LoRA"
    return None


def _factors(head: Any) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
    """(dropout, A, B, scale) of the active adapters."""
    if path(type(head)) != LORA or head.merged or head.disable_adapters:
        return
    for name in head.active_adapters:
        if name in head.lora_A:
            a, b = head.lora_A[name].weight, head.lora_B[name].weight
            yield head.lora_dropout[name], a, b, head.scaling[name]


def widened(head: nn.Linear, h: Tensor) -> tuple[Tensor, Tensor]:
    """(x, weight) with x weight^T = h W^T and what the adapters add; h `[n, d]`."""
    xs, weights = [h], [head.weight]
    for dropout, a, b, scale in _factors(head):
        xs.append(((dropout(h.to(a.dtype)) @ a.mT) * scale).to(h.dtype))
        weights.append(b.to(head.weight.dtype))
    return (h, head.weight) if len(xs) == 1 else (torch.cat(xs, 1), torch.cat(weights, 1))


def dual_widened(
    head: nn.Linear,
    h: Tensor,
    weight_t: Tensor | None,
    direction: Callable[[Tensor], Tensor | None],
    mode: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, tangent of weight) as `widened`; h `[2n, d]`, primal rows and then tangents."""
    xs, weights, tangents = [h], [head.weight], [weight_t]
    for _, a, b, scale in _factors(head):
        low = dual_linear(h.to(a.dtype), a, direction(a), mode=mode) * scale
        xs.append(low.to(h.dtype))
        weights.append(b.to(head.weight.dtype))
        tangents.append(direction(b))
    if len(xs) == 1:
        return h, head.weight, weight_t
    moved = [
        torch.zeros_like(w, requires_grad=False) if t is None else t.to(w.dtype)
        for w, t in zip(weights, tangents, strict=True)
    ]
    return torch.cat(xs, 1), torch.cat(weights, 1), torch.cat(moved, 1)


__all__ = ["dual_widened", "fault", "widened"]
