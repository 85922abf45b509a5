"""Tiny float64 causal LMs of every family the index covers, and the per-example gradient oracle.

The oracle is one ordinary backward per example through the whole model, alone in its batch, with
transformers' own sdpa attention.
"""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from u2a.batch import Row

VOCAB = 29
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
PLAIN = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=12, output_router_logits=False)
WINDOW = dict(sliding_window=3)
TWO_KINDS = dict(layer_types=["sliding_attention", "full_attention"])


def _opt() -> nn.Module:
    sizes = dict(vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2)
    quiet = dict(dropout=0.0, attention_dropout=0.0, layerdrop=0.0)
    shape = dict(num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=12)
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, **quiet, **shape, pad_token_id=1))


FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE)),
    "llama-tied-bias": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **{**SHAPE, "pad_token_id": 0},
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SHAPE, **WINDOW)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHAPE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SHAPE)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SHAPE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **SHAPE, **WINDOW, **TWO_KINDS, query_pre_attn_scalar=4,
            attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SHAPE, **WINDOW, **TWO_KINDS, query_pre_attn_scalar=4)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**PLAIN, hidden_dropout=0.0, attention_dropout=0.0)
    ),
    "opt": _opt,
    "phi": lambda: hf.PhiForCausalLM(
        hf.PhiConfig(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"},
            resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
        )
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"},
            resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**SHAPE, **MOE, num_experts=4, shared_expert_intermediate_size=8)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SHAPE, **MOE, num_experts=4, norm_topk_prob=True)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"},
            num_experts=4, num_experts_per_tok=2,
        )
    ),
}  # fmt: skip


def make(family: str, dtype: torch.dtype = torch.float64, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return with_lora(model, family) if lora else model


def with_lora(model: nn.Module, family: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    gpt2 = family == "gpt2"
    targets = ["c_attn", "c_fc"] if gpt2 else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, fan_in_fan_out=gpt2, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return model


def rows(shapes=((2, 5), (1, 2), (3, 1), (4, 4), (1, 6), (2, 0)), seed: int = 0) -> list[Row]:
    """(prompt, answer) lengths in `shapes`; ids from 1, as 0 is some models' padding_idx."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    return [Row(f"row{i}", draw(p), draw(a)) for i, (p, a) in enumerate(shapes)]


def oracle(model: nn.Module, data: list[Row], loss) -> dict[str, torch.Tensor]:
    """{trainable parameter: gradients of every row's loss `[n, *shape]`}, each row alone."""
    from u2a.batch import AnswerLogps

    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[torch.Tensor]] = {n: [] for n in params}
    for row in data:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        first = max(len(row.prompt_ids), 1)
        logits = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].double()
        logp = F.log_softmax(logits, -1).gather(1, ids[0, first:, None])[:, 0]
        own = torch.zeros(len(logp), dtype=torch.int64)
        lp = AnswerLogps(logp, own, torch.tensor([len(logp)]), index=torch.tensor([0]))
        total = loss(lp).sum()
        grads = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        for (name, p), g in zip(params.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return {n: torch.stack(g) for n, g in found.items()}
