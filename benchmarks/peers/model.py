"""The one case every peer is measured on, and plain-torch ways to run it.

GPT-2 of 4 layers, d = 256, V = 1000, random weights, float32, 32 examples of 128 tokens. GPT-2's
Conv1D modules are replaced by nn.Linear, since two peers know only that. What is projected is the
gradient of the 16 linear weights inside the layers, of the loss summed over an example's tokens.
ACTIVATION in the environment: transformers' name of the GELU. GPT-2's own "gelu_new" is eight
operations in Python; "gelu_pytorch_tanh" is the same function in one, for everybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

VOCAB, LENGTH, ROWS, LAYERS, WIDTH, HEADS = 1000, 128, 32, 4, 256, 4
SIDE = 16  # a side of the Kronecker projection: 16 x 16 numbers from each of 16 linears
TOTAL = 4096
ACTIVATION = os.environ.get("ACTIVATION", "gelu_new")


@dataclass(frozen=True)
class Case:
    """`call()` does the whole work for the batch and returns its features, [ROWS, n] in all."""

    name: str
    call: Callable[[], Any]
    note: str = ""
    slow: bool = False  # one repetition


def make_model() -> GPT2LMHeadModel:
    """The same weights every time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        use_cache=False, activation_function=ACTIVATION,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = child.bias
                setattr(module, name, linear)
    return model


def make_ids() -> Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The 16 linear modules inside the layers, by name; the tied head is not among them."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and re.search(r"\bh\.\d", n)}


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over each example, `[B]`."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).sum(1)


def train_only_linears(model: nn.Module) -> None:
    """Freezes all but the 16 weights that are projected."""
    model.requires_grad_(False)
    for linear in linears(model).values():
        linear.weight.requires_grad_()


def training_step() -> Callable[[], Any]:
    """Forward, backward, every weight gradient; no optimizer."""
    model, ids = make_model(), make_ids()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses(model(input_ids=ids).logits, ids).sum().backward()

    return step


def forward() -> Callable[[], Any]:
    model, ids = make_model(), make_ids()

    @torch.no_grad()
    def call() -> None:
        losses(model(input_ids=ids).logits, ids)

    return call


def _scan(model: GPT2LMHeadModel, ids: Tensor) -> None:
    """Forward and the backward of activations alone, all the way to the embeddings."""
    embedded = model.transformer.wte(ids).detach().requires_grad_()
    losses(model(inputs_embeds=embedded).logits, ids).sum().backward()


def floor() -> Callable[[], Any]:
    model, ids = make_model().requires_grad_(False), make_ids()
    return lambda: _scan(model, ids)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, linear, p_in, p_out, out):
        ctx.save_for_backward(x @ p_in)
        ctx.linear, ctx.p_out, ctx.out = linear, p_out, out
        return F.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx, g):
        (xp,) = ctx.saved_tensors
        torch.bmm((g @ ctx.p_out).mT, xp, out=ctx.out)
        return g @ ctx.linear.weight, None, None, None, None


def factored_torch() -> Callable[[], Tensor]:
    """The factored projection in plain torch: A P_in kept by the forward, G P_out and one bmm in
    the backward."""
    model, ids = make_model().requires_grad_(False), make_ids()
    found = linears(model).values()
    out = torch.empty(len(found), ROWS, SIDE, SIDE)
    for linear, o in zip(found, out, strict=True):
        p_in, p_out = (torch.randn(d, SIDE) / SIDE**0.5 for d in linear.weight.shape[::-1])
        linear.forward = lambda x, args=(linear, p_in, p_out, o): _Projected.apply(x, *args)

    def call() -> Tensor:
        _scan(model, ids)
        return out.transpose(0, 1).reshape(ROWS, TOTAL)

    return call
