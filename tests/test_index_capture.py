"""The capture engine: batches, checkpointing, autocast, compile, refusals, kinds of features."""

from functools import partial

import pytest
import tiny_index
import torch
from tiny_models import checkpointed
from torch import nn

from u2a.batch import Pair, Row
from u2a.dual_modules import UnsupportedModel
from u2a.index import Full, Kronecker, Settings, Sketch, capture, features, pack, query
from u2a.index.engine import tapped
from u2a.index.spec import seed_of
from u2a.losses import dpo_objective
from u2a_kernels import rademacher

SPECS = [Full(), Kronecker(3, 2, seed=5), Sketch(64, seed=5)]
IDS = ["full", "kronecker", "sketch"]


def nll(lp):
    return -lp.mean()


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("family, bound", [("llama", 1e-6), ("gpt2", 1e-12), ("qwen3_moe", 1e-6)])
def test_alone_or_in_a_batch(family, bound, spec):
    """Batch mates and buckets change nothing (norms and routers of Llama, Qwen are in float32)."""
    model, data = tiny_index.make(family), tiny_index.rows()
    whole = features(model, data, nll, spec)
    assert (whole[:-1].abs().amax(1) > 0).all() and not whole[-1].any(), "the last has no answer"
    for i, row in enumerate(data[:-1]):
        assert relative(features(model, [row], nll, spec)[0], whole[i]) < bound
    split = features(model, data, nll, spec, settings=Settings(batch_tokens=10))
    assert relative(split, whole) < bound


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_checkpointing_counts_each_module_once(spec):
    model, data = tiny_index.make("llama"), tiny_index.rows()
    want = features(model, data, nll, spec)
    again = features(checkpointed(model), data, nll, spec)
    assert relative(again, want) < 1e-13


@pytest.mark.parametrize("spec", SPECS[1:], ids=IDS[1:])
def test_compiled_backbone(spec, monkeypatch):
    """One graph, no break: the taps are ordinary operations. aot_eager: inductor takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, data = tiny_index.make("llama", torch.float32), tiny_index.rows()
    model.model.layers = model.model.layers[:1]
    want = features(model, data, nll, spec, settings=Settings(batch_tokens=20))
    got = features(model, data, nll, spec, settings=Settings(batch_tokens=20, compile=True))
    assert relative(got, want) < 1e-5


def test_bf16_autocast_is_as_close_as_autograd_itself():
    """Against float64, at most twice as far off as ordinary gradients under the same autocast."""
    data = tiny_index.rows()
    exact = tiny_index.oracle(tiny_index.make("llama"), data, nll)
    model = tiny_index.make("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        own = tiny_index.oracle(model, data, nll)
    got = features(model, data, nll, Full(), settings=Settings(autocast=torch.bfloat16))
    want = torch.cat([g.flatten(1) for g in exact.values()], 1)
    torchs = torch.cat([g.flatten(1) for g in own.values()], 1)
    assert got.dtype == torch.float32
    assert (got - want).norm() < 2 * (torchs - want).norm()


def test_sketch_is_that_of_the_gradients():
    """Inner products of sketches against those of the full gradients, over many seeds."""
    model, data = tiny_index.make("mixtral"), tiny_index.rows()[:4]
    full = features(model, data, nll, Full())
    want = full @ full.T
    k, seeds = 64, 60
    got = torch.stack(
        [s @ s.T for s in (features(model, data, nll, Sketch(k, i)) for i in range(seeds))]
    )
    length = want.diagonal().sqrt()
    error = (got.mean(0) - want) / (length[:, None] * length)
    spread = (2 / k / seeds) ** 0.5
    assert error.abs().max() < 4.5 * spread
    single = ((got - want) / (length[:, None] * length)).square().mean((0, 1, 2))
    assert 0.5 / k < single < 3 / k


def test_kronecker_is_that_of_the_gradients():
    model, data = tiny_index.make("qwen2"), tiny_index.rows()
    spec = Kronecker(3, 2, seed=5)
    want = tiny_index.oracle(model, data, nll)
    with capture(model, spec) as run:
        got = run.features(pack(data), nll)
        layout = run.layout
    for name, p in model.named_parameters():
        start, stop = layout[name]
        seed = seed_of(5, name)
        p_out = rademacher(2, p.shape[0], seed, "out", dtype=p.dtype)
        expect = want[name] @ p_out.T if p.ndim == 1 else p_out @ want[name]
        if p.ndim == 2:
            expect = expect @ rademacher(3, p.shape[1], seed, "in", dtype=p.dtype).T
        assert relative(got[:, start:stop], expect.flatten(1)) < 1e-6, name


def test_query_is_the_gradient_of_the_objective():
    model, data = tiny_index.make("llama", lora=True), tiny_index.rows()
    pairs = [Pair(str(i), data[i], data[i + 1]) for i in (0, 2, 3)]
    ref = torch.randn(6, dtype=torch.float64)
    got = query(model, pairs, dpo_objective, Full(), ref=ref, batch_tokens=24)
    with capture(model, Full()) as run:
        both = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        once = run.features(pack(both), dpo_objective, ref).sum(0)
    assert got.norm() > 0.01 and relative(got, once) < 1e-6
    with pytest.raises(ValueError, match="at least one Pair"):
        query(model, [], dpo_objective, Full())


def test_no_weight_gradient_and_no_input_of_a_linear_layer_is_kept():
    model = tiny_index.make("llama", torch.float32)
    with capture(model, Kronecker(2, 2)) as run:
        held = []
        pack_hook = lambda t: held.append(tuple(t.shape)) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
            run.features(pack(tiny_index.rows()), nll)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    tokens, wide = sum(map(len, tiny_index.rows())), model.config.intermediate_size
    assert (tokens, 2) in held, "the rule keeps projections [N, 2] of the inputs"
    assert held.count((1, tokens, wide)) == 3 * 2, "SiLU and the product of gate and up, per layer"
    assert (tokens, wide) not in held


def test_unknown_module_is_named_unless_excluded():
    class Odd(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gain = inner, nn.Parameter(torch.ones(16, dtype=torch.float64))

        def forward(self, x):
            return self.inner(x) * self.gain

    model = tiny_index.make("llama")
    model.model.norm = Odd(model.model.norm)
    with pytest.raises(UnsupportedModel, match=r"model\.norm .*Odd.*'gain'"):
        features(model, tiny_index.rows(), nll, Full())
    left = features(model, tiny_index.rows(), nll, Full(), exclude=["*.gain"])
    assert left.shape[1] == sum(p.numel() for p in model.parameters()) - 16


def test_refusals():
    data = tiny_index.rows()
    model = tiny_index.make("llama")
    with pytest.raises(ValueError, match="no parameter with requires_grad left"):
        features(model, data, nll, Full(), exclude=["*"])
    with pytest.raises(ValueError, match="at least one row"):
        features(model, [], nll, Full())
    with pytest.raises(ValueError, match=r"loss must return \[B\] = \[6\]"):
        features(model, data, lambda lp: lp.logp.sum(), Full())
    with pytest.raises(ValueError, match="at least one token"):
        pack([Row("a", (), (), "file:3")])
    with pytest.raises(UnsupportedModel, match="not a known causal LM"):
        features(nn.Sequential(nn.Linear(2, 2)), data, nll, Full())


def test_the_models_own_hooks_still_run():
    model, data = tiny_index.make("llama"), tiny_index.rows()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, out: 2 * out)
    want = torch.cat([g.flatten(1) for g in tiny_index.oracle(model, data, nll).values()], 1)
    assert relative(features(model, data, nll, Full()), want) < 1e-6


def test_a_parameter_without_part_in_the_forward_is_named():
    model = tiny_index.make("llama")
    model.model.layers[1].self_attn.extra = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match="extra.weight: took no part"):
        features(model, tiny_index.rows(), nll, Full())


def test_dropout_in_training_mode_is_refused():
    model = tiny_index.make("gpt2").train()
    model.transformer.drop.p = 0.1
    with pytest.raises(UnsupportedModel, match="dropout p=0.1 in training mode"):
        features(model, tiny_index.rows(), nll, Full())


@pytest.mark.parametrize("flat", [False, True], ids=["Conv2d", "Conv1d"])
def test_convolution(flat):
    """A small image model: the batch holds an example a row."""
    torch.manual_seed(0)
    kind, size = (nn.Conv1d, (5, 3, 11)) if flat else (nn.Conv2d, (5, 3, 11, 7))
    conv = kind(3, 4, 3, stride=2, padding=1, dilation=2).double()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2, dtype=torch.float64))
    x = torch.randn(size, dtype=torch.float64)
    model(x)
    with tapped(model, Full()) as (site, names):
        site.offsets, site.owner = torch.arange(6, dtype=torch.int32), torch.arange(5)
        site.slots = {
            i: torch.zeros(5, *site.rules[i].shape, dtype=torch.float64, requires_grad=True)
            for i in names
        }
        total = (model(x) ** 2).sum()
        got = torch.autograd.grad(total, list(site.slots.values()))
    params = list(model.parameters())
    for b in range(5):
        want = torch.autograd.grad((model(x[b : b + 1]) ** 2).sum(), params)
        for g, w in zip(got, want, strict=True):
            assert relative(g[b].flatten(), w.flatten()) < 1e-12
