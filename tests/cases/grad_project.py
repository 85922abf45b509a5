"""grad_project: ragged, single, prime and empty inputs; the oracle forms each gradient."""

import torch

import u2a_kernels
from cases import Case
from cases.grad_dot import changed, spoil
from u2a_kernels.testing import offsets_of, randn

SHAPES = {
    "ragged": ([5, 0, 17, 1], 13, 7, 4, 3),
    "one": ([1], 1, 1, 1, 1),
    "prime": ([31, 2], 37, 67, 5, 11),
    "empty": ([0, 0], 5, 3, 2, 4),
    "no-examples": ([], 4, 4, 2, 2),
}


def inputs(variant, dtype):
    lengths, d_in, d_out, k_in, k_out = SHAPES[variant]
    n = sum(lengths)
    return dict(
        x=randn(n, d_in, seed=1, dtype=dtype),
        g=randn(n, d_out, seed=2, dtype=dtype),
        offsets=offsets_of(lengths),
        p_in=randn(k_in, d_in, seed=3, dtype=dtype),
        p_out=randn(k_out, d_out, seed=4, dtype=dtype),
    )


def oracle(x, g, offsets, p_in, p_out):
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append(p_out @ (g[s:e].T @ x[s:e]) @ p_in.T)
    return torch.stack(rows) if rows else x.new_zeros(0, p_out.shape[0], p_in.shape[0])


CASES = [
    Case(
        name="grad_project",
        public=u2a_kernels.grad_project,
        overload=torch.ops.u2a.grad_project.default,
        op_args=lambda a: (a["x"], a["g"], a["offsets"], a["p_in"], a["p_out"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "g", "p_in", "p_out"),
        spoil=spoil,
        errors={
            "rows": (
                changed(g=lambda a: a["g"][:-1]),
                ValueError,
                r"grad_project: g must be \[N, d_out\] = \[23, 7\], got \[22, 7\]",
            ),
            "inputs": (
                changed(p_in=lambda a: a["p_in"][:, 1:]),
                ValueError,
                r"grad_project: p_in must be \[k_in, d_in\] = \[4, 13\], got \[4, 12\]",
            ),
            "outputs": (
                changed(p_out=lambda a: a["p_out"].T),
                ValueError,
                r"grad_project: p_out must be \[k_out, d_out\] = \[7, 7\], got \[7, 3\]",
            ),
            "dtype": (
                changed(p_out=lambda a: a["p_out"].double()),
                TypeError,
                r"grad_project: p_out must have the dtype of x",
            ),
            "dimensions": (
                changed(p_in=lambda a: a["p_in"][0]),
                ValueError,
                r"grad_project: p_in must be \[k_in, d_in\], got \[13\]",
            ),
            "offsets-end": (
                changed(offsets=lambda a: a["offsets"][:-1]),
                ValueError,
                r"grad_project: offsets must be 0 first and N = 23",
            ),
        },
    )
]
