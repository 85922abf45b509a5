"""UPCORE: unlearn the core of the candidates and leave outliers in representation space alone.

Outliers blow up the variance of what is unlearnt, and with it the damage done elsewhere. Source:
UPCORE, arXiv 2502.15082: isolation forest on the prompt's last hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from u2a.adapter import evaluating
from u2a.batch import Row, buckets
from u2a.dual import parts
from u2a.select.base import check_budget

Detector = Literal["isolation-forest", "lof", "one-class-svm", "mahalanobis"]


def prompt_states(
    model: nn.Module, rows: Sequence[Row], batch_tokens: int = 8192, *, layer: int = -2
) -> Tensor:
    """`[n, d]` float32 on the CPU: hidden state of each prompt's last token after layer `layer`.

    Layers count as transformers does: 0 the embeddings, -1 after the last layer and its norm, -2
    the second-to-last layer. Raises ValueError for a row without a prompt, by uid.
    """
    backbone, head = parts(model)
    empty = [row.uid for row in rows if not row.prompt_ids]
    if empty:
        raise ValueError(f"prompt_states: {len(empty)} rows have no prompt, first uid {empty[0]}")
    out: Tensor | None = None
    with evaluating(model):
        for group in buckets([len(r.prompt_ids) for r in rows], batch_tokens):
            length = torch.tensor([len(rows[i].prompt_ids) for i in group])
            ids = torch.zeros(len(group), int(length.max()), dtype=torch.int64)
            for b, i in enumerate(group):
                ids[b, : length[b]] = torch.tensor(rows[i].prompt_ids)
            states = backbone(
                input_ids=ids.to(head.weight.device), use_cache=False, output_hidden_states=True
            ).hidden_states[layer]
            last = states[torch.arange(len(group)), length - 1].float().cpu()
            out = last.new_zeros(len(rows), last.shape[1]) if out is None else out
            out[group] = last
    if out is None:
        raise ValueError("prompt_states: rows must hold at least one Row, got none")
    return out


def upcore(
    features: Tensor,
    budget: int | None = None,
    *,
    detector: Detector = "isolation-forest",
    contamination: float = 0.1,
    neighbours: int = 20,
    nu: float = 0.1,
    seed: int = 42,
) -> list[int]:
    """Rows of the core set, the most typical first, at most `budget` of them (default: all).

    Args:
        features: `[n, d]`, the paper's are `prompt_states`.
        detector: "isolation-forest" and "lof" (local outlier factor over `neighbours`) leave out
            the share `contamination`; "one-class-svm" at most about `nu`; "mahalanobis" the share
            `contamination` farthest from the mean after a projection on two principal components.
        seed: of the forest.

    The detectors are scikit-learn's with its other defaults. Raises ValueError for features that
    are not finite, fewer than 3 rows, an unknown detector or a budget out of range.
    """
    n = len(features)
    if features.ndim != 2 or n < 3:
        raise ValueError(f"upcore: features wanted [n >= 3, d], got {list(features.shape)}")
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"upcore: features are not finite in {len(bad)} rows, first row {bad[0]}")
    if detector not in get_args(Detector):
        names = ", ".join(get_args(Detector))
        raise ValueError(f"upcore: detector must be one of {names}; got {detector!r}")
    if budget is not None:
        check_budget(budget, n, "upcore")
    x = features.detach().double().cpu().numpy()
    if detector == "mahalanobis":
        typical = -_mahalanobis(x)
        inlier = typical >= np.quantile(typical, contamination)
    else:
        typical, inlier = _scikit(x, detector, contamination, min(neighbours, n - 1), nu, seed)
    order = np.argsort(-typical, kind="stable")
    return [int(i) for i in order if inlier[i]][:budget]


def _scikit(
    x: np.ndarray, detector: str, contamination: float, neighbours: int, nu: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(how typical each row is, whether it is an inlier)."""
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    if detector == "lof":
        local = LocalOutlierFactor(n_neighbors=neighbours, contamination=contamination)
        inlier = local.fit_predict(x) > 0
        return local.negative_outlier_factor_, inlier
    if detector == "one-class-svm":
        made = OneClassSVM(nu=nu)
    else:
        made = IsolationForest(contamination=contamination, random_state=seed)
    made.fit(x)
    return made.decision_function(x), made.predict(x) > 0


def _mahalanobis(x: np.ndarray) -> np.ndarray:
    """Distance from the mean in the plane of the two first principal components: the length of the
    whitened coordinates."""
    centred = x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    plane = s[:2] > 1e-12 * max(float(s[0]), 1e-300)
    distance: np.ndarray = np.linalg.norm(u[:, :2][:, plane], axis=1) * np.sqrt(len(x) - 1)
    return distance
