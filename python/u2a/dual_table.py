"""The classes `u2a.dual` knows, by their place inside torch, transformers and peft.

Everything else is refused by name, leaf or composite: a module that multiplies two dual tensors
would be wrong without a word.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from u2a.dual_lora import CONV1D, EMBEDDING, LINEAR, lora_embedding, lora_linear
from u2a.dual_mlp import ACTIVATIONS, activation, gated_mlp, packed_mlp
from u2a.dual_modules import (
    Handler,
    Refused,
    Site,
    attention,
    backbone,
    capped_causal_lm,
    causal_lm,
    conv1d,
    dropout,
    embedding,
    gpt2_attention,
    layer,
    layer_norm,
    linear,
    nothing,
    one_plus_rms_norm,
    opt_attention,
    opt_decoder,
    opt_layer,
    opt_positions,
    path,
    peft_model,
    rms_norm,
    scaled_embedding,
)
from u2a.dual_moe import experts, olmoe_attention, router, shared_and_sparse, sparse
from u2a.parallel import gathering, plain

TABLE: dict[str, Handler] = {
    "torch.nn.modules.container.ModuleList": nothing,
    "torch.nn.modules.container.ModuleDict": nothing,
    "torch.nn.modules.container.ParameterDict": nothing,
    "torch.nn.modules.linear.Identity": nothing,
    LINEAR: linear,
    EMBEDDING: embedding,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "torch.nn.modules.dropout.Dropout": dropout,
    CONV1D: conv1d,
    **dict.fromkeys(ACTIVATIONS, activation),
    "peft.peft_model.PeftModel": peft_model,
    "peft.peft_model.PeftModelForCausalLM": peft_model,
    "peft.tuners.lora.model.LoraModel": nothing,
    "peft.tuners.lora.layer.Linear": lora_linear,
    "peft.tuners.lora.layer.Embedding": lora_embedding,
}
_LLAMA: dict[str, Handler] = {
    "RMSNorm": rms_norm,
    "RotaryEmbedding": nothing,
    "MLP": gated_mlp,
    "Attention": attention,
    "DecoderLayer": layer,
    "Model": backbone,
    "ForCausalLM": causal_lm,
}
_GEMMA = {
    **_LLAMA,
    "RMSNorm": one_plus_rms_norm,
    "TextScaledWordEmbedding": scaled_embedding,
    "ForCausalLM": capped_causal_lm,
}
_MOE: dict[str, Handler] = {
    **_LLAMA,
    "TopKRouter": router,
    "Experts": experts,
    "SparseMoeBlock": sparse,
}
# Handlers by transformers' package, prefix of its class names, and the rest of the name.
FAMILIES: dict[tuple[str, str], dict[str, Handler]] = {
    ("llama", "Llama"): _LLAMA,
    ("mistral", "Mistral"): _LLAMA,
    ("qwen2", "Qwen2"): _LLAMA,
    ("qwen3", "Qwen3"): _LLAMA,
    ("gemma", "Gemma"): {**_GEMMA, "ForCausalLM": causal_lm},
    ("gemma2", "Gemma2"): _GEMMA,
    ("gemma3", "Gemma3"): {**_GEMMA, "TextModel": backbone},
    ("phi3", "Phi3"): {**_LLAMA, "MLP": packed_mlp},
    ("phi", "Phi"): {**_LLAMA, "MLP": nothing},
    ("mixtral", "Mixtral"): _MOE,
    ("qwen2_moe", "Qwen2Moe"): {**_MOE, "SparseMoeBlock": shared_and_sparse},
    ("qwen3_moe", "Qwen3Moe"): _MOE,
    ("olmoe", "Olmoe"): {**_MOE, "Attention": olmoe_attention},
    ("gpt_neox", "GPTNeoX"): {
        "RotaryEmbedding": nothing,
        "MLP": nothing,
        "Attention": attention,
        "Layer": layer,
        "Model": backbone,
        "ForCausalLM": causal_lm,
    },
    ("opt", "OPT"): {
        "LearnedPositionalEmbedding": opt_positions,
        "Attention": opt_attention,
        "DecoderLayer": opt_layer,
        "Decoder": opt_decoder,
        "Model": backbone,
        "ForCausalLM": causal_lm,
    },
    ("gpt2", "GPT2"): {
        "Attention": gpt2_attention,
        "MLP": nothing,
        "Block": layer,
        "Model": backbone,
        "LMHeadModel": causal_lm,
    },
}
for (_package, _prefix), _handlers in FAMILIES.items():
    for _suffix, _handler in _handlers.items():
        TABLE[f"transformers.models.{_package}.modeling_{_package}.{_prefix}{_suffix}"] = _handler

CAPPED = {name for name, handler in TABLE.items() if handler is capped_causal_lm}
CAUSAL_LMS = CAPPED | {name for name, handler in TABLE.items() if handler is causal_lm}


def overrides(module: nn.Module, site: Site, root: bool = False) -> dict[str, Any]:
    """Attributes to set on `module`; Refused when its class, hooks or settings are unknown."""
    cls = plain(type(module))
    handler = TABLE.get(path(cls))
    if (
        handler is None
        or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls
    ):
        raise Refused("this class is not in the table of known modules")
    home = cls.__module__.split(".")[0]
    if cls.forward.__module__.split(".")[0] not in (home, "torch"):
        raise Refused(f"its forward was replaced by {cls.forward.__module__}")
    if "forward" in module.__dict__ and not root:
        raise Refused("the instance carries a forward of its own (device_map or another patch)")
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        origin = getattr(hook, "__module__", None) or type(hook).__module__
        if not origin.startswith(("transformers.", "peft.", "torch.distributed.fsdp.")):
            raise Refused(f"it has a forward hook from {origin}")
    return gathering(handler, module, site)
