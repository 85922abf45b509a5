"""Activations and gated MLPs on stacked rows [x; x_t]; handlers as in `dual_modules`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from u2a.dual_modules import Refused, Site, path
from u2a_kernels import dual_act, dual_glu

ACTIVATIONS = {
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.ReLUSquaredActivation": "relu2",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Tanh": "tanh",
}


def named(act: nn.Module) -> str:
    """The kernels' name of an activation; Refused for one that is not known."""
    kind = path(type(act))
    if kind not in ACTIVATIONS:
        raise Refused(f"activation {kind}, wanted one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[kind]


def activation(module: nn.Module, site: Site) -> dict[str, Any]:
    name = named(module)

    def forward(x: Tensor) -> Tensor:  # no partial: torch.compile would start anew in every context
        return dual_act(x, name)

    return {"forward": forward}


def gated_mlp(module: Any, site: Site) -> dict[str, Any]:
    name = named(module.act_fn)

    def forward(x: Tensor) -> Tensor:
        return module.down_proj(dual_glu(module.gate_proj(x), module.up_proj(x), name))

    return {"forward": forward}


def packed_mlp(module: Any, site: Site) -> dict[str, Any]:
    """Phi-3: gate and up are the halves of one projection."""
    name = named(module.activation_fn)

    def forward(x: Tensor) -> Tensor:
        return module.down_proj(dual_glu(module.gate_up_proj(x), activation=name))

    return {"forward": forward}
