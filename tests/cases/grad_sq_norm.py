"""grad_sq_norm: examples short enough for token Grams, long enough for G_b, single and empty."""

import torch

import u2a_kernels
from cases import Case
from cases.grad_dot import changed, spoil
from u2a_kernels._segments import ghost_limit
from u2a_kernels.ops import grad_sq_norm as op
from u2a_kernels.testing import offsets_of, randn

SHAPES = {
    "ragged": ([5, 0, 17, 1], 13, 7),
    "one": ([1], 1, 1),
    "prime": ([31, 2], 37, 67),
    "long": ([53, 2], 5, 7),
    "blocks": ([131, 0, 70, 1], 129, 65),
    "empty": ([0, 0], 5, 3),
    "no-examples": ([], 4, 4),
}


def inputs(variant, dtype):
    lengths, d_in, d_out = SHAPES[variant]
    n = sum(lengths)
    return dict(
        x=randn(n, d_in, seed=1, dtype=dtype),
        g=randn(n, d_out, seed=2, dtype=dtype),
        offsets=offsets_of(lengths),
    )


def oracle(x, g, offsets):
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append((g[s:e].T @ x[s:e]).square().sum())
    return torch.stack(rows) if rows else x.new_zeros(0)


def triton(x, g, offsets):
    return op.forward_triton(x, g, offsets, ghost_limit(x.shape[1], g.shape[1]))


CASES = [
    Case(
        name="grad_sq_norm",
        public=u2a_kernels.grad_sq_norm,
        overload=torch.ops.u2a.grad_sq_norm.default,
        op_args=lambda a: (a["x"], a["g"], a["offsets"], 9),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "g"),
        spoil=spoil,
        launchers={"triton": triton},
        errors={
            "rows": (
                changed(g=lambda a: a["g"][:-1]),
                ValueError,
                r"grad_sq_norm: g must be \[N, d_out\] = \[23, 7\], got \[22, 7\]",
            ),
            "dimensions": (
                changed(x=lambda a: a["x"][0]),
                ValueError,
                r"grad_sq_norm: x must be \[N, d_in\], got \[13\]",
            ),
            "dtype": (
                changed(g=lambda a: a["g"].half()),
                TypeError,
                r"grad_sq_norm: g must have the dtype of x, torch.float32, got torch.float16",
            ),
            "offsets-order": (
                changed(offsets=lambda a: a["offsets"].flip(0)),
                ValueError,
                r"grad_sq_norm: offsets must be 0 first",
            ),
        },
    )
]


def aot_inputs(dtype):
    """Sizes of a 7B model's MLP: many short examples, and few of which some can be long."""
    for n, b, d_in, d_out in ((8192, 64, 4096, 11008), (16384, 4, 4096, 4096), (2048, 128, 64, 64)):
        yield (
            "grad_sq_norm",
            dict(
                x=torch.empty(n, d_in, dtype=dtype, device="meta"),
                g=torch.empty(n, d_out, dtype=dtype, device="meta"),
                offsets=torch.empty(b + 1, dtype=torch.int32, device="meta"),
            ),
        )
