"""Settings of the families that real checkpoints have: other rotary scalings, windows by layer,
dense layers among experts, norms after the residual sum."""

import pytest
import tiny_index
import tiny_models
import torch
import transformers as hf
from test_products import REF, npo, oracle_ggnvp, oracle_gradient, oracle_hvp
from tiny_index import SHAPE, WINDOW
from tiny_models import direction, relative, two_batches

from u2a.linearize import linearize
from u2a.products import ggnvp, hvp, jvp_scores
from u2a.tree import dot

NO_HEAD_DIM = {k: v for k, v in SHAPE.items() if k != "head_dim"}
QUIET = dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
MOE = dict(**tiny_index.MOE, num_experts=4)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LONG = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0, 1.1], long_factor=[2.0, 3.0],
    original_max_position_embeddings=4,
)  # fmt: skip
SETTINGS = {
    "Llama 2, no grouped heads": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})
    ),
    "Llama 3 rotary": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "dynamic rotary": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **{**SHAPE, "max_position_embeddings": 4},
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
        )
    ),
    "Qwen2 windows by layer": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SHAPE, **WINDOW, use_sliding_window=True, max_window_layers=1)
    ),
    "Gemma 3 layer pattern": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHAPE, **WINDOW)),
    "Phi-3 long rotary": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **NO_HEAD_DIM, **QUIET, rope_parameters=LONG, original_max_position_embeddings=4
        )
    ),
    "Phi-3 window, partial rotary": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**NO_HEAD_DIM, **QUIET, **WINDOW, partial_rotary_factor=0.5)
    ),
    "Pythia's quarter rotary": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            **{**tiny_index.PLAIN, "hidden_size": 32, "num_attention_heads": 2}, rotary_pct=0.25
        )
    ),
    "OPT-350m's norms": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=29, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=12, do_layer_norm_before=False,
            pad_token_id=1, dropout=0.0,
        )
    ),
    "Mixtral window": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SHAPE, **WINDOW, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Qwen2-MoE dense first": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SHAPE, **MOE, shared_expert_intermediate_size=8, decoder_sparse_step=2,
            norm_topk_prob=True,
        )
    ),
    "Qwen3-MoE dense first": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SHAPE, **MOE, mlp_only_layers=[0])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_products_equal_double_backward(name, monkeypatch):
    monkeypatch.setitem(tiny_models.FAMILIES, name, SETTINGS[name])
    model, batches = tiny_models.make(name), two_batches()
    v, args = direction(model, 1), (model, batches, npo)
    each = torch.full((5,), 0.2, dtype=torch.float64)
    for mode, ours, oracle in (("hvp", hvp, oracle_hvp), ("ggn", ggnvp, oracle_ggnvp)):
        want = oracle(*args, v, each)
        assert relative(ours(*args, v, ref=REF), want) < 1e-8
        assert relative(linearize(*args, ref=REF, mode=mode).matvec(v), want) < 1e-8
    one = torch.eye(5, dtype=torch.float64)
    want = torch.stack([dot(oracle_gradient(*args, one[i]), v) for i in range(5)])
    assert (jvp_scores(*args, v, ref=REF) - want).norm() < 1e-8 * want.norm()
