"""dual_lora_linear with and without directions and bias; the oracle is its parts' jvp."""

import torch
import torch.nn.functional as F

import u2a_kernels
from cases import Case
from u2a_kernels.testing import randn

SHAPES = {  # rows, d_in, d_out, r
    "directions": (6, 2, 7, 5, 3),
    "frozen-a": (4, 3, 4, 2),
    "frozen-b": (4, 3, 4, 2),
    "still": (4, 3, 4, 1),
    "block": (6, 131, 65, 8),
}
DIFFERENT = ("weight", "a", "b", "a_t", "b_t", "bias")


def inputs(variant, dtype):
    *rows, d_in, d_out, r = SHAPES[variant]
    shapes = ((d_out, d_in), (r, d_in), (d_out, r), (r, d_in), (d_out, r), (d_out,))
    named = enumerate(zip(DIFFERENT, shapes, strict=True))
    args = {n: randn(*s, seed=2 + i, dtype=dtype) for i, (n, s) in named}
    none = {"frozen-a": ["a_t"], "frozen-b": ["b_t", "bias"], "still": ["a_t", "b_t"]}
    args |= dict.fromkeys(none.get(variant, []))
    return dict(x=randn(*rows, d_in, seed=1, dtype=dtype), **args, scale=1.5)


def oracle(x, weight, a, b, a_t, b_t, bias, scale):
    def layer(x, a, b):
        return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)

    primal, tangent = x.chunk(2)
    a_t = torch.zeros_like(a) if a_t is None else a_t
    b_t = torch.zeros_like(b) if b_t is None else b_t
    y, y_t = torch.func.jvp(layer, (primal, a, b), (tangent, a_t, b_t))
    return torch.cat([y, y_t])


def spoil(args):
    args["x"][1] = float("nan")
    return lambda out: [out[0][[0, 2, 3, 5]]]


def without(name):
    return lambda a: {**a, name: a[name][:, :-1]}


CASES = [
    Case(
        name="dual_lora_linear",
        public=u2a_kernels.dual_lora_linear,
        overload=torch.ops.u2a.dual_lora_linear.default,
        op_args=lambda a: (*(a[n] for n in ("x", *DIFFERENT)), a["scale"], "hvp"),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "a", "b"),
        spoil=spoil,
        errors={
            "odd": (
                lambda a: {**a, "x": a["x"][:3]},
                ValueError,
                r"dual_lora_linear: x must be \[2B, ..., d_in\], .* got \[3, 2, 7\]",
            ),
            "weight": (
                without("weight"),
                ValueError,
                r"dual_lora_linear: weight must be \[d_out, d_in\] = \[5, 7\], got \[5, 6\]",
            ),
            "a": (
                without("a"),
                ValueError,
                r"dual_lora_linear: a must be \[r, d_in\] = \[3, 7\], got \[3, 6\]",
            ),
            "b": (
                without("b"),
                ValueError,
                r"dual_lora_linear: b must be \[d_out, r\] = \[5, 3\], got \[5, 2\]",
            ),
            "trainable": (
                lambda a: {**a, "weight": a["weight"].requires_grad_()},
                ValueError,
                r"dual_lora_linear: weight must not require grad, it is frozen",
            ),
            "direction": (
                lambda a: {**a, "b_t": a["b_t"].requires_grad_()},
                ValueError,
                r"dual_lora_linear: b_t must not require grad",
            ),
            "mode": (
                lambda a: {**a, "mode": "full"},
                ValueError,
                r"dual_lora_linear: mode must be 'hvp', 'ggn' or 'jvp', got 'full'",
            ),
        },
    )
]
