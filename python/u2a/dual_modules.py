"""What a module does to stacked rows [x; x_t]: one handler per kind, listed in `dual_table`.

A module that is linear in its input and multiplies no two activations needs nothing; the others get
a dual forward. A setting whose tangent is not known raises Refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from u2a.errors import ConfigError
from u2a.lookup import lookup
from u2a.parallel import plain
from u2a_kernels import dual_layer_norm, dual_linear, dual_rms_norm


class UnsupportedModel(ConfigError):
    """The model holds modules whose tangent is not known; `faults` names each of them."""


class Refused(Exception):
    """One module's reason; collected into UnsupportedModel."""


@dataclass
class Site:
    """What a handler may look at: tangents by parameter, the mode, and B of the running call."""

    tangents: dict[int, Tensor]
    mode: str
    token_embedding: nn.Module | None = None
    rows: int = 1
    served: set[int] = field(default_factory=set)

    def tangent(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        self.served.add(id(parameter))
        return self.tangents.get(id(parameter))


def path(cls: type) -> str:
    cls = plain(cls)
    return f"{cls.__module__}.{cls.__qualname__}"


# A handler returns the attributes to set on the instance while the context is open.
Handler = Callable[[Any, Site], dict[str, Any]]


def nothing(module: nn.Module, site: Site) -> dict[str, Any]:
    return {}


def linear(module: nn.Linear, site: Site) -> dict[str, Any]:
    weight_t, bias_t = site.tangent(module.weight), site.tangent(module.bias)

    def forward(x: Tensor) -> Tensor:
        return dual_linear(x, module.weight, weight_t, module.bias, bias_t, mode=site.mode)

    return {"forward": forward}


def conv1d(module: Any, site: Site) -> dict[str, Any]:
    """transformers' Conv1D keeps its weight as [d_in, d_out]."""
    weight_t, bias_t = site.tangent(module.weight), site.tangent(module.bias)
    weight_t = None if weight_t is None else weight_t.t()

    def forward(x: Tensor) -> Tensor:
        return dual_linear(x, module.weight.t(), weight_t, module.bias, bias_t, mode=site.mode)

    return {"forward": forward}


def embedding(module: nn.Embedding, site: Site) -> dict[str, Any]:
    """Rows of ids become rows and their tangents. The row of `padding_idx` gets no gradient from
    autograd here, so it gets no tangent either."""
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise Refused("max_norm, sparse and scale_grad_by_freq are not supported")
    weight_t = site.tangent(module.weight)

    def forward(ids: Tensor) -> Tensor:
        if module is site.token_embedding:
            site.rows = ids.shape[0]
        return looked_up(site, ids, module.weight, weight_t, module.padding_idx)

    return {"forward": forward}


def looked_up(
    site: Site, ids: Tensor, weight: Tensor, weight_t: Tensor | None, padding_idx: int | None
) -> Tensor:
    """Rows of a table and their tangents; ids of one row stand for all."""
    if ids.shape[0] == 1:
        ids = ids.expand(site.rows, *ids.shape[1:])
    e = lookup(ids, weight, padding_idx)
    if weight_t is None:
        return torch.cat([e, torch.zeros_like(e)])
    e_t = F.embedding(ids, weight_t)
    if padding_idx is not None:
        e_t = e_t.masked_fill((ids == padding_idx)[..., None], 0.0)
    return torch.cat([e, e_t])


def scaled_embedding(module: Any, site: Site) -> dict[str, Any]:
    inner = embedding(module, site)["forward"]
    return {"forward": lambda ids: inner(ids) * module.embed_scale.to(module.weight.dtype)}


def opt_positions(module: Any, site: Site) -> dict[str, Any]:
    """OPT's rows start at `offset`; its decoder counts positions for all 2B stacked rows."""
    inner = embedding(module, site)["forward"]

    def forward(mask: Any, past: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            raise RuntimeError("u2a.dual: OPT positions without position_ids are not supported")
        return inner(position_ids[: site.rows] + module.offset)

    return {"forward": forward}


def layer_norm(module: nn.LayerNorm, site: Site) -> dict[str, Any]:
    if module.weight is None or module.bias is None or len(module.normalized_shape) != 1:
        raise Refused("needs a weight, a bias and one normalised dimension")
    weight_t, bias_t = site.tangent(module.weight), site.tangent(module.bias)

    def forward(x: Tensor) -> Tensor:
        return dual_layer_norm(x, module.weight, module.bias, weight_t, bias_t, module.eps)

    return {"forward": forward}


def rms_norm(module: Any, site: Site) -> dict[str, Any]:
    weight_t = site.tangent(module.weight)

    def forward(x: Tensor) -> Tensor:
        return dual_rms_norm(x, module.weight, weight_t, module.variance_epsilon)

    return {"forward": forward}


def one_plus_rms_norm(module: Any, site: Site) -> dict[str, Any]:
    """Gemma: the factor is 1 + weight, formed and used in float32 at least."""
    weight_t = site.tangent(module.weight)

    def forward(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        t = None if weight_t is None else weight_t.to(wide)
        return dual_rms_norm(x.to(wide), 1 + module.weight.to(wide), t, module.eps).to(x.dtype)

    return {"forward": forward}


def attention(module: Any, site: Site) -> dict[str, Any]:
    if not module.is_causal or not getattr(module.config, "is_causal", True):
        raise Refused("attention that is not causal")
    if module.training and getattr(module, "attention_dropout", 0.0) > 0:
        raise Refused(
            f"attention_dropout={module.attention_dropout} in training mode; model.eval()"
        )
    return {"u2a_mode": site.mode}


def opt_attention(module: Any, site: Site) -> dict[str, Any]:
    if module.training and module.dropout > 0:
        raise Refused(f"dropout={module.dropout} in training mode; model.eval()")
    return attention(module, site)


def gpt2_attention(module: Any, site: Site) -> dict[str, Any]:
    if module.is_cross_attention:
        raise Refused("cross attention")
    return attention(module, site)


def dropout(module: nn.Dropout, site: Site) -> dict[str, Any]:
    if module.training and module.p > 0:
        raise Refused(f"dropout p={module.p} in training mode; set p=0 or call model.eval()")
    return {}


def layer(module: Any, site: Site) -> dict[str, Any]:
    func = getattr(module, "_gradient_checkpointing_func", None)
    reentrant = getattr(func, "keywords", {}).get("use_reentrant", False)
    if module.training and module.gradient_checkpointing and reentrant:
        raise Refused("reentrant activation checkpointing; use use_reentrant=False")
    return {}


def opt_layer(module: Any, site: Site) -> dict[str, Any]:
    if module.training and module.dropout > 0:
        raise Refused(f"dropout={module.dropout} in training mode; model.eval()")
    return layer(module, site)


def opt_decoder(module: Any, site: Site) -> dict[str, Any]:
    if module.training and module.layerdrop > 0:
        raise Refused(f"layerdrop={module.layerdrop} in training mode; model.eval()")
    return {}


def backbone(module: Any, site: Site) -> dict[str, Any]:
    """Right-padded ids alone: transformers makes no mask for an attention it does not know."""

    def forward(input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        for name in ("attention_mask", "position_ids", "inputs_embeds", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"u2a.dual: pass right-padded input_ids only, got {name}; masks and packed "
                    "rows are not supported (real tokens never see the padding to their right)"
                )
        return type(module).forward(module, input_ids=input_ids, **kwargs)

    return {"forward": forward}


def causal_lm(module: Any, site: Site) -> dict[str, Any]:
    cap = getattr(module.config, "final_logit_softcapping", None)
    if cap is not None:
        raise Refused(f"final_logit_softcapping={cap}")
    return {}


def capped_causal_lm(module: Any, site: Site) -> dict[str, Any]:
    """A final soft cap is nonlinear and `u2a.logps` applies it; a call of the whole is refused."""
    if module.config.final_logit_softcapping is None:
        return {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"u2a.dual: {path(type(module))} caps its logits, which is not linear; call its "
            "backbone, or u2a.dual_answer_logps"
        )

    return {"forward": forward}


def peft_model(module: Any, site: Site) -> dict[str, Any]:
    kind = {a: c.peft_type.value for a, c in module.peft_config.items()}
    if set(kind.values()) != {"LORA"}:
        raise Refused(f"adapters {kind}, wanted LORA")
    return {}
