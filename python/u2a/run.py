"""`u2a run`: the stages in order. A finished stage is verified and skipped; the same command again
continues where the last one stopped."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from u2a.config import Config
from u2a.errors import DataError, GuardError
from u2a.rundir import RunDir, file_hash
from u2a.stages import SCORES, Files, Run

STAGES: dict[str, tuple[str, ...]] = {
    "prep": ("model", "data"),
    "start": ("lora", "unlearn", "run"),
    "scan": ("objective", "solve"),
    "validate": ("validate",),
    "select": ("select",),
    "unlearn": ("guard",),
    "eval": ("eval",),
    "report": (),
}


def content_settings(cfg: Config) -> dict[str, Any]:
    """The configuration with file contents in place of paths, so that a moved folder matches."""
    tree = cfg.to_dict()
    tree["model"].pop("name")
    for source in tree["data"].values():
        if isinstance(source, dict) and Path(source["path"]).is_file():
            source["path"] = file_hash(Path(source["path"]))
    tree["eval"] = {k: tree["eval"][k] for k in ("baselines", "bootstrap")}
    return tree


def stamp(settings: dict[str, Any], base: str, stage: str) -> dict[str, Any]:
    """What `stage` is made from: the sections that it and the stages before it read."""
    names = list(STAGES)
    sections = [s for name in names[: names.index(stage) + 1] for s in STAGES[name]]
    return {k: settings[k] for k in sections} | {"base": base}


def run(cfg: Config, out: Path, *, title: str = "U2A run", until: str = "report") -> Path:
    """All stages up to `until`; returns the run directory. Raises U2AError subclasses."""
    began = time.monotonic()
    if cfg.run.require_fused:
        os.environ["U2A_REQUIRE_FUSED"] = "1"
    with RunDir(out) as folder:
        job = Run(cfg, folder, title)
        settings = content_settings(cfg)
        fresh = 0
        for number, name in enumerate(STAGES, 1):
            made_from = stamp(settings, job.base, name)
            fresh += _stage(job, number, name, made_from, redo=fresh > 0)
            if name == until:
                break
        words = "complete" if fresh else "already complete, every file verified"
        print(f"{folder.path}: {words} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        if until == "report":
            _raise_trip(folder)
        return folder.path


def _raise_trip(folder: RunDir) -> None:
    """A guard that stopped U2A's unlearning ends the run with exit 6, the report being written."""
    trip = folder.read_json("unlearn.json")["u2a"]["guard"]
    if trip:
        raise GuardError(
            f"unlearn: guard tripped at {trip}; the last good adapter was kept and the report "
            f"written: {folder.file('report.html')}"
        )


def _stage(job: Run, number: int, name: str, made_from: dict[str, Any], redo: bool) -> int:
    """1 when the stage ran. `redo`: a stage before it ran, so what is there may be out of date."""
    if not redo and job.dir.is_done(name, made_from):
        print(f"[{number}/{len(STAGES)}] {name}: done before", file=sys.stderr)
        return 0
    print(f"[{number}/{len(STAGES)}] {name} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    stage: Callable[[], Files] = getattr(job, name)
    files = stage()
    seconds = round(time.monotonic() - began, 2)
    times = job.dir.read_json("times.json") if job.dir.file("times.json").exists() else {}
    job.dir.write_json("times.json", times | {name: seconds})
    job.dir.mark_done(name, files, made_from)
    job.dir.event("stage", name=name, seconds=seconds)
    print(f"[{number}/{len(STAGES)}] {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return 1


def scan_only(cfg: Config, out: Path) -> Path:
    """The stages up to the scores; prints the best candidates."""
    path = run(cfg, out, until="scan")
    with RunDir(out) as folder:
        table = folder.read_parquet(SCORES)
    if not table["uid"]:
        raise DataError(f"{path}: no candidates")
    best = sorted(range(len(table["uid"])), key=lambda i: -table["gain"][i])[:10]
    for i in best:
        print(f"{table['uid'][i]}  gain {table['gain'][i]:+.4e}")
    print(f"{len(table['uid'])} scores in {path / SCORES}")
    return path
