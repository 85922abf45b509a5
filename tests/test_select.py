"""Selection on the linear-quadratic toy, where every gain and optimum is known exactly.

l_i = g_i.theta, J = c.theta - q/2 |theta|^2, and F adds lambda/2 |theta|^2, so the optimum is
theta* = -sum_i w_i g_i / lambda.
"""

from __future__ import annotations

import math

import pytest
import torch

from u2a.select import (
    WeightSet,
    exponentiated_gradient,
    low_likelihood_k,
    random_k,
    select,
    topk,
    uniform,
)

LAMBDA = 0.7


class Toy:
    def __init__(self, n=12, p=5, q=0.0, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.g = torch.randn(n, p, generator=draw, dtype=torch.float64)
        self.c = torch.randn(p, generator=draw, dtype=torch.float64)
        self.q = q
        self.theta = torch.zeros(p, dtype=torch.float64)

    def J(self, w):
        theta = -(w.double() @ self.g) / LAMBDA
        return self.c @ theta - self.q / 2 * theta @ theta

    def gain(self, w):
        theta = -(w.double() @ self.g) / LAMBDA
        return -(self.g @ (self.c - self.q * theta)) / LAMBDA

    def resolve(self, w):
        self.theta = -(w.double() @ self.g) / LAMBDA
        return float(self.J(w))


def test_toy_gain_is_the_derivative_of_J():
    toy = Toy()
    w = torch.rand(12, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(toy.J(w), w)
    torch.testing.assert_close(slope, -(toy.g @ toy.c) / LAMBDA)
    torch.testing.assert_close(toy.gain(w.detach()), slope)


def test_J_rises_under_the_right_sign_and_falls_under_the_reversed_one():
    toy = Toy()
    up = down = uniform(12, 2.0).double()
    for _ in range(25):
        new = exponentiated_gradient(up, toy.gain(up), 0.3, 2.0)
        assert toy.J(new) > toy.J(up)
        up = new
        new = exponentiated_gradient(down, toy.gain(down), 0.3, 2.0, compat="official")
        assert toy.J(new) < toy.J(down)
        down = new
    assert int(up.argmax()) == int(toy.gain(up).argmax())
    assert int(down.argmax()) == int(toy.gain(down).argmin())


def test_capped_mirror_ascent_finds_the_optimum_of_a_concave_objective():
    toy, total, cap = Toy(n=8, q=1.0, seed=3), 1.5, 0.4
    w = uniform(8, total).double()
    for _ in range(300):
        w = exponentiated_gradient(w, toy.gain(w), 0.5, total, cap)
    gain = toy.gain(w)
    inner = (w > 1e-6) & (w < cap - 1e-6)
    price = gain[inner].mean() if inner.any() else gain[w > 1e-6].min()
    assert (gain[w > 1e-6] >= price - 1e-3).all() and (gain[w < cap - 1e-6] <= price + 1e-3).all()
    other = WeightSet(total, cap).project(torch.zeros(8))
    for _ in range(50):
        other = WeightSet(total, cap).project(other + 0.05 * toy.gain(other))
    torch.testing.assert_close(toy.J(w), toy.J(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 1.0, 0.3, 0.25])
@pytest.mark.parametrize("eta", [0.0, 1.0, 500.0])
def test_update_stays_in_the_set_and_keeps_zeros(eta, cap):
    draw = torch.Generator().manual_seed(1)
    w = torch.rand(6, generator=draw)
    w[[1, 4]] = 0
    gain = torch.randn(6, generator=draw)
    new = exponentiated_gradient(w, gain, eta, 1.0, cap)
    assert new.dtype == torch.float32 and (new[[1, 4]] == 0).all() and (new >= 0).all()
    assert float(new.sum()) == pytest.approx(1.0, rel=1e-6)
    assert cap is None or float(new.max()) <= cap * (1 + 1e-6)
    if cap is None and eta < 10:
        want = w * (eta * gain).exp()
        torch.testing.assert_close(new, want / want.sum())


def test_cap_is_the_entropy_projection():
    """On the capped simplex the KL projection has w_i = min(cap, c u_i) for one c."""
    u = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    new = exponentiated_gradient(u, torch.zeros(4), 1.0, 1.0, cap=0.4)
    torch.testing.assert_close(new, torch.tensor([0.4, 0.6 * 4 / 7, 0.6 * 2 / 7, 0.6 / 7]).double())
    new = exponentiated_gradient(u, torch.zeros(4), 1.0, 1.0, cap=0.3)
    torch.testing.assert_close(new, torch.tensor([0.3, 0.3, 0.4 * 2 / 3, 0.4 / 3]).double())


def test_projection_onto_box_and_budget():
    draw = torch.Generator().manual_seed(2)
    a = torch.randn(50, generator=draw, dtype=torch.float64)
    w = WeightSet(3.0, 0.2).project(a)
    assert float(w.sum()) == pytest.approx(3.0, abs=1e-12) and w.min() >= 0 and w.max() <= 0.2
    for _ in range(50):
        other = WeightSet(3.0, 0.2).project(torch.randn(50, generator=draw, dtype=torch.float64))
        assert float((a - w) @ (other - w)) <= 1e-10, "not the nearest point of a convex set"


def test_one_shot_methods():
    scores = torch.tensor([0.3, -1.0, 0.9, 0.0, 0.9])
    assert topk(scores, 5) == [2, 4, 0]
    assert select(scores, budget=2, total_weight=3.0).weights.tolist() == [0, 0, 1.5, 0, 1.5]
    assert select(scores, method="uniform", budget=2).weights.tolist() == pytest.approx([0.2] * 5)
    assert low_likelihood_k(torch.tensor([2.0, 5.0, 0.1]), 2) == [1, 0]
    assert select(scores, method="low-likelihood", budget=5).order == (2, 4, 0, 3, 1)
    assert random_k(100, 5, seed=1) == random_k(100, 5, seed=1) != random_k(100, 5, seed=2)
    drawn = select(scores, method="random", budget=3, seed=4)
    assert len(set(drawn.order)) == 3 and float(drawn.weights.sum()) == pytest.approx(1.0)


def test_messages():
    scores = torch.tensor([0.3, math.nan, 0.9])
    with pytest.raises(ValueError, match="select: scores are not finite at uid b$"):
        select(scores, budget=1, uids=["a", "b", "c"])
    for budget in (0, 4):
        with pytest.raises(ValueError, match=rf"budget must be in \[1, 3\].*got {budget}"):
            select(scores, budget=budget)
    with pytest.raises(ValueError, match="none of 2 gains is above min_gain 0"):
        select(torch.tensor([-1.0, -2.0]), budget=1)
    with pytest.raises(ValueError, match="method must be one of topk.*got 'best'"):
        select(torch.ones(2), method="best", budget=1)
    with pytest.raises(ValueError, match="scores are not finite at row 0"):
        exponentiated_gradient(torch.ones(2), torch.tensor([math.inf, 0]), 1.0, 1.0)
    with pytest.raises(ValueError, match="2 rows of at most cap 0.3 hold 0.6, wanted total 1"):
        exponentiated_gradient(torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3), 1.0, 1.0, cap=0.3)
    with pytest.raises(ValueError, match="compat must be None or 'official'"):
        exponentiated_gradient(torch.ones(2), torch.zeros(2), 1.0, 1.0, compat="paper")
