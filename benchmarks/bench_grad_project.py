"""grad_project against plain torch: both projections by GEMM, then a batched product of examples.

`floor`: the larger of bytes / copy bandwidth and operations / rate of a large GEMM, both measured.
`python benchmarks/bench_grad_project.py [threads] [dtype]` prints interleaved medians.
"""

import sys
from functools import partial

import pytest
import torch
from _measure import copy_gb_s, gemm_gflop_s, interleaved, peak_mb

import u2a_kernels
from u2a_kernels import Rademacher
from u2a_kernels.testing import offsets_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32

# examples, tokens each, d_in, d_out, k; k_in = d_in: x comes projected, p_in is None
SHAPES = {
    "projected-d256-k16": (32, 128, 16, 256, 16),
    "projected-d1024-k16": (32, 128, 16, 1024, 16),
    "small-256x1024-k16": (32, 128, 256, 1024, 16),
}
LAYERS = {"gpt2": (8, 768, 3072), "1b": (4, 2048, 5632), "8b": (2, 4096, 14336)}
for layer, (examples, d_in, d_out) in LAYERS.items():
    for k in (16, 64):
        batch = (64, 512) if CUDA else (examples, 256)
        SHAPES[f"{layer}-{d_in}x{d_out}-k{k}"] = (*batch, d_in, d_out, k)


def plain(x, g, offsets, p_in, p_out):
    """The examples have equal lengths, as plain torch needs it for one batched product."""
    b = offsets.shape[0] - 1
    left, right = g @ p_out.T, x if p_in is None else x @ p_in.T
    return left.view(b, -1, left.shape[1]).mT @ right.view(b, -1, right.shape[1])


def formed(x, g, offsets, p_in, p_out):
    """Every example's gradient first."""
    b = offsets.shape[0] - 1
    grad = g.view(b, -1, g.shape[1]).mT @ x.view(b, -1, x.shape[1])
    return p_out @ (grad if p_in is None else grad @ p_in.T)


def seeded(x, g, offsets, p_in, p_out):
    in_ = None if p_in is None else Rademacher(p_in.shape[0], 1)
    return u2a_kernels.grad_project(x, g, offsets, in_, Rademacher(p_out.shape[0], 2))


IMPLEMENTATIONS = {
    "u2a": u2a_kernels.grad_project,
    "u2a seed": seeded,
    "torch": plain,
    "torch formed": formed,
}


def make(shape, dtype):
    b, t, d_in, d_out, k = SHAPES[shape]
    x, g, p_in, p_out = (
        torch.randn(*s, device=DEVICE).to(dtype)
        for s in ((b * t, d_in), (b * t, d_out), (k, d_in), (k, d_out))
    )
    p_in = None if shape.startswith("projected") else p_in
    return dict(x=x, g=g, offsets=offsets_of([t] * b).to(DEVICE), p_in=p_in, p_out=p_out)


def cost(shape, dtype):
    """Bytes that must be moved and operations that must be done."""
    b, t, d_in, d_out, k = SHAPES[shape]
    projected = 0 if shape.startswith("projected") else d_in * k
    read = b * t * (d_in + d_out) + projected + d_out * k
    return read * dtype.itemsize + 4 * b * k * k, 2 * b * t * (projected + d_out * k + k * k)


def floor(shape, dtype):
    moved, operations = cost(shape, dtype)
    return max(moved / copy_gb_s(), operations / gemm_gflop_s(dtype)) / 1e9


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grad_project(benchmark, name, shape):
    call = partial(IMPLEMENTATIONS[name], **make(shape, DTYPE))
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
    seconds, (moved, operations) = benchmark.stats["median"], cost(shape, DTYPE)
    benchmark.extra_info["gb_s"] = round(moved / seconds / 1e9, 1)
    benchmark.extra_info["gflop_s"] = round(operations / seconds / 1e9, 1)
    benchmark.extra_info["floors"] = round(seconds / floor(shape, DTYPE), 2)


def table(dtype=DTYPE, rounds=15):
    print(
        f"{torch.get_num_threads()} thread(s), {DEVICE}, {dtype}; copy {copy_gb_s():.1f} GB/s, "
        f"GEMM {gemm_gflop_s(dtype):.0f} GFLOP/s; ms (floors, peak MB)"
    )
    for shape in SHAPES:
        args = make(shape, dtype)
        calls = {k: partial(f, **args) for k, f in IMPLEMENTATIONS.items()}
        times = interleaved(calls, rounds)
        least = floor(shape, dtype)
        cells = [
            f"{k} {times[k] * 1e3:.2f} ({times[k] / least:.2f}, {peak_mb(c):.1f} MB)"
            for k, c in calls.items()
        ]
        best = min(times["torch"], times["torch formed"])
        ratios = "  ".join(f"torch/{k} {best / times[k]:.2f}" for k in ("u2a", "u2a seed"))
        print(f"{shape:<21} {'  '.join(cells)}  {ratios}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table(getattr(torch, sys.argv[2]) if len(sys.argv) > 2 else DTYPE)
