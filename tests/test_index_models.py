"""Features of the index against one ordinary backward per example, for every supported family.

`Full` features are the gradients themselves, so equality covers every tap: linear layers, Conv1D,
biases, embeddings, norms, fused experts, routers, heads, tied weights and LoRA.
"""

from contextlib import nullcontext

import pytest
import tiny_index
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from u2a.index import Full, features, tokens

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
# Hugging Face's routers, and Gemma 2's capped attention, take their softmax in float32
BOUND = dict.fromkeys(tiny_index.FAMILIES, 1e-12) | dict.fromkeys((*MOE, "gemma2"), 1e-6)


def nll(lp):
    return -lp.mean() * 1.7


def exact_norms(model):
    """Their RMSNorm goes through float32, which would hide errors below 1e-7."""
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            shift = 1.0 if type(m).__name__.startswith("Gemma") else 0.0
            eps = getattr(m, "variance_epsilon", None) or m.eps
            m.forward = lambda x, m=m, shift=shift, eps=eps: (
                F.rms_norm(x, x.shape[-1:], None, eps) * (m.weight + shift)
            )
    return model


def flat(model, grads):
    """Gradients `[n, P]` in the order of the parameters, weights as nn.Linear keeps them."""
    turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    named = dict(model.named_parameters())
    parts = [g.mT if id(named[n]) in turned else g for n, g in grads.items()]
    return torch.cat([p.flatten(1) for p in parts], 1)


def compare(model, data, bound):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    want = flat(model, tiny_index.oracle(model, data, nll))
    implementation = base.config._attn_implementation
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    got = features(model, data, nll, Full())
    assert got.dtype == torch.float64 and got.shape == want.shape
    scale = want.abs().amax(0)
    assert (scale > 0).sum() > 0.5 * len(scale), "most parameters must matter"
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= bound
    assert base.config._attn_implementation == implementation
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", tiny_index.FAMILIES)
def test_every_parameter_of_every_family(family):
    model = exact_norms(tiny_index.make(family))
    if family in MOE:
        model.config._experts_implementation = "eager"  # the others have no float64
    compare(model, tiny_index.rows(), BOUND[family])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_lora(family):
    model = exact_norms(tiny_index.make(family, lora=True))
    model.get_base_model().config._experts_implementation = "eager"
    compare(model, tiny_index.rows(), BOUND[family])


def test_rows_of_one_length_need_no_padding():
    model = exact_norms(tiny_index.make("llama"))
    compare(model, tiny_index.rows(((2, 3), (1, 4), (4, 1))), 1e-12)


class UnfusedExperts(nn.Module):
    """Experts as a list of MLPs, called one by one on their tokens."""

    def __init__(self, hidden, inner, count):
        super().__init__()
        mlp = lambda: nn.Sequential(nn.Linear(hidden, inner), nn.SiLU(), nn.Linear(inner, hidden))  # noqa: E731
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(mlp() for _ in range(count))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = torch.softmax(self.gate(flat), -1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(chosen == e)
            with tokens(token):
                y = expert(flat[token]) * weight[token, place, None]
            out = out.index_add(0, token, y)
        return out.view(x.shape)


@pytest.mark.parametrize("announced", [True, False])
def test_unfused_experts(announced, monkeypatch):
    model = exact_norms(tiny_index.make("llama"))
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = UnfusedExperts(16, 8, 5).double()
    if announced:
        return compare(model, tiny_index.rows(), 1e-12)
    monkeypatch.setattr(f"{__name__}.tokens", lambda token: nullcontext())
    with pytest.raises(RuntimeError, match=r"Linear ran on \d+ rows where \d+ tokens are known"):
        features(model, tiny_index.rows(), nll, Full())
