"""All measurements of the validation benchmark, kept row by row, and its tables and pictures."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2a.benchmark.aligned import alignment, detection
from u2a.benchmark.predicted import predicted_against_realised
from u2a.benchmark.references import REFERENCES, reference
from u2a.benchmark.selectors import SELECTORS
from u2a.benchmark.tables import report
from u2a.benchmark.task import LOSSES, PRESETS, SCALE, Task

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Scope:
    """What is measured: weights of one candidate, set sizes, total weights (both in units of
    `task.SCALE`), budget, noise."""

    losses: tuple[str, ...] = tuple(LOSSES)
    weights: tuple[float, ...] = (0.002, 0.0075)
    singles: int = 24
    groups: tuple[tuple[int, int], ...] = ((8, 12), (32, 12))
    totals: tuple[float, ...] = (0.72, 1.44, 2.88)
    budget: int = 96
    noise: tuple[float, ...] = (0.0, 0.1, 0.2)
    noise_of_demo: float = 0.2
    noise_loss: str = "npo"
    selectors: tuple[str, ...] = tuple(SELECTORS)


QUICK = Scope(
    losses=("npo",), weights=(0.002, 0.0075), singles=8, groups=((8, 4),), totals=(0.72,),
    noise=(0.2,), selectors=("u2a greedy", "uniform", "random", "oracle class"),
)  # fmt: skip


def validate(out: Path, *, size: str = "small", seeds: int = 3, quick: bool = False) -> Path:
    """Measures what is not in `out` yet, then writes validation.md and its pictures; returns `out`.

    Rows are kept in predicted.jsonl, alignment.jsonl, detection.jsonl and upper.jsonl, a line each,
    so that an interrupted run continues. Raises ValueError for an unknown size.
    """
    if size not in PRESETS:
        raise ValueError(f"validate: size must be one of {', '.join(PRESETS)}; got {size!r}")
    scope = QUICK if quick else Scope()
    store = _Store(out)
    for seed in range(1 if quick else seeds):
        _predictions(store, scope, size, seed)
        _alignments(store, scope, size, seed)
    report(out, store.rows)
    print(f"validation: {out / 'validation.md'}", file=sys.stderr)
    return out


class _Store:
    """Rows by table, appended to JSON lines as they are measured, keyed by what was asked."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Rows] = {}
        for name in ("predicted", "alignment", "detection", "upper"):
            path = out / f"{name}.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            self.rows[name] = [json.loads(line) for line in lines]

    def measure(self, table: str, key: Sequence[Any], make: Callable[[], Rows]) -> None:
        key = list(key)
        if any(row["key"] == key for row in self.rows[table]):
            return
        began = time.monotonic()
        found = [row | {"key": key} for row in make()]
        with (self.out / f"{table}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        self.rows[table] += found
        words = " ".join(map(str, key))
        print(f"  {table}: {words} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


def _predictions(store: _Store, scope: Scope, size: str, seed: int) -> None:
    for loss in scope.losses:
        task = _Lazy(store.out, loss, seed, scope.noise_of_demo, size, exact=True)
        store.measure(
            "predicted", (size, seed, loss),
            lambda t=task: predicted_against_realised(  # type: ignore[misc]
                t.get(), [SCALE[t.loss] * w for w in scope.weights], scope.singles,
                dict(scope.groups),
            ),
        )  # fmt: skip


def _alignments(store: _Store, scope: Scope, size: str, seed: int) -> None:
    cells = [(loss, scope.noise_of_demo) for loss in scope.losses]
    cells += [(scope.noise_loss, noise) for noise in scope.noise]
    for loss, noise in dict.fromkeys(cells):
        task = _Lazy(store.out, loss, seed, noise, size)
        totals = [SCALE[loss] * s for s in scope.totals]
        for total, name in itertools.product(totals, scope.selectors):
            store.measure(
                "alignment", (size, seed, loss, noise, total, name),
                lambda t=task, s=total, n=name: alignment(t.get(), [s], scope.budget, [n]),  # type: ignore[misc]
            )  # fmt: skip
        key = (size, seed, loss, noise)
        store.measure("detection", key, lambda t=task: detection(t.get()))  # type: ignore[misc]
        for name in REFERENCES:
            store.measure(
                "upper", (*key, name), lambda t=task, n=name: [reference(t.get(), n)]  # type: ignore[misc]
            )  # fmt: skip


class _Lazy:
    """The task, made when the first missing number asks for it."""

    def __init__(
        self, out: Path, loss: str, seed: int, noise: float, size: str, exact: bool = False
    ) -> None:
        self.made: Task | None = None
        self.loss = loss
        self.ask = lambda: Task(out, loss=loss, seed=seed, noise=noise, size=size, exact=exact)

    def get(self) -> Task:
        self.made = self.made or self.ask()
        return self.made
