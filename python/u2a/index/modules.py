"""How each kind of module is tapped: one handler per kind, found by class and place.

A handler gets a module that holds captured parameters and returns the forward to put on the
instance. It runs the module's own forward on frozen parameters and taps what comes out, so values
stay those of the model; only experts and routers are written out, since their weights are used deep
inside. Seeing another kind, or a setting that would make a tap wrong, raises Refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from u2a.dual_modules import Refused, path
from u2a.index.spec import Rule
from u2a.index.taps import Lookup, Outer, Rows


@dataclass
class Site:
    """What taps look at: rules by parameter; while a batch runs, its slots and token layout."""

    rules: dict[int, Rule] = field(default_factory=dict)
    slots: dict[int, Tensor] = field(default_factory=dict)
    offsets: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    used: set[int] = field(default_factory=set)

    def take(self, p: Tensor) -> tuple[Tensor, Rule]:
        """The slot and the rule of a captured parameter, which is now used."""
        self.used.add(id(p))
        return self.slots[id(p)], self.rules[id(p)]

    def captured(self, p: Tensor | None) -> bool:
        return p is not None and id(p) in self.rules

    def layout(self, rows: int, module: nn.Module) -> Tensor:
        """Offsets of the examples among `rows` rows, a multiple of the tokens, each token's rows
        together."""
        n = _tokens[-1].shape[0] if _tokens else self.owner.shape[0]
        times = rows // n if n else 0
        if rows != n * times:
            raise RuntimeError(
                f"u2a.index: {path(type(module))} ran on {rows} rows where {n} tokens are known; "
                "say which they are (u2a.index.tokens), or exclude its parameters"
            )
        if not _tokens:
            return self.offsets if times == 1 else self.offsets * times
        examples = torch.arange(self.offsets.shape[0], device=self.owner.device)
        return (torch.searchsorted(self.owner[_tokens[-1]], examples) * times).to(torch.int32)

    def outer(self, y: Tensor, x: Tensor, p: Tensor, module: nn.Module) -> Tensor:
        """Taps y, linear in p with inputs x `[..., d_in]`."""
        x = x.detach().reshape(-1, x.shape[-1]).to(y.dtype)
        offsets = self.layout(x.shape[0], module)
        slot, rule = self.take(p)
        return Outer.apply(y, slot, rule.keep(x), offsets, rule, 0)

    def rows(self, y: Tensor, p: Tensor, module: nn.Module, scale: Tensor | None = None) -> Tensor:
        """Taps y, whose gradient in p is that in y (times `scale`), summed over tokens."""
        offsets = self.layout(y.numel() // y.shape[-1], module)
        slot, rule = self.take(p)
        return Rows.apply(y, slot, scale, offsets, rule)


_tokens: list[Tensor] = []


@contextmanager
def tokens(index: Tensor) -> Iterator[None]:
    """For a forward that calls modules on some of the tokens, as unfused experts do.

    `index [m]`: their numbers among the packed tokens, ascending, as torch.where gives them.
    Without effect outside a capture.
    """
    _tokens.append(index)
    try:
        yield
    finally:
        _tokens.pop()


def weight_shape(module: nn.Module, p: Tensor) -> tuple[int, ...]:
    """(d,), (d_out, d_in) as nn.Linear keeps it, or (experts, d_out, d_in)."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and p.ndim > 1:
        return p.shape[0], p[0].numel()
    if path(type(module)) == "transformers.pytorch_utils.Conv1D" and p.ndim == 2:
        return p.shape[1], p.shape[0]
    return tuple(p.shape)


Forward = Callable[..., Any]
Handler = Callable[[Any, Site], Forward]


def linear(module: Any, site: Site) -> Forward:
    """nn.Linear, transformers' Conv1D: y = x W^T + b, seen as [d_out, d_in] in both."""
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if site.captured(module.weight):
            y = site.outer(y, x, module.weight, module)
        return site.rows(y, module.bias, module) if site.captured(module.bias) else y

    return forward


def lookup(site: Site, module: nn.Embedding, ids: Tensor) -> Tensor:
    y = F.embedding(ids, module.weight, module.padding_idx)
    ids = ids.reshape(-1)
    offsets = site.layout(ids.shape[0], module)
    skip = -1 if module.padding_idx is None else module.padding_idx
    slot, rule = site.take(module.weight)
    return Lookup.apply(y, slot, ids, offsets, rule, skip)


def embedding(module: Any, site: Site) -> Forward:
    """nn.Embedding, and Gemma's, which scales what it looked up."""
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise Refused("max_norm, sparse and scale_grad_by_freq are not supported")
    scale = getattr(module, "embed_scale", None)

    def forward(ids: Tensor) -> Tensor:
        y = lookup(site, module, ids)
        return y if scale is None else y * scale.to(module.weight.dtype)

    return forward


def opt_positions(module: Any, site: Site) -> Forward:
    def forward(mask: Tensor, past: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            raise RuntimeError("u2a.index: OPT positions are those of the packed rows")
        return lookup(site, module, position_ids + module.offset)

    return forward


def layer_norm(module: Any, site: Site) -> Forward:
    if len(module.normalized_shape) != 1:
        raise Refused("needs one normalised dimension")
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        if site.captured(module.weight):
            unit = F.layer_norm(x.detach(), module.normalized_shape, eps=module.eps).to(y.dtype)
            y = site.rows(y, module.weight, module, unit)
        return site.rows(y, module.bias, module) if site.captured(module.bias) else y

    return forward


def rms_norm(module: Any, site: Site, heads_first: bool = False) -> Forward:
    """y = unit(x) * w or unit(x) * (1 + w). `heads_first`: called on [1, H, N, D] too."""
    inner = module.forward
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if eps is None:
        raise Refused("no variance_epsilon or eps")

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(y.dtype)
        if heads_first and x.ndim == 4:
            turned = site.rows(y.transpose(1, 2), module.weight, module, unit.transpose(1, 2))
            return turned.transpose(1, 2)
        return site.rows(y, module.weight, module, unit)

    return forward


def convolution(module: Any, site: Site) -> Forward:
    """nn.Conv1d, nn.Conv2d: a linear map of unfolded patches; one row of the batch an example."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Refused("convolution with groups, or padding other than numbers of zeros")
    flat = isinstance(module, nn.Conv1d)
    inner = module.forward

    def pair(v: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (fill, *v) if flat else v

    def forward(x: Tensor) -> Tensor:
        y = inner(x)
        image = x.detach().unsqueeze(-2) if flat else x.detach()
        patches = F.unfold(
            image, pair(module.kernel_size, 1), pair(module.dilation, 1), pair(module.padding, 0),
            pair(module.stride, 1),
        )  # [B, d_in, L]  # fmt: skip
        out = y.flatten(2).transpose(1, 2)  # [B, L, d_out]
        if site.captured(module.weight):
            out = site.outer(out, patches.transpose(1, 2), module.weight, module)
        if site.captured(module.bias):
            out = site.rows(out, module.bias, module)
        return out.transpose(1, 2).reshape(y.shape)

    return forward
