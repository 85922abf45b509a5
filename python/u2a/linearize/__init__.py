"""u2a.linearize: a loss on fixed batches at fixed parameters, and its curvature products.

One recording pass holds what every layer's tangent needs. A product then runs tangents alone, K
directions as more rows, so that weights and held activations are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batches, Refs, sequence, with_refs
from u2a.linearize.head import Parts
from u2a.linearize.runner import Held, Runner
from u2a.linearize.session import Sink
from u2a.products import Loss, _weighted
from u2a.tree import Tree, cast_like, sums_like, trainable

Mode = Literal["ggn", "hvp"]
TOGETHER = {"cpu": 4, "cuda": 16}  # directions in one sweep: more leave a CPU's cache


def _derivatives(part: Loss, lp: AnswerLogps, logp_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """(d part / d logp `[n]`, its derivatives along `logp_t [K, n]`, None for a linear loss)."""
    with torch.enable_grad():
        leaf = lp.logp.detach().requires_grad_()
        total = part(lp.with_logp(leaf))
        if not total.requires_grad:
            return torch.zeros_like(leaf), None
        (first,) = torch.autograd.grad(total, leaf, create_graph=True)
        if not first.requires_grad or not len(logp_t):
            return first.detach(), None
        rows = [
            torch.autograd.grad(first, leaf, t, retain_graph=True, allow_unused=True)[0]
            for t in logp_t
        ]
    zero = torch.zeros_like(leaf)
    return first.detach(), torch.stack([zero if r is None else r for r in rows])


class Linearized:
    """Curvature products of sum_i w_i l_i at the parameters it was made with: `u2a.linearize`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        *,
        weights: Tensor | None = None,
        ref: Refs = None,
        mode: Mode = "ggn",
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"u2a.linearize: mode must be 'ggn' or 'hvp', got {mode!r}")
        self.mode, self._model = mode, model
        self.like: dict[str, Tensor] = dict(trainable(model))
        found = sequence(batches)
        self._part = _weighted(loss, weights, sum(map(len, found)))
        self._runner = Runner(model, mode, self.like)
        self._versions = self._now()
        self._held: list[Held] = []
        self._first: list[Tensor] = []
        for batch, r in with_refs(found, ref):
            held = self._runner.record(batch, r)
            first, _ = _derivatives(self._part, held.lp, held.lp.logp.new_empty(0))
            held.seed(first)
            self._held.append(held)
            self._first.append(first)

    def _now(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self._model.parameters()]

    def _check(self) -> None:
        if self._now() != self._versions:
            raise RuntimeError(
                "u2a.linearize: the parameters have changed since this was made; linearize again"
            )

    @property
    def _step(self) -> int:
        return TOGETHER.get(next(iter(self.like.values())).device.type, 4)

    @property
    def nbytes(self) -> int:
        """Bytes held between products, parameters not counted."""
        own = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        seen: dict[int, int] = {}
        for tensor in _tensors(self._held):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())

    def matvec(self, v: Mapping[str, Tensor]) -> Tree:
        """The product with v, {name: tensor} over the trainable parameters; names missing in v
        count as zero."""
        return self.matmat([v])[0]

    def matmat(self, vs: Sequence[Mapping[str, Tensor]]) -> list[Tree]:
        """The products with several directions, 4 (CPU) or 16 (GPU) of them in one sweep."""
        self._check()
        out: list[Tree] = []
        for start in range(0, len(vs), self._step):
            some = vs[start : start + self._step]
            total = [sums_like(self.like, len(self._held)) for _ in some]
            leaves = self._stacked(some)
            for held, first in zip(self._held, self._first, strict=True):
                for name, t in self._product(held, first, leaves, len(some)).items():
                    for tree, each in zip(total, t, strict=True):
                        tree[name] += each
            out += [cast_like(t, self.like) for t in total]
        return out

    def quadratics(self, vs: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """v^T A v of several directions; Gauss-Newton ones cost a forward sweep only."""
        out: list[float] = []
        for start in range(0, len(vs), self._step):
            rows = [r.double() for r in self.row_quadratics(vs[start : start + self._step])]
            out += sum(r.sum(1) for r in rows).tolist()  # type: ignore[union-attr]
        return out

    @torch.no_grad()
    def row_quadratics(self, vs: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """What each row adds to v^T A v, one `[K, B]` per batch. Where rows meet in a scalar loss,
        a mixed term counts for the row of its first factor."""
        self._check()
        leaves, k = self._stacked(vs), len(vs)
        out = []
        for held, first in zip(self._held, self._first, strict=True):
            s = self._runner.sweep(held, leaves, k, second=self.mode == "hvp")
            tangents = s.h_t, s.weight_t, s.bias_t
            if self.mode == "ggn":
                tokens = held.head.curvature(*tangents) * first.abs()
            else:
                logp_t = held.head.logp_t(*tangents)
                _, second = _derivatives(self._part, held.lp, logp_t)
                tokens = held.head.logp_tt(*tangents) * first
                if second is not None:
                    tokens = tokens + second * logp_t
            rows = tokens.new_zeros(k, held.rows).index_add_(1, held.lp.row, tokens)
            out.append(rows if s.second is None else rows + s.second)
        return out

    def _stacked(self, vs: Sequence[Mapping[str, Tensor]]) -> Tree:
        for v in vs:
            for name, t in v.items():
                p = self.like.get(name)
                if p is None:
                    raise ValueError(f"u2a.linearize: {name!r} is no trainable parameter")
                if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
                    raise ValueError(
                        f"u2a.linearize: {name!r} must be like its parameter, {list(p.shape)} "
                        f"{p.dtype} on {p.device}, got {list(t.shape)} {t.dtype} on {t.device}"
                    )
        return {
            name: torch.stack(
                [v[name].detach() if name in v else torch.zeros_like(p).detach() for v in vs]
            )
            for name, p in self.like.items()
        }

    def deliver(self, v: Mapping[str, Tensor], sinks: Sequence[tuple[Sink, Parts]]) -> None:
        """The product with v, batch by batch, as parts to a batch's sinks (layers, head)."""
        self._check()
        leaves, session = self._stacked([v]), self._runner.session
        for held, first, (sink, parts) in zip(self._held, self._first, sinks, strict=True):
            session.sink = sink
            try:
                self._product(held, first, leaves, 1, parts)
            finally:
                session.sink = None

    def _product(
        self, held: Held, first: Tensor, directions: Tree, k: int, parts: Parts | None = None
    ) -> Tree:
        """{name: [K, *shape]}."""
        with torch.enable_grad():
            leaves = {n: t.detach().requires_grad_() for n, t in directions.items()}
            s = self._runner.sweep(held, leaves, k)
        with torch.no_grad():
            tangents = s.h_t.detach(), _still(s.weight_t), _still(s.bias_t)
            if self.mode == "ggn":
                found = held.head.ggn(*tangents, first.abs())
            else:
                _, second = _derivatives(self._part, held.lp, held.head.logp_t(*tangents))
                found = held.head.hvp(*tangents, first, second, parts)
        ends = [(s.h_t, found.h), (s.weight_t, found.weight), (s.bias_t, found.bias)]
        live = [(a, g) for a, g in ends if a is not None and a.requires_grad]
        grads = torch.autograd.grad(
            [a for a, _ in live], list(leaves.values()), [g for _, g in live], allow_unused=True
        )
        return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def _still(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _tensors(x: Any, depth: int = 0) -> list[Tensor]:
    """All tensors in recordings; sessions and functions hold none of their own."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [t for y in x for t in _tensors(y, depth)]
    if depth < 3 and type(x).__module__.startswith("u2a.") and hasattr(x, "__dict__"):
        inner = [v for n, v in vars(x).items() if n not in ("session", "fn", "make")]
        return _tensors(inner, depth + 1)
    return []


def linearize(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    weights: Tensor | None = None,
    ref: Refs = None,
    mode: Mode = "ggn",
) -> Linearized:
    """Fixes batches and parameters, so that each curvature product is one sweep of tangents.

    Args:
        model: as in `u2a.dual`; used in evaluation mode, its activations are held.
        batches, loss, weights, ref: as in `u2a.gradient`.
        mode: "ggn": the products of `u2a.ggnvp`; recording costs a forward. "hvp": those of
            `u2a.hvp`; recording costs a forward and a backward of activations.

    Returns:
        `matvec(v)` and `matmat(vs)`, equal to rounding to `u2a.ggnvp` or `u2a.hvp`; `quadratics`;
        `nbytes` held. In linear layers a product costs the tangents' forward and their backward,
        as many as a gradient with LoRA and 4/3 (ggn) or 2 (hvp) of one with full parameters, where
        the stacked products cost 1.5 and 2 (LoRA), 5/3 and 8/3. Attention keeps its probabilities
        where they are few (CPU only), and else costs what it does in the stacked product.

    Raises:
        UnsupportedModel, ValueError: as `u2a.dual` and `u2a.gradient`.
        RuntimeError: on a product after the parameters were changed in place or replaced.

    Equivalent: ``lambda v: u2a.hvp(model, batches, loss, v)``. Source: Pearlmutter (Neural
    Computation 6, 1994), the R-operator with the primal passes kept.
    """
    return Linearized(model, batches, loss, weights=weights, ref=ref, mode=mode)


__all__ = ["Linearized", "Mode", "linearize"]
