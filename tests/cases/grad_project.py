"""grad_project with every kind of projection; the oracle forms each gradient and projects it with
matrices made from Philox in Python integers."""

import functools

import torch

import u2a_kernels
from cases import Case
from cases.grad_dot import changed
from cases.grad_sketch import LOW, philox
from u2a_kernels import Rademacher
from u2a_kernels.ops import grad_project as op
from u2a_kernels.testing import offsets_of, randn

BIG = (1 << 63) - 1
TENSORS = {
    "ragged": ([5, 0, 17, 1], 13, 7, 4, 3),
    "one": ([1], 1, 1, 1, 1),
    "prime": ([31, 2], 37, 67, 5, 11),
    "blocks": ([3, 30], 70, 33, 130, 66),
    "deep": ([130, 3, 300], 600, 300, 16, 33),
    "empty": ([0, 0], 5, 3, 2, 4),
    "no-examples": ([], 4, 4, 2, 2),
    "no-rows": ([2, 1], 4, 4, 0, 3),
}
# lengths, d_in, d_out, p_in, p_out; an integer stands for a tensor of so many rows
SEEDS = {
    "both": ([5, 0, 17, 1], 13, 7, Rademacher(4, 7), Rademacher(3, 7)),
    "in": ([31, 2], 37, 19, Rademacher(5, BIG), 11),
    "out": ([2, 20], 23, 70, 6, Rademacher(17, 5 << 32)),
    "words": ([3, 8], 33, 40, Rademacher(130, 0), Rademacher(256, 1)),
    "deep": ([140], 530, 270, Rademacher(16, 3), Rademacher(40, 4)),
    "empty": ([0, 0], 5, 3, Rademacher(2, 1), Rademacher(4, 2)),
}
IDENTITIES = {
    "in": ([5, 0, 17, 1], 13, 7, None, 3),
    "out": ([31, 2], 37, 67, 5, None),
    "both": ([9, 4], 21, 18, None, None),
    "in-seed": ([3, 140], 16, 20, None, Rademacher(5, 6)),
    "out-seed": ([7, 3], 20, 300, Rademacher(20, 6), None),
    "wide": ([5, 9], 290, 33, None, 40),
    "empty": ([0, 0], 5, 3, None, 4),
}
ONE_HOT = {
    "tensor": ([5, 0, 17, 1], 13, 50, 4, 3),
    "seed": ([4, 2], 13, 50, Rademacher(4, 8), Rademacher(140, 9)),
    "identity": ([31, 2], 37, 1000, None, 11),
    "long": ([150, 20], 8, 30, None, Rademacher(6, 2)),
    "empty": ([0], 5, 30, 2, 4),
}
MAPS = {  # d_out and p_out a map
    "tensors": ([5, 0, 17, 1], 13, 4, [(7, 3), (5, 9)]),
    "seeds": ([4, 2], 13, Rademacher(4, 8), [(7, Rademacher(3, 1)), (7, Rademacher(3, 2))]),
    "mixed": ([31, 2], 21, 5, [(9, None), (67, Rademacher(6, 4)), (7, 2)]),
    "identity": ([6, 1], 16, None, [(9, 3), (7, None)]),
    "empty": ([0], 5, 2, [(3, 2), (4, 1)]),
}


@functools.cache
def sign_matrix(k, d, seed, stream):
    """[k, d] float64: sqrt(k) times the projection of a seed."""
    columns = []
    for c in range(d):
        bits = 0
        for block in range((k + 127) // 128):
            words = philox((c, block, stream, 0x55324153), (seed & LOW, seed >> 32))
            bits |= sum(w << (32 * i) for i, w in enumerate(words)) << (128 * block)
        columns.append([1 - 2 * (bits >> j & 1) for j in range(k)])
    return torch.tensor(columns, dtype=torch.float64).reshape(d, k).T


def projection(p, d, seed, dtype):
    return randn(p, d, seed=seed, dtype=dtype) if isinstance(p, int) else p


def inputs_of(shapes, hot=False):
    def inputs(variant, dtype):
        lengths, d_in, d_out, p_in, p_out = shapes[variant]
        n = sum(lengths)
        ids = torch.randint(d_out, (n,), generator=torch.Generator().manual_seed(2))
        return dict(
            x=randn(n, d_in, seed=1, dtype=dtype),
            g=ids if hot else randn(n, d_out, seed=2, dtype=dtype),
            offsets=offsets_of(lengths),
            p_in=projection(p_in, d_in, 3, dtype),
            p_out=projection(p_out, d_out, 4, dtype),
        )

    return inputs


def map_inputs(variant, dtype):
    lengths, d_in, p_in, maps = MAPS[variant]
    n = sum(lengths)
    args = dict(x=randn(n, d_in, seed=1, dtype=dtype), offsets=offsets_of(lengths))
    args["p_in"] = projection(p_in, d_in, 3, dtype)
    for i, (d_out, p_out) in enumerate(maps):
        args[f"g{i}"] = randn(n, d_out, seed=10 + i, dtype=dtype)
        args[f"p_out{i}"] = projection(p_out, d_out, 20 + i, dtype)
    return args


def gathered(args):
    """Arguments of the public function from those of a maps case."""
    count = sum(name.startswith("g") for name in args)
    lists = {name: [args[f"{name}{i}"] for i in range(count)] for name in ("g", "p_out")}
    return {**{name: args[name] for name in ("x", "offsets", "p_in")}, **lists}


def dense(p, d, stream, like):
    if isinstance(p, Rademacher):
        return (sign_matrix(p.k, d, p.seed, stream) / p.k**0.5).to(like.dtype)
    return torch.eye(d, dtype=like.dtype) if p is None else p


def oracle(x, g, offsets, p_in, p_out):
    if g.ndim == 1:
        d_out = p_out.shape[1] if isinstance(p_out, torch.Tensor) else 50
        g = torch.nn.functional.one_hot(g, d_out).to(x.dtype)
    left, right = dense(p_out, g.shape[1], 2, g), dense(p_in, x.shape[1], 3, x)
    rows = []
    for s, e in zip(offsets[:-1], offsets[1:], strict=True):
        rows.append(left @ (g[s:e].T @ x[s:e]) @ right.T)
    return torch.stack(rows) if rows else x.new_zeros(0, left.shape[0], right.shape[0])


def map_oracle(**args):
    args = gathered(args)
    both = zip(args.pop("g"), args.pop("p_out"), strict=True)
    return [oracle(g=g, p_out=p, **args) for g, p in both]


def arguments(x, g, offsets, p_in, p_out):
    """The operator's arguments."""
    g, ps = (list(g), list(p_out)) if isinstance(g, list) else ([g], [p_out])
    k, seed = zip(*(p if isinstance(p, Rademacher) else (0, -1) for p in (p_in, *ps)), strict=True)
    tensors = [p if isinstance(p, torch.Tensor) else x.new_empty(0) for p in ps]
    first = p_in if isinstance(p_in, torch.Tensor) else None
    return x, g, offsets, first, tensors, k[0], list(k[1:]), seed[0], list(seed[1:])


def through(function):
    def launch(**args):
        out = function(*arguments(**args))
        return out if isinstance(args["g"], list) else out[0]

    return launch


def with_maps(function):
    return lambda **args: function(**gathered(args))


def spoil(args):
    """NaN in the first token of the first non-empty example."""
    lengths = args["offsets"].diff()
    bad = int((lengths > 0).nonzero()[0])
    args["x"][args["offsets"][bad]] = float("nan")
    keep = [b for b in range(len(lengths)) if b != bad]
    return lambda out: [o[keep] for o in out]


LAUNCHERS = {"triton": through(op.forward_triton)}


def case(name, shapes, errors, hot=False):
    return Case(
        name=name,
        public=u2a_kernels.grad_project,
        overload=torch.ops.u2a.grad_project.default,
        op_args=lambda a: arguments(**a),
        inputs=inputs_of(shapes, hot),
        oracle=oracle,
        variants=list(shapes),
        differentiable=differentiable(shapes, hot),
        spoil=spoil,
        launchers=LAUNCHERS,
        errors=errors,
    )


def differentiable(shapes, hot):
    """Projections only where no variant has a seed in their place."""
    sides = {"p_in": 3, "p_out": 4}
    seeded = {n for n, i in sides.items() for s in shapes.values() if isinstance(s[i], Rademacher)}
    return tuple(
        n for n in ("x", "g", "p_in", "p_out") if n not in seeded and (n != "g" or not hot)
    )


TENSOR_ERRORS = {
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
        r"grad_project: p_out must have the dtype of g",
    ),
    "inputs-dtype": (
        changed(p_in=lambda a: a["p_in"].double()),
        TypeError,
        r"grad_project: p_in must have the dtype of x",
    ),
    "double": (
        changed(g=lambda a: a["g"].double(), p_out=lambda a: a["p_out"].double()),
        TypeError,
        r"grad_project: g must be float64 where x is, got torch.float64 and torch.float32",
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
    "projection": (
        changed(p_in=lambda a: 4),
        TypeError,
        r"grad_project: p_in must be a torch.Tensor, Rademacher\(k, seed\) or None, got int",
    ),
}
SEED_ERRORS = {
    "seed": (
        changed(p_in=lambda a: Rademacher(4, -1)),
        ValueError,
        r"grad_project: p_in seed must be an integer from 0 to 2\^63 - 1, got -1",
    ),
    "k": (
        changed(p_out=lambda a: Rademacher(0, 1)),
        ValueError,
        r"grad_project: p_out k must be an integer from 1 to 2\^63 - 1, got 0",
    ),
}
HOT_ERRORS = {
    "rows": (
        changed(g=lambda a: a["g"][:-1]),
        ValueError,
        r"grad_project: g must be \[N\] = \[23\], got \[22\]",
    ),
    "identity": (
        changed(p_out=lambda a: None),
        ValueError,
        r"grad_project: p_out must be a projection where g is int64 \(d_out is unknown\), got None",
    ),
    "range": (
        changed(g=lambda a: a["g"].clone().index_fill_(0, torch.tensor([2]), 50)),
        ValueError,
        r"grad_project: g must be in \[0, d_out = 50\), got 50 at 2",
    ),
    "negative": (
        changed(g=lambda a: a["g"] - 60, p_out=lambda a: Rademacher(4, 1)),
        ValueError,
        r"grad_project: g must be in \[0, d_out = 4294967296\), got -",
    ),
    "dtype": (
        changed(p_out=lambda a: a["p_out"].double()),
        TypeError,
        r"grad_project: p_out must have the dtype of x",
    ),
}
MAP_ERRORS = {
    "rows": (
        changed(g1=lambda a: a["g1"][1:]),
        ValueError,
        r"grad_project: g\[1\] must be \[N, d_out\] = \[23, 5\], got \[22, 5\]",
    ),
    "outputs": (
        changed(p_out0=lambda a: a["p_out1"]),
        ValueError,
        r"grad_project: p_out\[0\] must be \[k_out, d_out\] = \[9, 7\], got \[9, 5\]",
    ),
}

CASES = [
    case("grad_project", TENSORS, TENSOR_ERRORS),
    case("grad_project-seed", SEEDS, SEED_ERRORS),
    case("grad_project-identity", IDENTITIES, {}),
    case("grad_project-one-hot", ONE_HOT, HOT_ERRORS, hot=True),
    Case(
        name="grad_project-maps",
        public=with_maps(u2a_kernels.grad_project),
        overload=torch.ops.u2a.grad_project.default,
        op_args=lambda a: arguments(**gathered(a)),
        inputs=map_inputs,
        oracle=map_oracle,
        variants=list(MAPS),
        differentiable=("x", "g0", "g1", "g2"),
        spoil=spoil,
        launchers={name: with_maps(f) for name, f in LAUNCHERS.items()},
        errors=MAP_ERRORS,
        grad_outputs=(0, 1),
    ),
]


def aot_inputs(dtype):
    """MLP sizes of 1B and 8B models, an embedding; few long and many short examples."""

    def made(n, b, d_in, d_out, p_in, p_out, hot=False):
        def tensor(*shape):
            return torch.empty(*shape, dtype=dtype, device="meta")

        return dict(
            x=tensor(n, d_in),
            g=torch.empty(n, dtype=torch.int64, device="meta") if hot else tensor(n, d_out),
            offsets=torch.empty(b + 1, dtype=torch.int32, device="meta"),
            p_in=tensor(p_in, d_in) if isinstance(p_in, int) else p_in,
            p_out=tensor(p_out, d_out) if isinstance(p_out, int) else p_out,
        )

    yield "grad_project", made(8192, 16, 4096, 14336, 16, 16)
    yield "grad_project", made(65536, 128, 4096, 14336, 64, 64)
    yield "grad_project", made(2048, 128, 2048, 5632, 256, 256)
    for k in (16, 64):
        yield "grad_project-seed", made(8192, 16, 2048, 5632, Rademacher(k, 1), Rademacher(k, 2))
    yield "grad_project-identity", made(8192, 16, 16, 4096, None, 16)
    yield "grad_project-one-hot", made(8192, 16, 16, 128256, None, Rademacher(16, 2), hot=True)
