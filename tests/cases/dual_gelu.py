"""dual_gelu in both forms, tails included; the oracle is the jvp of F.gelu."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {"erf": (6, 2, 7), "tanh": (6, 2, 7), "one": (2, 1), "block-tanh": (4, 3, 131)}


def inputs(variant, dtype):
    x = 3 * randn(*SHAPES[variant], seed=1, dtype=dtype)
    return dict(x=x, approximate="tanh" if "tanh" in variant else "none")


def oracle(x, approximate):
    primal, tangent = x.chunk(2)
    return torch.cat(
        torch.func.jvp(lambda x: F.gelu(x, approximate=approximate), (primal,), (tangent,))
    )


def spoil(args):
    args["x"][4] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_gelu",
        public=u2a_kernels.dual_gelu,
        overload=torch.ops.u2a.dual_gelu.default,
        op_args=lambda a: (a["x"], a["approximate"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x",),
        spoil=spoil,
        errors={
            "odd": (
                lambda a: {**a, "x": a["x"][:3]},
                ValueError,
                r"dual_gelu: x must be \[2B, ..., d\], .* got \[3, 2, 7\]",
            ),
            "form": (
                lambda a: {**a, "approximate": "sigmoid"},
                ValueError,
                r"dual_gelu: approximate must be 'none' or 'tanh', got 'sigmoid'",
            ),
        },
    )
]
