"""Sets of weights, penalties, quadratic programmes and matching pursuit against SciPy and grids."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from scipy import optimize

from u2a.select import (
    Penalty,
    WeightSet,
    best_single_weight,
    l1_proximal,
    matching_pursuit,
    projected_ascent,
    quadratic_programme,
    threshold,
)

SETS = {
    "orthant": WeightSet(),
    "simplex": WeightSet(1.5),
    "box": WeightSet(cap=0.4),
    "box and budget": WeightSet(1.5, 0.4),
    "l1 ball": WeightSet(1.5, exact=False),
    "box under budget": WeightSet(1.5, 0.4, exact=False),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_best(fun, n: int, into: WeightSet, index=None) -> float:
    """Largest fun(w) over the set by SLSQP from several starts; `index` keeps the other w at 0."""
    free = list(range(n)) if index is None else list(index)

    def spread(x):
        w = np.zeros(n)
        w[free] = x
        return w

    rule = (
        []
        if into.total is None
        else [{"type": "eq" if into.exact else "ineq", "fun": lambda x: into.total - x.sum()}]
    )
    best = -np.inf
    for seed in range(4):
        x0 = np.random.default_rng(seed).random(len(free)) * 0.3
        found = optimize.minimize(
            lambda x: -fun(spread(x)), x0, bounds=[(0, into.cap)] * len(free), constraints=rule,
            method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        if found.success:
            best = max(best, -found.fun)
    return best


def _closeness(a, x):
    return -((x - a) ** 2).sum()


@pytest.mark.parametrize("name", SETS)
def test_projection_is_the_nearest_point(name):
    into = SETS[name]
    for seed in range(6):
        a = draw(9, seed=seed)
        w = into.project(a)
        assert (w >= 0).all() and (into.cap is None or (w <= into.cap + 1e-12).all())
        if into.total is not None:
            gap = float(w.sum()) - into.total
            assert abs(gap) < 1e-12 if into.exact else gap < 1e-12
        best = scipy_best(functools.partial(_closeness, a.numpy()), 9, into)
        assert float(((w - a) ** 2).sum()) <= -best + 1e-9
        torch.testing.assert_close(into.project(w), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "into", [WeightSet(1.0, support=3), WeightSet(1.0, 0.4, 3), WeightSet(cap=1.0, support=2)]
)
def test_projection_with_few_positive_weights_against_every_support(into):
    for seed in range(5):
        a = draw(6, seed=seed)
        w = into.project(a)
        assert int((w > 0).sum()) <= into.support
        free = WeightSet(into.total, into.cap)
        best = np.inf
        for index in itertools.combinations(range(6), into.support):
            other = torch.zeros(6, dtype=torch.float64)
            other[list(index)] = free.project(a[list(index)])
            best = min(best, float(((other - a) ** 2).sum()))
        assert float(((w - a) ** 2).sum()) == pytest.approx(best, abs=1e-12)


def test_projection_of_ties_and_single_weights():
    torch.testing.assert_close(
        WeightSet(1.0).project(torch.full((4,), 7.0)), torch.full((4,), 0.25, dtype=torch.float64)
    )
    assert WeightSet(2.0).project(torch.tensor([-50.0])).tolist() == [2.0]
    assert WeightSet(0.4, 0.1).project(torch.zeros(4)).tolist() == pytest.approx([0.1] * 4)
    with pytest.raises(ValueError, match="3 rows of at most cap 0.1"):
        WeightSet(1.0, 0.1).project(torch.zeros(3))
    with pytest.raises(ValueError, match="cap must be positive"):
        WeightSet(cap=-1.0)
    with pytest.raises(ValueError, match="not finite at row 1"):
        WeightSet(1.0).project(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("kind", ["l1", "sqrt", "entropy"])
def test_penalty_gradient(kind):
    w = draw(7).abs().requires_grad_()
    penalty = Penalty(kind, 0.3)
    (slope,) = torch.autograd.grad(penalty.value(w), w)
    torch.testing.assert_close(penalty.gradient(w.detach()), slope)
    assert penalty.gradient(torch.zeros(2)).isfinite().all()


def test_sqrt_penalty_is_the_term_of_the_published_code():
    w = torch.tensor([1 / 1024.0], dtype=torch.float64)
    assert Penalty("sqrt", 2.0).gradient(w).item() == pytest.approx((w.item() + 1e-8) ** -0.5)


def test_steps():
    w, gain = torch.tensor([0.2, 0.0, 0.3]), torch.tensor([1.0, 2.0, -4.0])
    torch.testing.assert_close(l1_proximal(w, gain, 0.1, 0.5), torch.tensor([0.25, 0.15, 0.0]))
    torch.testing.assert_close(
        l1_proximal(w, gain, 0.1, 0.5, cap=0.2), torch.tensor([0.2, 0.15, 0.0])
    )
    torch.testing.assert_close(threshold(gain, 3.0).float(), torch.tensor([1.0, 2.0, 0.0]))
    with pytest.raises(ValueError, match="none of 2 gains"):
        threshold(torch.tensor([-1.0, 0.0]), 1.0)
    new = projected_ascent(w, gain, 0.1, WeightSet(0.5))
    assert new.dtype == w.dtype and float(new.sum()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", SETS)
def test_quadratic_programme_against_scipy(name):
    into, n = SETS[name], 8
    root = draw(n, 5, seed=1)
    s, Q = draw(n, seed=2), -(root @ root.T) - 0.05 * torch.eye(n, dtype=torch.float64)
    w = quadratic_programme(s, Q, into, alpha=0.1)

    def value(x):
        return s.numpy() @ x + x @ Q.numpy() @ x / 2 - 0.1 * x.sum()

    assert value(w.numpy()) == pytest.approx(scipy_best(value, n, into), abs=1e-8)


def test_quadratic_programme_without_concavity_ends_at_a_stationary_point():
    into, n = WeightSet(1.0, 0.5), 8
    Q, s = draw(n, n, seed=3), draw(n, seed=4)
    w = quadratic_programme(s, Q, into)
    slope = s + (Q + Q.T) @ w / 2
    torch.testing.assert_close(into.project(w + 0.05 * slope), w, rtol=0, atol=1e-7)


def test_best_single_weight_against_a_grid():
    s, q, cap = draw(20, seed=5), draw(20, seed=6) * 4, 0.8
    w, value = best_single_weight(s, q, cap)
    grid = torch.linspace(0, cap, 4001, dtype=torch.float64)
    curve = s[:, None] * grid + q[:, None] * grid**2 / 2
    torch.testing.assert_close(value, curve.max(1).values, rtol=0, atol=1e-6)
    assert ((w >= 0) & (w <= cap)).all()


def test_matching_pursuit_is_nnls_when_the_budget_is_the_pool():
    g, target = draw(7, 12, seed=7), draw(12, seed=8)
    gain, gram = g @ target, g @ g.T
    found = matching_pursuit(gain, gram, budget=7, total=2.0)
    exact, _ = optimize.nnls(g.T.numpy(), target.numpy())
    exact = torch.tensor(exact * (2.0 / exact.sum()))
    torch.testing.assert_close(found.weights.double(), exact, rtol=1e-5, atol=1e-6)


def test_matching_pursuit_takes_one_of_near_duplicates_where_topk_takes_all():
    g = torch.eye(4, 6, dtype=torch.float64)[[0, 0, 0, 1, 2]]
    gain = g @ torch.tensor([1.0, 0.9, 0.8, 0, 0, 0], dtype=torch.float64)
    found = matching_pursuit(gain, g @ g.T, budget=3, total=1.0)
    assert set(found.order) & {0, 1, 2} and {3, 4} <= set(found.order)
    duplicates = float(found.weights[:3].sum())
    assert duplicates == pytest.approx(1.0 / 2.7, rel=1e-5)
    assert set(gain.topk(3).indices.tolist()) == {0, 1, 2}


def test_matching_pursuit_stops_and_caps():
    gain, gram = torch.tensor([1.0, -1.0, 0.5]), torch.eye(3)
    found = matching_pursuit(gain, gram, budget=3, total=1.0, cap=0.6)
    assert found.stopped == "no positive gain" and found.weights[1] == 0
    assert found.weights.max() <= 0.6 + 1e-6 and found.weights.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="none of 3 gains is positive"):
        matching_pursuit(-gain.abs(), gram, budget=2, total=1.0)
    with pytest.raises(ValueError, match=r"gram wanted \[3, 3\]"):
        matching_pursuit(gain, torch.eye(2), budget=2, total=1.0)
