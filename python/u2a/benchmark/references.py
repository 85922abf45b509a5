"""What unlearning is compared with, none of it a selector: training on the preference pairs
themselves, and the base model trained without the candidates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from u2a.adapter import device_of
from u2a.benchmark.task import PRESETS, Outcome, Task
from u2a.demo.base_model import train_base
from u2a.evaluate import perplexity
from u2a.objectives import Likelihood, Objective
from u2a.tree import trainable

PULLS = (1.0, 4.0, 16.0)
REFERENCES = ("DPO", "SFT", "retrain")


def reference(task: Task, name: str, pulls: Sequence[float] = PULLS) -> dict[str, Any]:
    """The row of one of `REFERENCES`: test J gained at equal utility, as selectors have it.

    "DPO" and "SFT" train the adapter, with the task's own anchor and retain term, on the pairs and
    on their chosen answers: the best of `pulls`, the weight of that objective. "retrain" is another
    base model, trained as the first was but without the candidates; there is nothing to mix it with
    back to equal utility, so its retain perplexity ratio stands beside it.
    """
    if name not in REFERENCES:
        raise ValueError(f"reference: wanted one of {', '.join(REFERENCES)}; got {name!r}")
    facts = {"seed": task.seed, "loss": task.loss, "noise": task.noise, "selector": name}
    if name == "retrain":
        return facts | asdict(retrained(task))
    J = task.outer.objective
    if name == "SFT":
        J = Likelihood([p.chosen for p in task.work.data.pa], task.tokens)
    best: dict[str, Any] = {"gain": float("-inf")}
    for pull in pulls:
        task.back()
        _raise(task, J, pull)
        best = max(best, asdict(task.outcome()) | {"pull": pull}, key=lambda row: row["gain"])
    return facts | best


def _raise(task: Task, J: Objective, pull: float) -> None:
    """To the optimum of F(theta, 0) - pull J."""
    params, problem = trainable(task.model), task.work.problem
    optimizer = torch.optim.LBFGS(
        params.values(), max_iter=150, history_size=20, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = problem.loss_and_grad(task.model)
        for name, g in J.gradient(task.model).items():
            grad = params[name].grad
            params[name].grad = -pull * g if grad is None else grad - pull * g
        return value - pull * J.value(task.model)

    optimizer.step(closure)  # type: ignore[arg-type]
    optimizer.zero_grad()


def retrained(task: Task) -> Outcome:
    """The base model without the candidates, trained once and kept beside the first."""
    from transformers import AutoModelForCausalLM

    folder = task.inputs / "retrained"
    if not (folder / "config.json").exists():
        data = {p.stem: p for p in (task.inputs / "data").glob("*.jsonl")}
        lines = data["forget"].read_text(encoding="utf-8").splitlines()
        gone = {(r["prompt"], r["completion"]) for r in map(json.loads, lines)}
        preset = PRESETS[task.size]
        train_base(
            folder, data, task.seed, steps=preset.steps, lr=preset.lr, shape=preset.shape,
            leave_out=gone,
        )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model = model.to(device_of(task.model)).eval()
    gain = task.test.value(model) - task.J
    ratio = perplexity(model, task.work.data.retain_test, task.tokens) / task.ppl
    validation = task.outer.validation.value(model) - task.validation_J
    return Outcome(gain, validation, ratio, 1.0, gain, ratio)
