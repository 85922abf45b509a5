"""Ops bound by bytes, as the benchmarks of norms and activations meet them: one call under
pytest-benchmark, and a line of the printed table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _measure import Call, copy_gb_s, peak_mb

CALLS = ("forward", "backward", "both")


def benchmarked(benchmark: Any, call: Call, gigabytes: float) -> None:
    """`gigabytes`: compulsory, every tensor read once and written once."""
    benchmark.extra_info["peak_mb"] = round(peak_mb(call), 1)
    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
    rate = gigabytes / benchmark.stats["median"]
    benchmark.extra_info["gb_s"] = round(rate, 1)
    benchmark.extra_info["of_copy"] = round(rate / copy_gb_s(), 2)


def line(times: Mapping[str, float], gigabytes: Mapping[str, float]) -> str:
    """Of every call: ms, share of a copy's rate, other ways' time over it."""
    cells = []
    for call in CALLS:
        share = gigabytes[call] / times[call] / copy_gb_s()
        cell = f"{call} {1e3 * times[call]:.1f} ms, {share:.2f} of copy"
        for other in ["double"] if call == "both" else [f"eager {call}", f"triton {call}"]:
            if other in times:
                cell += f", {other.split()[0]} {times[other] / times[call]:.1f}x"
        cells.append(cell)
    return "; ".join(cells)
