"""Unlearning metrics against numbers worked out by hand, and against the model's own logits."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from scipy import stats
from tiny_models import make, plain
from tiny_models import rows as model_rows
from torch.testing import assert_close

from u2a.batch import Row, collate, row_batches
from u2a.metrics import answers, memorisation, mia, tofu
from u2a.metrics.estimate import mean
from u2a.metrics.tokens import AnswerTokens, answer_tokens, moments, without_end
from u2a.products import answer_logps

log = math.log


def d(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_probability():
    # tokens of probability 1/2, 1/8: sqrt(1/16) = 1/4; one token of 1/3
    got = answers.probability(-d(log(1 / 2) + log(1 / 8), log(1 / 3)), torch.tensor([2, 1]))
    assert_close(got, d(0.25, 1 / 3))
    assert answers.probability(d(2000.0), torch.tensor([1])).item() == 0
    with pytest.raises(ValueError, match="row 1 holds no answer token"):
        answers.probability(d(1.0, 0.0), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="probability: row 0"):
        answers.probability(d(), torch.tensor([], dtype=torch.int64))


def test_probability_with_options():
    # 0.2 / (0.2 + 0.1 + 0.3 + 0.2) = 1/4; 0.6 / (0.6 + 0.2) = 3/4; nothing likely: 0
    got = answers.probability_with_options(d(0.2, 0.6, 0.0), [d(0.1, 0.3, 0.2), d(0.2), d(0.0)])
    assert_close(got, d(0.25, 0.75, 0.0))
    with pytest.raises(ValueError, match=r"row 1 has \[0\] wrong answers"):
        answers.probability_with_options(d(0.1, 0.2), [d(0.1), d()])
    with pytest.raises(ValueError, match="one set of wrong answers per row"):
        answers.probability_with_options(d(0.1, 0.2), [d(0.1)])


def test_rouge_l():
    # LCS("the cat sat on the mat", "the dog sat on a mat") = the sat on mat: 4 of 6 and 4 of 6.
    # "cats sat" stems to "cat sat": 2 of 6 recalled, precision 1, f1 = 2 (1/3) / (4/3) = 1/2
    reference = "the cat sat on the mat"
    texts = ["the dog sat on a mat", "cats sat", "", "mat the on cat"]
    got = answers.rouge_l([reference] * 4, texts)
    # "mat the on cat": the longest is "the on" or "the cat": 2 of 6 and 2 of 4, f1 = 0.4
    assert_close(got.recall, d(4 / 6, 2 / 6, 0, 2 / 6))
    assert_close(got.f1, d(4 / 6, 0.5, 0, 0.4))
    with pytest.raises(ValueError, match="2 references, wanted as many texts: 1"):
        answers.rouge_l(["a", "b"], ["a"])


def test_memorisation():
    # rows: hit miss hit hit; hit; miss; hit hit; hit miss
    hit = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    count = torch.tensor([4, 1, 1, 2, 2])
    assert_close(memorisation.exact_memorisation(hit, count), d(0.75, 1, 0, 1, 0.5))
    # k = 2 of 4; 0 of 1; 1 of 1; 0 of 2; 2 of 2
    assert_close(memorisation.extraction_strength(hit, count), d(0.5, 1, 0, 1, 0))
    for metric in (memorisation.exact_memorisation, memorisation.extraction_strength):
        with pytest.raises(ValueError, match="row 1 holds no answer token"):
            metric(hit[:3], torch.tensor([3, 0]))
        with pytest.raises(ValueError, match=r"wanted \[4\] values"):
            metric(hit[:3], torch.tensor([3, 1]))


def test_truth_ratio():
    # right 0.5; wrong 0.5, 0.125: geometric 0.25 -> 1/2, arithmetic 0.3125 -> 0.625
    # right 0.1; wrong 0.4 alone: 4 both ways
    right = d(0.5, 0.1).log()
    wrong = [d(0.5, 0.125).log(), d(0.4).log()]
    assert_close(tofu.truth_ratio(right, wrong), d(0.5, 4))
    assert_close(tofu.truth_ratio(right, wrong, "arithmetic"), d(0.625, 4))
    ratio = tofu.log_truth_ratio(right, wrong)
    assert_close(tofu.closer_to_one(ratio), d(0.5, 0.25))
    assert_close(tofu.truth_preferred(ratio), d(0.5, 0))
    # far beyond what exp can hold
    far = tofu.log_truth_ratio(d(-5000.0), [d(-1.0, -1.0)], "arithmetic")
    assert far.item() == pytest.approx(4999) and tofu.closer_to_one(far).item() == 0
    with pytest.raises(ValueError, match="mean 'harmonic', wanted"):
        tofu.truth_ratio(right, wrong, "harmonic")
    with pytest.raises(ValueError, match="row 0 has"):
        tofu.truth_ratio(right[:1], [d()])


def test_forget_quality():
    # disjoint samples of 3 and 3: D = 1, exact two-sided p = 2 / C(6, 3) = 0.1
    assert tofu.forget_quality(d(1, 2, 3), d(7, 8, 9)) == pytest.approx(0.1)
    assert tofu.forget_quality(d(1, 2, 3), d(1, 2, 3)) == pytest.approx(1)
    assert tofu.forget_quality(d(2.0), d(3.0)) == 1  # one row each says nothing
    a, b = d(0.2, 0.4, 1.5, 3), d(0.3, 2, 5)
    want = stats.ks_2samp(a, b).pvalue
    assert tofu.forget_quality(a.log(), b.log()) == pytest.approx(want)
    assert tofu.forget_quality(1 / a, 1 / b) == pytest.approx(want)
    with pytest.raises(ValueError, match="retrained must be"):
        tofu.forget_quality(a, d())
    with pytest.raises(ValueError, match="unlearned must be"):
        tofu.forget_quality(d(1, math.nan), b)


def test_model_utility():
    # harmonic mean of 1/2 (x5), 1/4 (x4): 9 / (10 + 16)
    nine = dict(zip(tofu.UTILITY, [0.5] * 5 + [0.25] * 4, strict=True))
    assert tofu.model_utility(nine) == pytest.approx(9 / 26)
    assert tofu.model_utility(nine | {"ra_Q_A_ROUGE": 0.0}) == 0
    with pytest.raises(ValueError, match=r"differs in \['wf_Truth_Ratio'\]"):
        tofu.model_utility({k: v for k, v in nine.items() if k != "wf_Truth_Ratio"})
    with pytest.raises(ValueError, match="ra_Q_A_ROUGE must be >= 0 and finite, got nan"):
        tofu.model_utility(nine | {"ra_Q_A_ROUGE": math.nan})


def test_membership_scores():
    assert_close(mia.loss_score(d(6, 1), torch.tensor([3, 1])), d(2, 1))
    texts = ["a" * 100, "abc"]
    sizes = [len(zlib.compress(t.encode())) for t in texts]
    assert_close(mia.zlib_score(d(2, 1), texts), d(2 / sizes[0], 1 / sizes[1]))
    assert sizes == [12, 11], "a hundred equal letters compress to hardly more than three"
    assert_close(mia.reference_score(d(2, 1), d(0.5, 3)), d(1.5, -2))
    # 5 tokens, k = 0.4: the lowest 2 of -1 -5 -2 -3 -0.5, then one token whatever k is
    logp, count = d(-1, -5, -2, -3, -0.5, -7), torch.tensor([5, 1])
    assert_close(mia.min_k(logp, count), d(4, 7))
    assert_close(mia.min_k(logp, count, 0.2), d(5, 7))
    assert_close(mia.min_k(logp, count, 1.0), d(2.3, 7))
    # the lowest 29 of 0 ... 99
    assert_close(mia.min_k(torch.arange(100.0), torch.tensor([100]), 0.29), d(-14))
    # z-scores: (-1 + 2) / 2, (-5 + 2) / 1, 0, (-3 + 1) / 0.5, 1.5 / 1 -> lowest 2: -4, -3
    std = d(2, 1, 1, 0.5, 1, 0)
    center = d(-2, -2, -2, -1, -2, -7)
    assert_close(mia.min_k_plus_plus(logp, center, std, count), d(3.5, 0))
    for k in (0, 1.5):
        with pytest.raises(ValueError, match="k must be in"):
            mia.min_k(logp, count, k)
    with pytest.raises(ValueError, match="row 1 holds no answer token"):
        mia.loss_score(d(6, 0), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"wanted \[1\] losses"):
        mia.zlib_score(d(2, 1), ["a"])


def test_auc_and_privleak():
    # of 2 x 3 pairs: 1 < 2, 3, 4 and 3 < 4, 3 = 3: 4.5 of 6
    assert mia.auc(d(1, 3), d(2, 3, 4)) == pytest.approx(4.5 / 6)
    assert mia.auc(d(1.0), d(2.0)) == 1 and mia.auc(d(2.0), d(1.0)) == 0
    assert mia.auc(d(1, 1), d(1, 1, 1)) == 0.5
    with pytest.raises(ValueError, match=r"others must be \[n >= 1\] scores"):
        mia.auc(d(1.0), d())
    with pytest.raises(ValueError, match="members must be finite, row 1"):
        mia.auc(d(1, math.nan), d(1.0))
    # (0.25 - 0.5) / 0.5, (0.5 - 0.4) / 0.4
    assert mia.privleak(0.75) == pytest.approx(-50) and mia.privleak(0.5) == 0
    assert mia.privleak(0.5, 0.6) == pytest.approx(25)
    for bad in ((0.5, 1.0), (1.1, 0.5), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="wanted AUCs"):
            mia.privleak(*bad)


def test_moments_of_three_tokens():
    # p = 1/2, 1/4, 1/4: mean log p = -log 2 (1/2 + 2/4 + 2/4) = -1.5 log 2; variance
    # 1/2 (1/2)^2 + 1/2 (1/2)^2 = 1/4 in units of (log 2)^2
    p = d(0.5, 0.25, 0.25)
    logits = torch.stack([p.log() + 3, p.log(), d(0, 0, 0), d(0, -math.inf, -math.inf)])
    hit, center, spread = moments(logits, torch.tensor([0, 2, 1, 0]))
    assert hit.tolist() == [True, False, False, True]
    assert_close(center, d(-1.5 * log(2), -1.5 * log(2), -log(3), 0))
    assert_close(spread, d(log(2) / 2, log(2) / 2, 0, 0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_answer_tokens_are_the_logits(family, block):
    model, data = make(family), model_rows()
    with plain(model):
        got = answer_tokens(model, data, batch_tokens=12, logits=block)
    assert got.count.tolist() == [5, 2, 1, 4, 6]
    start = 0
    for row in data:
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        with torch.no_grad(), plain(model) as base:
            z = base(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        target = torch.tensor(row.answer_ids)
        part = slice(start, start := start + len(target))
        assert_close(got.logp[part], z.gather(1, target[:, None])[:, 0])
        assert torch.equal(got.hit[part], z.argmax(-1) == target)
        center = (z.exp() * z).sum(-1)
        assert_close(got.mean[part], center)
        assert_close(got.std[part], ((z.exp() * z**2).sum(-1) - center**2).sqrt())
    with pytest.raises(ValueError, match="at least one Row"):
        answer_tokens(model, [])


def test_in_bfloat16_log_probabilities_are_those_of_answer_logps():
    model, data = make("llama", dtype=torch.bfloat16), model_rows()
    got = answer_tokens(model, data)
    (batch,) = row_batches(data, 8192)
    want = answer_logps(model, batch).logp.double()
    rows = dict(zip(batch.index.tolist(), want.split(batch.answer.sum(1).tolist()), strict=True))
    assert torch.equal(got.logp, torch.cat([rows[i] for i in range(5)]).detach())
    exact = answer_tokens(make("llama", dtype=torch.float32), data)
    assert_close(got.mean, exact.mean, rtol=0.05, atol=0.05)
    assert bool(mia.gradient_norms(model, data).isfinite().all())


def test_without_end_takes_one_eos_only():
    data = [Row("a", (1,), (5, 2, 2)), Row("b", (1,), (2, 5)), Row("c", (1,), (2,))]
    x = torch.arange(6.0)
    got = without_end(AnswerTokens(x, x > 1, x + 1, x + 2, torch.tensor([3, 2, 1])), data, eos=2)
    assert got.count.tolist() == [2, 2, 1] and got.logp.tolist() == [0, 1, 3, 4, 5]
    assert got.hit.tolist() == [False, False, True, True, True]
    assert got.mean.tolist() == [1, 2, 4, 5, 6] and got.std.tolist() == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_norms_are_those_of_autograd(family, lora):
    model, data = make(family, lora=lora), model_rows()
    frozen = [p.requires_grad for p in model.parameters()]
    with plain(model):
        got = mia.gradient_norms(model, data, batch_tokens=16)
    assert [p.requires_grad for p in model.parameters()] == frozen
    weights = {
        id(m.weight): m.weight.requires_grad_()
        for name, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and "lora_" not in name and "head" not in name
    }
    for row, norm in zip(data, got, strict=True):
        batch = collate([row])
        with plain(model) as base:
            z = base(input_ids=batch.ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        loss = -z.gather(1, torch.tensor(row.answer_ids)[:, None]).mean()
        grads = torch.autograd.grad(loss, list(weights.values()))
        want = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        assert norm.item() == pytest.approx(want.item(), rel=1e-8)


def test_mean():
    # 1, 2, 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, stderr = sqrt(7 / 3)
    got = mean([1, 2, 6])
    assert (got.value, got.stderr, got.n) == (3, pytest.approx(math.sqrt(7 / 3)), 3)
    assert mean([4]).value == 4 and math.isnan(mean([4]).stderr)
    with pytest.raises(ValueError, match="at least one value"):
        mean([])
    with pytest.raises(ValueError, match="value 1 of 2 is nan"):
        mean([1, math.nan])
