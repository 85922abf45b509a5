"""One planted task: corpus, base model, adapter at the optimum without candidates, its truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from u2a.adapter import restore, snapshot
from u2a.config import make_config
from u2a.demo.app import SETTINGS
from u2a.demo.base_model import Shape, train_base
from u2a.demo.corpus import Sizes, write_corpus
from u2a.evaluate import perplexity
from u2a.inner import inner_solve
from u2a.mixing import mix_back
from u2a.objectives import Objective
from u2a.outer import Outer
from u2a.workspace import Workspace, quiet

UTILITY = 1.05  # largest retain perplexity, relative to the start
FILES = ("forget", "pa", "validation", "test", "retain", "retain_test")


@dataclass(frozen=True)
class Preset:
    """Model and training of one size of the task."""

    shape: Shape
    steps: int
    lr: float


PRESETS = {
    "small": Preset(Shape(), 450, 4e-3),
    "medium": Preset(Shape(hidden=320, layers=6, heads=8), 600, 1e-3),
    "large": Preset(Shape(hidden=768, layers=12, heads=12), 800, 5e-4),
}


def sizes(noise: float) -> Sizes:
    """The demo's pool of 216 candidates with `noise` of them mislabelled wanted answers."""
    plain = Sizes()
    pool = plain.harmful + plain.mislabelled + plain.duplicate + plain.unrelated
    wrong = round(noise * pool)
    return replace(
        plain, mislabelled=wrong, harmful=pool - wrong - plain.duplicate - plain.unrelated
    )


@dataclass
class Outcome:
    """What unlearning with some weights did on held-out data, mixed back to the utility bound.

    `validation`: the gain on the validation pairs, by which a user chooses the total weight.
    """

    gain: float
    validation: float
    ratio: float
    mix: float
    raw_gain: float
    raw_ratio: float


class Task:
    """Everything at theta*(0): the model is there between the calls.

    `exact`: in float64, with inner solves to the end of its precision; the change of J that one
    candidate brings is below what float32 leaves of it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        loss: str,
        seed: int,
        noise: float,
        size: str = "small",
        exact: bool = False,
    ) -> None:
        quiet()
        self.loss, self.seed, self.noise, self.size = loss, seed, noise, size
        self.inputs = inputs = folder / f"{size}-seed{seed}-noise{round(100 * noise)}"
        self._prepare(inputs, PRESETS[size])
        self.work = Workspace(_config(inputs, loss, seed, exact), inputs / "run")
        self.outer: Outer = self.work.outer
        self.model = self.work.model
        self.tokens = self.work.cfg.unlearn.batch_tokens
        self.work.resolve(self.work.problem)
        self.start = snapshot(self.model)
        self.test: Objective = self.work.objective(self.work.data.test)
        self.J = self.test.value(self.model)
        self.validation_J = self.outer.value(self.outer.validation)
        self.ppl = self._perplexity()
        self.planted = [str(r.meta["planted"]) for r in self.work.data.forget]

    def _prepare(self, inputs: Path, preset: Preset) -> None:
        if (inputs / "model" / "config.json").exists():
            return
        data = write_corpus(inputs / "data", self.seed, sizes(self.noise))
        train_base(
            inputs / "model", data, self.seed, steps=preset.steps, lr=preset.lr, shape=preset.shape
        )

    @property
    def n(self) -> int:
        return len(self.planted)

    def _perplexity(self) -> float:
        return perplexity(self.model, self.work.data.retain_test, self.tokens)

    def back(self) -> None:
        restore(self.model, self.start)

    def solve(self, weights: Tensor, tol: float = 1e-4, max_iter: int = 150) -> None:
        """The inner optimum for `weights`, from theta*(0)."""
        self.back()
        inner_solve(self.model, self.work.problem.with_weights(weights), tol, max_iter)

    def outcome(self) -> Outcome:
        """Of the model as it is, then back to theta*(0).

        Where retain perplexity is above the bound, theta_0 + a (theta - theta_0) with the largest a
        that is not: `u2a.mixing.mix_back`.
        """
        raw, raw_ratio = self.test.value(self.model) - self.J, self._perplexity() / self.ppl
        mix = mix_back(self.model, self.start, self._perplexity, UTILITY)
        ratio = self._perplexity() / self.ppl
        gain = self.test.value(self.model) - self.J
        validation = self.outer.value(self.outer.validation) - self.validation_J
        self.back()
        return Outcome(gain, validation, ratio, mix, raw, raw_ratio)

    def shares(self, weights: Tensor) -> dict[str, float]:
        """Share of the weight on every planted class."""
        total = float(weights.sum()) or 1.0
        return {
            kind: float(weights[torch.tensor([k == kind for k in self.planted])].sum()) / total
            for kind in sorted(set(self.planted))
        }


def _config(inputs: Path, loss: str, seed: int, exact: bool = False) -> Any:
    tree: dict[str, Any] = {
        "schema": 1,
        "model": {"name": str(inputs / "model"), "dtype": "float32"},
        "data": {
            **{name: {"path": str(inputs / "data" / f"{name}.jsonl")} for name in FILES},
            "template": "plain",
            "max_tokens": 64,
        },
        **{section: dict(values) for section, values in SETTINGS.items()},
        "run": {"seed": seed, "threads": torch.get_num_threads()},
    }
    tree["unlearn"] |= LOSSES[loss]
    if exact:
        tree["model"]["dtype"] = "float64"
        tree["unlearn"] |= {"tol": 1e-7, "max_iter": 200}
    return make_config(tree, source="validation benchmark")


# Every inner problem has the retain term, so gradient ascent here is GradDiff.
LOSSES: dict[str, dict[str, Any]] = {
    "graddiff": {"loss": "graddiff", "anchor": 0.3},
    "npo": {"loss": "npo"},
    "simnpo": {"loss": "simnpo", "beta": 2.5},
}
# Losses are per token, per answer or saturating: a weight means as much as this many of NPO's.
SCALE = {"graddiff": 2.0, "npo": 1.0, "simnpo": 4.0}
