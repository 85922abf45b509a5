"""dual_softmax beyond the contract: its CUDA kernels, run thread by thread on the CPU, and the bits
of its CPU kernels on every instruction set."""

import ctypes

import pytest
import torch
from isa import assert_same_bits, needs_cpp
from on_cpu import compiled

from u2a_kernels.ops import dual_softmax as op
from u2a_kernels.testing import assert_within_budget, randn


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    return compiled("dual_softmax", tmp_path_factory)


PIECES = {"float32_wide": 4, "float32_narrow": 1, "bfloat16_wide": 8, "bfloat16_narrow": 1}
PIECES["float64_narrow"] = 1
THREADS = {0: 8 * 2, 1: 32 * 4, 2: 128 * 4, 3: 128 * 2}  # by shape: threads times pieces of a tile


def guarded(like):
    """A NaN tensor between NaN rows, and the whole of it."""
    whole = torch.full((like.shape[0] + 2, like.shape[1]), float("nan"), dtype=like.dtype)
    return whole[1:-1], whole


def run(lib, name, shape, *tensors, ggn=None):
    """`tensors` to a new one, the rows around which stay as they were."""
    out, whole = guarded(tensors[0])
    i64, rows, v = ctypes.c_int64, out.shape[0] // 2, out.shape[1]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*tensors, out)]
    function = getattr(lib, name if ggn is None else f"{name}_bwd")
    function(shape, *pointers, i64(rows), i64(v), *([] if ggn is None else [int(ggn)]))
    assert whole[0].isnan().all() and whole[-1].isnan().all()
    return out


def inputs(name, v):
    """Nine rows: with masked entries, large logits, one with a NaN; a mean in g."""
    dtype = getattr(torch, name.split("_")[0])
    z, grad = randn(18, v, seed=1, dtype=dtype), randn(18, v, seed=2, dtype=dtype)
    grad[9:] += 100
    z[0, : v // 3] = float("-inf")
    z[1] *= 1e4
    z[2, -1] = float("nan")
    return z, grad


@pytest.mark.parametrize("shape", THREADS)
@pytest.mark.parametrize("name", PIECES)
def test_kernels_on_the_cpu(on_cpu, name, shape):
    """One piece, a ragged number of them and full tiles; two and a half tiles where read twice."""
    full, rows = THREADS[shape], [i for i in range(18) if i % 9 != 2]
    for pieces in (1, full - 3, full) if shape < 3 else (2 * full + full // 2 + 1,):
        z, grad = inputs(name, PIECES[name] * pieces)
        out = run(on_cpu, name, shape, z)
        exact = op.reference(z.double(), "hvp")
        assert_within_budget(out[rows], exact[rows], op.reference(z, "hvp")[rows], name)
        assert out[2].isnan().all()
        for ggn in (False, True):
            dz = run(on_cpu, name, shape, grad, out, ggn=ggn)
            exact = op.reference_bwd(grad.double(), out.double(), ggn)
            plain = op.reference_bwd(grad, out, ggn)
            assert_within_budget(dz[rows], exact[rows], plain[rows], f"{name} ggn={ggn}")
            again = run(on_cpu, name, shape, grad, out, ggn=ggn)
            assert torch.equal(dz[rows], again[rows])
            assert not ggn or not dz[9:].any()


ISA_PROGRAM = """
for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for v in (1, 37, 2500):
        z, grad = (5 * randn(6, 3, v, seed=s, dtype=t) for s in (1, 2))
        z[0, 0, : v // 3] = float("-inf")
        z.requires_grad_()
        for mode in ("hvp", "ggn"):
            out = u2a_kernels.dual_softmax(z, mode=mode)
            parts += [out.detach(), *torch.autograd.grad(out, z, grad)]
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
