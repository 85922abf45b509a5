"""The section `eval`: the baselines of a run, and what `u2a eval` measures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from u2a.config_sections import Count, Section, SourceConfig


class TofuConfig(Section):
    """Rows of question, answer, perturbed_answer (a list) and, for forget and retain,
    paraphrased_answer."""

    forget: SourceConfig
    retain: SourceConfig | None = None
    real_authors: SourceConfig | None = None
    world_facts: SourceConfig | None = None


class MuseConfig(Section):
    """`verbmem`: beginnings and how they go on; `knowmem`: questions and answers."""

    forget_verbmem: SourceConfig | None = None
    forget_knowmem: SourceConfig | None = None
    retain_knowmem: SourceConfig | None = None


class EvalConfig(Section):
    """Baselines of a run spend the same total weight; `bootstrap` draws make the intervals.

    The rest is for `u2a eval`. `suite` null: every one with data. `holdout`: rows never trained on.
    Answers are generated for the first `generate` rows of a set, for all of tofu and muse.
    """

    baselines: list[
        Literal[
            "uniform",
            "random",
            "low-likelihood",
            "low-reward",
            "topk",
            "grad-norm",
            "cosine",
            "threshold",
            "g-effect",
            "trak",
            "upcore",
            "worst-case",
            "easiest",
        ]
    ] = [
        "uniform",
        "random",
        "low-likelihood",
    ]
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    suite: list[Literal["pa", "forget", "retain", "mia", "tofu", "muse"]] | None = None
    holdout: SourceConfig | None = None
    tofu: TofuConfig | None = None
    muse: MuseConfig | None = None
    generate: Annotated[int, Field(ge=0)] = 64
    max_new_tokens: Count = 200
