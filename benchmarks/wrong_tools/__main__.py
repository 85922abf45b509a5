"""What tools give at second order on transformers and their parts, beside the float64 truth.

    python benchmarks/wrong_tools [torch|packages|ours ...]

A line for each repro of `of_*.py`: the entry that is furthest off, the tool's and the true one, the
relative error of the tensor it is in, and a verdict. Tools that are not installed say so; without a
GPU, Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
GROUPS = ("torch", "packages", "ours")
PACKAGES = ("torch", "transformers", "peft", "triton", "curvlinops-for-pytorch", "pyhessian",
            "hessian-eigenthings", "dattri", "liger-kernel", "jvp-flash-attention")  # fmt: skip


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main(groups: list[str]) -> None:
    from repro import judge

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(versions())
    print(f"{'tool':44}{'quantity':36}{'its entry':>12}{'truth':>12}{'error':>10}  verdict")
    for group in groups or GROUPS:
        for r in import_module(f"of_{group}").FOUND:
            o = judge(r)
            if o.said:
                print(f"{r.tool:44}{r.quantity:36}{o.verdict:>34}  {o.said[:100]}", flush=True)
            else:
                numbers = f"{o.got:12.5g}{o.want:12.5g}{o.error:10.1e}"
                print(f"{r.tool:44}{r.quantity:36}{numbers}  {o.verdict}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
