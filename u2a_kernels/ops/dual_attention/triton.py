"""dual_attention's forward on a GPU: the flash loop over key blocks carries the tangent along.

Beside max and sum a row keeps mu, the mean of S_t under the softmax so far: P o (S_t - mu) is what
multiplies V, so a half-precision product rounds differences and not a common shift of the tangent.
A program owns a block of queries of one head; offsets become a list of blocks on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from u2a_kernels._triton import INTERPRET, cast_to, dot_dtype, dot_precision, tanh, tl, triton

# float32 products are FMA loops with both operands in registers: larger tiles spill kilobytes.
SMALL = dict(BM=16, BN=16, num_warps=4, num_stages=1)


@triton.jit
def place(tile, spans, tiles, T, S, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """Batch row, first token, queries, keys and block of a tile; unused tiles have no tokens."""
    if PACKED:
        start = tl.load(spans + 3 * tile).to(tl.int64)
        length = tl.load(spans + 3 * tile + 1).to(tl.int32)
        return start * 0, start, length, length, tl.load(spans + 3 * tile + 2).to(tl.int32)
    else:
        b = (tile // tiles).to(tl.int64)
        block = tile % tiles
        if REVERSE:
            block = tiles - 1 - block
        return b, b * 0, T, S, block


@triton.jit
def rows(x, n, N, stride, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, TAIL: tl.constexpr):
    """[len(n), BD] operand, zeros past D and, where there may be a TAIL, past row N."""
    d = tl.arange(0, BD)
    p = x + n.to(tl.int64)[:, None] * stride + d[None, :]
    if TAIL:
        return tl.load(p, mask=(n[:, None] < N) & (d[None, :] < D), other=0.0).to(DOT)
    elif D == BD:
        return tl.load(p).to(DOT)
    else:
        return tl.load(p, mask=(n[:, None] >= 0) & (d[None, :] < D), other=0.0).to(DOT)


@triton.jit
def visible(m, n, T, S, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which keys n the queries m see."""
    seen = (m < T) & (n < S)
    if CAUSAL:
        seen = seen & (n <= m + (S - T))
    if WINDOWED:
        seen = seen & (n > m + (S - T) - window)
    return seen


@triton.jit
def _forward_step(
    n0, bq, bq_t, k, v, half_k, half_v, step_k, step_v, top, total, mean, acc, acc_t, m, T, S,
    scale, softcap, window, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    n = n0 + tl.arange(0, BN)
    bk = tl.trans(rows(k, n, S, step_k, D, BD, DOT, MASK))
    bk_t = tl.trans(rows(k + half_k, n, S, step_k, D, BD, DOT, MASK))
    s = tl.dot(bq, bk, input_precision=PREC) * scale
    s_t = tl.dot(bq_t, bk, input_precision=PREC)
    s_t = tl.dot(bq, bk_t, s_t, input_precision=PREC) * scale
    if CAPPED:
        th = tanh(s / softcap)
        s = softcap * th
        s_t = s_t * (1.0 - th * th)
    if MASK:
        seen = visible(m[:, None], n[None, :], T, S, window, CAUSAL, WINDOWED)
        s = tl.where(seen, s, float("-inf"))
        s_t = tl.where(seen, s_t, 0.0)
    new = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # no -inf - -inf
    shrink = tl.exp(top - shift)
    p = tl.exp(s - shift[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    s_t = s_t - mean[:, None]
    move = tl.sum(p * s_t, axis=1) / tl.where(total == 0.0, 1.0, total)
    p_t = p * (s_t - move[:, None])
    acc = acc * shrink[:, None]
    acc_t = acc_t * shrink[:, None] - acc * move[:, None]
    bv = rows(v, n, S, step_v, DV, BV, DOT, MASK)
    acc = tl.dot(p.to(DOT), bv, acc, input_precision=PREC)
    acc_t = tl.dot(p_t.to(DOT), bv, acc_t, input_precision=PREC)
    bv_t = rows(v + half_v, n, S, step_v, DV, BV, DOT, MASK)
    acc_t = tl.dot(p.to(DOT), bv_t, acc_t, input_precision=PREC)
    return new, total, mean + move, acc, acc_t


@triton.jit
def _forward_kernel(
    q, k, v, out, stats, spans, sq, sk, sv, so, st, tiles, T, S, scale, softcap, window,
    REP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """s*: strides of tangent half (of statistics: plane), batch row, head, token."""
    b, start, T, S, block = place(tl.program_id(0), spans, tiles, T, S, PACKED, CAUSAL)
    h = tl.program_id(1).to(tl.int64)
    m = block * BM + tl.arange(0, BM)
    q += b * sq[1] + h * sq[2] + start * sq[3]
    k += b * sk[1] + h // REP * sk[2] + start * sk[3]
    v += b * sv[1] + h // REP * sv[2] + start * sv[3]
    bq = rows(q, m, T, sq[3], D, BD, DOT, True)
    bq_t = rows(q + sq[0], m, T, sq[3], D, BD, DOT, True)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    acc_t = tl.zeros((BM, BV), tl.float32)
    # Keys low .. left and right .. high are seen by some queries, left .. right by all.
    last = block * BM + (S - T)
    low, left, right, high = 0, 0, S // BN * BN, S
    if CAUSAL:
        high = tl.maximum(0, tl.minimum(S, last + BM))
        right = tl.minimum(right, tl.maximum(0, last + 1) // BN * BN)
    if WINDOWED:
        low = tl.maximum(0, last - window + 1) // BN * BN
        left = tl.cdiv(tl.maximum(0, last + BM - window), BN) * BN
        left = tl.minimum(left, tl.cdiv(high, BN) * BN)
        right = tl.maximum(left, right)
        for n0 in range(low, left, BN):
            top, total, mean, acc, acc_t = _forward_step(
                n0, bq, bq_t, k, v, sk[0], sv[0], sk[3], sv[3], top, total, mean, acc, acc_t, m, T,
                S, scale, softcap, window, D, DV, CAUSAL, WINDOWED, CAPPED, True, BN, BD, BV, DOT,
                PREC,
            )  # fmt: skip
    for n0 in range(left, right, BN):
        top, total, mean, acc, acc_t = _forward_step(
            n0, bq, bq_t, k, v, sk[0], sv[0], sk[3], sv[3], top, total, mean, acc, acc_t, m, T, S,
            scale, softcap, window, D, DV, CAUSAL, WINDOWED, CAPPED, False, BN, BD, BV, DOT, PREC,
        )  # fmt: skip
    for n0 in range(right, high, BN):
        top, total, mean, acc, acc_t = _forward_step(
            n0, bq, bq_t, k, v, sk[0], sv[0], sk[3], sv[3], top, total, mean, acc, acc_t, m, T, S,
            scale, softcap, window, D, DV, CAUSAL, WINDOWED, CAPPED, True, BN, BD, BV, DOT, PREC,
        )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    d = tl.arange(0, BV)
    out += b * so[1] + h * so[2] + start * so[3] + m.to(tl.int64)[:, None] * so[3] + d[None, :]
    live = (m[:, None] < T) & (d[None, :] < DV)
    tl.store(out, cast_to(acc / total[:, None], out.dtype.element_ty), mask=live)
    tl.store(out + so[0], cast_to(acc_t / total[:, None], out.dtype.element_ty), mask=live)
    stats += b * st[1] + h * st[2] + start * st[3] + m.to(tl.int64) * st[3]
    tl.store(stats, tl.where(blind, 0.0, top), mask=m < T)
    tl.store(stats + st[0], tl.where(blind, float("-inf"), tl.log(total)), mask=m < T)
    tl.store(stats + 2 * st[0], mean, mask=m < T)


def arch() -> int:
    """Compute capability of the launch; 0 for what has none."""
    if INTERPRET:
        return 90
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def roomy(arch: int) -> bool:
    """A block may have more than 100 KB of shared memory: data-centre cards."""
    return arch in (80, 90, 100, 103)


def config(d: int, itemsize: int, arch: int) -> dict[str, int]:
    """Tiles of the forward for padded head dimension d: the largest that spill no more than a few
    bytes. wgmma (sm_90) wants 64 rows for four warps; mma.sync needs more registers there."""
    if itemsize == 4:
        return SMALL | dict(num_warps=4 if d <= 64 else 8)
    if d <= 64:
        return dict(BM=128, BN=64 if arch in (90, 100, 103) else 32, num_warps=8, num_stages=2)
    if d <= 128 and arch in (90, 100, 103):
        return dict(BM=128, BN=32, num_warps=8, num_stages=2)
    return dict(BM=32, BN=32, num_warps=4 if d <= 128 else 8, num_stages=2 if d <= 128 else 1)


def padded(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def plain(x: Tensor) -> Tensor:
    """Rows whose elements lie side by side; whatever strides the other dimensions have."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor, packed: bool) -> tuple[int, ...]:
    """Of tangent half, batch row, head and token; packed tokens have no batch row."""
    half = x.shape[0] // 2 * x.stride(0)
    if packed:
        return half, 0, x.stride(1), x.stride(0)
    return half, *x.stride()[:3]


def stat_strides(stats: Tensor, packed: bool) -> tuple[int, ...]:
    """Of plane, batch row, head and token."""
    plane, *rest = stats.stride()
    return (plane, 0, rest[1], rest[0]) if packed else (plane, *rest)


def spans(offsets: Tensor, tiles: int, block: int) -> Tensor:
    """int32 [tiles, 3]: first token, length and block of each tile, without a host sync."""
    bounds = offsets.to(torch.int64)
    lengths = bounds[1:] - bounds[:-1]
    counts = (lengths + block - 1) // block
    ends = counts.cumsum(0)
    tile = torch.arange(tiles, device=offsets.device)
    which = torch.searchsorted(ends, tile, right=True)
    used, at = which < counts.shape[0], which.clamp_max(counts.shape[0] - 1)
    rank = tile - (ends - counts)[at]
    table = torch.stack([bounds[at], torch.where(used, lengths[at], 0), rank], 1)
    return table.to(torch.int32)


def grid(x: Tensor, offsets: Tensor | None, block: int) -> tuple[int, int, Tensor]:
    """Tiles of all examples, tiles of one batch row, and where they lie (packed)."""
    if offsets is None:
        per_row = triton.cdiv(x.shape[2], block)
        return x.shape[0] // 2 * per_row, per_row, x
    tiles = triton.cdiv(x.shape[0] // 2, block) + offsets.shape[0] - 1
    return tiles, tiles, spans(offsets, tiles, block)


def switches(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> dict[str, Any]:
    """The constexpr arguments that all kernels share."""
    offsets, _, causal, window, softcap, _ = options
    return dict(
        REP=q.shape[1] // k.shape[1], D=q.shape[-1], DV=v.shape[-1], PACKED=offsets is not None,
        CAUSAL=causal, WINDOWED=window is not None, CAPPED=softcap is not None,
        BD=padded(q), BV=padded(v), DOT=dot_dtype(q), PREC=dot_precision(),
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    offsets, scale, _, window, softcap, _ = options
    packed = offsets is not None
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    stats = q.new_empty(3, q.shape[0] // 2, *q.shape[1:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, stats
    q, k, v = (plain(x) for x in (q, k, v))
    c = config(max(padded(q), padded(v)), q.element_size(), arch())
    tiles, per_row, where = grid(q, offsets, c["BM"])
    t, s = (0, 0) if packed else (q.shape[2], k.shape[2])
    _forward_kernel[(tiles, q.shape[1])](
        q, k, v, out, stats, where, *(strides(x, packed) for x in (q, k, v, out)),
        stat_strides(stats, packed), per_row, t, s, scale, softcap or 0.0, window or 0,
        **switches(q, k, v, options), **c,
    )  # fmt: skip
    return out, stats
