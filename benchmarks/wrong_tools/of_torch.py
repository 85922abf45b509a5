"""What torch itself does at second order."""

from __future__ import annotations

import torch
from repro import Found, Repro, attention, collected, cubed, draws, layer_norm, silu, targets, twice
from repro import cross_entropy as plain_cross_entropy
from torch import Tensor
from torch.func import grad, jacrev, jvp
from torch.nn import functional as F

FOUND: list[Repro] = []
HV = "H v, double backward"


def _norms() -> tuple:
    xs, vs = draws((6, 8), (8,), (8,))
    f = lambda x, w, b: cubed(F.layer_norm(x, (8,), w, b))  # noqa: E731
    return f, xs, vs, twice(lambda *a: cubed(layer_norm(*a)), xs, vs)


@collected(FOUND, "F.layer_norm", HV)
def layer_norm_twice() -> Found:
    f, xs, vs, want = _norms()
    return twice(f, xs, vs), want


@collected(FOUND, "F.layer_norm", "H v, jvp of grad")
def layer_norm_jvp_grad() -> Found:
    f, xs, vs, want = _norms()
    return jvp(grad(f, (0, 1, 2)), tuple(xs), tuple(vs))[1], want


@collected(FOUND, "F.layer_norm", "H v, jvp of jacrev")
def layer_norm_jvp_jacrev() -> Found:
    f, xs, vs, want = _norms()
    return jvp(jacrev(f, (0, 1, 2)), tuple(xs), tuple(vs))[1], want


@collected(FOUND, "F.layer_norm", "v'H v, jvp of jvp")
def layer_norm_nested() -> Found:
    f, xs, vs, want = _norms()
    along = lambda *a: jvp(f, a, tuple(vs))[1]  # noqa: E731
    true = sum((h * v).sum() for h, v in zip(want, vs, strict=True))
    return [jvp(along, tuple(xs), tuple(vs))[1]], [true]


@collected(FOUND, "F.silu", "H v, jvp of jacrev under no_grad")
def silu_no_grad() -> Found:
    xs, vs = draws((6, 8))
    with torch.no_grad():
        got = jvp(jacrev(lambda x: cubed(F.silu(x))), tuple(xs), tuple(vs))[1]
    return [got], twice(lambda x: cubed(silu(x)), xs, vs)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cubed(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@collected(FOUND, "F.scaled_dot_product_attention", HV)
def sdpa_twice() -> Found:
    xs, vs = draws(*[(1, 2, 8, 16)] * 3)
    return twice(_sdpa, xs, vs), twice(lambda *a: cubed(attention(*a)), xs, vs)


@collected(FOUND, "F.scaled_dot_product_attention", "H v, jvp of grad")
def sdpa_jvp_grad() -> Found:
    xs, vs = draws(*[(1, 2, 8, 16)] * 3)
    got = jvp(grad(_sdpa, (0, 1, 2)), tuple(xs), tuple(vs))[1]
    return got, twice(lambda *a: cubed(attention(*a)), xs, vs)


@collected(FOUND, "SDPA, MATH backend", HV)
def sdpa_math() -> Found:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return sdpa_twice()


@collected(FOUND, "flex_attention", HV)
def flex_twice() -> Found:
    from torch.nn.attention.flex_attention import flex_attention

    xs, vs = draws(*[(1, 2, 8, 16)] * 3)
    want = twice(lambda q, k, v: cubed((q @ k.mT / 4).softmax(-1) @ v), xs, vs)
    return twice(lambda q, k, v: cubed(flex_attention(q, k, v)), xs, vs), want


@collected(FOUND, "F.linear_cross_entropy, chunked", HV)
def linear_cross_entropy_twice() -> Found:
    xs, vs = draws((8, 16), (64, 16))
    y, options = targets(), torch.nn.LinearCrossEntropyOptions()
    got = twice(lambda h, w: F.linear_cross_entropy(h, w, y, options=options) ** 2, xs, vs)
    return got, twice(lambda h, w: plain_cross_entropy(h, w, y) ** 2, xs, vs)


class _RawSilu(torch.autograd.Function):
    """As a wrapped kernel is: its backward calls code that autograd does not see into."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        with torch.no_grad():  # a kernel launch
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return g * (s + x * s * (1 - s))


@collected(FOUND, "autograd.Function, kernel in its backward", HV)
def raw_function() -> Found:
    xs, vs = draws((6, 8))
    got = twice(lambda x: cubed(_RawSilu.apply(torch.sin(x))), xs, vs)
    return got, twice(lambda x: cubed(silu(torch.sin(x))), xs, vs)


@torch.library.custom_op("wrong_tools::silu", mutates_args=())
def _silu_op(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.library.custom_op("wrong_tools::silu_backward", mutates_args=())
def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * (s + x * s * (1 - s))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_silu_op.register_autograd(
    lambda ctx, g: _silu_backward(g, *ctx.saved_tensors), setup_context=_keep
)


@collected(FOUND, "torch.library.custom_op", "J v, torch.func.jvp")
def custom_op_jvp() -> Found:
    (x,), (v,) = draws((6, 8))
    s = torch.sigmoid(x)
    return [jvp(_silu_op, (x,), (v,))[1]], [v * (s + x * s * (1 - s))]


@collected(FOUND, "torch.library.custom_op", HV)
def custom_op_twice() -> Found:
    xs, vs = draws((6, 8))
    return twice(lambda x: cubed(_silu_op(x)), xs, vs), twice(lambda x: cubed(silu(x)), xs, vs)


@collected(FOUND, "torch.compile", HV)
def compiled_twice() -> Found:
    xs, vs = draws((6, 8))
    f = torch.compile(lambda x: cubed(F.silu(x)), backend="aot_eager")
    return twice(f, xs, vs), twice(lambda x: cubed(silu(x)), xs, vs)


class _Tangent(torch.autograd.Function):
    """A correct function with a forward-mode rule of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, x_t):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return x_t * (s + x * s * (1 - s))


@collected(FOUND, "torch.compile over jvp of autograd.Function", "J v")
def compiled_jvp() -> Found:
    (x,), (v,) = draws((6, 8))
    f = torch.compile(lambda x, v: jvp(_Tangent.apply, (x,), (v,))[1], backend="aot_eager")
    s = torch.sigmoid(x)
    return [f(x, v)], [v * (s + x * s * (1 - s))]


@collected(FOUND, "torch.utils.checkpoint", "gradient, torch.func.grad")
def checkpoint_grad() -> Found:
    from torch.utils.checkpoint import checkpoint

    (x,), _ = draws((6, 8))
    f = lambda x: checkpoint(lambda y: torch.sin(y).sum(), x, use_reentrant=False)  # noqa: E731
    return [grad(f)(x)], [torch.cos(x)]
