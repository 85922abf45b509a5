"""dual_glu and dual_act, forward and backward, beside plain torch and copy bandwidth.

`eager`: the dual formulas in plain torch, without the op. `double`: torch's own second order,
forward, backward with a graph and its backward, on the primal half. `of copy`: compulsory bytes
(every tensor read once and written once) over the time, as a share of a copy's rate.
`python benchmarks/bench_dual_activations.py [threads]` prints interleaved medians.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from _measure import double_backward, interleaved
from _rowwise import CALLS, benchmarked, line

import u2a_kernels  # noqa: F401  (registers the ops)
from u2a_kernels.ops.dual_glu import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
ROWS, COLUMNS = (8192, 14336) if DEVICE == "cuda" else (512, 8192)  # rows: both halves
FORMS = {  # kind, activation, plain torch
    "SwiGLU": ("pair", "silu", F.silu),
    "SwiGLU packed": ("packed", "silu", F.silu),
    "GeGLU tanh": ("pair", "gelu_tanh", lambda a: F.gelu(a, approximate="tanh")),
    "GELU": ("one", "gelu", F.gelu),
    "ReLU": ("one", "relu", F.relu),
}


def make(kind, dtype):
    columns = 2 * COLUMNS if kind == "packed" else COLUMNS
    count = 2 if kind == "pair" else 1
    leaves = [torch.randn(ROWS, columns, device=DEVICE).to(dtype) for _ in range(count)]
    return leaves, torch.randn(ROWS, COLUMNS, device=DEVICE).to(dtype)


def double(leaves, grad, kind, plain):
    def f(*primal):
        parts = primal[0].chunk(2, -1) if kind == "packed" else primal
        return plain(parts[0]) * parts[1] if len(parts) == 2 else plain(parts[0])

    n = ROWS // 2
    return double_backward(f, [x[:n] for x in leaves], [x[n:] for x in leaves], grad[n:])


def calls_of(form, dtype):
    kind, activation, plain = FORMS[form]
    leaves, grad = make(kind, dtype)
    gate, options = leaves[0], (leaves[1] if kind == "pair" else None, activation, kind != "one")
    op, op_bwd = torch.ops.u2a.dual_glu.default, torch.ops.u2a.dual_glu_bwd.default
    return {
        "forward": lambda: op(gate, *options),
        "eager forward": lambda: reference.forward(gate, *options),
        "backward": lambda: op_bwd(grad, gate, *options),
        "eager backward": lambda: reference.backward(grad, gate, *options),
        "both": lambda: (op(gate, *options), op_bwd(grad, gate, *options)),
        "double": lambda: double(leaves, grad, kind, plain),
    }


def gigabytes(form, call, dtype):
    inputs = 1 if FORMS[form][0] == "one" else 2
    tensors = {"forward": inputs + 1, "backward": 2 * inputs + 1}
    tensors["both"] = sum(tensors.values())
    return tensors[call] * ROWS * COLUMNS * dtype.itemsize / 1e9


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dual_activations(benchmark, form, dtype, call):
    benchmarked(benchmark, calls_of(form, dtype)[call], gigabytes(form, call, dtype))


def table(rounds=7):
    print(f"{torch.get_num_threads()} thread(s), {DEVICE}, [{ROWS}, {COLUMNS}] both halves")
    for dtype in DTYPES:
        for form in FORMS:
            times = interleaved(calls_of(form, dtype), rounds)
            told = line(times, {call: gigabytes(form, call, dtype) for call in CALLS})
            print(f"{form:14s} {str(dtype).removeprefix('torch.'):9s}", told, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    table()
