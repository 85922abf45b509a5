"""A model's own class cut to one layer of each kind and small widths, against double backward.

Both sides run in float64 on the CPU; transformers' eager attention, norms and routers compute in
float32 inside, so agreement is to about 1e-6, and a missing term is off by far more than `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from u2a.batch import AnswerLogps, Batch, Row, collate
from u2a.dual import parts
from u2a.linearize import linearize
from u2a.products import ggnvp, hvp, jvp_scores
from u2a.tree import Tree, dot, norm, trainable

LIMIT = 1e-4
VOCAB = 64
HEADS, HEAD_DIM = 2, 40  # rotary parts of 0.25, 0.4, 0.5 and 0.75 of it are even
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), HEADS * HEAD_DIM),
    **dict.fromkeys(("num_attention_heads", "n_head"), HEADS),
    "head_dim": HEAD_DIM,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    "sliding_window": 3,
}
NONE = ("pad_token_id", "bos_token_id", "eos_token_id", "quantization_config")
SHAPES = ((2, 5), (1, 2), (4, 3))  # prompt and answer tokens of the rows


def cut(config: Any) -> Any:
    """A small configuration of the same class: every setting that is not a size stays."""
    found = config.to_dict()
    heads = found.get("num_attention_heads") or found.get("n_head") or HEADS
    kv = found.get("num_key_value_heads")
    small = {k: v for k, v in SMALL.items() if found.get(k) is not None}
    if kv is not None:
        small["num_key_value_heads"] = HEADS if kv == heads else 1
    kinds = list(dict.fromkeys(found.get("layer_types") or ["one"]))
    if found.get("layer_types"):
        small["layer_types"] = kinds
    small |= {k: len(kinds) for k in ("num_hidden_layers", "n_layer") if k in found}
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and any(isinstance(v, list) for v in rope.values()):
        small["rope_parameters"] = {k: v for k, v in rope.items() if not isinstance(v, list)}
        small["rope_parameters"]["rope_type"] = "default"
    made = type(config)(**{**found, **small, **{k: None for k in NONE if k in found}})
    made._attn_implementation, made.use_cache = "eager", False
    return made


def build(config: Any) -> nn.Module:
    """Random weights, large enough that nothing is nearly linear."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cut(config), attn_implementation="eager")
        model = model.double().eval().cpu()
        for p in model.parameters():
            p.data += 0.25 * torch.randn_like(p)
    model.config._experts_implementation = "eager"  # the grouped kernel takes no float64
    parts(model)
    return model


def batch_of(vocab: int = VOCAB, shapes: Any = SHAPES, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (n,), generator=generator).tolist())

    return collate([Row(f"row{i}", draw(p), draw(a)) for i, (p, a) in enumerate(shapes)])


def loss(lp: AnswerLogps) -> Tensor:
    """Not linear in the log-probabilities."""
    return 2 * nn.functional.softplus(0.3 * lp.sequence()) - lp.mean()


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, AnswerLogps]:
    row, t = batch.answer.nonzero(as_tuple=True)
    z = model(input_ids=batch.ids, use_cache=False).logits[row, t - 1]
    logp = torch.log_softmax(z, -1).gather(1, batch.ids[row, t, None])[:, 0]
    return z, AnswerLogps(logp, row, batch.answer.sum(1), index=batch.index)


def _grad(y: Tensor, params: dict[str, Any], **options: Any) -> Tree:
    found = torch.autograd.grad(y, list(params.values()), allow_unused=True, **options)
    pairs = zip(params.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def oracle(model: nn.Module, batch: Batch, v: Tree) -> dict[str, Tree]:
    """Per-row tangents, Hessian and Gauss-Newton product of the mean loss, by double backward."""
    params = trainable(model)
    rows = loss(_logits(model, batch)[1])
    scores = [dot(_grad(r, params, retain_graph=True), v) for r in rows]
    first = _grad(rows.mean(), params, create_graph=True)
    second = _grad(sum((first[n] * v[n]).sum() for n in params), params)  # type: ignore[arg-type]
    z, lp = _logits(model, batch)
    leaf = lp.logp.detach().requires_grad_()
    weight = torch.autograd.grad(loss(lp.with_logp(leaf)).mean(), leaf)[0].abs()
    dummy = torch.zeros_like(z, requires_grad=True)
    pulled = _grad(z, params, grad_outputs=dummy, create_graph=True)
    along = sum((pulled[n] * v[n]).sum() for n in params)
    z_t = torch.autograd.grad(along, dummy)[0]  # type: ignore[arg-type]
    p = torch.softmax(z.detach(), -1)
    u = p * (z_t - (p * z_t).sum(-1, keepdim=True)) * weight[:, None]
    ggn = _grad(_logits(model, batch)[0], params, grad_outputs=u)
    return {"scores": {"": torch.stack(scores)}, "hvp": second, "ggn": ggn}


def ours() -> dict[str, tuple[str, Callable[[nn.Module, Batch, Tree], Tree]]]:
    """{what: (which part of the oracle it must equal, call)}."""
    return {
        "per-example scores": ("scores", lambda m, b, v: {"": jvp_scores(m, b, loss, v)}),
        "Hessian product": ("hvp", lambda m, b, v: hvp(m, b, loss, v)),
        "Gauss-Newton product": ("ggn", lambda m, b, v: ggnvp(m, b, loss, v)),
        "linearised Hessian product": (
            "hvp", lambda m, b, v: linearize(m, b, loss, mode="hvp").matvec(v),
        ),
        "linearised Gauss-Newton product": ("ggn", lambda m, b, v: linearize(m, b, loss).matvec(v)),
    }  # fmt: skip


def compare(model: nn.Module) -> dict[str, float]:
    """Relative error of each of `ours`."""
    batch = batch_of()
    generator = torch.Generator().manual_seed(1)
    v = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in trainable(model).items()
    }
    want = oracle(model, batch, v)
    out = {}
    for what, (part, call) in ours().items():
        got = call(model, batch, v)
        gap = {n: t - want[part][n] for n, t in got.items()}
        out[what] = (norm(gap) / norm(want[part])).item()
    return out
