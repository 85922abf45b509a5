"""Every loss of the table through the model products, the inner problem and the configuration."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch
from tiny_models import direction, make, rows
from torch.autograd import grad

from u2a import loss_names
from u2a.adapter import reference_logps, restore, sequence_logps, snapshot, token_logps
from u2a.batch import Pair
from u2a.curvature import GaussNewton
from u2a.curvature.features import row_features
from u2a.curvature.sources import sources
from u2a.inner import InnerProblem, inner_solve
from u2a.losses import LOSSES, describe, get_loss
from u2a.losses.base import PARTNER
from u2a.objectives import PairSet, Preference
from u2a.outer import Outer, SolveSettings
from u2a.products import ggnvp, gradient, hvp, jvp_scores, quadratic
from u2a.tree import dot, norm, trainable

WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.3], dtype=torch.float64)
WIRED = [name for name, loss in LOSSES.items() if loss.wired]


@pytest.fixture(scope="module")
def model():
    return make("gpt2", lora=True)  # float64 throughout: no norm of it goes through float32


def problem(model, name: str, **settings) -> InnerProblem:
    """Five forget rows in batches of at most two; the reference is the adapter switched off."""
    partners = rows(1, ((2, 3), (1, 4), (3, 2), (4, 1), (1, 5)))
    if PARTNER in LOSSES[name].needs:
        settings["partners"] = partners
    return InnerProblem.build(
        model, rows(), WEIGHTS, get_loss(name), batch_tokens=20, **settings
    )  # fmt: skip


def value_gradient(model, p: InnerProblem) -> dict[str, torch.Tensor]:
    """By autograd of the inner problem's own value."""
    params = trainable(model)
    total = torch.stack([part.value(model) for part in p.parts()]).sum()
    found = grad(total, list(params.values()), allow_unused=True)
    return {n: torch.zeros_like(q) if g is None else g
            for (n, q), g in zip(params.items(), found, strict=True)}  # fmt: skip


def moved(model, v, by: float) -> None:
    with torch.no_grad():
        for n, q in trainable(model).items():
            q.add_(v[n], alpha=by)


def close(a, b, tol: float) -> None:
    size = max(norm(b).item(), 1e-3)
    assert norm({n: t - b[n] for n, t in a.items()}).item() < tol * size


@pytest.mark.parametrize("name", WIRED)
def test_products_against_autograd_and_differences(model, name):
    p = problem(model, name)
    batches, v = p.batches(), direction(model, 2)
    assert len(batches) > 1
    given = dict(weights=WEIGHTS, ref=p.reference)
    g = gradient(model, batches, p.loss, **given)
    close(g, value_gradient(model, p), 1e-10)

    scores = jvp_scores(model, batches, p.loss, v, ref=p.reference)
    assert scores.shape == (5,)
    assert (scores * WEIGHTS).sum().item() == pytest.approx(dot(g, v).item(), rel=1e-8)
    one = gradient(model, p.batches([3]), p.loss, weights=torch.ones(5), ref=p.reference)
    assert scores[3].item() == pytest.approx(dot(one, v).item(), rel=1e-8)
    mean = gradient(model, batches, p.loss, ref=p.reference)
    assert dot(mean, v).item() == pytest.approx(scores.mean().item(), rel=1e-8)

    step = 1e-4 / norm(v).item()
    ends = []
    for sign in (1, -2):
        moved(model, v, sign * step)
        ends.append(gradient(model, batches, p.loss, **given))
    moved(model, v, step)
    slope = {n: (a - ends[1][n]) / (2 * step) for n, a in ends[0].items()}
    close(hvp(model, batches, p.loss, v, **given), slope, 1e-5)


def test_curvature_of_pairs(model):
    p = problem(model, "altpo")
    v = direction(model, 3)
    given = dict(weights=WEIGHTS, ref=p.reference)
    got = dot(ggnvp(model, p.batches(), p.loss, v, **given), v).item()
    assert got == pytest.approx(quadratic(model, p.batches(), p.loss, v, **given), rel=1e-8)
    assert got > 0
    operator = GaussNewton(model, p.batches(), p.loss, **given)
    for who, call in (
        ("kfac", lambda: sources(operator)),
        ("sampled", lambda: operator.sampled(2)),
        ("row_features", lambda: row_features(model, p.batches(), p.loss, p.reference)),
    ):
        with pytest.raises(ValueError, match=f"{who}: loss altpo pairs rows with partners"):
            call()


def test_batches_carry_row_numbers_and_partners(model):
    p = problem(model, "altpo")
    for b in p.batches([4, 1, 2]):
        half = len(b) // 2
        assert torch.equal(b.index[half:], b.index[:half] + 5)
        for i, ids, length in zip(b.index.tolist(), b.ids, b.length.tolist(), strict=True):
            row = p.forget[i] if i < 5 else p.partners[i - 5]
            assert tuple(ids[:length].tolist()) == row.prompt_ids + row.answer_ids
    each = [len(part.coef) for part in p.forget_parts()]
    assert sum(each) == 4 and p.support == [0, 2, 3, 4]


def test_reference_per_token(model):
    r = rows()
    per_token = token_logps(model, r, 20)
    assert per_token.shape == (5, 6)
    torch.testing.assert_close(per_token.sum(1), sequence_logps(model, r, 20))
    assert (per_token[1, 2:] == 0).all() and (per_token[4] < 0).all()
    summed, tokens = (reference_logps(model, r, per_token=t) for t in (False, True))
    torch.testing.assert_close(tokens.sum(1), summed)
    tnpo = problem(model, "tnpo")
    assert tnpo.reference.shape == (5, 6)
    # NPO may be given them per token too
    npo = problem(model, "npo")
    a = gradient(model, npo.batches(), npo.loss, ref=npo.reference)
    close(gradient(model, npo.batches(), npo.loss, ref=tnpo.reference), a, 1e-10)


@pytest.mark.parametrize("name", ["altpo", "flat_tv", "tnpo", "topr"])
def test_outer_gains_predict(model, name):
    """-<v, grad l_i> against the realised change of J by exact inner solves with a small weight."""
    before = snapshot(model)
    retain = {"retain": rows(5, ((2, 2), (1, 3))), "retain_weight": 0.5}
    p = problem(model, name, anchor=10.0, **retain).with_weights(torch.zeros(5))
    good, bad = rows(7, ((2, 3), (1, 2))), rows(8, ((2, 2), (1, 3)))
    pairs = [Pair(str(i), g, b) for i, (g, b) in enumerate(zip(good, bad, strict=True))]
    pairset = PairSet.build(model, pairs, 100)
    settings = SolveSettings("cg", "hessian", 0.0, tol=1e-10)
    J = Preference(pairset, 0.3, 100)
    outer = Outer(model, p, J, J, settings, lambda q: {})
    assert inner_solve(model, p, 1e-9, 100).grad_max < 1e-7
    start, base, w = snapshot(model), outer.value(), 1e-3
    scores, _ = outer.gains(torch.zeros(5))
    assert scores.uid == [f"row{i}" for i in range(5)]
    for i in (0, 3):
        one = torch.zeros(5, dtype=torch.float64)
        one[i] = w
        assert inner_solve(model, p.with_weights(one), 1e-9, 100).grad_max < 1e-7
        assert outer.value() - base == pytest.approx(w * scores.gain[i].item(), rel=2e-2)
        restore(model, start)
    restore(model, before)


def test_wrong_problems_are_named(model):
    p = problem(model, "altpo")
    with pytest.raises(ValueError, match=r"partners: loss altpo wants 5 .* got 0"):
        dataclasses.replace(p, partners=())
    with pytest.raises(ValueError, match=r"partners: loss npo wants none .* got 5"):
        dataclasses.replace(p, loss=get_loss("npo"))
    with pytest.raises(ValueError, match=r"loss altpo wants log-probs \[10\], got \[5\]"):
        dataclasses.replace(p, reference=p.reference[:5])
    with pytest.raises(ValueError, match=r"reference: loss tnpo wants log-probs \[5, L\]"):
        dataclasses.replace(problem(model, "npo"), loss=get_loss("tnpo"))
    with pytest.raises(ValueError, match="loss: rmu needs hidden states, reference, which rows"):
        InnerProblem.build(model, rows(), WEIGHTS, get_loss("rmu"), reference=WEIGHTS)


def test_names_for_the_configuration_match_the_table():
    single, paired = set(loss_names.SINGLE), set(loss_names.PAIRED)
    assert paired == {n for n, x in LOSSES.items() if PARTNER in x.needs}
    assert single <= {n for n, x in LOSSES.items() if x.wired} - paired
    assert set(LOSSES) == (single | paired | set(loss_names.LIBRARY)) - {"pmpo", "fdpg"}
    options = {n: tuple(x.options) for n, x in LOSSES.items() if x.options}
    assert options == loss_names.OPTIONS
    assert set(loss_names.INEXACT) == {n for n, x in LOSSES.items() if not x.exact}


def test_the_page_of_losses_is_current():
    page = Path(__file__).parents[1] / "docs" / "losses.md"
    assert page.read_text() == describe.markdown(), "python -m u2a.losses.describe > docs/losses.md"
    for name, *_ in describe.PARTS:
        module, _, names = name.rpartition(".")
        for part in names.split(", "):
            assert callable(getattr(importlib.import_module(module), part))
