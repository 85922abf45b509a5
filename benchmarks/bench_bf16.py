"""Relative errors of bf16 second-order products against float64 at the same bf16 weights: a small
model trained on text, a random direction and that of the gradient.

    python benchmarks/bench_bf16.py [steps]

The bf16 gradient's own error is the measure of what can be asked. Central differences are given at
their best step, which nobody knows beforehand, and half a decade and a decade beside it; steps move
the parameters by a share of their norm.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from _second_order import (
    DEVICE,
    Problem,
    Setting,
    draw,
    errors,
    make_base,
    nll,
    references,
    with_lora,
)
from _trained import make_rows
from torch import Tensor, nn

from u2a.linearize import linearize
from u2a.products import ggnvp, gradient, hvp
from u2a.tree import Tree, norm, trainable

LENGTH, ROWS, BATCH, RATE = 64, 16, 16, 2e-3
STEPS = 200
SHARES = [10 ** (-k / 2) for k in range(9)]


def blocks() -> tuple[Tensor, int]:
    """The corpus as `[N, LENGTH]` ids, and the size of the vocabulary."""
    tokenizer, rows, *_ = make_rows()
    ids = list(chain.from_iterable((*r.prompt_ids, *r.answer_ids) for r in rows))
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH), len(tokenizer)


def train(model: nn.Module, data: Tensor, steps: int) -> float:
    """Mean loss per token of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        ids = data[torch.randint(len(data), (BATCH,))].to(DEVICE)
        loss = Problem(model, ids, {}).loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@cache
def trained(name: str, steps: int, seed: int = 0) -> tuple[nn.Module, Tensor, float]:
    """A bf16 model, held-out ids it is asked about, and the loss its training reached."""
    data, vocab = blocks()
    data = data.roll(-seed * ROWS, 0)
    model = make_base(Setting(name, LENGTH, vocab), seed).to(DEVICE)
    reached = train(model, data[ROWS:], steps)
    if name == "llama":
        model = with_lora(model)
    return model.to(DEVICE, torch.bfloat16).eval(), data[:ROWS], reached


def directions(model: nn.Module, ids: Tensor) -> dict[str, Tree]:
    """bf16 values, hence the same in float64."""
    at_random = draw(trainable(model), torch.Generator().manual_seed(2))
    return {"random": at_random, "gradient": Problem(model, ids, {}).gradient()}


def truth(p: Problem) -> dict[str, Any]:
    model = copy.deepcopy(p.model).double()
    return references(Problem(model, p.ids, {n: t.double() for n, t in p.v.items()}))


def _twice(p: Problem) -> Tree:
    q = Problem(p.model, p.ids, p.v, "eager")
    leaves = list(q.params.values())
    first = torch.autograd.grad(q.loss(), leaves, create_graph=True)
    return q.named(torch.autograd.grad(first, leaves, list(q.v.values())))


WAYS: dict[str, tuple[str, Callable[[Problem], Tree]]] = {
    "gradient, SDPA": ("gradient", lambda p: Problem(p.model, p.ids, p.v, "sdpa").gradient()),
    "u2a.gradient": ("gradient", lambda p: gradient(p.model, p.batch, nll)),
    "u2a.hvp": ("hvp", lambda p: hvp(p.model, p.batch, nll, p.v)),
    "u2a.linearize hvp": (
        "hvp", lambda p: linearize(p.model, p.batch, nll, mode="hvp").matvec(p.v),
    ),
    "double backward, eager": ("hvp", _twice),
    "u2a.ggnvp": ("ggn", lambda p: ggnvp(p.model, p.batch, nll, p.v)),
    "u2a.linearize ggn": (
        "ggn", lambda p: linearize(p.model, p.batch, nll, mode="ggn").matvec(p.v),
    ),
}  # fmt: skip


def normalised(v: Tree) -> Tree:
    """Products are linear in v; |v| = |ones| keeps bf16 tangents in the middle of their range."""
    size = float(norm(v)) / sum(t.numel() for t in v.values()) ** 0.5
    return {n: (t / size).to(t) for n, t in v.items()}


def central(p: Problem, want: Tree) -> Iterator[tuple[float, float]]:
    """(error, share of the parameters' norm that the step is)."""
    q = Problem(p.model, p.ids, p.v, "sdpa")
    for share in SHARES:
        yield errors(q.central(share), want)[0], share


def differences(p: Problem, want: Tree) -> str:
    found = list(central(p, want))
    best = min(range(len(found)), key=lambda i: found[i][0])
    around = [i for i in (best - 2, best - 1, best, best + 1, best + 2) if 0 <= i < len(found)]
    return ", ".join(f"{100 * found[i][0]:.2f} % at {found[i][1]:.0e}" for i in around)


def problems(name: str, steps: int, seed: int = 0) -> Iterator[tuple[str, Problem]]:
    model, ids, _ = trained(name, steps, seed)
    for kind, v in directions(model, ids).items():
        yield kind, Problem(model, ids, normalised(v))


def table(name: str, steps: int) -> None:
    reached = trained(name, steps)[2]
    what = "GPT-2, full parameters" if name == "gpt2" else "Llama, LoRA r=8"
    print(f"\n{what}, d=256, L=4, bf16, {steps} steps of training to a loss of {reached:.2f}")
    print(f"{'':28}{'direction':>12}{'error':>10}{'worst tensor':>14}")
    for kind, p in problems(name, steps):
        want = truth(p)
        for way, (of, call) in WAYS.items():
            whole, worst = errors(call(p), want[of])
            print(f"{way:28}{kind:>12}{100 * whole:8.2f} %{100 * worst:12.2f} %", flush=True)
        print(f"{'central differences, SDPA':28}{kind:>12}  {differences(p, want['hvp'])}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bf16(benchmark, name, way):
    _, p = next(problems(name, 50))
    of, call = WAYS[way]
    benchmark.extra_info["error"] = errors(call(p), truth(p)[of])[0]
    benchmark.pedantic(lambda: call(p), rounds=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_name in ("gpt2", "llama"):
        table(model_name, int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
