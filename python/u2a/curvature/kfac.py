"""K-FAC and EK-FAC: a block per layer, a Kronecker product of two small matrices, with an inverse.

Block of a linear layer: Q_out x Q_in diag(values) (Q_out x Q_in)^T, Q the eigenvectors of
sum_t g_t g_t^T and of the mean of x_t x_t^T over tokens; a bias or norm weight has a diagonal one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from u2a.batch import Batch
from u2a.curvature.base import Curvature, Sum, undamped
from u2a.curvature.factors import (
    Accumulate,
    Bases,
    Covariance,
    Squares,
    stacked,
)
from u2a.curvature.features import turned
from u2a.curvature.model import ModelCurvature
from u2a.curvature.sources import Labels, Roots, Source, sources
from u2a.curvature.stream import Stream
from u2a.index.engine import capture
from u2a.products import Batches, Loss, Refs
from u2a.tree import Tree, trainable


@dataclass
class Block:
    """One parameter: eigenvectors `bases`, eigenvalues `values [E, d_out, d_in]`; `turned`: kept
    as [d_in, d_out] by its module."""

    shape: tuple[int, ...]
    bases: Bases
    values: Tensor
    turned: bool = False

    def _to(self, v: Tensor) -> Tensor:
        v = v.to(self.values.dtype)
        return (v.T if self.turned else v).reshape(stacked(self.shape))

    def _from(self, v: Tensor, like: Tensor) -> Tensor:
        v = v.reshape(self.shape)
        return (v.T if self.turned else v).reshape(like.shape).to(like.dtype)

    def apply(self, v: Tensor, values: Tensor) -> Tensor:
        """Q (values * Q^T v Q) Q^T."""
        q_in, q_out = self.bases.inner, self.bases.outer
        x = self._to(v)
        if q_in is None or q_out is None:
            return self._from(values * x, v)
        x = values * (q_out.mT @ x @ q_in)
        return self._from(q_out @ x @ q_in.mT, v)

    def diagonal(self, like: Tensor) -> Tensor:
        q_in, q_out = self.bases.inner, self.bases.outer
        if q_in is None or q_out is None:
            return self._from(self.values, like)
        return self._from(q_out.square() @ self.values @ q_in.mT.square(), like)


class KFAC(Curvature):
    """Kronecker-factored curvature with its exact inverse; arguments as `u2a.hvp`.

    Args:
        labels: "sampled" (answers drawn from the model; approximates `GaussNewton`) or "data"
            (the rows' own; approximates `EmpiricalFisher`).
        draws: answers drawn per row; seed: of the draws.
        max_dim: widest side of a layer; its factor is decomposed in float64.

    Raises:
        UnsupportedModel: parameters that the capture engine or this method cannot treat, by name.

    Blocks: (sum_t g_t g_t^T) x (mean over tokens of x_t x_t^T), tokens independent.

    Source: Martens and Grosse, arXiv 1503.05671; weight sharing: Eschenhagen et al. 2311.00636.
    """

    corrected = False
    probes = 0

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        *,
        weights: Tensor | None = None,
        ref: Refs = None,
        labels: Labels = "sampled",
        draws: int = 1,
        seed: int = 0,
        max_dim: int = 8192,
    ) -> None:
        if labels not in ("sampled", "data"):
            raise ValueError(f"kfac: labels must be 'sampled' or 'data', got {labels!r}")
        found = [batches] if isinstance(batches, Batch) else list(batches)
        self._fit(model, [Source(found, loss, weights, ref, labels)], draws, seed, max_dim)

    @classmethod
    def of(cls, operator: Any, *, draws: int = 1, seed: int = 0, max_dim: int = 8192) -> Self:
        """Factors that approximate an operator: `GaussNewton` and `Hessian` (whose Gauss-Newton
        part it is) with sampled labels, `EmpiricalFisher` with the data's, or a `Sum` of them (with
        the size of its coefficients)."""
        if type(operator) is cls:
            return operator
        made = cls.__new__(cls)
        made._fit(*sources(operator), draws, seed, max_dim)
        return made

    def _fit(
        self, model: nn.Module, data: list[Source], draws: int, seed: int, max_dim: int
    ) -> None:
        if draws < 1:
            raise ValueError(f"kfac: draws must be at least 1, got {draws}")
        self._like = {n: p.detach() for n, p in trainable(model).items()}
        flipped = turned(model)
        first = Accumulate(Covariance, max_dim)
        _pass(model, data, first, draws, seed, once=False)
        self.blocks: dict[str, Block] = {}
        for name, rule in first.rules.items():
            vector = rule.squares is not None
            bases, values = (Bases(), rule.squares) if vector else rule.bases()
            self.blocks[name] = Block(rule.full, bases, values, name in flipped)
        if self.corrected:
            second = Accumulate(lambda n, s, like: Squares(n, s, like, self.blocks[n].bases))
            # Draws of its own: in a basis fitted to the same ones small values come out too small.
            _pass(model, data, second, draws, seed + len(data), once=True)
            for name, rule in second.rules.items():
                self.blocks[name].values = rule.squares

    @property
    def like(self) -> Mapping[str, Tensor]:
        return self._like

    def matvec(self, v: Tree) -> Tree:
        return {n: self.blocks[n].apply(t, self.blocks[n].values) for n, t in v.items()}

    def inverse(self, v: Tree, damping: float) -> Tree:
        """(A + damping I)^-1 v."""
        blocks = self.blocks
        return {n: blocks[n].apply(t, 1 / (blocks[n].values + damping)) for n, t in v.items()}

    def eigenvalues(self) -> Tensor:
        """All of them, `[p]`, in no order."""
        return torch.cat([b.values.flatten() for b in self.blocks.values()])

    def mean_eigenvalue(self) -> float:
        return float(self.eigenvalues().double().mean())

    def diagonal(self) -> Tree:
        return {n: self.blocks[n].diagonal(t) for n, t in self._like.items()}


class EKFAC(KFAC):
    """`KFAC` with eigenvalues measured in its eigenbasis: sums over examples of the squares of
    Q_out^T G_b Q_in. A second pass over the data; per-example gradients exist a few at a time.

    Source: George et al., arXiv 1806.03884; for influence Grosse et al., arXiv 2308.03296.
    """

    corrected = True


def _pass(
    model: nn.Module, data: list[Source], spec: Accumulate, draws: int, seed: int, *, once: bool
) -> None:
    """One forward and backward of activations per batch (and draw), into the rules of `spec`."""
    with capture(model, spec) as run:
        for i, source in enumerate(data):
            for batch, loss, ref in Roots(source, draws, seed + i).batches(run):
                spec.fresh()
                run.features(batch, loss, ref)
                if once:
                    spec.check_once()
        run.check_used()


def positive_diagonal(operator: Any, draws: int = 8) -> Tree:
    """A diagonal for `u2a.solve` to divide by: of a model's curvature from sums of squared
    gradients (`fisher_diagonal`), which has no negative entries and far less noise than random
    probes; of other operators their own."""
    operator, _ = undamped(operator)
    if isinstance(operator, ModelCurvature | Stream | Sum) and operator.probes:
        return fisher_diagonal(operator, draws=draws)
    found: Tree = operator.diagonal()
    return found


def fisher_diagonal(operator: Any, *, draws: int = 1, seed: int = 0) -> Tree:
    """Diagonal of the matrix that `KFAC.of(operator)` approximates, exact for an empirical Fisher:
    sums of squared per-example gradients, which exist a few at a time."""
    model, data = sources(operator)
    spec = Accumulate(lambda n, s, like: Squares(n, s, like, Bases()))
    _pass(model, data, spec, draws, seed, once=True)
    flipped = turned(model)
    return {
        name: Block(
            spec.rules[name].full, Bases(), spec.rules[name].squares, name in flipped
        ).diagonal(p.detach())
        for name, p in trainable(model).items()
    }
