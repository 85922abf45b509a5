"""An index on disk: safetensors shards of unit-length features, each with a marker written last.

`meta.json`, and for every range of rows `shard-00000.safetensors` with `g [rows, dim]` (features at
length 1), `norm [rows]` f32 (their length before), `uid [rows, 16]` u8, `flag [rows]` u8 (1
written, 2 not finite, 4 no answer token), beside `shard-00000.done` with its size and hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from u2a.batch import Row
from u2a.errors import GuardError, MismatchError
from u2a.index.build import Settings, run_rows
from u2a.index.engine import Capture, Loss, capture
from u2a.index.spec import Spec
from u2a.progress import track
from u2a.rundir import RunDir

SCHEMA = 1
WRITTEN, NOT_FINITE, EMPTY = 1, 2, 4
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def made_with(start: int, stop: int, dim: int, dtype: str) -> dict[str, Any]:
    """What a shard's marker says of it."""
    return {"start": start, "stop": stop, "dim": dim, "dtype": dtype}


def uid_bytes(uid: str) -> bytes:
    """16 bytes: the uid itself when it is 32 hex digits, else its blake2b digest."""
    try:
        raw = bytes.fromhex(uid)
    except ValueError:
        raw = b""
    return raw if len(raw) == 16 else blake2b(uid.encode(), digest_size=16).digest()


def write_index(
    model: nn.Module,
    rows: Sequence[Row],
    loss: Loss,
    spec: Spec,
    out: str | Path,
    *,
    ref: Tensor | None = None,
    exclude: Sequence[str] = (),
    settings: Settings | None = None,
    dtype: str = "float16",
    shard_rows: int = 8192,
    progress: bool = True,
) -> Path:
    """Features of all rows into the folder `out`, shard by shard; see `u2a.scan(mode="index")`."""
    if not rows:
        raise ValueError("scan: data must hold at least one row, got none")
    if dtype not in DTYPES:
        raise ValueError(f"scan: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_rows < 1:
        raise ValueError(f"scan: shard_rows must be at least 1, got {shard_rows}")
    settings = settings or Settings()
    parts: Any = [range(s, min(s + shard_rows, len(rows))) for s in range(0, len(rows), shard_rows)]
    with RunDir(out) as folder, capture(model, spec, exclude=exclude) as run:
        if list(folder.path.glob("shard-*")) or (folder.path / "meta.json").exists():
            raise MismatchError(f"{folder.path}: already holds an index; give another folder")
        steps = track(parts, len(rows), "index", "ex", size=len) if progress else parts
        for number, part in enumerate(steps):
            some = rows[part.start : part.stop]
            r = None if ref is None else ref[part.start : part.stop]
            tensors = _shard(run_rows(run, some, loss, r, settings), some, DTYPES[dtype], run)
            name = shard_name(number)
            folder.write_atomic(f"{name}.safetensors", save(tensors))
            made = made_with(part.start, part.stop, run.dim, dtype)
            folder.mark_done(name, [f"{name}.safetensors"], made)
        stops = [part.stop for part in parts]
        facts = {"rows": len(rows), "dim": run.dim, "dtype": dtype, "stops": stops}
        layout = {name: list(span) for name, span in run.layout.items()}
        meta = {"schema": SCHEMA, **facts, "spec": spec.describe(), "layout": layout}
        folder.write_json("meta.json", meta)
        return folder.path


def _shard(g: Tensor, rows: Sequence[Row], dtype: torch.dtype, run: Capture) -> dict[str, Tensor]:
    """The tensors of one shard; the only place where a scan waits for the device."""
    norm = torch.linalg.vector_norm(g, dim=1)
    finite = norm.isfinite()
    if bool((finite & (norm == 0)).all()) and any(r.answer_ids for r in rows):
        raise GuardError(
            f"scan: all features of {run.names[0]}, ... are 0: no gradient reaches the captured "
            "parameters. In a fresh LoRA (B = 0) that of A is 0: capture B too, or warm it up"
        )
    unit = torch.where((finite & (norm > 0))[:, None], g / norm[:, None], 0.0)
    empty = torch.tensor([not r.answer_ids or len(r) < 2 for r in rows])
    flag = WRITTEN + NOT_FINITE * (~finite.cpu()).int() + EMPTY * empty.int()
    uid = torch.tensor([list(uid_bytes(r.uid)) for r in rows], dtype=torch.uint8)
    return {
        "g": unit.to(dtype).cpu().contiguous(),
        "norm": norm.float().cpu(),
        "uid": uid,
        "flag": flag.to(torch.uint8),
    }
