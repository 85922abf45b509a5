"""Exact scores against a training step on the same rows and against a loop of per-example autograd;
Hessian and Gauss-Newton products against double backward (eager attention).

`steps` is time over that of one plain training step (forward and backward) of the same rows.
`python benchmarks/bench_scan.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
from _measure import interleaved, peak_mb
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from u2a.batch import Row, collate
from u2a.products import answer_logps, ggnvp, gradient, hvp, jvp_scores
from u2a.tree import dot, norm, trainable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(vocab_size=768, hidden_size=96, intermediate_size=256, num_hidden_layers=3)
LARGE = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16)
SHAPE = LARGE if DEVICE == "cuda" else SMALL
HEADS = 16 if DEVICE == "cuda" else 4
ROWS, LENGTHS = 64, ((128, 512) if DEVICE == "cuda" else (16, 48))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(lora):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=HEADS, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return model.to(DEVICE).eval()


def make_rows():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(ROWS):
        low, high = LENGTHS
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        ids = torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator).tolist()
        rows.append(Row(str(i), tuple(ids[: length // 2]), tuple(ids[length // 2 :])))
    return rows


def nll(lp):
    return -lp.mean()


def per_example(model, rows, v):
    """One gradient per example, as influence code usually does."""
    params = trainable(model)
    scores = []
    for row in rows:
        loss = nll(answer_logps(model, collate([row])))[0]
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        scores.append(dot(grads, v).float())
    return torch.stack(scores)


def double_backward(model, batch, v):
    """Hessian product of the mean loss by eager torch, logits and all."""
    params = list(trainable(model).values())
    config = model.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        ids, answer = batch.ids.to(DEVICE), batch.answer.to(DEVICE)
        logits = model(input_ids=ids, use_cache=False).logits
        row, t = answer.nonzero(as_tuple=True)
        logp = torch.log_softmax(logits[row, t - 1], -1).gather(1, ids[row, t][:, None])[:, 0]
        loss = -(logp / answer.sum(1)[row]).sum() / len(batch)
        first = torch.autograd.grad(loss, params, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, v.values(), strict=True))
        return torch.autograd.grad(along, params)
    finally:
        config._attn_implementation = before


@torch.no_grad()
def forward(model, batch):
    return answer_logps(model, batch).logp


def make_calls(lora):
    model, rows = make_model(lora), make_rows()
    batch = collate(rows)
    v = {name: torch.randn_like(p) for name, p in trainable(model).items()}
    return model, batch, {
        "step": lambda: gradient(model, batch, nll),
        "forward": lambda: forward(model, batch),
        "jvp_scores": lambda: jvp_scores(model, batch, nll, v),
        "per_example": lambda: per_example(model, rows, v),
        "hvp": lambda: hvp(model, batch, nll, v),
        "ggnvp": lambda: ggnvp(model, batch, nll, v),
        "double_backward": lambda: double_backward(model, batch, v),
    }  # fmt: skip


def agreement(calls):
    """Relative differences: scores to the loop, Hessian product to double backward."""
    scores, loop = calls["jvp_scores"](), calls["per_example"]()
    ours, theirs = calls["hvp"](), calls["double_backward"]()
    off = {n: h - t for (n, h), t in zip(ours.items(), theirs, strict=True)}
    return ((scores - loop).norm() / loop.norm()).item(), (norm(off) / norm(ours)).item()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name", ["step", "forward", "jvp_scores", "per_example", "hvp", "ggnvp", "double_backward"]
)
def test_scan(benchmark, name, lora):
    _, _, calls = make_calls(lora)
    benchmark.extra_info["peak_mb"] = round(peak_mb(calls[name]), 1)
    step = interleaved({"step": calls["step"]}, rounds=3)["step"]
    benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
    benchmark.extra_info["steps"] = round(benchmark.stats["median"] / step, 2)


def table(rounds=9):
    low, high = LENGTHS
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {ROWS} rows of {low}-{high} tokens")
    for lora in (False, True):
        model, _, calls = make_calls(lora)
        times = interleaved(calls, rounds)
        count, every = sum(p.numel() for p in trainable(model).values()), model.num_parameters()
        print(f"{'LoRA' if lora else 'full'}: {count} trainable of {every} parameters")
        for name, call in calls.items():
            seconds = times[name]
            print(
                f"  {name:16s} {seconds * 1e3:8.1f} ms  {seconds / times['step']:5.2f} steps  "
                f"{peak_mb(call):7.1f} MB  {ROWS / seconds:8.0f} rows/s",
                flush=True,
            )
        scores, product = agreement(calls)
        print(
            f"  per_example / jvp_scores {times['per_example'] / times['jvp_scores']:.2f} "
            f"(scores agree to {scores:.1e});  double_backward / hvp "
            f"{times['double_backward'] / times['hvp']:.2f} (agree to {product:.1e})",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
