"""Curvature operators against dense matrices and per-example gradients taken one by one."""

import numpy as np
import pytest
import torch
from test_dual_attention import Peak
from tiny_models import make, rows
from torch import nn

from u2a.batch import Batch, collate
from u2a.curvature import (
    EKFAC,
    KFAC,
    Damped,
    Diagonal,
    EmpiricalFisher,
    Features,
    GaussNewton,
    Hessian,
    Sum,
    as_scipy,
    dense,
    fisher_diagonal,
    lanczos,
)
from u2a.curvature import factors as factors_module
from u2a.dual_modules import UnsupportedModel
from u2a.products import answer_logps, gradient
from u2a.tree import flatten, unflatten

LAYER = "transformer.h.1."
PARTS = ("attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight")
WEIGHTS = torch.tensor([0.3, 0.1, 0.9, 0.05, 0.4], dtype=torch.float64)


def nll(lp):
    return -lp.mean()


class Setup:
    """GPT-2 with a square Conv1D, a bias, a norm weight trainable, its rows in two batches out of
    order, and their gradients by ordinary autograd, one row at a time."""

    def __init__(self):
        self.model = make("gpt2")
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in [LAYER + part for part in PARTS])
        self.rows = rows()
        r = self.rows
        self.batches = [collate([r[3], r[0], r[4]], [3, 0, 4]), collate([r[2], r[1]], [2, 1])]
        self.like = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        each = [gradient(self.model, collate([row]), nll) for row in r]
        self.g = torch.stack([flatten(g) for g in each])
        self.p = self.g.shape[1]

    def tokens(self):
        """Inputs and output gradients of c_proj for every row, rows weighted by sqrt(w)."""
        kept = []
        module = self.model.transformer.h[1].attn.c_proj

        def hook(m, args, out):
            out.retain_grad()
            kept.append((args[0].detach()[0], out))

        handle = module.register_forward_hook(hook)
        for i, row in enumerate(self.rows):
            lp = answer_logps(self.model, collate([row]))
            (nll(lp).sum() * WEIGHTS[i].sqrt()).backward()
        handle.remove()
        self.model.zero_grad(set_to_none=True)
        return [(x, y.grad[0]) for x, y in kept]


@pytest.fixture(scope="module")
def small():
    return Setup()


def close(got, want, bound=1e-9):
    assert (got - want).norm() <= bound * want.norm(), ((got - want).norm() / want.norm()).item()


def check_operator(op, want, bound=1e-9):
    """Products, symmetry, shape, mean eigenvalue and diagonal of an operator that is exact."""
    assert op.shape == tuple(want.shape)
    a = dense(op)
    close(a, want, bound)
    assert (a - a.T).norm() <= 1e-10 * a.norm()
    assert op.mean_eigenvalue() == pytest.approx(want.trace().item() / len(want), rel=1e-8)
    close(flatten(op.diagonal()), want.diagonal(), 1e-8)


def test_empirical_fisher(small):
    op = EmpiricalFisher(small.model, small.batches, nll, weights=WEIGHTS)
    want = small.g.T @ (WEIGHTS[:, None] * small.g)
    v = torch.randn(small.p, dtype=torch.float64)
    tree = unflatten(v, small.like)
    close(flatten(op.matvec(tree)), want @ v)
    assert op.quadratic(tree) == pytest.approx((v @ want @ v).item(), rel=1e-9)
    close(op.roots(), WEIGHTS.sqrt()[:, None] * small.g)
    plain = EmpiricalFisher(small.model, small.batches, nll)
    close(flatten(plain.matvec(tree)), small.g.T @ (small.g @ v) / 5)
    twice = [small.batches[0], small.batches[0]]
    with pytest.raises(ValueError, match="Batch.index of its own"):
        EmpiricalFisher(small.model, twice, nll).matvec(tree)
    with pytest.raises(ValueError, match="weights must be at least 0, got -1"):
        EmpiricalFisher(small.model, small.batches, nll, weights=-torch.ones(5)).roots()


def test_stored_features(small):
    op = Features(small.g, small.like, WEIGHTS)
    want = small.g.T @ (WEIGHTS[:, None] * small.g)
    check_operator(op, want)
    two = [unflatten(torch.randn(small.p, dtype=torch.float64), small.like) for _ in range(2)]
    for got, v in zip(op.matmat(two), two, strict=True):
        close(flatten(got), want @ flatten(v))
    with pytest.raises(ValueError, match=r"g must be \[n, 288\], got \[5, 4\]"):
        Features(small.g[:, :4], small.like)


def test_diagonal_damped_and_sum(small):
    entries = unflatten(torch.rand(small.p, dtype=torch.float64), small.like)
    a, b = Diagonal(entries), Features(small.g, small.like)
    want = 2 * torch.diag(flatten(entries)) + 0.5 * small.g.T @ small.g / 5
    op = Sum([(2.0, a), (0.5, b)])
    check_operator(op, want)
    assert op.definite and not Sum([(-1.0, a)]).definite
    check_operator(Damped(op, 0.3), want + 0.3 * torch.eye(small.p, dtype=torch.float64))
    close(Sum([(0.5, b), (2.0, b)]).roots().square().sum(), 2.5 * small.g.square().sum() / 5)
    with pytest.raises(ValueError, match="at least 0, got 2 x Diagonal"):
        op.roots()
    with pytest.raises(ValueError, match="finite and at least 0, got -1"):
        Damped(op, -1)


def test_scipy_view(small):
    op = Damped(Features(small.g, small.like), 0.1)
    view = as_scipy(op)
    assert view.shape == (small.p, small.p) and view.dtype == np.float64
    from scipy.sparse.linalg import cg, eigsh

    want = dense(op)
    top = eigsh(view, k=1, return_eigenvectors=False)[0]
    assert top == pytest.approx(torch.linalg.eigvalsh(want)[-1].item(), rel=1e-8)
    b = np.ones(small.p)
    x, failed = cg(view, b, rtol=1e-10)
    assert not failed
    close(torch.as_tensor(x), torch.linalg.solve(want, torch.as_tensor(b)), 1e-8)


def test_kfac_is_its_definition(small):
    """c_proj by hand: (sum w g g^T) x (mean x x^T), from hooks on ordinary backward passes."""
    op = KFAC(small.model, small.batches, nll, weights=WEIGHTS, labels="data")
    x = torch.cat([x for x, _ in small.tokens()])
    g = torch.cat([g for _, g in small.tokens()])
    inner, outer = x.T @ x / len(x), g.T @ g
    weight = torch.einsum("ij,op->iojp", inner, outer).reshape(256, 256)  # Conv1D keeps [in, out]
    want = torch.zeros(small.p, small.p, dtype=torch.float64)
    at = [n for n in small.like].index(LAYER + PARTS[0])
    sizes = [p.numel() for p in small.like.values()]
    start = sum(sizes[:at])
    squares = (WEIGHTS[:, None] * small.g.square()).sum(0)
    want.diagonal().copy_(squares)
    want[start : start + 256, start : start + 256] = weight
    check_operator(op, want, 1e-8)
    v = unflatten(torch.randn(small.p, dtype=torch.float64), small.like)
    damped = want + 0.02 * torch.eye(small.p, dtype=torch.float64)
    close(flatten(op.inverse(v, 0.02)), torch.linalg.solve(damped, flatten(v)), 1e-8)


@pytest.mark.parametrize("block", [1 << 22, 600])
def test_ekfac_is_its_definition(small, block, monkeypatch):
    """Eigenvalues: sums of squared per-example gradients in K-FAC's basis; blocks of 2 examples
    and all at once give the same."""
    monkeypatch.setattr(factors_module, "BLOCK", block)
    name = LAYER + PARTS[0]
    basis = KFAC(small.model, small.batches, nll, weights=WEIGHTS, labels="data").blocks[name]
    op = EKFAC(small.model, small.batches, nll, weights=WEIGHTS, labels="data")
    each = [unflatten(g, small.like)[name].T for g in small.g]  # [out, in]
    q_in, q_out = basis.bases.inner[0], basis.bases.outer[0]
    want = sum(w * (q_out.T @ g @ q_in).square() for w, g in zip(WEIGHTS, each, strict=True))
    close(op.blocks[name].values[0], want)
    v = torch.randn(16, 16, dtype=torch.float64)
    product = (q_out @ (want * (q_out.T @ v.T @ q_in)) @ q_in.T).T
    like = {n: torch.zeros_like(p) for n, p in small.like.items()} | {name: v}
    close(op.matvec(like)[name], product)
    a = dense(op)
    assert (a - a.T).norm() < 1e-10 * a.norm() and torch.linalg.eigvalsh(a)[0] > -1e-12
    assert op.mean_eigenvalue() == pytest.approx(a.trace().item() / small.p, rel=1e-9)
    close(flatten(op.diagonal()), a.diagonal(), 1e-9)
    close(a.trace(), (WEIGHTS[:, None] * small.g.square()).sum())
    full = small.g.T @ (WEIGHTS[:, None] * small.g)
    kfac = dense(KFAC(small.model, small.batches, nll, weights=WEIGHTS, labels="data"))
    at = slice(*(torch.tensor([0, 256]) + (0 if next(iter(small.like)) == name else 16)).tolist())
    off = [(m[at, at] - full[at, at]).norm() for m in (a, kfac)]
    assert off[0] < off[1], "the corrected eigenvalues are the best in that basis"


def test_factors_hold_no_gradients_of_all_examples(small, monkeypatch):
    """150 rows and a 16 x 16 weight: only a block as large as all of them meets their gradients."""
    many = collate(rows(shapes=[(1, 1)] * 150))

    def largest(kind, block):
        monkeypatch.setattr(factors_module, "BLOCK", block)
        with Peak() as peak:
            kind(small.model, many, nll, labels="data")
        return peak.size

    everything = 150 * 256
    assert largest(EKFAC, 1 << 10) < everything <= largest(EKFAC, 1 << 22)
    assert largest(KFAC, 1 << 22) < everything


def test_fisher_diagonal_is_exact(small):
    op = EmpiricalFisher(small.model, small.batches, nll, weights=WEIGHTS)
    got = flatten(fisher_diagonal(op))
    close(got, (WEIGHTS[:, None] * small.g.square()).sum(0))


def test_sampled_labels_approximate_gauss_newton(small):
    """E over sampled answers of the squared gradients = diag of the Gauss-Newton matrix."""
    op = GaussNewton(small.model, small.batches, nll, weights=WEIGHTS)
    some = torch.randperm(small.p)[:40]
    units = torch.eye(small.p, dtype=torch.float64)[some]
    want = torch.tensor([op.quadratic(unflatten(e, small.like)) for e in units]).double()
    groups = torch.stack([flatten(fisher_diagonal(op, draws=8, seed=100 * s)) for s in range(12)])
    groups = groups[:, some]
    sigma = groups.std(0) / 12**0.5
    z = (groups.mean(0) - want) / sigma
    assert z.abs().max() < 7 and z.square().mean() < 2.5, (z.abs().max(), z.square().mean())
    assert KFAC.of(op, draws=2).mean_eigenvalue() > 0
    same = [EKFAC.of(op, seed=3).mean_eigenvalue() for _ in range(2)]
    assert same[0] == same[1] != EKFAC.of(op, seed=4).mean_eigenvalue()


def test_ekfac_measures_eigenvalues_on_draws_of_their_own(small):
    """Rotations keep the trace: it tells which labels the second pass has drawn."""
    op = GaussNewton(small.model, small.batches, nll, weights=WEIGHTS)
    trace = EKFAC.of(op, seed=3).eigenvalues().sum()
    first, second = (flatten(fisher_diagonal(op, seed=s)).sum() for s in (3, 4))
    close(trace, second)
    assert abs(trace - first) > 1e-3 * first


def test_sum_of_sources_adds_up(small):
    a = EmpiricalFisher(small.model, small.batches[:1], nll, weights=WEIGHTS)
    b = EmpiricalFisher(small.model, small.batches[1:], nll, weights=WEIGHTS)
    whole = EmpiricalFisher(small.model, small.batches, nll, weights=WEIGHTS)
    close(
        flatten(fisher_diagonal(Damped(Sum([(2.0, a), (2.0, b)]), 0.1))),
        2 * flatten(fisher_diagonal(whole)),
    )
    parts, one = KFAC.of(Sum([(1.0, a), (1.0, b)])), KFAC.of(whole)
    close(parts.eigenvalues().sum(), one.eigenvalues().sum())
    with pytest.raises(ValueError, match="made from a model.*got Features"):
        KFAC.of(Features(small.g, small.like))


def test_experts_are_a_stack():
    """Fused experts [E, out, in]: every expert's block against its own per-example gradients."""
    import tiny_index

    model, data = tiny_index.make("mixtral"), tiny_index.rows()[:4]
    model.config._experts_implementation = "eager"  # the others have no float64
    name = "model.layers.1.mlp.experts.down_proj"
    for n, p in model.named_parameters():
        p.requires_grad_(n == name)
    each = tiny_index.oracle(model, data, nll)[name]  # [n, E, out, in]
    op = EKFAC(model, collate(data), nll, labels="data")
    q_in, q_out = op.blocks[name].bases.inner, op.blocks[name].bases.outer
    want = (q_out.mT @ each @ q_in).square().mean(0)
    close(op.blocks[name].values, want, 1e-5)


def test_refusals(small):
    model = make("llama-tied")
    with pytest.raises(UnsupportedModel, match="embed_tokens.weight: used more than once"):
        EKFAC(model, small.batches, nll, labels="data")
    with pytest.raises(UnsupportedModel, match="c_proj.weight: a side of 16 .*max_dim=8"):
        KFAC(small.model, small.batches, nll, max_dim=8)
    with pytest.raises(ValueError, match="labels must be 'sampled' or 'data', got 'true'"):
        KFAC(small.model, small.batches, nll, labels="true")
    b = small.batches[0]
    holed = Batch(b.ids, b.answer & (torch.arange(b.ids.shape[1]) % 2 == 0), b.length, b.index)
    with pytest.raises(ValueError, match="answer tokens must be the last"):
        KFAC(small.model, holed, nll)


@pytest.mark.parametrize("kind", [GaussNewton, Hessian, EmpiricalFisher])
def test_fixed_samples_and_streams(kind, small):
    """Samples average to the operator over an epoch; a stream repeats itself from its draw on."""
    op = kind(small.model, small.batches, nll, weights=WEIGHTS)
    v = unflatten(torch.randn(small.p, dtype=torch.float64), small.like)
    want = flatten(op.matvec(v))
    one = op.sampled(2, seed=1)
    assert one.rows == 2 and torch.equal(flatten(one.matvec(v)), flatten(one.matvec(v)))
    stream = op.stream(1, seed=1)
    drawn = torch.stack([flatten(stream.matvec(v)) for _ in range(5)])
    close(drawn.mean(0), want)
    assert stream.stochastic and stream.draw == 5 and (drawn[0] - drawn[1]).norm() > 0
    stream.draw = 2
    assert torch.equal(flatten(stream.matvec(v)), drawn[2])
    unweighted = kind(small.model, small.batches, nll).sampled(5)
    close(flatten(unweighted.matvec(v)), flatten(kind(small.model, small.batches, nll).matvec(v)))
    with pytest.raises(ValueError, match=r"rows must be in \[1, 5\]"):
        op.sampled(6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [1, 7, 300])
def test_lanczos_bounds_the_spectrum(p, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))[0]
    for values in (
        torch.randn(p, generator=generator, dtype=torch.float64),
        -torch.logspace(-6, 2, p, dtype=torch.float64),
        torch.cat([torch.ones(p - 1), -torch.ones(1)]).double() * 3,
    ):
        a = q @ torch.diag(values) @ q.T
        found = lanczos(lambda v, a=a: a @ v, torch.zeros(p, dtype=torch.float64), seed=seed)
        radius = values.abs().max().item()
        assert found.low <= values.min() <= found.low + 0.02 * radius
        assert found.high - 0.1 * radius <= values.max() <= found.high
        assert found.products <= min(p, 80)
    flat = lanczos(lambda v: 2 * v, torch.zeros(50, dtype=torch.float64))
    assert (flat.products, flat.mean_abs, flat.mean) == (1, pytest.approx(2), pytest.approx(2))


def test_unused_module_is_named(small):
    model = make("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_(name == LAYER + "ln_2.weight")
    model.transformer.h[0].extra = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with pytest.raises(UnsupportedModel, match="extra.weight: took no part"):
        KFAC(model, small.batches, nll)
