"""Model, made-up data and the two sides' problem for `bench_outer_step.py`."""

import dataclasses
import random

import torch
from _authors import Authors
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from u2a.adapter import sequence_logps
from u2a.batch import Pair, Row, row_batches
from u2a.inner import InnerProblem
from u2a.losses import LOSSES
from u2a.objectives import PairSet, Preference
from u2a.outer import Outer, SolveSettings
from u2a.products import answer_logps
from u2a.tree import trainable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES = 16
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


class Language:
    """Tokens fall in classes; the next token's class follows from this one's, by `seed`."""

    def __init__(self, vocab, seed):
        self.vocab, draw = vocab, random.Random(seed)
        self.after = draw.sample(range(CLASSES), CLASSES)

    def say(self, draw, length, start=0):
        out, kind = [], start
        for _ in range(length):
            kind = self.after[kind]
            out.append(draw.randrange(self.vocab // CLASSES) * CLASSES + kind)
        return tuple(out)


def make_rows(vocab, count, language, seed):
    draw = random.Random(seed)
    return [
        Row(
            f"{seed}-{i}",
            tuple(draw.randrange(vocab) for _ in range(draw.randint(16, 48))),
            language.say(draw, draw.randint(64, 128)),
        )
        for i in range(count)
    ]


def make_model(a, rows):
    torch.manual_seed(0)
    heads = max(a.hidden // 64, 2)
    if a.family == "llama":
        config = LlamaConfig(
            vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.hidden * 8 // 3,
            num_hidden_layers=a.layers, num_attention_heads=heads,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=a.vocab, n_embd=a.hidden, n_layer=a.layers, n_head=heads, n_positions=256,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    model = model.to(DEVICE)
    train(model, rows, a.train_steps, 3e-3)
    if not a.full:
        conv = a.family == "gpt2"
        model = get_peft_model(
            model, LoraConfig(r=8, target_modules=TARGETS[a.family], fan_in_fan_out=conv)
        )
    return model.to(DEVICE)


def train(model, rows, steps, lr):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr)
    draw = random.Random(0)
    for _ in range(steps):
        batch = row_batches(draw.sample(rows, 16), 1 << 20)[0]
        optimizer.zero_grad()
        (-answer_logps(model, batch).logp.mean()).backward()
        optimizer.step()


class Setting:
    """Model, data and the problem as both sides see it."""

    def __init__(self, a):
        self.a = a
        wanted, unwanted = Language(a.vocab, 1), Language(a.vocab, 2)
        base = make_rows(a.vocab, 256, wanted, 10) + make_rows(a.vocab, 256, unwanted, 11)
        bad = a.candidates * 3 // 4
        self.forget = make_rows(a.vocab, bad, unwanted, 12)
        self.forget += make_rows(a.vocab, a.candidates - bad, wanted, 13)
        self.forget.sort(key=len)
        good = make_rows(a.vocab, a.pairs, wanted, 14)
        self.pairs = [
            Pair(r.uid, r, dataclasses.replace(r, answer_ids=w.answer_ids))
            for r, w in zip(good, make_rows(a.vocab, a.pairs, unwanted, 15), strict=True)
        ]
        self.model = make_model(a, base)
        self.retain = make_rows(a.vocab, a.retain, wanted, 16)
        self.authors = Authors(self.model)
        self.build()
        train(self.model, base, 3, 1e-3)  # the adapter is not at zero, nor the policy its reference
        self.model.eval()

    def build(self):
        a, model = self.a, self.model
        problem = InnerProblem.build(
            model, self.forget, torch.zeros(len(self.forget)), LOSSES["ga"], retain=self.retain,
            retain_weight=1.0, batch_tokens=a.batch_tokens,
        )  # fmt: skip
        self.outer = Outer(
            model, problem, self.objective(), None, SolveSettings(), lambda p: {}
        )  # fmt: skip

    def held(self):
        if not self.a.full:
            return PairSet.build(self.model, self.pairs, self.a.batch_tokens)
        frozen = self.authors.frozen
        both = ([p.chosen for p in self.pairs], [p.rejected for p in self.pairs])
        return PairSet(
            self.pairs, *(sequence_logps(frozen, rows, self.a.batch_tokens) for rows in both)
        )

    def objective(self):
        return Preference(self.held(), 0.3, self.a.batch_tokens)
