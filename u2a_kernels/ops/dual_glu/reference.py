"""Activations with their first two derivatives, and f(a) b on dual rows, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from u2a_kernels._dual import halves, join
from u2a_kernels._segments import accum_dtype

Curve = tuple[Tensor, Tensor, Tensor]


def _silu(a: Tensor) -> Curve:
    s, rest = torch.sigmoid(a), torch.sigmoid(-a)
    slope = s * rest
    return a * s, s + a * slope, slope * (2 + a * (rest - s))


def _quick_gelu(a: Tensor) -> Curve:
    s, rest = torch.sigmoid(1.702 * a), torch.sigmoid(-1.702 * a)
    slope = 1.702 * s * rest
    return a * s, s + a * slope, slope * (2 + 1.702 * a * (rest - s))


def _gelu(x: Tensor) -> Curve:
    """Hendrycks and Gimpel, arXiv 1606.08415; Phi and phi of the standard normal."""
    a = x.clamp(-40, 40)  # all is 0 or 1 beyond, and no infinity meets a zero
    big = 0.5 * torch.erfc(a * -math.sqrt(0.5))
    small = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return x * big, big + a * small, small * (2 - a * a)


def _gelu_tanh(x: Tensor) -> Curve:
    """0.5 (1 + tanh u) is the sigmoid of 2 u, which keeps its tails."""
    k, c = 2 * math.sqrt(2 / math.pi), 0.044715
    a = x.clamp(-40, 40)
    u = k * (a + c * a**3)
    u1, u2 = k * (1 + 3 * c * a * a), k * 6 * c * a
    s, rest = torch.sigmoid(u), torch.sigmoid(-u)
    slope = s * rest
    return x * s, s + a * slope * u1, slope * (2 * u1 + a * (u2 + (rest - s) * u1 * u1))


def _relu(a: Tensor) -> Curve:
    """A NaN stays, as in torch."""
    return a.masked_fill(a <= 0, 0), torch.where(a <= 0, 0.0, 1.0).to(a), torch.zeros_like(a)


def _relu2(a: Tensor) -> Curve:
    f, f1, _ = _relu(a)
    return f * f, 2 * f, 2 * f1


def _sigmoid(a: Tensor) -> Curve:
    s, rest = torch.sigmoid(a), torch.sigmoid(-a)
    return s, s * rest, s * rest * (rest - s)


def _tanh(a: Tensor) -> Curve:
    """1 - tanh^2 as 4 s (1 - s) of the sigmoid of 2 a, which keeps its tails."""
    t = torch.tanh(a)
    slope = 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a)
    return t, slope, -2 * t * slope


def _identity(a: Tensor) -> Curve:
    return a, torch.ones_like(a), torch.zeros_like(a)


CURVES: dict[str, Callable[[Tensor], Curve]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "identity": _identity,
}


def forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    if gated and up is None:
        gate, up = gate.chunk(2, -1)
    a, a_t = halves(gate.to(accum_dtype(gate)))
    f, f1, _ = CURVES[activation](a)
    if up is None:
        return join(f, f1 * a_t, gate)
    b, b_t = halves(up.to(a.dtype))
    return join(f * b, f1 * a_t * b + f * b_t, gate)


def backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    if gated and up is None:
        a, b = gate.chunk(2, -1)
        return torch.cat(backward(grad, a, b, activation, gated), -1), gate.new_empty(0)
    acc = accum_dtype(gate)
    a, a_t = halves(gate.to(acc))
    g_t, g = halves(grad.to(acc))
    f, f1, f2 = CURVES[activation](a)
    if up is None:
        return join(g_t * f1 + g * a_t * f2, g * f1, gate), gate.new_empty(0)
    b, b_t = halves(up.to(acc))
    da = (g_t * b + g * b_t) * f1 + g * b * a_t * f2
    return join(da, g * b * f1, gate), join(g_t * f + g * a_t * f1, g * f, up)
