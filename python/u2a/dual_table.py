"""The classes `u2a.dual` knows, by their place inside torch, transformers and peft.

Everything else is refused by name, leaf or composite: a module that multiplies two dual tensors
would be wrong without a word.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn

from u2a.dual_modules import (
    SILU,
    Handler,
    Refused,
    Site,
    attention,
    causal_lm,
    conv1d,
    dropout,
    embedding,
    gated_mlp,
    gelu,
    gpt2_attention,
    layer,
    layer_norm,
    linear,
    lora_linear,
    nothing,
    path,
    peft_model,
    rms_norm,
    unreachable,
)

TABLE: dict[str, Handler] = {
    "torch.nn.modules.container.ModuleList": nothing,
    "torch.nn.modules.container.ModuleDict": nothing,
    "torch.nn.modules.container.ParameterDict": nothing,
    "torch.nn.modules.linear.Identity": nothing,
    "torch.nn.modules.linear.Linear": linear,
    "torch.nn.modules.sparse.Embedding": embedding,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "torch.nn.modules.dropout.Dropout": dropout,
    "transformers.pytorch_utils.Conv1D": conv1d,
    "transformers.activations.NewGELUActivation": partial(gelu, "tanh"),
    "transformers.activations.GELUTanh": partial(gelu, "tanh"),
    "transformers.activations.GELUActivation": partial(gelu, "none"),
    **dict.fromkeys(SILU, unreachable),
    "transformers.models.gpt2.modeling_gpt2.GPT2Attention": gpt2_attention,
    "transformers.models.gpt2.modeling_gpt2.GPT2MLP": nothing,
    "transformers.models.gpt2.modeling_gpt2.GPT2Block": layer,
    "transformers.models.gpt2.modeling_gpt2.GPT2Model": nothing,
    "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel": causal_lm,
    "peft.peft_model.PeftModel": peft_model,
    "peft.peft_model.PeftModelForCausalLM": peft_model,
    "peft.tuners.lora.model.LoraModel": nothing,
    "peft.tuners.lora.layer.Linear": lora_linear,
}
for _package, _family in (
    ("llama", "Llama"),
    ("mistral", "Mistral"),
    ("qwen2", "Qwen2"),
    ("qwen3", "Qwen3"),
):
    for _suffix, _handler in {
        "RMSNorm": rms_norm,
        "RotaryEmbedding": nothing,
        "MLP": gated_mlp,
        "Attention": attention,
        "DecoderLayer": layer,
        "Model": nothing,
        "ForCausalLM": causal_lm,
    }.items():
        TABLE[f"transformers.models.{_package}.modeling_{_package}.{_family}{_suffix}"] = _handler

CAUSAL_LMS = {name for name, handler in TABLE.items() if handler is causal_lm}


def overrides(module: nn.Module, site: Site, root: bool = False) -> dict[str, Any]:
    """Attributes to set on `module`; Refused when its class, hooks or settings are unknown."""
    cls = type(module)
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
        if origin.split(".")[0] not in ("transformers", "peft"):
            raise Refused(f"it has a forward hook from {origin}")
    return handler(module, site)
