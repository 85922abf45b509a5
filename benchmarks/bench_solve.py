"""Solvers on the demo's model: error against a dense inverse, rank correlation of the influence
scores with the exact ones, and cost in products with the curvature.

The matrix is what `u2a demo` solves with: Gauss-Newton of the retain set at the start, over the B
factors of its LoRA (1,536 numbers, float64), plus a damping of r times its mean eigenvalue. Scores:
<x, gradient of the answer's log-probability> of every forget candidate.
`python benchmarks/bench_solve.py [folder]` trains the demo's base model, forms the matrix column by
column (minutes; both are kept in `folder`) and prints the tables.
"""

import sys
import tempfile
import time
from pathlib import Path

import _kronfluence
import pytest
import torch
from safetensors.torch import load_file, save_file

from u2a.batch import row_batches
from u2a.curvature import (
    EKFAC,
    KFAC,
    Curvature,
    Diagonal,
    EmpiricalFisher,
    Features,
    dense,
    fisher_diagonal,
    row_features,
)
from u2a.demo.app import demo_config
from u2a.demo.base_model import train_base
from u2a.demo.corpus import write_corpus
from u2a.evaluate import spearman
from u2a.losses import LOSSES
from u2a.solve import solve
from u2a.solve.precond import sketch
from u2a.solve.system import System
from u2a.tree import flatten, unflatten
from u2a.workspace import Workspace

RANK = 128
ITERATIONS = 2000


def base_model(folder, steps=450):
    """The demo's configuration in float64, its model trained once into `folder`."""
    folder = Path(folder)
    data = write_corpus(folder / "data", 0)
    if not (folder / "model").exists():
        train_base(folder / "model", data, 0, steps=steps)
    data = {p.stem: p for p in sorted((folder / "data").glob("*.jsonl"))}
    tree = demo_config(data, folder / "model", 0)
    model = tree.model.model_copy(update={"dtype": "float64"})
    return tree.model_copy(update={"model": model})


class Dense(Curvature):
    """The operator's own matrix, formed once: products cost nothing, and are counted."""

    def __init__(self, a, like):
        self.a, self._like = a, like

    @property
    def like(self):
        return self._like

    def matvec(self, v):
        return unflatten(self.a @ flatten(v), v)


class Problem:
    """Matrix, right-hand side and candidate gradients of the demo's first solve."""

    def __init__(self, folder):
        work = Workspace(base_model(folder), Path(folder))
        outer = work.outer
        full = outer.operator(torch.zeros(len(work.data.forget)))
        ((_, self.real),) = full.terms
        self.gradient = outer.gradient()
        self.like = {n: t for n, t in self.gradient.items()}
        self.b = flatten(self.gradient)
        batches = row_batches(work.data.forget, 4096)
        g = row_features(work.model, batches, LOSSES["ga"], None)
        order = torch.cat([batch.index for batch in batches]).argsort()
        self.candidates = g[order]
        began = time.perf_counter()
        for _ in range(5):
            self.real.matvec(self.gradient)
        self.product_ms = 200 * (time.perf_counter() - began)
        kept = Path(folder) / "matrix.safetensors"
        if not kept.exists():
            a = dense(self.real)
            save_file({"a": (a + a.T) / 2}, kept)
        self.a = load_file(kept)["a"]
        self.op = Dense(self.a, self.like)
        self.mean = float(self.a.diagonal().mean())
        self.fisher = EmpiricalFisher(
            work.model, self.real.batches, self.real.loss, weights=self.real.weights
        )

    def exact(self, lam):
        return torch.linalg.solve(self.a + lam * torch.eye(len(self.a), dtype=self.a.dtype), self.b)

    def judge(self, x, want):
        """(relative error of x, rank correlation of the candidates' scores)."""
        rho = spearman(self.candidates @ x, self.candidates @ want).rho
        return float((x - want).norm() / want.norm()), rho


def calls(p, lam, factors):
    """{name: (products beside the iterations, call)}; all on the same matrix and damping."""
    ekfac, kfac, diagonal, theirs = factors
    options = dict(damping=lam, tol=1e-4, max_iter=ITERATIONS)
    stored = Features(p.fisher.roots(), p.like, torch.ones(p.fisher.rows))

    def run(method, **more):
        return lambda: solve(p.op, p.gradient, method, **{**options, **more})

    def inverse(made):
        return lambda: made.inverse(p.gradient, lam)

    def nystrom_inverse():
        system = System(p.op, p.gradient)
        system.lam = lam
        u, values = sketch(system, RANK)
        part = u @ ((u.T @ p.b) / (values + lam)) + (p.b - u @ (u.T @ p.b)) / lam
        return unflatten(part, p.gradient)

    return {
        "identity": run("identity"),
        "diagonal": inverse(diagonal),
        "K-FAC": inverse(kfac),
        "EK-FAC": inverse(ekfac),
        "EK-FAC, kronfluence": inverse(theirs) if theirs else None,
        "DataInf": lambda: solve(stored, p.gradient, "datainf", damping=lam).x,
        "Woodbury (empirical)": lambda: solve(stored, p.gradient, "woodbury", damping=lam).x,
        f"Nystrom {RANK} as inverse": nystrom_inverse,
        "Neumann, 100": run("neumann", max_iter=100),
        "ASTRA (Neumann, EK-FAC), 100": run("neumann", max_iter=100, precond=ekfac),
        "CG, 20": run("cg", max_iter=20),
        "CG, EK-FAC, 20": run("cg", max_iter=20, precond=ekfac),
        "CG": run("cg"),
        "CG, Jacobi": run("cg", precond=diagonal),
        "CG, Nystrom 64": run("cg", precond="nystrom:64"),
        f"CG, Nystrom {RANK}": run("cg", precond=f"nystrom:{RANK}"),
        "CG, K-FAC": run("cg", precond=kfac),
        "CG, EK-FAC": run("cg", precond=ekfac),
        "MINRES": run("minres"),
    }


def line(p, name, found, lam, want):
    products = getattr(found, "products", 1) - 1  # without the one that checks the residual
    x = flatten(getattr(found, "x", found))
    residual = float((p.a @ x + lam * x - p.b).norm() / p.b.norm())
    error, rho = p.judge(x, want)
    print(f"  {name:30s}{products:9d}{residual:12.1e}{error:12.2e}{rho:12.4f}", flush=True)


def real_products(p, lam, ekfac):
    """The same comparison with products of the model itself: what must be shown."""
    for name, precond in (("CG", None), ("CG, EK-FAC", ekfac), ("CG, Nystrom 64", "nystrom:64")):
        began = time.perf_counter()
        s = solve(p.real, p.gradient, damping=lam, tol=1e-4, max_iter=ITERATIONS, precond=precond)
        print(
            f"  {name:30s}{s.products - 1:9d} products, {s.iterations} iterations, true residual "
            f"{s.residual:.1e}, {time.perf_counter() - began:.1f} s",
            flush=True,
        )


def table(folder):
    p = Problem(folder)
    size, n = len(p.a), len(p.candidates)
    values = torch.linalg.eigvalsh(p.a)
    print(f"{size} parameters, {p.real.rows} retain rows, {n} candidates, float64")
    print(f"eigenvalues {values[0]:.2e} .. {values[-1]:.2e}, mean {p.mean:.2e}")
    began = time.perf_counter()
    ekfac = EKFAC.of(p.real, draws=4)
    spent = 1e3 * (time.perf_counter() - began) / p.product_ms
    print(f"one product {p.product_ms:.0f} ms; EK-FAC of 4 draws {spent:.0f} products' time")
    began, theirs = time.perf_counter(), None
    if _kronfluence.INSTALLED:
        theirs = _kronfluence.Ekfac(p.real, draws=4)
        spent = 1e3 * (time.perf_counter() - began) / p.product_ms
        print(f"kronfluence's EK-FAC of 4 draws {spent:.0f} products' time")
    kfac = KFAC.of(p.real, draws=4)
    factors = ekfac, kfac, Diagonal(fisher_diagonal(p.real, draws=8)), theirs
    for share in (1.0, 0.1, 0.01, 0.001):
        lam = share * p.mean
        want = p.exact(lam)
        print(f"damping {share:g} x mean eigenvalue (condition {(values[-1] + lam) / lam:.1e})")
        print(f"  {'':30s}{'products':>9}{'residual':>12}{'error of x':>12}{'Spearman':>12}")
        for name, call in calls(p, lam, factors).items():
            if call is None:
                print(f"  {name:30s}kronfluence not installed")
            else:
                line(p, name, call(), lam, want)
    print("products of the model itself, damping 0.01 x mean eigenvalue, to a residual of 1e-4")
    real_products(p, 0.01 * p.mean, factors[0])


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return Problem(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("precond", [None, "jacobi", "nystrom:64", "ekfac"])
def test_solve(benchmark, problem, precond):
    p = problem
    made = precond
    if precond in ("ekfac", "jacobi"):
        fisher = {"ekfac": EKFAC.of, "jacobi": lambda op, draws: Diagonal(fisher_diagonal(op))}
        made = fisher[precond](p.real, draws=4)
    lam = 0.01 * p.mean
    options = dict(damping=lam, tol=1e-4, max_iter=ITERATIONS, precond=made)
    s = solve(p.op, p.gradient, **options)
    error, rho = p.judge(flatten(s.x), p.exact(lam))
    benchmark.extra_info.update(products=s.products - 1, error=error, spearman=rho)
    benchmark.pedantic(lambda: solve(p.op, p.gradient, **options), rounds=3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
