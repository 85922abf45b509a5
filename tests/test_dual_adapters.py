"""peft LoRA on any target, embeddings and head included, against float64 double backward through
peft's own modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_products import REF, WEIGHTS, nll, npo, oracle_ggnvp, oracle_gradient, oracle_hvp
from tiny_models import direction, make, plain, relative, two_batches
from torch import nn

from u2a.dual import dual
from u2a.dual_modules import UnsupportedModel
from u2a.index import Sketch, hvp_features
from u2a.index.engine import capture
from u2a.linearize import linearize
from u2a.per_example import per_example_curvature
from u2a.products import ggnvp, gradient, hvp, jvp_scores
from u2a.tree import dot, norm

TIGHT = 1e-8
HEADED = {  # family, targets, options of LoraConfig
    "llama, everything": ("llama", ["embed_tokens", "q_proj", "down_proj", "lm_head"], {}),
    "llama, rslora": ("llama", ["embed_tokens", "v_proj"], dict(use_rslora=True)),
    "llama, head alone": ("llama", ["lm_head"], dict(use_rslora=True)),
    "llama tied, padding": ("llama-tied", ["embed_tokens", "o_proj"], {}),
    "llama, bias": ("llama", ["q_proj", "up_proj"], dict(lora_bias=True)),
    "gpt2, positions": ("gpt2", ["wpe", "wte", "c_attn"], dict(fan_in_fan_out=True)),
    "gemma3, scaled": ("gemma3", ["embed_tokens", "gate_proj", "lm_head"], {}),
    "gemma2, capped head": ("gemma2", ["k_proj", "lm_head"], {}),
    "phi, head with a bias": ("phi", ["dense", "lm_head"], {}),
    "opt": ("opt", ["embed_tokens", "project_in", "fc2", "lm_head"], {}),
    "qwen2_moe": ("qwen2_moe", "all-linear", {}),
}


def adapted(name, dtype=torch.float64):
    family, targets, options = HEADED[name]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(make(family), config).to(dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n:
                p.copy_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("name", HEADED)
def test_products_equal_double_backward(name):
    model, batches = adapted(name), two_batches()
    u, v = direction(model, 1), direction(model, 2)
    each = torch.full((5,), 0.2, dtype=torch.float64)
    for loss, w in ((nll, None), (npo, WEIGHTS)):
        args, weights = (model, batches, loss), each if w is None else w
        with plain(model):
            g = gradient(*args, weights=w, ref=REF)
        assert relative(g, oracle_gradient(*args, weights)) < TIGHT
        options = dict(weights=w, ref=REF)
        h, c = hvp(*args, v, **options), ggnvp(*args, v, **options)
        assert relative(h, oracle_hvp(*args, v, weights)) < TIGHT and norm(h) > 1e-2
        assert relative(c, oracle_ggnvp(*args, v, weights)) < TIGHT
        for f, product in ((hvp, h), (ggnvp, c)):
            other = f(*args, u, **options)
            assert abs(dot(u, product) - dot(v, other)) < 1e-9 * norm(u) * norm(product)
        one = torch.eye(5, dtype=torch.float64)
        want = torch.stack([dot(oracle_gradient(*args, one[i]), v) for i in range(5)])
        assert (jvp_scores(*args, v, ref=REF) - want).norm() < TIGHT * want.norm()


@pytest.mark.parametrize("name", [n for n in HEADED if "lm_head" not in HEADED[n][1]])
def test_linearized_products_equal_the_stacked_ones(name):
    model, batches = adapted(name), two_batches()
    vs = [direction(model, s) for s in (1, 2)]
    for mode, stacked in (("ggn", ggnvp), ("hvp", hvp)):
        lin = linearize(model, batches, npo, ref=REF, mode=mode)
        for got, v in zip(lin.matmat(vs), vs, strict=True):
            assert relative(got, stacked(model, batches, npo, v, ref=REF)) < 1e-12
    got = per_example_curvature(model, batches, npo, vs[0], "hessian", ref=REF)
    one = torch.eye(5, dtype=torch.float64)
    each = [hvp(model, batches, npo, vs[0], weights=one[i], ref=REF) for i in range(5)]
    want = torch.stack([dot(vs[0], h) for h in each])
    assert (got - want).norm() < 1e-10 * want.norm()


def test_a_call_of_the_whole_model_and_disabled_adapters():
    model, batch = adapted("llama, everything"), two_batches()[0]
    v = direction(model, 1)
    with torch.no_grad(), dual(model, v, "jvp"):
        z, z_t = model(input_ids=batch.ids).logits.chunk(2)
    with plain(model), torch.no_grad():
        ahead, back = [], []
        for step, found in ((1e-6, ahead), (-1e-6, back)):
            for n, p in model.named_parameters():
                if n in v:
                    p.add_(v[n], alpha=step)
            found.append(model(input_ids=batch.ids, use_cache=False).logits)
            for n, p in model.named_parameters():
                if n in v:
                    p.sub_(v[n], alpha=step)
        slope = (ahead[0] - back[0]) / 2e-6
        right = model(input_ids=batch.ids, use_cache=False).logits
    torch.testing.assert_close(z, right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z_t, slope, rtol=1e-6, atol=1e-6)
    with model.disable_adapter():
        still = jvp_scores(model, batch, nll, v)
    assert torch.equal(still, torch.zeros_like(still))


def test_half_precision_base_with_adapters_in_float32():
    """peft keeps the factors in float32 beside a bfloat16 base."""
    exact, batches = adapted("llama, everything"), two_batches()
    model = adapted("llama, everything")
    for n, p in model.named_parameters():
        p.data = p.data.float() if "lora" in n else p.data.bfloat16()
    for p, q in zip(exact.parameters(), model.parameters(), strict=True):
        p.data = q.data.double()
    v = direction(model, 1)
    wide = {n: t.double() for n, t in v.items()}
    for f in (hvp, ggnvp):
        got, want = f(model, batches, nll, v), f(exact, batches, nll, wide)
        off = {n: t.double() - want[n] for n, t in got.items()}
        assert norm(off) < 0.05 * norm(want)


def test_what_a_head_with_lora_is_not_for():
    model, batches = adapted("llama, head alone"), two_batches()
    with pytest.raises(UnsupportedModel, match="LoRA on the output head"):
        linearize(model, batches, nll)
    with pytest.raises(UnsupportedModel, match="output head .*lora.layer.Linear"):
        with capture(model, Sketch(16)):
            pass
    dora = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UnsupportedModel, match="output head with a LoRA variant"):
        gradient(dora, batches, nll)
    biased = LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True, bias="none")
    base = make("llama")
    base.lm_head.bias = nn.Parameter(torch.zeros(29, dtype=torch.float64))
    with pytest.raises(UnsupportedModel, match="bias in its adapter"):
        gradient(get_peft_model(base, biased), batches, nll)


def test_features_refuse_lora_on_an_embedding_by_name():
    model, batches = adapted("llama, rslora"), two_batches()
    with pytest.raises(UnsupportedModel, match="embed_tokens"):
        with capture(model, Sketch(16)):
            pass
    with pytest.raises(UnsupportedModel, match="embedding"):
        hvp_features(model, batches, nll, direction(model, 1), Sketch(16))
