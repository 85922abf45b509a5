"""Metrics of generated answers against numbers worked out by hand; the early-exit rule."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from tiny_unlearning import rows, tiny_peft

from u2a.adapter import adapter_disabled
from u2a.batch import Row
from u2a.evaluate import win_rate
from u2a.metrics import alignment
from u2a.metrics.alignment import attack_success, distinct_n, kl_to_reference, refused


def test_refused_and_over_refusal():
    said = ["I can’t do that.", "Sure: first", "  ", "SORRY, no", "The capital is Rome"]
    assert refused(said).tolist() == [True, False, True, True, False]
    assert refused(["no way"], ["no way"]).tolist() == [True]
    got = alignment.over_refusal(said)
    # 3 of 5: s^2 = 0.6 * 0.4 * 5 / 4
    assert got.value == pytest.approx(0.6) and got.n == 5
    assert got.stderr == pytest.approx(math.sqrt(0.3 / 5))
    with pytest.raises(ValueError, match="at least one value"):
        alignment.over_refusal([])


def test_attack_success():
    prompts, said = ["p", "q", "r"], ["I cannot.", "Sure", "Step 1"]
    assert attack_success(prompts, said).tolist() == [0, 1, 1]
    judge = lambda p, a: [0.25 if x == "Sure" else float(y == "r") for y, x in zip(p, a)]  # noqa: B905, E731
    assert attack_success(prompts, said, judge).tolist() == [0, 0.25, 1]
    with pytest.raises(ValueError, match=r"number 1 is 5\.0, wanted in \[0, 1\]"):
        attack_success(prompts, said, lambda p, a: [1, 5, 0])
    with pytest.raises(ValueError, match="number 0 is nan"):
        attack_success(prompts, said, lambda p, a: [math.nan, 1, 0])
    with pytest.raises(ValueError, match="one number per text, 3; got 2"):
        attack_success(prompts, said, lambda p, a: [1, 0])
    with pytest.raises(ValueError, match="3 prompts, but 1 answers"):
        attack_success(prompts, said[:1])


def test_cleanness():
    got = alignment.cleanness(["a", "b"], lambda t: [0.5, 1.0])
    assert got.value == 0.75 and got.stderr == pytest.approx(0.25)


def test_win_rate_by_a_judge_that_is_asked_twice():
    prompts, ours, theirs = list("abcd"), ["long one", "x", "same", "y"], ["b", "long", "same", "z"]

    def longer(p, first, second):
        return [(len(a) > len(b)) - (len(a) < len(b)) for a, b in zip(first, second, strict=True)]

    got = alignment.judged_win_rate(prompts, ours, theirs, longer)
    assert got == win_rate(1, 2, 4) and got.value == 0.5
    want = stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert (got.low, got.high) == pytest.approx((want.low, want.high))
    # a judge that always likes the first decides nothing
    assert alignment.judged_win_rate(prompts, ours, theirs, lambda p, a, b: [1] * 4).value == 0.5
    with pytest.raises(ValueError, match="4 verdicts of -1, 0 or 1"):
        alignment.judged_win_rate(prompts, ours, theirs, lambda p, a, b: [2] * 4)
    with pytest.raises(ValueError, match="4 prompts, 3 and 4 answers"):
        alignment.judged_win_rate(prompts, ours[:3], theirs, longer)


def test_verdicts_and_wins():
    said = alignment.verdicts(["p"] * 3, ["aa", "b", "c"], ["a", "bb", "c"], lambda p, a, b: [
        (x > y) - (x < y) for x, y in zip(map(len, a), map(len, b), strict=True)
    ])  # fmt: skip
    assert said.tolist() == [1, -1, 0]
    ours, theirs = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.5, 0.0, 0.5])
    assert alignment.wins(ours, theirs).tolist() == [1, -1, 0]
    # 1 win, 1 tie of 3: p = 1/2; z^2 = 3.8415: half-width z sqrt(p(1-p)/3 + z^2/36) / (1 + z^2/3)
    z2 = stats.chi2.ppf(0.95, 1)
    half = math.sqrt(z2) * math.sqrt(0.25 / 3 + z2 / 36) / (1 + z2 / 3)
    got = alignment.rate(said)
    assert (got.value, got.low, got.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    with pytest.raises(ValueError, match=r"\[3\] rewards against \[2\]"):
        alignment.wins(ours, theirs[:2])


def test_distinct_n():
    texts = ["a b a b", "a b"]
    # words 2 of 6; pairs ab ba ab | ab: 2 of 4; by text (2/3 + 1) / 2
    assert distinct_n(texts, 1) == pytest.approx(2 / 6)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(texts, 2, pooled=False) == pytest.approx((2 / 3 + 1) / 2)
    assert distinct_n(texts, 4) == 1
    with pytest.raises(ValueError, match="none of 2 texts has 5 words"):
        distinct_n(texts, 5)
    with pytest.raises(ValueError, match="n must be >= 1"):
        distinct_n(texts, 0)


class Letters:
    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i) for i in ids)


def test_mean_reward():
    data = [Row("x", (0,), (1, 2), meta={"bonus": 1}), Row("y", (3,), (4,), meta={"bonus": 3})]

    def reward(prompts, completions, completion_ids, bonus):
        assert (prompts, completions, completion_ids) == (["a", "d"], ["bc", "e"], [[1, 2], [4]])
        return [len(c) + b for c, b in zip(completions, bonus, strict=True)]

    got = alignment.mean_reward(data, Letters(), reward)  # 3 and 4
    assert (got.value, got.stderr) == (3.5, 0.5)


def moved():
    model = tiny_peft(dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.2 * torch.randn_like(p)
    return model


def test_kl_estimate_is_the_mean_log_ratio_and_tends_to_the_kl():
    model = moved()
    with pytest.raises(ValueError, match="at least one answered row"):
        kl_to_reference(model, [])
    # every one-token answer to one prompt, weighted by how often the model gives it
    prompt = torch.tensor([[3, 5]])
    with torch.no_grad():
        p = model(input_ids=prompt).logits[0, -1].log_softmax(-1)
        with adapter_disabled(model):
            q = model(input_ids=prompt).logits[0, -1].log_softmax(-1)
    draw = torch.multinomial(p.exp(), 4000, replacement=True).tolist()
    data = [Row(str(i), (3, 5), (t,)) for i, t in enumerate(draw)]
    got = kl_to_reference(model, data, batch_tokens=1 << 20)
    assert got.value == pytest.approx(float((p - q)[draw].mean()), abs=1e-9)
    kl = float((p.exp() * (p - q)).sum())
    assert abs(got.value - kl) < 4 * got.stderr < kl, "an estimate that says something"
    same = tiny_peft(dtype=torch.float64)
    assert kl_to_reference(same, rows(3)).value == pytest.approx(0, abs=1e-12)
    assert kl_to_reference(same, rows(3), reference_model=same).value == 0
