"""Scores that come from the candidates' gradients alone: norm, angle, G-effect, sketches.

All are taken at the model's present parameters; nothing of size [n, p] is held.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from u2a.batch import Pair, Row, row_batches
from u2a.curvature.features import packed
from u2a.index import Full, Sketch, capture, query
from u2a.losses import LOSSES, dpo_objective
from u2a.losses.base import refuse_partner
from u2a.objectives import PairSet
from u2a.outer import Outer
from u2a.products import gradient, with_refs
from u2a.scan import scan
from u2a.tree import dot


def gradient_norms(outer: Outer) -> Tensor:
    """||grad l_i|| of every candidate, `[n]` float32 on the CPU: what grad-norm-k ranks by.

    One forward and one backward of activations per batch. Refuses losses of pairs, ValueError.
    """
    p = outer.problem
    refuse_partner(p.loss, "gradient_norms")
    out = torch.zeros(len(p.forget))
    with capture(outer.model, Full()) as run:
        for batch, ref in with_refs(p.batches(), p.reference):
            out[batch.index] = run.features(packed(batch), p.loss, ref).norm(dim=1).float().cpu()
        run.check_used()
    return out


def cosine_gain(outer: Outer) -> Tensor:
    """-<grad J, grad l_i> / ||grad l_i||, `[n]`: first-order gains of steps of equal length."""
    norm = gradient_norms(outer)
    gain = outer.score(outer.gradient()).gain
    return torch.where(norm > 0, gain / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@dataclass(frozen=True)
class GEffect:
    """`forget [n]` e_u = <grad l_i, grad R_u> and `retain [n]` e_r = <grad l_i, grad R_r>, R_u and
    R_r the mean NLL per answer token of the forget and of the retain rows.

    A small step down l_i changes R_u by -e_u and R_r by -e_r times its length: forgetting wants e_u
    negative, retention e_r not negative.
    """

    forget: Tensor
    retain: Tensor

    def score(self, trade: float = 1.0) -> Tensor:
        """-e_u + trade min(e_r, 0): what is forgotten less `trade` times what is lost."""
        return -self.forget + trade * self.retain.clamp_max(0)


def g_effect(outer: Outer) -> GEffect:
    """Of every candidate, by one dual forward of the pool for each of the two risks.

    Raises ValueError where there are no retain rows. Source: G-effect, arXiv 2502.19301.
    """
    problem = outer.problem
    if not problem.retain:
        raise ValueError("g_effect: the problem has no retain rows, wanted at least one")
    forget, retain = (
        -outer.score(risk_gradient(outer, rows)).gain for rows in (problem.forget, problem.retain)
    )
    return GEffect(forget, retain)


def risk_gradient(outer: Outer, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Gradient of the pooled NLL per answer token of `rows`."""
    batches = row_batches(rows, outer.problem.batch_tokens)
    count = torch.zeros(len(rows))
    for batch in batches:
        count[batch.index] = batch.answer.sum(1).float()
    return gradient(outer.model, batches, LOSSES["nll"], weights=count / count.sum())


def g_effect_by_layer(
    unlearn: Mapping[str, Tensor], risk: Mapping[str, Tensor]
) -> dict[str, float]:
    """<grad L_unlearn, grad R> of every layer, by the number of the block in the parameter's name
    ("" for what lies outside the blocks); their sum is the whole effect."""
    found: dict[str, float] = {}
    for name in unlearn.keys() & risk.keys():
        block = next((part for part in name.split(".") if part.isdecimal()), "")
        found[block] = found.get(block, 0.0) + float(dot({name: unlearn[name]}, risk))
    return dict(sorted(found.items(), key=lambda item: int(item[0] or -1)))


def sketch_gain(
    outer: Outer, pairs: Sequence[Pair], k: int = 4096, damping: float | str = "rel:0.1"
) -> Tensor:
    """-phi_J (Phi^T Phi / n + damping)^-1 phi_i, `[n]`, on sketches phi of all gradients: the form
    of TRAK (arXiv 2303.14186) with one model and J = minus the DPO loss of `pairs`."""
    problem, tokens = outer.problem, outer.problem.batch_tokens
    held = PairSet.build(outer.model, pairs, tokens)
    with tempfile.TemporaryDirectory() as folder:
        index = scan(
            outer.model, problem.forget, loss=problem.loss, mode="index", spec=Sketch(k),
            out=Path(folder) / "index", ref=problem.reference, batch_tokens=tokens, progress=False,
        )  # fmt: skip
        ref = torch.cat([held.chosen, held.rejected])
        q = query(outer.model, held.pairs, dpo_objective, index.spec, ref=ref)
        return -index.scores(q, "preconditioned", damping=damping).flatten().cpu()
