"""grad_dot: ragged, single, empty, wide and multi-direction inputs; oracle forms each gradient."""

import torch

import u2a_kernels
from cases import Case
from u2a_kernels.ops import grad_dot as op
from u2a_kernels.testing import offsets_of, randn

SHAPES = {
    "ragged": ([5, 0, 17, 1], 13, 7, 1),
    "one": ([1], 1, 1, 1),
    "directions": ([31, 2], 37, 67, 3),
    "blocks": ([70, 61], 65, 129, 1),
    "empty": ([0, 0], 5, 3, 2),
    "no-examples": ([], 4, 4, 1),
}


def inputs(variant, dtype):
    lengths, d_in, d_out, q = SHAPES[variant]
    n = sum(lengths)
    v = randn(q, d_out, d_in, seed=3, dtype=dtype)
    return dict(
        x=randn(n, d_in, seed=1, dtype=dtype),
        g=randn(n, d_out, seed=2, dtype=dtype),
        offsets=offsets_of(lengths),
        v=v[0] if variant == "ragged" else v,
    )


def oracle(x, g, offsets, v):
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append((v * (g[s:e].T @ x[s:e])).sum((-2, -1)))
    return torch.stack(rows) if rows else x.new_zeros(0, *v.shape[:-2])


def triton(x, g, offsets, v):
    out = op.forward_triton(x, g, offsets, v if v.ndim == 3 else v[None])
    return out if v.ndim == 3 else out[:, 0]


def spoil(args):
    """NaN in the first token of the first non-empty example."""
    lengths = args["offsets"].diff()
    bad = int((lengths > 0).nonzero()[0])
    args["x"][args["offsets"][bad]] = float("nan")
    keep = [b for b in range(len(lengths)) if b != bad]
    return lambda out: [out[0][keep]]


def changed(**new):
    return lambda args: {**args, **{k: f(args) for k, f in new.items()}}


CASES = [
    Case(
        name="grad_dot",
        public=u2a_kernels.grad_dot,
        overload=torch.ops.u2a.grad_dot.default,
        op_args=lambda a: (
            a["x"],
            a["g"],
            a["offsets"],
            a["v"] if a["v"].ndim == 3 else a["v"][None],
        ),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "g", "v"),
        spoil=spoil,
        launchers={"triton": triton},
        errors={
            "rows": (
                changed(g=lambda a: a["g"][:-1]),
                ValueError,
                r"grad_dot: g must be \[N, d_out\]",
            ),
            "direction": (changed(v=lambda a: a["v"][:, :-1]), ValueError, r"grad_dot: v must be"),
            "dtype": (
                changed(g=lambda a: a["g"].double()),
                TypeError,
                r"grad_dot: g must have the dtype",
            ),
            "integers": (
                changed(x=lambda a: a["x"].int()),
                TypeError,
                r"grad_dot: x must be float32",
            ),
            "offsets-end": (
                changed(offsets=lambda a: a["offsets"][:-1]),
                ValueError,
                r"grad_dot: offsets must be 0",
            ),
            "offsets-order": (
                changed(offsets=lambda a: a["offsets"].flip(0)),
                ValueError,
                r"grad_dot: offsets must be",
            ),
            "offsets-type": (
                changed(offsets=lambda a: a["offsets"].float()),
                TypeError,
                r"offsets must be int32",
            ),
        },
    )
]


def aot_inputs(dtype):
    """Sizes of a 7B model's MLP: one direction, and several."""
    for n, d_in, d_out, q in ((8192, 4096, 11008, 1), (512, 4096, 4096, 4)):
        yield (
            "grad_dot",
            dict(
                x=torch.empty(n, d_in, dtype=dtype, device="meta"),
                g=torch.empty(n, d_out, dtype=dtype, device="meta"),
                offsets=torch.empty(65, dtype=torch.int32, device="meta"),
                v=torch.empty(q, d_out, d_in, dtype=dtype, device="meta"),
            ),
        )
