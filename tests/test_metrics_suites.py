"""Suites of `u2a eval` on a model whose every word is known: what they ask for and what they make
of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from u2a.batch import Row
from u2a.metrics.suites.muse import STOPS, muse_suite
from u2a.metrics.suites.preference import Answers
from u2a.metrics.suites.subject import Findings, Judges

WORDS = "a b c d e f g h".split()


class Words:
    eos_token_id = 7

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(WORDS[i] for i in ids)


class Says:
    """A subject that answers prompt (i,) with `answers[i]`, and remembers what it was asked."""

    def __init__(self, answers, show=False):
        self.answers, self.asked, self.show = answers, [], show
        self.tokenizer, self.judges = Words(), Judges()
        self.cfg = SimpleNamespace(eval=SimpleNamespace(max_new_tokens=9))

    def written(self, rows, tokens=None, stop=()):
        self.asked.append((len(rows), tokens, tuple(stop)))
        return [self.answers[r.prompt_ids[0]] for r in rows]


def test_muse_by_hand():
    # "a b c d" against "a b x d": a b d in common, recall 3/4, precision 3/4, f1 3/4;
    # against "a b": recall 1/2, precision 1, f1 2/3. Mean f1 = (3/4 + 2/3) / 2
    rows = [Row("x", (0,), (0, 1, 2, 3)), Row("y", (1,), (0, 1, 2, 3))]
    subject = Says(["a b x d", "a b"], show=True)
    sets = {"forget_verbmem": rows, "retain_knowmem": rows[1:]}
    got = muse_suite(subject, sets)
    assert subject.asked == [(2, 128, ()), (1, 32, STOPS)]
    assert got["forget_verbmem_ROUGE"]["agg_value"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert got["retain_knowmem_ROUGE"]["agg_value"] == pytest.approx(2 / 3)
    line = got["forget_verbmem_ROUGE"]["value_by_index"]["1"]
    assert line["rougeL_recall"] == pytest.approx(1 / 2) and line["input"] == "b"
    assert (line["ground_truth"], line["generation"]) == ("a b c d", "a b")


def test_wins_are_a_mean_with_its_interval():
    rows = [Row(str(i), (i,), (i,)) for i in range(4)]
    out = Findings("answers", rows)
    out.wins("win_rate", torch.tensor([1.0, 0.0, -1.0, 1.0]))  # 2 wins, 1 tie of 4: 5/8
    assert out.values["win_rate"].value == pytest.approx(5 / 8)
    assert [s["win_rate"] for s in out.samples] == [1, 0.5, 0, 1]
    # Wilson with z = 1.96: centre (p + z^2/8) / (1 + z^2/4)
    low, high = (out.values[f"win_rate_{end}"].value for end in ("low", "high"))
    z2 = 1.959964**2
    assert (low + high) / 2 == pytest.approx((5 / 8 + z2 / 8) / (1 + z2 / 4), rel=1e-6)
    assert 0 < low < 5 / 8 < high < 1 and out.values["win_rate_low"].n == 4


def test_answers_have_rewards_where_there_is_a_function():
    rows, subject = [Row("x", (0,), (1, 2)), Row("y", (0,), (3,))], Says([])
    assert Answers.of(subject, rows) == Answers(["b c", "d"], None)
    subject.judges = Judges(reward=lambda prompts, completions, **_: [len(c) for c in completions])
    assert Answers.of(subject, rows).reward.tolist() == [3, 1]
