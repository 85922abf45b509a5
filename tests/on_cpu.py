"""CUDA kernels as a library for the CPU: see cuda_on_cpu.h."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")


def compiled(stem, folder):
    """The library of tests/`stem`_on_cpu.cpp."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler {CXX}")
    out = folder.mktemp("on_cpu") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"]
    source = ROOT / f"tests/{stem}_on_cpu.cpp"
    subprocess.run([CXX, *flags, f"-I{ROOT / 'csrc'}", source, "-o", out], check=True)
    return ctypes.CDLL(str(out))
