"""dual_linear with and without directions and bias; the oracle is the jvp of F.linear."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {"directions": (6, 2, 7, 5), "frozen": (4, 3, 4), "bias": (4, 3, 4), "block": (6, 131, 65)}


def inputs(variant, dtype):
    *rows, d_in, d_out = SHAPES[variant]
    full = variant in ("directions", "block")
    return dict(
        x=randn(*rows, d_in, seed=1, dtype=dtype),
        weight=randn(d_out, d_in, seed=2, dtype=dtype),
        weight_t=randn(d_out, d_in, seed=3, dtype=dtype) if full else None,
        bias=None if variant == "frozen" else randn(d_out, seed=4, dtype=dtype),
        bias_t=randn(d_out, seed=5, dtype=dtype) if full else None,
    )


def oracle(x, weight, weight_t, bias, bias_t):
    primal, tangent = x.chunk(2)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    weight_t = torch.zeros_like(weight) if weight_t is None else weight_t
    bias_t = torch.zeros_like(bias) if bias_t is None else bias_t
    return torch.cat(torch.func.jvp(F.linear, (primal, weight, bias), (tangent, weight_t, bias_t)))


def spoil(args):
    args["x"][1] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_linear",
        public=u2a_kernels.dual_linear,
        overload=torch.ops.u2a.dual_linear.default,
        op_args=lambda a: (
            a["x"],
            a["weight"],
            a["weight_t"],
            a["bias"],
            a["bias_t"],
            "hvp",
        ),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "weight", "bias"),
        spoil=spoil,
        errors={
            "odd": (
                lambda a: {**a, "x": a["x"][:3]},
                ValueError,
                r"dual_linear: x must be \[2B, ..., d_in\], .* got \[3, 2, 7\]",
            ),
            "weight": (
                lambda a: {**a, "weight": a["weight"][:, :-1]},
                ValueError,
                r"dual_linear: weight must be \[d_out, d_in\] = \[5, 7\], got \[5, 6\]",
            ),
            "direction": (
                lambda a: {**a, "weight_t": a["weight_t"].requires_grad_()},
                ValueError,
                r"dual_linear: weight_t must not require grad",
            ),
            "bias-direction": (
                lambda a: {**a, "bias": None},
                ValueError,
                r"dual_linear: bias_t must be None without bias",
            ),
            "mode": (
                lambda a: {**a, "mode": "hessian"},
                ValueError,
                r"dual_linear: mode must be 'hvp', 'ggn' or 'jvp', got 'hessian'",
            ),
        },
    )
]
