"""The section `select`: which candidates are unlearnt, how much of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, field_validator
from pydantic import ValidationInfo as Info

from u2a.config_sections import Count, NonNegative, Positive, Section
from u2a.objective_names import reward_source


class SelectConfig(Section):
    """`greedy`, `pursuit`, `quadratic` and `official`: `u2a.bilevel.Plan.growth`; the others choose
    once (`u2a.select`).

    `updates`: rounds of weight updates after growth; `update` and `eta` as in Plan, `penalty` times
    `penalty_weight` as in `u2a.select.Penalty`. `weight_cap`: largest weight, times the equal one.
    `tolerance`: the loop ends when J has fallen by more. `max_retain_ratio`: bound on the retain
    rows' perplexity, times the start's; rounds are judged, and every method's model delivered,
    mixed back to it (`u2a.mixing`). `reward`: what `low-reward` ranks by, "module:function" or a
    column of data.forget (null: objective.reward). `detector`: of `upcore`. `early_exit`: rows
    leave the loop once ROUGE-L f1 of what the model writes with their answer is below this
    (`u2a.metrics.forgotten`).
    """

    method: Literal[
        "greedy", "pursuit", "quadratic", "official", "topk", "uniform", "random",
        "low-likelihood", "low-reward", "grad-norm", "cosine", "threshold", "g-effect", "trak",
        "upcore", "worst-case", "easiest",
    ] = "greedy"  # fmt: skip
    reward: Annotated[str | None, PlainValidator(reward_source)] = None
    detector: Literal["isolation-forest", "lof", "one-class-svm", "mahalanobis"] = (
        "isolation-forest"
    )
    inverse: Literal["ekfac", "cg", "identity"] = "ekfac"
    budget: Count = 1000
    blocks: Count = 4
    total_weight: Positive = 1.0
    min_gain: float = 0.0
    updates: Annotated[int, Field(ge=0)] = 0
    penalty: Literal["none", "l1", "sqrt", "entropy"] = "none"
    penalty_weight: Positive = 0.01
    update: Literal["mirror", "projected", "proximal"] = "mirror"
    eta: Positive = 1.0
    weight_cap: Annotated[float, Field(ge=1)] = 4.0
    tolerance: NonNegative = 0.0
    max_retain_ratio: Annotated[float, Field(gt=1)] = 1.05
    early_exit: Annotated[float, Field(gt=0, le=1)] | None = None

    @field_validator("update")
    @classmethod
    def _goes_with(cls, value: str, info: Info) -> str:
        if value == "proximal" and info.data.get("penalty") != "l1":
            raise ValueError("penalty l1 beside it")
        return value
