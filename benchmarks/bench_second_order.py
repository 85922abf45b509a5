"""Hessian and Gauss-Newton products and scores of whole models over one gradient: time, peak
memory, error against float64, beside other ways to the same numbers.

    python benchmarks/bench_second_order.py [--model gpt2 llama] [--t 512 1024] [--rounds 5]
        [--only hvp ggn scores gradient] [--skip NAME ...] [--vocab 8192] [--size small|1b]
        [--dtype float32] [--no-reference] [--head]

`x time`: median CPU time (GPU: time) over that of a gradient run in turn with it. `x held`: tensors
at their highest over the gradient's; `x rss`: the same of resident memory beyond what was held
before, libraries' scratch included. `error`: relative difference to float64 reverse mode, of the
whole and of the worst parameter tensor. `--head`: memory of the loss head alone and of the whole
product at growing vocabularies.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _measure import held_mb, peak_mb, ratio, returned_blocks
from _second_order import DEVICE, SIZES, Problem, Setting, doubled, errors, references
from _second_order_ways import WAYS, Way, unit

from u2a_kernels import dual_linear_cross_entropy

COLUMNS = f"{'':40}{'x time':>8}{'s':>8}{'x held':>8}{'MB':>6}{'x rss':>7}{'MB':>6}" + (
    f"{'error':>10}{'worst':>9}"
)
VOCABULARIES = (8192, 32768, 131072)


@cache
def truth(s: Setting) -> dict[str, Any]:
    return references(doubled(Problem.of(s, "sdpa")))


def reason(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"raises {type(error).__name__}: {said[0] if said else ''}"[:90]


def peak(call: Callable[[], Any]) -> float:
    """Of a call that has run before."""
    with returned_blocks():
        return peak_mb(call, warm=False)


def memory(call: Callable[[], Any]) -> tuple[float, float]:
    """MB: tensors held, resident memory."""
    return held_mb(call), peak(call)


def measure(way: Way, s: Setting, rounds: int, base: tuple[float, float], want: Any) -> str:
    if way.missing:
        return f"{way.name:40}{way.needs} not installed"
    try:
        call = way.make(s)
        found = call()
    except Exception as error:
        return f"{way.name:40}{reason(error)}"
    off = errors(found, want[way.of]) if want else None
    del found
    held, rss = memory(call)
    times, seconds = ratio(call, unit(s), rounds) if rounds else (float("nan"),) * 2
    told = f"{off[0]:10.1e}{off[1]:9.1e}" if off else f"{'-':>10}"
    return f"{way.name:40}{times:8.2f}{seconds:8.2f}" + (
        f"{held / base[0]:8.2f}{held:6.0f}{rss / base[1]:7.2f}{rss:6.0f}{told}"
    )


def table(s: Setting, rounds: int, ways: list[Way], reference: bool) -> None:
    print(f"\n{s}; {DEVICE}", flush=True)
    want = truth(s) if reference else None
    base = memory(unit(s))
    print(COLUMNS)
    for way in ways:
        print(measure(way, s, rounds, base, want), flush=True)
        gc.collect()


def head_calls(n: int, d: int, vocab: int) -> dict[str, Callable[[], Any]]:
    """The loss head alone, its weight frozen as with LoRA: [n, d] and its tangent to their
    adjoints."""
    h, h_t = (torch.randn(n, d, device=DEVICE) for _ in range(2))
    w = torch.randn(vocab, d, device=DEVICE) / d**0.5
    y = torch.randint(vocab, (n,), device=DEVICE)
    both, x = torch.cat([h, h_t]).requires_grad_(), h.clone().requires_grad_()

    def ours(mode: str) -> None:
        loss_t = dual_linear_cross_entropy(both, w, y, mode=mode)[1]
        if mode != "jvp":
            torch.autograd.grad(loss_t.sum(), both)

    def once() -> None:
        torch.autograd.grad(F.cross_entropy(x @ w.T, y), x)

    def twice() -> None:
        (g,) = torch.autograd.grad(F.cross_entropy(x @ w.T, y), x, create_graph=True)
        torch.autograd.grad(g, x, h_t)

    modes = {f"u2a {m}": (lambda m=m: ours(m)) for m in ("hvp", "ggn", "jvp")}
    return {"torch gradient": once, "torch double backward": twice} | modes


def peak_of(call: Callable[[], Any]) -> float:
    call()
    return peak(call)


def head_table(t: int, size: str) -> None:
    n, d = 2 * (t - 1), SIZES[size]["d"]
    print(f"\nloss head alone, {n} positions, d={d}, frozen weight: peak MB; {DEVICE}")
    print(f"{'':40}" + "".join(f"{f'V={v}':>12}" for v in VOCABULARIES))
    found = {v: {k: peak_of(c) for k, c in head_calls(n, d, v).items()} for v in VOCABULARIES}
    for name in found[VOCABULARIES[0]]:
        cells = "".join(f"{found[v][name]:12.1f}" for v in VOCABULARIES)
        print(f"{name:40}{cells}", flush=True)
    print(f"whole model, Llama LoRA, T={t}: peak MB")
    names = ("gradient, SDPA, full logits (the unit)", "u2a.hvp", "u2a.ggnvp", "u2a.jvp_scores")
    for way in (w for w in WAYS if w.name in names):
        cells = [peak_of(way.make(Setting("llama", t, v, size))) for v in VOCABULARIES]
        print(f"{way.name:40}" + "".join(f"{mb:12.0f}" for mb in cells), flush=True)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.name)
def test_second_order(benchmark, way, model):
    s = Setting(model, 128, 1024)
    if way.missing:
        pytest.skip(f"{way.needs} not installed")
    try:
        call = way.make(s)
        found = call()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(reason(error))
    benchmark.extra_info.update(error=errors(found, truth(s)[way.of])[0], peak_mb=peak(call))
    benchmark.extra_info["gradients"] = ratio(call, unit(s), 3)[0]
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", nargs="+", default=["llama", "gpt2"], choices=["llama", "gpt2"])
    parser.add_argument("--t", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--rounds", type=int, default=5, help="0: memory only")
    parser.add_argument("--only", nargs="+", default=["gradient", "hvp", "ggn", "scores"])
    parser.add_argument("--skip", nargs="*", default=[], help="parts of names of ways to leave out")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-reference", action="store_true", help="no float64, no errors")
    parser.add_argument("--head", action="store_true", help="memory of the loss head alone")
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    if a.head:
        return head_table(a.t[0], a.size)
    ways = [w for w in WAYS if w.of in a.only and not any(x in w.name for x in a.skip)]
    for t in a.t:
        for model in a.model:
            s = Setting(model, t, a.vocab, a.size, a.dtype)
            table(s, a.rounds, ways, not a.no_reference)


if __name__ == "__main__":
    main()
