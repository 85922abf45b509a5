"""grad_sketch: ragged, single, blocked and empty inputs; the oracle sketches each formed gradient.

Philox and the sign matrix are written again here, in Python integers.
"""

import functools

import torch

import u2a_kernels
from cases import Case
from cases.grad_dot import changed, spoil
from u2a_kernels.ops import grad_sketch as op
from u2a_kernels.testing import offsets_of, randn

SHAPES = {
    "ragged": ([5, 0, 17, 1], 13, 7, 32, 7),
    "one": ([1], 1, 1, 2, 0),
    "prime": ([31, 2], 37, 67, 128, (1 << 63) - 1),
    "wide": ([3, 2], 23, 19, 512, 5 << 32),
    "empty": ([0, 0], 5, 3, 4, 1),
    "no-examples": ([], 4, 4, 8, 1),
}
LOW = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011): four words from four and a key of two."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & LOW, (a >> 32) ^ c[3] ^ k[1], a & LOW]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    return c


@functools.cache
def words(seed, stream, n):
    key = (seed & LOW, seed >> 32)
    return [philox((c & LOW, c >> 32, stream, 0x55324153), key)[0] for c in range(n)]


@functools.cache
def sign_matrix(seed, stream, n, k):
    """P[j, c] = s(c) (-1)^popcount(j & h(c)), [k, n] float64."""
    columns = [
        [(-1) ** ((w >> 31) + (j & w & (k - 1)).bit_count()) for j in range(k)]
        for w in words(seed, stream, n)
    ]
    return torch.tensor(columns, dtype=torch.float64).T


def inputs(variant, dtype):
    lengths, d_in, d_out, k, seed = SHAPES[variant]
    n = sum(lengths)
    return dict(
        x=randn(n, d_in, seed=1, dtype=dtype),
        g=randn(n, d_out, seed=2, dtype=dtype),
        offsets=offsets_of(lengths),
        k=k,
        seed=seed,
    )


def oracle(x, g, offsets, k, seed):
    p_out = sign_matrix(seed, 0, g.shape[1], k).to(x.dtype)
    p_in = sign_matrix(seed, 1, x.shape[1], k).to(x.dtype)
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append(((p_out @ (g[s:e].T @ x[s:e])) * p_in).sum(1) / k**0.5)
    return torch.stack(rows) if rows else x.new_zeros(0, k)


CASES = [
    Case(
        name="grad_sketch",
        public=u2a_kernels.grad_sketch,
        overload=torch.ops.u2a.grad_sketch.default,
        op_args=lambda a: (a["x"], a["g"], a["offsets"], a["k"], a["seed"]),
        inputs=inputs,
        oracle=oracle,
        variants=list(SHAPES),
        differentiable=("x", "g"),
        spoil=spoil,
        launchers={"triton": op.forward_triton, "reference": op.reference},
        errors={
            "rows": (
                changed(g=lambda a: a["g"][:-1]),
                ValueError,
                r"grad_sketch: g must be \[N, d_out\] = \[23, 7\], got \[22, 7\]",
            ),
            "features": (
                changed(k=lambda a: 48),
                ValueError,
                r"grad_sketch: k must be a power of two from 2 to 65536, got 48",
            ),
            "one-feature": (
                changed(k=lambda a: 1),
                ValueError,
                r"grad_sketch: k must be a power of two from 2 to 65536, got 1",
            ),
            "seed": (
                changed(seed=lambda a: -1),
                ValueError,
                r"grad_sketch: seed must be an integer from 0 to 2\^63 - 1, got -1",
            ),
            "out-shape": (
                changed(out=lambda a: torch.zeros(3, 32)),
                ValueError,
                r"grad_sketch: out must be \[B, k\] = \[4, 32\], got \[3, 32\]",
            ),
            "out-dtype": (
                changed(out=lambda a: torch.zeros(4, 32, dtype=torch.float64)),
                TypeError,
                r"grad_sketch: out must be torch.float32 on cpu, got torch.float64 on cpu",
            ),
            "dtype": (
                changed(g=lambda a: a["g"].double()),
                TypeError,
                r"grad_sketch: g must have the dtype of x",
            ),
            "offsets-end": (
                changed(offsets=lambda a: a["offsets"][:-1]),
                ValueError,
                r"grad_sketch: offsets must be 0 first and N = 23",
            ),
        },
    )
]


def aot_inputs(dtype):
    """Sizes of a 7B model's MLP: long and short examples, a usual and a large sketch."""
    for n, b, k in ((8192, 16, 4096), (2048, 128, 65536)):
        yield (
            "grad_sketch",
            dict(
                x=torch.empty(n, 4096, dtype=dtype, device="meta"),
                g=torch.empty(n, 11008, dtype=dtype, device="meta"),
                offsets=torch.empty(b + 1, dtype=torch.int32, device="meta"),
                k=k,
                seed=0,
            ),
        )
