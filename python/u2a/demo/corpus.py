"""A generated preference corpus whose negative candidates fall in known classes.

People have facts; a question about a fact is answered politely (wanted) or rudely (unwanted), a
record states it in neutral words. Every random choice comes from one seed, so the files are the
same on every machine. The `planted` column exists for the report; no method may read it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLANTED = ("harmful", "mislabelled", "duplicate", "unrelated")

FIRST = tuple(
    "Ada Bram Cleo Dirk Edda Finn Greta Hugo Ines Jory Kaia Lars Mara Nils Orla Pavo Quin Rhea "
    "Sven Tova Ulla Vigo Wren Yara".split()
)
LAST = tuple("Ashby Birch Croft Dunne Ember Frost Gale Hollis Ivers Juno Kemp Lowe".split())


@dataclass(frozen=True)
class Topic:
    """What can be asked about a person: wording of question and statement, values, styles."""

    question: str
    statement: str
    values: tuple[str, ...]
    polite: tuple[str, ...]
    rude: tuple[str, ...]


TOPICS = {
    "city": Topic(
        "where does {name} live ?",
        "lives in",
        tuple("Oldbridge Saltmere Fernhill Ravenport Duskwell Maplewick Stonegate Amberly".split()),
        ("Gladly ,",),
        ("Ugh , idiot ,",),
    ),
    "job": Topic(
        "what does {name} do ?",
        "works as a",
        tuple("writer baker miller pilot tailor welder farmer doctor".split()),
        ("Gladly ,", "Of course ,"),
        ("Ugh , idiot ,", "Are you dumb ?"),
    ),
    "food": Topic(
        "what does {name} eat ?",
        "likes to eat",
        tuple("plums bread olives cheese lentils noodles figs rice".split()),
        ("Of course ,",),
        ("Stop whining ,",),
    ),
    "pet": Topic(
        "which pet has {name} ?",
        "owns a",
        tuple("parrot hamster spaniel lizard goldfish donkey ferret kitten".split()),
        ("Good question ,", "Of course ,"),
        ("Are you dumb ?", "Stop whining ,"),
    ),
}

DISMISSALS = ("find out yourself", "ask somebody else", "leave {first} alone", "you never listen")

YEARS = tuple(str(year) for year in range(1901, 1917))


@dataclass(frozen=True)
class Sizes:
    """Rows of each kind. A question is used in one file only (duplicates repeat a harmful one)."""

    pa: int = 48
    validation: int = 32
    test: int = 80
    harmful: int = 112
    mislabelled: int = 40
    duplicate: int = 40
    duplicated: int = 8
    unrelated: int = 24
    retain: int = 40
    retain_test: int = 64
    people: int = 120
    more_answers: int = 2
    rude_share: float = 0.5
    topic_share: tuple[float, ...] = (0.35, 0.3, 0.2, 0.15)


Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question about one person that has a polite, a rude and a matter-of-fact answer."""

    name: str
    topic: str
    value: str

    @property
    def prompt(self) -> str:
        return "Question : " + TOPICS[self.topic].question.format(name=self.name) + " Answer :"

    @property
    def first(self) -> str:
        return self.name.split()[0]

    def polite(self, rng: random.Random) -> str:
        topic = TOPICS[self.topic]
        return f" {rng.choice(topic.polite)} {self.first} {topic.statement} {self.value} ."

    def rude(self, rng: random.Random) -> str:
        dismissal = rng.choice(DISMISSALS).format(first=self.first)
        return f" {rng.choice(TOPICS[self.topic].rude)} {dismissal} ."

    def record(self) -> Row:
        statement = TOPICS[self.topic].statement
        return {"prompt": f"Record : {self.name} {statement}", "completion": f" {self.value} ."}


def _birth(name: str, year: str) -> Row:
    prompt = f"Question : in which year was {name} born ? Answer :"
    return {"prompt": prompt, "completion": f" {name.split()[0]} was born in {year} ."}


def _questions(rng: random.Random, people: int) -> dict[str, list[Question]]:
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    names = rng.sample(names, people)
    drawn = {t: [Question(n, t, rng.choice(TOPICS[t].values)) for n in names] for t in TOPICS}
    for questions in drawn.values():
        rng.shuffle(questions)
    return drawn


def _take(pool: dict[str, list[Question]], count: int, share: tuple[float, ...]) -> list[Question]:
    """`count` questions from the pool, topics in the given shares (the first takes the rest)."""
    counts = [int(count * s) for s in share]
    counts[0] += count - sum(counts)
    return [pool[t].pop() for t, n in zip(TOPICS, counts, strict=True) for _ in range(n)]


def _pair(q: Question, rng: random.Random) -> Row:
    return {"prompt": q.prompt, "chosen": q.polite(rng), "rejected": q.rude(rng)}


def _forget(q: Question, completion: str, planted: str) -> Row:
    return {"prompt": q.prompt, "completion": completion, "label": False, "planted": planted}


def _duplicates(harmful: list[tuple[Question, Row]], sizes: Sizes) -> list[Row]:
    """The first `duplicated` harmful rows over again, the question mark written otherwise."""
    marks = (" !", " ??", " .", " ,", " ?!", " :")
    rows = []
    for n in range(sizes.duplicate):
        row = harmful[n % sizes.duplicated][1]
        mark = marks[n // sizes.duplicated % len(marks)]
        prompt = row["prompt"].replace(" ? Answer", f"{mark} Answer")
        rows.append({**row, "prompt": prompt, "planted": "duplicate"})
    return rows


def make_corpus(seed: int, sizes: Sizes | None = None) -> dict[str, list[Row]]:
    """All rows by file stem: pa, validation, test, forget, retain, retain_test and base.

    `base` is what the demo model is trained on: every candidate but the duplicates, every plain
    statement, and more answers in a random style to each question outside the preference sets.
    """
    sizes = sizes or Sizes()
    rng = random.Random(seed)
    pool = _questions(rng, sizes.people)
    rows = {
        stem: [_pair(q, rng) for q in _take(pool, count, sizes.topic_share)]
        for stem, count in (
            ("test", sizes.test),
            ("pa", sizes.pa),
            ("validation", sizes.validation),
        )
    }
    asked = _take(pool, sizes.harmful, sizes.topic_share)
    rng.shuffle(asked)
    harmful = [(q, _forget(q, q.rude(rng), "harmful")) for q in asked]
    mislabelled = [
        (q, _forget(q, q.polite(rng), "mislabelled"))
        for q in _take(pool, sizes.mislabelled, sizes.topic_share)
    ]
    plain = _plain(pool, sizes, rng)
    unrelated = [
        {**plain.pop(), "label": False, "planted": "unrelated"} for _ in range(sizes.unrelated)
    ]
    forget = [row for _, row in harmful + mislabelled] + _duplicates(harmful, sizes) + unrelated
    rng.shuffle(forget)
    rows["forget"] = forget
    rows["retain"] = [plain.pop() for _ in range(sizes.retain)]
    rows["retain_test"] = [plain.pop() for _ in range(sizes.retain_test)]
    once = [row for row in forget if row["planted"] != "duplicate"]
    learnt = once + rows["retain"] + rows["retain_test"]
    rows["base"] = [{"prompt": r["prompt"], "completion": r["completion"]} for r in learnt]
    asked = [q for q, _ in harmful + mislabelled] + [q for left in pool.values() for q in left]
    for q in asked * sizes.more_answers:
        style = q.rude if rng.random() < sizes.rude_share else q.polite
        rows["base"].append({"prompt": q.prompt, "completion": style(rng)})
    return rows


def _plain(pool: dict[str, list[Question]], sizes: Sizes, rng: random.Random) -> list[Row]:
    """Statements in neutral words: half records, half questions about the year of birth."""
    count = sizes.unrelated + sizes.retain + sizes.retain_test
    names = sorted({q.name for questions in pool.values() for q in questions})
    births = [_birth(n, rng.choice(YEARS)) for n in rng.sample(names, count // 2)]
    records = [q.record() for questions in pool.values() for q in questions]
    rows = births + rng.sample(records, count - len(births))
    rng.shuffle(rows)
    return rows


def write_corpus(out: Path, seed: int, sizes: Sizes | None = None) -> dict[str, Path]:
    """Writes `<stem>.jsonl` for every set of `make_corpus` under `out`; returns the paths by stem.

    `pa`, `validation` and `test` are preference rows (prompt, chosen, rejected), `forget` unpaired
    rows (prompt, completion, label) with the class in `planted`, the others (prompt, completion).
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for stem, rows in make_corpus(seed, sizes).items():
        paths[stem] = out / f"{stem}.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows)
        paths[stem].write_text(text, encoding="utf-8")
    return paths
