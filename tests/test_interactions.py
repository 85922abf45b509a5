"""Objectives, inner products and the Hessian of J in the weights on a small model, in float64,
against dense linear algebra and against what really happens when candidates are unlearnt."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import make
from tiny_models import rows as five_rows

from u2a.adapter import restore, snapshot
from u2a.batch import Pair
from u2a.inner import InnerProblem, inner_solve
from u2a.interactions import interactions, pool_gradients
from u2a.losses import get_loss
from u2a.objectives import Likelihood, Margin, PairSet, Preference
from u2a.outer import Outer, SolveSettings
from u2a.tree import flatten, trainable, unflatten

ANCHOR = 4.0


def moved():
    """A GPT-2 with a LoRA that is not at its start, where many derivatives vanish."""
    model = make("gpt2", lora=True).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("h.1" in name and "lora" in name)
    return model


def rows(n, seed=0):
    return [r for i in range(-(-n // 5)) for r in five_rows(seed + 100 * i)][:n]


def pairs(n):
    return [Pair(str(i), g, b) for i, (g, b) in enumerate(zip(rows(n, 7), rows(n, 8), strict=True))]


def outer(loss="npo", retain=0.0, method="identity", damping=0.0, objective=Preference):
    model, forget = moved(), rows(5)
    held = PairSet.build(model, pairs(4), 512)
    J = objective(held, 0.3, 512)
    problem = InnerProblem.build(
        model, forget, torch.zeros(5), get_loss(loss), anchor=ANCHOR, retain_weight=retain,
        retain=rows(6, 5) if retain else (), batch_tokens=64,
    )  # fmt: skip
    settings = SolveSettings(method=method, damping=damping, tol=1e-11, max_iter=300)

    def resolve(p):
        return {"left": inner_solve(model, p, 1e-12, 400).grad_max}

    made = Outer(model, problem, J, J, settings, resolve)
    made.resolve(problem)
    return made


@pytest.mark.parametrize("objective", [Preference, Margin])
def test_pair_objectives_and_their_derivatives(objective):
    made = outer(objective=objective)
    J, like = made.objective, trainable(made.model)
    draw = torch.Generator().manual_seed(3)
    v = torch.randn(flatten(like).numel(), generator=draw, dtype=torch.float64)
    direction, state, eps = unflatten(v, like), snapshot(made.model), 1e-5
    sides = []
    for sign in (eps, -eps):
        restore(made.model, {n: t + sign * direction[n] for n, t in state.items()})
        sides.append((J.value(made.model), flatten(J.gradient(made.model))))
    restore(made.model, state)
    slope = (sides[0][0] - sides[1][0]) / (2 * eps)
    assert float(flatten(J.gradient(made.model)) @ v) == pytest.approx(slope, rel=1e-6)
    bend = (sides[0][1] - sides[1][1]) / (2 * eps)
    torch.testing.assert_close(flatten(J.hvp(made.model, direction)), bend, rtol=1e-5, atol=1e-8)


def test_values_of_the_objectives():
    model = moved()
    held, good = PairSet.build(model, pairs(4), 512), [p.chosen for p in pairs(4)]
    margin = Margin(held, 0.3, 512).value(model)
    assert margin == pytest.approx(float(0.3 * _margins(model, held).mean()), rel=1e-6)
    expected = torch.nn.functional.logsigmoid(0.3 * _margins(model, held)).mean()
    assert Preference(held, 0.3, 512).value(model) == pytest.approx(float(expected), rel=1e-6)
    per_token, total = Likelihood(good, 64).value(model), Likelihood(good, 64, per_token=False)
    assert per_token < 0 and total.value(model) < per_token
    assert flatten(Likelihood(good, 64).gradient(model)).isfinite().all()


def _margins(model, held):
    from u2a.adapter import sequence_logps

    chosen = sequence_logps(model, [p.chosen for p in held.pairs])
    rejected = sequence_logps(model, [p.rejected for p in held.pairs])
    return chosen - held.chosen - (rejected - held.rejected)


@pytest.mark.parametrize("inverse", ["cg", "identity", "ekfac"])
def test_gram_is_that_of_the_inverse(inverse):
    made = outer(retain=1.0, method="cg", damping=0.5)
    w = torch.tensor([0.1, 0.0, 0.0, 0.2, 0.0])
    _, solution = made.gains(w)
    found = interactions(made, w, solution, inverse=inverse).gram
    torch.testing.assert_close(found, found.T)
    assert (torch.linalg.eigvalsh(found) > -1e-10).all()
    g = pool_gradients(made)
    scores, _ = made.gains(w)
    v = flatten(solution.x)
    torch.testing.assert_close(-(g @ v).cpu(), scores.gain.double(), rtol=1e-6, atol=1e-9)
    if inverse == "cg":
        from u2a.curvature import dense

        a = dense(made.operator(w)) + (ANCHOR + 0.5) * torch.eye(g.shape[1], dtype=torch.float64)
        torch.testing.assert_close(found, g @ torch.linalg.solve(a, g.T), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("loss", ["ga", "npo"])
def test_curvature_predicts_what_two_candidates_do_together_to_third_order(loss):
    """J(theta*(w)) - J - s.w - w.Qw/2 falls as the third power of w, with and without pairs."""
    made = outer(loss)
    zero = torch.zeros(5)
    scores, solution = made.gains(zero)
    found = interactions(made, zero, solution, inverse="identity", second_order=True)
    base, state = made.value(), snapshot(made.model)
    s = scores.gain.double()
    for direction in ([1.0, 0, 0, 0, 0], [0, 0.6, 0, 0.8, 0], [0.3, 0.3, 0.3, 0.3, 0.3]):
        d = torch.tensor(direction, dtype=torch.float64)
        error, first = [], []
        for size in (0.02, 0.01):
            w = size * d
            restore(made.model, state)
            made.resolve(made.problem.with_weights(w.float()))
            change = made.value() - base
            first.append(abs(change - float(s @ w)))
            error.append(abs(change - float(s @ w + w @ found.curvature @ w / 2)))
        assert math.log2(first[0] / first[1]) == pytest.approx(2, abs=0.2)
        assert math.log2(error[0] / error[1]) == pytest.approx(3, abs=0.5)
        assert error[1] < 0.2 * first[1]
