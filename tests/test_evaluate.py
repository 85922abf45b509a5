"""Metrics against row-by-row values from the model's logits, and against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_unlearning import pairs, rows, tiny_peft

from u2a.adapter import reference_logps
from u2a.evaluate import forget_nll, mean_nll, perplexity, preference, spearman, win_rate


def model_and_change(scale=0.1):
    model = tiny_peft(dtype=torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += scale * torch.randn_like(p)
    return model


def sequence(model, row):
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    logp = logp[torch.arange(len(row) - 1), ids[0, 1:]]
    return logp[len(row.prompt_ids) - 1 :]


@pytest.mark.parametrize("batch_tokens", [10, 8192])
def test_preference(batch_tokens):
    model, data = model_and_change(), pairs(7)
    chosen, rejected = [p.chosen for p in data], [p.rejected for p in data]
    ref = reference_logps(model, chosen), reference_logps(model, rejected)
    got = preference(model, data, ref, beta=0.3, batch_tokens=batch_tokens)
    good = torch.stack([sequence(model, r).sum() for r in chosen])
    bad = torch.stack([sequence(model, r).sum() for r in rejected])
    margin = good - ref[0] - bad + ref[1]
    torch.testing.assert_close(got.margins, margin, rtol=1e-9, atol=1e-9)
    assert got.objective == pytest.approx(float(-torch.log1p(torch.exp(-0.3 * margin)).mean()))
    assert got.accuracy == (margin > 0).double().mean() and 0 < got.accuracy < 1
    assert got.order_accuracy == (good > bad).double().mean()
    assert got.mean_margin == pytest.approx(float(margin.mean()))
    assert got.objective == pytest.approx(float(got.terms.mean())) and got.terms.shape == (7,)


def test_preference_at_the_reference():
    model, data = tiny_peft(), pairs(4)
    ref = tuple(
        reference_logps(model, [getattr(p, k) for p in data]) for k in ("chosen", "rejected")
    )
    got = preference(model, data, ref)
    assert got.objective == pytest.approx(-math.log(2), abs=1e-6)
    assert got.mean_margin == pytest.approx(0, abs=1e-5)


def test_perplexity_is_pooled():
    model, data = model_and_change(), rows(9, 4)
    parts = [-sequence(model, r) for r in data]
    pooled = float(torch.cat(parts).mean())
    assert forget_nll(model, data, 16) == pytest.approx(pooled, rel=1e-10)
    assert perplexity(model, data) == pytest.approx(math.exp(pooled), rel=1e-9)
    by_row = torch.stack([p.mean() for p in parts])
    torch.testing.assert_close(mean_nll(model, data, 16), by_row, rtol=1e-9, atol=0)
    assert abs(float(by_row.mean()) - pooled) > 1e-3, "the two means must differ on this data"


def test_evaluation_leaves_mode_and_gradients_alone():
    model = tiny_peft().train()
    perplexity(model, rows(2))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_win_rate_is_the_wilson_interval():
    for wins, n in ((0, 20), (7, 20), (20, 20)):
        want = stats.binomtest(wins, n).proportion_ci(method="wilson")
        got = win_rate(wins, 0, n)
        assert (got.value, got.low, got.high) == pytest.approx((wins / n, want.low, want.high))
    assert win_rate(3, 4, 10).value == 0.5
    with pytest.raises(ValueError, match=r"got 7 \+ 4 of 10"):
        win_rate(7, 4, 10)


def test_spearman():
    draw = np.random.default_rng(0)
    x = draw.normal(size=40)
    y = x + 0.5 * draw.normal(size=40)
    got = spearman(torch.tensor(x), y.tolist(), resamples=2000)
    assert got.rho == pytest.approx(stats.spearmanr(x, y).statistic) and got.n == 40
    want = stats.bootstrap(
        (x, y),
        lambda a, b: stats.spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.02)
    assert spearman(x, np.exp(x)).rho == pytest.approx(1)
    assert spearman(x, -(x**3)).rho == pytest.approx(-1)


def test_messages():
    with pytest.raises(ValueError, match="x must be finite and not constant"):
        spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        spearman([1.0, 1.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least one Pair"):
        preference(tiny_peft(), [], (torch.zeros(0), torch.zeros(0)))
    with pytest.raises(ValueError, match=r"ref rejected wanted \[2\], got \[3\]"):
        preference(tiny_peft(), pairs(2), (torch.zeros(2), torch.zeros(3)))
