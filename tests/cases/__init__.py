"""One case per op: inputs, an independent oracle, and what the contract test needs to know."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`inputs(variant, dtype)` makes keyword arguments of the public function; `oracle` is a plain
    definition of the result, apart from the op's own reference and differentiable by autograd.

    `launchers` maps an implementation name to a callable with the public signature (e.g. the Triton
    launcher, run interpreted); `backward_launchers` likewise, asked for their gradients.
    `spoil(inputs)` puts NaN into one row and returns a function that picks, from a tuple of
    outputs, what must not change. `errors`: label -> (changed arguments, exception, message
    pattern).
    """

    name: str
    public: Callable[..., Any]
    overload: Any
    op_args: Callable[[Inputs], tuple[Any, ...]]
    inputs: Callable[[str, torch.dtype], Inputs]
    oracle: Callable[..., Any]
    variants: Sequence[str]
    differentiable: Sequence[str]
    spoil: Callable[[Inputs], Callable[[tuple[Tensor, ...]], Sequence[Tensor]]]
    errors: dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]
    launchers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    backward_launchers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    grad_outputs: Sequence[int] = (0,)

    def __str__(self) -> str:
        return self.name


def all_cases() -> list[Case]:
    found = []
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found += importlib.import_module(f"{__name__}.{module}").CASES
    return found


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating tensors to `dtype`; everything else as it is."""
    return {
        k: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
