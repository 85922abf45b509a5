"""What is kept of a per-example gradient: one sketch for all parameters, or numbers per parameter.

A rule answers for one parameter. It meets a weight as outer products sum_t g_t x_t^T (never formed
unless that is what is asked for), a bias or norm weight as `[B, d]` rows, fused experts as outer
products over (expert, example) segments. Weights are seen as [d_out, d_in], an nn.Linear's layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import torch
from torch import Tensor

from u2a_kernels import grad_project, grad_sketch, rademacher


class Rule(Protocol):
    """How one parameter's per-example gradients become numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's features."""

    def keep(self, x: Tensor) -> Tensor:
        """What of the inputs `[N, d_in]` the backward needs."""

    def outer(self, kept: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        """Features `[B, *shape]` of sum_t g_t x_t^T; g `[N, d_out]`, or `[N]` ids: one-hot rows."""

    def rows(self, rows: Tensor) -> Tensor:
        """Features of a vector-shaped gradient given as `[B, d]`."""

    def experts(self, kept: Tensor, g: Tensor, offsets: Tensor, experts: int) -> Tensor:
        """Features of a stack of weights; `offsets [E*B+1]`, expert by expert."""


class Spec(Protocol):
    """A kind of feature: `u2a.index.Sketch`, `Kronecker` or `Full`."""

    shared: bool  # all parameters add into the same numbers

    def rule(self, name: str, shape: tuple[int, ...], like: Tensor) -> Rule:
        """For the parameter `name`; shape (d,), (d_out, d_in) or (experts, d_out, d_in); dtype and
        device of `like`."""

    def describe(self) -> dict[str, Any]:
        """What a store remembers of it; `spec_of` reads it back."""


def seed_of(seed: int, name: str) -> int:
    """A parameter's own seed, from its name: the same in every process and order of modules."""
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _one_token(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, d]` rows as outputs of B one-token examples whose input is 1."""
    b = rows.shape[0]
    return rows.new_ones(b, 1), torch.arange(b + 1, device=rows.device, dtype=torch.int32)


@dataclass(frozen=True)
class Sketch:
    """`u2a_kernels.grad_sketch` of the whole gradient: k numbers per example, all parameters added.

    <s_i, s_j> estimates <grad l_i, grad l_j> without bias and with a variance of about
    (|g_i|^2 |g_j|^2 + <g_i, g_j>^2) / k. `kind`: "tensorsketch", "sjlt" or "rademacher".
    """

    k: int = 4096
    seed: int = 0
    kind: str = "tensorsketch"
    shared = True

    def rule(self, name: str, shape: tuple[int, ...], like: Tensor) -> Rule:
        return _Sketch(self.k, seed_of(self.seed, name), self.kind)

    def describe(self) -> dict[str, Any]:
        return {"features": "sketch", "k": self.k, "seed": self.seed, "kind": self.kind}


@dataclass(frozen=True)
class _Sketch:
    k: int
    seed: int
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.k,)

    def keep(self, x: Tensor) -> Tensor:
        return x

    def outer(self, kept: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        return grad_sketch(kept, g, offsets, self.k, self.seed, kind=self.kind)

    def rows(self, rows: Tensor) -> Tensor:
        x, offsets = _one_token(rows)
        return grad_sketch(x, rows, offsets, self.k, self.seed, kind=self.kind)

    def experts(self, kept: Tensor, g: Tensor, offsets: Tensor, experts: int) -> Tensor:
        """One more factor of signs, that of the expert, keeps the experts' entries apart."""
        each = self.outer(kept, g, offsets).unflatten(0, (experts, -1))  # [E, B, k]
        ones, starts = _one_token(torch.ones(experts, 1, device=each.device, dtype=each.dtype))
        eye = torch.eye(experts, device=each.device, dtype=each.dtype)
        sign = grad_sketch(eye, ones, starts, self.k, seed_of(self.seed, "experts")).sign()
        return torch.einsum("ebk,ek->bk", each, sign)


@dataclass(frozen=True)
class Kronecker:
    """`u2a_kernels.grad_project` per parameter: P_out G P_in^T, k_out x k_in numbers each (LoGra).

    Rademacher projections from the parameter's own seed. A dimension no larger than its k is kept
    as it is; a vector (bias, norm weight) is projected to k_out numbers.
    """

    k_in: int = 16
    k_out: int = 16
    seed: int = 0
    shared = False

    def rule(self, name: str, shape: tuple[int, ...], like: Tensor) -> Rule:
        seed, d_out = seed_of(self.seed, name), shape[-2] if len(shape) > 1 else shape[0]
        d_in = shape[-1] if len(shape) > 1 else 1

        def made(k: int, d: int, side: str) -> Tensor | None:
            if k >= d:
                return None
            return rademacher(k, d, seed, side, dtype=like.dtype, device=like.device)

        return _Kronecker(shape, made(self.k_in, d_in, "in"), made(self.k_out, d_out, "out"))

    def describe(self) -> dict[str, Any]:
        sizes = {"k_in": self.k_in, "k_out": self.k_out, "seed": self.seed}
        return {"features": "kronecker", **sizes}


@dataclass(frozen=True)
class Full:
    """The gradient itself, per parameter: for small adapters, and for checks."""

    shared = False

    def rule(self, name: str, shape: tuple[int, ...], like: Tensor) -> Rule:
        return _Kronecker(shape, None, None)

    def describe(self) -> dict[str, Any]:
        return {"features": "full"}


@dataclass(frozen=True, eq=False)
class _Kronecker:
    """Projections `[k, d]`, None where that side is kept whole; `full`: the parameter's shape."""

    full: tuple[int, ...]
    p_in: Tensor | None
    p_out: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, d_out, d_in = self.full if len(self.full) > 1 else (*self.full, 1)
        k_out = d_out if self.p_out is None else len(self.p_out)
        if len(self.full) == 1:
            return (k_out,)
        return *stack, k_out, d_in if self.p_in is None else len(self.p_in)

    def keep(self, x: Tensor) -> Tensor:
        return x if self.p_in is None else x @ self.p_in.to(x.dtype).T

    def outer(self, kept: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
        p_out = self.p_out
        if p_out is None and not g.is_floating_point():
            p_out = torch.eye(self.full[-2], device=kept.device, dtype=kept.dtype)
        return grad_project(kept, g, offsets, None, None if p_out is None else p_out.to(kept.dtype))

    def rows(self, rows: Tensor) -> Tensor:
        return rows if self.p_out is None else rows @ self.p_out.to(rows.dtype).T

    def experts(self, kept: Tensor, g: Tensor, offsets: Tensor, experts: int) -> Tensor:
        return self.outer(kept, g, offsets).unflatten(0, (experts, -1)).transpose(0, 1)


SPECS = {"sketch": Sketch, "kronecker": Kronecker, "full": Full}


def spec_of(facts: Mapping[str, Any]) -> Spec:
    """Inverse of `Spec.describe`."""
    rest = {k: v for k, v in facts.items() if k != "features"}
    made: Spec = SPECS[facts["features"]](**rest)
    return made
