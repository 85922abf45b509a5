"""Every loss against its published vector, gradients, and the preference objective."""

from __future__ import annotations

import math

import pytest
import torch

from u2a.batch import AnswerLogps
from u2a.losses import LOSSES, dpo_margins, dpo_objective, dpo_terms, get_loss


def answer(logp: list[list[float]], ref: list[float] | None = None) -> AnswerLogps:
    count = torch.tensor([len(row) for row in logp])
    flat = torch.tensor([x for row in logp for x in row], dtype=torch.float64)
    row = torch.repeat_interleave(torch.arange(len(logp)), count)
    ref_t = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    return AnswerLogps(flat, row, count, ref_t)


@pytest.mark.parametrize("name", LOSSES)
def test_vector(name):
    lp, ref, count, beta, value, slope = LOSSES[name].vector
    loss = get_loss(name, beta or None)
    other = [-1.5, -0.25]
    lps = answer([other, [lp / count] * count], [-2.0, ref])
    lps.logp.requires_grad_()
    got = loss(lps)
    (grad,) = torch.autograd.grad(got[1], lps.logp)
    assert got.shape == (2,)
    assert got[1].item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(grad[2:], torch.full((count,), slope).double(), rtol=1e-6, atol=0)
    assert grad[:2].abs().max() == 0, "one example's loss must not depend on another's tokens"


def test_npo_published_digits_and_limit():
    lps = answer([[-4.0, -6.0]], [-8.0])
    assert get_loss("npo")(lps).item() == pytest.approx(11.9627773876, abs=5e-11)
    assert get_loss("npo", 1.0)(lps).item() == pytest.approx(0.2538560, abs=5e-8)
    small = 1e-6  # beta -> 0: npo - (2/beta) log 2 -> lp - lp_ref
    shifted = get_loss("npo", small)(lps).item() - 2 / small * math.log(2)
    assert shifted == pytest.approx(-2.0, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    lps = answer([[-1.0, -2.0], [-0.3], [-3.0, -0.1, -0.7]], [-2.0, -1.0, -4.0])
    logp = lps.logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: LOSSES[name](lps.with_logp(t)), logp)
    assert torch.autograd.gradgradcheck(lambda t: LOSSES[name](lps.with_logp(t)).exp(), logp)


def test_example_without_answer_tokens_is_zero_not_nan():
    lps = answer([[], [-1.0]])
    assert get_loss("ga")(lps).tolist() == [0.0, -1.0]


def test_messages():
    with pytest.raises(ValueError, match="got 'nop', nearest 'npo'"):
        get_loss("nop")
    with pytest.raises(ValueError, match="npo: beta must be > 0, got -1"):
        get_loss("npo", -1)
    with pytest.raises(ValueError, match="npo: lp.ref must hold"):
        get_loss("npo")(answer([[-1.0]]))
    with pytest.raises(ValueError, match="P chosen then P rejected, got 3"):
        dpo_margins(answer([[-1.0]] * 3, [0.0] * 3))


def test_preference_objective():
    lps = answer([[-1.0, -2.0], [-4.0], [-5.0], [-0.5, -0.5]], [-3.5, -4.0, -4.0, -2.0])
    margins = dpo_margins(lps)
    assert margins.tolist() == [0.5 + 1.0, 0.0 - 1.0]
    want = [-math.log1p(math.exp(-0.3 * m)) for m in (1.5, -1.0)]
    torch.testing.assert_close(dpo_terms(lps), torch.tensor(want, dtype=torch.float64))
    assert dpo_objective(lps).item() == pytest.approx(sum(want) / 2)
    at_reference = answer([[-1.0], [-2.0]], [-1.0, -2.0])
    at_reference.logp.requires_grad_()
    value = dpo_objective(at_reference)
    (grad,) = torch.autograd.grad(value, at_reference.logp)
    assert value.item() == pytest.approx(-math.log(2))
    assert grad.tolist() == pytest.approx([0.15, -0.15])
