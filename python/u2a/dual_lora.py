"""peft's LoRA layers on stacked rows [x; x_t]; handlers as in `dual_modules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from u2a.dual_modules import Refused, Site, path
from u2a_kernels import dual_lora_linear

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"


def lora_linear(module: Any, site: Site) -> dict[str, Any]:
    if module.merged:
        raise Refused(f"merged adapters {module.merged_adapters}; unmerge them first")
    variants = {a: type(v).__name__ for a, v in module.lora_variant.items()}
    if variants:
        raise Refused(f"LoRA variant {variants} is not plain LoRA")
    forwards = {name: _fused_lora(module, name, site) for name in module.lora_A}

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in module.active_adapters if name in forwards]
        fused = forwards[active[0]] if len(active) == 1 and not module.disable_adapters else None
        if fused is None or args or kwargs:
            return type(module).forward(module, x, *args, **kwargs)
        return fused(x)

    return {"forward": forward}


def _fused_lora(module: Any, name: str, site: Site) -> Callable[[Tensor], Tensor] | None:
    """One op for a frozen base and its adapter; None where parts need ops of their own: a trained
    base, a bias in the adapter, factors wider than the base."""
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    frozen = [p for p in (base.weight, base.bias) if p is not None]
    if path(type(base)) not in (LINEAR, CONV1D) or a.bias is not None or b.bias is not None:
        return None
    if any(p.requires_grad or site.tangent(p) is not None for p in frozen):
        return None
    if not base.weight.dtype == a.weight.dtype == b.weight.dtype:
        return None
    weight = base.weight.t() if path(type(base)) == CONV1D else base.weight
    options: Any = dict(bias=base.bias, scale=module.scaling[name], mode=site.mode)
    directions = site.tangent(a.weight), site.tangent(b.weight)

    def forward(x: Tensor) -> Tensor:
        return dual_lora_linear(x, weight, a.weight, b.weight, *directions, **options)

    return forward
