"""LTU's step: the gradients of forgetting and of what holds the model, apart until the step is due.

Source: arXiv 2407.10494; see `u2a.losses.steps.harmonise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from u2a.losses.steps import harmonise


class Harmony:
    """Collects `.grad` of the forget terms beside that of all others, over accumulated batches."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.params = params
        self.forget: dict[str, Tensor | None] = dict.fromkeys(params)

    def _swap(self) -> None:
        for name, p in self.params.items():
            p.grad, self.forget[name] = self.forget[name], p.grad

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """A backward in here is one of a forget term."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def join(self) -> None:
        """Puts the harmonised sum into `.grad`."""
        kept = {n: _filled(p, p.grad) for n, p in self.params.items()}
        lost = {n: _filled(p, self.forget[n]) for n, p in self.params.items()}
        for name, g in harmonise(kept, lost).items():
            self.params[name].grad = g
        self.forget = dict.fromkeys(self.params)


def _filled(like: Tensor, grad: Tensor | None) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad
