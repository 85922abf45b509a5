"""What the tests of reading data share: a tokenizer of bytes, a configuration, rows in a file."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from u2a.config import Config, SourceConfig, make_config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]


def tokenizer(template: str | None = None, **special: str) -> Any:
    """Bytes as tokens; four control tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*CONTROL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = {"bos_token": "<bos>", "eos_token": "<eos>"} | special
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens=CONTROL[2:], **{k: v for k, v in names.items()}
    )
    tok.chat_template = template
    return tok


TOK = tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOK(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def config(**data: Any) -> Config:
    sets = {name: {"path": "none/none"} for name in ("forget", "pa", "retain")}
    return make_config({"model": {"name": "m"}, "data": sets | data})


def source(path: Any, **more: Any) -> SourceConfig:
    return SourceConfig(path=str(path), **more)
