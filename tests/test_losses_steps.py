"""Dual variable, harmonised gradients, model mixing, PMPO, TRACE, C3PO, reward augmentation."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_unlearning import rows, tiny_base, tiny_peft

from u2a.adapter import restore, snapshot
from u2a.batch import collate
from u2a.losses.reward_augmented import reward_augmented, with_goal
from u2a.losses.steps import (
    Dual,
    Verdict,
    c3po,
    calibrate,
    harmonise,
    mixed,
    pmpo,
    trace_loss,
    trace_weights,
    triage,
)
from u2a.tree import dot

F64 = torch.float64


def test_dual_update_by_hand():
    dual = Dual(eps=2.0, lam=1.0, step=0.5, warmup=2)
    assert [dual.update(x) for x in (9.0, 9.0, 3.0, 2.0, -1.0, 2.5)] == [1, 1, 1.5, 1.5, 0, 0.25]
    forget, retain = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    value = dual.loss(forget, retain)
    assert value.item() == 3.5
    assert [g.item() for g in torch.autograd.grad(value, [forget, retain])] == [1.0, 0.25]
    with pytest.raises(ValueError, match="must be finite, got nan"):
        dual.update(math.nan)
    with pytest.raises(ValueError, match="lam >= 0, step > 0, got -1, 1"):
        Dual(1.0, lam=-1, step=1)


def test_dual_finds_the_constrained_optimum():
    """min (x - 3)^2 subject to x^2 <= 1: x = 1, lam = 2."""
    dual, x = Dual(eps=1.0, lam=0.0, step=0.1, warmup=0), 0.0
    for _ in range(400):
        x = 3 / (1 + dual.lam)  # the primal optimum for this lam
        dual.update(x * x)
    assert (x, dual.lam) == (pytest.approx(1.0, abs=1e-6), pytest.approx(2.0, abs=1e-5))


def test_harmonise():
    r = {"a": torch.tensor([1.0, 0.0], dtype=F64), "b": torch.tensor([2.0], dtype=F64)}
    f = {"a": torch.tensor([-2.0, 1.0], dtype=F64), "b": torch.tensor([-0.5], dtype=F64)}
    out = harmonise(r, f)
    cross, rr, ff = -3.0, 5.0, 5.25
    for n in r:
        want = r[n] - cross / ff * f[n] + f[n] - cross / rr * r[n]
        torch.testing.assert_close(out[n], want)
    assert dot(out, r) >= -1e-12 and dot(out, f) >= -1e-12  # neither objective is hurt
    agree = {n: -t for n, t in f.items()}
    assert all(torch.equal(t, r[n] + agree[n]) for n, t in harmonise(r, agree).items())
    opposed = harmonise(r, {n: -3 * t for n, t in r.items()})
    assert max(t.abs().max() for t in opposed.values()) < 1e-12
    with pytest.raises(ValueError, match="differ in 1 names, first b"):
        harmonise(r, {"a": f["a"]})


def test_mixing_a_fresh_lora_mixes_the_weights():
    model, batch = tiny_peft(dtype=F64), collate(rows(3))
    start = snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    end = snapshot(model)
    for a in (0.0, 0.3, 1.0):
        restore(model, mixed(start, end, a))
        got = model(input_ids=batch.ids).logits
        restore(model, end)
        whole = model.merge_adapter() or {n: p.clone() for n, p in model.named_parameters()}
        model.unmerge_adapter()
        base = dict(tiny_base(0, F64).named_parameters())
        plain = tiny_base(0, F64)
        with torch.no_grad():
            for n, p in plain.named_parameters():
                key = f"base_model.model.{n}"
                wrapped = f"{key[: -len('.weight')]}.base_layer.weight"
                p.copy_(torch.lerp(base[n], whole.get(key, whole.get(wrapped)), a))
        torch.testing.assert_close(got, plain(input_ids=batch.ids).logits, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="lora_B.* is not 0 at the start"):
        mixed(end, start, 0.5)
    with pytest.raises(ValueError, match=r"a must be in \[0, 1\], got 1.5"):
        mixed(start, end, 1.5)
    full = mixed({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
    assert full["w"].tolist() == [0.25, 0.25]


def test_calibrate():
    calls: list[float] = []

    def utility(a: float) -> float:
        calls.append(a)
        return 1 - a * a

    a = calibrate(utility, 0.25, steps=20)
    assert 0.5 - 2**-19 < a <= 0.5 and utility(a) >= 0.75 and len(calls) == 23
    assert calibrate(lambda a: 1.0 + a, 0.0) == 1.0
    assert calibrate(lambda a: 1.0 if a == 0 else 0.0, 0.1) == 0.0
    for message, fn, tau in (
        ("must be > 0 for a relative bar, got 0", lambda a: 0, 0.1),
        (r"tau must be in \[0, 1\), got 1", utility, 1),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(fn, tau)


def test_pmpo():
    lp = torch.tensor([-1.0, -2.0, -6.0], dtype=F64, requires_grad=True)
    accepted, kl = torch.tensor([True, True, False]), torch.tensor([0.5, 1.5], dtype=F64)
    value = pmpo(lp, accepted, kl, alpha=0.25, beta=2.0)
    assert value.item() == pytest.approx(0.25 * 1.5 + 0.75 * -6 + 2.0)
    (g,) = torch.autograd.grad(value, lp)
    assert g.tolist() == [-0.125, -0.125, 0.75]
    assert pmpo(lp, ~accepted | accepted, kl, 0.0, 0.0).item() == 0  # no rejected answer
    assert torch.autograd.gradcheck(lambda x: pmpo(x, accepted, kl, 0.3, 1.0), lp)
    w = torch.tensor([0.5, 0.1, 2.0], dtype=F64)
    weighted = pmpo(lp, accepted, kl, alpha=0.25, beta=2.0, weights=w)
    assert weighted.item() == pytest.approx(0.25 * (0.5 * 1 + 0.1 * 2) + 0.75 * 2 * -6 + 2.0)
    assert torch.autograd.gradcheck(lambda x: pmpo(x, accepted, kl, 0.3, 1.0, w), lp)
    with pytest.raises(ValueError, match="alpha in"):
        pmpo(lp, accepted, kl, 1.5, 1.0)


def test_pmpo_from_rejected_alone_is_bounded_with_enough_kl():
    """Two answers, pi_ref = (q, 1 - q), the first rejected: the optimum is pi_1 = (b q - 1)/(b - 1)
    if rejected samples come from a fixed set, inside (0, 1) only for b q > 1."""
    q, beta = 0.5, 4.0
    theta = torch.zeros((), dtype=F64, requires_grad=True)
    for _ in range(400):
        logs = torch.stack([torch.nn.functional.logsigmoid(x) for x in (theta, -theta)])
        kl = (q * (math.log(q) - logs)).sum()
        loss = pmpo(logs[:1], torch.tensor([False]), kl[None], 0.0, beta)
        (g,) = torch.autograd.grad(loss, theta)
        theta.data -= 0.5 * g
    assert torch.sigmoid(theta).item() == pytest.approx((beta * q - 1) / (beta - 1))


def test_trace():
    cases = ([True, True, False, False], [True, False, True, False])
    r, i, p = Verdict.RETAIN, Verdict.INVERT, Verdict.PUNISH
    assert triage(*cases) == [r, r, i, p]
    assert trace_weights(torch.tensor([3.0, -5.0, 1.0])).tolist() == [0.75, 0, 0.25]
    assert trace_weights(torch.tensor([-1.0, -2.0])).tolist() == [0, 0]
    ones = torch.ones(2, dtype=F64)
    got = trace_loss(ones, 0.5 * ones, 3 * ones, 0.25 * ones, torch.tensor([1.0, 3.0]))
    assert got.item() == pytest.approx(1 + 1.5 + 0.2)


def test_c3po():
    given = torch.tensor([1.0, 3.0]), torch.tensor([2.0]), torch.tensor([1.0, 5.0])
    assert c3po(*given).item() == pytest.approx(2 + 0.2 * 2 + 0.1 * 3)
    got = c3po(*given, weights=torch.tensor([0.5, 0.1]))
    assert got.item() == pytest.approx(0.5 + 0.3 + 0.2 * 2 + 0.1 * 3)
    with pytest.raises(ValueError, match=r"c3po: \[3\] weights, wanted \[2\]"):
        c3po(*given, weights=torch.ones(3))


def test_combinations_by_gradcheck():
    x = [torch.randn(3, dtype=F64, requires_grad=True) for _ in range(3)]
    w = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    assert torch.autograd.gradcheck(c3po, x)
    assert torch.autograd.gradcheck(lambda *x: c3po(*x, weights=w), x)
    assert torch.autograd.gradcheck(lambda a, b, c: trace_loss(a, w, b, 2 * w, c), x)
    dual = Dual(eps=0.5, lam=3.0)
    assert torch.autograd.gradcheck(lambda a, b: dual.loss(a.sum(), b.mean()), x[:2])


def test_reward_augmentation():
    pair = {"prompt": "p", "chosen": "w", "rejected": "l", "chosen_score": 8, "rejected_score": 3.5}
    out = list(reward_augmented([pair | {"id": 7}, pair | {"rejected_score": 8}]))
    assert [(r["chosen"], r["rejected"]) for r in out] == [("w", "l"), ("l", "w"), ("w", "l")]
    assert ["rated 8 on" in r["prompt"] for r in out] == [True, False, True]
    assert "rated 3.5 on" in out[1]["prompt"] and out[1]["prompt"].endswith("\n\np")
    assert (out[1]["chosen_score"], out[1]["rejected_score"], out[1]["id"]) == (3.5, 8, 7)
    chat = [{"role": "user", "content": "q"}]
    assert [m["role"] for m in with_goal(chat, 10)] == ["system", "user"]
    system = [{"role": "system", "content": "be kind"}, *chat]
    assert with_goal(system, 10, "goal {score:g}")[0]["content"] == "be kind\n\ngoal 10"
    assert system[0]["content"] == "be kind"
    with pytest.raises(ValueError, match="row 0: column 'chosen' missing"):
        list(reward_augmented([{"prompt": "p"}]))
