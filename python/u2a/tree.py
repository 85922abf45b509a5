"""Vectors in parameter space: {parameter name: tensor}, and the little arithmetic they need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from u2a.parallel import placed_like, unwrapped, whole
from u2a_kernels._segments import accum_dtype

Tree = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad, by name; a tied parameter appears once."""
    found = {n: p for n, p in unwrapped(model).named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{type(model).__name__}: no parameter has requires_grad")
    return found


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    return {name: torch.zeros_like(t, requires_grad=False) for name, t in tree.items()}


def sums_like(tree: Mapping[str, Tensor], terms: int) -> Tree:
    """Zeros for that many terms to be added to, then `cast_like` the tree: float32 where a
    narrower type would round every sum on the way."""
    if terms < 2:
        return zeros_like(tree)
    return {
        name: torch.zeros_like(t, dtype=accum_dtype(t), requires_grad=False)
        for name, t in tree.items()
    }


def cast_like(tree: Tree, like: Mapping[str, Tensor]) -> Tree:
    return {name: t.to(like[name].dtype) for name, t in tree.items()}


def scaled(tree: Mapping[str, Tensor], factor: float | Tensor) -> Tree:
    return {name: t * factor for name, t in tree.items()}


def add_(tree: Tree, other: Mapping[str, Tensor], factor: float = 1.0) -> Tree:
    """tree += factor * other, in place and returned; names missing in `other` count as zero."""
    for name, t in other.items():
        tree[name].add_(t, alpha=factor)
    return tree


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Inner product over the names both have, accumulated in float64 (0-dim)."""
    parts = [whole(torch.sum(t.double() * b[name].double())) for name, t in a.items() if name in b]
    return torch.stack([p.to(parts[0].device) for p in parts]).sum()


def norm(tree: Mapping[str, Tensor]) -> Tensor:
    return dot(tree, tree).sqrt()


def signs_like(tree: Mapping[str, Tensor], generator: torch.Generator) -> Tree:
    """Rademacher vector drawn on the CPU, hence the same on every device."""
    return {
        name: placed_like(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1, t)
        for name, t in tree.items()
    }


def numel(tree: Mapping[str, Tensor]) -> int:
    return sum(t.numel() for t in tree.values())


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """One vector, float64 if any part is, else float32, on the device of the first part."""
    parts = list(tree.values())
    wide = any(t.dtype == torch.float64 for t in parts)
    dtype = torch.float64 if wide else torch.float32
    return torch.cat([whole(t.detach()).reshape(-1).to(parts[0].device, dtype) for t in parts])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """Inverse of `flatten`, with the shapes, dtypes and devices of `like`."""
    parts = vector.split([t.numel() for t in like.values()])
    return {
        name: placed_like(part.view(t.shape), t)
        for (name, t), part in zip(like.items(), parts, strict=True)
    }
