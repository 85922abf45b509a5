"""triton and tl, or inert stand-ins where the package is missing (macOS, Windows).

Under TRITON_INTERPRET=1 (set before triton is imported) kernels run as Python on the CPU; there
bf16 arithmetic and bf16 `tl.dot` are silently wrong, so blocks are upcast right after each load.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Inert:
        """Stands where triton is absent: decorators keep the function, all else is itself."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = _Inert()  # type: ignore[assignment]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def dot_dtype(x: torch.Tensor) -> Any:
    """Operand type for `tl.dot` on x: its own, fp32 when interpreting."""
    return tl.float32 if INTERPRET else _DTYPES[x.dtype]


def dot_precision() -> str:
    """fp32 `tl.dot`: exact unless the user allowed TF32 for torch's own matmuls."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def cuda_launcher(launcher: Any) -> Any:
    """The CUDA owner of an op: the Triton launcher, or None where triton is missing."""
    return launcher if HAS_TRITON else None


@triton.jit
def rne_bf16(x):
    """fp32 to bf16, nearest even, with the same bits compiled and interpreted."""
    u = x.to(tl.uint32, bitcast=True)
    r = u + 0x7FFF + ((u >> 16) & 1)
    r = tl.where(x != x, u | 0x400000, r)
    return (r >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def cast_to(x, like: tl.constexpr):
    """fp32 block to the element type `like`, rounding to nearest even."""
    if like == tl.bfloat16:
        return rne_bf16(x)
    else:
        return x.to(like)


@triton.jit
def tanh(x):
    """Odd polynomial fitted for |x| < 0.625, else by exp(-2|x|)."""
    a = tl.abs(x)
    u = x * x
    e = tl.exp(-2.0 * a)
    q = -5.71703445e-3 * u + 2.06505787e-2
    q = ((q * u - 5.37434965e-2) * u + 1.33314908e-1) * u - 3.33332837e-1
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.625, x + x * (u * q), tl.where(x < 0, -large, large))
