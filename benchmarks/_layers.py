"""Linear layers of models, as the grad_* benchmarks meet them, and the floor a call cannot beat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from _measure import Call, copy_gb_s, gemm_gflop_s, interleaved, peak_mb
from torch import Tensor

from u2a_kernels.testing import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GPU = DEVICE == "cuda"


@dataclass(frozen=True)
class Layer:
    """b examples of t tokens each."""

    model: str
    b: int
    t: int
    d_in: int
    d_out: int

    def __str__(self) -> str:
        return f"{self.model}-{self.b}x{self.t}-{self.d_in}x{self.d_out}"

    @property
    def n(self) -> int:
        return self.b * self.t

    @property
    def d(self) -> int:
        return self.d_in * self.d_out

    def make(self) -> tuple[Tensor, Tensor, Tensor]:
        x, g = (randn(self.n, d) for d in (self.d_in, self.d_out))
        return x, g, offsets_of([self.t] * self.b).to(DEVICE)

    def batched(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(self.b, self.t, self.d_in), g.view(self.b, self.t, self.d_out)

    def formed(self, x: Tensor, g: Tensor) -> Tensor:
        """All gradients, [b, d_out, d_in], in plain torch."""
        xs, gs = self.batched(x, g)
        return torch.bmm(gs.mT, xs)


GPT2, MLP = Layer("gpt2", 32, 128, 768, 768), Layer("gpt2", 32, 128, 768, 3072)
LAYERS = (
    [
        Layer("gpt2", 64, 1024, 768, 3072),
        Layer("1b", 32, 1024, 2048, 5632),
        Layer("8b", 16, 512, 4096, 14336),
    ]
    if GPU
    else [GPT2, MLP, Layer("1b", 8, 128, 2048, 5632), Layer("8b", 4, 64, 4096, 14336)]
)
SHORT = Layer("gpt2", 1024 if GPU else 128, 16, 768, 768)
LONG = Layer("gpt2", 16, 2048, 768, 768) if GPU else Layer("gpt2", 2, 1024, 768, 768)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


@functools.cache
def rates() -> tuple[float, float]:
    return copy_gb_s(), gemm_gflop_s(DTYPE)


def floor_seconds(elements: float, flops: float) -> float:
    """The slower of moving so many elements at copy bandwidth and computing at GEMM's rate."""
    copy, gemm = rates()
    return max(elements * DTYPE.itemsize / copy, flops / gemm) / 1e9


Calls = Mapping[str, Call]


def table(cases: Mapping[str, Callable[[], tuple[Calls, float]]], rounds: int = 11) -> None:
    """Interleaved medians: ms (multiple of the floor, peak MB), and the best torch over ours.

    Ours and the best torch are timed against each other alone: a way that fills gigabytes would
    leave the next one in the round a cold cache.
    """
    copy, gemm = rates()
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}; ", end="")
    print(f"copy {copy:.1f} GB/s, GEMM {gemm:.0f} GFLOP/s; ms (x floor, peak MB)")
    for label, make in cases.items():
        calls, floor = make()
        times = interleaved(dict(calls), 2)
        best = min((k for k in calls if k != "u2a"), key=lambda k: times[k])
        times |= interleaved({k: calls[k] for k in ("u2a", best)}, rounds)
        cells = [
            f"{k} {times[k] * 1e3:.2f} ({times[k] / floor:.1f}x, {peak_mb(c):.0f})"
            for k, c in calls.items()
        ]
        ratio = times[best] / times["u2a"]
        print(f"{label}: {'  '.join(cells)}  {best}/u2a {ratio:.2f}", flush=True)


def benchmarked(benchmark, calls: Calls, floor: float, name: str) -> None:
    """One call under pytest-benchmark, with its memory and its multiple of the floor."""
    benchmark.extra_info["peak_mb"] = round(peak_mb(calls[name]), 1)
    benchmark.pedantic(calls[name], rounds=5, warmup_rounds=1)
    benchmark.extra_info["floors"] = round(benchmark.stats["median"] / floor, 2)
