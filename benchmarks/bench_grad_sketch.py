"""grad_sketch of every kind against its best formulations in plain torch and against the floor.

The floor of a case is the larger of its bytes over the copy bandwidth and its operations over the
GEMM rate. Bytes: x and g once, the result. Operations, with T tokens an example: tensorsketch
d_in + d_out + 2 k log2 k adds a token; sjlt 2 d_in d_out a token and 2 d_in d_out an example;
rademacher 2 d_in d_out a token and 2 k d_in d_out an example.

The CUDA kernel on paper, per token of a 4096 x 14336 layer in bf16 with k = 4096, on 132
multiprocessors at 1.75 GHz: x and g are 37 KB, 8.6 ns at 4.3 TB/s; 125 k adds on 128 lanes a
multiprocessor, 4.2 ns; shared memory moves 128 KB for the transforms and 74 KB for the rows, 6.8 ns
at 30 TB/s. The bucket table (18 432 entries, 8 194 starts) is 107 KB, read for every token: 19 ns
from the L2 cache at 5.5 TB/s, less where the L1 cache keeps it. So the table is the bound; two
tokens a pass over it would halve that for 32 more registers a thread. Not measured, no GPU yet.

`python benchmarks/bench_grad_sketch.py [threads]` prints interleaved medians.
"""

import math
import sys
from functools import partial

import pytest
import torch
from _measure import copy_gb_s, gemm_gflop_s, interleaved, peak_mb

import u2a_kernels
from u2a_kernels._segments import segment_sum
from u2a_kernels.ops.grad_sketch.maps import _Entries, _Factor
from u2a_kernels.testing import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LAYERS = {
    "demo": (256, 768),
    "demo square": (256, 256),
    "GPT-2": (768, 3072),
    "1B": (2048, 5632),
    "8B": (4096, 14336),
}
# kind, layer, B, T, k
CASES = [
    ("tensorsketch", "demo", 8, 128, 1024),
    ("tensorsketch", "demo", 8, 128, 4096),
    ("tensorsketch", "demo square", 8, 128, 4096),
    ("tensorsketch", "demo", 4, 128, 65536),
    ("tensorsketch", "GPT-2", 4, 64, 4096),
    ("tensorsketch", "1B", 2, 32, 4096),
    ("tensorsketch", "8B", 2, 16, 4096),
    ("rows", "GPT-2", 8, 64, 4096),
    ("sjlt", "demo", 8, 128, 4096),
    ("sjlt", "GPT-2", 4, 64, 4096),
    ("sjlt", "1B", 2, 32, 65536),
    ("rademacher", "demo square", 8, 64, 1024),
]


def make(kind, layer, b, t, k):
    d_in, d_out = LAYERS[layer]
    x = torch.randn(b * t, d_in, device=DEVICE, dtype=DTYPE)
    if kind == "rows":
        g = torch.randint(50257, (b * t,), device=DEVICE)
    else:
        g = torch.randn(b * t, d_out, device=DEVICE, dtype=DTYPE)
    return dict(x=x, g=g, offsets=offsets_of([t] * b).to(DEVICE), k=k, seed=1)


def factors(x, g, k):
    return _Factor(1, 1, x.shape[1], k, x), _Factor(1, 0, g.shape[1], k, g)


def by_transform(x, g, offsets, k, seed):
    """index_add into buckets, Walsh-Hadamard by reshapes, product, segment sum."""
    f_in, f_out = factors(x, g, k)
    return lambda: segment_sum(f_in.apply(x) * f_out.apply(g), offsets) * k**-0.5


def by_gemm(x, g, offsets, k, seed):
    """GEMMs with the +-1 matrices [k, d], which are made beforehand and kept."""
    p_in, p_out = (f.transpose(torch.eye(k, device=x.device)).to(x.dtype) for f in factors(x, g, k))
    return lambda: segment_sum((x @ p_in.T) * (g @ p_out.T), offsets) * k**-0.5


def by_gradient(x, g, offsets, k, seed, dense):
    """A gradient per example; one index_add with a kept table, or a GEMM with kept signs."""
    d_in, d_out, b = x.shape[1], g.shape[1], len(offsets) - 1
    entries = _Entries(2 if dense else 1, seed, d_in, k, x)
    label = torch.arange(d_out, device=x.device)
    x, g = x.view(b, -1, d_in), g.view(b, -1, d_out)
    if dense:
        blocks = [entries.signs(label, j).flatten(0, 1) for j in range(k // entries.width)]
        signs = torch.cat(blocks, 1)
        return lambda: (g.mT @ x).flatten(1).float() @ signs * k**-0.5
    word = entries.words(label).flatten()
    bucket, sign = word & (k - 1), 1.0 - 2.0 * (word >> 31)

    def call():
        out = x.new_zeros(b, k, dtype=torch.float32)
        return out.index_add_(1, bucket, (g.mT @ x).flatten(1) * sign)

    return call


def by_row(x, g, offsets, k, seed):
    """One-hot g: index_add of every token's row into its example's buckets, one transform."""
    args = (x, g, offsets, k, seed, 0)
    return partial(u2a_kernels.ops.grad_sketch.reference_rows, *args)


def calls(case):
    kind, _, b, _, k = case
    args = make(*case)
    name = "tensorsketch" if kind == "rows" else kind
    yield "u2a", partial(u2a_kernels.grad_sketch, **args, kind=name)
    if kind == "rows":
        yield "torch rows", by_row(**args)
    elif kind == "tensorsketch":
        yield "torch transform", by_transform(**args)
        if k * (args["x"].shape[1] + args["g"].shape[1]) <= 1 << 25:
            yield "torch GEMM", by_gemm(**args)
    else:
        yield "torch gradient", by_gradient(**args, dense=kind == "rademacher")


def floor(case, copy, gemm):
    """Seconds, and which of the two bounds them."""
    kind, layer, b, t, k = case
    d_in, d_out = LAYERS[layer]
    size = torch.empty(0, dtype=DTYPE).element_size()
    width = d_in + (0 if kind == "rows" else d_out)
    formed = 2 * d_in * d_out
    operations = {
        "tensorsketch": b * t * (width + 2 * k * math.log2(k) + 2 * k),
        "rows": b * (t * width + k * math.log2(k)),
        "sjlt": b * (t + 1) * formed,
        "rademacher": b * (t + k) * formed,
    }[kind]
    bounds = {"copy": (b * t * width * size + 4 * b * k) / copy, "GEMM": operations / gemm}
    bound = max(bounds, key=bounds.get)
    return bounds[bound] * 1e-9, bound


def label(case):
    kind, layer, b, t, k = case
    return f"{kind}-{layer.replace(' ', '-')}-B{b}-T{t}-k{k}"


@pytest.fixture(scope="module")
def rates():
    return copy_gb_s(), gemm_gflop_s(DTYPE)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_grad_sketch(benchmark, case, number, rates):
    some = list(calls(case))
    if number >= len(some):
        pytest.skip("no further formulation")
    name, call = some[number]
    benchmark.extra_info["implementation"] = name
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    seconds, bound = floor(case, *rates)
    benchmark.extra_info[f"x {bound} floor"] = round(benchmark.stats["median"] / seconds, 2)


def table(rounds=5):
    rates = copy_gb_s(), gemm_gflop_s(DTYPE)
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}; copy {rates[0]:.1f} GB/s")
    print(f"GEMM {rates[1]:.0f} GFLOP/s; us per token (times the floor, peak MB)")
    for case in CASES:
        some = dict(calls(case))
        times = interleaved(some, rounds)
        seconds, bound = floor(case, *rates)
        tokens = case[2] * case[3]
        cells = [
            f"{name} {times[name] / tokens * 1e6:.2f} ({times[name] / seconds:.1f} {bound}, "
            f"{peak_mb(call):.0f} MB)"
            for name, call in some.items()
        ]
        best = min(t for name, t in times.items() if name != "u2a")
        ratio = best / times["u2a"]
        print(f"{label(case):40} {'  '.join(cells)}  best torch/u2a {ratio:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
