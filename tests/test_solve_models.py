"""Solvers on curvature of real models: gradient ascent's Hessian, K-FAC inverses, streams, the
outer problem."""

import logging

import pytest
import torch
from tiny_models import make, rows

from u2a.adapter import snapshot
from u2a.batch import Pair, collate
from u2a.curvature import EKFAC, KFAC, Damped, EmpiricalFisher, GaussNewton, Hessian, dense
from u2a.errors import GuardError
from u2a.inner import InnerProblem
from u2a.losses import LOSSES
from u2a.objectives import PairSet, Preference
from u2a.outer import Outer, SolveSettings
from u2a.products import gradient
from u2a.solve import METHODS, solve
from u2a.tree import add_, flatten

NAMES = ("attn.c_proj.bias", "ln_2.weight", "ln_2.bias")


class Setup:
    """48 parameters of a GPT-2 and dense matrices over them."""

    def __init__(self):
        self.model = make("gpt2")
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in ["transformer.h.1." + part for part in NAMES])
        r = rows()
        self.batches = [collate([r[3], r[0], r[4]], [3, 0, 4]), collate([r[2], r[1]], [2, 1])]
        self.b = gradient(self.model, self.batches, LOSSES["nll"])
        self.ggn = GaussNewton(self.model, self.batches, LOSSES["nll"])
        self.ascent = Hessian(self.model, self.batches, LOSSES["ga"])
        self.fisher = EmpiricalFisher(self.model, self.batches, LOSSES["nll"])
        self.dense = {op: dense(op) for op in (self.ggn, self.ascent, self.fisher)}

    def exact(self, op, lam):
        a = self.dense[op]
        return torch.linalg.solve(a + lam * torch.eye(len(a), dtype=a.dtype), flatten(self.b))


@pytest.fixture(scope="module")
def small():
    return Setup()


def close(got, want, bound):
    assert (got - want).norm() < bound * want.norm(), ((got - want).norm() / want.norm()).item()


def test_dense_matrices_are_symmetric(small):
    for op, a in small.dense.items():
        assert a.shape == op.shape == (48, 48) and (a - a.T).norm() < 1e-9 * a.norm()
    low = torch.linalg.eigvalsh(small.dense[small.ascent])[0]
    assert low < -0.1 * small.dense[small.ascent].norm(), "gradient ascent curves down"
    with pytest.raises(GuardError, match="negative curvature"):
        solve(small.ascent, small.b, damping=1e-3)


@pytest.mark.parametrize("method", ["cg", "neumann", "identity", "minres"])
def test_ascent_is_damped_by_a_lanczos_bound(small, method, caplog):
    """Damping makes GA's Hessian positive definite, just so, and says it; by default, but that
    "minres" needs none."""
    with caplog.at_level(logging.INFO, "u2a.solve"):
        steps = 100 if method in ("cg", "minres") else 2
        s = solve(small.ascent, small.b, method, tol=1e-7, max_iter=steps, damping="auto:0.1")
    if method != "minres":
        assert solve(small.ascent, small.b, method, max_iter=1).damping == s.damping
    values = torch.linalg.eigvalsh(small.dense[small.ascent])
    size = values.abs().mean().item()
    lowest = values[0].item() + s.damping
    assert 0.02 * size < lowest < 0.4 * size + 0.01 * values.abs().max()
    assert "Lanczos" in s.note and s.note in caplog.text and s.products > 10
    if method in ("cg", "minres"):
        close(flatten(s.x), small.exact(small.ascent, s.damping), 1e-4)


def test_minres_takes_the_ascent_hessian_as_it_is(small):
    values = torch.linalg.eigvalsh(small.dense[small.ascent])
    between = -(values[1] + values[2]).item() / 2
    s = solve(small.ascent, small.b, "minres", damping=between, tol=1e-7)
    assert s.negative_curvature and s.min_curvature < 0 < s.max_curvature and s.residual < 2e-7
    close(flatten(s.x), small.exact(small.ascent, between), 1e-4)


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_kronecker_inverses(small, kind):
    """The inverse is exact for the factors, its residual is that of the operator behind them."""
    name = kind.__name__.lower()
    made = kind.of(small.ggn)
    s = solve(small.ggn, small.b, name, damping="rel:0.1")
    want = made.inverse(small.b, s.damping)
    assert torch.equal(flatten(s.x), flatten(want))
    a = small.dense[small.ggn]
    off = a @ flatten(s.x) + s.damping * flatten(s.x) - flatten(small.b)
    assert s.residual == pytest.approx((off.norm() / flatten(small.b).norm()).item(), rel=1e-6)
    assert s.residual > 0.01 and s.min_curvature >= s.damping
    own = solve(made, small.b, name, damping=s.damping)
    assert torch.equal(flatten(own.x), flatten(s.x)) and own.residual < 1e-12


@pytest.mark.parametrize("precond", ["jacobi", "nystrom:20", "kfac", "ekfac"])
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_preconditioners_on_a_model(small, method, precond):
    s = solve(small.ggn, small.b, method, precond=precond, tol=1e-6, damping="rel:0.5")
    close(flatten(s.x), small.exact(small.ggn, s.damping), 1e-4)
    assert s.residual < 2e-6


def test_woodbury_of_a_models_own_gradients(small):
    s = solve(small.fisher, small.b, "woodbury", damping="rel:0.05")
    close(flatten(s.x), small.exact(small.fisher, s.damping), 1e-8)
    assert s.residual < 1e-8 and s.damping == pytest.approx(0.05 * small.fisher.mean_eigenvalue())
    assert solve(small.fisher, small.b, "datainf").residual > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_it_did(small, method):
    """Solution, true residual, iterations, curvature seen, products; a state where it iterates."""
    op = small.fisher if method in ("woodbury", "datainf") else small.ggn
    s = solve(op, small.b, method, damping=0.5 * small.ggn.mean_eigenvalue(), max_iter=30)
    off = flatten(add_(op.matvec(s.x), s.x, s.damping)) - flatten(small.b)
    assert s.residual == pytest.approx((off.norm() / flatten(small.b).norm()).item(), rel=1e-6)
    assert s.method == method and s.products >= 1 and not s.negative_curvature
    top = torch.linalg.eigvalsh(small.dense[op])[-1] + s.damping
    assert 0 < s.min_curvature <= s.max_curvature < 5 * top, "datainf inverts 5 rows one by one"
    iterates = method in ("cg", "minres", "neumann")
    assert (s.iterations > 0) == (s.state is not None) == iterates


def test_astra_on_a_stream(small):
    """Preconditioned stochastic Neumann: close to the solution of the whole, resumable, refused
    to methods that need one matrix."""
    stream = small.ggn.stream(2, seed=1)
    lam = small.ggn.mean_eigenvalue()
    ekfac = EKFAC.of(small.ggn, draws=4)
    options = dict(damping=lam, precond=ekfac, step=0.15)
    s = solve(stream, small.b, "neumann", max_iter=40, **options)
    want = small.exact(small.ggn, lam)
    assert (flatten(s.x) - want).norm() < 0.35 * want.norm() and s.iterations == 40
    first = solve(small.ggn.stream(2, seed=1), small.b, "neumann", max_iter=15, **options)
    rest = small.ggn.stream(2, seed=1)
    again = solve(rest, small.b, "neumann", max_iter=25, state=first.state, **options)
    assert torch.equal(flatten(again.x), flatten(s.x))
    with pytest.raises(ValueError, match="cg needs a fixed operator, got a stream"):
        solve(stream, small.b, "cg", damping=lam)
    with pytest.raises(ValueError, match="'auto' needs a fixed operator"):
        solve(stream, small.b, "neumann", damping="auto")
    fixed = small.ggn.sampled(3, seed=2)
    assert solve(fixed, small.b, damping=lam, tol=1e-8).residual < 1e-7


@pytest.mark.parametrize(
    "settings",
    [
        SolveSettings("cg", "hessian"),
        SolveSettings("cg", "ggn", precond="ekfac"),
        SolveSettings("minres", "hessian", 0.0),
        SolveSettings("woodbury", "fisher"),
        SolveSettings("datainf", "fisher"),
        SolveSettings("ekfac", "ggn", "auto"),
    ],
    ids=lambda s: f"{s.method}-{s.curvature}-{s.precond}",
)
def test_the_outer_problem_takes_every_solver(settings):
    """Gradient ascent on weighted rows: A = sum w_j H_j + anchor I, damping reported in total."""
    model = make("llama", lora=True)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.self_attn.q_proj.lora_B" in name)
    forget, other, anchor = rows(0), rows(1), 0.005
    weights = torch.tensor([0.5, 0, 0.25, 0, 0.25])
    problem = InnerProblem.build(
        model, forget, weights, LOSSES["ga"], start=snapshot(model), retain=other[:3],
        retain_weight=0.1, anchor=anchor,
    )  # fmt: skip
    held = PairSet.build(model, [Pair(str(i), forget[i], other[i]) for i in range(2)], 512)
    J = Preference(held, batch_tokens=512)
    outer = Outer(model, problem, J, J, settings, lambda p: {})
    scores, s = outer.gains(weights)
    assert scores.gain.isfinite().all() and scores.gain.abs().max() > 0 and s.damping >= anchor
    assert s.method == settings.method and (s.residual < 1e-3 or settings.method[-3:] != "res")
    if settings.curvature == "hessian" and settings.method == "cg":
        assert "Lanczos" in s.note and s.damping > anchor and not s.negative_curvature
        again = solve(Damped(outer.operator(weights), anchor), outer.gradient(), tol=1e-4)
        assert again.damping == s.damping and s.residual < 1e-3
