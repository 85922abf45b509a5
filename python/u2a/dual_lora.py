"""peft's LoRA layers on stacked rows [x; x_t]; handlers as in `dual_modules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from u2a.dual_modules import Refused, Site, looked_up, path
from u2a_kernels import dual_linear, dual_lora_linear

LINEAR = "torch.nn.modules.linear.Linear"
EMBEDDING = "torch.nn.modules.sparse.Embedding"
CONV1D = "transformers.pytorch_utils.Conv1D"


def _check(module: Any) -> None:
    if module.merged:
        raise Refused(f"merged adapters {module.merged_adapters}; unmerge them first")
    variants = {a: type(v).__name__ for a, v in module.lora_variant.items()}
    if variants:
        raise Refused(f"LoRA variant {variants} is not plain LoRA")


def lora_linear(module: Any, site: Site) -> dict[str, Any]:
    _check(module)
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


def lora_embedding(module: Any, site: Site) -> dict[str, Any]:
    """e = E[ids] + s A^T[ids] B^T: rows of A^T with their tangents, then a linear map."""
    _check(module)
    base = path(type(module.base_layer))
    if base != EMBEDDING and not base.endswith("TextScaledWordEmbedding"):
        raise Refused(f"LoRA around {base}")
    tables, maps = module.lora_embedding_A, module.lora_embedding_B
    directions = {name: (site.tangent(tables[name]), site.tangent(maps[name])) for name in tables}

    def forward(ids: Tensor) -> Tensor:
        y: Tensor = module.base_layer(ids)
        for name in active(module):
            a_t, b_t = directions[name]
            table_t = None if a_t is None else a_t.t()
            low = looked_up(site, ids, tables[name].t(), table_t, module.base_layer.padding_idx)
            low = dual_linear(low, maps[name], b_t, mode=site.mode)
            y = y + (low * embedding_scale(module, name)).to(y.dtype)
        return y

    return {"forward": forward}


def active(module: Any) -> list[str]:
    """Adapters of an embedding that take part."""
    names = [] if module.disable_adapters else module.active_adapters
    return [n for n in names if n in module.lora_embedding_A]


def embedding_scale(module: Any, name: str) -> Any:
    """s, times Gemma 3's factor of all embeddings."""
    factor = module._get_embed_scale()
    return module.scaling[name] * (1.0 if factor is None else factor.to(module.weight.dtype))
