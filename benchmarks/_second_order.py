"""The problem of the second-order benchmarks: a model, rows, a direction, and float64 references.

Loss: mean negative log-probability of every token but a row's first. Hugging Face modules with
random weights; GPT-2 trains everything (head tied to the embedding), Llama the LoRA factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from u2a.batch import Batch, Row, collate
from u2a.tree import Tree, norm, trainable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(d=256, layers=4, heads=4, kv_heads=4, d_mlp=688, head_dim=64)
LARGE = dict(d=2048, layers=16, heads=32, kv_heads=8, d_mlp=8192, head_dim=64)  # Llama 3.2 1B
TINY = dict(d=32, layers=2, heads=2, kv_heads=1, d_mlp=64, head_dim=16)
SIZES = {"tiny": TINY, "small": SMALL, "1b": LARGE}
RANK, ROWS = 8, 2
FLAT = 1e-3  # a tensor below this share of the largest is judged by that share (zero by symmetry)


@dataclass(frozen=True)
class Setting:
    model: str = "gpt2"  # or "llama", LoRA on every linear of a block
    t: int = 512
    vocab: int = 8192
    size: str = "small"
    dtype: str = "float32"

    def __str__(self) -> str:
        what = "GPT-2, full parameters" if self.model == "gpt2" else f"Llama, LoRA r={RANK}"
        return (
            f"{what}, {self.size} (d={SIZES[self.size]['d']}, L={SIZES[self.size]['layers']}), "
            f"B={ROWS}, T={self.t}, V={self.vocab}, {self.dtype}"
        )


def _gpt2(s: Setting) -> nn.Module:
    size = SIZES[s.size]
    config = GPT2Config(
        vocab_size=s.vocab, n_positions=s.t, n_embd=size["d"], n_layer=size["layers"],
        n_head=size["heads"], attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def with_lora(model: nn.Module, rank: int = RANK) -> nn.Module:
    """LoRA on every linear of a block; B is not zero, so that every product has all its terms."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return model


def _llama(s: Setting) -> LlamaForCausalLM:
    size = SIZES[s.size]
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=size["d"], intermediate_size=size["d_mlp"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"], head_dim=size["head_dim"],
        max_position_embeddings=s.t, bos_token_id=0, eos_token_id=0, use_cache=False,
        tie_word_embeddings=s.size == "1b",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_base(s: Setting, seed: int = 0) -> nn.Module:
    """The same weights every time, no adapter yet."""
    torch.manual_seed(seed)
    return _gpt2(s) if s.model == "gpt2" else _llama(s)


def make_model(s: Setting) -> nn.Module:
    """The same weights every time, on the device, in evaluation mode."""
    model = make_base(s)
    if s.model == "llama":
        model = with_lora(model)
    return model.to(DEVICE, getattr(torch, s.dtype)).eval()


def inner(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def checkpointed(model: nn.Module) -> nn.Module:
    inner(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()  # no dropout anywhere


def draw(like: Tree, generator: torch.Generator) -> Tree:
    return {n: torch.randn(p.shape, generator=generator).to(p) for n, p in like.items()}


def nll(lp: Any) -> Tensor:
    """The loss of a row, as u2a sees it."""
    return -lp.mean()


class Problem:
    """One model with its batch and direction; every way to a product makes its own."""

    def __init__(self, model: nn.Module, ids: Tensor, v: Tree, attention: str = "sdpa"):
        self.model, self.ids, self.v = model, ids.to(DEVICE), v
        inner(model).set_attn_implementation(attention)

    @classmethod
    def of(cls, s: Setting, attention: str = "sdpa") -> Problem:
        model = make_model(s)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(s.vocab, (ROWS, s.t), generator=generator)
        return cls(model, ids, draw(trainable(model), generator), attention)

    @cached_property
    def batch(self) -> Batch:
        rows = [Row(str(i), (r[0],), tuple(r[1:])) for i, r in enumerate(self.ids.tolist())]
        return collate(rows).to(DEVICE)

    @cached_property
    def params(self) -> dict[str, nn.Parameter]:
        return trainable(self.model)

    def logits(self, params: Any = None, ids: Tensor | None = None) -> Tensor:
        """Of every predicting position, `[B, T - 1, V]`."""
        inputs = dict(input_ids=self.ids if ids is None else ids, use_cache=False)
        out = (
            self.model(**inputs)
            if params is None
            else functional_call(self.model, params, (), inputs)
        )
        return out.logits[:, :-1]

    def losses(self, params: Any = None, ids: Tensor | None = None) -> Tensor:
        """Mean negative log-probability per row, `[B]`."""
        ids = self.ids if ids is None else ids
        z = self.logits(params, ids)
        each = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.view(ids.shape[0], -1).mean(1)

    def loss(self, params: Any = None) -> Tensor:
        """The mean over the batch, in one cross-entropy."""
        z = self.logits(params)
        return F.cross_entropy(z.flatten(0, 1), self.ids[:, 1:].flatten())

    def gradient(self, params: Any = None) -> Tree:
        leaves = self.params if params is None else params
        return self.named(torch.autograd.grad(self.loss(params), list(leaves.values())))

    def named(self, tensors: Any) -> Tree:
        return dict(zip(self.params, tensors, strict=True))

    def shifted(self, step: float) -> Tree:
        """Leaves at theta + step v."""
        return {n: (p.detach() + step * self.v[n]).requires_grad_() for n, p in self.params.items()}

    def central(self, share: float) -> Tree:
        """Two gradients; the step moves the parameters by `share` of their norm."""
        step = float(share * norm(self.params) / norm(self.v))
        right, left = (self.gradient(self.shifted(h)) for h in (step, -step))
        return {n: (right[n] - left[n]) / (2 * step) for n in right}


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Float64 all through: norms that do not go through float32, SDPA as plain softmax."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    for m in norms:
        m.forward = partial(_plain_norm, m)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for m in norms:
            del m.forward


def _plain_norm(m: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)


def doubled(p: Problem) -> Problem:
    """The same weights and direction in float64; the problem's own model is converted."""
    p.model.double()
    return Problem(p.model, p.ids, {n: t.double() for n, t in p.v.items()})


def references(p: Problem) -> dict[str, Any]:
    """Gradient, Hessian and Gauss-Newton products and scores of a float64 problem by reverse mode
    alone, row by row, so that memory is one row's."""
    total: dict[str, Any] = {"scores": []}
    with exact(p.model):
        for ids in p.ids.split(1):
            row = Problem(p.model, ids, p.v)
            g = torch.autograd.grad(row.loss(), list(p.params.values()), create_graph=True)
            along = sum((a * t).sum() for a, t in zip(g, p.v.values(), strict=True))
            h = torch.autograd.grad(along, list(p.params.values()))
            total["scores"].append(float(along))
            parts = {"gradient": g, "hvp": h, "ggn": _gauss_newton(row)}
            for name, found in parts.items():
                held = total.setdefault(name, [0.0] * len(found))
                share = [b.detach() / len(p.ids) for b in found]
                total[name] = [a + b for a, b in zip(held, share, strict=True)]
    trees = {k: p.named(t) for k, t in total.items() if k != "scores"}
    return trees | {"scores": torch.tensor(total["scores"], dtype=torch.float64)}


def _gauss_newton(p: Problem) -> tuple[Tensor, ...]:
    leaves = list(p.params.values())
    z = p.logits()
    u = torch.zeros_like(z, requires_grad=True)
    back = torch.autograd.grad(z, leaves, u, create_graph=True)  # J^T u, linear in u
    (z_t,) = torch.autograd.grad(back, u, list(p.v.values()), retain_graph=True)
    q = torch.softmax(z.detach(), -1)
    bent = q * (z_t - (q * z_t).sum(-1, keepdim=True)) / z[..., 0].numel()
    return torch.autograd.grad(z, leaves, bent)


def errors(got: Any, want: Any) -> tuple[float, float]:
    """(relative error of the whole, of the worst tensor); both sides trees or both tensors."""
    if isinstance(want, Tensor):
        got, want = {"": got}, {"": want}
    got = {n: t.detach().to("cpu", torch.float64) for n, t in got.items()}
    want = {n: t.detach().to("cpu", torch.float64) for n, t in want.items()}
    off = {n: float((got[n] - t).norm()) for n, t in want.items()}
    size = {n: float(t.norm()) for n, t in want.items()}
    floor = FLAT * max(size.values())
    whole = sum(e**2 for e in off.values()) ** 0.5 / sum(e**2 for e in size.values()) ** 0.5
    return whole, max(e / max(size[n], floor) for n, e in off.items())
