"""python tests/aot.py: compile every Triton kernel for sm_80, sm_90 and sm_100 without a GPU.

Every op's CUDA launchers, forward and backward, run on meta tensors in the shapes of tests/cases;
a launch inside is compiled for its real specialisation and not launched. Printed: registers, spills
and shared memory from ptxas, and from cuobjdump for the kernels of the compiled CUDA library.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # must happen before triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

ARCHS = (80, 90, 100)
FIELDS = ("registers", "spill", "shared")
DTYPES = (torch.bfloat16, torch.float32)
SPILL_BOUND = 64  # bytes; ptxas versions differ by a few
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LAUNCHERS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Kernel:
    """One compiled specialisation; spill and shared in bytes; model: in a size models have."""

    name: str
    model: bool
    arch: int
    registers: int
    spill: int
    shared: int


class OfflineDriver(DriverBase):
    """What triton asks of a GPU between a launch and the compiler."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # keys the per-device cache of a kernel

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("autotuning needs a GPU; launch configurations are functions")


class Launch(TorchDispatchMode):
    """Sends our ops, wherever their tensors are, to the launcher that owns them on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launcher = LAUNCHERS.get(func.name()) if func.namespace == "u2a" else None
        if launcher is None:
            return func(*args, **(kwargs or {}))
        with self:
            return launcher(*args, **(kwargs or {}))


def record_launchers() -> None:
    """Imports the ops and notes which Python function each registers for CUDA."""
    register = torch.library.Library.impl

    def impl(self: Any, name: Any, fn: Any, key: str = "", **kwargs: Any) -> Any:
        if key == "CUDA" and self.ns == "u2a":
            LAUNCHERS[f"u2a::{name}"] = fn
        return register(self, name, fn, key, **kwargs)

    torch.library.Library.impl = impl  # type: ignore[method-assign]
    try:
        importlib.import_module("u2a_kernels")
    finally:
        torch.library.Library.impl = register  # type: ignore[method-assign]


@contextmanager
def compiling(arch: int) -> Iterator[dict[int, tuple[str, Any]]]:
    """Inside, a kernel launch compiles for `arch` and lands in the yielded dict."""
    built: dict[int, tuple[str, Any]] = {}
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = kernel.result() if callable(getattr(kernel, "result", None)) else kernel
        module = self.fn.__module__.removeprefix("u2a_kernels.ops.").removesuffix(".triton")
        built[id(kernel)] = (f"{module}.{self.fn.__name__.strip('_')}", kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(OfflineDriver(arch))
    try:
        yield built
    finally:
        JITFunction.run = run
        driver._active = active


def measured(name: str, model: bool, arch: int, kernel: Any) -> Kernel:
    """ptxas -v on the PTX, with the ptxas that triton itself uses for this target."""
    ptx = kernel.asm["ptx"]
    target = re.search(r"^\.target (\S+?),?\s*$", ptx, re.M)[1]  # type: ignore[index]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", f.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = [re.search(p, log) for p in (r"Used (\d+) reg", r"(\d+) bytes spill stores")]
    registers, spill = (int(m[1]) if m else 0 for m in numbers)
    return Kernel(name, model, arch, registers, spill, kernel.metadata.shared)


def meta(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def largest(case: Any, dtype: torch.dtype) -> dict[str, Any]:
    every = [case.inputs(variant, dtype) for variant in case.variants]
    sizes = [sum(t.numel() for t in a.values() if isinstance(t, torch.Tensor)) for a in every]
    return every[sizes.index(max(sizes))]


def jobs(dtype: torch.dtype) -> Iterator[tuple[Any, bool, dict[str, Any]]]:
    """(case, in a model's size?, arguments): each case's largest variant, and what its module's
    `aot_inputs(dtype)` gives: pairs of a case name and keyword arguments, best on the meta device.
    """
    package = importlib.import_module("cases")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"cases.{info.name}")
        named = {case.name: case for case in module.CASES if dtype in case.dtypes}
        for case in named.values():
            yield case, False, largest(case, dtype)
        for name, args in getattr(module, "aot_inputs", lambda dtype: ())(dtype):
            yield named[name], True, args


def run(case: Any, args: dict[str, Any]) -> None:
    """Forward, backward and any further launcher of the case, on meta tensors."""
    args = meta(args)
    for launcher in case.launchers.values():
        launcher(**args)
    for n in case.differentiable:
        if isinstance(args.get(n), torch.Tensor):
            args[n].requires_grad_()
    with Launch():
        out = case.public(**args)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        picked = [out[i] for i in case.grad_outputs if out[i].requires_grad]
        if picked:
            torch.autograd.backward(picked, [torch.ones_like(o) for o in picked])


def build(arch: int) -> tuple[list[Kernel], list[str], float]:
    """Every kernel of every case for one architecture, and what did not compile."""
    start = time.perf_counter()
    record_launchers()
    kernels: set[Kernel] = set()
    faults = []
    for dtype in DTYPES:
        for case, model, args in jobs(dtype):
            with compiling(arch) as built:
                try:
                    run(case, args)
                except Exception as e:
                    faults.append(f"{case} {dtype} sm_{arch}: {type(e).__name__}: {str(e)[-1500:]}")
            kernels |= {measured(name, model, arch, k) for name, k in built.values()}
    return list(kernels), faults, time.perf_counter() - start


def library() -> list[Kernel]:
    """Kernels of the compiled CUDA library; the stack frame stands for spills there."""
    path = next(Path("u2a_kernels").glob("_C_cuda*.so"), None)
    if path is None:
        return []
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(path)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels, arch = [], 0
    for line in log.splitlines():
        if m := re.match(r"arch = sm_(\d+)", line):
            arch = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            name = subprocess.run(["c++filt", m[1]], capture_output=True, text=True).stdout
            name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
            name = re.split(r"[<(]", name)[0].strip().split("::")[-1]
        elif m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernels.append(Kernel(f"CUDA {name}", True, arch, int(m[1]), int(m[2]), int(m[3])))
    return kernels


def table(kernels: list[Kernel]) -> Iterator[str]:
    """A row per kernel and kind of shape with the worst specialisation of each architecture."""
    names = sorted({(k.name, not k.model) for k in kernels})
    width = max((len(name) for name, _ in names), default=6) + 2
    yield f"{'kernel':<{width}}{'shapes':<8}" + "".join(f"{f'sm_{a}':<24}" for a in ARCHS)
    yield " " * (width + 8) + f"{'regs spill B shared KB':<24}" * len(ARCHS)
    for name, small in names:
        row = f"{name:<{width}}{'test' if small else 'model':<8}"
        for arch in ARCHS:
            some = [k for k in kernels if (k.name, k.model, k.arch) == (name, not small, arch)]
            r, s, m = (max((getattr(k, f) for k in some), default=-1) for f in FIELDS)
            row += f"{f'{r:4} {s:7} {m / 1024:9.1f}' if some else '-':<24}"
        yield row


def main() -> int:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(build, ARCHS))
    kernels = [k for found, _, _ in results for k in found]
    faults = [f for _, found, _ in results for f in found]
    names = {k.name for k in kernels}
    native = library()
    print(*table(kernels + native), sep="\n")
    for k in kernels + native:
        if k.model and k.spill > SPILL_BOUND:
            faults.append(f"{k.name} sm_{k.arch}: {k.spill} bytes spilled, at most {SPILL_BOUND}")
    seconds = ", ".join(f"sm_{a} {s:.0f} s" for a, (_, _, s) in zip(ARCHS, results, strict=True))
    print(f"{len(names)} Triton kernels, {len(kernels)} specialisations compiled ({seconds})")
    print(f"{len({k.name for k in native})} CUDA kernels" if native else "CUDA library: not built")
    for fault in faults:
        print(f"FAULT {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
