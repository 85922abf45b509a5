"""Which columns mean what: public data set schemas -> Example, detected by column set.

First match wins; `columns:` in the configuration renames a file's columns to ours beforehand.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

from u2a.errors import DataError
from u2a.readers import RowFaults, read_rows

if TYPE_CHECKING:
    from u2a.config import SourceConfig

Message = dict[str, str]
Text = str | list[Message]


@dataclass(frozen=True)
class Example:
    """One prompt with one or two responses.

    `good[k]` says whether response k is wanted (None: the file does not say); `chosen` is the
    preferred response's number or None. A conversational prompt is a list of messages, and so is
    each of its responses (one assistant message).
    """

    prompt: Text
    responses: tuple[Text, ...]
    good: tuple[bool | None, ...]
    chosen: int | None = None
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


def digest(*parts: str) -> str:
    """32 hex digits of blake2b over length-prefixed parts."""
    h = blake2b(digest_size=16)
    for part in parts:
        data = part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def _canonical(text: Text, role: str) -> str:
    messages = [{"role": role, "content": text}] if isinstance(text, str) else text
    pairs = [[m["role"], unicodedata.normalize("NFC", m["content"]).strip()] for m in messages]
    return json.dumps(pairs, ensure_ascii=False)


def prompt_uid(prompt: Text) -> str:
    return digest(_canonical(prompt, "user"))


def content_uid(prompt: Text, response: Text) -> str:
    """Same for a plain row and its one-turn conversational twin; blank margins do not count."""
    return digest(_canonical(prompt, "user"), _canonical(response, "assistant"))


def _show(value: Any) -> str:
    text = type(value).__name__
    return text if isinstance(value, str | list | dict) else f"{value!r} ({text})"


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {_show(value)}, wanted a string or a list of messages")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"{name}: lone surrogate at character {e.start}, wanted text") from None
    return value


def _text(row: dict[str, Any], name: str) -> Text:
    value = _get(row, name)
    if not isinstance(value, list):
        return _string(value, name)
    if not value:
        raise ValueError(f"{name}: empty list, wanted at least one message")
    out = []
    for i, m in enumerate(value):
        if not isinstance(m, dict) or m.get("tool_calls"):
            raise ValueError(f"{name}[{i}]: {_show(m)}, wanted {{role, content}} without tools")
        out.append({k: _string(m.get(k), f"{name}[{i}].{k}") for k in ("role", "content")})
    return out


def _get(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"column {name!r} missing, the row has {', '.join(map(repr, row))}")
    return row[name]


def _flag(row: dict[str, Any], name: str) -> bool:
    value = _get(row, name)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"{name}: {value!r:.40} ({type(value).__name__}), wanted true or false")
    return bool(value)


def _answer(value: Text, name: str, prompt: Text) -> Text:
    if isinstance(value, str) != isinstance(prompt, str):
        raise ValueError(f"{name}: {_show(value)} beside a {_show(prompt)} prompt, wanted the same")
    if isinstance(value, list) and [m["role"] for m in value] != ["assistant"]:
        raise ValueError(f"{name}: {len(value)} messages, wanted one of the assistant")
    return value


def _preference(row: dict[str, Any], spec: SourceConfig) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    implicit = isinstance(chosen, list) and (len(chosen) > 1 or "prompt" not in row)
    if implicit and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise ValueError("chosen and rejected must share every message before the last")
        prompt: Text = list(chosen[:-1])  # type: ignore[arg-type]
        chosen, rejected = chosen[-1:], rejected[-1:]
    elif "prompt" not in row:
        raise ValueError("chosen and rejected without prompt must be lists of messages")
    else:
        prompt = _text(row, "prompt")
    answers = (_answer(chosen, "chosen", prompt), _answer(rejected, "rejected", prompt))
    return Example(prompt, answers, (True, False), 0)


def _unpaired(row: dict[str, Any], spec: SourceConfig) -> Example:
    prompt = _text(row, "prompt")
    answer = _answer(_text(row, "completion"), "completion", prompt)
    return Example(prompt, (answer,), (_flag(row, "label"),))


def _completion(row: dict[str, Any], spec: SourceConfig) -> Example:
    prompt = _text(row, "prompt")
    return Example(prompt, (_answer(_text(row, "completion"), "completion", prompt),), (None,))


def _saferlhf(row: dict[str, Any], spec: SourceConfig) -> Example:
    prompt = _text(row, "prompt")
    answers = tuple(_answer(_text(row, f"response_{k}"), f"response_{k}", prompt) for k in (0, 1))
    good = tuple(_flag(row, f"is_response_{k}_safe") for k in (0, 1))
    column = f"{spec.prefer}_response_id"
    return Example(prompt, answers, good, int(_flag(row, column)) if column in row else None)


@dataclass(frozen=True)
class Schema:
    name: str
    columns: frozenset[str]
    convert: Callable[[dict[str, Any], Any], Example]
    rename: tuple[tuple[str, str], ...] = ()
    used: frozenset[str] = frozenset()


_SAFE = ["prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"]
SCHEMAS = (
    Schema(
        "saferlhf",
        frozenset(_SAFE),
        _saferlhf,
        used=frozenset(["better_response_id", "safer_response_id"]),
    ),
    Schema("preference", frozenset(["prompt", "chosen", "rejected"]), _preference),
    Schema("preference-implicit", frozenset(["chosen", "rejected"]), _preference),
    Schema("unpaired", frozenset(["prompt", "completion", "label"]), _unpaired),
    Schema(
        "safe-response",
        frozenset(["prompt", "response", "is_safe"]),
        _unpaired,
        (("response", "completion"), ("is_safe", "label")),
    ),
    Schema("prompt-completion", frozenset(["prompt", "completion"]), _completion),
    Schema(
        "question-answer",
        frozenset(["question", "answer"]),
        _completion,
        (("question", "prompt"), ("answer", "completion")),
    ),
)


def _detect(path: str, columns: set[str]) -> Schema:
    for schema in SCHEMAS:
        if schema.columns <= columns:
            return schema
    known = [f"{s.name}: {', '.join(sorted(s.columns))}" for s in SCHEMAS]
    raise DataError(
        f"{path}: columns {', '.join(sorted(columns))} fit no schema; name them with `columns:` "
        "(ours: the file's), wanted one of",
        known,
    )


def read_examples(spec: SourceConfig) -> tuple[str, list[Example]]:
    """(schema name, examples) of a whole file. Raises DataError with up to ten row errors."""
    faults = RowFaults(spec.path)
    theirs = set(spec.columns.values())
    rows = []
    for source, row in read_rows(spec, faults):
        absent = sorted(theirs - row.keys())
        if absent:
            faults.add(source, f"column {absent[0]!r} of `columns:` missing, has {sorted(row)}")
            continue
        other = {k: v for k, v in row.items() if k not in theirs}
        rows.append((source, other | {ours: row[name] for ours, name in spec.columns.items()}))
    if not rows:
        faults.check()
        raise DataError(f"0 rows in {spec.path}")
    schema = _detect(spec.path, {k for _, row in islice(rows, 100) for k in row})
    rename = dict(schema.rename)
    examples = []
    for source, row in rows:
        try:
            example = schema.convert({rename.get(k, k): v for k, v in row.items()}, spec)
        except ValueError as e:
            faults.add(source, f"{e} (schema {schema.name})")
            continue
        meta = {k: v for k, v in row.items() if k not in schema.columns | schema.used}
        examples.append(
            Example(example.prompt, example.responses, example.good, example.chosen, source, meta)
        )
    faults.check()
    return schema.name, examples
