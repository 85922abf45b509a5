"""Kronecker factors of a model's layers, accumulated while the capture engine runs.

Two kinds of rule take the place of features in `u2a.index`: `Covariance` adds up x x^T and g g^T
of every token, `Squares` the squares of per-example gradients seen in two bases, some examples at a
time. Neither keeps anything per example; their "features" are one zero.
Layers are stacks [E, d_out, d_in]: E = 1 but for fused experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from u2a.dual_modules import UnsupportedModel
from u2a_kernels import grad_project

BLOCK = 1 << 22  # numbers of per-example gradients held at a time


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def stacked(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(E, d_out, d_in); a vector is (1, d, 1)."""
    if len(shape) == 1:
        return 1, shape[0], 1
    return (1, *shape) if len(shape) == 2 else shape  # type: ignore[return-value]


@dataclass(frozen=True)
class Bases:
    """Orthonormal columns `inner [E, d_in, d_in]` and `outer [E, d_out, d_out]`; None: identity."""

    inner: Tensor | None = None
    outer: Tensor | None = None


class _Accumulator:
    """What both rules share; `calls` counts the taps met since `fresh`."""

    shape = (1,)

    def __init__(self, name: str, shape: tuple[int, ...], like: Tensor) -> None:
        self.name, self.full = name, shape
        self.stack, self.d_out, self.d_in = stacked(shape)
        self.calls = 0
        self.squares: Tensor | None = None
        if len(shape) == 1:
            self.squares = torch.zeros(1, self.d_out, 1, dtype=wide(like), device=like.device)

    def rows(self, rows: Tensor) -> Tensor:
        """A vector's per-example gradients `[B, d]`."""
        self.calls += 1
        assert self.squares is not None
        self.squares += rows.to(self.squares).square().sum(0)[None, :, None]
        return rows.new_zeros(len(rows), 1)

    def outer(self, kept: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        return self.experts(kept, g, offsets, 1)

    def experts(self, kept: Tensor, g: Tensor, offsets: Tensor, experts: int) -> Tensor:
        self.calls += 1
        ends = offsets.tolist()
        examples = (len(ends) - 1) // experts
        for e in range(experts):
            mine = ends[e * examples : (e + 1) * examples + 1]
            self._add(e, kept[mine[0] : mine[-1]], g[mine[0] : mine[-1]], mine)
        return kept.new_zeros(examples, 1)

    def _add(self, e: int, kept: Tensor, g: Tensor, ends: list[int]) -> None:
        raise NotImplementedError


class Covariance(_Accumulator):
    """`inner` = sum over tokens of x x^T, `outer` = sum of g g^T, `tokens` how many there were."""

    def __init__(self, name: str, shape: tuple[int, ...], like: Tensor) -> None:
        super().__init__(name, shape, like)
        if self.squares is not None:
            return
        options: Any = {"dtype": wide(like), "device": like.device}
        self.inner = torch.zeros(self.stack, self.d_in, self.d_in, **options)
        self.outer_sum = torch.zeros(self.stack, self.d_out, self.d_out, **options)
        self.tokens = [0] * self.stack

    def keep(self, x: Tensor) -> Tensor:
        return x

    def _add(self, e: int, kept: Tensor, g: Tensor, ends: list[int]) -> None:
        x = kept.to(self.inner.dtype)
        self.inner[e].addmm_(x.T, x)
        self.tokens[e] += len(x)
        if not g.is_floating_point():  # rows of an embedding: unit vectors
            count = torch.bincount(g, minlength=self.d_out)
            self.outer_sum[e].diagonal().add_(count)
            return
        g = g.to(self.inner.dtype)
        self.outer_sum[e].addmm_(g.T, g)

    def bases(self) -> tuple[Bases, Tensor]:
        """Eigenvectors of both factors and the K-FAC eigenvalues `[E, d_out, d_in]`: those of
        (sum g g^T) x (mean x x^T). Decomposed in float64."""
        tokens = torch.tensor(self.tokens, device=self.inner.device).clamp_min(1)
        mean = self.inner.double() / tokens[:, None, None]
        low, q_in = torch.linalg.eigh(mean)
        top, q_out = torch.linalg.eigh(self.outer_sum.double())
        values = top.clamp_min(0)[:, :, None] * low.clamp_min(0)[:, None, :]
        like = self.inner
        return Bases(q_in.to(like), q_out.to(like)), values.to(like)


class Squares(_Accumulator):
    """`squares [E, d_out, d_in]` = sum over examples of (Q_out^T G_b Q_in)^2, entry by entry."""

    def __init__(self, name: str, shape: tuple[int, ...], like: Tensor, bases: Bases) -> None:
        super().__init__(name, shape, like)
        self.inner_t: Tensor | None = None
        self.outer_t: Tensor | None = None
        options: Any = {"dtype": wide(like), "device": like.device}
        self.squares = torch.zeros(self.stack, self.d_out, self.d_in, **options)
        if bases.inner is not None and bases.outer is not None:
            self.inner_t = bases.inner.transpose(1, 2).contiguous()
            self.outer_t = bases.outer.transpose(1, 2).contiguous()

    def keep(self, x: Tensor) -> Tensor:
        x = x.to(wide(x))
        return x if self.inner_t is None or self.stack > 1 else x @ self.inner_t[0].T

    def _add(self, e: int, kept: Tensor, g: Tensor, ends: list[int]) -> None:
        p_in = None if self.inner_t is None or self.stack == 1 else self.inner_t[e]
        p_out = None if self.outer_t is None else self.outer_t[e]
        if p_out is None and not g.is_floating_point():
            p_out = torch.eye(self.d_out, dtype=kept.dtype, device=kept.device)
        at = torch.tensor(ends, device=kept.device, dtype=torch.int32) - ends[0]
        step = max(1, BLOCK // (self.d_out * self.d_in))
        assert self.squares is not None
        for b in range(0, len(ends) - 1, step):
            stop = min(b + step, len(ends) - 1)
            rows = slice(ends[b] - ends[0], ends[stop] - ends[0])
            block = grad_project(
                kept[rows].contiguous(), g[rows].contiguous(), at[b : stop + 1] - at[b], p_in, p_out
            )
            assert isinstance(block, Tensor)
            self.squares[e] += block.square().sum(0)


class Accumulate:
    """A `Spec` for `u2a.index.capture` whose rules are made by `make` and stay in `rules`."""

    shared = True

    def __init__(
        self, make: Callable[[str, tuple[int, ...], Tensor], Any], max_dim: int | None = None
    ) -> None:
        self.make, self.max_dim = make, max_dim
        self.rules: dict[str, Any] = {}

    def rule(self, name: str, shape: tuple[int, ...], like: Tensor) -> Any:
        side = max(shape[-2:]) if len(shape) > 1 else 0
        if self.max_dim is not None and side > self.max_dim:
            raise UnsupportedModel(
                f"{name}: a side of {side} would need a {side} x {side} factor; freeze it or raise "
                f"max_dim={self.max_dim}",
                "u2a.curvature: Kronecker factors",
            )
        self.rules[name] = self.make(name, shape, like)
        return self.rules[name]

    def describe(self) -> dict[str, Any]:
        raise TypeError("curvature factors are no features to be stored")

    def fresh(self) -> None:
        """Before a batch."""
        for rule in self.rules.values():
            rule.calls = 0

    def check_once(self) -> None:
        """After a batch: squares of parts of a gradient are not those of their sum."""
        if many := sorted(name for name, rule in self.rules.items() if rule.calls > 1):
            raise UnsupportedModel(
                [f"{n}: used more than once in a forward (a tied or large head?)" for n in many],
                "u2a.curvature: EK-FAC wants each parameter used once, freeze the others",
            )


def uniform(n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """n numbers in [0, 1), drawn on the CPU: the same on every device."""
    return torch.rand(n, generator=generator, dtype=torch.float64).to(like.device, wide(like))


def sample_rows(logits: Iterator[Tensor], u: Tensor) -> Tensor:
    """A class per row from softmax(logits) by inversion; `logits` comes in pieces of rows."""
    found, start = [], 0
    for z in logits:
        at = torch.softmax(z, -1).cumsum(-1)
        mine = u[start : start + len(z), None] * at[:, -1:]
        start += len(z)
        found.append(torch.searchsorted(at, mine, right=True)[:, 0].clamp_max(z.shape[1] - 1))
    return torch.cat(found) if found else u.new_zeros(0, dtype=torch.int64)
