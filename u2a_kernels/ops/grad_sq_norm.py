"""||G_b||_F^2 for the per-example gradients G_b = sum_{t in b} g_t x_t^T of a linear layer.

Two equal forms, the cheaper one per example. Short: token Grams sum_{t,s} (x_t . x_s)(g_t . g_s) by
tiles on and below the diagonal, those below counted twice. Long: tiles of G_b, squared and summed.
Neither a T x T nor a [d_out, d_in] array is held. Saved for backward: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from u2a_kernels._checks import check_dim, check_floats, check_offsets, check_size
from u2a_kernels._library import define
from u2a_kernels._segments import accum_dtype, ghost_limit, segments
from u2a_kernels._tiles import gradient_tile, token_products
from u2a_kernels._triton import cuda_launcher, dot_dtype, dot_precision, tl, triton


def grad_sq_norm(x: Tensor, g: Tensor, offsets: Tensor) -> Tensor:
    """Squared Frobenius norm of every example's weight gradient.

    Args:
        x: [N, d_in] layer inputs of N packed tokens; float32, bfloat16, float16 (float64 on CPU).
        g: [N, d_out] gradients of the loss at the layer's output, dtype of x.
        offsets: [B+1] int32/int64, 0 first, N last, non-decreasing; empty segments give 0.

    Returns:
        [B], float32 (float64 for float64 inputs). Accumulation in the result's dtype.
        Deterministic. Differentiable once in x and g. Where the tokens of an example cancel, token
        Grams may round a zero to a small negative number.

    Raises:
        ValueError, TypeError: a shape, dtype, device or offset that does not fit, by name.

    Equivalent torch: ``torch.stack([(g[s:e].T @ x[s:e]).square().sum() for s, e in segments])``.

    Source: ghost norm, Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679, section 4.
    """
    op = "grad_sq_norm"
    check_floats(op, x=x, g=g)
    check_dim(op, "x", x, "[N, d_in]", 2)
    check_dim(op, "g", g, "[N, d_out]", 2)
    check_size(op, "g", g, "[N, d_out]", (x.shape[0], g.shape[1]))
    check_offsets(op, offsets, x.shape[0])
    return _grad_sq_norm(x, g, offsets, ghost_limit(x.shape[1], g.shape[1]))


def reference(x: Tensor, g: Tensor, offsets: Tensor, ghost_tokens: int) -> Tensor:
    """On CUDA `segments` synchronises with the host once."""
    acc = accum_dtype(x)
    out = x.new_zeros(offsets.shape[0] - 1, dtype=acc)
    for b, t in segments(offsets):
        xb, gb = x[t].to(acc), g[t].to(acc)
        if len(xb) <= ghost_tokens:
            out[b] = ((xb @ xb.T) * (gb @ gb.T)).sum()
        else:
            out[b] = (gb.T @ xb).square().sum()
    return out


def reference_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, ghost_tokens: int
) -> tuple[Tensor, Tensor]:
    acc = accum_dtype(x)
    dx, dg = x.new_zeros(x.shape), g.new_zeros(g.shape)
    twice = 2 * grad.to(acc)
    for b, t in segments(offsets):
        xb, gb = x[t].to(acc), g[t].to(acc)
        if len(xb) <= ghost_tokens:
            dx[t] = twice[b] * (gb @ gb.T @ xb)
            dg[t] = twice[b] * (xb @ xb.T @ gb)
        else:
            whole = gb.T @ xb
            dx[t] = twice[b] * (gb @ whole)
            dg[t] = twice[b] * (xb @ whole.T)
    return dx, dg


@triton.jit
def _slot_kernel(offsets, slots, slot_of, B, ghost_tokens, BB: tl.constexpr):
    """Numbers the examples longer than ghost_tokens: slots[slot] = b, slot_of[b] = slot or -1."""
    found = 0
    for b0 in range(0, B, BB):
        b = b0 + tl.arange(0, BB)
        start = tl.load(offsets + b, mask=b < B, other=0)
        end = tl.load(offsets + b + 1, mask=b < B, other=0)
        long = ((end - start) > ghost_tokens).to(tl.int32)
        slot = found + tl.cumsum(long, 0) - long
        tl.store(slots + slot, b, mask=long == 1)
        tl.store(slot_of + b, tl.where(long == 1, slot, -1), mask=b < B)
        found += tl.sum(long, 0)


@triton.jit
def _ghost_kernel(
    x, g, offsets, part, D_in, D_out, ghost_tokens, SPLITS, sx_n, sx_i, sg_n, sg_o,
    BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[b, split]: every SPLITS-th tile pair on and below the diagonal of a short example."""
    b = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    start = tl.load(offsets + b).to(tl.int64)
    end = tl.load(offsets + b + 1).to(tl.int64)
    end = tl.where(end - start > ghost_tokens, start, end)
    tiles = (end - start + BT - 1) // BT
    total = tl.zeros((BT,), tl.float32)
    for pair in range(split, tiles * (tiles + 1) // 2, SPLITS):
        row = ((tl.sqrt(8.0 * pair + 1.0) - 1.0) * 0.5).to(tl.int64)
        row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
        row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
        col = pair - row * (row + 1) // 2
        r = start + row * BT + tl.arange(0, BT)
        c = start + col * BT + tl.arange(0, BT)
        px = token_products(x, r, c, end, D_in, sx_n, sx_i, BT, BT, BD, DOT, PREC)
        pg = token_products(g, r, c, end, D_out, sg_n, sg_o, BT, BT, BD, DOT, PREC)
        total += tl.sum(px * pg, axis=1) * tl.where(row == col, 1.0, 2.0)
    tl.store(part + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _formed_kernel(
    x, g, offsets, slots, part, D_in, D_out, TILES_O, TILES, sx_n, sx_i, sg_n, sg_o,
    BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part[slot, tile]: the sum of squares of one tile of a long example's gradient."""
    tile = tl.program_id(0) % TILES
    b = tl.load(slots + tl.program_id(0) // TILES)
    start = tl.load(offsets + b, mask=b >= 0, other=0).to(tl.int64)
    end = tl.load(offsets + b + 1, mask=b >= 0, other=0).to(tl.int64)
    o = (tile % TILES_O) * BO + tl.arange(0, BO).to(tl.int64)
    i = (tile // TILES_O) * BI + tl.arange(0, BI).to(tl.int64)
    acc = gradient_tile(
        x, g, start, end, o, i, D_in, D_out, sx_n, sx_i, sg_n, sg_o, BO, BI, BN, DOT, PREC
    )
    tl.store(part + tl.program_id(0), tl.sum(acc * acc))


@triton.jit
def _sum_kernel(part, out, slot_of, COLS, LONG: tl.constexpr, BLOCK: tl.constexpr):
    """out[b] = sum of part[b, :], or of part[slot_of[b], :] where b has a slot."""
    b = tl.program_id(0).to(tl.int64)
    row = b
    if LONG:
        row = tl.load(slot_of + b).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for c0 in range(0, COLS, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        total += tl.load(part + row * COLS + c, mask=(c < COLS) & (row >= 0), other=0.0)
    tl.store(out + b, tl.sum(total, axis=0), mask=row >= 0)


def config(
    n: int, b: int, d_in: int, d_out: int, ghost_tokens: int, size: int
) -> dict[str, dict[str, int]]:
    """Tiles of both kernels, from shapes and the bytes of an element.

    Ghost: BT from the mean example; splits so that there are about 1024 programs, and no more than
    the longest short example has pairs. fp32 tiles are half as large, so that none spills.
    """
    mean = triton.cdiv(n, max(1, b))
    bt = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 256 or size == 4 else 128
    tiles = triton.cdiv(max(1, min(n, ghost_tokens)), bt)
    splits = max(1, min(tiles * (tiles + 1) // 2, 1024 // max(1, b)))
    wide = 128 if size == 2 else 64
    bo, bi = (16 if d < 64 else min(wide, 64 if d < 128 else 128) for d in (d_out, d_in))
    return dict(
        ghost=dict(BT=bt, BD=64 if size == 2 else 32, splits=splits, warps=8 if bt > 32 else 4),
        formed=dict(BO=bo, BI=bi, BN=32 if size == 2 else 16, warps=8 if bo * bi >= 4096 else 4),
    )


def forward_triton(x: Tensor, g: Tensor, offsets: Tensor, ghost_tokens: int) -> Tensor:
    """float64 has no fused kernel on a GPU: the reference answers there.

    No example is read on the host: at most N // (ghost_tokens + 1) can be long, and those fill
    that many slots. When there can be none, or no other, that form is not launched.
    """
    if x.dtype == torch.float64:
        return reference(x, g, offsets, ghost_tokens)
    n, d_in, d_out, b = x.shape[0], x.shape[1], g.shape[1], offsets.shape[0] - 1
    out = torch.empty(b, device=x.device, dtype=torch.float32)
    if b == 0 or n == 0 or d_in == 0 or d_out == 0:
        return out.zero_()
    offsets = offsets.contiguous()
    c = config(n, b, d_in, d_out, ghost_tokens, x.element_size())
    k, strides = c["ghost"], (*x.stride(), *g.stride())
    types = dict(DOT=dot_dtype(x), PREC=dot_precision())
    part = torch.empty(b, k["splits"], device=x.device, dtype=torch.float32)
    _ghost_kernel[(b * k["splits"],)](
        x, g, offsets, part, d_in, d_out, ghost_tokens, k["splits"], *strides,
        BT=k["BT"], BD=k["BD"], **types, num_warps=k["warps"],
    )  # fmt: skip
    _sum_kernel[(b,)](part, out, offsets, k["splits"], LONG=False, BLOCK=128, num_warps=4)
    if n > ghost_tokens:
        _add_long(x, g, offsets, out, ghost_tokens, c["formed"])
    return out


def _add_long(
    x: Tensor, g: Tensor, offsets: Tensor, out: Tensor, ghost_tokens: int, k: dict[str, int]
) -> None:
    """Overwrites out[b] of the examples that are longer than ghost_tokens."""
    n, d_in, d_out, b = x.shape[0], x.shape[1], g.shape[1], out.shape[0]
    most = min(b, n // (ghost_tokens + 1))
    slots = torch.full((most,), -1, device=x.device, dtype=torch.int32)
    slot_of = torch.empty(b, device=x.device, dtype=torch.int32)
    _slot_kernel[(1,)](offsets, slots, slot_of, b, ghost_tokens, BB=1024, num_warps=4)
    tiles_o = triton.cdiv(d_out, k["BO"])
    tiles = tiles_o * triton.cdiv(d_in, k["BI"])
    part = torch.empty(most, tiles, device=x.device, dtype=torch.float32)
    _formed_kernel[(most * tiles,)](
        x, g, offsets, slots, part, d_in, d_out, tiles_o, tiles, *x.stride(), *g.stride(),
        BO=k["BO"], BI=k["BI"], BN=k["BN"], DOT=dot_dtype(x), PREC=dot_precision(),
        num_warps=k["warps"],
    )  # fmt: skip
    _sum_kernel[(b,)](part, out, slot_of, tiles, LONG=True, BLOCK=128, num_warps=4)


def _fake(x: Tensor, g: Tensor, offsets: Tensor, ghost_tokens: int) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, dtype=accum_dtype(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, ghost_tokens: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(g.shape)


_grad_sq_norm_bwd = define(
    "grad_sq_norm_bwd(Tensor grad, Tensor x, Tensor g, Tensor offsets, int ghost_tokens)"
    " -> (Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
)


def _setup(ctx, inputs, output):
    x, g, offsets, ctx.ghost_tokens = inputs
    ctx.save_for_backward(x, g, offsets)


def _backward(ctx, grad):
    dx, dg = _grad_sq_norm_bwd(grad, *ctx.saved_tensors, ctx.ghost_tokens)
    return dx, dg, None, None


_grad_sq_norm = define(
    "grad_sq_norm(Tensor x, Tensor g, Tensor offsets, int ghost_tokens) -> Tensor",
    reference=reference,
    fake=_fake,
    cuda=cuda_launcher(forward_triton),
    backward=_backward,
    setup_context=_setup,
)
