"""Selectors that look at the model, in float64, against brute force and hand-made cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from scipy.stats import spearmanr
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM
from test_interactions import outer, pairs, rows

from u2a.adapter import snapshot
from u2a.batch import collate
from u2a.evaluate import mean_nll
from u2a.products import answer_logps
from u2a.select import (
    cosine_gain,
    g_effect,
    g_effect_by_layer,
    gradient_norms,
    low_reward_k,
    prompt_states,
    sketch_gain,
    unlearner,
    upcore,
    worst_case,
)
from u2a.select.gradients import risk_gradient
from u2a.tree import dot, flatten, trainable

DETECTORS = ("isolation-forest", "lof", "one-class-svm", "mahalanobis")


@pytest.fixture(scope="module")
def made():
    return outer(retain=1.0)


def cloud(n=40, outliers=4):
    """A round cloud and, at its end, far points, each in a corner of its own."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n + outliers, 6, generator=draw)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    x[n:] = 40 * signs[:outliers].repeat(1, 3)
    return x


@pytest.mark.parametrize("detector", [d for d in DETECTORS if d != "one-class-svm"])
def test_upcore_leaves_the_outliers_out(detector):
    x = cloud()
    core = upcore(x, detector=detector)
    assert not set(core) & {40, 41, 42, 43}
    assert len(core) == len(set(core)) >= 36
    assert upcore(x, 7, detector=detector) == core[:7]


@pytest.mark.parametrize(
    ("detector", "theirs"),
    [
        ("isolation-forest", IsolationForest(contamination=0.1, random_state=42)),
        ("one-class-svm", OneClassSVM(nu=0.1)),
        ("lof", LocalOutlierFactor(n_neighbors=20, contamination=0.1)),
    ],
)
def test_upcore_is_scikit_learn_with_the_defaults_of_the_paper(detector, theirs):
    x = cloud()
    inlier = theirs.fit_predict(x.double().numpy()) > 0
    core = upcore(x, detector=detector)
    assert sorted(core) == np.flatnonzero(inlier).tolist()
    scores = theirs.negative_outlier_factor_ if detector == "lof" else None
    scores = theirs.decision_function(x.double().numpy()) if scores is None else scores
    assert (np.diff(scores[core]) <= 0).all()


def test_mahalanobis_is_that_of_two_principal_components():
    x = (
        torch.randn(30, 5, dtype=torch.float64)
        @ torch.diag(torch.tensor([9.0, 5, 2, 1, 1])).double()
    )
    centred = (x - x.mean(0)).numpy()
    _, axes = np.linalg.eigh(np.cov(centred.T))
    plane = centred @ axes[:, -2:]
    inverse = np.linalg.inv(np.cov(plane.T))
    distance = [mahalanobis(p, np.zeros(2), inverse) for p in plane]
    core = upcore(x, detector="mahalanobis", contamination=0.2)
    assert core == np.argsort(distance, kind="stable")[:24].tolist()


def test_upcore_refuses():
    x = cloud()
    with pytest.raises(ValueError, match="one of isolation-forest, lof, .*; got 'forest'"):
        upcore(x, detector="forest")
    with pytest.raises(ValueError, match=r"budget must be in \[1, 44\]"):
        upcore(x, 45)
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="not finite in 1 rows, first row 3"):
        upcore(x)
    with pytest.raises(ValueError, match=r"\[n >= 3, d\], got \[2, 6\]"):
        upcore(x[:2])


@pytest.mark.parametrize("layer", [-2, 0])
def test_prompt_states_are_those_of_each_prompt_alone(made, layer):
    data = rows(9)
    found = prompt_states(made.model, data, 8, layer=layer)
    for row, state in zip(data, found, strict=True):
        ids = torch.tensor([row.prompt_ids])
        with torch.no_grad():
            wanted = made.model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(state, wanted[0, -1].float())
    with pytest.raises(ValueError, match="1 rows have no prompt, first uid row1"):
        prompt_states(made.model, [data[0], replace(data[1], prompt_ids=())])


def by_row(made, loss=None):
    """grad l_i of every candidate, one at a time."""
    params, p, out = trainable(made.model), made.problem, []
    for i, row in enumerate(p.forget):
        ref = None if loss else p.reference[i : i + 1]
        lp = answer_logps(made.model, collate([row]), ref=ref)
        value = (loss or p.loss)(lp).sum()
        out.append(
            dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
        )
    return out


def pooled(made, data):
    """Gradient of sum NLL / sum tokens over `data`."""
    params = trainable(made.model)
    parts = [answer_logps(made.model, collate([row])) for row in data]
    value = -torch.cat([lp.logp for lp in parts]).mean()
    return dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))


def test_norms_and_angles_are_those_of_the_gradients(made):
    grads, up = by_row(made), made.gradient()
    norms = torch.tensor([float(flatten(g).norm()) for g in grads])
    torch.testing.assert_close(gradient_norms(made), norms)
    angles = torch.stack([-dot(up, g) for g in grads]) / norms
    torch.testing.assert_close(cosine_gain(made).double(), angles, rtol=1e-5, atol=1e-9)


def test_g_effect_is_an_inner_product_with_either_risk(made):
    grads, found = by_row(made), g_effect(made)
    for side, data in ((found.forget, made.problem.forget), (found.retain, made.problem.retain)):
        risk = pooled(made, data)
        torch.testing.assert_close(flatten(risk_gradient(made, data)), flatten(risk))
        torch.testing.assert_close(
            side, torch.stack([dot(g, risk) for g in grads]), check_dtype=False
        )
    lost = found.retain.clamp_max(0)
    torch.testing.assert_close(found.score(2.0), 2 * lost - found.forget)
    risk = pooled(made, made.problem.retain)
    layers = g_effect_by_layer(grads[0], risk)
    assert list(layers) == ["1"]
    assert layers["1"] == pytest.approx(float(found.retain[0]))
    outside = {"wte.weight": torch.ones(2), "h.10.x": torch.ones(3), "h.9.x": torch.ones(1)}
    assert g_effect_by_layer(outside, outside) == {"": 2.0, "9": 1.0, "10": 3.0}
    with pytest.raises(ValueError, match="no retain rows"):
        g_effect(outer())


def test_sketched_gain_is_the_preconditioned_product(made):
    g = torch.stack([flatten(x) for x in by_row(made)]).double()
    up = flatten(made.objective.gradient(made.model)).double()
    moment = g.T @ g / len(g)
    moment.diagonal().add_(0.5)
    wanted = -(g @ torch.linalg.solve(moment, up))
    # the sketch takes J with beta 0.3 on the same pairs; k is above the number of parameters
    found = sketch_gain(made, pairs(4), k=4096, damping=0.5).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.1
    assert spearmanr(found, wanted).statistic == pytest.approx(1.0)


def test_low_reward():
    assert low_reward_k(torch.tensor([0.5, -2.0, 0.1, -2.0]), 3) == [1, 3, 2]


def test_worst_case_of_losses_that_do_not_move():
    loss = torch.tensor([3.0, 0.5, 2.0, 0.1, 1.0])
    kept = worst_case(lambda w: loss, 5, 2)
    assert kept.order == (3, 1) and kept.weights.tolist() == [0, 1, 0, 1, 0]
    assert worst_case(lambda w: loss, 5, 2, hardest=False).order == (0, 2)


def test_worst_case_steps_by_hand():
    """w = 1/2 each; the losses' mean falls out by the projection, the ridge pulls towards equal."""
    seen = []

    def unlearn(w):
        seen.append(w.clone())
        return torch.tensor([1.0, 2.0, 3.0, 4.0])

    worst_case(unlearn, 4, 2, rounds=3, lr=0.1, ridge=0.5)
    torch.testing.assert_close(seen[0], torch.full((4,), 0.5, dtype=torch.float64))
    first = torch.tensor([0.65, 0.55, 0.45, 0.35], dtype=torch.float64)  # 0.5 - 0.1 (l - 2.5)
    torch.testing.assert_close(seen[1], first)
    # w - 0.1 (l + w) has mean 0.2 and wants 0.5
    second = torch.tensor([0.785, 0.595, 0.405, 0.215], dtype=torch.float64)
    torch.testing.assert_close(seen[2], second)


def test_worst_case_follows_what_unlearning_does():
    """Row i resists unless it is unlearnt with its twin: the hardest pair are no twins."""
    base = torch.tensor([0.0, 0.1, 0.3, 0.4]).double()
    twin = torch.tensor([1, 0, 3, 2])

    def unlearn(w):
        return base + 3 * w.double() * w.double()[twin]

    def cost(pair):
        w = torch.zeros(4)
        w[list(pair)] = 1.0
        return float((w * unlearn(w)).sum())

    every = [(i, j) for i in range(4) for j in range(i)]
    found = worst_case(unlearn, 4, 2, rounds=200, lr=0.05)
    assert set(found.order) == set(min(every, key=cost))


def test_worst_case_refuses():
    with pytest.raises(ValueError, match=r"budget must be in \[1, 3\]"):
        worst_case(lambda w: w, 3, 4)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        worst_case(lambda w: w, 3, 1, rounds=0)
    with pytest.raises(ValueError, match="not finite at row 1"):
        worst_case(lambda w: torch.tensor([1.0, torch.nan, 0.0]), 3, 1)


def test_unlearner_measures_and_puts_the_model_back(made):
    start = snapshot(made.model)
    before = mean_nll(made.model, made.problem.forget)
    w = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.5])
    found = unlearner(made, 3.0)(w)
    assert all(torch.equal(p, start[n]) for n, p in trainable(made.model).items())
    assert float(found[0] - before[0]) > 0.1, "a row that is unlearnt loses likelihood"
    made.resolve(made.problem.with_weights(1.5 * w))
    torch.testing.assert_close(mean_nll(made.model, made.problem.forget), found, rtol=1e-4, atol=0)
    made.resolve(made.problem)
