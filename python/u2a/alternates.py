"""Alternate answers for losses of pairs, and spliced negatives, as JSONL with its provenance.

Kinds: "altpo", the model's own other version of the answer (arXiv 2409.13474); "refusal", a line
that declines (IdkPO, FLAT); "random", the answer to another retain prompt (LLMU); "chosen", the
wanted response of the same record (DPO, ExMATE, NEAT); "sapo", wanted answers of the retain set
with a stretch rewritten by the model, as rejected ones (arXiv 2405.20830): a forget file.
A file made by the same model and settings is continued, any other refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2a.adapter import adapter_disabled
from u2a.data import _choose
from u2a.errors import ConfigError, DataError, MismatchError
from u2a.generate import Sampling
from u2a.progress import track
from u2a.rewrite import Draw, Item, Rewriter, chosen, random_of, refusal, text_of
from u2a.schemas import Text, content_uid, digest, read_examples

if TYPE_CHECKING:
    from u2a.config import Config

SAPO = Sampling(temperature=0.7, top_k=50, top_p=0.95, max_new_tokens=256)
DEFAULTS = dict.fromkeys(("altpo", "refusal", "random", "chosen"), Sampling()) | {"sapo": SAPO}
ATTEMPTS = 3


def defaults(kind: str, **changes: Any) -> Sampling:
    """The customary sampling of a kind, with changes (None: none). Raises ConfigError."""
    if kind not in DEFAULTS:
        fault = f"--alternates: {kind!r}, wanted one of {', '.join(DEFAULTS)}"
        raise ConfigError(fault, "command line")
    try:
        return replace(DEFAULTS[kind], **{k: v for k, v in changes.items() if v is not None})
    except ValueError as e:
        raise ConfigError(str(e), "command line") from None


def items(cfg: Config, role: str, uids: Iterable[str]) -> list[Item]:
    """The configured rows of a role with these uids, each once, in the file's order."""
    spec = cfg.data.forget if role == "forget" else cfg.data.retain
    left, out = set(uids), []
    for example in read_examples(spec)[1]:
        for k in _choose(example, role, spec) or ():
            uid = content_uid(example.prompt, example.responses[k])
            if uid in left:
                left.remove(uid)
                out.append(Item(uid, example.prompt, example.responses[k], example))
    return out


class Writer:
    """The lines of one file: those there already, and those to be appended.

    `provenance` must be the same for all of them; `info` is written beside it.
    """

    def __init__(
        self, path: Path, provenance: dict[str, Any], info: dict[str, Any] | None = None
    ) -> None:
        self.path, self.provenance, self.info = path, provenance, info or {}
        self.hash = digest(json.dumps(provenance, sort_keys=True))
        self.have: set[tuple[str, int]] = set()
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().split(b"\n")
        whole, torn = lines[:-1], lines[-1]
        for number, line in enumerate(whole, 1):
            try:
                row = json.loads(line)
                found = row["provenance"]
                self.have.add((row["uid"], row["sample"]))
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.path}:{number}: not a line of `u2a prep`") from None
            if found.get("hash") != self.hash:
                odd = [k for k, v in self.provenance.items() if found.get(k) != v]
                raise MismatchError(
                    f"{self.path}:{number}: made with another {', '.join(odd) or 'content'}; "
                    "wanted the same settings, or another --out"
                )
        if torn:
            os.truncate(self.path, len(b"\n".join(whole)) + bool(whole))

    def write(self, rows: Sequence[tuple[Item, int, dict[str, Any]]]) -> None:
        provenance = {**self.info, **self.provenance, "hash": self.hash}
        with self.path.open("ab") as f:
            for item, sample, columns in rows:
                row = {**columns, "uid": item.uid, "sample": sample, "provenance": provenance}
                f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                self.have.add((item.uid, sample))
            f.flush()
            os.fsync(f.fileno())


def alternates(
    pool: Sequence[Item], draw: Draw, writer: Writer, how: Sampling, *, splice: bool = False,
    label: str = "alternates",
) -> Path:  # fmt: skip
    """`how.samples` alternates of every item, appended to the writer's file group by group.

    `draw(items, seed)` gives one text per item or None; an alternate that is empty or the answer
    itself is drawn again, `ATTEMPTS` times in all. Raises DataError naming items that got none.
    """
    failed: list[str] = []
    size = how.batch
    groups = [pool[i : i + size] for i in range(0, len(pool), size)]
    jobs = [(k, n, g) for k in range(how.samples) for n, g in enumerate(groups)]
    total = len(pool) * how.samples
    for sample, number, group in track(jobs, total, label, "answers", size=lambda j: len(j[2])):
        left = [i for i in group if (i.uid, sample) not in writer.have]
        for attempt in range(ATTEMPTS):
            if not left:
                break
            seed = int(digest(*map(str, (how.seed, sample, number, attempt)))[:15], 16)
            texts = draw(left, seed)
            good = [(i, t) for i, t in zip(left, texts, strict=True) if _differs(i, t)]
            writer.write([(i, sample, _columns(i, t, splice)) for i, t in good])
            left = [i for i in left if (i.uid, sample) not in writer.have]
        failed += [f"{i.example.source}: uid {i.uid}" for i in left]
    if failed:
        raise DataError(f"{writer.path}: no alternate for {len(failed)} answers", failed[:10])
    return writer.path


def _differs(item: Item, text: Text | None) -> bool:
    found = "" if text is None else text_of(text).strip()
    return bool(found) and found != text_of(item.answer).strip()


def _columns(item: Item, text: Text | None, splice: bool) -> dict[str, Any]:
    if splice:
        return {"prompt": item.prompt, "chosen": item.answer, "rejected": text}
    return {"prompt": item.prompt, "completion": text}


def prepare_alternates(cfg: Config, kind: str, out: Path, how: Sampling | None = None) -> Path:
    """`u2a prep --alternates KIND`, see the module. Raises DataError and MismatchError."""
    from u2a.workspace import Workspace, model_digest

    how = how or defaults(kind)
    work = Workspace(cfg, out.parent)
    data = work.data
    retain = items(cfg, "retain", (r.uid for r in data.retain))
    pool = retain if kind == "sapo" else items(cfg, "forget", (r.uid for r in data.forget))
    facts: dict[str, Any] = {"kind": kind, "sampling": asdict(how)}
    info, off = {}, nullcontext()
    draws: dict[str, Draw] = {"refusal": refusal, "chosen": chosen, "random": random_of(retain)}
    if kind in ("altpo", "sapo"):
        info["model"] = cfg.model.name
        facts["model_hash"] = model_digest(cfg.model.name, cfg.model.revision)
        facts["dtype"] = cfg.model.dtype
        off = adapter_disabled(work.model)  # type: ignore[assignment]
        rewriter = Rewriter(work.model, work.tokenizer, cfg, how)
        draws |= {"altpo": rewriter.altpo, "sapo": rewriter.sapo}
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = Writer(out, facts, info)
    with off:
        return alternates(pool, draws[kind], writer, how, splice=kind == "sapo", label=kind)
