"""What this project gives for the same quantities: `u2a_kernels.compat` under every order of
differentiation, `u2a` products of whole models, and its ops where they do not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _second_order import Setting
from _second_order_ways import WAYS
from repro import (
    Found,
    Repro,
    attention,
    collected,
    cross_entropy,
    cubed,
    draws,
    gelu,
    layer_norm,
    rms_norm,
    silu,
    targets,
    twice,
)
from torch import Tensor
from torch.func import grad, jacrev, jvp
from truth import whole

import u2a_kernels
from u2a_kernels import compat

FOUND: list[Repro] = []
HEADS = [(1, 2, 8, 16)] * 3


def _mean_loss(h: Tensor, w: Tensor) -> Tensor:
    return compat.linear_cross_entropy(h, w, targets()).mean()


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cubed(compat.scaled_dot_product_attention(q, k, v, is_causal=True))


# Ours, from primitives, shapes.
FUNCTIONS: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "scaled_dot_product_attention": (_flash, lambda *a: cubed(attention(*a)), HEADS),
    "rms_norm": (
        lambda *a: cubed(compat.rms_norm(*a)), lambda *a: cubed(rms_norm(*a)), [(6, 8), (8,)],
    ),
    "layer_norm": (
        lambda *a: cubed(compat.layer_norm(*a)), lambda *a: cubed(layer_norm(*a)),
        [(6, 8), (8,), (8,)],
    ),
    "swiglu": (
        lambda *a: cubed(compat.swiglu(*a)), lambda a, b: cubed(silu(a) * b), [(6, 8), (6, 8)],
    ),
    "silu": (lambda x: cubed(compat.silu(x)), lambda x: cubed(silu(x)), [(6, 8)]),
    "gelu": (lambda x: cubed(compat.gelu(x)), lambda x: cubed(gelu(x)), [(6, 8)]),
    "linear_cross_entropy": (
        _mean_loss, lambda h, w: cross_entropy(h, w, targets()), [(8, 16), (64, 16)],
    ),
}  # fmt: skip


def _forward_over_reverse(f: Callable, xs: list[Tensor], vs: list[Tensor]) -> Any:
    return jvp(grad(f, tuple(range(len(xs)))), tuple(xs), tuple(vs))[1]


def _as_curvlinops(f: Callable, xs: list[Tensor], vs: list[Tensor]) -> Any:
    with torch.no_grad():
        return jvp(jacrev(f, tuple(range(len(xs)))), tuple(xs), tuple(vs))[1]


HOW = {
    "H v, double backward": twice,
    "H v, jvp of grad": _forward_over_reverse,
    "H v, jvp of jacrev under no_grad": _as_curvlinops,
}
for _name in FUNCTIONS:
    for _quantity, _how in HOW.items():

        def _run(name: str = _name, how: Callable = _how) -> Found:
            ours, plain, shapes = FUNCTIONS[name]
            xs, vs = draws(*shapes)
            return how(ours, xs, vs), twice(plain, xs, vs)

        collected(FOUND, f"compat.{_name}", _quantity)(_run)

MODELS = {
    "GPT-2": Setting("gpt2", 16, 64, "tiny", "float64"),
    "Llama LoRA": Setting("llama", 16, 64, "tiny", "float64"),
}
QUANTITIES = {"hvp": "H v", "ggn": "G v (Gauss-Newton)", "scores": "v'g of each example"}
for _way in (w for w in WAYS if w.name.startswith("u2a.") and w.of != "gradient"):
    for _model, _s in MODELS.items():

        def _whole(way: Any = _way, s: Setting = _s) -> Found:
            found, want = way.make(s)(), whole(s)[way.of]
            if isinstance(found, Tensor):
                return [found], [want]
            return list(found.values()), [want[n] for n in found]

        collected(FOUND, _way.name, f"{QUANTITIES[_way.of]} of {_model}")(_whole)


@collected(FOUND, "u2a_kernels.dual_act, used as a plain op", "H v, double backward")
def dual_twice() -> Found:
    xs, vs = draws((6, 8))
    f = lambda x: cubed(u2a_kernels.dual_act(torch.cat([x, 0 * x]), "silu")[:6])  # noqa: E731
    return twice(f, xs, vs), twice(lambda x: cubed(silu(x)), xs, vs)


@collected(FOUND, "u2a_kernels.dual_act, used as a plain op", "J v, torch.func.jvp")
def dual_jvp() -> Found:
    (x,), (v,) = draws((6, 8))
    f = lambda x: u2a_kernels.dual_act(torch.cat([x, 0 * x]), "silu")[:6]  # noqa: E731
    return [jvp(f, (x,), (v,))[1]], [jvp(silu, (x,), (v,))[1]]
