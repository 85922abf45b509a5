"""Names of their own for the common activations, on the core of dual_glu."""

from __future__ import annotations

from torch import Tensor

from u2a_kernels._checks import wanted
from u2a_kernels.ops.dual_glu import dual_act, dual_glu

GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _gelu(op: str, approximate: str) -> str:
    if approximate not in GELU:
        raise wanted(op, "approximate", "'none' or 'tanh'", repr(approximate))
    return GELU[approximate]


def dual_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up on dual rows: `dual_glu` with "silu"."""
    return dual_glu(gate, up, "silu")


def dual_geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(gate) * up on dual rows: `dual_glu` with "gelu", or "gelu_tanh" for "tanh"."""
    return dual_glu(gate, up, _gelu("dual_geglu", approximate))


def dual_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x) on dual rows: `dual_act` with "gelu", or "gelu_tanh" for approximate="tanh"."""
    return dual_act(x, _gelu("dual_gelu", approximate))


def dual_silu(x: Tensor) -> Tensor:
    """silu(x) on dual rows: `dual_act` with "silu"."""
    return dual_act(x, "silu")


def dual_relu2(x: Tensor) -> Tensor:
    """relu(x) squared on dual rows: `dual_act` with "relu2"."""
    return dual_act(x, "relu2")
