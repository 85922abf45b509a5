"""Curvature products from `u2a.linearize` beside the stacked ones: time and memory relative to one
gradient, K directions at once, LoRA and full parameters.

    python benchmarks/bench_linearize.py [T] [rounds]

Ratios of interleaved CPU (or device) times; peak MB of a call, and MB held between products.
"""

from __future__ import annotations

import statistics
import sys
import time

import pytest
import torch
from _measure import peak_mb
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from u2a.batch import Batch
from u2a.linearize import linearize
from u2a.products import ggnvp, gradient, hvp
from u2a.tree import trainable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
LARGE = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=32)
VOCAB, ROWS, RANK = 8192, 2, 8
LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
STACKED = {"ggn": ggnvp, "hvp": hvp}


def nll(lp):
    return -lp.mean()


def make(lora: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = LARGE if DEVICE == "cuda" else SMALL
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=4096, **shape)
    model = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=LINEARS))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return model.to(DEVICE, torch.bfloat16 if DEVICE == "cuda" else torch.float32).eval()


def batch_of(t: int) -> Batch:
    ids = torch.randint(VOCAB, (ROWS, t), generator=torch.Generator().manual_seed(0))
    answer = torch.ones_like(ids, dtype=torch.bool)
    answer[:, 0] = False
    return Batch(ids, answer, torch.full((ROWS,), t), torch.arange(ROWS)).to(DEVICE)


def draws(model: torch.nn.Module, k: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return [{n: torch.randn_like(p) for n, p in trainable(model).items()} for _ in range(k)]


def calls_of(model, batch, mode, ks=(1, 4, 16)):
    """({name: (call, directions)}, the linearised products)."""
    lin = linearize(model, batch, nll, mode=mode)
    vs = draws(model, max(ks))
    calls = {
        "gradient": (lambda: gradient(model, batch, nll), 1),
        "stacked": (lambda: STACKED[mode](model, batch, nll, vs[0]), 1),
        "record": (lambda: linearize(model, batch, nll, mode=mode), 1),
    }
    for k in ks:
        calls[f"K={k}"] = (lambda k=k: lin.matmat(vs[:k]), k)
    return calls, lin


def seconds(call) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


def table(t: int, rounds: int) -> None:
    print(f"{DEVICE}, T={t}, B={ROWS}, V={VOCAB}; times per direction over one gradient")
    for lora in (True, False):
        for mode in STACKED:
            model, batch = make(lora), batch_of(t)
            calls, lin = calls_of(model, batch, mode)
            found = {name: [] for name in calls}
            for call, _ in calls.values():
                call()
            for _ in range(rounds):
                for name, (call, k) in calls.items():
                    found[name].append(seconds(call) / k)
            times = {name: statistics.median(s) for name, s in found.items()}
            cells = [
                f"{name} {times[name] / times['gradient']:.2f} ({peak_mb(call):.0f} MB)"
                for name, (call, _) in calls.items()
            ]
            kind = f"LoRA r={RANK}" if lora else "full"
            print(
                f"{kind} {mode}: {', '.join(cells)}; held {lin.nbytes / 2**20:.0f} MB", flush=True
            )


@pytest.mark.parametrize("mode", STACKED)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["gradient", "stacked", "K=1", "K=4"])
def test_linearize(benchmark, mode, lora, name):
    calls, lin = calls_of(make(lora), batch_of(128), mode, (1, 4))
    call, k = calls[name]
    benchmark.extra_info.update(directions=k, held_mb=round(lin.nbytes / 2**20, 1))
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes = [int(x) for x in sys.argv[1:]]
    table(sizes[0] if sizes else 512, sizes[1] if len(sizes) > 1 else 5)
