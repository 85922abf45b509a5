"""install.py PYTHON: puts the peers into the environment of PYTHON; what went wrong with which of
them is written to peers.json beside it, for the table. What is there already is left alone.

The pinned set of this project constrains every install, so torch stays what it is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PEERS = {
    "bergson": ("bergson==2.5.1", "bergson"),
    "curvlinops": ("curvlinops-for-pytorch==3.0.1", "curvlinops"),
    "dattri": ("dattri==0.3.0", "dattri.algorithm.logra"),
    "hessian-eigenthings": ("hessian-eigenthings==1.0.0a5", "hessian_eigenthings.operators"),
    "jvp_flash_attention": ("jvp_flash_attention==0.14.0", "jvp_flash_attention"),
    "kronfluence": ("kronfluence==1.0.1", "kronfluence"),
    "liger": ("liger-kernel==0.8.5", "liger_kernel"),
    "logix": ("logix-ai==0.1.1", "logix"),
    "opacus": ("opacus==1.6.0", "opacus"),
    "pyhessian": ("pyhessian==0.1", "pyhessian"),
    "traker": ("traker==0.3.2", "trak"),
}
# Dependencies of a peer that its gradient store does not use and whose builds do not load beside
# every torch; a broken one breaks transformers as well.
OPTIONAL = ["torchaudio", "torchvision"]
PINS = "requirements/pinned.txt"


def run(*command: str) -> str | None:
    """None when it went well, else the last lines it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " ".join(lines[-2:])[-300:] or f"exit {done.returncode}"


def install(python: str, requirement: str) -> str | None:
    links = os.environ.get("PIP_FIND_LINKS", "")
    find = ["--find-links", links] if links else []
    uv = [python, "-m", "uv", "pip", "install", "--python", python, *find]
    if run(*uv, "-c", PINS, requirement) is None:
        return None
    pip = [python, "-m", "pip", "install", "--ignore-requires-python"]
    return run(*pip, "-c", PINS, requirement)


def drop_broken(python: str) -> list[str]:
    broken = [name for name in OPTIONAL if present(python, name) and imports(python, name)]
    if broken:
        run(python, "-m", "pip", "uninstall", "-y", *broken)
    return broken


def present(python: str, name: str) -> bool:
    return run(python, "-m", "pip", "show", "-q", name) is None


def imports(python: str, module: str) -> str | None:
    return run(python, "-W", "ignore", "-c", f"import {module}")


def main() -> None:
    python = sys.argv[1]
    file = Path(python).parents[1] / "peers.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    state = {name: {"requirement": requirement} for name, (requirement, _) in PEERS.items()}
    done = [name for name in PEERS if before.get(name) == state[name] | {"error": None}]
    faults = {name: install(python, PEERS[name][0]) for name in PEERS if name not in done}
    for name in drop_broken(python) if faults else []:
        print(f"  {name} removed: it does not load beside this torch")
    for name, (requirement, module) in PEERS.items():
        fault = None if name in done else faults[name] or imports(python, module)
        state[name] |= {"error": fault}
        print(f"  {requirement}: {fault or 'installed'}", flush=True)
    file.write_text(json.dumps(state, indent=1))


if __name__ == "__main__":
    main()
