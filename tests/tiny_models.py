"""Tiny float64 causal LMs of every supported family, batches for them, and the second-order oracle.

The oracle is double backward through Hugging Face's own modules with plain softmax attention; its
RMSNorm stays in float64 (theirs goes through float32, which would hide errors below 1e-7).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial

import tiny_index
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from u2a.batch import AnswerLogps, Batch, Row, collate

VOCAB = 29
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    bos_token_id=None,
    eos_token_id=None,
)
WINDOW = dict(sliding_window=3)
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, pad_token_id=0
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, **WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, **WINDOW, use_sliding_window=True, max_window_layers=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
    "gpt2-gelu": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            activation_function="gelu",
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
        )
    ),
    "gpt_neox-serial": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**tiny_index.PLAIN, use_parallel_residual=False, hidden_act="gelu_fast")
    ),
}
SHARED = ("gemma", "gemma2", "gemma3", "phi3", "phi", "gpt_neox", "opt")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
FAMILIES.update({name: tiny_index.FAMILIES[name] for name in (*SHARED, *EXPERTS)})
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "gpt2-gelu": ["c_attn", "c_proj"],
    "gpt_neox-serial": ["query_key_value", "dense"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "phi": ["q_proj", "v_proj", "dense", "fc2"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "opt": ["q_proj", "v_proj", "out_proj", "fc1"],
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), ["q_proj", "v_proj", "o_proj"]),
}


def make(family: str, lora: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Random weights large enough that attention, norms and activations are far from linear."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.25)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = TARGETS.get(family, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
        config = LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=targets,
            fan_in_fan_out=family.startswith("gpt2"),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(0.3 * torch.randn_like(p))
    return model


def checkpointed(model: nn.Module, reentrant: bool = False) -> nn.Module:
    """Training mode with activation checkpointing, under the name this transformers has for it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


def rows(seed: int = 0, shapes=((2, 5), (1, 2), (3, 1), (4, 4), (1, 6))) -> list[Row]:
    """(prompt, answer) lengths in `shapes`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    return [Row(f"row{i}", draw(p), draw(a)) for i, (p, a) in enumerate(shapes)]


def two_batches(seed: int = 0) -> list[Batch]:
    """Five rows of different lengths in two batches, out of order."""
    r = rows(seed)
    return [collate([r[3], r[0], r[4]], [3, 0, 4]), collate([r[2], r[1]], [2, 1])]


def direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for n, p in model.named_parameters()
        if p.requires_grad
    }


def _plain_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    rep = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(rep, 1), value.repeat_interleave(rep, 1)
    t = torch.arange(query.shape[2])
    hidden = t[None, :] > t[:, None]
    if kwargs.get("sliding_window") is not None:
        hidden = hidden | (t[None, :] <= t[:, None] - kwargs["sliding_window"])
    s = query @ key.transpose(2, 3) * scaling
    if (cap := kwargs.get("softcap")) is not None:
        s = cap * torch.tanh(s / cap)
    s = s.masked_fill(hidden, -math.inf)
    return (torch.softmax(s, -1) @ value).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("oracle", _plain_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("oracle", lambda *a, **k: None)


def _plain_norm(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if type(m).__name__.startswith("Gemma"):
        return F.rms_norm(x, x.shape[-1:], 1 + m.weight, m.eps)
    return F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)


def _plain_router(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    z = F.linear(x.reshape(-1, x.shape[-1]), m.weight)
    score, chosen = torch.topk(torch.softmax(z, -1), m.top_k, dim=-1)
    if getattr(m, "norm_topk_prob", True):
        score = score / score.sum(-1, keepdim=True)
    return z, score, chosen


@contextmanager
def plain(model: nn.Module):
    """Plain attention and experts, float64 norms and routers while open; yields the causal LM."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    norms = [m for m in base.modules() if type(m).__name__.endswith("RMSNorm")]
    routers = [m for m in base.modules() if type(m).__name__.endswith("TopKRouter")]
    before = base.config._attn_implementation, base.config._experts_implementation
    base.config._attn_implementation, base.config._experts_implementation = "oracle", "eager"
    for m in norms:
        m.forward = partial(_plain_norm, m)
    for m in routers:
        m.forward = partial(_plain_router, m)
    try:
        yield base
    finally:
        base.config._attn_implementation, base.config._experts_implementation = before
        for m in norms + routers:
            del m.forward


def oracle_logits(
    model: nn.Module, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits that predict the answer tokens `[n, V]`, those tokens, their rows)."""
    with plain(model) as base:
        logits = base(input_ids=batch.ids, use_cache=False).logits
    row, t = batch.answer.nonzero(as_tuple=True)
    return logits[row, t - 1], batch.ids[row, t], row


def oracle_logps(model: nn.Module, batch: Batch, ref: torch.Tensor | None = None) -> AnswerLogps:
    z, target, row = oracle_logits(model, batch)
    logp = torch.log_softmax(z, -1).gather(1, target[:, None])[:, 0]
    return AnswerLogps(logp, row, batch.answer.sum(1), ref=ref, index=batch.index)


def relative(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """max over the tensors of ||got - want|| / ||want||."""
    assert got.keys() == want.keys()
    scale = max(w.norm().item() for w in want.values())
    return max(
        ((got[n] - w).norm() / max(w.norm().item(), 1e-3 * scale)).item() for n, w in want.items()
    )
