"""The tangent sweep of every kind of module that `u2a.dual` knows.

A module that is linear in its input and holds no parameters maps tangents as it maps rows, and
needs nothing. `TWINS` has a handler for each dual handler that sets a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from u2a import dual_lora, dual_mlp, dual_modules, dual_moe
from u2a.dual_modules import Refused, Site, path
from u2a.dual_table import TABLE
from u2a.linearize.attention import make_attention
from u2a.linearize.linear import Embedding, Grouped, Linear
from u2a.linearize.nonlinear import Norm, Pointwise, Stacked
from u2a.linearize.session import Constant, Session
from u2a_kernels import dual_glu

NAME = "u2a_linearize"
Attributes = dict[str, Any]
Handler = Callable[[Any, Session], Attributes]


def linear(module: nn.Linear, session: Session) -> Attributes:
    def forward(x: Tensor) -> Tensor:
        return session.run(lambda: Linear(session, module.weight, module.bias), x)

    return {"forward": forward}


def conv1d(module: Any, session: Session) -> Attributes:
    def forward(x: Tensor) -> Tensor:
        return session.run(lambda: Linear(session, module.weight, module.bias, turned=True), x)

    return {"forward": forward}


def embedding(module: nn.Embedding, session: Session, tokens: bool = False) -> Attributes:
    """The token embedding says how many examples there are."""

    def forward(ids: Tensor) -> Tensor:
        if tokens:
            session.rows = ids.shape[0]
        elif ids.shape[0] != session.rows:  # positions, once for all rows or for K B of them
            ids = ids[:1].expand(session.rows, *ids.shape[1:])
        return session.run(
            lambda: Embedding(session, module.weight, module.padding_idx, tokens), ids
        )

    return {"forward": forward}


def scaled_embedding(module: Any, session: Session, tokens: bool = False) -> Attributes:
    inner = embedding(module, session, tokens)["forward"]
    return {"forward": lambda ids: inner(ids) * module.embed_scale.to(module.weight.dtype)}


def opt_positions(module: Any, session: Session) -> Attributes:
    inner = embedding(module, session)["forward"]

    def forward(mask: Any, past: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            raise RuntimeError("u2a.linearize: OPT positions without position_ids")
        return inner(position_ids[: session.rows] + module.offset)

    return {"forward": forward}


def lora_embedding(module: Any, session: Session) -> Attributes:
    def forward(ids: Tensor) -> Tensor:
        y: Tensor = module.base_layer(ids)
        rows = ids[:1].expand(session.rows, *ids.shape[1:]) if len(ids) != session.rows else ids
        for name in dual_lora.active(module):
            low = session.run(partial(columns, name), rows)
            low = session.run(partial(Linear, session, module.lora_embedding_B[name], None), low)
            y = y + (low * dual_lora.embedding_scale(module, name)).to(y.dtype)
        return y

    def columns(name: str) -> Embedding:
        padding_idx = module.base_layer.padding_idx
        return Embedding(session, module.lora_embedding_A[name], padding_idx, True, turned=True)

    return {"forward": forward}


def layer_norm(module: nn.LayerNorm, session: Session) -> Attributes:
    def make() -> Norm:
        return Norm(session, module.weight, module.bias, module.eps, centred=True)

    return {"forward": lambda x: session.run(make, x)}


def rms_norm(module: Any, session: Session) -> Attributes:
    def make() -> Norm:
        return Norm(session, module.weight, None, module.variance_epsilon)

    return {"forward": lambda x: session.run(make, x)}


def one_plus_rms_norm(module: Any, session: Session) -> Attributes:
    def make() -> Norm:
        return Norm(session, module.weight, None, module.eps, lift=True)

    return {"forward": lambda x: session.run(make, x)}


def activation(module: nn.Module, session: Session) -> Attributes:
    """One input, one output: the slopes and bends of the dual op itself."""
    fn = TABLE[path(type(module))](module, Site({}, "hvp"))["forward"]
    return {"forward": lambda x: session.run(lambda: Pointwise(session, fn), x)}


def glu(session: Session, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up of one shape and dtype."""
    fn = partial(dual_glu, activation=activation)
    return session.run(lambda: Pointwise(session, fn), gate, up)


def gated_mlp(module: Any, session: Session) -> Attributes:
    name = dual_mlp.named(module.act_fn)

    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(glu(session, gate, up, name))

    return {"forward": forward}


def packed_mlp(module: Any, session: Session) -> Attributes:
    name = dual_mlp.named(module.activation_fn)

    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        return module.down_proj(glu(session, gate, up, name))

    return {"forward": forward}


def attention(module: Any, session: Session) -> Attributes:
    return {"u2a_session": session}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface."""
    session = module.__dict__.get("u2a_session")
    if session is None or attention_mask is not None or dropout:
        raise RuntimeError(
            f"{NAME}: this attention answers only inside u2a.linearize, without mask and dropout"
        )

    def make() -> Stacked:
        return make_attention(session, query, key, scaling, sliding_window, softcap)

    out = session.run(make, query, key, value)
    return out.transpose(1, 2), None


def router(module: Any, session: Session) -> Attributes:
    normalise = getattr(module, "norm_topk_prob", True)

    def choose(logits: Tensor) -> Tensor:
        """Experts by the same rule as the dual router, hence in the same order."""
        rows = torch.cat([logits, torch.zeros_like(logits)])
        return dual_moe.top_scores(rows, module.top_k, normalise)[1].chunk(2)[0]

    def scores(rows: Tensor) -> Tensor:
        return dual_moe.top_scores(rows, module.top_k, normalise)[0]

    def forward(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = h.reshape(-1, h.shape[-1])
        logits = session.run(lambda: Linear(session, module.weight, None), h)
        chosen = session.run(lambda: Constant(session, choose), logits.detach())
        return logits, session.run(lambda: Stacked(session, scores), logits), chosen

    return {"forward": forward}


def experts(module: Any, session: Session) -> Attributes:
    count, name = module.gate_up_proj.shape[0], dual_mlp.named(module.act_fn)

    def plan(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs sorted by expert: their tokens, where they came from, ends, their examples."""
        expert = chosen.reshape(-1)
        order = torch.argsort(expert, stable=True)
        each = torch.arange(count, device=expert.device)
        ends = torch.searchsorted(expert[order], each, right=True, out_int32=True)
        token = order // chosen.shape[1]
        return token, torch.argsort(order), ends, token // (len(chosen) // session.rows)

    def forward(h: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        token, back, ends, owner = session.run(lambda: Constant(session, plan), chosen)
        x = session.split(h)[:, token].flatten(0, 1)
        session.owner = owner
        both = session.run(lambda: Grouped(session, module.gate_up_proj, ends), x)
        gate, up = both.chunk(2, dim=-1)
        inner = glu(session, gate, up, name)
        y = session.run(lambda: Grouped(session, module.down_proj, ends), inner)
        session.owner = None
        y = session.split(y)[:, back].reshape(h.shape[0], scores.shape[1], -1)
        scores = scores[..., None].expand_as(y)
        return glu(session, scores, y.to(scores.dtype), "identity").sum(1).to(h.dtype)

    return {"forward": forward}


def shared_and_sparse(module: Any, session: Session) -> Attributes:
    def forward(h: Tensor) -> Tensor:
        flat = h.flatten(0, -2)
        _, scores, chosen = module.gate(flat)
        gate, shared = module.shared_expert_gate(flat), module.shared_expert(flat)
        shared = glu(session, gate.expand_as(shared), shared, "sigmoid")
        return (module.experts(flat, chosen, scores) + shared).view_as(h)

    return {"forward": forward}


def untouched(module: Any, session: Session) -> Attributes:
    """Parts that are linear in their rows and have handlers of their own."""
    return {}


TWINS: dict[Any, Handler | None] = {
    dual_modules.linear: linear,
    dual_modules.conv1d: conv1d,
    dual_modules.embedding: embedding,
    dual_modules.scaled_embedding: scaled_embedding,
    dual_modules.opt_positions: opt_positions,
    dual_modules.layer_norm: layer_norm,
    dual_modules.rms_norm: rms_norm,
    dual_modules.one_plus_rms_norm: one_plus_rms_norm,
    dual_modules.attention: attention,
    dual_modules.opt_attention: attention,
    dual_modules.gpt2_attention: attention,
    dual_moe.olmoe_attention: attention,
    dual_mlp.activation: activation,
    dual_lora.lora_linear: untouched,
    dual_lora.lora_embedding: lora_embedding,
    dual_mlp.gated_mlp: gated_mlp,
    dual_mlp.packed_mlp: packed_mlp,
    dual_moe.router: router,
    dual_moe.experts: experts,
    dual_moe.shared_and_sparse: shared_and_sparse,
    # Nothing to add: the dual handler's own answer, an error where it sets one.
    dual_modules.backbone: None,
    dual_modules.capped_causal_lm: None,
    dual_modules.nothing: None,
    dual_modules.dropout: None,
    dual_modules.layer: None,
    dual_modules.opt_layer: None,
    dual_modules.opt_decoder: None,
    dual_modules.causal_lm: None,
    dual_modules.peft_model: None,
    dual_moe.sparse: None,
}


def handler_of(module: nn.Module) -> Any:
    found = TABLE[path(type(module))]
    return getattr(found, "func", found)


def twin(module: nn.Module, session: Session, given: Attributes, tokens: bool) -> Attributes:
    """Attributes to set on a module to which `u2a.dual` would give the attributes `given`."""
    handler = handler_of(module)
    if handler not in TWINS:
        raise Refused("u2a.linearize has no tangent sweep for it")
    made = TWINS[handler]
    if made is None:
        return given
    return made(module, session, tokens) if tokens else made(module, session)  # type: ignore[call-arg]
