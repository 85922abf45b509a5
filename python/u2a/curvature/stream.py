"""Parts of the rows: a fixed sample, or another one for every product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from u2a.curvature.base import Curvature
from u2a.tree import Tree

if TYPE_CHECKING:
    from u2a.curvature.model import ModelCurvature


def drawn(n: int, rows: int, seed: int, draw: int) -> Tensor:
    """Row numbers of draw number `draw`: shuffled epochs cut into pieces of `rows`."""
    if not 1 <= rows <= n:
        raise ValueError(f"rows must be in [1, {n}], the rows there are; got {rows}")
    each = n // rows
    epoch, part = divmod(draw, each)
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(n, generator=generator)
    return order[part * rows : (part + 1) * rows].sort().values


class Stream(Curvature):
    """An operator whose every product is that of another part of the rows (for "neumann").

    `draw` counts the products, and draw k holds the same rows in every run. The mean eigenvalue
    and the diagonal are those of draw 0.
    """

    stochastic = True

    def __init__(self, operator: ModelCurvature, rows: int, seed: int = 0) -> None:
        self.operator, self.size, self.seed, self.draw = operator, rows, seed, 0
        self.definite, self.probes = operator.definite, operator.probes
        self._first = operator._part(drawn(operator.rows, rows, seed, 0))

    @property
    def like(self) -> Mapping[str, Tensor]:
        return self.operator.like

    def matvec(self, v: Tree) -> Tree:
        chosen = drawn(self.operator.rows, self.size, self.seed, self.draw)
        self.draw += 1
        part = self.operator._part(chosen)
        part.linearize = False  # one product each
        return part.matvec(v)

    def mean_eigenvalue(self) -> float:
        return self._first.mean_eigenvalue()

    def diagonal(self) -> Tree:
        return self._first.diagonal()
