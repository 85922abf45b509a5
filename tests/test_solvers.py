"""Every method and preconditioner against dense inverses, SciPy, and formulas written out."""

import logging

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from safetensors.torch import load, save
from test_solve import SHAPES, SPREAD, Matrix, P, exact, rhs

from u2a.curvature import Curvature, Damped, Diagonal, Features, Sum
from u2a.errors import GuardError
from u2a.solve import METHODS, State, solve
from u2a.tree import flatten, unflatten

INDEFINITE = torch.cat([-torch.logspace(-1, 0.5, 5), torch.logspace(-1, 1, P - 5)]).double()


def eye(n):
    return torch.eye(n, dtype=torch.float64)


class Hard(Curvature):
    """p = 400, condition 1e5 before damping, eigenvalues falling off as in Gauss-Newton matrices;
    counts its products."""

    probes = 0

    def __init__(self, p=400, seed=0, decay=0.97):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))[0]
        scale = torch.logspace(0, 1.5, p, dtype=torch.float64)
        a = q @ torch.diag(decay ** torch.arange(p).double()) @ q.T
        self.a, self.products = scale[:, None] * a * scale, 0
        self.b = {"w": torch.randn(p, generator=generator, dtype=torch.float64)}

    @property
    def like(self):
        return self.b

    def matvec(self, v):
        self.products += 1
        return {"w": self.a @ v["w"]}

    def mean_eigenvalue(self):
        return self.a.diagonal().mean().item()

    def diagonal(self):
        return {"w": self.a.diagonal()}

    def solution(self, lam):
        return torch.linalg.solve(
            self.a + lam * torch.eye(len(self.a), dtype=torch.float64), self.b["w"]
        )


@pytest.mark.parametrize("precond", ["jacobi", "nystrom:60"])
def test_preconditioned_cg_needs_fewer_products(precond):
    """To a relative residual of 1e-4, products of the preconditioner included."""
    op = Hard()
    plain = solve(op, op.b, damping="rel:1e-3", tol=1e-4, max_iter=2000)
    counted, op.products = op.products, 0
    assert plain.residual < 2e-4 and plain.products == counted == plain.iterations + 1
    s = solve(op, op.b, damping="rel:1e-3", tol=1e-4, max_iter=2000, precond=precond)
    assert s.residual < 2e-4 and s.damping == plain.damping
    assert s.products == op.products < 0.8 * plain.products, (s.products, plain.products)
    want = op.solution(s.damping)
    tight = solve(op, op.b, damping="rel:1e-3", tol=1e-11, max_iter=2000, precond=precond)
    assert (tight.x["w"] - want).norm() < 1e-7 * want.norm()


def test_nystrom_is_its_formula():
    op = Hard(60)
    s = solve(op, op.b, damping=0.5, precond="nystrom:60", tol=1e-9)
    assert s.iterations <= 2 and s.products == 60 + s.iterations + 1, "exact at full rank"
    low = Features(torch.randn(5, P).double(), SHAPES)
    b = rhs()
    found = [
        solve(low, b, damping=0.1, tol=1e-10, precond=p).iterations for p in (None, "nystrom:5")
    ]
    assert found[1] <= 2 < found[0]
    with pytest.raises(ValueError, match="lower rank needs a damping"):
        solve(low, b, damping=0.0, precond="nystrom:8")
    with pytest.raises(ValueError, match=rf"must be in \[1, {P}\] \(parameters\), got 18"):
        solve(low, b, damping=0.1, precond="nystrom:18")
    with pytest.raises(GuardError, match="positive semidefinite operator"):
        solve(Matrix(-SPREAD), b, damping=20.0, precond="nystrom:4")


def test_own_preconditioners():
    op, b = Matrix(SPREAD), rhs()
    damped = op.a + 0.1 * eye(P)

    def inverse(tree):
        return unflatten(torch.linalg.solve(damped, flatten(tree)), tree)

    for method in ("cg", "minres", "neumann"):
        s = solve(op, b, method, damping=0.1, precond=inverse, tol=1e-9)
        assert s.iterations <= 2 and s.residual < 1e-8, method
    one = solve(op, b, damping=0.1, precond=Diagonal(op.diagonal()))
    assert one.iterations == solve(op, b, damping=0.1, precond="jacobi").iterations
    with pytest.raises(GuardError, match="preconditioner is not positive definite"):
        solve(op, b, damping=0.1, precond=lambda t: {n: -v for n, v in t.items()})
    with pytest.raises(ValueError, match="precond must be .* got 'ilu'"):
        solve(op, b, damping=0.1, precond="ilu")
    with pytest.raises(ValueError, match="precond goes with cg, minres, neumann; got 'identity'"):
        solve(op, b, "identity", precond="jacobi")


@pytest.mark.parametrize("precond", [None, "jacobi"])
def test_several_right_hand_sides(precond):
    op = Matrix(SPREAD)
    bs = [rhs(1), unflatten(torch.zeros(P, dtype=torch.float64), SHAPES), rhs(2)]
    bs[0] = {n: 1e-3 * t for n, t in bs[0].items()}
    for method in ("cg", "minres", "neumann", "diagonal", "identity"):
        options = {"precond": precond} if method in ("cg", "minres", "neumann") else {}
        found = solve(op, bs, method, damping=0.3, tol=1e-9, max_iter=900, **options)
        assert [s.residual for s in found][1] == 0 and not flatten(found[1].x).any()
        for s, b in zip(found, bs, strict=True):
            alone = solve(op, b, method, damping=0.3, tol=1e-9, max_iter=900, **options)
            assert (flatten(s.x) - flatten(alone.x)).norm() <= 1e-6 * flatten(alone.x).norm()
            if method in ("cg", "minres"):
                assert s.iterations == alone.iterations and s.residual < 1e-7
    with pytest.raises(ValueError, match="at least one right-hand side"):
        solve(op, [])


def test_converged_columns_cost_no_products():
    op = Matrix(SPREAD)
    easy = unflatten(torch.linalg.eigh(op.a).eigenvectors[:, 3], SHAPES)
    first, second = solve(op, [easy, rhs()], damping=0.0, tol=1e-8)
    assert first.iterations == 1 < second.iterations
    assert first.products == op.products == 1 + second.iterations + 2


@pytest.mark.parametrize("precond", [None, "jacobi"])
def test_minres_on_an_indefinite_matrix(precond):
    op, b = Matrix(INDEFINITE), rhs()
    s = solve(op, b, "minres", damping=0.0, tol=1e-10, precond=precond)
    want = exact(op, b, 0.0)
    assert (flatten(s.x) - want).norm() < 1e-8 * want.norm() and s.residual < 1e-9
    assert s.negative_curvature and s.min_curvature < 0 < s.max_curvature
    with pytest.raises(GuardError, match="negative curvature"):
        solve(op, b, "cg", damping=0.0)


@pytest.mark.parametrize("precond", [None, "jacobi"])
def test_minres_has_scipys_iterates(precond):
    op, b = Matrix(INDEFINITE), rhs()
    m = None
    if precond:
        m = np.diag(1 / op.a.diagonal().clamp_min(0).add(0.5).numpy())
    for k in (1, 2, 5, 9):
        s = solve(op, b, "minres", damping=0.5, tol=1e-14, max_iter=k, precond=precond)
        want, _ = scipy.sparse.linalg.minres(
            (op.a + 0.5 * eye(P)).numpy(),
            flatten(b).numpy(),
            rtol=1e-14,
            maxiter=k,
            M=m,
        )
        assert s.iterations == k
        assert np.linalg.norm(flatten(s.x).numpy() - want) < 1e-9 * np.linalg.norm(want)
        assert s.residual == pytest.approx(
            (op.a @ flatten(s.x) + 0.5 * flatten(s.x) - flatten(b)).norm() / flatten(b).norm()
        )


def test_neumann_with_a_good_preconditioner_is_faster():
    op, b = Matrix(SPREAD, diagonal=True), rhs()
    slow = solve(op, b, "neumann", damping=0.01, tol=1e-6, max_iter=500)
    fast = solve(op, b, "neumann", damping=0.01, tol=1e-6, max_iter=500, precond="jacobi")
    assert fast.residual < 1e-5 < slow.residual and fast.iterations <= 3
    given = solve(op, b, "neumann", damping=0.01, max_iter=7, step=0.05)
    x = torch.zeros(P, dtype=torch.float64)
    for _ in range(7):
        x = x + 0.05 * (flatten(b) - op.a @ x - 0.01 * x)
    assert (flatten(given.x) - x).norm() < 1e-12 * x.norm()


@pytest.mark.parametrize("method", ["cg", "minres", "neumann"])
@pytest.mark.parametrize("precond", [None, "jacobi", "nystrom:4"])
def test_a_resumed_solve_is_the_same_to_the_bit(method, precond):
    """Through safetensors and back; damping is that of the first call."""
    bs = [rhs(1), rhs(2)]
    options = dict(precond=precond, tol=1e-13)
    whole = solve(Matrix(SPREAD), bs, method, damping="rel:0.1", max_iter=9, **options)
    some = solve(Matrix(SPREAD), bs, method, damping="rel:0.1", max_iter=4, **options)
    state = State(method, load(save(some[0].state.tensors)))
    rest = solve(Matrix(SPREAD), bs, method, state=state, max_iter=5, **options)
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(flatten(a.x), flatten(b.x)) and a.iterations == b.iterations == 9
        assert (a.residual, a.min_curvature, a.damping) == (b.residual, b.min_curvature, b.damping)
    with pytest.raises(ValueError, match="state has damping"):
        solve(Matrix(SPREAD), bs, method, state=state, damping=3.0, **options)
    other = "minres" if method == "cg" else "cg"
    with pytest.raises(ValueError, match=f"state is one of '{method}', got method '{other}'"):
        solve(Matrix(SPREAD), bs, other, state=state, **options)


def features(n=9, seed=3):
    g = torch.randn(n, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g * torch.linspace(0.2, 3, P)


def test_woodbury_is_exact():
    g, b = features(), rhs()
    w = torch.rand(9, dtype=torch.float64)
    for weights in (None, w):
        op = Features(g, SHAPES, weights)
        s = solve(op, b, "woodbury", damping="rel:0.01")
        a = g.T @ (
            (w if weights is not None else torch.full((9,), 1 / 9, dtype=torch.float64))[:, None]
            * g
        )
        want = torch.linalg.solve(a + s.damping * eye(P), flatten(b))
        assert (flatten(s.x) - want).norm() < 1e-7 * want.norm() and s.residual < 1e-7
    backwards = {n: b[n] for n in reversed(b)}
    again = solve(op, backwards, "woodbury", damping=s.damping)
    assert list(again.x) == list(backwards) and torch.allclose(again.x["b"], s.x["b"])
    with pytest.raises(ValueError, match="per-example gradients .*got Matrix"):
        solve(Matrix(SPREAD), b, "woodbury", damping=1.0)
    with pytest.raises(ValueError, match="'woodbury' divides by the damping"):
        solve(op, b, "woodbury", damping=0.0)


@pytest.mark.parametrize("damping", ["rel:0.1", 0.7])
def test_datainf_is_its_formula(damping):
    """Equation 5 of arXiv 2310.00902 in its own terms, and the mean of n inverses."""
    g, b = features(), rhs()
    n = len(g)
    s = solve(Features(g, SHAPES), b, "datainf", damping=damping)
    start = 0
    for name, like in SHAPES.items():
        d = like.numel()
        block, v = g[:, start : start + d], b[name].flatten()
        start += d
        lam = 0.1 / (n * d) * block.square().sum() if damping == "rel:0.1" else 0.7
        eq5 = sum(v - (i @ v) / (lam + i @ i) * i for i in block) / (n * lam)
        assert (s.x[name].flatten() - eq5).norm() < 1e-10 * eq5.norm()
        each = [torch.linalg.solve(torch.outer(i, i) + lam * eye(d), v) for i in block]
        assert (s.x[name].flatten() - sum(each) / n).norm() < 1e-9 * eq5.norm()
    assert s.residual > 0.01 and s.method == "datainf"


@pytest.mark.parametrize("damping", ["auto", "auto:0.5"])
def test_a_lanczos_bound_makes_an_indefinite_system_definite(damping, caplog):
    op, b = Matrix(INDEFINITE), rhs()
    with caplog.at_level(logging.INFO, "u2a.solve"):
        s = solve(op, b, damping=damping, tol=1e-10)
    factor = 0.5 if damping == "auto:0.5" else 0.1
    low = (torch.linalg.eigvalsh(op.a)[0] + s.damping).item()
    assert factor * 0.1 < low < 2 * factor * INDEFINITE.abs().mean() + 0.05
    assert s.residual < 1e-8 and not s.negative_curvature
    assert s.note in caplog.text and "Lanczos" in s.note and f"{s.damping:.3e}" in s.note
    inside = solve(Damped(op, 0.5), b, damping=damping, tol=1e-10)
    assert inside.damping == s.damping, "a damping the operator has already counts"
    enough = solve(Damped(op, 100.0), b, damping=damping, tol=1e-10)
    assert enough.damping == 100
    assert solve(Damped(op, 100.0), b, damping=1.0).damping == 101


def test_relative_damping_of_an_indefinite_operator_is_a_lanczos_bound():
    op, b = Sum([(1.0, Matrix(INDEFINITE))]), rhs()
    op.definite = False
    assert solve(op, b).damping == solve(op, b, damping="auto:0.1").damping
    op.definite = True
    with pytest.raises(GuardError, match="negative curvature"):
        solve(op, b)


@pytest.mark.parametrize("method", ["cg", "neumann", "diagonal"])
def test_damping_is_raised_where_asked(method):
    op, b = Matrix([-3.0] + [1.0] * (P - 1), diagonal=method == "diagonal"), rhs()
    s = solve(op, b, method, damping=0.1, on_negative="damp", tol=1e-8, max_iter=4000)
    assert s.damping > 3 and not s.negative_curvature and s.residual < 1e-6
    assert "damping raised" in s.note


def test_curvature_seen_lies_in_the_spectrum():
    op, b = Matrix(SPREAD), rhs()
    for method in ("cg", "minres", "neumann"):
        s = solve(op, b, method, damping=0.2, max_iter=30)
        assert SPREAD[0] + 0.19 < s.min_curvature <= s.max_curvature < SPREAD[-1] + 0.21
        assert s.facts().keys() == {
            "residual", "iterations", "negative_curvature", "damping", "min_curvature",
            "max_curvature", "products", "method", "note",
        }  # fmt: skip


def test_every_method_is_named():
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        solve(Matrix(SPREAD), rhs(), "newton")
    assert len(METHODS) == 9
