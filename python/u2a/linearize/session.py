"""One call of one module on a fixed batch: what its tangent needs, held, and its tangent sweep.

`record` runs the primal rows, `seen` gets the loss gradient g at its output, `sweep` maps the
tangents of its inputs, K directions as K B rows, to those of its output. A sweep is linear in them.
Its backward is the transpose, which is all that Gauss-Newton needs; for the Hessian it adds what g
meets in the second derivative, so that an ordinary backward of the sweep is the tangent of the
gradient (Pearlmutter, Neural Computation 6, 1994).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Sink(Protocol):
    """Takes the parts of each parameter's product instead of their sum over the examples; with one
    direction. x `[M, d_in]`, g `[M, d_out]`, an example's rows together."""

    def outer(self, p: Tensor, x: Tensor, g: Tensor) -> None:
        """sum_t g_t x_t^T, seen as [d_out, d_in]."""

    def grouped(self, p: Tensor, x: Tensor, g: Tensor, ends: Tensor, owner: Tensor) -> None:
        """The same in groups that end at `ends`, rows of the examples `owner`."""

    def rows(self, p: Tensor, g: Tensor) -> None:
        """sum_t g_t."""

    def lookup(self, p: Tensor, ids: Tensor, g: Tensor, padding_idx: int | None) -> None:
        """sum_t e_id g_t^T."""


class Session:
    """What the handlers look at: the calls of the running batch in their order, the directions.

    `k` directions of `rows` examples; `second [k, rows]` collects v^T H_i v where it is set;
    `owner`: the examples of rows that are out of order.
    """

    def __init__(self, mode: str, trainable: set[int]) -> None:
        self.mode, self.trainable = mode, trainable
        self.calls: list[Op] = []
        self.at: int | None = None  # the next call of a sweep; None while recording
        self.k = self.rows = 1
        self.leaves: dict[int, Tensor] = {}
        self.roots: list[Tensor] = []
        self.second: Tensor | None = None
        self.owner: Tensor | None = None
        self.sink: Sink | None = None

    @property
    def hvp(self) -> bool:
        return self.mode == "hvp"

    def run(self, make: Callable[[], Op], *inputs: Any) -> Any:
        if self.at is None:
            op = make()
            self.calls.append(op)
            return op.record(*inputs)
        op = self.calls[self.at]
        self.at += 1
        return op.sweep(*inputs)

    def direction(self, p: Tensor | None) -> Tensor | None:
        return None if p is None else self.leaves.get(id(p))

    def learns(self, p: Tensor | None) -> bool:
        return p is not None and id(p) in self.trainable

    def split(self, x: Tensor) -> Tensor:
        """K directions apart: [K, R, ...]."""
        return x.unflatten(0, (self.k, -1))

    def add_second(self, parts: Tensor) -> None:
        """parts `[K, R, ...]`, R a multiple of the examples in their order, or as `owner` says."""
        if self.second is None:
            return
        if self.owner is None:
            self.second += parts.reshape(self.k, self.rows, -1).sum(-1)
        else:
            self.second.index_add_(1, self.owner, parts.flatten(2).sum(-1).to(self.second))


class Op:
    g: Tensor | None = None

    def __init__(self, session: Session) -> None:
        self.session = session

    def watched(self, y: Tensor) -> Tensor:
        """y, whose gradient `seen` will get."""
        if self.session.hvp and y.requires_grad:
            y.register_hook(self.seen)
        return y

    def seen(self, g: Tensor) -> None:
        raise NotImplementedError

    def record(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def sweep(self, *tangents: Any) -> Any:
        raise NotImplementedError


class Constant(Op):
    """A value that the primal rows choose; sweeps get the same."""

    def __init__(self, session: Session, make: Callable[..., Any]) -> None:
        super().__init__(session)
        self.make = make

    def record(self, *inputs: Any) -> Any:
        self.value = self.make(*inputs)
        return self.value

    def sweep(self, *_: Any) -> Any:
        return self.value
