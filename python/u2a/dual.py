"""u2a.dual: an unmodified Hugging Face causal LM maps [x; x_t] to [h; h_t] while a context is open.

B examples are followed by their B tangents along a direction in parameter space. Nonlinear parts
become dual ops, and one ordinary backward of a tangent output gives second-order products.
Attention goes through transformers' registries, the rest through instance attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from u2a import dual_head
from u2a.dual_modules import Refused, Site, UnsupportedModel, path
from u2a.dual_table import CAPPED, CAUSAL_LMS, overrides
from u2a.parallel import is_sharded, plain, reshard, unwrapped
from u2a_kernels import dual_attention

NAME = "u2a_dual"
Mode = Literal["hvp", "ggn", "jvp"]
_open: set[int] = set()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [2B, H, T, D] in, [2B, T, H, D] out."""
    mode = module.__dict__.get("u2a_mode")
    if mode is None or attention_mask is not None or dropout:
        raise RuntimeError(
            f"{NAME}: this attention answers only inside u2a.dual, without mask and dropout; got "
            f"mode {mode}, mask {attention_mask is not None}, dropout {dropout}"
        )
    options: Any = dict(scale=scaling, window=sliding_window, softcap=softcap, mode=mode)
    out = dual_attention(query, key, value, **options)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _base(model: nn.Module) -> Any:
    wrapped = getattr(model, "get_base_model", None)
    return wrapped() if wrapped is not None else model


def parts(
    model: nn.Module, sharded: bool = False, adapted: bool = False
) -> tuple[nn.Module, nn.Linear]:
    """Backbone and language-model head of a known causal LM, also inside a PeftModel; of a model
    sharded by FSDP2, or with LoRA on its head (`u2a.dual_head`), only if the caller knows what that
    means.

    Raises:
        UnsupportedModel: another class, or a head that is not a plain nn.Linear; what lies between
            backbone and logits elsewhere (scales, other caps than `final_softcap`) is not known.
    """
    if unwrapped(model) is not model or (is_sharded(model) and not sharded):
        kind = "sharded by FSDP2" if unwrapped(model) is model else "in DistributedDataParallel"
        raise UnsupportedModel(f"{kind}, which this does not support; see u2a.parallel", "model")
    base = _base(model)
    if path(type(base)) not in CAUSAL_LMS:
        raise UnsupportedModel(
            f"{path(type(base))} is not a known causal LM, wanted one of {sorted(CAUSAL_LMS)}",
            "model",
        )
    head = base.get_output_embeddings()
    reason = dual_head.fault(head)
    if reason is None and plain(type(head)) is not nn.Linear and not adapted:
        reason = "LoRA on the output head, which this does not support; the products do"
    if reason is None and plain(type(head)) is not nn.Linear and is_sharded(model):
        reason = "LoRA on the output head of a model sharded by FSDP2"
    if reason is not None:
        raise UnsupportedModel(reason, "model")
    return base.base_model, head


def final_softcap(model: nn.Module) -> float | None:
    """c of a model whose logits are c tanh(head(h) / c) (Gemma 2), or None."""
    base = _base(model)
    return base.config.final_logit_softcapping if path(type(base)) in CAPPED else None


def token_embedding(backbone: Any) -> nn.Module:
    """The module that meets the ids, inside its LoRA if it has one."""
    found: Any = backbone.get_input_embeddings()
    return getattr(found, "base_layer", found)  # type: ignore[no-any-return]


def is_open(model: nn.Module) -> bool:
    """True while `model`'s backbone is inside `u2a.dual`."""
    return id(parts(model, sharded=True, adapted=True)[0]) in _open


@dataclass(frozen=True)
class Dual:
    """The model while its context is open. Call it with ids `[B, T]` for `[2B, T, d]`."""

    model: nn.Module
    backbone: nn.Module
    head: nn.Linear
    head_tangent: Tensor | None
    mode: Mode
    bias_tangent: Tensor | None = None
    softcap: float | None = None
    directions: Mapping[int, Tensor] = field(default_factory=dict)  # by id of the parameter

    def direction(self, parameter: Tensor) -> Tensor | None:
        return self.directions.get(id(parameter))

    def __call__(self, ids: Tensor) -> Tensor:
        return self.backbone(input_ids=ids, use_cache=False).last_hidden_state


def _by_parameter(model: nn.Module, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Tensor] = {}
    for name, t in tangents.items():
        p = named.get(name)
        if p is None:
            near = difflib.get_close_matches(name, named, n=1, cutoff=0.0)
            raise ValueError(
                f"u2a.dual: tangents holds {name!r}, which is no parameter of "
                f"{type(model).__name__}; the nearest is {near[0]!r}"
            )
        if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
            raise ValueError(
                f"u2a.dual: tangents[{name!r}] must be like its parameter, {list(p.shape)} "
                f"{p.dtype} on {p.device}, got {list(t.shape)} {t.dtype} on {t.device}"
            )
        if id(p) in found:
            raise ValueError(f"u2a.dual: tangents holds {name!r} twice, under tied names")
        found[id(p)] = t.detach()
    return found


def _survey(model: nn.Module, site: Site) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Every module's overrides, or one error that names all refused modules."""
    found, faults = [], []
    for name, module in model.named_modules():
        try:
            found.append((module, overrides(module, site, root=module is model)))
        except Refused as reason:
            faults.append(f"{name or 'the model'} ({path(type(module))}): {reason}")
    if faults:
        raise UnsupportedModel(faults, f"u2a.dual: {type(model).__name__} is not supported")
    return found


@contextmanager
def dual(model: nn.Module, tangents: Mapping[str, Tensor], mode: Mode = "hvp") -> Iterator[Dual]:
    """While open, the backbone of `model` maps B rows of ids to [h; h_t], `[2B, T, d]`.

    h is the last hidden state, h_t its derivative along `tangents`. Any way of calling the
    backbone works (`model.base_model(input_ids=ids)`, the object yielded, ...); the language-model
    head maps [h; h_t] to [z; z_t], before a final soft cap (a call of the whole model is then
    refused). Rows are right-padded; no attention mask, no cache, default position ids.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2, Gemma 3 (text), Phi, Phi-3, GPT-NeoX,
            OPT, GPT-2, Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE for causal LM, with or without plain
            peft LoRA on linear layers, embeddings and head; sharded by FSDP2 as `u2a.parallel`
            says. The experts' choice is held: it is constant almost everywhere.
        tangents: {parameter name: direction}, shape, dtype and device of the parameter; a missing
            name means zero; the direction of a tied weight applies to all its uses.
        mode: "hvp" (the backward of the tangent output is the Hessian product), "ggn" (backward
            through the primal graph only) or "jvp" (forward only).

    Raises:
        UnsupportedModel: modules, dropout in training mode, adapter variants or hooks without a
            known tangent, all of them by name.
        ValueError: unknown or misshapen tangents, unknown mode.
        RuntimeError: the model is already inside `u2a.dual`.

    `model.base_model.compile()` (of a PeftModel: `model.get_base_model().base_model`) compiles the
    dual forward of all products, one graph per mode and shape that later contexts use again; or
    compile the object yielded. A backward with activation checkpointing must run while the context
    is open. Everything is put back on exit, also after an exception.
    Source: Pearlmutter (Neural Computation 6, 1994), reverse over forward on a stacked batch.
    """
    if mode not in ("hvp", "ggn", "jvp"):
        raise ValueError(f"u2a.dual: mode must be 'hvp', 'ggn' or 'jvp', got {mode!r}")
    reshard(model)
    backbone, head = parts(model, sharded=True, adapted=True)
    if id(backbone) in _open:
        raise RuntimeError("u2a.dual: this model is already inside u2a.dual; contexts do not nest")
    by_parameter = _by_parameter(model, tangents)
    site = Site(by_parameter, mode, token_embedding(backbone))
    found = _survey(model, site)
    lost = [n for n, p in model.named_parameters() if id(p) in by_parameter.keys() - site.served]
    if lost:
        raise UnsupportedModel(
            [f"{n}: no known module uses it" for n in lost], "u2a.dual: tangents"
        )
    config: Any = backbone.config
    implementation = config._attn_implementation
    _open.add(id(backbone))
    replaced: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, attributes in found:
            for name, value in attributes.items():
                replaced.append((module, name, module.__dict__.get(name)))
                module.__dict__[name] = value
        config._attn_implementation = NAME
        weight_t, bias_t = (by_parameter.get(id(p)) for p in (head.weight, head.bias))
        cap = final_softcap(model)
        yield Dual(model, backbone, head, weight_t, mode, bias_t, cap, by_parameter)
    finally:
        config._attn_implementation = implementation
        for module, name, before in replaced:
            del module.__dict__[name]
            if before is not None:
                module.__dict__[name] = before
        _open.discard(id(backbone))
        reshard(model)


__all__ = ["Dual", "Mode", "UnsupportedModel", "dual", "final_softcap", "is_open", "parts"]
