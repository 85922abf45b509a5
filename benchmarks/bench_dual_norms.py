"""dual_rms_norm, dual_layer_norm and dual_softmax, forward and backward, beside plain torch.

`eager`: the dual formulas in plain torch, without the op. `double`: torch's own second order,
forward, backward with a graph and its backward, on the primal half. `of copy`: compulsory bytes
(every tensor read once and written once) over the time, as a share of a copy's rate. `triton`, on a
GPU: the Triton kernels where the compiled CUDA library serves the op.
`python benchmarks/bench_dual_norms.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import double_backward, interleaved
from _rowwise import CALLS, benchmarked, line

from u2a_kernels._library import owner
from u2a_kernels.ops import dual_layer_norm, dual_rms_norm, dual_softmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5
FORMS = {  # name: op, rows of both halves and columns on a GPU, on the CPU
    "RMSNorm": (dual_rms_norm, (16384, 4096), (1024, 4096)),
    "LayerNorm": (dual_layer_norm, (16384, 4096), (1024, 4096)),
    "softmax": (dual_softmax, (16384, 4096), (1024, 4096)),
    "softmax, router": (dual_softmax, (262144, 128), (32768, 128)),
    "softmax, vocabulary": (dual_softmax, (512, 128256), (64, 32000)),
}


def shape(form):
    return FORMS[form][1 if DEVICE == "cuda" else 2]


def name_of(op):
    return op.__name__.rsplit(".", 1)[1]


def arguments(op, weight, weight_t):
    """What the op's forward and backward take beside x, or grad and x."""
    if op is dual_rms_norm:
        return (weight, weight_t, EPS), (weight, weight_t, EPS, True)
    if op is dual_layer_norm:
        rest = (weight, weight, weight_t, weight_t, EPS)
        return rest, (weight, weight_t, EPS, True, True)
    return ("hvp",), (False,)


def plain(op):
    """torch's own, of the leaves that `double` trains."""
    if op is dual_rms_norm:
        return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)
    if op is dual_layer_norm:
        return lambda x, weight: F.layer_norm(x, weight.shape, weight, weight, EPS)
    return lambda x: torch.softmax(x, -1)


def calls_of(form, dtype):
    op, (rows, columns) = FORMS[form][0], shape(form)
    x, grad = (torch.randn(rows, columns, device=DEVICE).to(dtype) for _ in range(2))
    pair = [torch.randn(columns, device=DEVICE).to(dtype) for _ in range(2)]
    rest, rest_bwd = arguments(op, *pair)
    forward, backward = (getattr(torch.ops.u2a, name_of(op) + end).default for end in ("", "_bwd"))
    saved = forward(x, *rest) if op is dual_softmax else x
    n = rows // 2
    primal, tangent = ([x[:n], pair[0]], [x[n:], pair[1]])
    if op is dual_softmax:
        primal, tangent = primal[:1], tangent[:1]
    calls = {
        "forward": lambda: forward(x, *rest),
        "eager forward": lambda: op.reference(x, *rest),
        "backward": lambda: backward(grad, saved, *rest_bwd),
        "eager backward": lambda: op.reference_bwd(grad, saved, *rest_bwd),
        "both": lambda: (forward(x, *rest), backward(grad, saved, *rest_bwd)),
        "double": lambda: double_backward(plain(op), primal, tangent, grad[n:]),
    }
    if owner(name_of(op), "CUDA") == "CUDA" and DEVICE == "cuda":
        calls["triton forward"] = lambda: op.triton(x, *rest)
        calls["triton backward"] = lambda: op.triton_bwd(grad, saved, *rest_bwd)
    return calls


def gigabytes(form, call, dtype):
    tensors = {"forward": 2, "backward": 3, "both": 5}[call.split()[-1]]
    rows, columns = shape(form)
    return tensors * rows * columns * dtype.itemsize / 1e9


@pytest.mark.parametrize("call", ["forward", "backward", "triton forward", "triton backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dual_norms(benchmark, form, dtype, call):
    calls = calls_of(form, dtype)
    if call not in calls:
        pytest.skip("the compiled CUDA library does not serve this op")
    benchmarked(benchmark, calls[call], gigabytes(form, call, dtype))


def table(rounds=7):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}")
    for form in FORMS:
        for dtype in DTYPES:
            times = interleaved(calls_of(form, dtype), rounds)
            told = line(times, {call: gigabytes(form, call, dtype) for call in CALLS})
            print(f"{form:20s}{str(dtype).removeprefix('torch.'):9s}", told, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
