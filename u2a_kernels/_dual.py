"""What the dual ops share: the [2B, ...] layout, modes and directions.

Rows [:B] are primal, rows [B:] their tangents. In a backward, the cotangent of the tangent half is
the ordinary gradient g, and the cotangent of the primal half is its tangent g_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import shape, wanted

MODES = ("hvp", "ggn", "jvp")


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Primal and tangent rows, as views."""
    n = x.shape[0] // 2
    return x[:n], x[n:]


def join(primal: Tensor, tangent: Tensor | None, like: Tensor) -> Tensor:
    """A contiguous tensor of the shape and dtype of `like`; no tangent means zeros."""
    out = like.new_empty(like.shape)
    first, second = halves(out)
    first.copy_(primal)
    if tangent is None:
        second.zero_()
    else:
        second.copy_(tangent)
    return out


def fresh(x: Tensor) -> Tensor:
    """What `join` returns, for fakes."""
    return x.new_empty(x.shape)


def check_halves(op: str, name: str, x: Tensor, want: str, ndim: int = 2) -> None:
    """At least `ndim` dimensions, the first of them even."""
    if x.ndim < ndim or x.shape[0] % 2:
        raise wanted(op, name, f"{want}, primal rows then as many tangent rows", shape(x))


def check_mode(op: str, mode: str) -> None:
    if mode not in MODES:
        raise wanted(op, "mode", "'hvp', 'ggn' or 'jvp'", repr(mode))


def check_directions(op: str, **directions: Tensor | None) -> None:
    """Tangents of parameters are constants: one that autograd would have to follow is refused."""
    for name, t in directions.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require grad, it is a direction and is not differentiated; "
                "got a tensor that does (detach it)"
            )


def refuse_jvp(op: str, mode: str) -> None:
    """`jvp` saves nothing, so there is no backward."""
    if mode == "jvp":
        raise RuntimeError(f"{op}: mode='jvp' is forward only; use mode='hvp' or mode='ggn'")
