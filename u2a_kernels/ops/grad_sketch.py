"""XOR-TensorSketch of the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

Hashes and signs of an entry (o, i) are those of o and i combined by XOR and by product, so that in
the Walsh-Hadamard domain the sketch of G_b is sum_t (H C_out g_t) * (H C_in x_t), elementwise: it
needs x and g only. Features stay in that domain, where any module adds into the same k numbers.
Saved for backward: the inputs; the backward is the transposed transform, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size, wanted
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, segment_ids
from u2a_kernels._triton import cuda_launcher, dot_dtype, dot_precision, tl, triton

TAG = 0x55324153
OUTPUTS, INPUTS = 0, 1
CHUNK = 1 << 22


def grad_sketch(
    x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, *, out: Tensor | None = None
) -> Tensor:
    """Sketch every example's weight gradient into k numbers whose inner products are unbiased.

    E <sketch(G), sketch(G')> = <G, G'>, with a variance of about (|G|^2 |G'|^2 + <G, G'>^2) / k.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.
        k: number of features, a power of two from 2 to 65536.
        seed: 0 <= seed < 2^63. One seed a module: with equal seeds, entries of two modules that
            share o and i would collide always.
        out: [B, k], dtype of the result: added to in place and returned, for the sum over modules.

    Returns:
        [B, k], float32 (float64 for float64 inputs), accumulated in that type; deterministic.
        Differentiable once in x and g; with `out` as torch's in-place add is.

    Raises:
        ValueError, TypeError: a shape, dtype, device, offset, k or seed that does not fit, by name.

    The streams, on every device and version: word 0 of Philox4x32-10 with key (seed mod 2^32,
    seed >> 32) and counter (c mod 2^32, c >> 32, stream, 0x55324153), for coordinate c of g
    (stream 0, "outputs") or of x (stream 1, "inputs"). Bucket h(c) is the word's low log2(k) bits,
    sign s(c) is -1 where its bit 31 is set. With P[j, c] = s(c) (-1)^popcount(j & h(c)):

    Equivalent torch: ``torch.stack([((P_out @ g[s:e].T) * (P_in @ x[s:e].T)).sum(1) / k**0.5 for
    s, e in segments])``, which is ``((P_out @ G_b) * P_in).sum(1) / k**0.5``.

    Source: TensorSketch (Pham and Pagh, KDD 2013) with XOR in place of addition modulo k and the
    Walsh-Hadamard in place of the Fourier transform; Philox: Salmon et al., SC 2011.
    """
    op = "grad_sketch"
    check_floats(op, x=x, g=g)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    check_offsets(op, offsets, x.shape[0])
    if not isinstance(k, int) or not 2 <= k <= 65536 or k & (k - 1):
        raise wanted(op, "k", "a power of two from 2 to 65536", k)
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise wanted(op, "seed", "an integer from 0 to 2^63 - 1", seed)
    if out is None:
        return _grad_sketch(x, g, offsets, k, seed)
    if not isinstance(out, Tensor) or out.dtype != accum_dtype(x) or out.device != x.device:
        got = f"{out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{op}: out must be {accum_dtype(x)} on {x.device}, got {got}")
    check_size(op, "out", out, "[B, k]", (offsets.shape[0] - 1, k))
    return out.add_(_grad_sketch(x, g, offsets, k, seed))


def sketch_hash(seed: int, stream: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Word 0 of Philox4x32-10 for coordinates 0 .. n-1, int64 `[n]` holding 32 bits each."""
    low = 0xFFFFFFFF

    def mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a 32 x 32 bit product, in int64 without overflow."""
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, (lower + ((upper & 0xFFFF) << 16)) & low

    c0 = torch.arange(n, device=device)
    c1, c2, c3 = c0 >> 32, torch.full_like(c0, stream), torch.full_like(c0, TAG)
    c0 = c0 & low
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        hi0, lo0 = mul(0xD2511F53, c0)
        hi1, lo1 = mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def _hadamard(z: Tensor) -> Tensor:
    """Walsh-Hadamard transform along the last dimension, natural order, not normalised."""
    n, k, h = z.shape[0], z.shape[1], 1
    while h < k:
        pairs = z.view(n, -1, 2, h)
        z = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        h *= 2
    return z.reshape(n, k)


class _Factor:
    """H C of one stream: `apply` maps [n, d] to [n, k], `transpose` back."""

    def __init__(self, seed: int, stream: int, d: int, k: int, like: Tensor) -> None:
        word = sketch_hash(seed, stream, d, like.device)
        self.k = k
        self.bucket = word & (k - 1)
        self.sign = (1 - 2 * (word >> 31)).to(accum_dtype(like))

    def apply(self, rows: Tensor) -> Tensor:
        signed = rows.to(self.sign.dtype) * self.sign
        z = signed.new_zeros(rows.shape[0], self.k)
        return _hadamard(z.index_add_(1, self.bucket, signed))

    def transpose(self, z: Tensor) -> Tensor:
        return _hadamard(z)[:, self.bucket] * self.sign


def _chunks(n: int, k: int) -> Iterator[slice]:
    """Token ranges of which [tokens, k] stays below CHUNK numbers."""
    step = max(1, CHUNK // k)
    return (slice(s, min(s + step, n)) for s in range(0, n, step))


def reference(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    """On CUDA `index_add_` makes this deterministic only under torch's deterministic mode."""
    f_in = _Factor(seed, INPUTS, x.shape[1], k, x)
    f_out = _Factor(seed, OUTPUTS, g.shape[1], k, g)
    ids = segment_ids(offsets, x.shape[0])
    out = x.new_zeros(offsets.shape[0] - 1, k, dtype=accum_dtype(x))
    for t in _chunks(x.shape[0], k):
        out.index_add_(0, ids[t], f_in.apply(x[t]) * f_out.apply(g[t]))
    return out.mul_(k**-0.5)


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    f_in = _Factor(seed, INPUTS, x.shape[1], k, x)
    f_out = _Factor(seed, OUTPUTS, g.shape[1], k, g)
    ids = segment_ids(offsets, x.shape[0])
    weight = grad.to(accum_dtype(x)) * k**-0.5
    dx, dg = x.new_empty(x.shape), g.new_empty(g.shape)
    for t in _chunks(x.shape[0], k):
        w = weight[ids[t]]  # [n, k]
        dx[t] = f_in.transpose(w * f_out.apply(g[t]))
        dg[t] = f_out.transpose(w * f_in.apply(x[t]))
    return dx, dg


@triton.jit
def _signs(seed, c, j, STREAM: tl.constexpr, MAGIC: tl.constexpr):
    """P[c, j] = s(c) (-1)^popcount(j & h(c)); features j < k mask the word to its bucket bits."""
    zero = c * 0
    word, _, _, _ = tl.philox(seed, c, zero, zero + STREAM, zero + MAGIC)
    bits = word[:, None] & j[None, :]
    bits ^= bits >> 8
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    parity = (bits ^ (word >> 31)[:, None]) & 1
    return 1.0 - 2.0 * parity.to(tl.float32)


@triton.jit
def _factor(
    rows, n, end, j, seed, D, s_n, s_d,
    STREAM: tl.constexpr, MAGIC: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(H C rows)[n, j] as a product with the sign matrix, made tile by tile from the hash."""
    z = tl.zeros((BN, BJ), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD).to(tl.int64)
        block = tl.load(
            rows + n[:, None] * s_n + d[None, :] * s_d,
            mask=(n[:, None] < end) & (d[None, :] < D),
            other=0.0,
        )  # [BN, BD]
        signs = _signs(seed, d.to(tl.uint32), j, STREAM, MAGIC)  # [BD, BJ]
        z = tl.dot(block.to(DOT), signs.to(DOT), z, input_precision=PREC)
    return z


@triton.jit(do_not_specialize=["seed"])
def _sketch_kernel(
    x, g, offsets, out, D_in, D_out, K, seed, scale, sx_n, sx_i, sg_n, sg_o,
    MAGIC: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[b, j] for BJ features of one example: both factors of its tokens, multiplied, summed."""
    b = tl.program_id(0).to(tl.int64)
    j = (tl.program_id(1) * BJ + tl.arange(0, BJ)).to(tl.uint32)
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    total = tl.zeros((BJ,), tl.float32)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        zx = _factor(x, n, end, j, seed, D_in, sx_n, sx_i, 1, MAGIC, BN, BJ, BD, DOT, PREC)
        zg = _factor(g, n, end, j, seed, D_out, sg_n, sg_o, 0, MAGIC, BN, BJ, BD, DOT, PREC)
        total += tl.sum(zx * zg, axis=0)
    tl.store(out + b * K + j, total * scale, mask=j < K)


def config(n: int, b: int, k: int) -> dict[str, int]:
    """Tiles: tokens of a mean example (16 to 64), 64 features, 16 coordinates (32 would spill)."""
    mean = triton.cdiv(n, max(1, b))
    return dict(BN=16 if mean <= 16 else 32 if mean <= 32 else 64, BJ=64 if k >= 64 else 16, BD=16)


def forward_triton(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there."""
    if x.dtype == torch.float64:
        return reference(x, g, offsets, k, seed)
    b = offsets.shape[0] - 1
    out = torch.empty(b, k, device=x.device, dtype=torch.float32)
    if b == 0:
        return out
    c = config(x.shape[0], b, k)
    _sketch_kernel[(b, triton.cdiv(k, c["BJ"]))](
        x, g, offsets.contiguous(), out, x.shape[1], g.shape[1], k, seed, k**-0.5,
        *x.stride(), *g.stride(),
        MAGIC=TAG, **c, DOT=dot_dtype(x), PREC=dot_precision(), num_warps=4,
    )  # fmt: skip
    return out


def _fake(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, k, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape)


_grad_sketch_bwd = define(
    "grad_sketch_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, int k, int seed)"
    " -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    x, g, offsets, ctx.k, ctx.seed = inputs
    ctx.save_for_backward(x, g, offsets)


def _backward(ctx, grad):
    x, g, offsets = ctx.saved_tensors
    dx, dg = _grad_sketch_bwd(grad, x, g, offsets, ctx.k, ctx.seed)
    return dx, dg, None, None, None


_grad_sketch = define(
    "grad_sketch(Tensor x, Tensor g, Tensor offsets, int k, int seed) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    cuda_library=True,
    backward=_backward,
    setup_context=_setup,
)
