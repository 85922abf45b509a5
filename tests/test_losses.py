"""Every loss of answer log-probabilities: vector, derivatives, masks, extremes, limits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from u2a.batch import AnswerLogps
from u2a.losses import LOSSES, dpo_margins, dpo_objective, dpo_terms, get_loss
from u2a.losses.base import PARTNER, TOKENS
from u2a.losses.divergences import PHI
from u2a.losses.flat import DIVERGENCES
from u2a.losses.paired import neat_group
from u2a.losses.rowwise import effective_positive_share, tapered, topr

WIRED = [name for name, loss in LOSSES.items() if loss.wired]
F64 = torch.float64


def answer(logp: list[list[float]], ref: list | None = None) -> AnswerLogps:
    count = torch.tensor([len(row) for row in logp])
    flat = torch.tensor([x for row in logp for x in row], dtype=F64)
    row = torch.repeat_interleave(torch.arange(len(logp)), count)
    return AnswerLogps(flat, row, count, None if ref is None else torch.tensor(ref, dtype=F64))


def padded(rows: list[list[float]]) -> list[list[float]]:
    width = max(len(r) for r in rows)
    return [r + [0.0] * (width - len(r)) for r in rows]


def given(
    name: str, rows: list[list[float]], refs: list[list[float]], partners=(), partner_refs=()
):
    """A batch with what the loss needs; the partners are there only for a loss that takes them."""
    if PARTNER in LOSSES[name].needs:
        rows, refs = [*rows, *partners], [*refs, *partner_refs]
    ref = padded(refs) if TOKENS in LOSSES[name].needs else [sum(r) for r in refs]
    return answer(rows, ref)


ROWS, REFS = [[-1.0, -2.0], [-0.3], [-3.0, -0.1, -0.7]], [[-1.5, -1.4], [-0.5], [-2.0, -0.4, -0.6]]
PARTNERS, PARTNER_REFS = [[-0.9], [-2.0, -1.2], [-0.2, -2.2]], [[-1.0], [-1.7, -1.6], [-0.6, -2.0]]


def example(name: str) -> AnswerLogps:
    return given(name, ROWS, REFS, PARTNERS, PARTNER_REFS)


@pytest.mark.parametrize("name", WIRED)
def test_vector(name):
    """The published value and slope, in the middle of a batch, and no other row's business."""
    v, loss = LOSSES[name].vector, get_loss(name, **LOSSES[name].vector.settings)
    other = [-1.5, -0.25]
    ref, pref = list(v.ref or v.logp), list(v.partner_ref or v.partner or ())
    lps = given(
        name, [other, list(v.logp), other], [other, ref, other],
        [other, list(v.partner or ()), other], [other, pref, other],
    )  # fmt: skip
    lps.logp.requires_grad_()
    assert loss(lps).shape == loss.published(lps).shape == (3,)
    assert loss.published(lps)[1].item() == pytest.approx(v.value, rel=1e-6)
    (grad,) = torch.autograd.grad(loss(lps)[1], lps.logp)
    (as_published,) = torch.autograd.grad(loss.published(lps)[1], lps.logp)
    torch.testing.assert_close(grad, as_published, rtol=1e-12, atol=1e-15)
    assert grad[2].item() == pytest.approx(v.slope, rel=1e-6)
    mine = torch.isin(lps.row, torch.tensor([1, 4]))
    assert grad[~mine].abs().max() == 0


@pytest.mark.parametrize("name", WIRED)
def test_derivatives(name):
    """Second order by gradgradcheck even where the value is a surrogate."""
    lps = example(name)
    logp = lps.logp.clone().requires_grad_()
    loss = LOSSES[name]
    if loss.exact:
        assert torch.autograd.gradcheck(lambda t: loss(lps.with_logp(t)), logp)
    assert torch.autograd.gradgradcheck(lambda t: loss(lps.with_logp(t)), logp)


def test_only_one_loss_is_not_an_integral():
    assert [n for n, loss in LOSSES.items() if not loss.exact] == ["wtnpo"]
    lps = example("wtnpo")
    logp = lps.logp.clone().requires_grad_()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda t: LOSSES["wtnpo"](lps.with_logp(t)), logp)


@pytest.mark.parametrize("name", WIRED)
def test_rows_are_independent_and_their_order_does_not_matter(name):
    """Alone, or beside longer rows (whose references pad this one's): the same bits."""
    together = LOSSES[name](example(name))
    for i in range(3):
        parts = [[x[i]] for x in (ROWS, REFS, PARTNERS, PARTNER_REFS)]
        torch.testing.assert_close(LOSSES[name](given(name, *parts))[0], together[i])
    back = [x[::-1] for x in (ROWS, REFS, PARTNERS, PARTNER_REFS)]
    torch.testing.assert_close(LOSSES[name](given(name, *back)), together.flip(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WIRED)
def test_extreme_log_probabilities_stay_finite(name, dtype):
    ends = [[0.0, 0.0], [-1e4, -1e4], [0.0, -1e4], [-1e-9, -1e-9]]
    for refs in (ends, ends[::-1], [[-1.0, -1.0]] * 4):
        lps = given(name, ends, refs, ends[::-1], refs[::-1])
        logp = lps.logp.to(dtype).requires_grad_()
        lps = dataclasses.replace(lps, logp=logp, ref=lps.ref.to(dtype))
        value = LOSSES[name](lps)
        (first,) = torch.autograd.grad(value.sum(), logp, create_graph=True)
        assert value.isfinite().all() and first.isfinite().all()
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), logp)
            assert second.isfinite().all()


def test_unlikelihood_pushes_a_token_known_by_heart():
    for dtype in (torch.float64, torch.float32):
        z = torch.tensor([[12.0, 0.0]], dtype=dtype, requires_grad=True)
        lp = AnswerLogps(z.log_softmax(-1)[:, 0], torch.tensor([0]), torch.tensor([1]))
        (g,) = torch.autograd.grad(get_loss("unlikelihood")(lp).sum(), z)
        assert 0.8 < g[0, 0].item() <= 1.0


@pytest.mark.parametrize("name", [n for n in WIRED if not n.startswith(("nll", "fsft"))])
def test_descending_lowers_the_answer_and_not_the_partner(name):
    """From the reference itself; DPO-type losses included."""
    lps = given(name, ROWS, ROWS, PARTNERS, PARTNERS)
    logp = lps.logp.clone().requires_grad_()
    (g,) = torch.autograd.grad(LOSSES[name](lps.with_logp(logp)).sum(), logp)
    answers = lps.row < 3
    if name == "neat":  # only rows ranked above their partner are pushed down
        answers &= lps.row == 1
    assert (g[answers] > 0).all()
    assert (g[lps.row >= 3] < 0).all()


def test_npo_published_digits_and_limits():
    lps = answer([[-4.0, -6.0]], [-8.0])
    assert get_loss("npo")(lps).item() == pytest.approx(11.9627773876, abs=5e-11)
    lps.logp.requires_grad_()
    strong = get_loss("npo", 1.0)(lps)
    assert strong.item() == pytest.approx(0.2538560, abs=5e-8)
    (slope,) = torch.autograd.grad(strong.sum(), lps.logp)
    assert slope.tolist() == pytest.approx([0.2384058] * 2, abs=5e-8)
    small = 1e-6  # beta -> 0: npo - (2/beta) log 2 -> lp - lp_ref
    shifted = get_loss("npo", small)(lps).item() - 2 / small * math.log(2)
    assert shifted == pytest.approx(-2.0, abs=1e-5)


def test_simnpo_published_digits():
    lps = answer([[-1.5] * 20])
    assert get_loss("simnpo", 2.5)(lps).item() == pytest.approx(0.0185963715, abs=5e-11)
    assert get_loss("simnpo", 4.5)(lps).item() == pytest.approx(0.0005200865, abs=5e-11)
    shifted = get_loss("simnpo", 2.5, margin=1.5)(lps)  # NLL/|y| - delta = 0
    assert shifted.item() == pytest.approx(2 / 2.5 * math.log(2))


def test_tnpo_of_one_token_is_npo():
    one = answer([[-0.7], [-2.0]], [[-1.0], [-1.0]])
    assert torch.equal(get_loss("tnpo", 0.4)(one), get_loss("npo", 0.4)(one))


def test_topr_limits():
    lps = answer([[-1.0, -1.0], [-9.0, -9.0], [-2.0, -2.0]], [-2.0, -2.0, -20.0])
    logp = lps.logp.clone().requires_grad_()
    (g,) = torch.autograd.grad(get_loss("topr")(lps.with_logp(logp)).sum(), logp)
    want = [1.0, math.exp(-16), 1.0]  # at mu the push is GA's, far below it none, above it capped
    torch.testing.assert_close(g[::2], torch.tensor(want, dtype=F64))
    signed = topr(lps.with_logp(logp), torch.tensor([1.0, 1.0, -1.0]), baseline=0.5)
    (g,) = torch.autograd.grad(signed.sum(), logp)
    torch.testing.assert_close(g[::2], torch.tensor([-0.5, -0.5, 1.5], dtype=F64))
    r = torch.tensor([1.0, -2.0, -1.0])
    inner = answer([[-1.0, -1.0], [-2.5, -0.5], [-2.0, -2.0]], [-2.0, -2.0, -3.0])
    assert torch.autograd.gradcheck(
        lambda t: topr(inner.with_logp(t), r), inner.logp.requires_grad_()
    )
    u = torch.linspace(-3, 3, 25, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(tapered(u, 0.2, 2.0).sum(), u)
    torch.testing.assert_close(slope, u.detach().exp().clamp(0.2, 2.0))
    with pytest.raises(ValueError, match=r"0 <= low <= high, high > 0, got \[2, 1\]"):
        tapered(u, 2, 1)
    rewards = torch.tensor([1.0] * 3 + [-1.0] * 7) - 0.25  # effective share by the weights R - c
    share = rewards.clamp_min(0).sum() / rewards.abs().sum()
    assert effective_positive_share(0.3, 0.25) == pytest.approx(share.item())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_flat_raises_the_refusal_and_lowers_the_answer(kind):
    for p in (0.05, 0.5, 0.95):
        lps = answer([[math.log(p)], [math.log(1 - p)]])
        logp = lps.logp.clone().requires_grad_()
        (g,) = torch.autograd.grad(LOSSES[f"flat_{kind}"](lps.with_logp(logp)).sum(), logp)
        assert g[0] > 0 > g[1]


def test_flat_fenchel_pairs():
    """f*(u) = sup_t u t - f(t) at u = g*(v), on a grid of t."""
    t = torch.logspace(-6, 3, 400_001, dtype=F64)
    f = {
        "kl": t * t.log(),
        "js": t * t.log() - (t + 1) * ((1 + t) / 2).log(),
        "pearson": (t - 1).square(),
        "reverse_kl": -t.log(),
        "sq_hellinger": (t.sqrt() - 1).square(),
        "neyman": (1 - t).square() / t,
    }
    for kind, values in f.items():
        g, f_of_g = DIVERGENCES[kind]
        for v in (0.1, 0.5, 0.9):
            v = torch.tensor(v, dtype=F64)
            assert (g(v) * t - values).max().item() == pytest.approx(f_of_g(v).item(), abs=1e-4)
    tv = DIVERGENCES["tv"]  # f* is the identity on [-1/2, 1/2]
    assert tv[0](torch.tensor(0.5)) == tv[1](torch.tensor(0.5)) < 0.5


def test_flat_averages_probabilities_over_answer_tokens():
    lps = answer([[math.log(0.2), math.log(0.6)], [math.log(0.1), math.log(0.9), math.log(0.5)]])
    assert LOSSES["flat_pearson"](lps).item() == pytest.approx(0.4 + 0.04 - 0.5)


def test_phi_checked_values_and_self_limitation():
    u = torch.tensor(0.4, dtype=F64)
    want = {"pearson": 0.36, "sq_hellinger": 0.285714, "js": 0.284938, "kl": -0.246597}
    for kind, value in want.items():
        assert PHI[kind](u).item() == pytest.approx(value, abs=1e-6)
    for kind, phi in PHI.items():
        at = [phi.floor + x for x in (-1, 0, 1e-9)]
        at = torch.tensor(at, dtype=F64, requires_grad=True)
        values = phi(at)
        (slope,) = torch.autograd.grad(values.sum(), at)
        assert slope.tolist() == pytest.approx([phi.slope(phi.floor)] * 3), kind
        assert (values[1] - values[0]).item() == pytest.approx(phi.slope(phi.floor)), kind
    at_two = answer([[1.0, 1.0]], [-2.0])  # h = 2: Pearson stops
    at_two.logp.requires_grad_()
    (g,) = torch.autograd.grad(LOSSES["fsft_pearson"](at_two).sum(), at_two.logp)
    assert g.abs().max() == 0


def test_exmate_is_bounded_and_mate_is_not():
    far = answer([[-50.0], [-1.0]])
    assert LOSSES["exmate"](far).item() == pytest.approx(1.0)
    assert LOSSES["mate"](far).item() == pytest.approx(1.0 - 2.5)


def test_neat_group():
    lps = answer([[-1.0], [-2.0, -2.0], [-0.5], [-3.0], [-1.0]])
    rewards, group = torch.tensor([0.1, 0.9, 0.5, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1])
    # group 0 ranks 0 < 2 < 1 with s = -1, -0.5, -2: (0, 1) 1, (2, 1) 1.5; best is row 1
    assert neat_group(lps, rewards, group).tolist() == pytest.approx([1 + 1.5 + 2, 3.0])
    pair = answer([[-0.3], [-0.8]])
    two = neat_group(pair, torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    assert torch.equal(two, LOSSES["neat"](pair))
    logp = lps.logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: neat_group(lps.with_logp(t), rewards, group), logp)
    with pytest.raises(ValueError, match=r"one reward and group per row \[5\]"):
        neat_group(lps, rewards[:3], group)


def test_example_without_answer_tokens_is_zero_not_nan():
    lps = answer([[], [-1.0]])
    assert get_loss("ga")(lps).tolist() == [0.0, -1.0]
    assert get_loss("wga")(lps)[0] == 0


def test_position_and_reference_per_token():
    lps = answer([[-1.0], [], [-1.0] * 3], [[-2.0, 0, 0], [0.0, 0, 0], [-3.0, -4.0, -5.0]])
    assert lps.position().tolist() == [0, 0, 1, 2]
    lps.logp.requires_grad_()
    assert get_loss("npo", 1.0)(lps).tolist() == pytest.approx(
        [2 * math.log1p(math.exp(x)) for x in (1.0, 0.0, 9.0)]
    )


def test_messages():
    with pytest.raises(ValueError, match="got 'nop', nearest 'npo'"):
        get_loss("nop")
    with pytest.raises(ValueError, match="npo: beta must be > 0, got -1"):
        get_loss("npo", -1)
    with pytest.raises(ValueError, match="simnpo: no option 'delta', wanted one of: margin"):
        get_loss("simnpo", delta=1)
    with pytest.raises(ValueError, match="npo: lp.ref must hold"):
        get_loss("npo")(answer([[-1.0]]))
    with pytest.raises(
        ValueError, match=r"tnpo: lp.ref must hold .* per token \[B, L\], got \[1\]"
    ):
        get_loss("tnpo")(answer([[-1.0]], [-1.0]))
    with pytest.raises(ValueError, match="P chosen then P rejected, got 3"):
        dpo_margins(answer([[-1.0]] * 3, [0.0] * 3))
    with pytest.raises(ValueError, match="flat_tv: .* P answers then P partners, got 1 rows"):
        get_loss("flat_tv")(answer([[-1.0]]))
    with pytest.raises(ValueError, match="undial: needs reference, whole vocabulary"):
        get_loss("undial")(answer([[-1.0]]))
    with pytest.raises(ValueError, match="satimp: beta2 must be a whole number >= 0, got 0.5"):
        get_loss("satimp", beta2=0.5)(answer([[-1.0]]))


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
    swapped = answer([[-5.0], [-0.5, -0.5], [-1.0, -2.0], [-4.0]], [-4.0, -2.0, -3.5, -4.0])
    torch.testing.assert_close(get_loss("dpo", 0.3)(swapped), -dpo_terms(lps))
