"""worker.py GROUP: measures one group's cases in this process; a line of JSON for each.

A case is interleaved with the training step; `steps` is the ratio of the medians of their CPU
times, which on one thread is the work done, whoever else uses the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _measure import clocks, peak_mb  # noqa: E402
from model import ROWS, Case, training_step  # noqa: E402
from peers import GROUPS  # noqa: E402

ROUNDS = 9


def numbers(features: Any) -> int:
    """Numbers an example, whatever container they came in."""
    parts = list(features.values()) if isinstance(features, dict) else [features]
    return sum(torch.as_tensor(p).numel() for p in parts) // ROWS


def measure(case: Case, step: Callable[[], Any]) -> dict[str, Any]:
    steps, ours, results = [], [], []
    step()
    if case.slow:
        steps = [clocks(step) for _ in range(3)]
        peak = peak_mb(lambda: ours.append(clocks(lambda: results.append(case.call()))), warm=False)
    else:
        results.append(case.call())
        for _ in range(ROUNDS):
            steps.append(clocks(step))
            ours.append(clocks(case.call))
        peak = peak_mb(case.call)
    (step_cpu, step_wall), (cpu, wall) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (steps, ours)
    )
    return {
        "case": case.name, "steps": cpu / step_cpu, "ms": wall * 1e3, "step_ms": step_wall * 1e3,
        "mb": peak, "numbers": numbers(results[0]) if results[0] is not None else None,
        "note": case.note + (", one repetition" if case.slow else ""),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    group, step = sys.argv[1], training_step()
    say = sys.stdout
    sys.stdout = sys.stderr  # what the peers print
    try:
        for case in GROUPS[group]():
            print(json.dumps(measure(case, step)), file=say, flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = str(error).strip().splitlines()
        line = f"{type(error).__name__}: {reason[0] if reason else ''}"
        print(json.dumps({"case": group, "error": f"failed: {line}"}), file=say, flush=True)


if __name__ == "__main__":
    main()
