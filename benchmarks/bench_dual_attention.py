"""dual_attention against torch's SDPA, forward and backward, on the primal half alone.

`over_sdpa` is time over that of SDPA's forward and backward (forward for jvp). Products of blocks,
2 T S D operations each, halved under a causal mask: SDPA 2 forward and 5 backward; jvp 6; ggn
6 + 5; hvp 6 + 15, so on equal footing 1.57 and 3 times SDPA, and jvp 3 times its forward. `gflop_s`
counts these, not what a kernel does again (`paper_dual.py` has both).
`python benchmarks/bench_dual_attention.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import interleaved, peak_mb

import u2a_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = (  # B, H, Hkv, T, D
    [(4, 32, 8, 2048, 128), (1, 32, 8, 8192, 128), (8, 16, 16, 2048, 64), (2, 8, 4, 4096, 256)]
    if DEVICE == "cuda"
    else [(64, 4, 4, 16, 32), (8, 4, 4, 128, 64), (2, 8, 8, 512, 64), (2, 8, 8, 1024, 64)]
)
PRODUCTS = {"hvp": 21, "ggn": 11, "jvp": 6, "hvp backward": 15, "ggn backward": 5}


def make(b, h, h_kv, t, d):
    q, k, v = (torch.randn(2 * b, n, t, d, device=DEVICE, dtype=DTYPE) for n in (h, h_kv, h_kv))
    return [x.requires_grad_() for x in (q, k, v)], torch.randn_like(q)


def called(attention, leaves, grad, mode):
    """The call that is timed: forward alone (jvp), backward alone, or both."""
    if mode.endswith("backward"):
        out = attention()
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def call():
        with torch.set_grad_enabled(mode != "jvp"):
            out = attention()
        return out if mode == "jvp" else torch.autograd.grad(out, leaves, grad)

    return call


def dual(leaves, grad, mode):
    def attention():
        return u2a_kernels.dual_attention(*leaves, mode=mode.split()[0])

    return called(attention, leaves, grad, mode)


def sdpa(leaves, grad, mode):
    half = len(grad) // 2
    primal = [x.detach()[:half].requires_grad_() for x in leaves]

    def attention():
        return F.scaled_dot_product_attention(*primal, is_causal=True, enable_gqa=True)

    return called(attention, primal, grad[:half], mode)


def operations(shape, mode):
    b, h, _, t, d = shape
    return PRODUCTS[mode] * b * h * t * t * d


@pytest.mark.parametrize("mode", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-Hkv{}-T{}-D{}".format(*s))
def test_dual_attention(benchmark, shape, mode):
    args = make(*shape)
    call = dual(*args, mode)
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    other = interleaved({"sdpa": sdpa(*args, mode)}, rounds=3)["sdpa"]
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats["median"]
    benchmark.extra_info["gflop_s"] = round(operations(shape, mode) / seconds / 1e9, 1)
    benchmark.extra_info["over_sdpa"] = round(seconds / other, 2)


def table(rounds=5):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, {DTYPE}, causal; seconds (peak MB)")
    for shape in SHAPES:
        for mode in PRODUCTS:
            args = make(*shape)
            calls = {"dual": dual(*args, mode), "sdpa": sdpa(*args, mode)}
            times = interleaved(calls, rounds)
            cells = [f"{k} {times[k]:.4f} ({peak_mb(c):.0f})" for k, c in calls.items()]
            rate = operations(shape, mode) / times["dual"] / 1e9
            ratio = times["dual"] / times["sdpa"]
            print(f"{shape} {mode} {'  '.join(cells)}  {rate:.0f} GFLOP/s  dual/sdpa {ratio:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
