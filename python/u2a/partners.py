"""Which alternate answer belongs to which forget row."""

from __future__ import annotations

from collections.abc import Sequence

from u2a.batch import Row
from u2a.errors import DataError


def match_partners(path: str, forget: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """The alternate of every forget row: the first whose column `uid` is the row's, else the first
    to the same prompt. Raises DataError for rows without one, or with none that differs."""
    by_uid: dict[str, list[Row]] = {}
    by_prompt: dict[str, list[Row]] = {}
    for row in found:
        key = str(row.meta["uid"]) if "uid" in row.meta else row.meta["prompt_uid"]
        (by_uid if "uid" in row.meta else by_prompt).setdefault(key, []).append(row)
    out, faults = [], []
    for row in forget:
        options = by_uid.get(row.uid, []) + by_prompt.get(row.meta["prompt_uid"], [])
        other = [o for o in options if o.answer_ids != row.answer_ids]
        if other:
            out.append(other[0])
        else:
            faults.append(f"{row.source}: uid {row.uid} {'the same answer' if options else 'none'}")
    if faults:
        words = f"{path}: no alternate for {len(faults)} of {len(forget)} forget rows"
        raise DataError(words, faults[:10])
    return out
