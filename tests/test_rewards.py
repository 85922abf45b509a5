"""Expected reward of drawn answers: signature, baseline, and the gradient on average."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make, rows

from u2a.generate import Sampling
from u2a.products import answer_logps
from u2a.rewards import Reward, rewards
from u2a.tree import flatten, trainable

EOS = 1


class Tokenizer(SimpleNamespace):
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(i) for i in ids if i != EOS)


TOKENIZER = Tokenizer(eos_token_id=EOS, pad_token_id=0)


def even(prompts, completions, completion_ids, **columns):
    assert len(prompts) == len(completions) == len(completion_ids)
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


@pytest.fixture(scope="module")
def model():
    found = make("gpt2", lora=True).eval()
    for name, p in found.named_parameters():
        p.requires_grad_("h.1" in name and "lora" in name)
    return found


def test_rewards_have_the_signature_of_trl():
    data, seen = rows()[:2], {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, **columns)
        return [1, None]

    data[0].meta["topic"] = data[1].meta["topic"] = "x"
    data[0].meta["only here"] = 1
    assert rewards(data, TOKENIZER, reward).tolist() == [1.0, 0.0]
    assert seen["ids"] == [list(r.answer_ids) for r in data] and seen["topic"] == ["x", "x"]
    assert seen["prompts"][0] == " ".join(map(str, data[0].prompt_ids)) and "only here" not in seen
    with pytest.raises(ValueError, match="one value per completion, 2; got 1"):
        rewards(data, TOKENIZER, lambda **_: [1.0])
    with pytest.raises(ValueError, match=f"not finite for 1 completions, first {data[1].uid}"):
        rewards(data, TOKENIZER, lambda **_: [1.0, math.nan])


def test_advantages_leave_their_own_answer_out():
    J = Reward(rows(), TOKENIZER, even, Sampling(samples=3))
    r = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert J.advantages(r).tolist() == [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    with pytest.raises(ValueError, match="samples must be at least 2"):
        Reward(rows(), TOKENIZER, even, Sampling(samples=1))
    with pytest.raises(ValueError, match="no Hessian product"):
        J.hvp(None, {})


def test_value_repeats_and_leaves_the_random_state_alone(model):
    J = Reward(rows()[:2], TOKENIZER, even, Sampling(samples=4, max_new_tokens=2, seed=5))
    state = torch.random.get_rng_state()
    assert J.value(model) == J.value(model) == float(J.draw(model)[1].mean())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradient_is_that_of_the_exact_expectation(model):
    """One new token, so that E r = sum_y pi(y) r(y) can be summed over the vocabulary."""
    prompt = rows()[:1]
    how = Sampling(samples=2000, max_new_tokens=1, batch=2000, seed=3)
    J = Reward(prompt, TOKENIZER, even, how, batch_tokens=20000)
    params = list(trainable(model).values())
    ids = torch.tensor([prompt[0].prompt_ids])
    p = torch.softmax(model(input_ids=ids).logits[0, -1].double(), -1)
    worth = (torch.arange(len(p)) % 2 == 0).double()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad((p * worth).sum(), params)])
    assert J.value(model) == pytest.approx(float((p * worth).sum()), abs=4 * 0.5 / 2000**0.5)
    got = flatten(J.gradient(model))
    drawn, r = J.draw(model)
    scores = []  # of every token: its gradient times its advantage, for the standard error
    for y in sorted({row.answer_ids[0] for row in drawn}):
        row = next(d for d in drawn if d.answer_ids[0] == y)
        from u2a.batch import collate

        lp = answer_logps(model, collate([row])).sequence().sum()
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(lp, params)])
        scores.append((float(p[y]), grad, float(worth[y])))
    mean = sum(q * w for q, _, w in scores)
    spread = sum(q * ((w - mean) * g - exact) ** 2 for q, g, w in scores)
    error = (spread / how.samples).sqrt()
    z = (got - exact) / error.clamp_min(1e-12)
    assert z.square().mean() < 4 and got @ exact > 0.9 * got.norm() * exact.norm()
