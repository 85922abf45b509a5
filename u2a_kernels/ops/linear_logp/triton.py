"""linear_logp on a GPU. Scoring is one fused kernel over row blocks x vocabulary splits, the logits
in registers. For gradients cuBLAS makes an eighth of the logits (2^27 at most) in scratch, a kernel
turns them into dlogp/dz, cuBLAS multiplies on: at d = 4096 the scratch's traffic is estimated at a
tenth of the GEMM time (not measured); a tile kernel would have to hold or re-make [rows, d] sums.
Every sum has a fixed order, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._logits import SCRATCH_ELEMENTS, capped, mm32, share
from u2a_kernels._triton import cast_to, dot_dtype, dot_precision, tl, triton


@triton.jit
def _tile_kernel(
    h, w, bias, targets, part, N, V, D, v_per_split, softcap, temperature,
    sh_n, sh_d, sw_v, sw_d,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[:, split, n] = max, sum of exp(z - max), z[target] over the split's tokens."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    t = tl.load(targets + n, mask=n < N, other=-100)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    y = tl.zeros((BN,), tl.float32)
    used = tl.max((t != -100).to(tl.int32), axis=0)  # 0: all rows ignored, no tile is computed
    end = tl.minimum((split + 1) * v_per_split, V) * used
    for v0 in range(split * v_per_split, end, BV):
        v = v0 + tl.arange(0, BV).to(tl.int64)
        z = tl.zeros((BN, BV), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD).to(tl.int64)
            bh = tl.load(
                h + n[:, None] * sh_n + d[None, :] * sh_d,
                mask=(n[:, None] < N) & (d[None, :] < D),
                other=0.0,
            )  # [BN, BD]
            bw = tl.load(
                w + v[None, :] * sw_v + d[:, None] * sw_d,
                mask=(v[None, :] < V) & (d[:, None] < D),
                other=0.0,
            )  # [BD, BV]
            z = tl.dot(bh.to(DOT), bw.to(DOT), z, input_precision=PREC)
        if HAS_BIAS:
            z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        z = tl.where(v[None, :] < V, capped(z, softcap, HAS_CAP) / temperature, float("-inf"))
        new = tl.maximum(top, tl.max(z, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # no -inf - -inf
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        y += tl.sum(tl.where(v[None, :] == t[:, None], z, 0.0), axis=1)
        top = new
    plane = tl.num_programs(1) * N
    row = part + split * N + n
    tl.store(row, top, mask=n < N)
    tl.store(row + plane, total, mask=n < N)
    tl.store(row + 2 * plane, y, mask=n < N)


@triton.jit
def _combine_kernel(part, targets, logp, lse, N, V, SPLITS, BN: tl.constexpr):
    """The splits' states in their order; NaN for a target that is no token."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    t = tl.load(targets + n, mask=n < N, other=-100)
    plane = SPLITS * N
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    y = tl.zeros((BN,), tl.float32)
    for split in range(0, SPLITS):
        row = part + split * N + n
        m = tl.load(row, mask=n < N, other=0.0)
        new = tl.maximum(top, m)
        shift = tl.where(new == float("-inf"), 0.0, new)
        s = tl.load(row + plane, mask=n < N, other=0.0)
        total = total * tl.exp(top - shift) + s * tl.exp(m - shift)
        y += tl.load(row + 2 * plane, mask=n < N, other=0.0)
        top = new
    norm = tl.where(t == -100, 0.0, top + tl.log(total))
    y = tl.where((t >= 0) & (t < V), y, float("nan"))
    tl.store(lse + n, norm, mask=n < N)
    tl.store(logp + n, tl.where(t == -100, 0.0, y - norm), mask=n < N)


@triton.jit
def _row_kernel(
    a, out, bias, targets, grad, lse, logp, v0, C, V, softcap, temperature, sa, so,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WHOLE: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out[n, :] = grad[n] dlogp/da for a = h W^T, columns v0 .. v0 + C of the vocabulary.

    WHOLE: the row is complete; its lse and logp are computed first, and grad is 1.
    """
    n = tl.program_id(0).to(tl.int64)
    t = tl.load(targets + n)
    used = (t != -100).to(tl.int32)
    if WHOLE:
        top = float("-inf")
        total = 0.0
        y = 0.0
        for c0 in range(0, C * used, BV):
            c = c0 + tl.arange(0, BV)
            z = tl.load(a + n * sa + c, mask=c < C, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + v0 + c, mask=c < C, other=0.0).to(tl.float32)
            z = tl.where(c < C, capped(z, softcap, HAS_CAP) / temperature, float("-inf"))
            new = tl.maximum(top, tl.max(z, axis=0))
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), axis=0)
            y += tl.sum(tl.where(c == t, z, 0.0), axis=0)
            top = new
        norm = tl.where(t == -100, 0.0, top + tl.log(total))
        y = tl.where((t >= 0) & (t < V), y, float("nan"))
        tl.store(lse + n, norm)
        tl.store(logp + n, tl.where(t == -100, 0.0, y - norm))
        scale = 1.0 / temperature
    else:
        norm = tl.load(lse + n)
        scale = tl.load(grad + n).to(tl.float32) / temperature
    for c0 in range(0, C, BV):
        c = c0 + tl.arange(0, BV)
        z = tl.load(a + n * sa + c, mask=c < C, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias + v0 + c, mask=c < C, other=0.0).to(tl.float32)
        z = capped(z, softcap, HAS_CAP) / temperature
        g = scale * (tl.where(c + v0 == t, 1.0, 0.0) - tl.exp(z - norm))
        if HAS_CAP:
            tanh = z * (temperature / softcap)
            g *= 1.0 - tanh * tanh
        g = tl.where(used != 0, g, 0.0)
        tl.store(out + n * so + c, cast_to(g, out.dtype.element_ty), mask=c < C)


def config(n: int, v: int, d: int, itemsize: int) -> dict[str, int]:
    """Tile sizes, and splits of the vocabulary that give at least two programs per SM."""
    wide = n >= 128 and itemsize == 2
    bn = 128 if wide else 64 if n >= 64 else 16
    bv = (128 if wide else 64 if itemsize == 2 else 32) if v >= 64 else 16
    bd = (64 if itemsize == 2 else 32) if d >= 64 else 16
    tiles = triton.cdiv(v, bv)
    per = triton.cdiv(tiles, min(tiles, triton.cdiv(264, triton.cdiv(n, bn))))
    splits, warps = triton.cdiv(tiles, per), 8 if wide else 4
    return dict(BN=bn, BV=bv, BD=bd, splits=splits, v_per_split=per * bv, num_warps=warps)


def _rows(
    a: Tensor, out: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor | None,
    lse: Tensor, logp: Tensor | None, v0: int, v: int, softcap: float, temperature: float,
) -> None:  # fmt: skip
    _row_kernel[(a.shape[0],)](
        a, out, targets if bias is None else bias, targets, lse if grad is None else grad,
        lse, lse if logp is None else logp, v0, a.shape[1], v, softcap, temperature,
        a.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_CAP=softcap != 0, WHOLE=logp is not None,
        BV=min(4096, triton.next_power_of_2(a.shape[1])), num_warps=8,
    )  # fmt: skip


def forward(
    h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    softcap: float, temperature: float, grad_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, d, v = h.shape[0], h.shape[1], weight.shape[0]
    logp, lse = (torch.empty(n, device=h.device, dtype=torch.float32) for _ in range(2))
    unit = h.new_empty(n if grad_h else 0, d)
    targets, bias = targets.contiguous(), None if bias is None else bias.contiguous()
    if n == 0:
        return logp, lse, unit
    if grad_h:
        size = share(n, v, SCRATCH_ELEMENTS)
        for r in (slice(s, s + size) for s in range(0, n, size)):
            a = mm32(h[r], weight.T)
            g = a if h.dtype == torch.float32 else torch.empty_like(a, dtype=h.dtype)
            _rows(a, g, bias, targets[r], None, lse[r], logp[r], 0, v, softcap, temperature)
            torch.mm(g, weight, out=unit[r])
        return logp, lse, unit
    c = config(n, v, d, h.element_size())
    part = torch.empty(3, c["splits"], n, device=h.device, dtype=torch.float32)
    _tile_kernel[(triton.cdiv(n, c["BN"]), c["splits"])](
        h, weight, targets if bias is None else bias, targets, part, n, v, d, c["v_per_split"],
        softcap, temperature, *h.stride(), *weight.stride(),
        HAS_BIAS=bias is not None, HAS_CAP=softcap != 0, BN=c["BN"], BV=c["BV"], BD=c["BD"],
        DOT=dot_dtype(h), PREC=dot_precision(), num_warps=c["num_warps"],
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(n, 128),)](
        part, targets, logp, lse, n, v, c["splits"], BN=128, num_warps=4
    )
    return logp, lse, unit


def backward(
    grad: Tensor, h: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor,
    softcap: float, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, v = h.shape[0], weight.shape[0]
    dw = weight.new_empty(weight.shape)
    db = weight.new_empty(0 if bias is None else v)
    if n == 0:
        return dw.zero_(), db.zero_()
    targets, grad = targets.contiguous(), grad.contiguous()
    bias = None if bias is None else bias.contiguous()
    x = torch.where((targets != -100)[:, None], h, 0)  # an ignored row may hold anything
    size = share(v, n, SCRATCH_ELEMENTS)
    for c in (slice(s, min(v, s + size)) for s in range(0, v, size)):
        a = mm32(x, weight[c].T)
        g = a if h.dtype == torch.float32 else torch.empty_like(a, dtype=h.dtype)
        _rows(a, g, bias, targets, grad, lse, None, c.start, v, softcap, temperature)
        torch.mm(g.T, x, out=dw[c])
        if bias is not None:
            db[c] = g.sum(0, dtype=torch.float32).to(db.dtype)
    return dw, db
