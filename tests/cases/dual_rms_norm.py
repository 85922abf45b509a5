"""dual_rms_norm with and without a direction of the weight; the oracle is the jvp of F.rms_norm."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {"direction": (6, 2, 7), "frozen": (4, 5), "one": (2, 1), "block": (6, 131)}


def inputs(variant, dtype):
    shape = SHAPES[variant]
    return dict(
        x=randn(*shape, seed=1, dtype=dtype),
        weight=randn(shape[-1], seed=2, dtype=dtype),
        weight_t=None if variant == "frozen" else randn(shape[-1], seed=3, dtype=dtype),
        eps=1e-2,
    )


def oracle(x, weight, weight_t, eps):
    primal, tangent = x.chunk(2)
    weight_t = torch.zeros_like(weight) if weight_t is None else weight_t
    return torch.cat(
        torch.func.jvp(
            lambda x, w: F.rms_norm(x, w.shape, w, eps), (primal, weight), (tangent, weight_t)
        )
    )


def spoil(args):
    args["x"][1] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_rms_norm",
        public=u2a_kernels.dual_rms_norm,
        overload=torch.ops.u2a.dual_rms_norm.default,
        op_args=lambda a: (a["x"], a["weight"], a["weight_t"], a["eps"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "weight"),
        spoil=spoil,
        errors={
            "odd": (
                lambda a: {**a, "x": a["x"][:3]},
                ValueError,
                r"dual_rms_norm: x must be \[2B, ..., d\], .* got \[3, 2, 7\]",
            ),
            "weight": (
                lambda a: {**a, "weight": a["weight"][:-1]},
                ValueError,
                r"dual_rms_norm: weight must be \[d\] = \[7\], got \[6\]",
            ),
            "direction": (
                lambda a: {**a, "weight_t": a["weight_t"].requires_grad_()},
                ValueError,
                r"dual_rms_norm: weight_t must not require grad",
            ),
        },
    )
]
