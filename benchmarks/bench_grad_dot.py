"""grad_dot against plain torch: project all rows then reduce, and one gradient per example.

`gemms` is the time over that of one x V^T, which every way needs.
`python benchmarks/bench_grad_dot.py [threads]` prints interleaved medians.
"""

import sys
from functools import partial

import pytest
import torch
from _measure import interleaved, peak_mb

import u2a_kernels
from u2a_kernels.ops.grad_dot import reference
from u2a_kernels.testing import offsets_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOKENS = 64
SHAPES = [(65536, 4096)] if DEVICE == "cuda" else [(4096, 512), (4096, 1024)]


def plain(x, g, offsets, v):
    token = ((x @ v.T) * g).sum(-1)
    return token.view(-1, TOKENS).sum(1)


def per_example(x, g, offsets, v):
    xs, gs = x.view(-1, TOKENS, x.shape[1]), g.view(-1, TOKENS, g.shape[1])
    return torch.stack([(v * (b.T @ a)).sum() for a, b in zip(xs, gs, strict=True)])


def from_reference(x, g, offsets, v):
    return reference(x, g, offsets, v[None], True)[:, 0]


IMPLEMENTATIONS = {
    "u2a": u2a_kernels.grad_dot,
    "torch": plain,
    "torch per example": per_example,
    "reference": from_reference,
}


def make(n, d):
    x, g, v = (torch.randn(m, d, device=DEVICE, dtype=DTYPE) for m in (n, n, d))
    return dict(x=x, g=g, offsets=offsets_of([TOKENS] * (n // TOKENS)).to(DEVICE), v=v)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-d{}".format(*s))
def test_grad_dot(benchmark, name, shape):
    args = make(*shape)

    call = partial(IMPLEMENTATIONS[name], **args)
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    gemm = interleaved({"gemm": gemm_caller(args)}, rounds=3)["gemm"]
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
    n, d = shape
    seconds = benchmark.stats["median"]
    benchmark.extra_info["gflop_s"] = round(2 * n * d * d / seconds / 1e9, 1)
    benchmark.extra_info["gemms"] = round(seconds / gemm, 2)


def gemm_caller(args):
    return lambda: args["x"] @ args["v"].T


def table(rounds=9):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}; ms (gemms, peak MB)")
    for shape in SHAPES:
        args = make(*shape)
        calls = {k: partial(f, **args) for k, f in IMPLEMENTATIONS.items()}
        times = interleaved({**calls, "gemm": gemm_caller(args)}, rounds)
        cells = [
            f"{k} {times[k] * 1e3:.1f} ({times[k] / times['gemm']:.2f}, {peak_mb(c):.0f} MB)"
            for k, c in calls.items()
        ]
        ratio = times["torch"] / times["u2a"]
        print(f"{shape} {'  '.join(cells)}  torch/u2a {ratio:.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
