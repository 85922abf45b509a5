"""Weights of every selector that ranks once, by the name a configuration gives it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from u2a.adapter import adapter_disabled
from u2a.errors import DataError
from u2a.evaluate import mean_nll
from u2a.rewards import load_reward, rewards
from u2a.select import (
    Selection,
    cosine_gain,
    equal_weights,
    g_effect,
    gradient_norms,
    prompt_states,
    select,
    sketch_gain,
    threshold,
    unlearner,
    upcore,
    worst_case,
)
from u2a.workspace import Workspace

LEAST = float("-inf")


def one_shot(work: Workspace, gain: Tensor, method: str, total: float) -> Tensor:
    """Weights `[n]` summing to `total`, at the model's present parameters.

    `gain [n]`: that of the configured solve. Raises ValueError, DataError as the selectors do.
    """
    s, rows = work.cfg.select, work.data.forget
    n, budget = len(rows), min(s.budget, len(rows))
    if method == "threshold":
        return threshold(gain, total).float()
    if method in ("upcore", "worst-case", "easiest"):
        order = _set(work, method, budget, total)
        return equal_weights(n, order, total)
    kind, floor = ("topk", LEAST) if method in SCORES else (method, s.min_gain)
    scores = SCORES[method](work) if method in SCORES else gain
    found: Selection = select(
        scores, method=kind, budget=budget, total_weight=total, min_gain=floor,
        uids=[r.uid for r in rows], seed=work.cfg.run.seed,
    )  # fmt: skip
    return found.weights


def _set(work: Workspace, method: str, budget: int, total: float) -> list[int]:
    if method == "upcore":
        states = prompt_states(work.model, work.data.forget, work.cfg.unlearn.batch_tokens)
        return upcore(states, budget, detector=work.cfg.select.detector)
    n, hardest = len(work.data.forget), method == "worst-case"
    return list(worst_case(unlearner(work.outer, total), n, budget, hardest=hardest).order)


def _nll(work: Workspace) -> Tensor:
    with adapter_disabled(work.model):
        return mean_nll(work.model, work.data.forget, work.cfg.unlearn.batch_tokens)


def _low_reward(work: Workspace) -> Tensor:
    """Minus `select.reward`: a function's, or a column's of the forget file."""
    name, rows = work.cfg.select.reward or work.cfg.objective.reward, work.data.forget
    assert name is not None
    if ":" in name:
        return -rewards(rows, work.tokenizer, load_reward(name, "select.reward"))
    odd = [r for r in rows if not isinstance(r.meta.get(name), int | float)]
    if odd:
        raise DataError(
            f"select.reward: column {name!r} is not a number in {len(odd)} forget rows",
            [f"{r.source}: {r.meta.get(name)!r:.60}" for r in odd[:10]],
        )
    return -torch.tensor([float(r.meta[name]) for r in rows], dtype=torch.float64)


SCORES: dict[str, Callable[[Workspace], Tensor]] = {
    "low-likelihood": _nll,
    "low-reward": _low_reward,
    "grad-norm": lambda work: gradient_norms(work.outer),
    "cosine": lambda work: cosine_gain(work.outer),
    "g-effect": lambda work: g_effect(work.outer).score(),
    "trak": lambda work: sketch_gain(work.outer, work.data.pa),
}
