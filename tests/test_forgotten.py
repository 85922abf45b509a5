"""The early-exit rule on a model that knows its rows by heart, alone and in the outer loop."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_unlearning import fitted_base, tiny_peft
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from u2a.batch import Pair, Row
from u2a.bilevel import Plan, bilevel
from u2a.generate import Sampling
from u2a.inner import InnerProblem, inner_solve
from u2a.losses import get_loss
from u2a.metrics.forgotten import Forgotten
from u2a.metrics.generation import wanted, written
from u2a.objectives import PairSet, Preference
from u2a.outer import Outer, SolveSettings

EOS = 0


def words(ids, skip_special_tokens=True):
    return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i == EOS))


TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=None, decode=words)
KNOWN = [Row(f"row{i}", (10 + i,), (20 + i, 3 + i, 15, 1 + 2 * i, EOS)) for i in range(4)]
OTHER = [Row(f"other{i}", r.prompt_ids, (8, 9, EOS)) for i, r in enumerate(KNOWN)]


@pytest.fixture(scope="module")
def base():
    """With Llama's own norms again, which the outer loop knows."""
    torch.manual_seed(0)
    model = fitted_base(KNOWN, steps=60)
    for m in model.modules():
        for name, norm in m.named_children():
            if isinstance(norm, torch.nn.RMSNorm):
                own = LlamaRMSNorm(32, 1e-6)
                own.load_state_dict(norm.state_dict())
                setattr(m, name, own)
    return model


def test_what_is_written(base):
    assert wanted(TOKENIZER, KNOWN[:1]) == ["w20 w3 w15 w1"]
    how = Sampling(top_k=1, max_new_tokens=8, batch=3)
    said = written(base, TOKENIZER, KNOWN, how)
    assert said == wanted(TOKENIZER, KNOWN), "greedy gives what was learnt, in the rows' order"
    assert written(base, TOKENIZER, KNOWN[:1], how, stop=["w15"]) == ["w20 w3"]
    with pytest.raises(ValueError, match="1 rows have no prompt to answer, first x"):
        written(base, TOKENIZER, [Row("x", (), (1,))], how)


def test_rows_known_by_heart_are_not_forgotten(base):
    rule = Forgotten(TOKENIZER, how=Sampling(top_k=1, max_new_tokens=8))
    assert rule.scores(base, KNOWN).tolist() == [1, 1, 1, 1]
    assert not rule(base, KNOWN).any()
    changed = [Row("a", KNOWN[0].prompt_ids, (25, 26, 27, 28, EOS)), KNOWN[1]]
    assert rule(base, changed).tolist() == [True, False]
    # 2 of 4 words in common: f1 = 1/2
    half = Row("b", KNOWN[0].prompt_ids, (20, 3, 27, 28, EOS))
    assert rule.scores(base, [half]).item() == 0.5
    assert Forgotten(TOKENIZER, 0.6, how=rule.how)(base, [half]).all()


def test_a_score_of_ones_own(base):
    seen = []

    def score(references, texts):
        seen.extend(zip(references, texts, strict=True))
        return [0.2, 0.9]

    rule = Forgotten(TOKENIZER, below=0.5, score=score, how=Sampling(top_k=1, max_new_tokens=8))
    assert rule(base, KNOWN[:2]).tolist() == [True, False]
    assert seen == [(t, t) for t in wanted(TOKENIZER, KNOWN[:2])]
    for bad in ([0.1], [0.1, math.nan]):
        rule.score = lambda a, b, bad=bad: bad
        with pytest.raises(ValueError, match=r"must return \[2\] finite numbers"):
            rule(base, KNOWN[:2])


def test_the_loop_lets_forgotten_rows_go(base):
    model = tiny_peft(base=base)
    pairs = [Pair(f"p{i}", o, k) for i, (o, k) in enumerate(zip(OTHER, KNOWN, strict=True))]
    J = Preference(PairSet.build(model, pairs, 512), 0.3, 512)
    problem = InnerProblem.build(
        model, KNOWN, torch.zeros(4), get_loss("npo"), anchor=0.05, batch_tokens=256
    )
    asked = []
    rule = Forgotten(TOKENIZER, how=Sampling(top_k=1, max_new_tokens=8))

    def finished(model, rows):
        asked.append(([r.uid for r in rows], rule.scores(model, rows)))
        return rule(model, rows)

    def resolve(p):
        inner_solve(model, p, 1e-4, 60)
        return {}

    settings = SolveSettings(method="identity", damping=0.1)
    outer = Outer(model, problem, J, J, settings, resolve)
    plan = Plan(4, 40.0, blocks=2, min_gain=-100, finished=finished, tolerance=math.inf)
    found = bilevel(outer, plan)
    first, scores = asked[0]
    gone = [uid for uid, s in zip(first, scores.tolist(), strict=True) if s < 0.3]
    assert gone and found.rounds[1]["left"] == len(gone), (first, scores)
    assert all(uid not in uids for uids, _ in asked[1:] for uid in gone), "gone for good"
