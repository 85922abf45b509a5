"""One call per op: schema, plain-torch reference, fake, CUDA launcher, gradient.

The reference is registered for every device; the C++ library adds CPU kernels, a launcher owns
CUDA. An op without a gradient formula refuses to be differentiated instead of losing the gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "u2a"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OWNERS: dict[str, str] = {}


def cuda_library_path() -> Path | None:
    """The compiled CUDA library that is loaded at import: it was built, and torch has CUDA."""
    if torch.version.cuda is None:
        return None
    return next(Path(__file__).parent.glob("_C_cuda*.so"), None)


def require_fused() -> bool:
    return os.environ.get("U2A_REQUIRE_FUSED") == "1"


def _guarded(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """U2A_REQUIRE_FUSED=1 turns the use of the reference on CUDA into an error."""

    def guard(*args: Any, **kwargs: Any) -> Any:
        if require_fused() and any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
            raise RuntimeError(
                f"{name}: no fused CUDA kernel serves this call (U2A_REQUIRE_FUSED=1)"
            )
        return reference(*args, **kwargs)

    return guard


def refusal(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name}: this op is differentiable once; double backward is not defined through it. "
            "Use u2a.hvp (or float64 eager torch) for second order."
        )

    return backward


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    cuda_library: bool = False,
    cuda_owner: str = "Triton",
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Register `u2a::<schema>` and return its overload, the handle a public function calls.

    One owner per key: on CUDA that is `cuda`, without it the reference; `cuda_owner` is its name in
    reports ("cuBLAS" for torch's own products). With `cuda_library` the
    compiled library holds a kernel of this op, which owns the key wherever the library is loaded.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _guarded(name, reference), "CompositeExplicitAutograd")
    if cuda_library and cuda_library_path() is not None:
        OWNERS[name] = "CUDA"
    elif cuda is not None:
        LIBRARY.impl(name, cuda, "CUDA")
        OWNERS[name] = cuda_owner
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified, backward or refusal(name), setup_context=setup_context, lib=LIBRARY
    )
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def owner(name: str, device: str) -> str:
    """Who serves `u2a::name` on `device` ("CPU", "CUDA"): reference, C++, Triton, cuBLAS, CUDA."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device)
    if not has:
        return "reference"
    if device == "CPU":
        return "C++"
    return OWNERS[name]
