"""A repro computes one second-order quantity by one tool, and its float64 truth from primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

RIGHT = {torch.float64: 1e-6, torch.float32: 1e-4}  # norms of transformers go through float32
WRONG = 1e-2  # between the two: approximate, as of finite differences
FLAT = 1e-6  # a tensor below this share of the largest is judged by that share

Found = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Repro:
    tool: str
    quantity: str
    run: Callable[[], Found]


@dataclass(frozen=True)
class Outcome:
    """The entry that is off most, tool's and true, in the tensor that is; `said` if it raised."""

    verdict: str
    got: float = 0.0
    want: float = 0.0
    error: float = 0.0
    said: str = ""


def collected(into: list[Repro], tool: str, quantity: str) -> Callable[[Any], Any]:
    def keep(run: Callable[[], Found]) -> Callable[[], Found]:
        into.append(Repro(tool, quantity, run))
        return run

    return keep


def judge(r: Repro) -> Outcome:
    try:
        got, want = r.run()
    except ModuleNotFoundError as error:
        return Outcome("not installed", said=str(error))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Outcome("raises", said=f"{type(error).__name__}: {(lines or [''])[0]}")
    floor = FLAT * max(float(w.norm()) for w in want)
    dtype, found = got[0].dtype, []
    for g, w in zip(got, want, strict=True):
        g, w = g.detach().double().flatten(), w.detach().flatten()
        at = int((g - w).abs().argmax())
        error = float((g - w).norm() / max(float(w.norm()), floor))
        found.append((error, float(g[at]), float(w[at])))
    error, entry, true = max(found)
    verdict = "right" if error < RIGHT[dtype] else "wrong" if error > WRONG else "approximate"
    return Outcome(verdict, entry, true, error)


def twice(f: Callable[..., Tensor], xs: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """H v by double backward of the scalar f(*xs)."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    first = torch.autograd.grad(f(*xs), xs, create_graph=True)
    live = [(g, v) for g, v in zip(first, vs, strict=True) if g.requires_grad]
    found = torch.autograd.grad(sum((g * v).sum() for g, v in live), xs, allow_unused=True)
    return [torch.zeros_like(x) if h is None else h for x, h in zip(xs, found, strict=True)]


def draws(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """(points, directions), float64."""
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(s, generator=generator).double() for s in shapes] for _ in range(2)]
    return made[0], made[1]


def single(tensors: Sequence[Tensor], device: str | None = None) -> list[Tensor]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return [t.to(device, torch.float32) for t in tensors]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, from primitives."""
    z = q @ k.mT / q.shape[-1] ** 0.5
    z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(1), float("-inf"))
    p = (z - z.amax(-1, keepdim=True).detach()).exp()
    return p / p.sum(-1, keepdim=True) @ v


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return x * ((x * x).mean(-1, keepdim=True) + eps).rsqrt() * w


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    return rms_norm(x - x.mean(-1, keepdim=True), w, eps) + b


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Mean of -log softmax(h w^T)[y], from primitives."""
    z = h @ w.T
    z = z - z.amax(-1, keepdim=True).detach()
    return (z.exp().sum(-1).log() - z.gather(1, y[:, None])[:, 0]).mean()


@cache
def targets() -> Tensor:
    return torch.arange(8) * 7 % 64


def cubed(y: Tensor) -> Tensor:
    return (y**3).sum()
