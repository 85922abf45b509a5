"""The outer loop where every gain, optimum and Hessian in the weights is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from toy_bilevel import Dense, Toy

from u2a.bilevel import Plan, bilevel
from u2a.select import (
    Penalty,
    WeightSet,
    exponentiated_gradient,
    l1_proximal,
    projected_ascent,
    quadratic_programme,
)
from u2a.solve import solve


def rand(n, seed=1):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["cg", "minres", "neumann"])
@pytest.mark.parametrize("curved", [0.0, 0.5])
def test_gain_is_the_derivative_of_J_for_every_solver(method, curved):
    toy = Toy(q=0.4, curved=curved, method=method)
    w = (rand(12) * 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(toy.J(w), w)
    toy.resolve(w.detach())
    scores, _ = toy.gains(w.detach())
    torch.testing.assert_close(scores.gain, slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("curved", [0.0, 0.5])
def test_curvature_is_the_hessian_of_J_in_the_weights(curved):
    toy = Toy(n=6, q=0.4, curved=curved)
    w = rand(6) * 0.3
    toy.resolve(w)
    found = toy.interactions(w, toy.gains(w)[1], second_order=True)
    torch.testing.assert_close(found.curvature, torch.autograd.functional.hessian(toy.J, w))


def test_unrolled_descent_is_a_neumann_series():
    """T steps of gradient descent on F differentiate to sum_{k<T} eta (I - eta A)^k."""
    toy, steps, eta = Toy(curved=0.3), 7, 0.4
    w = (rand(12) * 0.3).requires_grad_()
    theta = torch.zeros(5, dtype=torch.float64)
    a, slope = toy.A(w), w @ toy.g
    for _ in range(steps):
        theta = theta - eta * (a @ theta + slope)
    # A held where the series holds it: the linear part of the response
    plain = torch.zeros(5, dtype=torch.float64)
    for _ in range(steps):
        plain = plain - eta * (a.detach() @ plain + slope)
    (gain,) = torch.autograd.grad(toy.c @ plain, w)
    operator = Dense(a.detach())
    v = solve(operator, {"theta": toy.c}, "neumann", damping=0.0, step=eta, max_iter=steps, tol=0.0)
    torch.testing.assert_close(gain, -(toy.g @ v.x["theta"]), rtol=1e-10, atol=1e-12)
    assert theta.shape == plain.shape


GROWTHS = ["greedy", "pursuit", "quadratic"]


@pytest.mark.parametrize("growth", GROWTHS)
def test_loop_raises_J_predicts_it_and_returns_the_optimum_of_its_weights(growth):
    toy = Toy(n=20, p=6, q=0.3, curved=0.1, seed=2)
    found = bilevel(toy, Plan(8, 0.4, blocks=4, growth=growth, rounds=2, eta=0.5))
    assert found.J_best > found.J_start == toy.J(torch.zeros(20))
    assert found.J_best == pytest.approx(float(toy.J(found.weights)), abs=1e-6)
    torch.testing.assert_close(
        toy.model.theta.detach(), toy.optimum(found.weights), rtol=0, atol=1e-6
    )
    assert int((found.weights > 0).sum()) <= 8
    assert float(found.weights.sum()) <= 0.4 + 1e-5
    first = found.rounds[1]
    assert first["realised"] == pytest.approx(first["predicted"], rel=0.3)
    assert [r["round"] for r in found.rounds][:2] == ["start", "block 1"]
    assert all(kind == "round" for kind, _ in toy.said)


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_budget_that_the_blocks_do_not_divide(growth):
    """Blocks of ceil(10 / 6) = 2 are used up after five."""
    toy = Toy(n=20, p=6, q=0.1, seed=13)
    found = bilevel(toy, Plan(10, 0.2, blocks=6, growth=growth))
    assert int((toy.last > 0).sum()) <= 10 and float(toy.last.sum()) <= 0.2 + 1e-6
    assert found.J_best > found.J_start


def test_quadratic_finds_the_best_set_of_all_where_J_is_quadratic():
    """J is exactly quadratic in w when no candidate has curvature: one block is the answer."""
    toy = Toy(n=7, p=4, q=1.5, seed=5)
    found = bilevel(toy, Plan(3, 1.0, blocks=1, growth="quadratic", cap=1.0))
    best = -math.inf
    grid = [i / 12 for i in range(13)]
    for index in itertools.combinations(range(7), 3):
        for x in itertools.product(grid, repeat=3):
            if sum(x) <= 1.0 + 1e-9:
                w = torch.zeros(7, dtype=torch.float64)
                w[list(index)] = torch.tensor(x, dtype=torch.float64)
                best = max(best, float(toy.J(w)))
    assert float(toy.J(found.weights)) >= best - 1e-3


def test_pursuit_and_quadratic_do_not_spend_the_block_on_duplicates():
    toy = Toy(n=16, p=6, q=2.0, seed=3, duplicates=6)
    results = {}
    for growth in ("topk", *GROWTHS):
        results[growth] = bilevel(toy, Plan(4, 1.0, blocks=1, growth=growth, cap=1.0)).J_best
        toy.resolve(torch.zeros(16))
    assert results["pursuit"] > results["topk"] and results["quadratic"] >= results["pursuit"]
    assert results["greedy"] == results["topk"]


@pytest.mark.parametrize("update", ["mirror", "projected"])
def test_updates_reach_the_optimum_over_the_support(update):
    toy = Toy(n=8, p=8, q=1.0, seed=4)
    plan = Plan(8, 1.2, blocks=1, min_gain=-100, rounds=300, update=update, eta=1.0, cap=0.5)
    found = bilevel(toy, plan)
    into = WeightSet(1.2, 0.5)
    Q = -toy.q * toy.g @ toy.g.T / toy.lam**2
    w = quadratic_programme(-(toy.g @ toy.c) / toy.lam, Q, into)
    assert found.rounds[-1]["J"] == pytest.approx(float(toy.J(w)), abs=5e-3)


def test_official_procedure_lowers_what_it_selected():
    """Its selection is right, its weight updates have the sign reversed: J falls round by round."""
    toy = Toy(n=16, seed=6, method="identity")
    found = bilevel(toy, Plan(8, 1.0, blocks=1, growth="official", rounds=5, eta=0.5))
    J = [r["J"] for r in found.rounds]
    assert J[1] > J[0] and all(b < a for a, b in itertools.pairwise(J[1:]))
    toy.resolve(torch.zeros(16))
    ours = bilevel(toy, Plan(8, 1.0, blocks=1, growth="topk", min_gain=-9, rounds=5, eta=0.5))
    assert ours.rounds[-1]["J"] > J[1] == ours.rounds[1]["J"]


def test_mirror_descent_converges_at_its_rate():
    """max J - J(mean of the iterates) <= G sqrt(2 log n / T) on the simplex for concave J."""
    toy = Toy(n=10, p=10, q=1.0, seed=7)
    Q = -toy.q * toy.g @ toy.g.T / toy.lam**2
    best = quadratic_programme(-(toy.g @ toy.c) / toy.lam, Q, WeightSet(1.0))
    top, gaps = float(toy.J(best)), []
    for steps in (16, 64, 256):
        w = torch.full((10,), 0.1, dtype=torch.float64)
        iterates, size = [], 0.0
        for _ in range(steps):
            toy.resolve(w)
            gain = toy.gains(w)[0].gain
            size = max(size, float(gain.abs().max()))
            iterates.append(w)
            w = exponentiated_gradient(w, gain, math.sqrt(2 * math.log(10) / steps) / size, 1.0)
        gap = top - float(toy.J(torch.stack(iterates).mean(0)))
        assert -1e-9 <= gap <= size * math.sqrt(2 * math.log(10) / steps)
        gaps.append(gap)
    assert gaps[2] < gaps[1] / 1.9 and gaps[1] < gaps[0] / 1.5


@pytest.mark.parametrize(
    "into", [WeightSet(1.0), WeightSet(cap=0.3), WeightSet(1.0, 0.3), WeightSet(1.0, exact=False)]
)
def test_projected_ascent_with_exact_gains_reaches_the_optimum_of_every_set(into):
    toy = Toy(n=9, p=9, q=0.8, seed=8)
    w = into.project(torch.zeros(9))
    for _ in range(1500):
        toy.resolve(w)
        w = projected_ascent(w, toy.gains(w)[0].gain, 0.05, into)
    (slope,) = torch.autograd.grad(toy.J(w.requires_grad_()), w)
    moved = into.project(w.detach() + 0.05 * slope)
    torch.testing.assert_close(moved, w.detach(), rtol=0, atol=1e-5)


def test_l1_penalty_gives_the_support_that_its_optimality_asks_for():
    toy, alpha = Toy(n=9, p=9, q=0.8, seed=9), 0.4
    w = torch.zeros(9, dtype=torch.float64)
    for _ in range(3000):
        toy.resolve(w)
        w = l1_proximal(w, toy.gains(w)[0].gain, 0.01, alpha)
    gain = toy.gains(w)[0].gain
    assert (gain[w == 0] <= alpha + 1e-6).all() and (w > 0).any() and (w == 0).any()
    torch.testing.assert_close(gain[w > 0], torch.full_like(gain[w > 0], alpha), rtol=0, atol=1e-4)


def test_proximal_updates_reach_the_l1_optimum():
    penalty, toy = Penalty("l1", 0.4), Toy(n=9, p=9, q=0.8, seed=9)
    plan = Plan(9, 3.0, 1, min_gain=-100, rounds=400, update="proximal", penalty=penalty, cap=9.0)
    bilevel(toy, plan)
    w = toy.last.double()
    toy.resolve(w)
    gain = toy.gains(w)[0].gain
    assert (w > 0).any() and (w == 0).any() and float(w.sum()) < 3.0
    torch.testing.assert_close(gain[w > 0], torch.full_like(gain[w > 0], 0.4), rtol=0, atol=2e-3)
    bilevel(toy := Toy(n=9, p=9, q=0.8, seed=9), replace(plan, total_weight=0.3, cap=0.1))
    assert float(toy.last.sum()) <= 0.3 + 1e-6 and float(toy.last.max()) <= 0.1 + 1e-6


def test_an_l1_penalty_above_every_gain_empties_the_support():
    plan = Plan(4, 0.4, 1, rounds=200, update="proximal", penalty=Penalty("l1", 100.0))
    found = bilevel(Toy(seed=3), plan)
    last = found.rounds[-1]
    assert (last["support"], last["effective_support"]) == (0, 0.0)
    assert last["J"] == pytest.approx(found.J_start) and len(found.rounds) < 202


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_penalised_updates_raise_the_penalised_objective(kind):
    penalty, reached = Penalty(kind, 0.3), {}
    for used in (penalty, None):
        toy = Toy(n=8, p=8, q=1.0, seed=10)
        plan = Plan(8, 1.0, 1, min_gain=-100, rounds=300, eta=1.0, penalty=used, cap=1.0)
        bilevel(toy, plan)
        w = toy.last.double()
        reached[used] = float(toy.J(w) - penalty.value(w))
    assert (
        reached[penalty] == pytest.approx(reached[None], abs=1e-9)
        if kind == "l1"
        else (reached[penalty] > reached[None] + 1e-3)
    )


def test_sqrt_penalty_pays_for_what_it_costs():
    penalty, toy = Penalty("sqrt", 0.3), Toy(n=8, p=8, q=1.0, seed=10)
    plan = Plan(8, 1.0, 1, min_gain=-100, rounds=40, eta=0.5, penalty=penalty, cap=1.0)
    bilevel(toy, plan)
    value = [float(toy.J(w) - penalty.value(w)) for w in (torch.full((8,), 0.125), toy.last)]
    assert value[1] > value[0] + 0.1


def test_finished_rows_leave_the_support_for_good():
    toy = Toy(n=12, q=0.1, seed=11)
    order = toy.gains(torch.zeros(12))[0].gain.argsort(descending=True).tolist()

    def finished(model, rows):
        return torch.tensor([r.number == order[0] for r in rows])

    found = bilevel(toy, Plan(6, 0.3, blocks=3, rounds=1, finished=finished, tolerance=math.inf))
    assert found.rounds[1]["left"] == 1 and "left" not in found.rounds[2]
    assert found.rounds[-1]["support"] <= 6
    last = toy.said[-1][1]["support"]
    assert last == found.rounds[-1]["support"]


def test_loop_ends_when_J_falls_and_keeps_the_best():
    toy = Toy(n=12, p=3, q=40.0, seed=12)
    found = bilevel(toy, Plan(12, 30.0, blocks=6, min_gain=-100, tolerance=0.0))
    assert found.stopped == "J fell"
    assert found.J_best == max(r["J"] for r in found.rounds)
    toy = Toy(n=12, seed=12)
    toy.g = toy.c.repeat(12, 1)
    found = bilevel(toy, Plan(12, 1.0, blocks=3))
    assert found.stopped == "no positive gain" and not found.weights.any()


def test_rounds_are_judged_and_kept_mixed_back_to_the_bound_on_retain_perplexity():
    free = bilevel(Toy(seed=3), Plan(6, 0.6, blocks=3, rounds=1))
    ratios = [r["retain_ratio"] for r in free.rounds]
    assert ratios[0] == 1.0 and ratios[1] < ratios[2] < ratios[3]
    assert all(r["mix"] == 1 and r["J_within"] == r["J_validation"] for r in free.rounds[1:])
    toy = Toy(seed=3)
    bound = (ratios[1] + ratios[2]) / 2
    found = bilevel(toy, Plan(6, 0.6, blocks=3, rounds=1, max_retain_ratio=bound))
    inside, beyond = found.rounds[1:3]
    assert inside["mix"] == 1 and 0 < beyond["mix"] < 1
    assert bound * 0.98 < toy.retain_perplexity() / 2.0 <= bound
    best = max(found.rounds[1:], key=lambda r: r["J_within"])
    assert found.J_best == best["J_within"] > inside["J_validation"]
    assert toy.value() == pytest.approx(found.J_best)
    assert int((found.weights > 0).sum()) == best["support"]
    # the rounds themselves are those of the loop without a bound, as far as they go
    assert [r["J"] for r in found.rounds] == [r["J"] for r in free.rounds][: len(found.rounds)]


def test_loop_ends_when_a_round_beyond_the_bound_is_no_better():
    toy = Toy(n=12, p=3, q=40.0, seed=12)
    plan = Plan(12, 30.0, blocks=6, min_gain=-100, max_retain_ratio=1.0001)
    found = bilevel(toy, plan)
    assert found.stopped == "retain perplexity" and found.rounds[-1]["mix"] < 1
    assert found.rounds[-1]["J_within"] <= found.J_best
    assert len(found.rounds) < 7


def test_plan_refuses():
    with pytest.raises(ValueError, match="max_retain_ratio must be > 1, got 0.9"):
        Plan(4, 1.0, max_retain_ratio=0.9)
    with pytest.raises(ValueError, match="growth must be one of"):
        Plan(4, 1.0, growth="gredy")
    with pytest.raises(ValueError, match=r"blocks must be in \[1, 4\], got 5"):
        Plan(4, 1.0, blocks=5)
    for penalty in (None, Penalty("sqrt", 0.1)):
        with pytest.raises(ValueError, match="update 'proximal' needs an l1 penalty, got"):
            Plan(4, 1.0, update="proximal", penalty=penalty)
    with pytest.raises(ValueError, match="total_weight must be > 0"):
        Plan(4, 0.0)
    with pytest.raises(ValueError, match="budget must be in"):
        bilevel(Toy(n=3), Plan(4, 1.0))
