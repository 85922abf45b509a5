"""Curvature of sum_i w_i l_i over a model's trainable parameters, by products with the model.

Nothing per example is ever stored. `sampled` fixes a random part of the rows, `stream` draws
another one for every product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from u2a.batch import Batch
from u2a.curvature.base import Curvature
from u2a.curvature.features import row_features
from u2a.curvature.stream import Stream, drawn
from u2a.dual import parts
from u2a.linearize import Linearized, Mode, linearize
from u2a.losses.base import refuse_partner
from u2a.parallel import is_parallel
from u2a.products import Batches, Loss, Refs, ggnvp, gradient, hvp, jvp_scores, quadratic
from u2a.tree import Tree, signs_like, trainable


class ModelCurvature(Curvature):
    """Curvature of sum_i w_i l_i (mean over rows without weights); arguments as `u2a.hvp`.

    `linearize` (`GaussNewton` and `Hessian`): the first product holds the activations of all
    batches, see `u2a.linearize`; then each costs less, and `matmat` shares them. `release` lets
    them go.
    """

    mode: Mode | None = None

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        *,
        weights: Tensor | None = None,
        ref: Refs = None,
        probes: int = 16,
        seed: int = 0,
        linearize: bool = False,
    ) -> None:
        if linearize and self.mode is None:
            raise ValueError(f"{type(self).__name__}: linearize goes with GaussNewton and Hessian")
        if probes < 1:
            raise ValueError(f"{type(self).__name__}: probes must be at least 1, got {probes}")
        self.model, self.batches, self.loss = model, batches, loss
        self.weights, self.ref = weights, ref
        self.probes, self.seed, self.linearize = probes, seed, linearize
        self._held: Linearized | None = None

    def held(self) -> Linearized:
        """The linearised products, recorded on first use."""
        assert self.mode is not None
        if self._held is None:
            self._held = linearize(
                self.model, self.batches, self.loss, weights=self.weights, ref=self.ref,
                mode=self.mode,
            )  # fmt: skip
        return self._held

    def release(self) -> None:
        self._held = None

    def matmat(self, vs: Sequence[Tree]) -> list[Tree]:
        return self.held().matmat(vs) if self.linearize else super().matmat(vs)

    @property
    def like(self) -> Mapping[str, Tensor]:
        return trainable(self.model)

    @property
    def _batches(self) -> list[Batch]:
        return [self.batches] if isinstance(self.batches, Batch) else list(self.batches)

    @property
    def rows(self) -> int:
        return sum(map(len, self._batches))

    def _part(self, chosen: Tensor) -> Self:
        """The same on the rows of these numbers (ascending), weighted to keep the expectation."""
        refuse_partner(self.loss, "sampled")
        weights = None if self.weights is None else self.weights * (self.rows / len(chosen))
        taken: list[Batch] = []
        refs: Any = self.ref if self.ref is None or isinstance(self.ref, Tensor) else []
        start = 0
        for i, batch in enumerate(self._batches):
            at = chosen[(chosen >= start) & (chosen < start + len(batch))] - start
            start += len(batch)
            if not len(at):
                continue
            at = at.to(batch.ids.device)
            width = int(batch.length[at].max())
            ids, answer = batch.ids[at, :width], batch.answer[at, :width]
            taken.append(Batch(ids, answer, batch.length[at], batch.index[at]))
            if isinstance(refs, list):
                refs.append(self.ref[i][at])  # type: ignore[index]
        return type(self)(
            self.model, taken, self.loss, weights=weights, ref=refs, probes=self.probes,
            seed=self.seed, linearize=self.linearize,
        )  # fmt: skip

    def mean_eigenvalue(self) -> float:
        """Hutchinson's estimate in one pass where there are batches enough: they are dealt into at
        most `probes` groups, and each meets sign vectors of its own, `probes` in all.

        Unbiased. Variance: 2 / (p^2 each) times the sum over the groups of squared off-diagonal
        entries, `each` the vectors per group: that of `probes` vectors where groups are alike.
        """
        if is_parallel(self.model):  # ranks may have different numbers of batches
            return super().mean_eigenvalue()
        batches, groups = self._batches, min(self.probes, len(self._batches))
        bounds = [k * len(batches) // groups for k in range(groups + 1)]
        generator = torch.Generator().manual_seed(self.seed)
        total, each = 0.0, -(-self.probes // groups)
        for start, stop in pairwise(bounds):
            ref = self.ref if self.ref is None or isinstance(self.ref, Tensor) else (
                self.ref[start:stop]
            )  # fmt: skip
            group = type(self)(
                self.model, batches[start:stop], self.loss, weights=self.weights, ref=ref
            )
            share = 1.0 if self.weights is not None else group.rows / self.rows
            values = [group.quadratic(signs_like(self.like, generator)) for _ in range(each)]
            total += share * sum(values) / each
        return total / self.shape[0]

    def sampled(self, rows: int, seed: int = 0) -> Self:
        """The same on a fixed sample of `rows` rows drawn without replacement: an unbiased
        estimate, and one matrix, so that every solver may be used on it."""
        return self._part(drawn(self.rows, rows, seed, 0))

    def stream(self, rows: int, seed: int = 0) -> Stream:
        """A product draws `rows` rows of its own: see `Stream`."""
        return Stream(self, rows, seed)


class GaussNewton(ModelCurvature):
    """Positive semidefinite: see `u2a.ggnvp` for which matrix it is with which loss.

    `mean_eigenvalue` costs dual forwards only; `diagonal` estimates below 0 are set to 0.
    """

    mode = "ggn"

    def matvec(self, v: Tree) -> Tree:
        if self.linearize:
            return self.held().matvec(v)
        return ggnvp(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)

    def quadratic(self, v: Tree) -> float:
        if self.linearize:
            return self.held().quadratics([v])[0]
        return quadratic(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)


class Hessian(ModelCurvature):
    """The exact Hessian. Indefinite for language models: `u2a.solve` shifts it by a Lanczos bound
    unless a damping is given as a number, or takes it as it is with "minres"."""

    definite = False
    mode = "hvp"

    def matvec(self, v: Tree) -> Tree:
        if self.linearize:
            return self.held().matvec(v)
        return hvp(self.model, self.batches, self.loss, v, weights=self.weights, ref=self.ref)


class EmpiricalFisher(ModelCurvature):
    """sum_i w_i g_i g_i^T, g_i the gradient of row i's loss at its own answer; weights 1/n, or as
    given, all at least 0. A product costs one dual forward and one gradient.

    `roots` stores the gradients, for "woodbury" and "datainf".
    """

    def _weights(self) -> tuple[Tensor, Tensor]:
        """(row numbers in ascending order, their weights), on the CPU."""
        parts(self.model)  # refuses several ranks: 1/n here is of this one's rows
        index = torch.cat([b.index for b in self._batches]).cpu().sort().values
        if len(index.unique()) < len(index):
            raise ValueError("EmpiricalFisher: every row needs a Batch.index of its own")
        if self.weights is None:
            return index, torch.full((len(index),), 1 / len(index), dtype=torch.float64)
        w = self.weights.detach().cpu()[index].double()
        if not bool((w >= 0).all()):
            raise ValueError(f"EmpiricalFisher: weights must be at least 0, got {w.min():.3g}")
        return index, w

    def matvec(self, v: Tree) -> Tree:
        index, w = self._weights()
        scores = jvp_scores(self.model, self.batches, self.loss, v, ref=self.ref)
        along = scores.new_zeros(int(index.max()) + 1)
        along[index.to(along.device)] = w.to(scores) * scores
        return gradient(self.model, self.batches, self.loss, weights=along, ref=self.ref)

    def quadratic(self, v: Tree) -> float:
        _, w = self._weights()
        scores = jvp_scores(self.model, self.batches, self.loss, v, ref=self.ref)
        return float((w * scores.cpu().double().square()).sum())

    def roots(self) -> Tensor:
        """Rows sqrt(w_i) g_i `[n, p]`, in the order of `like`: their Gram sum is this matrix."""
        index, w = self._weights()
        found = row_features(self.model, self._batches, self.loss, self.ref)
        order = torch.cat([b.index for b in self._batches]).cpu().argsort()
        return found[order.to(found.device)] * w.sqrt().to(found)[:, None]
