"""K-FAC and EK-FAC: a block per layer, a Kronecker product of two small matrices, with an inverse.

Block of a linear layer: Q_out x Q_in diag(values) (Q_out x Q_in)^T, Q the eigenvectors of
sum_t g_t g_t^T and of the mean of x_t x_t^T over tokens; a bias or norm weight has a diagonal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch
from u2a.curvature.base import Curvature, Sum, undamped
from u2a.curvature.factors import (
    Accumulate,
    Bases,
    Covariance,
    Squares,
    sample_rows,
    stacked,
    uniform,
    wide,
)
from u2a.curvature.features import packed, turned
from u2a.curvature.model import EmpiricalFisher, ModelCurvature
from u2a.index.engine import Capture, capture
from u2a.index.packed import Packed, hidden_states, running
from u2a.index.taps import LOGITS
from u2a.products import Batches, Loss, Refs, _adjoint, _weighted, with_refs
from u2a.tree import Tree, trainable
from u2a_kernels import linear_logp

Labels = Literal["sampled", "data"]


@dataclass(frozen=True)
class Source:
    """coef times the curvature of sum_i w_i l_i, as `ModelCurvature` names it."""

    batches: Sequence[Batch]
    loss: Loss
    weights: Tensor | None
    ref: Refs
    labels: Labels
    coef: float = 1.0


def sources(operator: Any) -> tuple[nn.Module, list[Source]]:
    """The model and data behind an operator. Raises ValueError where there are none."""
    operator, _ = undamped(operator)
    if isinstance(operator, Sum):
        parts = [(coef, *sources(op)) for coef, op in operator.terms]
        model = parts[0][1]
        if any(m is not model for _, m, _ in parts):
            raise ValueError("kfac: the terms of a Sum must be of one model")
        return model, [replace(s, coef=s.coef * abs(c)) for c, _, found in parts for s in found]
    if not isinstance(operator, ModelCurvature):
        raise ValueError(
            "kfac: factors are made from a model, wanted a GaussNewton, Hessian, EmpiricalFisher "
            f"or a Sum of them, got {type(operator).__name__}"
        )
    labels: Labels = "data" if isinstance(operator, EmpiricalFisher) else "sampled"
    op = operator
    return op.model, [Source(op._batches, op.loss, op.weights, op.ref, labels)]


class _Roots:
    """Per-row losses r_i with sum_i grad r_i grad r_i^T = curvature, in expectation for "sampled".

    "data": r_i = sqrt(w_i) l_i, the empirical Fisher. "sampled": r_i = sum_t sqrt(c_t) logp(y'_t),
    y' drawn from the model and c_t = |d sum_i w_i l_i / d logp_t|: the Gauss-Newton matrix of
    `u2a.ggnvp`, since scores of different tokens are uncorrelated.
    """

    def __init__(self, source: Source, draws: int, seed: int) -> None:
        self.source, self.draws = source, draws
        self.rows = sum(map(len, source.batches))
        self.generator = torch.Generator().manual_seed(seed)

    def batches(self, run: Capture) -> Iterator[tuple[Packed, Any, Tensor | None]]:
        """Packed batches, each with its root loss and reference."""
        s = self.source
        for batch, r in with_refs(s.batches, s.ref):
            found = packed(batch)
            if s.labels == "data":
                yield found, self._data, r
                continue
            for _ in range(self.draws):
                labelled, c = self._labelled(run, found, r)
                yield labelled, _scaled(c.sqrt()), None

    def _data(self, lp: AnswerLogps) -> Tensor:
        s = self.source
        w = lp.logp.new_full((len(lp.count),), s.coef / self.rows)
        if s.weights is not None:
            assert lp.index is not None
            w = s.coef * s.weights[lp.index.to(s.weights.device)].to(lp.logp)
        return s.loss(lp) * w.sqrt()

    @torch.no_grad()
    def _labelled(self, run: Capture, batch: Packed, ref: Tensor | None) -> tuple[Packed, Tensor]:
        batch = batch.to(run.head.weight.device)
        run.lay(batch)
        s, weight, bias = self.source, run.head.weight, run.head.bias
        with running(batch):
            h = hidden_states(run.backbone, batch).index_select(0, batch.at).to(weight.dtype)
        logp = linear_logp(h, weight, batch.target, bias=bias, softcap=run.softcap)
        r = None if ref is None else ref.to(logp)
        lp = AnswerLogps(logp, batch.row, batch.count, ref=r, index=batch.index)
        c, _ = _adjoint(_weighted(s.loss, s.weights, self.rows), lp)

        def logits() -> Iterator[Tensor]:
            step = max(1, LOGITS // weight.shape[0])
            for start in range(0, len(h), step):
                z = (h[start : start + step] @ weight.T).to(wide(h))
                z = z if bias is None else z + bias.to(z)
                yield z if run.softcap is None else run.softcap * torch.tanh(z / run.softcap)

        target = sample_rows(logits(), uniform(len(h), self.generator, h))
        return replace(batch, target=target), c.abs() * (s.coef / self.draws)


def _scaled(factor: Tensor) -> Loss:
    def loss(lp: AnswerLogps) -> Tensor:
        return lp.with_logp(factor * lp.logp).sequence()

    return loss


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
            _pass(model, data, second, draws, seed, once=True)
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
            for batch, loss, ref in _Roots(source, draws, seed + i).batches(run):
                spec.fresh()
                run.features(batch, loss, ref)
                if once:
                    spec.check_once()
        run.check_used()


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
