"""`u2a demo`: plants structure, trains a small model on it, then is an ordinary `u2a run`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from u2a.config import Config, make_config
from u2a.demo.base_model import train_base
from u2a.demo.corpus import write_corpus
from u2a.run import run
from u2a.rundir import RunDir
from u2a.workspace import quiet

THREADS = 2  # sums of floats, and with them the trained model, depend on the number of threads

SETTINGS: dict[str, Any] = {
    "lora": {"r": 4, "alpha": 4, "targets": ["o_proj", "down_proj"], "train": "b"},
    "objective": {"name": "dpo", "beta": 0.3},
    "solve": {"method": "cg", "curvature": "ggn", "damping": 0.0, "tol": 1e-4, "max_iter": 60},
    "select": {"method": "greedy", "budget": 96, "blocks": 8, "total_weight": 0.72},
    "unlearn": {
        "loss": "npo",
        "beta": 0.5,
        "retain_weight": 4.0,
        "anchor": 0.1,
        "solver": "lbfgs",
        "tol": 1e-5,
        "max_iter": 100,
        "lr": 0.05,
        "steps": 100,
        "batch_rows": 96,
        "retain_rows": 40,
        "batch_tokens": 8192,
    },
    "validate": {"candidates": 32, "weights": [0.002, 0.0125]},
}


def demo_config(data: dict[str, Path], model: Path, seed: int) -> Config:
    """The run's configuration; it is written beside the data as run.yaml and can be edited."""
    sets = ("forget", "pa", "validation", "test", "retain", "retain_test")
    files = {name: {"path": str(data[name])} for name in sets}
    tree = {
        "schema": 1,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {**files, "template": "plain", "max_tokens": 64},
        **SETTINGS,
        "run": {"seed": seed, "threads": THREADS},
    }
    return make_config(tree, source="demo")


def demo(out: Path, seed: int) -> Path:
    """Corpus, base model and run in `out`; the same command again continues or says complete."""
    began = time.monotonic()
    out = out.absolute()
    inputs = out / "inputs"
    with RunDir(inputs) as folder:
        stamp = {"seed": seed, "demo": 1}
        if not folder.is_done("inputs", stamp):
            print("[0/8] base model: making data and training it ...", file=sys.stderr, flush=True)
            torch.set_num_threads(THREADS)
            quiet()
            data = write_corpus(inputs / "data", seed)
            train_base(inputs / "model", data, seed, steps=450)
            folder.mark_done("inputs", ["data", "model"], stamp)
            print(f"[0/8] base model: {time.monotonic() - began:.1f} s", file=sys.stderr)
    data = {p.stem: p for p in sorted((inputs / "data").glob("*.jsonl"))}
    cfg = demo_config(data, inputs / "model", seed)
    run(cfg, out / "run", title="U2A demo: planted preferences in a small language model")
    (out / "run.yaml").write_text(cfg.to_yaml(), encoding="utf-8")
    with RunDir(out / "run") as folder:
        _summary(folder)
    return out


def _summary(folder: RunDir) -> None:
    found = folder.read_json("metrics.json")
    print(f"\n{'method':<16}{'test J gain':>12}{'retain ppl':>12}{'support':>9}")
    for m in found["methods"]:
        ratio = f"x {m['retain_ratio']:.3f}"
        print(f"{m['name']:<16}{m['pa_gain']:>+12.4f}{ratio:>12}{m['support']:>9}")
    v = found["validation"]
    for solver, rho in v["spearman"].items():
        pairs = ", ".join(f"w={w:g}: {r:.3f}" for w, r in zip(v["weights"], rho, strict=True))
        print(f"Spearman(predicted, realised), {solver}: {pairs}")
    print(f"\nverdict: {found['verdict']['headline']}")
    print(f"report:  {folder.file('report.html')}")
    print(
        f"next: edit {folder.path.parent / 'run.yaml'} and run `u2a run` on it, with another --out"
    )
