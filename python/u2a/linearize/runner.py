"""Recording of a batch, and tangent sweeps over it through the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from u2a.batch import AnswerLogps, Batch
from u2a.dual import _open, _survey, final_softcap, parts, token_embedding
from u2a.dual_modules import Refused, Site, UnsupportedModel, path
from u2a.linearize.head import Head
from u2a.linearize.session import Op, Session
from u2a.linearize.table import NAME, attend, twin
from u2a.logps import _like, _moved

ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


@dataclass
class Held:
    """A recorded batch. `at`: its answer tokens among the B T positions; `lp.logp` `[n]`."""

    ids: Tensor
    at: Tensor
    lp: AnswerLogps
    head: Head
    calls: list[Op]
    roots: list[Tensor]
    hidden: Tensor | None  # [n, d], in the graph of `roots` until `seed`

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    def seed(self, first: Tensor) -> None:
        """Sends the gradient of sum first . logp through the recorded graph, to every call."""
        if self.hidden is not None and self.roots and self.hidden.requires_grad:
            g = (self.head.pulled * -first[:, None]).to(self.hidden.dtype)
            torch.autograd.grad(self.hidden, self.roots, g, allow_unused=True)
        self.hidden, self.roots = None, []


@dataclass
class Swept:
    """Tangents of the answers' hidden states `[K, n, d]`; `second [K, B]`: what the backbone's
    second derivative adds to v^T H_i v, if it was asked for."""

    h_t: Tensor
    weight_t: Tensor | None
    bias_t: Tensor | None
    second: Tensor | None


class Runner:
    """The model's modules with handlers that record or sweep. Raises like `u2a.dual`.

    The session keeps its `k` after a sweep, for the backward of that sweep.
    """

    def __init__(self, model: nn.Module, mode: str, params: Mapping[str, Tensor]) -> None:
        self.model, self.params = model, dict(params)
        self.backbone: Any
        self.backbone, self.head = parts(model)
        self.softcap = final_softcap(model)
        if id(self.backbone) in _open:
            raise RuntimeError("u2a.linearize: the model is inside u2a.dual")
        self.session = Session(mode, {id(p) for p in params.values()})
        self.attributes = self._survey()

    def _survey(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        site = Site({}, "hvp", token_embedding(self.backbone))
        known = _survey(self.model, site)
        served = site.served | {id(self.head.weight), id(self.head.bias)}
        if lost := [n for n, p in self.params.items() if id(p) not in served]:
            raise UnsupportedModel(
                [f"{n}: no known module uses it" for n in lost], "u2a.linearize: parameters"
            )
        found, faults = [], []
        for module, given in known:
            tokens = module is site.token_embedding
            try:
                made = {} if module is self.head else twin(module, self.session, given, tokens)
            except Refused as reason:
                faults.append(f"{path(type(module))}: {reason}")
                continue
            found.append((module, made | {"training": False}))
        if faults:
            raise UnsupportedModel(faults, "u2a.linearize")
        return found

    @contextmanager
    def open(self) -> Iterator[None]:
        """The handlers in place; everything is put back on exit."""
        if id(self.backbone) in _open:
            raise RuntimeError("u2a.linearize: the model is inside u2a.dual")
        config, session = self.backbone.config, self.session
        implementation = config._attn_implementation
        replaced: list[tuple[nn.Module, str, bool, Any]] = []
        _open.add(id(self.backbone))
        try:
            for module, attributes in self.attributes:
                for name, value in attributes.items():
                    there = name in module.__dict__
                    replaced.append((module, name, there, module.__dict__.get(name)))
                    module.__dict__[name] = value
            config._attn_implementation = NAME
            with torch.compiler.set_stance("force_eager"):  # sessions are Python state
                yield
        finally:
            config._attn_implementation = implementation
            for module, name, there, before in replaced:
                del module.__dict__[name]
                if there:
                    module.__dict__[name] = before
            session.leaves, session.calls, session.roots = {}, [], []
            session.at = session.second = session.owner = None
            _open.discard(id(self.backbone))

    def record(self, batch: Batch, ref: Tensor | None) -> Held:
        ids, at, target, row, count = _moved(batch, self.head.weight.device)
        session = self.session
        session.k = 1
        with self.open(), torch.set_grad_enabled(session.hvp):
            h = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
            h = h.flatten(0, 1).index_select(0, at)
            calls, roots = session.calls, session.roots
        with torch.no_grad():
            head = Head(self.head, self.softcap, h, target, session.hvp)
        lp = AnswerLogps(head.logp, row, count, _like(ref, head.logp), batch.index)
        return Held(ids, at, lp, head, calls, roots, h if session.hvp else None)

    def sweep(
        self, held: Held, leaves: Mapping[str, Tensor], k: int, second: bool = False
    ) -> Swept:
        """`leaves`: {name: [K, *shape]}, directions that may require grad."""
        session = self.session
        with self.open():
            session.leaves = {id(self.params[n]): t for n, t in leaves.items()}
            session.calls, session.at, session.k, session.rows = held.calls, 0, k, held.rows
            if second:
                session.second = held.head.h.new_zeros(k, held.rows)
            h_t = self.backbone(input_ids=held.ids, use_cache=False).last_hidden_state
            if session.at != len(held.calls):
                raise RuntimeError(
                    f"u2a.linearize: the sweep met {session.at} calls, the recording "
                    f"{len(held.calls)}; the model's forward is not the same twice"
                )
            h_t = h_t.unflatten(0, (k, -1)).flatten(1, 2).index_select(1, held.at)
            found = session.second
            weight_t, bias_t = (session.direction(p) for p in (self.head.weight, self.head.bias))
        return Swept(h_t, weight_t, bias_t, found)
