"""grad_sq_norm against plain torch: full T x T token Grams (opacus' ghost norm), formed gradients.

Floor: x and g read once, or the cheaper form's products, of which symmetry spares half of T x T.
`python benchmarks/bench_grad_sq_norm.py [threads]` prints interleaved medians.
"""

import sys
from functools import partial

import pytest
import torch
from _layers import LAYERS, LONG, SHORT, Layer, benchmarked, floor_seconds, table

import u2a_kernels

CASES = {str(k): k for k in (*LAYERS, SHORT, LONG)}
NAMES = ("u2a", "torch ghost", "torch formed")


def calls_of(k: Layer):
    x, g, offsets = k.make()
    xs, gs = k.batched(x, g)
    calls = {
        "u2a": lambda: u2a_kernels.grad_sq_norm(x, g, offsets),
        "torch ghost": lambda: (torch.bmm(xs, xs.mT) * torch.bmm(gs, gs.mT)).sum((1, 2)),
        "torch formed": lambda: k.formed(x, g).square().sum((1, 2)),
    }
    flops = min(k.n * k.t * (k.d_in + k.d_out), 2 * k.n * k.d)
    return calls, floor_seconds(k.n * (k.d_in + k.d_out), flops)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_grad_sq_norm(benchmark, name, case):
    benchmarked(benchmark, *calls_of(CASES[case]), name)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table({label: partial(calls_of, k) for label, k in CASES.items()})
