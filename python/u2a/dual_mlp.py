"""Activations and gated MLPs on stacked rows [x; x_t]; handlers as in `dual_modules`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from u2a.dual_modules import Refused, Site, path
from u2a_kernels import dual_gelu, dual_swiglu

SILU = {"transformers.activations.SiLUActivation", "torch.nn.modules.activation.SiLU"}
GELU = {
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.FastGELUActivation": "tanh",
    "transformers.activations.GELUActivation": "none",
}
RELU = "torch.nn.modules.activation.ReLU"


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of primal rows, a_t b + a b_t of tangent rows."""
    (p, p_t), (q, q_t) = a.chunk(2), b.chunk(2)
    return torch.cat([p * q, torch.addcmul(p_t * q, p, q_t)])


def relu(module: nn.ReLU, site: Site) -> dict[str, Any]:
    """Slope 0 at 0, as autograd has it; a NaN stays."""

    def forward(x: Tensor) -> Tensor:
        off = x.chunk(2)[0] <= 0
        return x.masked_fill(torch.cat([off, off]), 0)

    return {"forward": forward}


def gelu(approximate: str, module: nn.Module, site: Site) -> dict[str, Any]:
    return {"forward": partial(dual_gelu, approximate=approximate)}


def gate_only(module: nn.Module, site: Site) -> dict[str, Any]:
    """A gate activation: its MLP answers for it, so a call of its own means a layout not known."""

    def forward(x: Tensor) -> Tensor:
        raise RuntimeError(f"u2a.dual: {path(type(module))} was called outside its gated MLP")

    return {"forward": forward}


def gating(act: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """act(gate) * up on dual rows; Refused for an activation that is not known."""
    kind = path(type(act))
    if kind in SILU:
        return dual_swiglu
    if kind in GELU or kind == RELU:
        return lambda gate, up: product(act(gate), up)  # act has its dual forward
    raise Refused(f"activation {kind}, wanted one of {sorted({*SILU, *GELU, RELU})}")


def gated_mlp(module: Any, site: Site) -> dict[str, Any]:
    gated = gating(module.act_fn)

    def forward(x: Tensor) -> Tensor:
        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))

    return {"forward": forward}


def packed_mlp(module: Any, site: Site) -> dict[str, Any]:
    """Phi-3: gate and up are the halves of one projection."""
    gated = gating(module.activation_fn)

    def forward(x: Tensor) -> Tensor:
        return module.down_proj(gated(*module.gate_up_proj(x).chunk(2, dim=-1)))

    return {"forward": forward}
