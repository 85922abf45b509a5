"""Double backward and torch.func through whole Hugging Face models with attention "u2a_compat"."""

import pytest
import torch
from tiny_models import direction, make, relative, two_batches
from torch.func import functional_call, grad, jvp

import u2a.compat
from u2a.products import hvp
from u2a.tree import trainable

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "gpt_neox", "qwen3"]
# Their RMSNorm goes through float32.
BOUND = dict.fromkeys(FAMILIES, 1e-5) | {"gpt2": 1e-10, "gpt_neox": 1e-10}


def loss_of(model, batch):
    def loss(params):
        z = functional_call(model, params, (batch.ids,), dict(use_cache=False)).logits
        row, t = batch.answer.nonzero(as_tuple=True)
        logp = torch.log_softmax(z[row, t - 1], -1).gather(1, batch.ids[row, t, None])[:, 0]
        return -(logp / batch.answer.sum(1)[row]).sum() / len(batch)

    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_three_ways_to_a_hessian_product(family):
    model, batch = make(family), two_batches()[0]
    params, v = trainable(model), direction(model, 1)
    want = hvp(model, batch, lambda lp: -lp.mean(), v)
    model.set_attn_implementation(u2a.compat.NAME)
    loss, leaves = loss_of(model, batch), list(params.values())
    first = torch.autograd.grad(loss(params), leaves, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(first, v.values(), strict=True))
    twice = dict(zip(params, torch.autograd.grad(along, leaves), strict=True))
    assert relative(twice, want) < BOUND[family]
    still = {n: p.detach() for n, p in params.items()}
    assert relative(jvp(grad(loss), (still,), (v,))[1], want) < BOUND[family]


def test_no_scores_are_kept():
    model, kept = make("gpt2"), []
    ids = torch.randint(29, (1, 32))
    model.set_attn_implementation(u2a.compat.NAME)
    heads, t = model.config.n_head, ids.shape[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        total = model(input_ids=ids, use_cache=False).logits.square().sum()
        torch.autograd.grad(total, list(model.parameters()), create_graph=True)
    assert (1, heads, t, t) not in kept and (1, heads, t, 4) in kept


def test_masks_that_matter_are_refused():
    model, ids = make("llama"), torch.arange(8).view(2, 4)
    model.set_attn_implementation(u2a.compat.NAME)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    right = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(right, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="padded on the right"):
        model(input_ids=ids, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="packed rows"):
        packed = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
        model(input_ids=ids, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match="is_causal must be as many keys"):
        cache = model(input_ids=ids).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache)
