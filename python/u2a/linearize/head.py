"""Answer log-probabilities of a fixed batch and what their derivatives need, for K directions.

z = W h + b, a = c tanh(z / c) or z, s = a'(z), p = softmax a, R = s (p - 1) with 1 the one-hot
target: d logp = -R dz. Tangents: z_t = W h_t + W_t h + b_t, u = p (s z_t - <p, s z_t>),
R_t = s u + a''(z) z_t (p - 1). Logits are made again for every product, some tokens at a time;
p is held where all of it fits `HELD` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

HELD = 1 << 24  # probabilities held between products, at most
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # made at once, about
TILE = 8192  # rows of a narrow weight that are widened at once


class Chunk(NamedTuple):
    rows: slice
    h: Tensor
    y: Tensor
    p: Tensor
    slope: Tensor | None  # None: 1, and no bend
    bend: Tensor | None

    def residual(self) -> Tensor:
        """p - one-hot."""
        return self.p.scatter_add(1, self.y, -torch.ones_like(self.y, dtype=self.p.dtype))


class Found(NamedTuple):
    """Cotangents of a sweep: of the hidden states `[K, n, d]`, weight `[K, V, d]`, bias."""

    h: Tensor
    weight: Tensor | None
    bias: Tensor | None


# (tokens, their x `[m, d]`, g `[m, V]`, whether x is a tangent and has no part in the bias)
Parts = Callable[[slice, Tensor, Tensor, bool], None]


class Head:
    """h `[n, d]` and targets `[n]` of a batch's answer tokens; `weight_t [K, V, d]` or None."""

    def __init__(
        self, head: nn.Linear, softcap: float | None, h: Tensor, targets: Tensor, hvp: bool
    ) -> None:
        self.weight = head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        self.softcap, self.dtype = softcap, h.dtype
        self.h = h.detach().to(torch.promote_types(h.dtype, torch.float32))
        self.targets = targets
        held = softcap is None and len(targets) * len(self.weight) <= HELD
        self.p: Tensor | None = self.h.new_empty(len(targets), len(self.weight)) if held else None
        self.logp = self.h.new_empty(len(targets))
        self.pulled = torch.empty_like(self.h) if hvp else self.h.new_empty(0)  # R W
        for c in self._chunks(1, fill=True):
            if hvp:
                self.pulled[c.rows] = _pull(_times(c.residual(), c.slope), self.weight)

    def _chunks(self, k: int, fill: bool = False) -> Iterator[Chunk]:
        step = max(16, LOGITS.get(self.h.device.type, 1 << 22) // (len(self.weight) * k))
        for start in range(0, len(self.targets), step):
            rows = slice(start, start + step)
            h, y = self.h[rows], self.targets[rows, None]
            slope = bend = None
            if self.p is None or fill:
                a = _project(h, self.weight)
                if self.bias is not None:
                    a += self.bias
                if self.softcap is not None:
                    t = torch.tanh(a / self.softcap)
                    a, slope = self.softcap * t, 1 - t * t
                    bend = t * slope * (-2 / self.softcap)
                p = torch.log_softmax(a, 1)
                if fill:
                    self.logp[rows] = p.gather(1, y)[:, 0]
                p = p.exp_()
                if self.p is not None:
                    self.p[rows] = p
            else:
                p = self.p[rows]
            yield Chunk(rows, h, y, p, slope, bend)

    def _tangent(
        self, c: Chunk, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, s z_t less that of the target (in place of z_t without a cap), u: [K, m, V]."""
        z_t = _project(h_t[:, c.rows].to(self.h.dtype), self.weight)
        moved = _moved(c.h, weight_t, bias_t)
        if moved is not None:
            z_t += moved
        a_t = _times(z_t, c.slope)
        a_t -= a_t.gather(-1, c.y.expand(a_t.shape[0], *c.y.shape))
        u = a_t * c.p
        return z_t, a_t, u.addcmul_(c.p, u.sum(-1, keepdim=True), value=-1)

    def ggn(
        self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None, first: Tensor
    ) -> Found:
        """sum_t first_t (diag p_t - p_t p_t^T) z_t, pulled back through the head; first `[n]`."""
        out = self._zeros(h_t, weight_t, bias_t)
        for c in self._chunks(h_t.shape[0]):
            _, _, u = self._tangent(c, h_t, weight_t, bias_t)
            self._add(out, c, _times(u, c.slope), first[c.rows, None])
        return self._narrow(out)

    def curvature(self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        """z_t^T (diag p - p p^T) z_t per direction and token, [K, n]."""
        parts = [h_t.new_zeros(h_t.shape[0], 0, dtype=self.h.dtype)]
        for c in self._chunks(h_t.shape[0]):
            _, a_t, u = self._tangent(c, h_t, weight_t, bias_t)
            parts.append((a_t * u).sum(-1))
        return torch.cat(parts, 1)

    def logp_t(self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        """[K, n]; for "hvp"."""
        out = -(self.pulled * h_t.to(self.h.dtype)).sum(-1)
        if weight_t is None and bias_t is None:
            return out
        for c in self._chunks(h_t.shape[0]):
            moved = _moved(c.h, weight_t, bias_t)
            assert moved is not None
            out[:, c.rows] -= (_times(c.residual(), c.slope) * moved).sum(-1)
        return out

    def logp_tt(self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        """Second derivative of logp along the line (h + e h_t, W + e W_t, b + e b_t), [K, n]."""
        parts = [h_t.new_zeros(h_t.shape[0], 0, dtype=self.h.dtype)]
        for c in self._chunks(h_t.shape[0]):
            z_t, a_t, u = self._tangent(c, h_t, weight_t, bias_t)
            total = (a_t * u).sum(-1)
            if c.bend is not None:
                total += (z_t * z_t * c.bend * c.residual()).sum(-1)
            if weight_t is not None:
                pairs = zip(h_t[:, c.rows].to(self.h.dtype), weight_t, strict=True)
                crossed = torch.stack([_project(x, w) for x, w in pairs])
                total += 2 * (crossed * _times(c.residual(), c.slope)).sum(-1)
            parts.append(-total)
        return torch.cat(parts, 1)

    def hvp(
        self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None,
        first: Tensor, second: Tensor | None, parts: Parts | None = None,
    ) -> Found:  # fmt: skip
        """Cotangents of the tangent of sum first_t d logp_t; `second [K, n]`: the tangent of
        `first`, None for zero. With `parts`, of one direction, the weight's and bias's go there."""
        out = self._zeros(h_t, weight_t, bias_t)
        if second is not None and weight_t is None and bias_t is None:
            out.h.sub_(second[..., None] * self.pulled)
            second = None
        for c in self._chunks(h_t.shape[0]):
            z_t, _, u = self._tangent(c, h_t, weight_t, bias_t)
            w = -first[c.rows, None]
            dz = _times(u, c.slope)
            if c.bend is not None:
                dz = dz + z_t * c.bend * c.residual()
            self._add(out, c, dz, w, parts)
            if second is None and weight_t is None:
                continue
            r = _times(c.residual(), c.slope)
            if second is not None:
                self._add(out, c, r * -second[:, c.rows, None], None, parts)
            if weight_t is not None:
                dz_t, x_t = w * r, h_t[:, c.rows].to(self.h.dtype)
                for k, each in enumerate(weight_t):
                    out.h[k, c.rows] += _pull(dz_t, each)
                    if parts is not None:
                        parts(c.rows, x_t[k], dz_t, True)
                    elif out.weight is not None:
                        out.weight[k].addmm_(dz_t.T, x_t[k])
        return self._narrow(out)

    def _zeros(self, h_t: Tensor, weight_t: Tensor | None, bias_t: Tensor | None) -> Found:
        zeros = [
            None if t is None else torch.zeros_like(t, dtype=self.h.dtype)
            for t in (h_t, weight_t, bias_t)
        ]
        assert zeros[0] is not None
        return Found(zeros[0], zeros[1], zeros[2])

    def _add(
        self, out: Found, c: Chunk, dz: Tensor, scale: Tensor | None, parts: Parts | None = None
    ) -> None:
        """What scale * dz `[K, m, V]` pulls back to; scale `[m, 1]`, put on the short sides."""
        pulled = _pull(dz, self.weight)
        out.h[:, c.rows] += pulled if scale is None else pulled * scale
        if parts is not None:
            return parts(c.rows, c.h, dz[0] if scale is None else dz[0] * scale, False)
        if out.weight is not None:
            h = c.h if scale is None else c.h * scale
            out.weight.baddbmm_(dz.mT, h.expand(dz.shape[0], *h.shape))
        if out.bias is not None:
            ones = dz.new_ones(dz.shape[1], 1) if scale is None else scale
            out.bias.add_((dz.mT @ ones)[..., 0])

    def _narrow(self, out: Found) -> Found:
        parts = [None if t is None else t.to(self.dtype) for t in out]
        assert parts[0] is not None
        return Found(parts[0], parts[1], parts[2])


def _times(x: Tensor, slope: Tensor | None) -> Tensor:
    return x if slope is None else x * slope


def _moved(h: Tensor, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor | None:
    """W_t h + b_t, [K, m, V]."""
    out = None if bias_t is None else bias_t[:, None].to(h.dtype)
    if weight_t is None:
        return out
    found = torch.stack([_project(h, w) for w in weight_t])
    return found if out is None else found + out


def _tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    step = len(weight) if weight.dtype == dtype else TILE
    for v in range(0, len(weight), max(1, step)):
        yield slice(v, v + step), weight[v : v + step].to(dtype)


def _project(h: Tensor, weight: Tensor) -> Tensor:
    """h W^T, [..., V]."""
    parts = [h @ w.T for _, w in _tiles(weight, h.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _pull(g: Tensor, weight: Tensor) -> Tensor:
    """g W, [..., d]."""
    parts = [g[..., at] @ w for at, w in _tiles(weight, g.dtype)]
    return sum(parts[1:], parts[0])
