"""Launches of dual_attention's backward kernels: tiles, and which sweeps make which gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from u2a_kernels._dual import halves
from u2a_kernels.ops.dual_attention.triton import (
    SMALL,
    arch,
    grid,
    padded,
    plain,
    roomy,
    stat_strides,
    strides,
    switches,
)
from u2a_kernels.ops.dual_attention.triton_backward import key_kernel, query_kernel

Options = tuple[Any, ...]  # offsets, scale, causal, window, softcap, mode


def query_config(d: int, itemsize: int, arch: int, hvp: bool) -> dict[str, int]:
    """Tiles of the kernel that owns queries, for padded head dimension d."""
    if itemsize == 4:
        return SMALL | dict(num_warps=4 if d <= 64 else 8)
    if d > 128:
        return dict(BM=32, BN=32 if roomy(arch) else 16, num_warps=8, num_stages=1)
    wide = arch in (90, 100, 103)
    if not hvp or (d <= 64 and wide):
        return dict(BM=64, BN=64, num_warps=4, num_stages=2)
    return dict(BM=64 if d <= 64 or wide else 32, BN=32, num_warps=4, num_stages=2)


def key_config(d: int, itemsize: int, arch: int, hvp: bool, keys: bool) -> dict[str, int]:
    """Tiles of the kernel that owns keys. dk of 256 columns, with four operands of 256 at hand,
    spills 300 to 900 bytes a thread in any larger tile."""
    if itemsize == 4:
        return SMALL | dict(num_warps=4 if d <= 64 else 8)
    if d <= 128:
        tall = arch in (90, 100, 103) or d <= 64 or not (hvp and keys)
        stages = 2 if d <= 64 or roomy(arch) else 1
        return dict(BM=32, BN=64 if tall else 32, num_warps=4, num_stages=stages)
    if hvp and keys:
        return dict(BM=16, BN=16, num_warps=4, num_stages=1)
    return dict(BM=32, BN=32, num_warps=8, num_stages=1)


def _sweeps(
    grad: Tensor, given: tuple[Tensor, ...], grads: tuple[Tensor, ...], options: Options,
    hvp: bool, both: bool,
) -> None:  # fmt: skip
    """Both kernels once. Plain (not hvp): dq, dk, dv are single halves, grad their cotangent."""
    offsets, scale, _, window, softcap, _ = options
    q, k, v, out, stats = given
    dq, dk, dv = grads
    packed = offsets is not None
    sums = stats.new_empty(2, *stats.shape[1:])
    t, s = (0, 0) if packed else (q.shape[2], k.shape[2])
    d = max(padded(q), padded(v))
    sizes = [strides(x, packed) for x in (grad, q, k, v)]
    row = [stat_strides(x, packed) for x in (stats, sums)]
    limits = t, s, scale, softcap or 0.0, window or 0
    shared = dict(switches(q, k, v, options), HVP=hvp, BOTH=both)
    c = query_config(d, q.element_size(), arch(), hvp)
    tiles, per_row, where = grid(q, offsets, c["BM"])
    query_kernel[(tiles, q.shape[1])](
        grad, q, k, v, out, stats, dq, sums, where, *sizes,
        *(strides(x, packed) for x in (out, dq)), *row, per_row, *limits, **shared, **c,
    )  # fmt: skip
    for keys, values in (
        ((True, False), (False, True)) if d > (64 if hvp else 128) else ((True, True),)
    ):
        c = key_config(d, q.element_size(), arch(), hvp, keys)
        tiles, per_row, where = grid(k, offsets, c["BN"])
        key_kernel[(tiles, k.shape[1])](
            grad, q, k, v, stats, dk, dv, sums, where, *sizes,
            *(strides(x, packed) for x in (dk, dv)), *row, per_row, *limits,
            KEYS=keys, VALUES=values, **shared, **c,
        )  # fmt: skip


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to 64 wide one hvp sweep fits the registers (21 products of blocks). Wider ones make the
    tangent half's gradient, a plain backward of g, apart from the primal half's, whose dk and dv
    are made apart too (28; with D = 256 the plain dk and dv as well, 29)."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if 0 in q.shape or 0 in k.shape:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad, q, k, v, out = (plain(x) for x in (grad, q, k, v, out))
    first, second = zip(*(halves(x) for x in (dq, dk, dv)), strict=True)
    given = q, k, v, out, stats
    if options[-1] == "ggn":
        _sweeps(halves(grad)[0], given, first, options, False, False)
        for x in second:
            x.zero_()
    elif max(padded(q), padded(v)) <= 64:
        _sweeps(grad, given, (dq, dk, dv), options, True, True)
    else:
        _sweeps(grad, given, first, options, True, False)
        _sweeps(halves(grad)[1], given, second, options, False, False)
    return dq, dk, dv
