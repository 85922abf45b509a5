"""`python -m u2a_kernels [--json]`: versions, how this was built, and who serves each op where.

A slow reference must never be a mystery: `reference` in the table is plain torch.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import u2a_kernels
from u2a_kernels._library import NAMESPACE, cuda_library_path, owner, require_fused


def report() -> dict[str, Any]:
    """Everything that is printed, as plain JSON types. `ops`: name -> {"CPU": who, "CUDA": who}."""
    shell = u2a_kernels._C
    return {
        "u2a_kernels": u2a_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": shell.cpu_capability() if shell else None,
        "compiler": shell.compiler if shell else None,
        "cuda_toolkit": shell.cuda_toolkit or None if shell else None,
        "cuda_archs": shell.cuda_archs.split() if shell else [],
        "cuda_library_loaded": cuda_library_path() is not None,
        "require_fused": require_fused(),
        "ops": {name: {d: owner(name, d) for d in ("CPU", "CUDA")} for name in _names()},
    }


def _names() -> list[str]:
    prefix = f"{NAMESPACE}::"
    every = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(prefix) for name in every if name.startswith(prefix))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts in words, then one row per op."""
    built = f"compiler {facts['compiler']}, using {facts['cpu_capability']}"
    if not facts["cuda_archs"]:
        cuda = "not built"
    else:
        cuda = f"toolkit {facts['cuda_toolkit']} for sm_{', sm_'.join(facts['cuda_archs'])}"
        if not facts["cuda_library_loaded"]:
            cuda += f"; not loaded: torch {facts['torch']} has no CUDA"
    head = {
        "u2a_kernels": f"{facts['u2a_kernels']} on Python {facts['python']}",
        "torch": facts["torch"],
        "triton": facts["triton"] or "absent: no fused kernels on GPUs but the CUDA library's",
        "GPU": facts["gpu"] or "none",
        "C++ kernels": built if facts["compiler"] else "not built: the reference serves the CPU",
        "CUDA kernels": cuda,
        "U2A_REQUIRE_FUSED": "1: a reference on CUDA is an error"
        if facts["require_fused"]
        else "-",
    }
    out = [f"{k:<18} {v}" for k, v in head.items()]
    forward = {n.removesuffix("_fwd"): n for n in facts["ops"] if not n.endswith("_bwd")}
    width = max(map(len, forward)) + 2
    row = f"{{:<{width}}}{{:<12}}{{:<14}}{{:<12}}{{}}"
    out += ["", row.format("op", "CPU", "CPU backward", "CUDA", "CUDA backward")]
    for name in sorted(forward):
        who, back = facts["ops"][forward[name]], facts["ops"].get(f"{name}_bwd", {})
        cells = [w.get(device, "-") for device in ("CPU", "CUDA") for w in (who, back)]
        out.append(row.format(name, *cells))
    return out


if __name__ == "__main__":
    facts = report()
    print(json.dumps(facts, indent=2) if "--json" in sys.argv[1:] else "\n".join(lines(facts)))
