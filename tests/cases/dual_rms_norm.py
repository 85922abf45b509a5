"""dual_rms_norm with and without a direction of the weight; the oracle is the jvp of F.rms_norm."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.ops import dual_rms_norm as op
from u2a_kernels.testing import randn

SHAPES = {
    "direction": (6, 2, 7),
    "frozen": (4, 5),
    "one": (2, 1),
    "block": (6, 131),
    "frozen-block": (146, 53),
    "large": (4, 4097),
    "empty": (0, 5),
}


def inputs(variant, dtype):
    shape = SHAPES[variant]
    return dict(
        x=randn(*shape, seed=1, dtype=dtype),
        weight=randn(shape[-1], seed=2, dtype=dtype),
        weight_t=None if variant.startswith("frozen") else randn(shape[-1], seed=3, dtype=dtype),
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


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, weight_t, eps):
        ctx.save_for_backward(x, weight, weight_t)
        ctx.eps = eps
        return op.triton(x, weight, weight_t, eps)

    @staticmethod
    def backward(ctx, grad):
        return *op.triton_bwd(grad, *ctx.saved_tensors, ctx.eps, True), None, None


def reference(x, weight, weight_t, eps):
    return op.reference(x, weight, weight_t, eps)


def triton(x, weight, weight_t, eps):
    return Launched.apply(x, weight, weight_t, eps)


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
        launchers={"triton": triton, "reference": reference},
        backward_launchers={"triton": triton},
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


def aot_inputs(dtype):
    """Query norms of heads of 128, 1B, 8B and 405B Llamas (the backward of the last in pieces)."""
    for rows, d, frozen in (
        (65536, 128, False),
        (4096, 2048, True),
        (4096, 4096, False),
        (1024, 16384, False),
    ):
        x = torch.empty(2 * rows, d, dtype=dtype, device="meta")
        w, w_t = (torch.empty(d, dtype=dtype, device="meta") for _ in range(2))
        yield "dual_rms_norm", dict(x=x, weight=w, weight_t=None if frozen else w_t, eps=1e-6)
