"""torch.compile of the backbone: the same products, whole graphs, used again by later contexts."""

import pytest
import torch
from tiny_models import direction, make, relative, two_batches
from torch import nn
from torch._dynamo.utils import counters

from u2a.dual import dual, parts
from u2a.linearize import linearize
from u2a.products import ggnvp, gradient, hvp, jvp_scores


def nll(lp):
    return -lp.mean()


def shallow(family, lora=False):
    """One layer and one batch: a graph costs seconds."""
    model, (batch, _) = make(family, lora), two_batches()
    backbone = parts(model)[0]
    del next(m for m in backbone.modules() if isinstance(m, nn.ModuleList))[1:]
    backbone.config.num_hidden_layers = 1
    return model, backbone, batch


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """Graphs made since the last call."""
    assert not counters["graph_break"]
    made = counters["stats"]["unique_graphs"]
    counters.clear()
    return made


def tree(f, *args):
    found = f(*args)
    return found if isinstance(found, dict) else {"scores": found}


@pytest.mark.parametrize(
    "family, lora, products",
    [
        ("llama", False, (hvp, ggnvp, jvp_scores)),
        ("gpt2", False, (hvp, jvp_scores)),
        ("gemma2", True, (hvp, ggnvp)),
    ],
)
def test_products_of_a_compiled_backbone(family, lora, products):
    model, backbone, batch = shallow(family, lora)
    vs = [direction(model, seed) for seed in (1, 2)]
    want = [[tree(f, model, batch, nll, v) for v in vs] for f in products]
    backbone.compile(fullgraph=True, backend="aot_eager")
    for f, eager in zip(products, want, strict=True):
        made = []
        for v, w in zip(vs, eager, strict=True):
            assert relative(tree(f, model, batch, nll, v), w) < 1e-12
            made.append(graphs())
        assert made[0] > 0 and made[1] == 0, f"{f.__name__}: graphs by direction {made}"


def test_an_ordinary_pass_and_a_dual_one_keep_their_graphs_apart():
    model, backbone, batch = shallow("gpt2-gelu")
    v = direction(model, 1)
    passes = lambda: (gradient(model, batch, nll), tree(jvp_scores, model, batch, nll, v))  # noqa: E731
    want = passes()
    backbone.compile(fullgraph=True, backend="aot_eager")
    for made in (2, 0):
        for got, w in zip(passes(), want, strict=True):
            assert relative(got, w) < 1e-12
        assert graphs() == made
    got = linearize(model, batch, nll).matvec(v)  # runs eagerly, whatever is compiled
    assert graphs() == 0
    assert relative(got, ggnvp(model, batch, nll, v)) < 1e-12


def test_the_callable_compiles_with_inductor():
    model, _, batch = shallow("gpt2")
    with torch.no_grad(), dual(model, direction(model, 1), "jvp") as run:
        want, got = run(batch.ids), torch.compile(run, fullgraph=True)(batch.ids)
    assert graphs() == 1
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
