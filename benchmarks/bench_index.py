"""The index scan against a training step of the same rows, and against its floor.

`steps` is time over that of one plain training step (forward, backward with weight gradients, by
transformers' own model and loss). The floor: forward and backward of activations alone.
On the CPU a GPT-2-like model of 4 layers, d = 256, 32 x 128 tokens; on a GPU Llama-like models of
160M and 1B parameters in bf16. `python benchmarks/bench_index.py [threads]` prints interleaved
medians, tokens/s and peak memory.
"""

import sys

import pytest
import torch
from _measure import interleaved, peak_mb
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from u2a.batch import Row
from u2a.index import Kronecker, Settings, Sketch, features

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPE = (32, 512) if CUDA else (32, 128)
LINEARS_ONLY = ("*embed*", "*wte*", "*wpe*", "*norm*", "*ln_*", "*bias*", "lm_head*")
SPECS = {
    "kronecker 16x16": Kronecker(16, 16),
    "sketch 1024": Sketch(1024),
    "sketch 4096": Sketch(4096),
}


def gpt2():
    config = GPT2Config(
        vocab_size=1000, n_embd=256, n_layer=4, n_head=4, n_positions=SHAPE[1],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(d, layers, inner):
    heads = d // 64
    config = LlamaConfig(
        vocab_size=32000, hidden_size=d, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


MODELS = (
    {"160M": lambda: llama(768, 16, 2304), "1B": lambda: llama(2048, 18, 5632)}
    if CUDA
    else {"gpt2 4x256": gpt2}
)


def make_calls(name):
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE).eval()
    ids = torch.randint(1, model.config.vocab_size, SHAPE)
    rows = [Row(str(i), (r[0],), tuple(r[1:])) for i, r in enumerate(ids.tolist())]
    ids = ids.to(DEVICE)
    settings = Settings(batch_tokens=ids.numel())

    def step():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    @torch.no_grad()
    def forward():
        return model(input_ids=ids, use_cache=False).logits

    def floor():
        for p in model.parameters():
            p.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
        for p in model.parameters():
            p.requires_grad_(True)

    def index(spec):
        return lambda: features(
            model, rows, lambda lp: -lp.sequence(), spec, exclude=LINEARS_ONLY, settings=settings
        )

    return {
        "training step": step,
        "forward": forward,
        "activations only": floor,
        **{f"u2a {name}": index(spec) for name, spec in SPECS.items()},
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "name", ["training step", "forward", "activations only", *(f"u2a {s}" for s in SPECS)]
)
def test_index(benchmark, name, model):
    calls = make_calls(model)
    benchmark.extra_info["peak_mb"] = round(peak_mb(calls[name]), 1)
    times = interleaved({"step": calls["training step"], "it": calls[name]}, rounds=5)
    benchmark.extra_info["steps"] = round(times["it"] / times["step"], 3)
    benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
    tokens = SHAPE[0] * SHAPE[1]
    benchmark.extra_info["tokens_s"] = round(tokens / benchmark.stats["median"])


def table(rounds=9):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {SHAPE[0]} rows of {SHAPE[1]} tokens")
    for model in MODELS:
        calls = make_calls(model)
        times = interleaved(calls, rounds)
        print(model)
        for name, call in calls.items():
            ratio = times[name] / times["training step"]
            rate = SHAPE[0] * SHAPE[1] / times[name]
            print(
                f"  {name:20s} {times[name] * 1e3:8.1f} ms  {ratio:5.2f} steps  "
                f"{rate:9.0f} tokens/s  {peak_mb(call):7.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
