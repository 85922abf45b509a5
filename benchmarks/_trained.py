"""A small trained language model, rows for it, and the exact gradients of its linear weights."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from u2a.batch import Row, collate, row_batches
from u2a.demo.base_model import make_tokenizer
from u2a.demo.corpus import make_corpus
from u2a.products import answer_logps, gradient, jvp_scores

STEPS, BATCH, RATE = 200, 32, 2e-3
CANDIDATES, QUERIES = 192, 16


def nll(lp):
    return -lp.sequence()


def make_rows() -> tuple[object, list[Row], list[Row], list[Row]]:
    """Tokenizer, rows to train on, candidates, queries."""
    corpus = make_corpus(0)
    base = corpus["base"]
    tokenizer = make_tokenizer([r["prompt"] + r["completion"] for r in base])

    def encode(i: int, prompt: str, answer: str) -> Row:
        ids = tokenizer([prompt, answer])["input_ids"]
        return Row(str(i), tuple(ids[0]), (*ids[1], tokenizer.eos_token_id))

    train = [encode(i, r["prompt"], r["completion"]) for i, r in enumerate(base)]
    chosen = corpus["forget"][:CANDIDATES]
    candidates = [encode(i, r["prompt"], r["completion"]) for i, r in enumerate(chosen)]
    queries = [encode(i, r["prompt"], r["rejected"]) for i, r in enumerate(corpus["pa"][:QUERIES])]
    return tokenizer, train, candidates, queries


def train_model(vocab: int, rows: list[Row]) -> tuple[GPT2LMHeadModel, float]:
    """The model and the mean loss per answer token of its last 20 steps."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_positions=64, n_embd=256, n_layer=4, n_head=4, use_cache=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    losses = []
    for _ in range(STEPS):
        batch = collate([rows[i] for i in torch.randint(len(rows), (BATCH,)).tolist()])
        loss = -answer_logps(model, batch).logp.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), statistics.fmean(losses[-20:])


@dataclass
class Taps:
    """Inputs and output gradients of the linears on all rows' tokens, packed."""

    offsets: Tensor
    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def formed(self) -> Iterator[Tensor]:
        """Module by module, the gradients `[rows, d_out * d_in]`."""
        bounds = self.offsets.tolist()
        for x, g in zip(self.x, self.g, strict=True):
            parts = [g[s:e].T @ x[s:e] for s, e in pairwise(bounds)]
            yield torch.stack(parts).flatten(1)


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, Conv1D) and re.search(r"\bh\.\d", n)}


def capture(model: GPT2LMHeadModel, rows: list[Row]) -> Taps:
    """One padded batch by plain hooks; the padding is dropped."""
    batch = collate(rows)
    real = torch.arange(batch.ids.shape[1]) < batch.length[:, None]
    taps = Taps(F.pad(batch.length.cumsum(0), (1, 0)))
    outputs = []

    def hook(module, inputs, output):
        taps.x.append(inputs[0].detach()[real])
        outputs.append(output)

    hooks = [m.register_forward_hook(hook) for m in linears(model).values()]
    logits = model(input_ids=batch.ids).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    grads = torch.autograd.grad(-(logp * batch.answer[:, 1:]).sum(), outputs)
    taps.g += [g[real] for g in grads]
    for h in hooks:
        h.remove()
    return taps


def exact_scores(model: GPT2LMHeadModel, candidates: list[Row], queries: list[Row]) -> Tensor:
    """<grad of a candidate, summed gradient of the queries> by the forward-mode scan, `[n]`, for
    the linears alone; the model's other parameters stay frozen."""
    model.requires_grad_(False)
    for linear in linears(model).values():
        linear.weight.requires_grad_()
    v = gradient(model, row_batches(queries, 8192), nll)
    v = {name: t * len(queries) for name, t in v.items()}
    return jvp_scores(model, row_batches(candidates, 8192), nll, v).double()
