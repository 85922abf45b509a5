"""The index over a bitsandbytes base in 4 or 8 bits with a LoRA: the base stays as it is."""

import pytest
import tiny_index
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from u2a.index import Full, features

pytest.importorskip("bitsandbytes")
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
KINDS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


def nll(lp):
    return -lp.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_gradients_of_the_adapter(kind, tmp_path):
    torch.manual_seed(0)
    ids = dict(bos_token_id=None, eos_token_id=None)
    config = LlamaConfig(vocab_size=tiny_index.VOCAB, num_key_value_heads=2, **SHAPE, **ids)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=KINDS[kind], device_map={"": "cpu"}
    )
    model, data = tiny_index.with_lora(base, "llama"), tiny_index.rows()
    inside = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(inside).__module__.startswith("bitsandbytes")
    grads = tiny_index.oracle(model, data, nll)
    want = torch.cat([g.flatten(1) for g in grads.values()], 1)
    got = features(model, data, nll, Full())
    assert got.shape == want.shape and want.abs().max() > 1e-3
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
