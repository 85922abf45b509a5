"""What a selection is, and the checks that all selectors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Round:
    """One block: the candidates added, their gains when added, J measured after the re-solve."""

    added: tuple[int, ...]
    gain: tuple[float, ...]
    J: float | None


@dataclass(frozen=True)
class Selection:
    """`weights [n]` (0 off the support), `order` of selection, one Round per block, and why it
    `stopped`: "budget", "no positive gain", "J fell"."""

    weights: Tensor
    order: tuple[int, ...]
    rounds: tuple[Round, ...] = field(default=())
    stopped: str = "budget"


def check_gain(gain: Tensor, n: int, uids: Sequence[str] | None, op: str) -> Tensor:
    if gain.shape != (n,):
        raise ValueError(f"{op}: scores wanted shape [{n}], got {list(gain.shape)}")
    bad = (~gain.isfinite()).nonzero().flatten().tolist()
    if bad:
        names = [f"uid {uids[i]}" if uids else f"row {i}" for i in bad[:3]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(f"{op}: scores are not finite at {', '.join(names)}{more}")
    return gain.detach().double().cpu()


def check_budget(budget: int, n: int, op: str) -> int:
    if not 1 <= budget <= n:
        raise ValueError(f"{op}: budget must be in [1, {n}] (candidates), got {budget}")
    return budget


def check_box(total: float, cap: float | None, room: int, op: str) -> None:
    if not 0 < total < float("inf"):
        raise ValueError(f"{op}: total weight must be positive and finite, got {total}")
    if cap is not None and not cap * room >= total * (1 - 1e-12):
        raise ValueError(
            f"{op}: {room} rows of at most cap {cap:g} hold {cap * room:g}, wanted total {total:g}"
        )
