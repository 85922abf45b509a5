"""One program under every instruction set of the C++ kernels: the same bits."""

import os
import subprocess
import sys

import pytest

import u2a_kernels

ORDER = ["base", "avx2", "avx512"]
HEAD = """
import hashlib, torch, u2a_kernels
from u2a_kernels.testing import offsets_of, randn
assert u2a_kernels._C.cpu_capability() == {isa!r}, "not available on this machine"
torch.manual_seed(0)
parts = []
"""
TAIL = """
assert parts
bits = [p.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for p in parts]
print(hashlib.sha256(b"".join(bits)).hexdigest())
"""

needs_cpp = pytest.mark.skipif(u2a_kernels._C is None, reason="built without the C++ library")


def digest(isa: str, program: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", HEAD.format(isa=isa) + program + TAIL],
        env={**os.environ, "U2A_CPU_CAPABILITY": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def assert_same_bits(program: str) -> None:
    """`program` adds tensors to `parts`."""
    best = ORDER.index(u2a_kernels._C.cpu_capability())
    digests = {isa: digest(isa, program) for isa in ORDER[: best + 1]}
    assert len(set(digests.values())) == 1, digests
