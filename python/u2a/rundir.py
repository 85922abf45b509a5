"""The run directory: what is in it is complete, verified and made with these settings.

Files appear by rename after fsync. A stage's marker, written last, holds size and hash of each of
its files and the fingerprint of what they were made from; existence alone means nothing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from u2a import lock
from u2a.errors import CorruptError, DataError, MismatchError, U2AError

SCHEMA = 1
Json = dict[str, Any]


def file_hash(path: Path) -> str:
    """blake2b (128 bit, hex) of a file's bytes."""
    with path.open("rb") as f:
        h = blake2b(digest_size=16)
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Json:
    """Nested mappings -> one mapping with dotted keys; lists stay values."""
    flat: Json = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


class RunDir:
    """`with RunDir("runs/x") as run:` holds the lock while inside.

    Opening removes what an interrupted write left behind. Raises LockError when another process
    holds the directory. Names given to its methods are relative and may not leave it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self._fd: int | None = None

    def __enter__(self) -> RunDir:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path = self.path.resolve()
            self._fd = lock.acquire(self.path / "LOCK")
        except OSError as e:
            raise DataError(f"{self.path}: not usable as a run directory: {e.strerror}") from None
        self._recover()
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            lock.release(self._fd, self.path / "LOCK")
            self._fd = None

    def file(self, name: str) -> Path:
        """The absolute path of `name`. Raises U2AError when it would lie outside."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path) or path.resolve() == self.path:
            raise U2AError(f"{name!r}: outside the run directory {self.path}")
        return path

    def write_atomic(self, name: str, data: bytes | str) -> Path:
        """Old content or new content, never a part. Raises U2AError naming the bytes needed."""
        path = self.file(name)
        data = data.encode() if isinstance(data, str) else data
        temp = path.with_name(f".{path.name}.u2a-tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temp.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temp, path)
            _sync_dir(path.parent)
        except OSError as e:
            temp.unlink(missing_ok=True)
            raise U2AError(f"{path}: cannot write {len(data)} bytes: {e.strerror}") from None
        return path

    @contextmanager
    def atomic_dir(self, name: str) -> Iterator[Path]:
        """A folder to fill; it replaces `name` as a whole when the block ends without exception."""
        path = self.file(name)
        temp, old = path.with_name(f".{path.name}.u2a-tmp"), path.with_name(f".{path.name}.u2a-old")
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        try:
            yield temp
            for item in sorted(temp.rglob("*")):
                _sync_dir(item)
            _sync_dir(temp)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        if path.exists():
            os.rename(path, old)
        os.rename(temp, path)
        _sync_dir(path.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _recover(self) -> None:
        for old in list(self.path.rglob(".*.u2a-old")):
            home = old.with_name(old.name[1 : -len(".u2a-old")])
            if home.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, home)
        for temp in list(self.path.rglob(".*.u2a-tmp")):
            shutil.rmtree(temp) if temp.is_dir() else temp.unlink()
        events = self.path / "events.jsonl"
        if events.exists() and events.read_bytes()[-1:] not in (b"", b"\n"):
            with events.open("ab") as f:
                f.write(b"\n")

    def mark_done(self, stage: str, files: Iterable[str], fingerprint: Json) -> None:
        """Writes `<stage>.done`. `files` may name folders, whose files then count one by one."""
        names = sorted(n for f in files for n in self._expand(f))
        found = {
            n: {"bytes": self.file(n).stat().st_size, "blake2b": file_hash(self.file(n))}
            for n in names
        }
        marker = {"schema": SCHEMA, "stage": stage, "files": found}
        self.write_json(f"{stage}.done", {**marker, "fingerprint": flatten(fingerprint)})

    def _expand(self, name: str) -> list[str]:
        path = self.file(name)
        if not path.is_dir():
            return [name]
        return [str(p.relative_to(self.path)) for p in path.rglob("*") if p.is_file()]

    def is_done(self, stage: str, fingerprint: Json) -> bool:
        """True when the stage's files are all there, unchanged, and made with `fingerprint`.

        False without a readable marker or with a file missing (do the stage again). Raises
        MismatchError with the keys that differ, CorruptError with the file and both hashes.
        """
        try:
            marker = json.loads(self.file(f"{stage}.done").read_text())
            schema, files, made_with = marker["schema"], marker["files"], marker["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False
        if schema != SCHEMA:
            raise MismatchError(f"{stage}.done: schema {schema}, this u2a reads {SCHEMA}")
        self._compare(stage, made_with, json.loads(_dumps(flatten(fingerprint))))
        if not all(self.file(n).is_file() for n in files):
            return False
        for name, promised in files.items():
            self._verify(stage, name, promised)
        return True

    def _compare(self, stage: str, was: Json, now: Json) -> None:
        both = was.keys() & now.keys()
        keys = sorted((was.keys() ^ now.keys()) | {k for k in both if was[k] != now[k]})
        if keys:
            lines = [f"  {k}: was {was.get(k, '(none)')}, now {now.get(k, '(none)')}" for k in keys]
            ways = "use another --out, or delete this run directory to start over"
            head = f"{self.path}: stage {stage} was made with other settings or inputs; {ways}"
            raise MismatchError("\n".join([head, *lines]))

    def _verify(self, stage: str, name: str, promised: Json) -> None:
        path = self.file(name)
        redo = f"delete {stage}.done to make it again"
        if path.stat().st_size != promised["bytes"]:
            have, want = path.stat().st_size, promised["bytes"]
            raise CorruptError(f"{path}: {have} bytes, expected {want}; {redo}")
        if (actual := file_hash(path)) != promised["blake2b"]:
            raise CorruptError(f"{path}: blake2b {actual}, expected {promised['blake2b']}; {redo}")

    def write_json(self, name: str, data: Any) -> Path:
        return self.write_atomic(name, json.dumps(data, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text())

    def write_manifest(self, *, seed: int, data: Json, **extra: Any) -> Path:
        """manifest.json: versions and platform (never the environment), seed, data hashes."""
        from u2a import env

        return self.write_json(
            "manifest.json",
            {"schema": SCHEMA, "seed": seed, "data": data, **env.versions(), **extra},
        )

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """selection.jsonl, dropped.jsonl: one object a line."""
        return self.write_atomic(name, "".join(_dumps(dict(r)) + "\n" for r in rows))

    def read_jsonl(self, name: str) -> list[Json]:
        lines = self.file(name).read_text().splitlines()
        return [json.loads(line) for line in lines if line]

    def write_parquet(self, name: str, columns: Mapping[str, Any]) -> Path:
        """`columns`: equally long lists or arrays (for scores: uid, score, finite)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        buffer = io.BytesIO()
        pq.write_table(pa.table(dict(columns)), buffer)
        return self.write_atomic(name, buffer.getvalue())

    def read_parquet(self, name: str) -> dict[str, list[Any]]:
        import pyarrow.parquet as pq

        return dict(pq.read_table(self.file(name)).to_pydict())

    def event(self, kind: str, **fields: Any) -> None:
        """Appends one line to events.jsonl; non-finite numbers are written as strings."""
        line = _dumps({"time": round(time.time(), 3), "event": kind, **fields}, strict=False)
        with self.file("events.jsonl").open("a") as f:
            f.write(line + "\n")


def _dumps(data: Any, strict: bool = True) -> str:
    try:
        return json.dumps(data, allow_nan=False, ensure_ascii=False)
    except ValueError:
        if strict:
            raise
        return json.dumps({k: v if _finite(v) else str(v) for k, v in data.items()})


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or value - value == 0


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
