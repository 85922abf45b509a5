"""Solvers against torch.linalg.solve, and what they say of indefinite matrices."""

import pytest
import torch
from tiny_models import direction, make, rows, two_batches

from u2a.batch import collate
from u2a.curvature import GaussNewton, Hessian, Sum
from u2a.errors import GuardError
from u2a.products import ggnvp, gradient, hvp
from u2a.solve import solve
from u2a.tree import dot, flatten, norm, unflatten

SHAPES = {"a": torch.empty(3, 4, dtype=torch.float64), "b": torch.empty(5, dtype=torch.float64)}
P = 17


class Matrix:
    """A dense symmetric matrix as an operator on a tree of two tensors; counts its products."""

    def __init__(self, eigenvalues, seed=0, diagonal=False):
        generator = torch.Generator().manual_seed(seed)
        values = torch.as_tensor(eigenvalues, dtype=torch.float64)
        q, _ = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))
        self.a = torch.diag(values) if diagonal else q @ torch.diag(values) @ q.T
        self.products = 0

    def matvec(self, v):
        self.products += 1
        assert {n: t.shape for n, t in v.items()} == {n: t.shape for n, t in SHAPES.items()}
        return unflatten(self.a @ flatten(v), v)

    def mean_eigenvalue(self):
        return self.a.diagonal().mean().item()

    def diagonal(self):
        return unflatten(self.a.diagonal(), SHAPES)


SPREAD = torch.logspace(-2, 1, P, dtype=torch.float64)


def rhs(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return unflatten(torch.randn(P, generator=generator, dtype=torch.float64), SHAPES)


def exact(op, b, damping):
    return torch.linalg.solve(op.a + damping * torch.eye(P, dtype=torch.float64), flatten(b))


@pytest.mark.parametrize("damping", [0.0, 0.3, "rel:0.1"])
def test_cg_equals_a_dense_solve(damping):
    op, b = Matrix(SPREAD), rhs()
    s = solve(op, b, damping=damping, tol=1e-12)
    assert s.damping == (
        pytest.approx(0.1 * op.mean_eigenvalue()) if damping == "rel:0.1" else damping
    )
    want = exact(op, b, s.damping)
    assert (flatten(s.x) - want).norm() < 1e-9 * want.norm()
    assert s.residual < 1e-10 and 0 < s.iterations <= 2 * P and not s.negative_curvature
    low = SPREAD[0].item() + s.damping
    assert low * (1 - 1e-9) <= s.min_curvature <= SPREAD[-1] + s.damping
    assert {n: t.shape for n, t in s.x.items()} == {n: t.shape for n, t in b.items()}
    assert op.products == s.iterations + 1


def test_neumann_converges_and_equals_gradient_descent():
    op, b = Matrix(torch.linspace(0.5, 2, P)), rhs()
    s = solve(op, b, "neumann", damping=0.1, tol=1e-10, max_iter=500)
    want = exact(op, b, 0.1)
    assert (flatten(s.x) - want).norm() < 1e-8 * want.norm() and s.residual < 1e-9
    few = solve(op, b, "neumann", damping=0.1, max_iter=3)
    assert few.iterations == 3 and few.residual > 1e-3
    top = torch.linalg.eigvalsh(op.a)[-1] + 0.1
    x, eta = torch.zeros(P, dtype=torch.float64), 1 / top
    for _ in range(3):
        x = x + eta * (flatten(b) - op.a @ x - 0.1 * x)
    assert (flatten(few.x) - x).norm() < 0.05 * x.norm()


def test_identity_is_the_gamma_approximation():
    op, b = Matrix(SPREAD), rhs()
    s = solve(op, b, "identity", damping=4.0)
    assert torch.equal(flatten(s.x), flatten(b) / 4)
    want = (op.a @ flatten(b) / 4).norm() / flatten(b).norm()
    assert s.residual == pytest.approx(want.item()) and s.iterations == 0
    free = solve(None, b, "identity", damping=4.0)
    assert torch.equal(flatten(free.x), flatten(b) / 4) and free.residual == 0


def test_diagonal_is_exact_for_a_diagonal_matrix():
    op, b = Matrix(SPREAD, diagonal=True), rhs()
    s = solve(op, b, "diagonal", damping=0.2)
    assert (flatten(s.x) - exact(op, b, 0.2)).norm() < 1e-12 and s.residual < 1e-12
    assert solve(Matrix(SPREAD), b, "diagonal", damping=0.2).residual > 1e-2


def test_the_residual_is_that_of_a_fresh_product():
    op, b = Matrix(SPREAD), rhs()
    s = solve(op, b, damping=0.0, max_iter=4)
    want = (op.a @ flatten(s.x) - flatten(b)).norm() / flatten(b).norm()
    assert s.residual == pytest.approx(want.item(), rel=1e-12) and s.residual > 1e-3
    op.a = op.a.float()
    s = solve(op, {n: t.float() for n, t in b.items()}, damping=0.1)
    assert all(t.dtype == torch.float32 for t in s.x.values()) and s.residual < 1e-5


@pytest.mark.parametrize("method", ["cg", "neumann", "diagonal"])
def test_negative_curvature_is_reported(method):
    op, b = Matrix([-3.0] + [1.0] * (P - 1), diagonal=method == "diagonal"), rhs()
    with pytest.raises(GuardError, match="negative curvature -.*GaussNewton"):
        solve(op, b, method, damping=0.1)
    s = solve(op, b, method, damping=0.1, on_negative="stop")
    assert s.negative_curvature and s.min_curvature < 0 and s.residual > 0
    cured = solve(op, b, "cg", damping=3.5, tol=1e-10)
    assert not cured.negative_curvature and cured.residual < 1e-9


def test_zero_and_bad_right_hand_sides():
    op = Matrix(SPREAD)
    zero = unflatten(torch.zeros(P, dtype=torch.float64), SHAPES)
    s = solve(op, zero)
    assert flatten(s.x).abs().max() == 0 and (s.residual, s.iterations) == (0.0, 0)
    bad = unflatten(torch.full((P,), float("nan"), dtype=torch.float64), SHAPES)
    with pytest.raises(GuardError, match="right-hand side holds non-finite"):
        solve(op, bad)
    op.a[0, 0] = float("nan")
    with pytest.raises(GuardError, match="non-finite"):
        solve(op, rhs(), damping=0.1)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(method="gmres"), "method must be .* got 'gmres'"),
        (dict(on_negative="ignore"), "on_negative must be .* got 'ignore'"),
        (dict(damping="0.1"), "damping must be a number, 'rel:<positive>'.* got '0.1'"),
        (dict(damping="rel:-1"), "got 'rel:-1'"),
        (dict(damping=-1.0), "damping must be finite and at least 0, got -1.0"),
        (dict(method="identity", damping=0.0), "divides by the damping"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        solve(Matrix(SPREAD), rhs(), **options)


def test_relative_damping_needs_a_positive_trace():
    with pytest.raises(ValueError, match="positive mean eigenvalue, got -1"):
        solve(Matrix([-1.0] * P), rhs())
    with pytest.raises(ValueError, match="needs an operator"):
        solve(None, rhs(), "identity")
    with pytest.raises(ValueError, match="differ in parameters, e.g. .'b'"):
        solve(Matrix(SPREAD), {"a": rhs()["a"]}, "diagonal", damping=1.0)


def nll(lp):
    return -lp.mean()


@pytest.fixture(scope="module")
def small():
    """A LoRA model, its Gauss-Newton and Hessian matrices column by column."""
    model, batches = make("llama", lora=True), two_batches()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.self_attn.q_proj.lora" in name)
    like = {n: p for n, p in model.named_parameters() if p.requires_grad}
    eye = torch.eye(sum(p.numel() for p in like.values()), dtype=torch.float64)
    dense = [
        torch.stack([flatten(f(model, batches, nll, unflatten(e, like))) for e in eye])
        for f in (ggnvp, hvp)
    ]
    return model, batches, like, dense


def test_curvature_operators(small):
    model, batches, like, (g, h) = small
    assert (g - g.T).norm() < 1e-9 * g.norm() and torch.linalg.eigvalsh(g)[0] > -1e-9 * g.norm()
    assert torch.linalg.eigvalsh(h)[0] < -1e-3 * h.norm()
    for kind, a in ((GaussNewton, g), (Hessian, h)):
        op = kind(model, batches, nll, probes=25)
        off = (a - torch.diag(a.diagonal())).norm()
        sigma = (2**0.5 * off / 5 / len(a)).item()
        assert abs(op.mean_eigenvalue() - a.trace().item() / len(a)) < 4 * sigma
        weighted = kind(
            model, batches, nll, probes=25, weights=torch.full((5,), 0.2, dtype=torch.float64)
        )
        assert weighted.mean_eigenvalue() == pytest.approx(op.mean_eigenvalue(), rel=1e-9)
        found = flatten(op.diagonal())
        want = a.diagonal().clamp_min(0) if kind is GaussNewton else a.diagonal()
        spread = (a.square().sum(1) - a.diagonal().square()).sqrt() / 5
        assert ((found - want).abs() < 5 * spread).all()
        few = [kind(model, batches, nll, probes=2).mean_eigenvalue() for _ in range(2)]
        assert few[0] == few[1] != op.mean_eigenvalue()


def test_the_mean_eigenvalue_costs_one_pass_and_is_unbiased(small):
    model, batches, like, (g, _) = small
    seen = []

    def counted(lp):
        seen.append(len(lp.count))
        return nll(lp)

    many = [collate([row], [i]) for i, row in enumerate(rows())]
    op = GaussNewton(model, many, counted, probes=5)
    values = []
    for seed in range(40):
        op.seed = seed
        values.append(op.mean_eigenvalue())
    assert len(seen) == 40 * 5
    found = torch.tensor(values)
    want = g.trace().item() / len(g)
    assert abs(found.mean().item() - want) < 4 * found.std().item() / 40**0.5 < 0.3 * want


def test_solve_with_the_models_own_operators(small):
    model, batches, like, (g, h) = small
    b = gradient(model, batches, nll)
    op = Sum([(2.0, GaussNewton(model, batches, nll)), (-0.5, Hessian(model, batches, nll))])
    v = direction(model, 1)
    want = (2 * g - 0.5 * h) @ flatten(v)
    assert (flatten(op.matvec(v)) - want).norm() < 1e-9 * want.norm()
    s = solve(GaussNewton(model, batches, nll), b, tol=1e-10)
    a = g + s.damping * torch.eye(len(g), dtype=torch.float64)
    want = torch.linalg.solve(a, flatten(b))
    assert (flatten(s.x) - want).norm() < 1e-8 * want.norm() and s.residual < 1e-9
    with pytest.raises(GuardError, match="negative curvature"):
        solve(Hessian(model, batches, nll), b, damping=1e-6)
    assert dot(b, s.x) > 0 and norm(s.x) > 0


def test_sum_needs_terms():
    with pytest.raises(ValueError, match="at least one"):
        Sum([])
