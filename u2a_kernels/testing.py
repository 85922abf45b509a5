"""Shared by tests and benchmarks: the error budget and input makers. Nothing else imports this.

The budget needs no per-op numbers: with `exact` the float64 result and `baseline` plain torch at
the op's own dtype, an op may be off by twice what torch is off, plus one rounding of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
