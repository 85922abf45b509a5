"""dual_layer_norm with and without directions and bias.

The oracle is the jvp of a LayerNorm written out: torch's own tangent is not always right.
"""

import torch

import u2a_kernels
from cases import Case
from u2a_kernels.ops import dual_layer_norm as op
from u2a_kernels.testing import randn

SHAPES = {
    "directions": (6, 2, 7),
    "frozen": (4, 5),
    "no-bias": (4, 5),
    "one": (2, 1),
    "block": (6, 131),
    "frozen-block": (146, 53),
    "large": (4, 4097),
    "empty": (0, 5),
}


def inputs(variant, dtype):
    shape = SHAPES[variant]
    w, b, w_t, b_t = (randn(shape[-1], seed=s, dtype=dtype) for s in (2, 3, 4, 5))
    return dict(
        x=randn(*shape, seed=1, dtype=dtype) + 0.5,
        weight=w,
        bias=None if variant == "no-bias" else b,
        weight_t=None if variant.startswith("frozen") else w_t,
        bias_t=b_t if variant in ("directions", "block") else None,
        eps=1e-2,
    )


def oracle(x, weight, bias, weight_t, bias_t, eps):
    primal, tangent = x.chunk(2)

    def layer_norm(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias

    zeros = torch.zeros_like(weight)
    bias, weight_t, bias_t = (zeros if t is None else t for t in (bias, weight_t, bias_t))
    return torch.cat(
        torch.func.jvp(layer_norm, (primal, weight, bias), (tangent, weight_t, bias_t))
    )


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_t, bias_t, eps):
        ctx.save_for_backward(x, weight, weight_t)
        ctx.eps, ctx.bias = eps, bias is not None
        return op.triton(x, weight, bias, weight_t, bias_t, eps)

    @staticmethod
    def backward(ctx, grad):
        dx, dw, db = op.triton_bwd(grad, *ctx.saved_tensors, ctx.eps, True, ctx.bias)
        return dx, dw, db if ctx.bias else None, None, None, None


def reference(x, weight, bias, weight_t, bias_t, eps):
    return op.reference(x, weight, bias, weight_t, bias_t, eps)


def triton(x, weight, bias, weight_t, bias_t, eps):
    return Launched.apply(x, weight, bias, weight_t, bias_t, eps)


def spoil(args):
    args["x"][1] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_layer_norm",
        public=u2a_kernels.dual_layer_norm,
        overload=torch.ops.u2a.dual_layer_norm.default,
        op_args=lambda a: (a["x"], a["weight"], a["bias"], a["weight_t"], a["bias_t"], a["eps"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "weight", "bias"),
        spoil=spoil,
        launchers={"triton": triton, "reference": reference},
        backward_launchers={"triton": triton},
        errors={
            "odd": (
                lambda a: {**a, "x": a["x"][:3]},
                ValueError,
                r"dual_layer_norm: x must be \[2B, ..., d\], .* got \[3, 2, 7\]",
            ),
            "bias": (
                lambda a: {**a, "bias": a["bias"][:-1]},
                ValueError,
                r"dual_layer_norm: bias must be \[d\] = \[7\], got \[6\]",
            ),
            "bias-direction": (
                lambda a: {**a, "bias": None},
                ValueError,
                r"dual_layer_norm: bias_t must be None without bias",
            ),
            "direction": (
                lambda a: {**a, "bias_t": a["bias_t"].requires_grad_()},
                ValueError,
                r"dual_layer_norm: bias_t must not require grad",
            ),
        },
    )
]


def aot_inputs(dtype):
    """GPT-2, OPT-6.7B and a row in pieces in the backward."""
    for rows, d, frozen in ((8192, 768, False), (4096, 4096, True), (1024, 12288, False)):
        x = torch.empty(2 * rows, d, dtype=dtype, device="meta")
        w, b, w_t, b_t = (torch.empty(d, dtype=dtype, device="meta") for _ in range(4))
        directions = dict(weight_t=None, bias_t=None) if frozen else dict(weight_t=w_t, bias_t=b_t)
        yield "dual_layer_norm", dict(x=x, weight=w, bias=b, **directions, eps=1e-5)
