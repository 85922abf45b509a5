"""grad_sketch, every kind, g dense or one-hot: ragged, single, blocked, long and empty inputs.

The oracle sketches each formed gradient; Philox and the sign matrices are written again here, in
Python integers. "long" is formed on the CPU where "wide" goes token by token.
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
    "long": ([90, 0, 41], 5, 6, 1024, 3),
    "empty": ([0, 0], 5, 3, 4, 1),
    "no-examples": ([], 4, 4, 8, 1),
}
LOW = 0xFFFFFFFF
KINDS = ("tensorsketch", "sjlt", "rademacher")


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


@functools.cache
def entry_words(seed, n_out, n_in, stream):
    """Four words of each entry (o, i), [n_out][n_in]."""
    key = (seed & LOW, seed >> 32)
    return [[philox((i, o, stream, 0x55324153), key) for i in range(n_in)] for o in range(n_out)]


@functools.cache
def sjlt_matrix(seed, n_out, n_in, k):
    """[k, n_out, n_in] float64, one non-zero per entry."""
    m = torch.zeros(k, n_out, n_in, dtype=torch.float64)
    for o, row in enumerate(entry_words(seed, n_out, n_in, 4)):
        for i, w in enumerate(row):
            m[w[0] & (k - 1), o, i] = (-1) ** (w[0] >> 31)
    return m


@functools.cache
def rademacher_matrix(seed, n_out, n_in, k):
    """[k, n_out, n_in] float64, signs over sqrt(k)."""
    blocks = []
    for block in range(-(-k // 128)):
        words = torch.tensor(entry_words(seed, n_out, n_in, 4 + 8 * (1 + block)))
        words = words.view(n_out, n_in, 4)
        bits = torch.stack([words >> b & 1 for b in range(32)], -1).view(n_out, n_in, 128)
        blocks.append((1 - 2 * bits).permute(2, 0, 1))
    return torch.cat(blocks)[:k].double() / k**0.5


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


def oracle_of(kind):
    if kind == "tensorsketch":
        return lambda x, g, offsets, k, seed, kind: oracle(x, g, offsets, k, seed)
    matrix = sjlt_matrix if kind == "sjlt" else rademacher_matrix

    def of_entries(x, g, offsets, k, seed, kind):
        m = matrix(seed, g.shape[1], x.shape[1], k).to(x.dtype)
        bounds = zip(offsets[:-1], offsets[1:], strict=True)
        rows = [torch.einsum("koi,oi->k", m, g[s:e].T @ x[s:e]) for s, e in bounds]
        return torch.stack(rows) if rows else x.new_zeros(0, k)

    return of_entries


def one_hot(function):
    """`function` given g as the matrix of the unit vectors that int64 g stands for."""

    def call(x, g, **rest):
        unit = torch.nn.functional.one_hot(g, 1 + int(g.max()) if len(g) else 1)
        return function(x, unit.to(x.dtype), **rest)

    return call


def inputs_of(kind, rows=False):
    def make(variant, dtype):
        args = inputs(variant, dtype) | dict(kind=kind)
        if rows:
            n, d_out = args["g"].shape
            args["g"] = torch.arange(n).mul(7).add(3).remainder(d_out)
        return args

    return make


def launchers(triton, reference, last):
    """Both with the public signature; on meta tensors (tests/aot.py) a reference has no values."""

    def call(launcher):
        return lambda x, g, offsets, k, seed, kind: launcher(x, g, offsets, k, seed, last)

    def plain(x, **rest):
        return None if x.is_meta else call(reference)(x, **rest)

    return {"triton": call(triton), "reference": plain}


def operands(args, *last):
    return (args["x"], args["g"], args["offsets"], args["k"], args["seed"], *last)


CASES = [
    Case(
        name="grad_sketch",
        public=u2a_kernels.grad_sketch,
        overload=torch.ops.u2a.grad_sketch.default,
        op_args=operands,
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
            "kind": (
                changed(kind=lambda a: "gaussian"),
                ValueError,
                r"grad_sketch: kind must be 'tensorsketch' or 'sjlt' or 'rademacher', got 'gau",
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
    ),
    *(
        Case(
            name=f"grad_sketch-{kind}",
            public=u2a_kernels.grad_sketch,
            overload=torch.ops.u2a.grad_sketch_entries.default,
            op_args=lambda a: operands(a, a["kind"] == "rademacher"),
            inputs=inputs_of(kind),
            oracle=oracle_of(kind),
            variants=list(SHAPES),
            differentiable=("x", "g"),
            spoil=spoil,
            launchers=launchers(op.entries_triton, op.reference_entries, kind == "rademacher"),
            errors={},
        )
        for kind in ("sjlt", "rademacher")
    ),
    *(
        Case(
            name=f"grad_sketch-{kind}-rows",
            public=u2a_kernels.grad_sketch,
            overload=torch.ops.u2a.grad_sketch_rows.default,
            op_args=lambda a: operands(a, KINDS.index(a["kind"])),
            inputs=inputs_of(kind, rows=True),
            oracle=one_hot(oracle_of(kind)),
            variants=list(SHAPES),
            differentiable=("x",),
            spoil=spoil,
            launchers=launchers(op.rows_triton, op.reference_rows, number),
            errors={
                "tokens": (
                    changed(g=lambda a: a["g"][:-1]),
                    ValueError,
                    r"grad_sketch: g must be \[N\] where it is int64 = \[23\], got \[22\]",
                ),
                "negative": (
                    changed(g=lambda a: a["g"] - 4),
                    ValueError,
                    r"grad_sketch: g must be row numbers from 0 to 2\^31 - 1, got -1",
                ),
            },
        )
        for number, kind in enumerate(KINDS)
    ),
]


def aot_inputs(dtype):
    """Sizes of a 7B model's MLP: long and short examples, a usual and a large sketch."""
    for n, b, k in ((8192, 16, 4096), (2048, 128, 65536)):
        for kind in KINDS:
            args = dict(
                x=torch.empty(n, 4096, dtype=dtype, device="meta"),
                g=torch.empty(n, 11008, dtype=dtype, device="meta"),
                offsets=torch.empty(b + 1, dtype=torch.int32, device="meta"),
                k=k,
                seed=0,
                kind=kind,
            )
            rows = args | dict(g=torch.empty(n, dtype=torch.int64, device="meta"))
            yield f"grad_sketch-{kind}-rows", rows
            if kind == "tensorsketch":
                del args["kind"]
            yield "grad_sketch" if kind == "tensorsketch" else f"grad_sketch-{kind}", args
