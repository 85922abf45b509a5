"""Peak memory beside time, and interleaved timing: on a shared machine only medians of interleaved
rounds compare."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable
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
