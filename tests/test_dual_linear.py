"""What is special about dual linear layers: how many products, what is kept, the Gauss-Newton half,
peft's layers, and rotary embeddings, which need no kernel."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import direction, make, two_batches
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

import u2a_kernels as kernels
from u2a.dual import dual
from u2a.products import hvp, jvp_scores
from u2a_kernels.ops import dual_linear, dual_lora_linear
from u2a_kernels.testing import randn

T, D_IN, D_OUT, RANK = 24, 40, 56, 2
UNIT = 2 * T * D_IN * D_OUT
SKINNY = 2 * T * RANK


class Products(TorchDispatchMode):
    """Operations of all matrix products."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[1].split(".")[0] in ("mm", "addmm", "addmm_"):
            (m, k), n = args[-2].shape, args[-1].shape[1]
            self.operations += 2 * m * k * n
        return func(*args, **(kwargs or {}))


def products(call):
    with Products() as counted:
        call()
    return counted.operations


def test_a_full_layer_takes_eight_units():
    """Three forward; x takes three, W two: W's primal gradient, a ninth, is never formed."""
    x, w, w_t, g = (
        randn(*s, seed=1) for s in ((2 * T, D_IN), (D_OUT, D_IN), (D_OUT, D_IN), (2 * T, D_OUT))
    )
    assert products(lambda: dual_linear.forward(x, w, w_t, None, None, "hvp")) == 3 * UNIT
    assert products(lambda: dual_linear.backward(g, x, w, w_t, "hvp", True, False)) == 5 * UNIT
    assert products(lambda: dual_linear.backward(g, None, w, None, "hvp", True, False)) == 2 * UNIT
    half = x[:T]
    assert products(lambda: dual_linear.backward(g, half, w, w_t, "ggn", True, False)) == 2 * UNIT


def lora_tensors(dtype=torch.float32):
    shapes = (
        (2 * T, D_IN),
        (D_OUT, D_IN),
        (RANK, D_IN),
        (D_OUT, RANK),
        (RANK, D_IN),
        (D_OUT, RANK),
    )
    return [randn(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def test_a_lora_layer_takes_four_units():
    """Two forward and two backward with W; W_t = B_t A + B A_t is nowhere, all else is skinny."""
    x, w, *factors = lora_tensors()
    g = randn(2 * T, D_OUT, seed=9)
    _, u = dual_lora_linear.forward(x, w, *factors, None, 1.0, "hvp")
    forward = products(lambda: dual_lora_linear.forward(x, w, *factors, None, 1.0, "hvp"))
    assert forward == 2 * UNIT + 3 * SKINNY * (D_IN + D_OUT)
    backward = products(lambda: dual_lora_linear.backward(g, x, u, w, *factors, 1.0, "hvp", True))
    assert backward == 2 * UNIT + 5 * SKINNY * (D_IN + D_OUT)


@pytest.mark.parametrize(
    "trained, kept", [("ab", {"x", "u"}), ("b", {"u"}), ("a", {"x"}), ("", set())]
)
def test_what_a_lora_layer_keeps(trained, kept):
    x, w, a, b, a_t, b_t = lora_tensors()
    x.requires_grad_()
    a.requires_grad_("a" in trained)
    b.requires_grad_("b" in trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.dual_lora_linear(x, w, a, b, a_t, b_t)
    found = {"x"} if any(t is x or t.data_ptr() == x.data_ptr() for t in saved) else set()
    found |= {"u"} if any(t.shape == (2 * T, RANK) for t in saved) else set()
    assert found == kept


def test_lora_ggn_is_the_plain_backward_of_the_primal_half():
    x, w, a, b, a_t, b_t = lora_tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    g = randn(2 * T, D_OUT, seed=9, dtype=torch.float64)
    y = kernels.dual_lora_linear(x, w, a, b, a_t, b_t, scale=1.5, mode="ggn")
    got = torch.autograd.grad(y, leaves, g)
    primal = F.linear(x[:T], w) + 1.5 * F.linear(F.linear(x[:T], a), b)
    want = torch.autograd.grad(primal, leaves, g[:T])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):
    """How often each of our ops is called."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "u2a":
            self.count[func.name().removeprefix("u2a::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family, layers", [("llama", 10), ("gpt2", 4), ("phi3", 6)])
def test_peft_layers_are_one_op(family, layers):
    model, batch = make(family, lora=True), two_batches()[0]
    with Calls() as calls, dual(model, direction(model, 1), "jvp") as run, torch.no_grad():
        run(batch.ids)
    assert calls.count["dual_lora_linear"] == layers


def adapters(dtype):
    model = make("llama", dtype=dtype)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config), two_batches()[0]


def test_an_adapter_switched_off_inside_the_context_is_off():
    model, batch = adapters(torch.float64)
    with torch.no_grad(), dual(model, {}, "jvp") as run:
        on = run(batch.ids)
        with model.disable_adapter(), Calls() as calls:
            off = run(batch.ids)
        for name, p in model.named_parameters():
            p.mul_("lora_B" not in name)
        want = run(batch.ids)
    assert not calls.count["dual_lora_linear"]
    assert torch.allclose(off, want, rtol=1e-12) and not torch.allclose(on[:3], off[:3])


def test_factors_wider_than_the_base_keep_their_type():
    """peft holds factors in float32 beside a bfloat16 base; their products stay in float32."""
    model, batch = adapters(torch.bfloat16)
    assert (
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.dtype
        == torch.float32
    )
    v = direction(model, 1)
    with Calls() as calls:
        scores = jvp_scores(model, [batch], lambda lp: -lp.mean(), v)
    assert torch.isfinite(scores).all() and not calls.count["dual_lora_linear"]


def test_a_trained_base_under_an_adapter():
    """Base weights with a direction take an op for each factor, with the same product."""
    model, batch = adapters(torch.float64)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    base = dict(model.named_parameters())[name].requires_grad_()
    v = direction(model, 1)
    assert name in v
    v[name].zero_()
    among = hvp(model, [batch], lambda lp: -lp.mean(), v)
    base.requires_grad_(False)
    del v[name]
    alone = hvp(model, [batch], lambda lp: -lp.mean(), v)
    for key, value in alone.items():
        torch.testing.assert_close(among[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("module, size", [(modeling_llama, 8), (modeling_gpt_neox, 4)])
def test_rotary_embeddings_take_both_halves_as_they_are(module, size):
    """Linear in q and k, so [q; q_t] through transformers' own code is value and tangent."""
    q, k = (randn(6, 2, 5, 8, seed=s, dtype=torch.float64) for s in (1, 2))
    cos, sin = (randn(1, 5, size, seed=s, dtype=torch.float64) for s in (3, 4))
    rotate = module.apply_rotary_pos_emb
    (q0, q1), (k0, k1) = q.chunk(2), k.chunk(2)
    values, tangents = torch.func.jvp(lambda q, k: rotate(q, k, cos, sin), (q0, k0), (q1, k1))
    for got, value, tangent in zip(rotate(q, k, cos, sin), values, tangents, strict=True):
        torch.testing.assert_close(got, torch.cat([value, tangent]), rtol=1e-14, atol=1e-14)
