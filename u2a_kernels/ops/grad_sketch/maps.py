"""The sketches in plain torch: hash words, the linear maps and their transposes, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from u2a_kernels._philox import LOW, philox
from u2a_kernels._segments import accum_dtype, segment_ids, segments

OUTPUTS, INPUTS, ENTRIES = 0, 1, 4
KINDS = ("tensorsketch", "sjlt", "rademacher")
TENSORSKETCH, SJLT, RADEMACHER = range(3)
CHUNK = 1 << 22


def hash_of(seed: int, stream: int, c: Tensor) -> Tensor:
    """Word 0 for the coordinates c of one stream."""
    return philox(seed, c & LOW, c >> 32, stream)[0]


def sketch_hash(seed: int, stream: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Word 0 of Philox4x32-10 for coordinates 0 .. n-1, int64 `[n]` holding 32 bits each."""
    return hash_of(seed, stream, torch.arange(n, device=device))


def _hadamard(z: Tensor) -> Tensor:
    """Walsh-Hadamard transform along the last dimension, natural order, not normalised."""
    n, k, h = z.shape[0], z.shape[1], 1
    while h < k:
        pairs = z.view(n, k // (2 * h), 2, h)
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


class _Entries:
    """The linear map of a gradient's rows to k numbers that one kind makes from its seed.

    A gradient comes as rows [r, d] with the numbers `label` [r] of the outputs they belong to and
    the examples `b` [r] they are part of. Features of "tensorsketch" are its buckets here.
    """

    def __init__(self, kind: int, seed: int, d: int, k: int, like: Tensor) -> None:
        self.kind, self.seed, self.k = kind, seed, k
        self.dtype = accum_dtype(like)
        self.columns = torch.arange(d, device=like.device)
        self.width = min(k, 128)
        self.step = max(1, CHUNK // max(1, d * (self.width if kind == RADEMACHER else 1)))

    def words(self, label: Tensor) -> Tensor:
        if self.kind == SJLT:
            return philox(self.seed, self.columns, label[:, None], ENTRIES)[0]
        inputs = hash_of(self.seed, INPUTS, self.columns)
        return inputs ^ hash_of(self.seed, OUTPUTS, label)[:, None]

    def signs(self, label: Tensor, block: int) -> Tensor:
        """[r, d, width]: those of features 128 block and following."""
        stream = ENTRIES + 8 * (1 + block)
        words = torch.stack(philox(self.seed, self.columns, label[:, None], stream), -1)
        bits = words[..., None] >> torch.arange(32, device=words.device) & 1  # [r, d, 4, 32]
        return (1 - 2 * bits.flatten(-2)[..., : self.width]).to(self.dtype)

    def add(self, out: Tensor, b: Tensor, label: Tensor, rows: Tensor) -> None:
        """out [B, k] += features of the rows."""
        if self.kind == RADEMACHER:
            for block in range(self.k // self.width):
                part = out[:, block * self.width : (block + 1) * self.width]
                signs = self.signs(label, block)
                part.index_add_(0, b, torch.einsum("rd,rdw->rw", rows, signs))
            return
        word = self.words(label)
        signed = rows * (1 - 2 * (word >> 31)).to(self.dtype)
        at = b[:, None] * self.k + (word & (self.k - 1))
        out.view(-1).index_add_(0, at.flatten(), signed.flatten())

    def transpose(self, weight: Tensor, b: Tensor, label: Tensor) -> Tensor:
        """[r, d]: the rows' gradients where the features' are weight [B, k]."""
        if self.kind == RADEMACHER:
            blocks = weight[b].unflatten(1, (-1, self.width))
            parts = (
                torch.einsum("rw,rdw->rd", blocks[:, i], self.signs(label, i))
                for i in range(blocks.shape[1])
            )
            return sum(parts, weight.new_zeros(len(b), len(self.columns)))
        word = self.words(label)
        return weight[b[:, None], word & (self.k - 1)] * (1 - 2 * (word >> 31)).to(self.dtype)

    def features(self, out: Tensor) -> Tensor:
        """What is done once to an example's numbers; it is its own transpose."""
        if self.kind == SJLT:
            return out
        return (_hadamard(out) if self.kind == TENSORSKETCH else out) * self.k**-0.5


def _steps(n: int, step: int) -> Iterator[slice]:
    return (slice(s, min(s + step, n)) for s in range(0, n, step))


def reference_rows(x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, kind: int) -> Tensor:
    entries = _Entries(kind, seed, x.shape[1], k, x)
    out = x.new_zeros(offsets.shape[0] - 1, k, dtype=entries.dtype)
    ids = segment_ids(offsets, x.shape[0])
    for t in _steps(x.shape[0], entries.step):
        entries.add(out, ids[t], g[t], x[t].to(entries.dtype))
    return entries.features(out)


def reference_rows_bwd(
    grad: Tensor, g: Tensor, offsets: Tensor, d_in: int, k: int, seed: int, kind: int
) -> Tensor:
    entries = _Entries(kind, seed, d_in, k, grad)
    weight = entries.features(grad)
    ids, dx = segment_ids(offsets, len(g)), grad.new_empty(len(g), d_in)
    for t in _steps(len(g), entries.step):
        dx[t] = entries.transpose(weight, ids[t], g[t])
    return dx


def reference_entries(
    x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, dense: bool
) -> Tensor:
    """On CUDA one host synchronisation."""
    entries = _Entries(RADEMACHER if dense else SJLT, seed, x.shape[1], k, x)
    xa, ga = x.to(entries.dtype), g.to(entries.dtype)
    out = xa.new_zeros(offsets.shape[0] - 1, k)
    outputs = torch.arange(g.shape[1], device=g.device)
    for b, t in segments(offsets):
        for o in _steps(g.shape[1], entries.step):
            rows = ga[t, o].T @ xa[t]
            entries.add(out, torch.full_like(outputs[o], b), outputs[o], rows)
    return entries.features(out)


def reference_entries_bwd(
    grad: Tensor, x: Tensor, g: Tensor, offsets: Tensor, k: int, seed: int, dense: bool
) -> tuple[Tensor, Tensor]:
    """On CUDA one host synchronisation."""
    entries = _Entries(RADEMACHER if dense else SJLT, seed, x.shape[1], k, x)
    xa, ga = x.to(entries.dtype), g.to(entries.dtype)
    weight = entries.features(grad.to(entries.dtype))
    dx, dg = torch.zeros_like(xa), torch.zeros_like(ga)
    outputs = torch.arange(g.shape[1], device=g.device)
    for b, t in segments(offsets):
        for o in _steps(g.shape[1], entries.step):
            rows = entries.transpose(weight, torch.full_like(outputs[o], b), outputs[o])
            dx[t] += ga[t, o] @ rows
            dg[t, o] = xa[t] @ rows.T
    return dx.to(x.dtype), dg.to(g.dtype)
