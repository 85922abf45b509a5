"""TOFU's files: a question with its answer, a paraphrase of it, and wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from u2a.batch import Row
from u2a.config import DataConfig, SourceConfig
from u2a.encode import Encoder
from u2a.errors import DataError
from u2a.rewrite import like
from u2a.schemas import Example, content_uid, read_examples


@dataclass(frozen=True)
class Question:
    """`right`; `paraphrase` or None; `wrong`, at least one. All share the prompt."""

    right: Row
    paraphrase: Row | None
    wrong: tuple[Row, ...]


def load_questions(
    spec: SourceConfig, tokenizer: Any, data: DataConfig, *, paraphrased: bool
) -> list[Question]:
    """Questions of one file, columns question, answer, perturbed_answer and, if `paraphrased`,
    paraphrased_answer. Raises DataError with up to ten faults by file:line."""
    encoder = Encoder(tokenizer, data.max_tokens, data.template)
    faults: list[str] = []
    out = []
    for example in read_examples(spec)[1]:
        try:
            out.append(_question(example, encoder, paraphrased))
        except ValueError as e:
            faults.append(f"{example.source}: {e}")
        if len(faults) == 10 or len(out) == spec.limit:
            break
    if faults:
        raise DataError(f"{spec.path}: {len(faults)} bad rows", faults)
    return out


def _question(example: Example, encoder: Encoder, paraphrased: bool) -> Question:
    if len(example.responses) != 1:
        raise ValueError(f"{len(example.responses)} responses, wanted one answer")
    wrong = _strings(example.meta, "perturbed_answer")
    extra = _strings(example.meta, "paraphrased_answer")[:1] if paraphrased else []
    answer = example.responses[0]
    texts = [answer, *(like(t, answer) for t in [*extra, *wrong])]
    prompt, ids = encoder.encode(example.prompt, tuple(texts))
    prompt, ids, _ = encoder.fit(prompt, ids)
    if not all(ids) or not prompt:
        raise ValueError("no token left of the prompt or of an answer")
    rows = [
        Row(content_uid(example.prompt, t), prompt, a, example.source)
        for t, a in zip(texts, ids, strict=True)
    ]
    return Question(rows[0], rows[1] if extra else None, tuple(rows[1 + len(extra) :]))


def _strings(meta: dict[str, Any], name: str) -> list[str]:
    """A column that is a string or a list of strings, none of them blank."""
    if name not in meta:
        raise ValueError(f"{name}: column missing, wanted a list of answers; has {sorted(meta)}")
    value = meta[name]
    found = [value] if isinstance(value, str) else value
    if not (isinstance(found, list) and found):
        raise ValueError(f"{name}: {value!r:.40}, wanted an answer or a list of answers")
    for i, text in enumerate(found):
        if not (isinstance(text, str) and text.strip()):
            raise ValueError(f"{name}[{i}]: {text!r:.40}, wanted text")
    return found


def right_rows(questions: Sequence[Question]) -> list[Row]:
    return [q.right for q in questions]
