"""Configured data sets -> tokenised rows and pairs, disjoint by content.

Negatives of the forget set are rejected answers, rows labelled false and unsafe responses; a file
without judgement counts as negatives in the forget role and as wanted text in the retain role.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from u2a.batch import Pair, Row
from u2a.encode import Encoder
from u2a.errors import DataError
from u2a.partners import match_partners
from u2a.schemas import Example, content_uid, digest, prompt_uid, read_examples

if TYPE_CHECKING:
    from u2a.config import Config, SourceConfig

Item = Row | Pair
DROP_WARNING = 0.05


@dataclass(frozen=True)
class Dropped:
    """A row left out: which set, its content hash, where it came from and why."""

    set: str
    uid: str
    source: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """All sets. `stats[set]` counts rows, tokens, duplicates, drops and holds a content digest.

    `partners`: one row per forget row where alternates are configured, else none.
    """

    forget: list[Row]
    pa: list[Pair]
    validation: list[Pair]
    retain: list[Row]
    retain_test: list[Row]
    test: list[Pair]
    partners: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_rows(
    spec: SourceConfig,
    tokenizer: Any,
    cfg: Config,
    *,
    role: str = "forget",
    dropped: list[Dropped] | None = None,
) -> list[Row]:
    """The rows of one file. `role` "forget" takes the unwanted responses, "retain" the wanted.

    Rows without an answer token to learn from are appended to `dropped`. Raises DataError.
    """
    if role not in ("forget", "retain"):
        raise ValueError(f"load_rows: role must be 'forget' or 'retain', got {role!r}")
    return _load(spec, tokenizer, cfg, role, dropped)[1]  # type: ignore[return-value]


def load_pairs(
    spec: SourceConfig,
    tokenizer: Any,
    cfg: Config,
    *,
    role: str = "pa",
    dropped: list[Dropped] | None = None,
) -> list[Pair]:
    """The preference pairs of one file; `role` is only a name. Raises DataError."""
    if role in ("forget", "retain"):
        raise ValueError(f"load_pairs: role {role!r} holds rows, not pairs")
    return _load(spec, tokenizer, cfg, role, dropped)[1]  # type: ignore[return-value]


def prepare(cfg: Config, tokenizer: Any) -> Prepared:
    """Loads every configured set, splits pa where no file is given, makes the sets disjoint.

    Raises DataError naming file and line, or the shared rows when the sets overlap.
    """
    dropped: list[Dropped] = []
    sets: dict[str, list[Any]] = {}
    schemas: dict[str, str] = {}
    for name in ("forget", "pa", "retain", "retain_test", "validation", "test"):
        spec = getattr(cfg.data, name)
        if spec is not None:
            role = "retain" if name == "retain_test" else name
            schemas[name], sets[name] = _load(spec, tokenizer, cfg, role, dropped)
    _hold_out(sets, cfg)
    _hold_out_retain(sets, cfg)
    sets = _disjoint(sets, cfg.data.disjoint, dropped)
    stats = {}
    for name in sorted(sets):
        origin = "retain" if name == "retain_test" else "pa"
        spec = getattr(cfg.data, name) or getattr(cfg.data, origin)
        lost = sum(d.set == name for d in dropped)
        stats[name] = {"path": spec.path, "schema": schemas.get(name, schemas[origin])}
        stats[name] |= _count(sets[name]) | {"dropped": lost}
    partners: list[Row] = []
    if cfg.data.alternates is not None:
        found = load_rows(cfg.data.alternates, tokenizer, cfg, role="retain", dropped=dropped)
        partners = match_partners(cfg.data.alternates.path, sets["forget"], found)
        stats["alternates"] = {"path": cfg.data.alternates.path} | _count(partners)
    return Prepared(**sets, partners=partners, dropped=dropped, stats=stats)


def _load(
    spec: SourceConfig, tokenizer: Any, cfg: Config, role: str, dropped: list[Dropped] | None
) -> tuple[str, list[Item]]:
    schema, examples = read_examples(spec)
    encoder = Encoder(tokenizer, cfg.data.max_tokens, cfg.data.template)
    lost: list[Dropped] = []
    items: list[Item] = []
    wanted = [(e, keep) for e in examples if (keep := _choose(e, role, spec)) is not None]
    if not wanted:
        raise DataError(f"{spec.path}: none of {len(examples)} {schema} rows {_need(role, spec)}")
    faults: list[str] = []
    for example, keep in wanted:
        if _fraction(example, cfg.run.seed) >= spec.fraction:
            continue
        try:
            items.extend(_encode(example, keep, role, encoder, lost))
        except ValueError as e:
            faults.append(f"{example.source}: {e}")
        if len(faults) == 10 or (spec.limit and len(items) >= spec.limit):
            break
    if faults:
        raise DataError(f"{spec.path}: {len(faults)} bad rows", faults)
    items = items[: spec.limit]
    _report_lost(spec.path, role, len(items), lost)
    if dropped is not None:
        dropped.extend(lost)
    return schema, items


def _choose(example: Example, role: str, spec: SourceConfig) -> tuple[int, ...] | None:
    """Which responses the role takes: row numbers, or (chosen, rejected); None for no use."""
    if spec.pairs == "one-safe" and len(example.good) == 2 and example.good.count(True) != 1:
        return None
    if role in ("forget", "retain"):
        keep = tuple(k for k, g in enumerate(example.good) if g is None or g == (role == "retain"))
        return keep or None
    return None if example.chosen is None else (example.chosen, 1 - example.chosen)


def _need(role: str, spec: SourceConfig) -> str:
    if role == "forget":
        return "holds an unwanted response (rejected, label false or unsafe)"
    if role == "retain":
        return "holds a wanted response (chosen, label true or safe)"
    return f"names a preferred response (chosen and rejected, or {spec.prefer}_response_id)"


def _fraction(example: Example, seed: int) -> float:
    """Uniform in [0, 1) by prompt, so that all rows of a prompt stay or go together."""
    return int(digest(str(seed), "fraction", prompt_uid(example.prompt))[:13], 16) / 16**13


def _encode(
    example: Example, keep: tuple[int, ...], role: str, encoder: Encoder, lost: list[Dropped]
) -> Iterator[Item]:
    texts = tuple(example.responses[k] for k in keep)
    prompt, answers = encoder.encode(example.prompt, texts)
    groups = [[0], [1]][: len(keep)] if role in ("forget", "retain") else [[0, 1]]
    uids = [content_uid(example.prompt, t) for t in texts]
    empty = [not (t if isinstance(t, str) else t[0]["content"]).strip() for t in texts]
    for group in groups:
        uid = uids[group[0]] if len(group) == 1 else digest(*uids)
        ids, cut, how = encoder.fit(prompt, [answers[k] for k in group])
        reason = ""
        if any(empty[k] for k in group):
            reason = "empty answer"
        elif any(len(a) < 1 + (not ids) for a in cut):
            reason = "no answer token left"
        elif len(group) == 2 and uids[0] == uids[1]:
            reason = "chosen equals rejected"
        if reason:
            lost.append(Dropped(role, uid, example.source, reason))
            continue
        meta = {**example.meta, "prompt_uid": prompt_uid(example.prompt)}
        if how:
            meta["truncated"] = how
        rows = [Row(uids[k], ids, a, example.source, meta) for k, a in zip(group, cut, strict=True)]
        yield rows[0] if len(rows) == 1 else Pair(uid, *rows)


def _report_lost(path: str, role: str, kept: int, lost: Sequence[Dropped]) -> None:
    if not lost and kept:
        return
    reasons = sorted({d.reason for d in lost})
    if not kept:
        where = [f"{d.source}: {d.reason}" for d in lost[:5]]
        raise DataError(f"{path}: no row left for {role}, {len(lost)} dropped", where)
    if len(lost) > DROP_WARNING * (kept + len(lost)):
        share = f"{len(lost)} of {kept + len(lost)} rows dropped"
        warnings.warn(f"{path}: {share} for {role} ({', '.join(reasons)})", stacklevel=2)


def _hold_out(sets: dict[str, list[Any]], cfg: Config) -> None:
    """Cuts the missing ones of test and validation out of pa, whole prompts at a time, by hash."""
    missing = [name for name in ("test", "validation") if name not in sets]
    pairs: list[Pair] = sets["pa"]
    prompts = {p.chosen.meta["prompt_uid"] for p in pairs}
    order = sorted(prompts, key=lambda uid: digest(str(cfg.run.seed), "holdout", uid))
    if missing and len(order) <= len(missing):
        raise DataError(
            f"{cfg.data.pa.path}: {len(order)} different prompts, wanted at least "
            f"{len(missing) + 1} to cut {' and '.join(missing)} from (or give files for them)"
        )
    size = max(round(cfg.data.holdout * len(order)), 1)
    for i, name in enumerate(missing):
        part = set(order[i * size : (i + 1) * size])
        sets[name] = [p for p in pairs if p.chosen.meta["prompt_uid"] in part]
    rest = set(order[len(missing) * size :])
    sets["pa"] = [p for p in pairs if p.chosen.meta["prompt_uid"] in rest]


def _hold_out_retain(sets: dict[str, list[Any]], cfg: Config) -> None:
    """Cuts retain_test out of retain by content hash where no file is given for it."""
    if "retain_test" in sets:
        return
    rows: list[Row] = sets["retain"]
    order = sorted({r.uid for r in rows}, key=lambda uid: digest(str(cfg.run.seed), "retain", uid))
    if len(order) < 2:
        raise DataError(
            f"{cfg.data.retain.path}: 1 different row, wanted at least 2 to cut retain_test from "
            "(or give a file for it)"
        )
    part = set(order[: max(round(cfg.data.holdout * len(order)), 1)])
    sets["retain_test"] = [r for r in rows if r.uid in part]
    sets["retain"] = [r for r in rows if r.uid not in part]


def _rows(item: Item) -> tuple[Row, ...]:
    return (item,) if isinstance(item, Row) else (item.chosen, item.rejected)


def _disjoint(
    sets: dict[str, list[Any]], policy: str, dropped: list[Dropped]
) -> dict[str, list[Any]]:
    """Each content belongs to the first set in the order below that holds it."""
    owner: dict[str, tuple[str, str]] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    out: dict[str, list[Any]] = {}
    for name in ("test", "validation", "pa", "retain_test", "forget", "retain"):
        out[name] = []
        for item in sets[name]:
            taken = [(r, *owner[r.uid]) for r in _rows(item) if r.uid in owner]
            taken = [t for t in taken if t[1] != name]
            for row, other, source in taken:
                shared.setdefault((name, other), []).append(f"{row.uid} ({row.source}, {source})")
            if taken and policy == "drop":
                reason = f"also in {taken[0][1]} ({taken[0][2]})"
                dropped.append(Dropped(name, item.uid, taken[0][0].source, reason))
                continue
            out[name].append(item)
            for row in _rows(item):
                owner.setdefault(row.uid, (name, row.source))
    lines = [f"{a} and {b} share {len(u)} rows: {', '.join(u[:5])}" for (a, b), u in shared.items()]
    if lines and policy == "error":
        raise DataError("data sets overlap (see `data.disjoint`: error, drop or warn)", lines)
    if lines and policy == "warn":
        warnings.warn("data sets overlap: " + "; ".join(lines), stacklevel=3)
    for name, items in out.items():
        if not items:
            raise DataError(f"{name}: no row left, all are in another set", lines)
    return out


def _count(items: list[Any]) -> dict[str, Any]:
    rows = [r for item in items for r in _rows(item)]
    uids = [item.uid for item in items]
    return {
        "rows": len(items),
        "tokens": sum(len(r) for r in rows),
        "answer_tokens": sum(len(r.answer_ids) for r in rows),
        "duplicates": len(uids) - len(set(uids)),
        "truncated": sum("truncated" in r.meta for r in rows),
        "digest": digest(*uids),
    }
