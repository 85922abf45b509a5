"""dual_swiglu: rows of one, a prime and above a block; the oracle is the jvp of silu(a) * b."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {"rows": (6, 2, 7), "one": (2, 1), "block": (4, 3, 131), "empty": (0, 5)}


def inputs(variant, dtype):
    shape = SHAPES[variant]
    return dict(
        gate=3 * randn(*shape, seed=1, dtype=dtype),
        up=randn(*shape, seed=2, dtype=dtype),
    )


def oracle(gate, up):
    (a, a_t), (b, b_t) = gate.chunk(2), up.chunk(2)
    return torch.cat(torch.func.jvp(lambda a, b: F.silu(a) * b, (a, b), (a_t, b_t)))


def spoil(args):
    args["gate"][1] = float("nan")
    keep = [0, 2, 3, 5]
    return lambda out: [out[0][keep]]


CASES = [
    Case(
        name="dual_swiglu",
        public=u2a_kernels.dual_swiglu,
        overload=torch.ops.u2a.dual_swiglu.default,
        op_args=lambda a: (a["gate"], a["up"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("gate", "up"),
        spoil=spoil,
        errors={
            "odd": (
                lambda a: dict(gate=a["gate"][:5], up=a["up"][:5]),
                ValueError,
                r"dual_swiglu: gate must be \[2B, ..., f\], primal rows then .* got \[5, 2, 7\]",
            ),
            "shape": (
                lambda a: {**a, "up": a["up"][:4]},
                ValueError,
                r"dual_swiglu: up must be .* = \[6, 2, 7\], got \[4, 2, 7\]",
            ),
            "dtype": (
                lambda a: {**a, "up": a["up"].double()},
                TypeError,
                r"dual_swiglu: up must have the dtype of gate",
            ),
        },
    )
]
