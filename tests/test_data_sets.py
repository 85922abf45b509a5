"""The sets of a run: splits by content, overlap by policy, duplicates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_data import TOK, config

from u2a.data import Prepared, prepare
from u2a.errors import DataError


def sets(jsonl, **changes: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, list[Any]] = {
        "forget": [{"prompt": f"f{i}", "completion": "bad", "label": False} for i in range(4)],
        "pa": [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(20)],
        "retain": [{"prompt": f"r{i}", "completion": "fine"} for i in range(3)],
        "retain_test": [{"prompt": "h", "completion": "fine"}],
    } | changes
    return {k: {"path": str(jsonl(v, f"{k}.jsonl"))} for k, v in rows.items()}


def uids(prepared: Prepared, name: str) -> list[str]:
    return [item.uid for item in getattr(prepared, name)]


def test_prepare_splits_pa_by_content_whatever_the_order(jsonl):
    double = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(20)]
    double += [{"prompt": f"q{i}", "chosen": "yes", "rejected": "nay"} for i in range(9)]
    one = prepare(config(**sets(jsonl, pa=double)), TOK)
    two = prepare(config(**sets(jsonl, pa=double[::-1])), TOK)
    prompts = [{p.chosen.prompt_ids for p in part} for part in (one.pa, one.validation, one.test)]
    assert [len(p) for p in prompts] == [12, 4, 4] and len(set.union(*prompts)) == 20
    for name in ("pa", "validation", "test"):
        assert set(uids(one, name)) == set(uids(two, name))
    assert sum(one.stats[n]["rows"] for n in ("pa", "validation", "test")) == 29
    assert one.stats["test"]["schema"] == "preference"
    assert one.stats["forget"]["answer_tokens"] == 4 * 4
    assert one.stats["pa"]["digest"] != two.stats["pa"]["digest"]


def test_prepare_takes_given_validation_and_test(jsonl):
    given = [{"prompt": "t", "chosen": "yes", "rejected": "no"}]
    prepared = prepare(config(**sets(jsonl, test=given)), TOK)
    assert [len(getattr(prepared, n)) for n in ("pa", "validation", "test")] == [16, 4, 1]
    with pytest.raises(DataError, match="2 different prompts, wanted at least 3"):
        prepare(config(**sets(jsonl, pa=given + [{**given[0], "prompt": "u"}])), TOK)


LEAKS = [
    ("forget", "pa", {"prompt": "q0", "completion": "no", "label": False}),
    ("retain", "forget", {"prompt": "f1", "completion": "bad"}),
    ("pa", "test", {"prompt": "t", "chosen": "oui", "rejected": "no"}),
    ("forget", "test", {"prompt": "t", "completion": "yes", "label": False}),
]


@pytest.mark.parametrize(("inner", "outer", "row"), LEAKS)
def test_overlap_by_policy(jsonl, inner, outer, row):
    held = {
        n: [{"prompt": n[0], "chosen": "yes", "rejected": "no"}] for n in ("test", "validation")
    }
    clean = sets(jsonl, **held)
    rows = [json.loads(line) for line in open(clean[inner]["path"])]
    leaky = sets(jsonl, **held, **{inner: [*rows, row]})
    with pytest.raises(DataError, match=f"{inner} and {outer} share 1 rows: [0-9a-f]{{32}} ") as e:
        prepare(config(**leaky), TOK)
    assert f"{inner}.jsonl:{len(rows) + 1}, " in str(e.value) and f"{outer}.jsonl:" in str(e.value)
    dropped = prepare(config(**leaky, disjoint="drop"), TOK)
    assert len(getattr(dropped, inner)) == len(rows)
    assert [d.reason.split(" (")[0] for d in dropped.dropped] == [f"also in {outer}"]
    assert dropped.stats[inner]["dropped"] == 1
    with pytest.warns(UserWarning, match=f"{inner} and {outer} share 1 rows"):
        kept = prepare(config(**leaky, disjoint="warn"), TOK)
    assert len(getattr(kept, inner)) == len(rows) + 1


def test_duplicates_inside_a_set_are_counted_and_kept(jsonl):
    rows = [{"prompt": "r", "completion": "fine"}] * 3
    prepared = prepare(config(**sets(jsonl, retain=rows)), TOK)
    assert (prepared.stats["retain"]["rows"], prepared.stats["retain"]["duplicates"]) == (3, 2)


def test_retain_test_is_cut_from_retain_by_content(jsonl):
    rows = [{"prompt": f"r{i}", "completion": "fine"} for i in range(10)] * 2
    files = {k: v for k, v in sets(jsonl, retain=rows).items() if k != "retain_test"}
    prepared = prepare(config(**files), TOK)
    assert (len(prepared.retain), len(prepared.retain_test)) == (16, 4)
    assert not set(uids(prepared, "retain")) & set(uids(prepared, "retain_test"))
    with pytest.raises(DataError, match="1 different row, wanted at least 2"):
        prepare(config(**files | {"retain": {"path": str(jsonl(rows[:1], "one.jsonl"))}}), TOK)
