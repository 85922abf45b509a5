"""The dual context: what it refuses and by which name, and that it leaves nothing behind."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE, checkpointed, direction, make, two_batches
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from u2a.dual import UnsupportedModel, dual
from u2a.dual_mlp import activation
from u2a.products import answer_logps, hvp, jvp_scores


def nll(lp):
    return -lp.mean()


def snapshot(model):
    """Instance attributes of every module and the attention the config names."""
    attributes = [(sorted(m.__dict__), id(m.__dict__.get("forward"))) for m in model.modules()]
    return attributes, model.config._attn_implementation


@pytest.mark.parametrize("family, lora", [("llama", True), ("gpt2", False), ("qwen3", False)])
def test_everything_is_restored_also_after_an_exception(family, lora):
    model, batch = make(family, lora), two_batches()[0]
    before, logits = snapshot(model), model(input_ids=batch.ids).logits
    with pytest.raises(KeyboardInterrupt):
        with dual(model, direction(model, 1)) as run:
            assert snapshot(model) != before
            assert run(batch.ids).shape == (6, batch.ids.shape[1], 16)
            raise KeyboardInterrupt
    assert snapshot(model) == before
    assert torch.equal(model(input_ids=batch.ids).logits, logits)
    with pytest.raises(ZeroDivisionError):
        hvp(model, batch, lambda lp: 1 / 0, direction(model, 1))
    assert snapshot(model) == before


def test_model_calls_inside_the_context_are_dual_too():
    model, batch = make("llama-tied"), two_batches()[0]
    v = direction(model, 1)
    with torch.no_grad():
        with dual(model, v, "jvp") as run:
            h = run(batch.ids)
            z = model(input_ids=batch.ids).logits
        head, head_t = model.lm_head.weight, v["model.embed_tokens.weight"]
    assert torch.allclose(z[:3], h[:3] @ head.T, rtol=1e-12)
    assert torch.allclose(z[3:], h[3:] @ head.T + h[:3] @ head_t.T, rtol=1e-12)


def test_a_call_of_a_model_that_caps_its_logits_is_refused_inside():
    model, batch = make("gemma2", lora=True), two_batches()[0]
    before = model(input_ids=batch.ids).logits
    assert before.abs().max() < 3.0
    with dual(model, {}):
        with pytest.raises(RuntimeError, match="Gemma2ForCausalLM caps its logits"):
            model(input_ids=batch.ids)
    assert torch.equal(model(input_ids=batch.ids).logits, before)


def test_relu_keeps_a_nan_and_has_no_slope_at_zero():
    off, nan = 0.0, float("nan")
    x = torch.tensor([[2.0, -2.0, off, nan], [5.0, 5.0, 5.0, 5.0]])
    got = activation(nn.ReLU(), None)["forward"](x)
    want = torch.tensor([[2.0, 0.0, 0.0, nan], [5.0, 0.0, 0.0, 5.0]])
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_contexts_do_not_nest_and_ordinary_passes_are_refused_inside():
    model, batch = make("llama"), two_batches()[0]
    with dual(model, {}):
        with pytest.raises(RuntimeError, match="do not nest"):
            with dual(model, {}):
                pass
        with pytest.raises(RuntimeError, match="inside u2a.dual"):
            answer_logps(model, batch)
    other = make("llama")
    with dual(model, {}), dual(other, {}):
        pass


def test_tangents_are_checked_by_name():
    model = make("llama-tied")
    good = direction(model, 1)
    weight = good["model.embed_tokens.weight"]

    def refuse(tangents, match, mode="hvp"):
        with pytest.raises(ValueError, match=match):
            with dual(model, tangents, mode):
                pass

    refuse({"model.norm.wieght": weight[0]}, r"nearest is 'model\.norm\.weight'")
    refuse({"model.norm.weight": weight}, r"\[16\] torch\.float64 on cpu, got \[29, 16\]")
    refuse({"model.norm.weight": weight[0].float()}, "float64 on cpu, got .* torch.float32")
    refuse({**good, "lm_head.weight": weight}, "twice, under tied names")
    refuse(good, "mode must be 'hvp', 'ggn' or 'jvp', got 'hpv'", "hpv")


def test_the_direction_of_a_tied_weight_applies_to_both_uses():
    model, batches = make("llama-tied"), two_batches()
    v = {"model.embed_tokens.weight": direction(model, 1)["model.embed_tokens.weight"]}
    alias = {"lm_head.weight": v["model.embed_tokens.weight"]}
    scores = [jvp_scores(model, batches, nll, t) for t in (v, alias)]
    assert torch.equal(*scores) and scores[0].abs().min() > 1e-3


class Gate(nn.Module):
    def forward(self, x):
        return x * x


class Linear(nn.Linear):
    """A torch name, a torch base, but not torch's class."""


def replaced(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module(model.get_submodule(path)))

    return change


def attribute(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def spoofed(model):
    layer = model.model.layers[0]
    fake = type("LlamaMLP", (Gate,), {"__module__": type(layer.mlp).__module__})
    layer.mlp = fake()


REFUSALS = {
    "custom module": (replaced("model.layers.1.mlp", lambda m: Gate()), "layers.1.mlp .*Gate"),
    "custom around": (
        replaced("model.layers.1.mlp", lambda m: nn.Sequential(m)),
        "layers.1.mlp .torch.nn.modules.container.Sequential",
    ),
    "subclass": (
        replaced("model.layers.0.self_attn.q_proj", lambda m: Linear(16, 16).double()),
        "layers.0.self_attn.q_proj .test_dual.Linear",
    ),
    "spoofed name": (spoofed, "layers.0.mlp .*LlamaMLP.* not in the table"),
    "activation": (
        replaced("model.layers.0.mlp.act_fn", lambda m: nn.Mish()),
        "layers.0.mlp .*activation .*Mish",
    ),
    "unlisted leaf": (
        replaced("model.norm", lambda m: nn.BatchNorm1d(16)),
        "model.norm .*BatchNorm",
    ),
    "not causal": (attribute("model.layers.0.self_attn", "is_causal", False), "not causal"),
    "softcap": (attribute("", "config.final_logit_softcapping", 30.0), "softcapping=30"),
    "hook": (
        lambda m: m.model.layers[0].register_forward_hook(lambda m, a, o: o * o),
        "layers.0 .*forward hook from test_dual",
    ),
    "own forward": (
        lambda m: setattr(m.model.norm, "forward", lambda x: x * x),
        "model.norm .*forward of its own",
    ),
    "own head": (
        replaced("lm_head", lambda m: Linear(16, 29, dtype=torch.float64)),
        "output head test_dual.Linear, wanted torch.nn.Linear",
    ),
    "embedding": (attribute("model.embed_tokens", "max_norm", 1.0), "embed_tokens .*max_norm"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_module(case):
    change, match = REFUSALS[case]
    model = make("llama")
    if case == "softcap":
        model.config.final_logit_softcapping = 30.0
    else:
        change(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=match):
        with dual(model, {}):
            pass
    with pytest.raises(UnsupportedModel):
        jvp_scores(model, two_batches(), nll, {})
    assert snapshot(model) == before


def test_all_faults_at_once():
    model = make("llama")
    model.model.layers[0].mlp, model.model.layers[1].self_attn = Gate(), Gate()
    with pytest.raises(UnsupportedModel) as error:
        with dual(model, {}):
            pass
    assert len(error.value.faults) == 2
    assert "layers.0.mlp" in str(error.value) and "layers.1.self_attn" in str(error.value)


def test_dropout_and_reentrant_checkpointing_are_refused_in_training_mode():
    model = make("gpt2")
    model.transformer.h[1].attn.attn_dropout.p = 0.1
    with dual(model, {}):
        pass
    model.train()
    with pytest.raises(UnsupportedModel, match=r"h\.1\.attn\.attn_dropout .*p=0\.1"):
        with dual(model, {}):
            pass
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.2)).train()
    with pytest.raises(UnsupportedModel, match=r"attention_dropout=0\.2"):
        with dual(model, {}):
            pass
    opt = make("opt")
    opt.model.decoder.layerdrop, opt.model.decoder.layers[1].dropout = 0.1, 0.2
    opt.model.decoder.layers[0].self_attn.dropout = 0.3
    with dual(opt, {}):
        pass
    with pytest.raises(UnsupportedModel) as error:
        with dual(opt.train(), {}):
            pass
    assert len(error.value.faults) == 3
    for fault in (r"decoder .*layerdrop=0\.1", r"layers\.1 .*dropout=0\.2", r"attn .*dropout=0\.3"):
        assert any(re.search(fault, f) for f in error.value.faults)
    with pytest.raises(UnsupportedModel, match="reentrant"):
        with dual(checkpointed(make("llama"), reentrant=True), {}):
            pass


def test_unknown_models_and_cross_attention_are_refused():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=29, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM is not a known causal LM"):
        answer_logps(bloom, two_batches()[0])
    gpt2 = make("gpt2")
    gpt2.transformer.h[0].attn.is_cross_attention = True
    with pytest.raises(UnsupportedModel, match="h.0.attn .*cross attention"):
        with dual(gpt2, {}):
            pass


def noisy(model):
    model.model.layers[0].mlp.jitter_noise = 0.1
    model.train()


EXPERT_REFUSALS = {
    "clip": ("olmoe", lambda m: setattr(m.config, "clip_qkv", 2.0), r"self_attn .*clip_qkv=2\.0"),
    "jitter": ("mixtral", noisy, r"layers\.0\.mlp .*jitter_noise=0\.1"),
    "parameters": (
        "qwen3_moe",
        attribute("model.layers.1.mlp.experts", "bias", nn.Parameter(torch.zeros(4))),
        r"layers\.1\.mlp\.experts .*parameters other than",
    ),
    "parallel": (
        "qwen2_moe",
        attribute("model.layers.0.mlp.experts", "_is_expert_parallel", True),
        r"layers\.0\.mlp\.experts .*spread over devices",
    ),
    "routing of its own": (
        "qwen3_moe",
        replaced("model.layers.1.mlp.gate", lambda m: nn.Linear(16, 4).double()),
        r"layers\.1\.mlp .*router torch.nn.modules.linear.Linear",
    ),
    "activation": (
        "qwen2_moe",
        replaced("model.layers.0.mlp.experts.act_fn", lambda m: nn.Mish()),
        r"layers\.0\.mlp\.experts .*activation .*Mish",
    ),
}


@pytest.mark.parametrize("case", EXPERT_REFUSALS)
def test_settings_of_experts_without_a_known_tangent(case):
    family, change, match = EXPERT_REFUSALS[case]
    model = make(family)
    change(model)
    with pytest.raises(UnsupportedModel, match=match):
        with dual(model, {}):
            pass


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(use_dora=True), "q_proj .*LoRA variant .*Dora"),
        (dict(modules_to_save=["lm_head"]), "output head .*ModulesToSaveWrapper"),
        (dict(modules_to_save=["norm"]), "model.norm .*ModulesToSaveWrapper"),
        (dict(use_dora=True, target_modules=["embed_tokens"]), "embed_tokens .*variant .*Dora"),
    ],
    ids=["dora", "saved head", "saved norm", "dora embedding"],
)
def test_adapters_that_are_not_plain_lora(options, match):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    model = get_peft_model(make("llama"), config)
    with pytest.raises(UnsupportedModel, match=match):
        with dual(model, {}):
            pass


def test_merged_adapters_dropout_and_two_adapters():
    model, batches = make("llama", lora=True), two_batches()
    v = direction(model, 1)
    want = jvp_scores(model, batches, nll, v)
    model.merge_adapter()
    with pytest.raises(UnsupportedModel, match="q_proj .*merged adapters .'default'."):
        with dual(model, v):
            pass
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    model.eval()
    assert torch.allclose(jvp_scores(model, batches, nll, v), want, rtol=1e-9)
    with pytest.raises(UnsupportedModel, match=r"lora_dropout.other .*p=0\.5"):
        with dual(model.train(), v):
            pass


def test_masks_and_packed_positions_are_refused():
    model, ids = make("llama"), two_batches()[0].ids
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])[:, : ids.shape[1]]
    for extra in (
        dict(attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)),
        dict(position_ids=packed),
    ):
        with dual(model, {}), pytest.raises(ValueError, match="right-padded input_ids only"):
            model.base_model(input_ids=ids, use_cache=False, **extra)
    model.config._attn_implementation = "u2a_dual"
    with pytest.raises(RuntimeError, match="only inside u2a.dual"):
        model(input_ids=ids)
