"""dual_attention: grouped heads, caches, windows, caps, packed segments, queries without keys.

The oracle is the jvp of softmax attention with an explicit mask, one example and head at a time.
"""

import math

import torch

import u2a_kernels
from cases import Case
from u2a_kernels.ops.dual_attention import backward
from u2a_kernels.ops.dual_attention import triton as forward
from u2a_kernels.testing import offsets_of, randn

SHAPES = {  # B, H, Hkv, T, S, D, options
    "grouped": (2, 4, 2, 9, 9, 8, {}),
    "cache-cap": (2, 2, 2, 6, 11, 8, dict(softcap=1.5, scale=0.4)),
    "window": (2, 2, 1, 13, 13, 8, dict(window=3)),
    "window-cache-cap": (2, 2, 1, 7, 12, 8, dict(window=4, softcap=2.0)),
    "full": (2, 2, 1, 7, 12, 8, dict(causal=False)),
    "blind": (2, 2, 1, 11, 7, 8, {}),
    "one": (1, 1, 1, 1, 1, 1, {}),
    "block": (1, 2, 1, 67, 67, 17, {}),
    "wide": (1, 2, 1, 35, 35, 80, dict(softcap=5.0)),
    "widest": (1, 1, 1, 19, 19, 130, {}),
    "window-blocks": (1, 1, 1, 131, 131, 16, dict(window=40)),
}
PACKED = {  # lengths, H, Hkv, D, options
    "packed": ([3, 0, 11, 1, 7], 4, 2, 8, {}),
    "packed-window-cap": ([4, 12], 2, 1, 8, dict(window=3, softcap=1.5)),
    "packed-full": ([9, 14], 2, 1, 8, dict(causal=False)),
    "packed-empty": ([0, 0], 2, 1, 8, {}),
}
DEFAULTS = dict(scale=None, causal=True, offsets=None, window=None, softcap=None)


def inputs(variant, dtype):
    if variant in PACKED:
        lengths, h, h_kv, d, options = PACKED[variant]
        n = sum(lengths)
        shape_q, shape_k = (2 * n, h, d), (2 * n, h_kv, d)
        options = dict(options, offsets=offsets_of(lengths))
    else:
        b, h, h_kv, t, s, d, options = SHAPES[variant]
        shape_q, shape_k = (2 * b, h, t, d), (2 * b, h_kv, s, d)
    return dict(
        q=1.5 * randn(*shape_q, seed=1, dtype=dtype),
        k=randn(*shape_k, seed=2, dtype=dtype),
        v=randn(*shape_k, seed=3, dtype=dtype),
        **{**DEFAULTS, **options},
    )


def head(q, k, v, scale, causal, window, softcap):
    """[T, D], [S, D], [S, D] -> [T, D]."""
    scores = q @ k.T * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    t, s = scores.shape
    query, key = torch.arange(t)[:, None] + s - t, torch.arange(s)[None]
    seen = torch.ones(t, s, dtype=torch.bool)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= key > query - window
    some = seen.any(1)
    rows = torch.softmax(scores[some].masked_fill(~seen[some], -math.inf), -1) @ v
    return torch.zeros_like(q).index_put((some.nonzero()[:, 0],), rows)


def oracle(q, k, v, scale, causal, offsets, window, softcap):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rep = q.shape[1] // k.shape[1]

    def example(q, k, v):
        """[H, T, D], [Hkv, S, D], [Hkv, S, D] -> [H, T, D]."""
        return torch.stack(
            [
                head(q[h], k[h // rep], v[h // rep], scale, causal, window, softcap)
                for h in range(q.shape[0])
            ]
        )

    def attention(q, k, v):
        if offsets is None:
            return torch.stack([example(*one) for one in zip(q, k, v, strict=True)])
        parts = [
            example(*(x[s:e].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
            for s, e in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            if e > s
        ]
        return torch.cat(parts) if parts else torch.zeros_like(q)

    primal, tangent = zip(q.chunk(2), k.chunk(2), v.chunk(2), strict=True)
    return torch.cat(torch.func.jvp(attention, primal, tangent))


def op_args(a):
    scale = a["q"].shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    options = (a["offsets"], scale, a["causal"], a["window"], a["softcap"], "hvp")
    return a["q"], a["k"], a["v"], *options


class Launched(torch.autograd.Function):
    """The Triton launchers in the op's place, forward and backward."""

    @staticmethod
    def forward(ctx, *args):
        out, stats = forward.forward(*args)
        ctx.save_for_backward(*args[:3], out, stats)
        ctx.options = args[3:]
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = backward.backward(grad, *ctx.saved_tensors, *ctx.options)
        return *grads, *[None] * len(ctx.options)


def triton(q, k, v, mode="hvp", **options):
    return Launched.apply(*op_args(dict(q=q, k=k, v=v, **options))[:-1], mode)


def spoil(args):
    """NaN in one key of the first example; the others stay."""
    args["k"][0, 0, 1] = float("nan")
    return lambda out: [out[0][[1, 3]]]


CASES = [
    Case(
        name="dual_attention",
        public=u2a_kernels.dual_attention,
        overload=torch.ops.u2a.dual_attention.default,
        op_args=op_args,
        inputs=inputs,
        oracle=oracle,
        variants=[*SHAPES, *PACKED],
        differentiable=("q", "k", "v"),
        spoil=spoil,
        launchers={"triton": triton},
        backward_launchers={"triton": triton},
        errors={
            "odd": (
                lambda a: {**a, "q": a["q"][:3]},
                ValueError,
                r"dual_attention: q must be \[2B, H, T, D\], .* got \[3, 4, 9, 8\]",
            ),
            "packed-shape": (
                lambda a: {**a, "offsets": offsets_of([2])},
                ValueError,
                r"dual_attention: q must be \[2N, H, D\], got \[4, 4, 9, 8\]",
            ),
            "rows": (
                lambda a: {**a, "k": a["k"][:2]},
                ValueError,
                r"dual_attention: k must be .* with 4 rows as q has, got \[2, 2, 9, 8\]",
            ),
            "heads": (
                lambda a: {**a, "q": a["q"][:, :3]},
                ValueError,
                r"dual_attention: k must be .* Hkv dividing H = 3, got \[4, 2, 9, 8\]",
            ),
            "depth": (
                lambda a: {**a, "k": a["k"][..., :2]},
                ValueError,
                r"dual_attention: k must be .* D = 8 and .* got \[4, 2, 9, 2\]",
            ),
            "values": (
                lambda a: {**a, "v": a["v"][:, :, :4]},
                ValueError,
                r"dual_attention: v must be .* of k, \[4, 2, 9, 8\], got \[4, 2, 4, 8\]",
            ),
            "window": (
                lambda a: {**a, "window": 0},
                ValueError,
                r"dual_attention: window must be at least 1, .* got 0",
            ),
            "window-full": (
                lambda a: {**a, "window": 2, "causal": False},
                ValueError,
                r"dual_attention: window must be .* causal=True, got 2, causal=False",
            ),
            "softcap": (
                lambda a: {**a, "softcap": 0.0},
                ValueError,
                r"dual_attention: softcap must be positive or None, got 0.0",
            ),
            "mode": (
                lambda a: {**a, "mode": "full"},
                ValueError,
                r"dual_attention: mode must be 'hvp', 'ggn' or 'jvp', got 'full'",
            ),
        },
    )
]


def aot_inputs(dtype):
    """Llama (D = 128, grouped), a small head, a window, a packed batch, Gemma (D = 256, capped).
    float32 products are FMA loops, without spills up to D = 64 only."""
    sizes = [(64, 16, 16, {})]
    if dtype != torch.float32:
        sizes += [(128, 32, 8, {}), (128, 32, 8, dict(window=1024))]
        sizes += [(256, 8, 4, dict(softcap=50.0, scale=256**-0.5))]
        q, k, v = (torch.empty(8192, n, 128, dtype=dtype, device="meta") for n in (32, 8, 8))
        offsets = torch.empty(9, dtype=torch.int32, device="meta")
        yield "dual_attention", dict(q=q, k=k, v=v, **{**DEFAULTS, "offsets": offsets})
    for d, h, h_kv, options in sizes:
        q, k, v = (torch.empty(4, n, 2048, d, dtype=dtype, device="meta") for n in (h, h_kv, h_kv))
        yield "dual_attention", dict(q=q, k=k, v=v, **{**DEFAULTS, **options})
