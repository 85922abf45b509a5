"""grad_dot against plain torch: all rows times V, then reduced; all gradients formed, then dotted.

Directions: Q dense ones, or factors of rank R. Floor: inputs and directions read once, or the
cheaper form's products.
`python benchmarks/bench_grad_dot.py [threads]` prints interleaved medians.
"""

import sys
from functools import partial

import pytest
import torch
from _layers import LAYERS, SHORT, Layer, benchmarked, floor_seconds, randn, table

import u2a_kernels

KINDS = [(1, 0), (4, 0), (1, 8), (4, 8)]  # directions, rank; 0: dense
CASES = {
    f"{k} Q{q} {f'rank {rank}' if rank else 'dense'}": (k, q, rank)
    for k in (*LAYERS, SHORT)
    for q, rank in KINDS
}
NAMES = ("u2a", "torch tokens", "torch formed", "torch at once")


def dense_calls(k: Layer, q: int):
    x, g, offsets = k.make()
    v = randn(q, k.d_out, k.d_in)

    def tokens():
        each = [((x @ w.T) * g).sum(-1).view(k.b, k.t).sum(1) for w in v]
        return torch.stack(each, 1)

    calls = {
        "u2a": lambda: u2a_kernels.grad_dot(x, g, offsets, v),
        "torch tokens": tokens,
        "torch formed": lambda: k.formed(x, g).flatten(1) @ v.flatten(1).T,
    }
    flops = 2 * k.d * min(q * k.n, k.n + q * k.b)
    return calls, floor_seconds(k.n * (k.d_in + k.d_out) + q * k.d, flops)


def low_rank_calls(k: Layer, q: int, rank: int):
    x, g, offsets = k.make()
    left, right = randn(q, k.d_out, rank), randn(q, k.d_in, rank)

    def tokens():
        each = [((g @ a) * (x @ b)).sum(-1) for a, b in zip(left, right, strict=True)]
        return torch.stack(each, 1).view(k.b, k.t, q).sum(1)

    def at_once():
        zg, zx = g @ left.transpose(0, 1).flatten(1), x @ right.transpose(0, 1).flatten(1)
        return (zg * zx).view(k.b, k.t, q, rank).sum((1, 3))

    calls = {
        "u2a": lambda: u2a_kernels.grad_dot(x, g, offsets, (left, right)),
        "torch tokens": tokens,
        "torch formed": lambda: k.formed(x, g).flatten(1) @ (left @ right.mT).flatten(1).T,
        "torch at once": at_once,
    }
    flops = 2 * q * rank * k.n * (k.d_in + k.d_out)
    return calls, floor_seconds((k.n + q * rank) * (k.d_in + k.d_out), flops)


def calls_of(k: Layer, q: int, rank: int):
    return low_rank_calls(k, q, rank) if rank else dense_calls(k, q)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_grad_dot(benchmark, name, case):
    if name == "torch at once" and not CASES[case][2]:
        pytest.skip("for factors only")
    benchmarked(benchmark, *calls_of(*CASES[case]), name)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table({label: partial(calls_of, *c) for label, c in CASES.items()})
