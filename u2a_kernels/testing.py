"""Shared by tests and benchmarks: the error budget, input makers, and a tape of primal halves.
Nothing else imports this.

The budget needs no per-op numbers: with `exact` the float64 result and `baseline` plain torch at
the op's own dtype, an op may be off by twice what torch is off, plus one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_within_budget(actual: Tensor, exact: Tensor, baseline: Tensor, label: str = "") -> None:
    """max|actual - exact| <= 2 max|baseline - exact| + eps max|exact|; prints the excess.

    eps is that of the result's type. float64 results, for which `exact` is no better than `actual`,
    must agree to 1e-12 of the largest value.
    """
    assert actual.shape == exact.shape, f"{label}: shape {actual.shape}, wanted {exact.shape}"
    assert torch.isfinite(actual).all(), f"{label}: non-finite values"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    own = (baseline.double() - exact).abs().max().item()
    eps = 1e-12 if actual.dtype == torch.float64 else torch.finfo(actual.dtype).eps
    bound = 2 * own + eps * exact.abs().max().item()
    assert error <= bound, (
        f"{label}: error {error:.3e} over the budget {bound:.3e} "
        f"(torch's own {own:.3e}) by {error / max(bound, 1e-300):.2f}x"
    )


def offsets_of(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of the given segment lengths, `[B+1]`."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(dtype)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same on every machine, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class PrimalTape(TorchDispatchMode):
    """While open, keeps the primal half of all that the ops of a dual forward return in `dtype`; or
    puts the halves `held` by another tape in their place.

    A float64 dual run on the halves of a bfloat16 one is exact at the activations that the bfloat16
    model has: its distance to a plain float64 run is the price of rounding activations, that to the
    bfloat16 run the price of rounding everything else. Both runs must call the same ops in turn.

    Args:
        rows, tokens: B and T of the batch; stacked tensors have 2B or 2BT rows. Tensors of three
            dimensions with one row (the rotary angles) are kept whole.
    """

    def __init__(
        self, rows: int, tokens: int, dtype: torch.dtype, held: PrimalTape | None = None
    ) -> None:
        super().__init__()
        self.stacked, self.dtype = (2 * rows, 2 * rows * tokens), dtype
        self.kept: list[tuple[str, Tensor]] = []
        self.held: Iterator[tuple[str, Tensor]] | None = None if held is None else iter(held.kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        backward = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
        if func.is_view or backward or "cross_entropy" in func.name():
            return out
        for t in out if isinstance(out, list | tuple) else (out,):
            if isinstance(t, Tensor) and t.dtype == self.dtype and t.ndim > 1:
                self._visit(func.name(), t)
        return out

    def _visit(self, name: str, t: Tensor) -> None:
        if t.shape[0] in self.stacked:
            t = t[: t.shape[0] // 2]
        elif t.ndim != 3 or t.shape[0] != 1:
            return
        if self.held is None:
            self.kept.append((name, t.clone()))
            return
        found, value = next(self.held, ("nothing", t))
        if (found, value.shape) != (name, t.shape):
            raise ValueError(f"PrimalTape: wanted {name} {list(t.shape)}, held is {found}")
        t.copy_(value)

    @classmethod
    def both(
        cls, rows: int, tokens: int, low: Callable[[], Any], exact: Callable[[], Any]
    ) -> tuple[Any, Any]:
        """`low()` in bfloat16, and `exact()` in float64 at the activations of `low()`."""
        with cls(rows, tokens, torch.bfloat16) as tape:
            got = low()
        with cls(rows, tokens, torch.float64, tape) as replay:
            at_its_primal = exact()
        if replay.held is None or next(replay.held, None) is not None:
            raise ValueError("PrimalTape: the exact run called fewer ops")
        return got, at_its_primal
