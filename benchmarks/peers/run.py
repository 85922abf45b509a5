"""run.py [GROUP...]: every group of cases in a process of its own, one after another; one table.

Run by the environment that install.py filled; `make bench-peers` does both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROUPS = ["references", "u2a", "bergson", "dattri", "logix", "opacus", "traker"]
COLUMNS = f"{'case':24}{'steps':>8}{'ms':>9}{'peak MB':>9}{'numbers':>9}  note"


def measured(group: str, logs: Path) -> list[dict[str, Any]]:
    """The group's lines; its stderr goes to a log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", str(HERE / "worker.py"), group]
    with (logs / f"peers-{group}.log").open("w") as log:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        lines.append({"case": group, "error": f"failed: exit {done.returncode}"})
    return lines


def row(line: dict[str, Any]) -> str:
    if "error" in line:
        return f"{line['case']:24}{line['error']}"
    count = "" if line["numbers"] is None else line["numbers"]
    return (
        f"{line['case']:24}{line['steps']:8.2f}{line['ms']:9.0f}{line['mb']:9.0f}{count:>9}"
        f"  {line['note']}"
    )


def main() -> None:
    state = json.loads((Path(sys.prefix) / "peers.json").read_text())
    logs = Path("build/logs")
    logs.mkdir(parents=True, exist_ok=True)
    activation = os.environ.get("ACTIVATION", "gelu_new")
    print(f"4-layer GPT-2 ({activation}), d = 256, V = 1000, 32 x 128 tokens, float32, one thread.")
    print("steps: CPU time over that of a training step run in turn with it. numbers: an example.")
    print(COLUMNS)
    lines = []
    for group in sys.argv[1:] or GROUPS:
        if fault := state.get(group, {}).get("error"):
            new = [{"case": group, "error": f"not installed: {fault}"}]
        else:
            new = measured(group, logs)
        print(*map(row, new), sep="\n", flush=True)
        lines += new
    steps = [line["step_ms"] for line in lines if "step_ms" in line]
    if steps:
        print(f"training step: {min(steps):.0f} to {max(steps):.0f} ms in these processes")
    print(", ".join(peer["requirement"] for peer in state.values()))


if __name__ == "__main__":
    main()
