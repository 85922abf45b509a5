"""UWC mixing in place: a model taken back towards where it began until its utility holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from u2a.adapter import restore, snapshot
from u2a.losses.steps import calibrate


def mix_back(
    model: nn.Module,
    start: Mapping[str, Tensor],
    perplexity: Callable[[], float],
    max_ratio: float,
    *,
    steps: int = 8,
) -> float:
    """Leaves the trainable parameters at start + a (theta - start); returns a in [0, 1].

    a is the largest, by `steps` bisections, at which `perplexity()` of the model is at most
    `max_ratio` times that at `start` (a `snapshot`); 1, and the model untouched, where theta itself
    is within it. A LoRA's factors are mixed, not their product. Source: UWC, arXiv 2406.09179;
    `u2a.losses.steps.calibrate`. Raises ValueError for max_ratio < 1.
    """
    if not max_ratio >= 1:
        raise ValueError(f"mix_back: max_ratio must be >= 1, got {max_ratio}")
    if math.isinf(max_ratio):
        return 1.0
    end = snapshot(model)

    def utility(a: float) -> float:
        restore(model, end if a == 1 else {n: start[n].lerp(t, a) for n, t in end.items()})
        return 1 / perplexity()

    a = calibrate(utility, 1 - 1 / max_ratio, steps=steps)
    utility(a)
    return a
