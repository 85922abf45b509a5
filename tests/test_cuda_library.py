"""The CUDA library without a GPU: nvcc builds it, it loads and registers, no kernel spills, and the
kernels of grad_sketch, run thread by thread on the CPU, give what the reference gives.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_cpu import compiled

import u2a_kernels
from cases.grad_sketch import oracle, words
from u2a_kernels.ops import grad_sketch as op
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

ROOT = Path(__file__).parents[1]
SOURCES = [p for p in (ROOT / "csrc").iterdir() if p.suffix in (".cu", ".cuh", ".h")]
SOURCES += (ROOT / "csrc").glob("*_cuda.cpp")
KERNELS = {"sketch_kernel": 15, "sketch_table_kernel": 1, "sketch_sum_kernel": 1}
KERNELS |= {"dual_softmax_kernel": 26, "dual_softmax_bwd_kernel": 23}
ARCHS = ("sm_80", "sm_90a", "sm_100a")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The installed library where it is newer than its sources, else a build of it."""
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        pytest.skip("nvcc is not installed")
    built = next(Path(u2a_kernels.__file__).parent.glob("_C_cuda*.so"), None)
    if built and built.stat().st_mtime > max(p.stat().st_mtime for p in SOURCES):
        return built
    out = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", out]
    run = subprocess.run(
        [*command, "--build-temp", out / "objects"],
        cwd=ROOT,
        env={**os.environ, "U2A_BUILD": "cuda"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return next(out.glob("u2a_kernels/_C_cuda*.so"))


def resources(library):
    """(kernel, architecture, registers, stack and local bytes) of every kernel in the library."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton's package")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", library], capture_output=True, text=True, check=True
    ).stdout
    found, arch = [], None
    for line in text.splitlines():
        if m := re.match(r"arch = (\S+)", line):
            arch = m[1]
        elif m := re.search(r"Function (\S+):", line):
            name = m[1]
        elif m := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found.append((name, arch, int(m[1]), int(m[2]) + int(m[3])))
    return found


def test_no_kernel_spills_on_any_architecture(library):
    found = resources(library)
    for name, arch, registers, spilled in found:
        print(f"{arch:8} {registers:4} registers {spilled:4} bytes spilled  {name}")
    for arch in ARCHS:
        for kernel, count in KERNELS.items():
            assert sum(kernel in f[0] and f[1] == arch for f in found) == count, (kernel, arch)
    assert not [f for f in found if f[3]]


LOAD = """
import ctypes, os, sys, torch, u2a_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)
for op, source in {"grad_sketch": "grad_sketch", "dual_softmax": "dual_softmax",
                   "dual_softmax_bwd": "dual_softmax"}.items():
    table = torch._C._dispatch_dump(f"u2a::{op}")
    assert f"{source}_cuda.cpp" in table, table
with FakeTensorMode():
    x = torch.empty(7, 5, device="cuda", dtype=torch.bfloat16)
    g = torch.empty(7, 3, device="cuda", dtype=torch.bfloat16)
    offsets = torch.empty(4, device="cuda", dtype=torch.int32)
    out = u2a_kernels.grad_sketch(x, g, offsets, 64, 1)
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("cuda", torch.float32, (3, 64))
    dx, dg = torch.ops.u2a.grad_sketch_bwd(out, x, g, offsets, 64, 1)
    assert (dx.device.type, dx.dtype, dx.shape) == ("cuda", torch.bfloat16, x.shape)
    assert (dg.device.type, dg.dtype, dg.shape) == ("cuda", torch.bfloat16, g.shape)
    p = u2a_kernels.dual_softmax(torch.empty(4, 7, device="cuda", dtype=torch.bfloat16))
    dz = torch.ops.u2a.dual_softmax_bwd(p, p, False)
    assert (dz.device.type, dz.dtype, dz.shape) == ("cuda", torch.bfloat16, (4, 7))
"""


def test_library_registers_its_kernels_and_fakes_flow(library):
    """Lazily bound, as the CPU torch lacks the CUDA half of libtorch; Triton's kernel gives way."""
    run = subprocess.run([sys.executable, "-c", LOAD, library], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("built, torch_cuda", [(True, "13.0"), (True, None), (False, "13.0")])
def test_one_owner_of_the_cuda_key(built, torch_cuda, tmp_path, monkeypatch):
    """The library owns its ops exactly where it will be loaded."""
    from u2a_kernels import _library

    if built:
        (tmp_path / "_C_cuda.so").touch()
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    taken = {}
    monkeypatch.setattr(_library, "OWNERS", taken)
    monkeypatch.setattr(_library, "NAMESPACE", "u2a_owner")  # reports list everything in "u2a"
    monkeypatch.setattr(_library, "LIBRARY", torch.library.Library("u2a_owner", "FRAGMENT"))
    name = f"owner_test_{built}_{torch_cuda}".replace(".", "_")
    _library.define(
        f"{name}(Tensor x) -> Tensor",
        reference=torch.clone,
        fake=torch.empty_like,
        cuda=torch.clone,
        cuda_library=True,
    )
    library_owns = built and torch_cuda is not None
    assert taken == {name: "CUDA" if library_owns else "Triton"}
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"u2a_owner::{name}", "CUDA")
    assert has is not library_owns


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    lib = compiled("grad_sketch", tmp_path_factory)
    i64, u64, ptr, int_ = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
    lib.hashes.argtypes = [u64, ctypes.c_uint32, i64, ptr]
    lib.cuda_sketch.argtypes = [int_, ptr, ptr, ptr, i64, i64, i64, i64, u64, int_, int_, ptr]
    return lib


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("seed", [0, 7, 0x0123456789ABCDEF, (1 << 63) - 1])
def test_hash_of_the_kernels(on_cpu, seed, stream):
    got = torch.full((200,), -1)
    on_cpu.hashes(seed, stream, 200, got.data_ptr())
    assert got.tolist() == words(seed, stream, 200)


def emulated(lib, log2, x, g, offsets, k, seed, splits, staged):
    out = torch.full((offsets.shape[0] - 1, k), float("nan"))
    offsets = offsets.long()
    pointers = (t.data_ptr() for t in (x, g, offsets))
    sizes = (offsets.shape[0] - 1, x.shape[1], g.shape[1], k)
    assert lib.cuda_sketch(log2, *pointers, *sizes, seed, splits, staged, out.data_ptr()) == 0
    return out


@pytest.mark.parametrize("splits, staged", [(1, True), (3, False)])
@pytest.mark.parametrize(
    "log2, k",
    [(9, 2), (9, 128), (9, 512), (9, 2048), (10, 1024), (11, 2048), (12, 4096), (13, 8192)],
)
def test_kernels_on_the_cpu(on_cpu, log2, k, splits, staged):
    """Also with fewer features than a slice, and with four slices of 512 for 2048."""
    offsets = offsets_of([3, 0, 2])
    x, g = randn(5, 37, seed=1), randn(5, 67, seed=2)
    got = emulated(on_cpu, log2, x, g, offsets, k, 11, splits, staged)
    exact = op.reference(x.double(), g.double(), offsets, k, 11)
    if k <= 128:
        torch.testing.assert_close(exact, oracle(x.double(), g.double(), offsets, k, 11))
    assert_within_budget(got, exact, op.reference(x, g, offsets, k, 11))
    again = emulated(on_cpu, log2, x, g, offsets, k, 11, splits, staged)
    assert torch.equal(got, again), "any order of the threads must give the same bits"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 512, 4096, 65536])
def test_on_the_gpu(k, dtype):
    offsets = offsets_of([130, 0, 1, 70])
    x, g = randn(201, 321, seed=1, dtype=dtype), randn(201, 203, seed=2, dtype=dtype)
    got = u2a_kernels.grad_sketch(x.cuda(), g.cuda(), offsets.cuda(), k, 11)
    exact = op.reference(x.double(), g.double(), offsets, k, 11)
    assert_within_budget(got.cpu(), exact, op.reference(x, g, offsets, k, 11))
    assert torch.equal(got, u2a_kernels.grad_sketch(x.cuda(), g.cuda(), offsets.cuda(), k, 11))
