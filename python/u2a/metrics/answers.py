"""Metrics of single answers: probability, and likeness of generated text to a wanted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from u2a.errors import EnvironmentError_
from u2a.metrics.tokens import check_count


def probability(nll: Tensor, count: Tensor) -> Tensor:
    """exp(-NLL/|y|) `[R]` float64, the geometric mean of the token probabilities.

    `nll [R]` summed, `count [R]` answer tokens (`u2a.evaluate.token_nll`). Raises ValueError for a
    row without token. Source: TOFU, arXiv 2401.06121.
    """
    check_count("probability", count)
    return (-nll.double() / count).exp()


def probability_with_options(right: Tensor, wrong: Sequence[Tensor]) -> Tensor:
    """p_right / (p_right + sum of p_wrong) `[R]`; the probabilities are those of `probability`.

    `right [R]`, `wrong`: of every row its wrong answers' `[W_i]`, at least one. Where all
    probabilities are 0 the result is 0. Source: TOFU (real authors, world facts), arXiv 2401.06121.
    """
    _options("probability_with_options", right, wrong)
    total = torch.stack([w.double().sum() for w in wrong]) + right.double()
    return torch.where(total > 0, right.double() / total.clamp_min(1e-300), 0.0)


def _options(op: str, right: Tensor, wrong: Sequence[Tensor]) -> None:
    if right.ndim != 1 or len(wrong) != len(right):
        raise ValueError(
            f"{op}: wanted one set of wrong answers per row, {list(right.shape)}; got {len(wrong)}"
        )
    for i, w in enumerate(wrong):
        if w.ndim != 1 or not len(w):
            raise ValueError(f"{op}: row {i} has {list(w.shape)} wrong answers, wanted [W >= 1]")


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L of texts, float64 `[R]` each."""

    recall: Tensor
    f1: Tensor


def rouge_l(references: Sequence[str], texts: Sequence[str]) -> Rouge:
    """Longest common subsequence of stemmed words, by the package rouge-score.

    Recall = its length / words of the reference; 0 for an empty text. Raises ValueError for another
    number of texts, EnvironmentError_ without rouge-score.
    Source: Lin 2004; TOFU takes recall, MUSE f1.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise EnvironmentError_(
            'ROUGE-L: package rouge-score is missing: pip install "u2a-kernels[eval]"'
        ) from None
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [scorer.score(a, b)["rougeL"] for a, b in _both("rouge_l", references, texts)]
    return Rouge(
        torch.tensor([f.recall for f in found], dtype=torch.float64),
        torch.tensor([f.fmeasure for f in found], dtype=torch.float64),
    )


def _both(op: str, references: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    if len(references) != len(texts):
        raise ValueError(f"{op}: {len(references)} references, wanted as many texts: {len(texts)}")
    return list(zip(references, texts, strict=True))
