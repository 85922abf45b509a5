"""One progress wrapper: a live bar on a terminal, else a plain line now and then.

Everything goes to stderr, so stdout stays for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def clock(seconds: float) -> str:
    """73 -> "1:13"."""
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def line(label: str, done: int, total: int | None, seconds: float, unit: str) -> str:
    """ "scan  120/400 ex  57.1 ex/s  ETA 0:05"."""
    rate = done / seconds if seconds > 0 else 0.0
    end = total is not None and done >= total
    tail = f"in {clock(seconds)}" if end or total is None else "ETA -"
    if total is not None and not end and rate > 0:
        tail = f"ETA {clock((total - done) / rate)}"
    count = f"{done}/{total}" if total is not None else str(done)
    return f"{label}  {count} {unit}  {rate:.1f} {unit}/s  {tail}"


def track(
    iterable: Iterable[T],
    total: int | None,
    label: str,
    unit: str = "ex",
    *,
    size: Callable[[T], int] = lambda item: 1,
    every: float = 10.0,
) -> Iterator[T]:
    """Yields the items, showing `unit`/s and the time left.

    `total` counts units, of which an item holds `size(item)` (`len` for batches). Off a terminal
    one line at most every `every` seconds and one at the end.
    """
    shown = _bar if sys.stderr.isatty() else _plain
    return shown(iterable, total, label, unit, size, every)


def _plain(
    iterable: Iterable[T],
    total: int | None,
    label: str,
    unit: str,
    size: Callable[[T], int],
    every: float,
) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last >= every:
            last = now
            print(line(label, done, total, now - start, unit), file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    print(line(label, done, done, seconds, unit), file=sys.stderr, flush=True)


def _bar(
    iterable: Iterable[T],
    total: int | None,
    label: str,
    unit: str,
    size: Callable[[T], int],
    every: float,
) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30))
    start = time.monotonic()
    done = 0
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as bar:
        task = bar.add_task(label, total=total)
        for item in iterable:
            yield item
            done += size(item)
            text = line(label, done, total, time.monotonic() - start, unit)
            bar.update(task, completed=done, description=text)
        text = line(label, done, done, time.monotonic() - start, unit)
        bar.update(task, completed=done, total=done, description=text)
