"""The reference of dual_rms_norm and dual_layer_norm: normalised dual rows in plain torch.

xc is x, less its mean when `centred`; s = (mean xc^2 + eps)^-1/2, s_t = -s^3 mean(xc xc_t);
n = xc s, n_t = xc_t s + xc s_t; y = w n + b, y_t = w n_t + w_t n + b_t.
Backward with a = g w, a_t = g_t w + g w_t: c2 = mean(a n), c1 = mean a when centred, u = a - c1
- n c2 and u_t its tangent; dx_t = s u, dx = s_t u + s u_t, dw = sum g_t n + g n_t, db = sum g_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._dual import halves, join
from u2a_kernels._segments import accum_dtype


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _normalise(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, s_t and the normalised halves n, n_t."""
    xc, xc_t = halves(x.to(accum_dtype(x)))
    if centred:
        xc, xc_t = xc - _mean(xc), xc_t - _mean(xc_t)
    s = torch.rsqrt(_mean(xc * xc) + eps)
    s_t = -(s**3) * _mean(xc * xc_t)
    return s, s_t, xc * s, xc_t * s + xc * s_t


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_t: Tensor | None,
    bias_t: Tensor | None, eps: float, centred: bool,
) -> Tensor:  # fmt: skip
    acc = accum_dtype(x)
    _, _, n, n_t = _normalise(x, eps, centred)
    w = weight.to(acc)
    y, y_t = n * w, n_t * w
    if bias is not None:
        y += bias.to(acc)
    if weight_t is not None:
        y_t.addcmul_(n, weight_t.to(acc))
    if bias_t is not None:
        y_t += bias_t.to(acc)
    return join(y, y_t, x)


def reference_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, weight_t: Tensor | None, eps: float, centred: bool,
    weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accum_dtype(x)
    s, s_t, n, n_t = _normalise(x, eps, centred)
    g_t, g = halves(grad.to(acc))
    w = weight.to(acc)
    a, a_t = g * w, g_t * w
    if weight_t is not None:
        a_t.addcmul_(g, weight_t.to(acc))
    c2, c2_t = _mean(a * n), _mean(a_t * n + a * n_t)
    u, u_t = a - n * c2, a_t - n_t * c2 - n * c2_t
    if centred:
        u -= _mean(a)
        u_t -= _mean(a_t)
    dw, db = weight.new_empty(0), weight.new_empty(0)
    if weight_grad:
        dw = (g_t * n + g * n_t).flatten(0, -2).sum(0).to(weight.dtype)
    if bias_grad:
        db = g_t.flatten(0, -2).sum(0).to(weight.dtype)
    return join(s_t * u + s * u_t, s * u, x), dw, db
