"""The symmetry gauge: right operators pass, wrong ones are told, in solve as well."""

import logging

import pytest
import torch
from test_products import nll
from tiny_models import direction, make, two_batches

from u2a.curvature import Curvature, GaussNewton, Hessian, symmetry
from u2a.errors import GuardError
from u2a.solve import solve
from u2a.tree import dot, norm, signs_like


class Dense(Curvature):
    def __init__(self, a):
        self.a = a

    @property
    def like(self):
        return {"w": self.a[0]}

    def matvec(self, v):
        return {"w": self.a @ v["w"]}


def positive(n=30, seed=0):
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + torch.eye(n, dtype=torch.float64)


def test_the_value_is_the_formula():
    a = positive() + torch.randn(30, 30, dtype=torch.float64)
    op = Dense(a)
    generator = torch.Generator().manual_seed(7)
    u, v = (signs_like(op.like, generator) for _ in range(2))
    av, au = op.matvec(v), op.matvec(u)
    want = abs(dot(u, av) - dot(v, au)) / (norm(u) * norm(av))
    got = symmetry(op, seed=7, raises=False)
    assert got == pytest.approx(want.item(), rel=1e-12) and got > 1e-3


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
@pytest.mark.parametrize("linearize", [False, True])
def test_curvature_of_models(kind, linearize):
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        model = make("llama", dtype=dtype)
        assert symmetry(kind(model, two_batches(), nll, linearize=linearize)) < limit


def test_a_missing_term_is_told(monkeypatch):
    """The Hessian without the tangent of one weight in one layer."""
    model = make("llama")
    op = Hessian(model, two_batches(), nll)
    right = op.matvec
    name = "model.layers.0.mlp.up_proj.weight"

    def wrong(v):
        return right({n: t for n, t in v.items() if n != name})

    monkeypatch.setattr(op, "matvec", wrong)
    with pytest.raises(GuardError, match=r"not symmetric: \|u'Av - v'Au\| is .* `u2a doctor`"):
        symmetry(op)


def test_limits_streams_and_products_that_are_not_finite(caplog):
    crooked = Dense(positive() + 1e-3 * torch.randn(30, 30, dtype=torch.float64))
    assert symmetry(crooked, limit=0.1) > 1e-10
    with caplog.at_level(logging.WARNING):
        symmetry(crooked, raises=False)
    assert "not symmetric" in caplog.text
    with pytest.raises(GuardError, match="not finite"):
        symmetry(Dense(positive() * float("nan")))
    model = make("llama", lora=True)
    with pytest.raises(ValueError, match="got a stream"):
        symmetry(GaussNewton(model, two_batches(), nll).stream(2))
    assert symmetry(Dense(torch.zeros(4, 4, dtype=torch.float64))) == 0


def test_solve_reports_it_for_one_more_product(caplog):
    b = {"w": torch.randn(30, dtype=torch.float64)}
    options = dict(damping=1.0, max_iter=40)
    plain = solve(Dense(positive()), b, **options)
    with caplog.at_level(logging.INFO, "u2a.solve"):
        checked = solve(Dense(positive()), b, check=True, **options)
    assert plain.symmetry is None and checked.symmetry < 1e-14
    assert checked.products == plain.products + 1 and torch.equal(plain.x["w"], checked.x["w"])
    assert "symmetry gauge" in caplog.text and checked.facts()["symmetry"] == checked.symmetry
    crooked = positive() + 0.1 * torch.randn(30, 30, dtype=torch.float64)
    caplog.clear()
    found = solve(Dense(crooked), [b, direction_like(b)], check=True, method="minres", **options)
    assert all(s.symmetry > 1e-6 for s in found) and "not symmetric" in caplog.text
    model = make("llama", lora=True)
    stream = GaussNewton(model, two_batches(), nll).stream(2)
    with pytest.raises(ValueError, match="check needs a fixed operator"):
        solve(stream, direction(model, 1), "neumann", damping=1.0, check=True)


def direction_like(tree):
    return {n: torch.randn_like(t) for n, t in tree.items()}
