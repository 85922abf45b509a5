"""A two-layer Llama with a LoRA and a few random rows, for the unlearning tests.

Llama's own RMSNorm and eager softmax compute in float32 whatever the dtype; here they do not, so
that a float64 model is one, and optima and gradients can be compared to many digits.
"""

from __future__ import annotations

import random

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from u2a.batch import Pair, Row, collate

VOCAB = 32


def tiny_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.RMSNorm(32, eps=1e-6)
        layer.post_attention_layernorm = torch.nn.RMSNorm(32, eps=1e-6)
    model.model.norm = torch.nn.RMSNorm(32, eps=1e-6)
    return model.to(dtype)


def tiny_peft(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    train: str = "ab",
    base: LlamaForCausalLM | None = None,
):
    """LoRA r=2 on q, v and down; `train="b"` freezes the A factors."""
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base or tiny_base(seed, dtype), lora).to(dtype)
    if train == "b":
        for name, p in model.named_parameters():
            p.requires_grad_("lora_B" in name)
    return model


def fitted_base(known: list[Row], steps: int = 40) -> LlamaForCausalLM:
    """A base model that has learnt `known` by heart."""
    model = tiny_base()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = collate(known)
    labels = batch.ids.masked_fill(~batch.answer, -100)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch.ids, labels=labels).loss.backward()
        optimizer.step()
    return model


def rows(n: int, seed: int = 0, tag: str = "row") -> list[Row]:
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB) for _ in range(draw.randint(low, high)))

    return [Row(f"{tag}{i}", tokens(1, 4), tokens(1, 6), f"{tag}.jsonl:{i + 1}") for i in range(n)]


def pairs(n: int, seed: int = 0) -> list[Pair]:
    good, bad = rows(n, seed, "good"), rows(n, seed + 1, "bad")
    return [Pair(f"pair{i}", g, b) for i, (g, b) in enumerate(zip(good, bad, strict=True))]
