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
    whole = v if v.ndim == 3 else v[None]
    form = op.tokens_are_cheaper(len(x), len(offsets) - 1, len(whole))
    out = op.forward_triton(x, g, offsets, whole, form)
    return out if v.ndim == 3 else out[:, 0]


RANKS = {"ragged": 4, "one": 1, "directions": 5, "blocks": 67, "empty": 2, "no-examples": 1}


def factor_inputs(variant, dtype):
    args = inputs(variant, dtype)
    q = args.pop("v").shape[:-2]
    rank, d_in, d_out = RANKS[variant], args["x"].shape[1], args["g"].shape[1]
    args["left"] = randn(*q, d_out, rank, seed=3, dtype=dtype)
    args["right"] = randn(*q, d_in, rank, seed=4, dtype=dtype)
    return args


def low_rank(x, g, offsets, left, right):
    return u2a_kernels.grad_dot(x, g, offsets, (left, right))


def low_rank_oracle(x, g, offsets, left, right):
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append(((g[s:e] @ left) * (x[s:e] @ right)).sum((-2, -1)))
    return torch.stack(rows) if rows else x.new_zeros(0, *left.shape[:-2])


def low_rank_triton(x, g, offsets, left, right):
    if left.ndim == 3:
        return op.low_rank_triton(x, g, offsets, left, right)
    return op.low_rank_triton(x, g, offsets, left[None], right[None])[:, 0]


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
            True,
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
    ),
    Case(
        name="grad_dot-low-rank",
        public=low_rank,
        overload=torch.ops.u2a.grad_dot_low_rank.default,
        op_args=lambda a: (a["x"], a["g"], a["offsets"], a["left"][None], a["right"][None]),
        inputs=factor_inputs,
        oracle=low_rank_oracle,
        variants=list(SHAPES),
        differentiable=("x", "g", "left", "right"),
        spoil=spoil,
        launchers={"triton": low_rank_triton},
        errors={
            "left": (
                changed(left=lambda a: a["left"][:-1]),
                ValueError,
                r"grad_dot: v\[0\] must be \[..., d_out, rank\] = \[7, 4\], got \[6, 4\]",
            ),
            "right": (
                changed(right=lambda a: a["right"][:, :-1]),
                ValueError,
                r"grad_dot: v\[1\] must be \[..., d_in, rank\] = \[13, 4\], got \[13, 3\]",
            ),
            "dtype": (
                changed(right=lambda a: a["right"].half()),
                TypeError,
                r"grad_dot: v\[1\] must have the dtype of x, torch.float32, got torch.float16",
            ),
            "offsets-end": (
                changed(offsets=lambda a: a["offsets"][:-1]),
                ValueError,
                r"grad_dot: offsets must be 0",
            ),
        },
    ),
]


def aot_inputs(dtype):
    """Sizes of a 7B model's MLP: one direction, several for few and many tokens, factors."""

    def empty(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    offsets = torch.empty(65, dtype=torch.int32, device="meta")
    for n, d_in, d_out, q in ((8192, 4096, 11008, 1), (64, 4096, 4096, 4), (8192, 4096, 11008, 4)):
        common = dict(x=empty(n, d_in), g=empty(n, d_out), offsets=offsets)
        yield "grad_dot", dict(**common, v=empty(q, d_out, d_in))
        for rank in (8, 64):
            factors = dict(left=empty(q, d_out, rank), right=empty(q, d_in, rank))
            yield "grad_dot-low-rank", common | factors
