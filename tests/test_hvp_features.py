"""Features of H_i v against the rules applied to explicit per-example Hessian products."""

import pytest
import torch
from test_products import CASES, IDS, REF, nll, npo, oracle_hvp
from tiny_models import direction, make, rows, two_batches

from u2a.batch import collate
from u2a.index import Full, Kronecker, Sketch, features, hvp_features
from u2a.index.modules import weight_shape
from u2a.products import gradient
from u2a.tree import dot, trainable

SPECS = {"full": Full(), "kronecker": Kronecker(3, 2, seed=5), "sketch": Sketch(64, seed=5)}


def explicit(model, trees, spec, exclude=()):
    """`[N, dim]`: every tree's tensors through the rules, as outer products with unit vectors."""
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    columns = []
    for name, p in trainable(model).items():
        if name in exclude:
            continue
        shape = weight_shape(owners[id(p)], p)
        rule = spec.rule(name, shape, p)
        each = []
        for tree in trees:
            g = tree[name]
            if len(shape) == 1:
                each.append(rule.rows(g[None]))
                continue
            g = g.t() if tuple(g.shape) != shape else g
            if p.ndim == 2 and type(owners[id(p)]).__name__ == "Conv1D":
                g = tree[name].t()
            d_in, experts = shape[-1], shape[0] if len(shape) == 3 else 1
            x = torch.eye(d_in, dtype=g.dtype).repeat(experts, 1)
            rows_of = g.mT.reshape(experts * d_in, shape[-2]).contiguous()
            offsets = torch.arange(experts + 1, dtype=torch.int32) * d_in
            kept = rule.keep(x)
            if len(shape) == 3:
                each.append(rule.experts(kept, rows_of, offsets, experts))
            else:
                each.append(rule.outer(kept, rows_of, offsets))
        columns.append(torch.cat(each).flatten(1).double())
    return sum(columns) if spec.shared else torch.cat(columns, 1)


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
def test_equal_to_features_of_explicit_products(family, lora):
    model, batches = make(family, lora), two_batches()
    v, one = direction(model, 1), torch.eye(5, dtype=torch.float64)
    trees = [oracle_hvp(model, batches, npo, v, one[i]) for i in range(5)]
    for name, spec in SPECS.items():
        got = hvp_features(model, batches, npo, v, spec, ref=REF)
        want = explicit(model, trees, spec)
        assert got.shape == want.shape and got.dtype == torch.float64
        per_row = (got - want).norm(dim=1) / want.norm(dim=1)
        assert (per_row < 1e-8).all(), name


def test_the_layout_is_that_of_gradient_features():
    """With Full, <features of H_i v, features of grad l_j> is grad l_j . H_i v."""
    model, data = make("gpt2"), rows()
    v = direction(model, 1)
    batch = collate(data)
    products = hvp_features(model, batch, nll, v, Full())
    grads = features(model, data, nll, Full())
    one = torch.eye(5, dtype=torch.float64)
    h = oracle_hvp(model, [batch], nll, v, one[1])
    g = gradient(model, collate([data[3]]), nll)
    assert (products[1] @ grads[3]).item() == pytest.approx(dot(g, h).item(), rel=1e-6)


def test_excluded_parameters():
    model, batches = make("phi"), two_batches()
    v = direction(model, 1)
    out = ["model.embed_tokens.weight", "lm_head.bias"]
    got = hvp_features(model, batches, nll, v, Full(), exclude=out)
    one = torch.eye(5, dtype=torch.float64)
    trees = [oracle_hvp(model, batches, nll, v, one[i]) for i in range(5)]
    want = explicit(model, trees, Full(), exclude=out)
    assert (got - want).norm() / want.norm() < 1e-8
    with pytest.raises(ValueError, match="left to capture"):
        hvp_features(model, batches, nll, v, Full(), exclude=["*"])


def test_in_float32():
    model, exact, batches = make("llama", True).float(), make("llama", True), two_batches()
    exact.load_state_dict(model.state_dict())
    v = direction(model, 1)
    got = hvp_features(model, batches, nll, v, Sketch(64))
    want = hvp_features(exact, batches, nll, {n: t.double() for n, t in v.items()}, Sketch(64))
    assert got.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 1e-5
