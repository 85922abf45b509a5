"""Triton's interpreter runs other packages' kernels only with what a compiler does for them: float
arguments become float32 scalars, and functions of libdevice exist."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def interpreted() -> Iterator[None]:
    """Nothing on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def convert(x: Any) -> Any:
        if type(x) is not float:
            return converted(x)
        handle = interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert
    replaced = []
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_kernel.ops.") and "rsqrt" in vars(module):
            replaced.append((module, module.rsqrt))
            module.rsqrt = lambda x: 1 / tl.sqrt(x)
    try:
        yield
    finally:
        interpreter._implicit_cvt = converted
        for module, function in replaced:
            module.rsqrt = function
