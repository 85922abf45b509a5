"""Gains of every solver where it is exact: the linear-quadratic problem with candidates whose
Hessians have the form that the solver inverts. The truth is autograd through theta*(w)."""

from __future__ import annotations

import pytest
import torch
from toy_bilevel import Toy

from u2a.curvature import EKFAC, KFAC, Diagonal, Features
from u2a.curvature.factors import Bases
from u2a.curvature.kfac import Block
from u2a.select import best_single_weight
from u2a.solve import METHODS

F64 = torch.float64
N, P = 8, 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Shaped(Toy):
    """The toy with B_i, and sum_i w_i B_i as the operator that the solver wants."""

    def __init__(self, method, B, operator):
        super().__init__(n=N, p=P, q=0.4, seed=3, method=method)
        self.B, self.made = B, operator

    def operator(self, w):
        return self.made(w.double())


def identity():
    """No candidate is curved, so A = lambda I."""
    zero = torch.zeros(P, dtype=F64)
    return torch.zeros(N, P, P, dtype=F64), lambda w: Diagonal({"theta": zero})


def diagonal():
    d = randn(N, P, seed=1).square()
    return torch.diag_embed(d), lambda w: Diagonal({"theta": w @ d})


def outer_products(rows):
    """B_i = b_i b_i^T of the rows, 0 of the others."""
    b = torch.zeros(N, P, dtype=F64)
    b[:rows] = randn(rows, P, seed=1)

    def operator(w):
        return Features(b[:rows], {"theta": torch.zeros(P, dtype=F64)}, w[:rows])

    return torch.einsum("ip,iq->ipq", b, b), operator


def kronecker(kind):
    """B_i = (Q_out x Q_in) diag(values_i) (Q_out x Q_in)^T; of K-FAC the values are products."""
    q_in, q_out = (torch.linalg.qr(randn(k, k, seed=k)).Q for k in (3, 2))
    size = randn(N, seed=1).square()
    if kind is KFAC:
        values = torch.einsum("n,o,i->noi", size, randn(2, seed=2) ** 2, randn(3, seed=3) ** 2)
    else:
        values = randn(N, 2, 3, seed=4).square()
    basis = torch.kron(q_out, q_in)
    dense = basis @ torch.diag_embed(values.flatten(1)) @ basis.T

    def operator(w):
        made = kind.__new__(kind)
        made._like = {"theta": torch.zeros(P, dtype=F64)}
        block = Block(
            (2, 3), Bases(q_in[None], q_out[None]), torch.einsum("n,noi->oi", w, values)[None]
        )
        made.blocks = {"theta": block}
        return made

    return dense, operator


SHAPES = {
    "identity": identity,
    "diagonal": diagonal,
    "woodbury": lambda: outer_products(N),
    "datainf": lambda: outer_products(1),  # of one row the mean of inverses is the inverse
    "kfac": lambda: kronecker(KFAC),
    "ekfac": lambda: kronecker(EKFAC),
    "cg": diagonal,
    "minres": lambda: kronecker(EKFAC),
    "neumann": diagonal,
}


@pytest.mark.parametrize("method", METHODS)
def test_every_solver_gives_the_hypergradient(method):
    toy = Shaped(method, *SHAPES[method]())
    w = (randn(N, seed=5).abs() * 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(toy.J(w), w)
    toy.resolve(w.detach())
    scores, solution = toy.gains(w.detach())
    torch.testing.assert_close(scores.gain, slope, rtol=1e-8, atol=1e-10)
    assert solution.residual < 1e-8


def test_identity_is_wrong_where_candidates_are_curved():
    toy = Shaped("identity", *diagonal())
    w = (randn(N, seed=5).abs() * 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(toy.J(w), w)
    toy.resolve(w.detach())
    scores, solution = toy.gains(w.detach())
    assert (scores.gain - slope).abs().max() > 0.05 * slope.abs().max()
    assert solution.residual > 0.05, "and says so"


def test_the_best_weight_of_a_single_candidate_is_the_best_there_is():
    """J is exactly quadratic in w here: the closed form against a line of realised J."""
    toy, cap = Toy(n=N, p=P, q=1.2, seed=4), 0.9
    zero = torch.zeros(N)
    scores, solution = toy.gains(zero)
    Q = toy.interactions(zero, solution, second_order=True).curvature
    best, gained = best_single_weight(scores.gain, Q.diagonal(), cap)
    inside = (best > 0) & (best < cap)
    assert inside.any() and (best == 0).any(), "some of every kind"
    start = float(toy.J(zero))
    for i in range(N):
        line = [
            float(toy.J(x * torch.eye(N, dtype=F64)[i])) - start for x in torch.linspace(0, cap, 91)
        ]
        at = float(toy.J(best[i] * torch.eye(N, dtype=F64)[i])) - start
        assert float(gained[i]) == pytest.approx(at, abs=1e-12)
        assert at >= max(line) - 1e-12
