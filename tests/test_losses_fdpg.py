"""f-DPG on a policy small enough to enumerate: the estimator's expectation is the gradient."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_unlearning import rows, tiny_base

from u2a.batch import collate
from u2a.generate import Sampling, sampled_rows
from u2a.logps import answer_logps
from u2a.losses.fdpg import (
    DIVERGENCES,
    FDPG,
    Normaliser,
    Samples,
    binary,
    distributional,
    fit_moments,
    rlhf,
)

F64 = torch.float64
BASE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64).log()
REWARD = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=F64)
F = {
    "forward_kl": lambda t: -t.log(),
    "reverse_kl": lambda t: t * t.log(),
    "tv": lambda t: (1 - t).abs() / 2,
    "js": lambda t: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(),
    "chi2_forward": lambda t: 1 / t + t - 2,
    "chi2_reverse": lambda t: (t - 1).square(),
}


def theta() -> torch.Tensor:
    return torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=F64, requires_grad=True)


def test_slopes_as_checked():
    want = [-0.606531, 1.5, 0.5, 0.219070, 0.632121, 1.297443]
    u = torch.tensor(0.5, dtype=F64)
    got = [DIVERGENCES[k].slope(u).item() for k in F]
    assert got == pytest.approx(want, abs=1e-6)


def test_vector():
    """log t = 0.5 and -1: f' = log 2 - softplus(-log t) = 0.2190702 and -0.6201145, b = 0.1."""
    tuner = FDPG("js")
    tuner.baseline.values.append(0.1)
    lp = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True)
    target, q = torch.tensor([-1.5, -1.0], dtype=F64), torch.tensor([-1.0, -1.0], dtype=F64)
    value = tuner.loss(Samples(lp, target, q, log_z=torch.zeros(2)))
    slope = [0.1 + 0.2190702, math.exp(-1) * (0.1 - 0.6201145)]
    assert value.tolist() == pytest.approx([-slope[0], -2 * slope[1]], abs=1e-7)
    weights = torch.tensor([0.5, 2.0], dtype=F64)
    (g,) = torch.autograd.grad((weights * value).sum(), lp)
    assert g.tolist() == pytest.approx([0.5 * slope[0], 2 * slope[1]], abs=1e-7)
    assert list(tuner.baseline.values)[1:] == pytest.approx([-0.2190702, 0.6201145], abs=1e-7)


@pytest.mark.parametrize("kind", F)
def test_slope_and_ratio_belong_to_f(kind):
    u = torch.tensor([-1.3, -0.2, 0.4, 1.1], dtype=F64)
    t = u.exp().requires_grad_()
    (slope,) = torch.autograd.grad(F[kind](t).sum(), t)
    torch.testing.assert_close(DIVERGENCES[kind].slope(u), slope)
    torch.testing.assert_close(DIVERGENCES[kind].ratio(u), F[kind](t).detach() / t.detach())


@pytest.mark.parametrize("proposal", [False, True])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("kind", F)
def test_expectation_is_the_gradient_of_the_divergence(kind, baseline, proposal):
    """E_q[grad loss] over all answers = grad D_f(pi || p), whatever the baseline and q."""
    log_p_unnormalised = rlhf(BASE, REWARD, beta=0.8)
    log_z = log_p_unnormalised.logsumexp(0)
    x = theta()
    pi, p = x.softmax(0), (log_p_unnormalised - log_z).exp()
    exact = (p * F[kind](pi / p)).sum()
    (want,) = torch.autograd.grad(exact, x)
    tuner = FDPG(kind)
    tuner.baseline.values.append(baseline)
    lp = x.log_softmax(0)
    q = BASE if proposal else lp.detach()
    known = log_z.expand(4)
    each = tuner.loss(Samples(lp, log_p_unnormalised, q if proposal else None, log_z=known))
    (got,) = torch.autograd.grad((q.exp() * each).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    # each answer drawn q(x) times: the divergence itself
    parts = [tuner.estimate(Samples(lp[i : i + 1], log_p_unnormalised[i : i + 1], q[i : i + 1],
                            log_z=known[:1])) for i in range(4)]  # fmt: skip
    assert (q.exp() * torch.stack(parts)).sum().item() == pytest.approx(exact.item())


@pytest.mark.parametrize("kind", F)
def test_binary_target_pushes_forbidden_answers_down(kind):
    tuner, x = FDPG(kind), theta()
    allowed = torch.tensor([True, True, False, True])
    target = binary(BASE, allowed)
    assert target[2] == -torch.inf and torch.equal(target[allowed], BASE[allowed])
    log_z = target.logsumexp(0)
    assert log_z.exp().item() == pytest.approx(0.8)
    lp = x.log_softmax(0)
    each = tuner.loss(Samples(lp, target, log_z=log_z.expand(4)))
    (g,) = torch.autograd.grad((lp.detach().exp() * each).sum(), x)
    assert g.isfinite().all() and g[2] > 0


def test_online_training_reaches_the_target():
    generator = torch.Generator().manual_seed(0)
    target = rlhf(BASE, REWARD, beta=1.0)
    want = target.softmax(0)
    for kind in ("js", "forward_kl", "reverse_kl"):
        tuner, x = FDPG(kind, window=256), BASE.clone().requires_grad_()
        for _ in range(400):
            lp = x.log_softmax(0)
            s = torch.multinomial(lp.detach().exp(), 64, True, generator=generator)
            (g,) = torch.autograd.grad(
                tuner.loss(Samples(lp[s], target[s], context=["c"] * 64)).mean(), x
            )
            x.data -= 0.3 * g
        assert (x.softmax(0) - want).abs().max() < 0.08, kind
        z = tuner.normaliser.log_z(["c"]).exp().item()
        assert z == pytest.approx(target.exp().sum().item(), rel=0.05)


def test_online_on_a_language_model():
    """Sampled, scored and descended: answers of the allowed half of the vocabulary win."""
    model, words = tiny_base(), SimpleNamespace(eos_token_id=0, pad_token_id=None)
    base, prompts = tiny_base(), rows(2)
    how = Sampling(max_new_tokens=3, samples=16, batch=32)
    tuner = FDPG("js")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    share = []
    for step in range(25):
        found = sampled_rows(model, words, prompts, how, step)
        assert [r.uid for r in found] == [p.uid for p in prompts for _ in range(16)]
        assert all(0 not in r.answer_ids[:-1] and len(r.answer_ids) <= 3 for r in found)
        allowed = torch.tensor([max(r.answer_ids) < 16 for r in found])
        batch = collate(found)
        lp = answer_logps(model, batch).sequence()
        with torch.no_grad():
            target = binary(answer_logps(base, batch).sequence(), allowed)
        optimizer.zero_grad()
        tuner.loss(Samples(lp, target, context=[r.uid for r in found])).mean().backward()
        optimizer.step()
        share.append(allowed.float().mean().item())
    assert sum(share[:5]) / 5 < 0.4 and sum(share[-5:]) / 5 > 0.75


def test_rlhf_identity():
    """KL(pi||p) = -(E r - beta KL(pi||a))/beta + log Z."""
    beta, x = 0.7, theta().detach()
    target, lp = rlhf(BASE, REWARD, beta), x.log_softmax(0)
    log_z, pi = target.logsumexp(0), lp.exp()
    left = (pi * (lp - target + log_z)).sum()
    right = -((pi * REWARD).sum() - beta * (pi * (lp - BASE)).sum()) / beta + log_z
    torch.testing.assert_close(left, right)
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        rlhf(BASE, REWARD, 0)


def test_moments():
    phi = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=F64)
    mu = torch.tensor([0.7, 0.4], dtype=F64)
    uniform = torch.zeros(4, dtype=F64)
    lam, error = fit_moments(phi, mu, BASE - uniform, lr=1.0)
    p = distributional(BASE, phi, lam).softmax(0)
    torch.testing.assert_close(p @ phi, mu, atol=1e-5, rtol=0)
    assert error <= 1e-5
    _, unmet = fit_moments(phi, mu, BASE, max_iter=1)
    assert unmet > 0.01


def test_normaliser_per_context():
    z = Normaliser()
    z.update(torch.tensor([math.log(2), math.log(4), -torch.inf, math.log(5)]), ["a", "a", "b", 3])
    assert z.log_z(["a", "b", 3, "a"]).exp().tolist() == pytest.approx([3, 0, 5, 3])
    z.update(torch.tensor([-torch.inf]), ["a"])
    assert z.log_z(["a"]).exp().item() == pytest.approx(2)
    assert Normaliser(1.0, z.sums).log_z([3]).item() == 1.0
    tuner = FDPG()
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    none = tuner.loss(
        Samples(lp, torch.full((2,), -torch.inf), context=["x", "x"])
    )  # nothing allowed yet
    assert none.isfinite().all()


def test_baseline_window_and_messages():
    tuner = FDPG("tv", window=2)
    lp = torch.tensor([-1.0, -3.0, -3.0], dtype=F64)
    tuner.loss(Samples(lp, torch.full((3,), -2.0, dtype=F64), log_z=torch.zeros(3)))
    assert tuner.baseline.mean == 0.5 and len(tuner.baseline.values) == 2
    with pytest.raises(ValueError, match="wanted one of forward_kl, .* got 'kl'"):
        FDPG("kl")
    with pytest.raises(ValueError, match=r"must be \[S\], got \[3\], \[2\]"):
        tuner.loss(Samples(lp, lp[:2]))
