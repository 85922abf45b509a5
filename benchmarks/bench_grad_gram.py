"""grad_gram against plain torch: all token products [N, N2], and all gradients [B, d_out d_in].

Floor: the inputs read once, or the cheaper form's products (half of the square for one set).
`python benchmarks/bench_grad_gram.py [threads]` prints interleaved medians.
"""

import sys
from functools import partial

import pytest
import torch
from _layers import LAYERS, SHORT, Layer, benchmarked, floor_seconds, table

import u2a_kernels

PAIRS = [(k, same) for k in (*LAYERS, SHORT) for same in (False, True)]
CASES = {f"{k} {'with itself' if same else 'with another'}": (k, same) for k, same in PAIRS}
NAMES = ("u2a", "torch tokens", "torch formed")


def calls_of(k: Layer, same: bool):
    first = k.make()
    second = first if same else k.make()
    (x, g, _), (x2, g2, _) = first, second

    def tokens():
        return ((x @ x2.T) * (g @ g2.T)).view(k.b, k.t, k.b, k.t).sum((1, 3))

    def formed():
        whole = k.formed(x, g).flatten(1)
        return whole @ (whole if same else k.formed(x2, g2).flatten(1)).T

    calls = {
        "u2a": lambda: u2a_kernels.grad_gram(*first, *second),
        "torch tokens": tokens,
        "torch formed": formed,
    }
    by_tokens = 2 * k.n * k.n * (k.d_in + k.d_out)
    by_gradients = 2 * k.d * (2 * k.n + k.b * k.b)
    flops = min(by_tokens, by_gradients) / (2 if same else 1)
    return calls, floor_seconds((1 if same else 2) * k.n * (k.d_in + k.d_out), flops)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_grad_gram(benchmark, name, case):
    benchmarked(benchmark, *calls_of(*CASES[case]), name)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table({label: partial(calls_of, *c) for label, c in CASES.items()})
