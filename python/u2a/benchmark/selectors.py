"""Every way to choose weights, at one total weight and one budget: name -> weights `[n]`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from u2a.adapter import adapter_disabled
from u2a.benchmark.predicted import SOLVERS
from u2a.benchmark.task import UTILITY, Task
from u2a.bilevel import Plan, bilevel
from u2a.demo.corpus import TOPICS
from u2a.evaluate import mean_nll
from u2a.rewards import rewards
from u2a.select import (
    cosine_gain,
    equal_weights,
    g_effect,
    gradient_norms,
    low_likelihood_k,
    low_reward_k,
    prompt_states,
    random_k,
    sketch_gain,
    threshold,
    topk,
    uniform,
    unlearner,
    upcore,
    worst_case,
)

Selector = Callable[[Task, float, int], Tensor]


def _plan(budget: int, total: float, **options: Any) -> Plan:
    return Plan(budget, total, **{"blocks": 8, "max_retain_ratio": UTILITY, **options})


def _loop(growth: str, **options: object) -> Selector:
    def choose(task: Task, total: float, budget: int) -> Tensor:
        return bilevel(task.outer, _plan(budget, total, growth=growth, **options)).weights

    return choose


def _one_shot(solver: str) -> Selector:
    def choose(task: Task, total: float, budget: int) -> Tensor:
        outer = dataclasses.replace(task.outer, settings=SOLVERS[solver])
        gain = outer.gains(torch.zeros(task.n))[0].gain
        return equal_weights(task.n, topk(gain, budget), total)

    return choose


def _trace(task: Task, total: float, budget: int) -> Tensor:
    """Weights in proportion to positive first-order scores, H = I (arXiv 2511.02623)."""
    outer = dataclasses.replace(task.outer, settings=SOLVERS["identity"])
    return threshold(outer.gains(torch.zeros(task.n))[0].gain, total).float()


def _ranked(score: Callable[[Task], Tensor]) -> Selector:
    """Equal weights on the `budget` candidates of largest score."""

    def choose(task: Task, total: float, budget: int) -> Tensor:
        return equal_weights(task.n, topk(score(task), budget, float("-inf")), total)

    return choose


def _upcore(task: Task, total: float, budget: int) -> Tensor:
    """All of the core set, as its authors have it: it removes outliers and knows no budget."""
    states = prompt_states(task.model, task.work.data.forget, task.tokens)
    return equal_weights(task.n, upcore(states), total)


def _worst(hardest: bool) -> Selector:
    def choose(task: Task, total: float, budget: int) -> Tensor:
        found = worst_case(unlearner(task.outer, total), task.n, budget, hardest=hardest)
        return equal_weights(task.n, found.order, total)

    return choose


def _low_reward(task: Task, total: float, budget: int) -> Tensor:
    """By a reward that knows this task's rude words: what a reward model would have to learn."""
    reward = rewards(task.work.data.forget, task.work.tokenizer, politeness)
    return equal_weights(task.n, low_reward_k(reward, budget), total)


def politeness(completions: Sequence[str], **columns: object) -> list[float]:
    """1 for an answer with a polite opening of the corpus, -1 for a rude one, 0 for neither."""
    kinds = [(t.polite, 1.0) for t in TOPICS.values()] + [(t.rude, -1.0) for t in TOPICS.values()]
    return [
        next((v for words, v in kinds if any(w in text for w in words)), 0.0)
        for text in completions
    ]


def _low_likelihood(task: Task, total: float, budget: int) -> Tensor:
    with adapter_disabled(task.model):
        nll = mean_nll(task.model, task.work.data.forget, task.tokens)
    return equal_weights(task.n, low_likelihood_k(nll, budget), total)


def _oracle(task: Task, total: float, budget: int) -> Tensor:
    """What no method may know: `budget` candidates of the planted harmful class."""
    harmful = torch.tensor([i for i, k in enumerate(task.planted) if k == "harmful"])
    order = torch.randperm(len(harmful), generator=torch.Generator().manual_seed(task.seed))
    return equal_weights(task.n, harmful[order[:budget]].tolist(), total)


def _identity(task: Task, total: float, budget: int) -> Tensor:
    outer = dataclasses.replace(task.outer, settings=SOLVERS["identity"])
    return bilevel(outer, _plan(budget, total)).weights


SELECTORS: dict[str, Selector] = {
    "u2a greedy": _loop("greedy"),
    "u2a pursuit": _loop("pursuit"),
    "u2a mirror": _loop("greedy", rounds=4, eta=0.7),
    "u2a greedy, H = I": _identity,
    "top-k GGN": _one_shot("ggn"),
    "top-k EK-FAC": _one_shot("ekfac"),
    "top-k H = I": _one_shot("identity"),
    "official code": _loop("official", rounds=3, eta=0.01),
    "top-k DataInf": _one_shot("datainf"),
    "top-k TRAK": _ranked(lambda task: sketch_gain(task.outer, task.work.data.pa)),
    "cosine": _ranked(lambda task: cosine_gain(task.outer)),
    "TRACE weights": _trace,
    "uniform": lambda task, total, budget: uniform(task.n, total),
    "random": lambda task, total, budget: equal_weights(
        task.n, random_k(task.n, budget, task.seed), total
    ),
    "low likelihood": _low_likelihood,
    "low reward": _low_reward,
    "gradient norm": _ranked(lambda task: gradient_norms(task.outer)),
    "G-effect": _ranked(lambda task: g_effect(task.outer).score()),
    "UPCORE": _upcore,
    "worst case": _worst(True),
    "easiest": _worst(False),
    "oracle class": _oracle,
}


def chosen(task: Task, name: str, total: float, budget: int) -> tuple[Tensor, float]:
    """(weights, seconds); the model ends at theta*(0)."""
    task.back()
    began = time.perf_counter()
    weights = SELECTORS[name](task, total, budget)
    seconds = time.perf_counter() - began
    task.back()
    return weights, seconds
