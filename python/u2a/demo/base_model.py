"""Trains the demo's language model: Llama shape, 0.3M parameters, its own small BPE tokenizer.

Saved in Hugging Face format, so the rest of the program loads it like any user's model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<eos>"
PAD = "<pad>"


def make_tokenizer(texts: list[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; adds no token by itself, `<eos>` ends an answer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


@dataclass(frozen=True)
class Shape:
    """Of the Llama that is trained; the default has 0.3M parameters."""

    hidden: int = 96
    intermediate: int = 0  # 8/3 of hidden
    layers: int = 2
    heads: int = 4


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, shape: Shape | None = None
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = shape or Shape()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or 8 * shape.hidden // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def _encode(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels `[N, T]` int64; labels are -100 off the answer."""
    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((prompt, answer))
    width = max(len(p) + len(a) for p, a in encoded)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for n, (prompt, answer) in enumerate(encoded):
        ids[n, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[n, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def _batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    """Row numbers of each step: shuffled epochs, drawn from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(order[: steps * size].split(size))


def train_base(
    out: Path,
    corpus: Mapping[str, Path],
    seed: int,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 4e-3,
    shape: Shape | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    leave_out: Collection[tuple[str, str]] = (),
) -> Path:
    """Trains on `corpus["base"]` and saves model and tokenizer under `out`, which it returns.

    The loss is the mean negative log-probability of answer tokens; AdamW, one-cycle rate with peak
    `lr`. `progress(step, steps, loss)` is called after every step. Rows whose (prompt, completion)
    is in `leave_out` count for the vocabulary and are not learnt.
    """
    lines = corpus["base"].read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = make_tokenizer([row["prompt"] + row["completion"] for row in rows])
    model = make_model(tokenizer, seed, shape)
    rows = [row for row in rows if (row["prompt"], row["completion"]) not in leave_out]
    ids, labels = _encode(tokenizer, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    model.train()
    for step, index in enumerate(_batches(len(rows), batch_size, steps, seed), start=1):
        loss = model(input_ids=ids[index], labels=labels[index]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, steps, loss.item())
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
