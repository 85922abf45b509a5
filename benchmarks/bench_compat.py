"""`u2a_kernels.compat` against eager torch under double backward and torch.func: time and memory.

    python benchmarks/bench_compat.py [T ...] [--rounds 5]

For code that differentiates by itself: the whole of gradient and second order of a sum of cubes of
the function's output, by the same lines for both. Eager: torch's own function, for attention the
MATH backend of F.scaled_dot_product_attention, for the loss head F.cross_entropy of all logits.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _measure import clocks, peak_mb, ratio
from torch import Tensor
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from u2a_kernels import compat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (2048, 8192) if DEVICE == "cuda" else (128, 256, 512, 1024)
ROWS, HEADS, HEAD_DIM, WIDTH, INNER, VOCAB = 2, 4, 64, 256, 688, 8192
Function = Callable[..., Tensor]


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass(frozen=True)
class Pair:
    ours: Function
    eager: Function
    shapes: Callable[[int], list[tuple[int, ...]]]
    labels: bool = False


def _rows(*widths: int) -> Callable[[int], list[tuple[int, ...]]]:
    return lambda t: [(ROWS * t, w) for w in widths]


FUNCTIONS = {
    "attention": Pair(
        lambda q, k, v: compat.scaled_dot_product_attention(q, k, v, is_causal=True),
        _math,
        lambda t: [(ROWS, HEADS, t, HEAD_DIM)] * 3,
    ),
    "rms_norm": Pair(
        compat.rms_norm,
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        lambda t: [(ROWS * t, WIDTH), (WIDTH,)],
    ),
    "layer_norm": Pair(
        compat.layer_norm,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        lambda t: [(ROWS * t, WIDTH), (WIDTH,), (WIDTH,)],
    ),
    "swiglu": Pair(compat.swiglu, lambda a, b: F.silu(a) * b, _rows(INNER, INNER)),
    "geglu": Pair(compat.geglu, lambda a, b: F.gelu(a) * b, _rows(INNER, INNER)),
    "gelu": Pair(compat.gelu, F.gelu, _rows(INNER)),
    "loss head": Pair(
        compat.linear_cross_entropy,
        lambda h, w, y: F.cross_entropy(h @ w.T, y, reduction="none"),
        lambda t: [(ROWS * t, WIDTH), (VOCAB, WIDTH)],
        labels=True,
    ),
}


def inputs(pair: Pair, t: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(points, directions, labels)."""
    generator = torch.Generator().manual_seed(0)
    xs, vs = (
        [(torch.randn(s, generator=generator) / s[-1] ** 0.25).to(DEVICE) for s in pair.shapes(t)]
        for _ in range(2)
    )
    y = torch.randint(VOCAB, (ROWS * t,), generator=generator).to(DEVICE)
    return xs, vs, [y] if pair.labels else []


def calls(f: Function, pair: Pair, t: int) -> dict[str, Callable[[], Any]]:
    xs, vs, labels = inputs(pair, t)
    leaves = [x.clone().requires_grad_() for x in xs]

    def total(*xs: Tensor) -> Tensor:
        return (f(*xs, *labels) ** 3).sum()

    def twice() -> Any:
        first = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, vs)

    gradient = grad(total, tuple(range(len(xs))))
    return {
        "gradient": lambda: torch.autograd.grad(total(*leaves), leaves),
        "double backward": twice,
        "jvp of grad": lambda: jvp(gradient, tuple(xs), tuple(vs))[1],
    }


def agreement(a: Any, b: Any) -> float:
    """Largest relative difference of a tensor."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


def table(lengths: list[int], rounds: int) -> None:
    print(f"B={ROWS}, H={HEADS}, D={HEAD_DIM}, d={WIDTH}, d_mlp={INNER}, V={VOCAB}; {DEVICE}")
    print("time: compat over eager; CPU (or device) ms and peak MB: compat, eager; differ: results")
    print(f"{'':28}{'T':>6}{'time':>7}{'ms':>9}{'ms':>9}{'MB':>8}{'MB':>8}{'differ':>9}")
    for name, pair in FUNCTIONS.items():
        for how in ("gradient", "double backward", "jvp of grad"):
            for t in lengths:
                ours, eager = (calls(f, pair, t)[how] for f in (pair.ours, pair.eager))
                off = agreement(ours(), eager())
                mb = [peak_mb(c, warm=False) for c in (ours, eager)]
                spent = [(clocks(ours)[0], clocks(eager)[0]) for _ in range(rounds)]
                ms = [1e3 * statistics.median(column) for column in zip(*spent, strict=True)]
                print(
                    f"{f'{name}, {how}':28}{t:6}{ms[0] / ms[1]:7.2f}{ms[0]:9.1f}{ms[1]:9.1f}"
                    f"{mb[0]:8.0f}{mb[1]:8.0f}{off:9.0e}",
                    flush=True,
                )


@pytest.mark.parametrize("how", ["gradient", "double backward", "jvp of grad"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compat(benchmark, name, how):
    pair = FUNCTIONS[name]
    ours, eager = (calls(f, pair, LENGTHS[0])[how] for f in (pair.ours, pair.eager))
    benchmark.extra_info.update(differ=agreement(ours(), eager()), peak_mb=peak_mb(ours))
    benchmark.extra_info["over_eager"] = ratio(ours, eager, 5)[0]
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("t", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table(arguments.t, arguments.rounds)
