"""What `u2a env` prints and manifest.json keeps: versions, machine, who serves each op.

Nothing is read from the process environment, so no secret can end up in a manifest.
"""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "u2a-kernels torch triton transformers peft accelerate datasets tokenizers safetensors numpy "
    "pydantic pyarrow"
).split()


def versions() -> dict[str, Any]:
    """{"versions": {package: version or None}, "platform": {...}}, importing none of them."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    machine = {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
    }
    return {"versions": found, "platform": machine}


def report() -> dict[str, Any]:
    """`versions` with the accelerator, the CPU's instruction set and the op providers."""
    out = versions()
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        return {**out, "torch": f"not importable: {e}"}
    out["cpu"] = torch.backends.cpu.get_cpu_capability()
    cuda = torch.cuda.is_available()
    out["gpu"] = torch.cuda.get_device_name() if cuda else None
    out["cuda"] = torch.version.cuda
    out["kernels"] = _kernels()
    return out


def _kernels() -> Any:
    """What `python -m u2a_kernels` knows, or why it cannot be asked."""
    try:
        return importlib.import_module("u2a_kernels.__main__").report()
    except ImportError as e:
        return f"u2a_kernels is not importable: {e}"


def table(facts: dict[str, Any]) -> str:
    """`report` as aligned lines, nested names joined by a dot."""
    from u2a.rundir import flatten

    flat = flatten(facts)
    width = max(len(k) for k in flat)
    return "\n".join(f"{k:<{width}}  {'-' if v is None else v}" for k, v in flat.items())
