"""dual_linear and dual_lora_linear, forward and backward, against plain torch's double backward and
the products' floor.

`full`: W with a direction and a gradient; `lora`: W frozen, factors of rank 8 trained; `parts`: the
lora layer of one dual_linear for each factor, as peft writes it. `double`: forward, backward with a
graph and its backward on the primal half, with all that the layers around it need. `of gemm`: the
products of the algorithm, 8 units of 2 T d_in d_out when full and 4 with lora plus the skinny ones,
at the rate of a large square one.
`python benchmarks/bench_dual_linear.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import gemm_gflop_s, interleaved, peak_mb

from u2a_kernels import dual_linear, dual_lora_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = (  # tokens, d_in, d_out
    [(4096, 4096, 4096), (4096, 4096, 14336)]
    if DEVICE == "cuda"
    else [(512, 768, 768), (512, 768, 3072)]
)
RANK, SCALE = 8, 2.0
KINDS = ("full", "lora", "parts")


class Layer:
    def __init__(self, shape, dtype):
        t, d_in, d_out = shape

        def randn(*sizes):
            return torch.randn(sizes, device=DEVICE).div(sizes[-1] ** 0.5).to(dtype)

        self.x, self.w, self.w_t = randn(2 * t, d_in), randn(d_out, d_in), randn(d_out, d_in)
        self.a, self.b = randn(RANK, d_in), randn(d_out, RANK)
        self.a_t, self.b_t = randn(RANK, d_in), randn(d_out, RANK)
        self.grad = randn(2 * t, d_out)

    def leaves(self, kind, primal=False):
        x = self.x[: len(self.x) // 2] if primal else self.x
        trained = (self.w,) if kind == "full" else (self.a, self.b)
        return [t.detach().requires_grad_() for t in (x, *trained)]

    def dual(self, kind):
        def call():
            x, *p = leaves
            if kind == "full":
                y = dual_linear(x, p[0], self.w_t)
            elif kind == "lora":
                y = dual_lora_linear(x, self.w, *p, self.a_t, self.b_t, scale=SCALE)
            else:
                low = dual_linear(dual_linear(x, p[0], self.a_t), p[1], self.b_t)
                y = dual_linear(x, self.w) + low * SCALE
            return torch.autograd.grad(y, leaves, self.grad)

        leaves = self.leaves(kind)
        return call

    def double(self, kind):
        leaves = self.leaves(kind, primal=True)
        directions = [self.w_t] if kind == "full" else [self.a_t, self.b_t]
        directions = [self.x.chunk(2)[1], *directions]
        g_t, g = self.grad.chunk(2)
        g = g.detach().requires_grad_()  # the layer above needs y_t, the gradient to g

        def call():
            x, *p = leaves
            if kind == "full":
                y = F.linear(x, p[0])
            else:
                y = F.linear(x, self.w) + F.linear(F.linear(x, p[0]), p[1]) * SCALE
            first = torch.autograd.grad(y, leaves, g, create_graph=True)
            return torch.autograd.grad([*first, y], [g, *leaves], [*directions, g_t])

        return call


def operations(shape, kind):
    t, d_in, d_out = shape
    if kind == "full":
        return 8 * 2 * t * d_in * d_out
    return 4 * 2 * t * d_in * d_out + 8 * 2 * t * RANK * (d_in + d_out)


def calls_of(shape, dtype):
    layer = Layer(shape, dtype)
    calls = {kind: layer.dual(kind) for kind in KINDS}
    return calls | {f"double {kind}": layer.double(kind) for kind in ("full", "lora")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}-{}x{}".format(*s))
def test_dual_linear(benchmark, shape, dtype, kind):
    call = calls_of(shape, dtype)[kind]
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
    rate = operations(shape, kind) / benchmark.stats["median"] / 1e9
    benchmark.extra_info["gflop_s"] = round(rate, 1)
    benchmark.extra_info["of_gemm"] = round(rate / gemm_gflop_s(dtype), 2)


def table(rounds=7):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, rank {RANK}; milliseconds")
    for dtype in DTYPES:
        for shape in SHAPES:
            times = interleaved(calls_of(shape, dtype), rounds)
            cells = [f"{name} {1e3 * s:.1f}" for name, s in times.items()]
            for kind in ("full", "lora"):
                rate = operations(shape, kind) / times[kind] / 1e9
                cells.append(f"{kind} {rate / gemm_gflop_s(dtype):.2f} of gemm")
            print(f"{shape} {str(dtype).removeprefix('torch.'):9s}", ", ".join(cells))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
