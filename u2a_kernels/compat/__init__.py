"""Ordinary functions that are right under double backward, torch.func and forward-mode AD.

For code that differentiates by itself (`create_graph=True`, `torch.func.jvp`, `jacrev`, `vmap`):
the usual kernels serve first order, the dual kernels second; nothing `[T, S]` or `[N, V]` is held.
A third derivative raises by name. `torch.compile` of a first-order use works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from u2a_kernels._checks import check_dim, check_size, wanted
from u2a_kernels.compat.lift import Rule
from u2a_kernels.ops.dual_attention import dual_attention
from u2a_kernels.ops.dual_glu import dual_act, dual_glu
from u2a_kernels.ops.dual_layer_norm import dual_layer_norm
from u2a_kernels.ops.dual_linear_cross_entropy import dual_linear_cross_entropy
from u2a_kernels.ops.dual_rms_norm import dual_rms_norm
from u2a_kernels.ops.linear_logp import linear_logp


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, *rest: Any) -> Tensor:
    window, softcap = rest
    if window is None and softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    rows = [torch.cat([x, torch.zeros_like(x)]) for x in (q, k, v)]
    options: Any = dict(scale=scale, causal=causal, window=window, softcap=softcap)
    return dual_attention(*rows, **options, mode="ggn").chunk(2)[0]


def _dual_attention(xs: list[Tensor], ts: Any, options: tuple[Any, ...], mode: str) -> Tensor:
    causal, scale, window, softcap = options
    return dual_attention(
        *xs, scale=scale, causal=causal, window=window, softcap=softcap, mode=mode
    )


_ATTENTION = Rule("compat.scaled_dot_product_attention", "rrr", _attention, _dual_attention)
_RMS = Rule(
    "compat.rms_norm",
    "rp",
    lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
    lambda xs, ts, options, mode: dual_rms_norm(xs[0], xs[1], ts[1], options[0]),
)
_LAYER = Rule(
    "compat.layer_norm",
    "rpp",
    lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
    lambda xs, ts, options, mode: dual_layer_norm(xs[0], xs[1], xs[2], ts[1], ts[2], options[0]),
)
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_GLU = Rule(
    "compat.glu",
    "rr",
    lambda a, b, activation: PLAIN[activation](a) * b,
    lambda xs, ts, options, mode: dual_glu(xs[0], xs[1], options[0]),
)
_ACT = Rule(
    "compat.activation",
    "r",
    lambda x, activation: PLAIN[activation](x),
    lambda xs, ts, options, mode: dual_act(xs[0], options[0]),
)


def _head(xs: list[Tensor], ts: Any, options: Any, mode: str) -> Tensor:
    h, weight, targets = xs
    loss, loss_t, _ = dual_linear_cross_entropy(h, weight, targets, ts[1], mode=mode)
    return torch.cat([loss, loss_t])


_HEAD = Rule("compat.linear_cross_entropy", "rpc", lambda h, w, y: -linear_logp(h, w, y), _head)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention`, differentiable twice without anything `[T, S]`.

    Args:
        query: [B, H, T, D]; key, value: [B, Hkv, S, D], Hkv dividing H with enable_gqa.
        attn_mask, dropout_p: refused; right-padded causal batches need no mask.
        is_causal: wants T = S (torch and flash kernels align differently otherwise).
        window, softcap: as `u2a_kernels.dual_attention`.

    Raises:
        ValueError: a mask, dropout or a shape that does not fit.
        RuntimeError: a third derivative, forward over forward, torch.func inside torch.compile.

    Equivalent torch: the same call with the MATH backend.
    Source: tangent of Dao, arXiv 2307.08691; Pearlmutter (Neural Computation 6, 1994).
    """
    op = "compat.scaled_dot_product_attention"
    if attn_mask is not None or dropout_p:
        got = f"a mask: {attn_mask is not None}, dropout {dropout_p}"
        raise wanted(op, "attn_mask, dropout_p", "none, the kernels have neither", got)
    check_dim(op, "query", query, "[B, H, T, D]", 4)
    heads = query.shape[1] if not enable_gqa else key.shape[1]
    check_size(
        op, "key", key, "[B, Hkv, S, D]", (query.shape[0], heads, key.shape[2], query.shape[3])
    )
    if is_causal and query.shape[2] != key.shape[2]:
        raise wanted(op, "is_causal", f"as many keys as queries, {query.shape[2]}", key.shape[2])
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _ATTENTION.lift(query, key, value, options=(is_causal, factor, window, softcap))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``F.rms_norm(x, weight.shape, weight, eps)``, x [..., d] of two dimensions or more."""
    return _RMS.lift(x, weight, options=(eps,))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``F.layer_norm(x, weight.shape, weight, bias, eps)``, x [..., d] of two dimensions or more.

    torch's own has wrong weight tangents under nested forward mode.
    """
    return _LAYER.lift(x, weight, bias, options=(eps,))


def silu(x: Tensor) -> Tensor:
    """``F.silu(x)``, x of two dimensions or more."""
    return _ACT.lift(x, options=("silu",))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu(x, approximate=approximate)``, x of two dimensions or more."""
    return _ACT.lift(x, options=(_gelu("compat.gelu", approximate),))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``F.silu(gate) * up``."""
    return _GLU.lift(gate, up, options=("silu",))


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu(gate, approximate=approximate) * up``."""
    return _GLU.lift(gate, up, options=(_gelu("compat.geglu", approximate),))


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """``F.cross_entropy(h @ weight.T, targets, reduction="none")`` [N], no [N, V] tensor held.

    h [N, d], weight [V, d], targets [N] int64 or -100 (0 there, and no gradient).
    """
    return _HEAD.lift(h, weight, targets)


def _gelu(op: str, approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise wanted(op, "approximate", "'none' or 'tanh'", repr(approximate))
    return "gelu" if approximate == "none" else "gelu_tanh"


__all__ = [
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "swiglu",
]
