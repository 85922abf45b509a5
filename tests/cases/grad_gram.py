"""grad_gram: two ragged sets, both forms (short and long examples), single and empty ones."""

import torch

import u2a_kernels
from cases import Case
from cases.grad_dot import changed, spoil
from u2a_kernels.ops import grad_gram as op
from u2a_kernels.testing import offsets_of, randn

SHAPES = {
    "ragged": ([5, 0, 17, 1], [3, 11, 0], 13, 7),
    "one": ([1], [1], 1, 1),
    "prime": ([31, 2], [29, 3], 37, 67),
    "long": ([43, 2], [2, 41], 5, 7),
    "blocks": ([70, 0, 61, 1], [40, 90], 65, 129),
    "empty": ([0, 0], [4, 0], 5, 3),
    "no-examples": ([], [2], 4, 4),
}


def inputs(variant, dtype):
    lengths, lengths2, d_in, d_out = SHAPES[variant]
    return dict(
        x=randn(sum(lengths), d_in, seed=1, dtype=dtype),
        g=randn(sum(lengths), d_out, seed=2, dtype=dtype),
        offsets=offsets_of(lengths),
        x2=randn(sum(lengths2), d_in, seed=3, dtype=dtype),
        g2=randn(sum(lengths2), d_out, seed=4, dtype=dtype),
        offsets2=offsets_of(lengths2, torch.int64),
    )


def gradients(x, g, offsets):
    rows = [g[s:e].T @ x[s:e] for s, e in zip(offsets[:-1], offsets[1:], strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, g.shape[1], x.shape[1])


def oracle(x, g, offsets, x2, g2, offsets2):
    return torch.einsum("boi,coi->bc", gradients(x, g, offsets), gradients(x2, g2, offsets2))


def choice(x, g, offsets, x2, offsets2):
    sizes = len(x), len(offsets) - 1, len(x2), len(offsets2) - 1
    return op.tokens_are_cheaper(*sizes, x.shape[1], g.shape[1])


def triton(x, g, offsets, x2, g2, offsets2):
    form = choice(x, g, offsets, x2, offsets2)
    return op.forward_triton(x, g, offsets, x2, g2, offsets2, False, form)


def same(x, g, offsets):
    return u2a_kernels.grad_gram(x, g, offsets, x, g, offsets)


def same_triton(x, g, offsets):
    form = choice(x, g, offsets, x, offsets)
    return op.forward_triton(x, g, offsets, x, g, offsets, True, form)


def same_inputs(variant, dtype):
    args = inputs(variant, dtype)
    return {k: args[k] for k in ("x", "g", "offsets")}


def same_spoil(args):
    """A NaN in one example reaches its row and its column only."""
    keep = spoil(args)
    return lambda out: [keep((keep(out)[0].T,))[0]]


CASES = [
    Case(
        name="grad_gram",
        public=u2a_kernels.grad_gram,
        overload=torch.ops.u2a.grad_gram.default,
        op_args=lambda a: (
            *(a[k] for k in ("x", "g", "offsets", "x2", "g2", "offsets2")),
            False,
            True,
        ),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "g", "x2", "g2"),
        spoil=spoil,
        launchers={"triton": triton},
        errors={
            "rows": (
                changed(g2=lambda a: a["g2"][:-1]),
                ValueError,
                r"grad_gram: g2 must be \[N2, d_out\] = \[14, 7\], got \[13, 7\]",
            ),
            "inputs": (
                changed(x2=lambda a: a["x2"][:, 1:]),
                ValueError,
                r"grad_gram: x2 must be \[N2, d_in\] = \[14, 13\], got \[14, 12\]",
            ),
            "dtype": (
                changed(x2=lambda a: a["x2"].double()),
                TypeError,
                r"grad_gram: x2 must have the dtype of x",
            ),
            "offsets-end": (
                changed(offsets=lambda a: a["offsets"][:-1]),
                ValueError,
                r"grad_gram: offsets must be 0 first and N = 23 \(rows of x\) last, got 0 and 22",
            ),
            "second-offsets": (
                changed(offsets2=lambda a: a["offsets2"] + 1),
                ValueError,
                r"grad_gram: offsets2 must be 0 first and N = 14 \(rows of x2\) last, got 1 and 15",
            ),
        },
    ),
    Case(
        name="grad_gram-same",
        public=same,
        overload=torch.ops.u2a.grad_gram.default,
        op_args=lambda a: (*[a[k] for k in ("x", "g", "offsets")] * 2, True, False),
        inputs=same_inputs,
        oracle=lambda x, g, offsets: oracle(x, g, offsets, x, g, offsets),
        variants=[v for v in SHAPES if v != "no-examples"],
        differentiable=("x", "g"),
        spoil=same_spoil,
        launchers={"triton": same_triton},
        errors={
            "rows": (
                changed(g=lambda a: a["g"][:-1]),
                ValueError,
                r"grad_gram: g must be \[N, d_out\] = \[23, 7\], got \[22, 7\]",
            ),
        },
    ),
]


def aot_inputs(dtype):
    """Sizes of a 7B model: 2048 short prompts (by tokens), and 32 x 512 tokens (by gradients)."""

    def side(n, b, d_in, d_out):
        return (
            torch.empty(n, d_in, dtype=dtype, device="meta"),
            torch.empty(n, d_out, dtype=dtype, device="meta"),
            torch.empty(b + 1, dtype=torch.int32, device="meta"),
        )

    for n, b, n2, b2 in ((4096, 2048, 8192, 64), (16384, 32, 4096, 16)):
        first, second = side(n, b, 4096, 11008), side(n2, b2, 4096, 11008)
        names = ("x", "g", "offsets", "x2", "g2", "offsets2")
        yield "grad_gram", dict(zip(names, first + second, strict=True))
        yield "grad_gram-same", dict(zip(names, first, strict=False))
