"""Expected reward of drawn answers: signature, baseline, and the gradient on average."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make, rows

from u2a.adapter import adapter_disabled
from u2a.batch import collate
from u2a.generate import Sampling
from u2a.losses.fdpg import DIVERGENCES
from u2a.products import answer_logps
from u2a.rewards import Reward, ToTarget, rewards
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


def first_token(model, prompt):
    """Log-probabilities of the token after the prompt, with graph, float64."""
    return torch.log_softmax(model(input_ids=torch.tensor([prompt.prompt_ids])).logits[0, -1], -1)


def check_gradient(model, J, exact, worth):
    """That REINFORCE on one new token scatters about `exact` as E[(worth - mean) score] should."""
    p, n = first_token(model, J.prompts[0]).detach().exp(), J.how.samples
    params, got = list(trainable(model).values()), flatten(J.gradient(model))
    drawn, _ = J.draw(model)
    mean, spread = float((p * worth).sum()), 0.0
    for y in sorted({row.answer_ids[0] for row in drawn}):
        row = next(d for d in drawn if d.answer_ids[0] == y)
        lp = answer_logps(model, collate([row])).sequence().sum()
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(lp, params)])
        spread = spread + float(p[y]) * ((float(worth[y]) - mean) * grad - exact) ** 2
    z = (got - exact) / (spread / n).sqrt().clamp_min(1e-12)
    assert z.square().mean() < 4 and got @ exact > 0.9 * got.norm() * exact.norm()


def flat_gradient(model, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, trainable(model).values())])


def test_gradient_is_that_of_the_exact_expectation(model):
    """One new token, so that E r = sum_y pi(y) r(y) can be summed over the vocabulary."""
    how = Sampling(samples=2000, max_new_tokens=1, batch=2000, seed=3)
    J = Reward(rows()[:1], TOKENIZER, even, how, batch_tokens=20000)
    p = first_token(model, J.prompts[0]).exp()
    worth = (torch.arange(len(p)) % 2 == 0).double()
    exact = flat_gradient(model, (p * worth).sum())
    assert J.value(model) == pytest.approx(float((p * worth).sum()), abs=4 * 0.5 / 2000**0.5)
    check_gradient(model, J, exact, worth)


@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_distance_to_a_target_and_its_gradient_are_exact_on_average(model, divergence):
    how = Sampling(samples=4000, max_new_tokens=1, batch=4000, seed=3)
    J = ToTarget(
        rows()[:1], TOKENIZER, even, how, 40000, divergence=divergence, beta=0.5
    )  # fmt: skip
    lp = first_token(model, J.prompts[0])
    with adapter_disabled(model), torch.no_grad():
        base = first_token(model, J.prompts[0])
    worth = (torch.arange(len(lp)) % 2 == 0).double()
    target = torch.log_softmax(base + worth / 0.5, -1)
    f, u = DIVERGENCES[divergence], lp - target
    exact = -(lp.exp() * f.ratio(u)).sum()
    terms = f.ratio(u).detach()
    spread = float(((lp.exp() * terms**2).sum() - exact**2).clamp_min(0)) ** 0.5
    assert J.value(model) == pytest.approx(float(exact), abs=5 * (spread + 0.5) / 4000**0.5)
    check_gradient(model, J, flat_gradient(model, exact), -f.slope(u).detach())


def test_a_binary_target_forbids(model):
    how = Sampling(samples=50, max_new_tokens=1, batch=50)
    J = ToTarget(rows()[:1], TOKENIZER, even, how, divergence="tv", target="binary")
    drawn, r = J.draw(model)
    allowed = torch.tensor([row.answer_ids[0] % 2 == 0 for row in drawn])
    assert bool(allowed.any()) and not bool(allowed.all())
    assert (r[~allowed] == -0.5).all() and (r[allowed] > r[~allowed].max()).all()
    with pytest.raises(ValueError, match="'rlhf' or 'binary', got 'gdc'"):
        ToTarget(rows()[:1], TOKENIZER, even, how, target="gdc")
    with pytest.raises(ValueError, match="divergence: wanted one of"):
        ToTarget(rows()[:1], TOKENIZER, even, how, divergence="kl")
