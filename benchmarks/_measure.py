"""Peak memory beside time, and interleaved timing: on a shared machine only medians of interleaved
rounds compare."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

Call = Callable[..., Any]
STATUS = Path("/proc/self/status")


def _status_mb(field: str) -> float:
    return int(STATUS.read_text().split(field + ":")[1].split()[0]) / 1024


def peak_mb(call: Call, warm: bool = True) -> float:
    """MB that one call holds at its highest beyond what was held before it (Linux or CUDA).
    `warm` calls once before."""
    if warm:
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_mb("VmRSS")
    call()
    return _status_mb("VmHWM") - before


def held_mb(call: Call) -> float:
    """MB of tensors, scratch of torch's allocator included, at their highest within one call: on a
    CPU without what libraries and the heap keep for themselves, which `peak_mb` sees."""
    if torch.cuda.is_available():
        return peak_mb(call, warm=False)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(sizes))) / 2**20


@contextmanager
def returned_blocks() -> Iterator[None]:
    """Freed blocks of a megabyte or more go back to the system at once: a peak is then what is in
    use, not how the heap happens to be cut. Slower, so not for timing."""
    libc, threshold = ctypes.CDLL(None), -3
    libc.mallopt(threshold, 1 << 20)
    try:
        yield
    finally:
        libc.mallopt(threshold, 32 << 20)


def clocks(call: Call) -> tuple[float, float]:
    """CPU and wall seconds of one call; on a GPU both are wall seconds up to its end."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if cuda:
        torch.cuda.synchronize()
        return (time.perf_counter() - wall,) * 2
    return time.process_time() - cpu, time.perf_counter() - wall


def ratio(call: Call, base: Call, rounds: int = 5) -> tuple[float, float]:
    """(median CPU time of `call` over that of `base`, median wall seconds of `call`), one of each
    per round; both have run before. On one thread CPU time is the work done, whoever else computes.
    """
    pairs = [(clocks(base), clocks(call)) for _ in range(rounds)]
    base_cpu, cpu, wall = (
        statistics.median(x) for x in zip(*((b[0], *c) for b, c in pairs), strict=True)
    )
    return cpu / base_cpu, wall


def interleaved(calls: dict[str, Call], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each call, one of each per round, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def double_backward(
    f: Call, primal: list[torch.Tensor], tangent: list[torch.Tensor], cotangent: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """torch's own second order of f: forward, backward with a graph, backward of <it, tangent>."""
    leaves = [x.detach().requires_grad_() for x in primal]
    first = torch.autograd.grad(f(*leaves), leaves, cotangent, create_graph=True)
    pairing = torch.stack([(d * t).sum() for d, t in zip(first, tangent, strict=True)]).sum()
    return torch.autograd.grad(pairing, leaves) if pairing.requires_grad else first


@functools.cache
def copy_gb_s() -> float:
    """GB/s, read and written, of a copy far larger than the second-level cache."""
    source = torch.empty(1 << (28 if torch.cuda.is_available() else 24), device=_device()).normal_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return 8 * source.numel() / seconds / 1e9


@functools.cache
def gemm_gflop_s(dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product in `dtype`."""
    n = 8192 if torch.cuda.is_available() else 1024
    a = torch.randn(n, n, device=_device()).to(dtype)
    return 2 * n**3 / interleaved({"gemm": lambda: a @ a})["gemm"] / 1e9


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
