"""What the tests of `u2a eval` share: a tiny model with data for every suite, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from u2a.cli import app
from u2a.config import load_config
from u2a.demo.base_model import train_base
from u2a.demo.corpus import Sizes, write_corpus
from u2a.workspace import Workspace

SIZES = Sizes(
    pa=8, validation=6, test=6, harmful=6, mislabelled=2, duplicate=2, duplicated=2, unrelated=2,
    retain=8, retain_test=6, people=28,
)  # fmt: skip
SETS = ("forget", "pa", "validation", "test", "retain", "retain_test")
TOFU_SETS = ("forget", "retain", "real_authors", "world_facts")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, found):
    path.write_text("".join(json.dumps(x) + "\n" for x in found))


def evaluation_folder(out: Path) -> Path:
    """Data, a base and a retrained model, run.yaml, an empty run directory and an adapter."""
    data = write_corpus(out / "data", 0, SIZES)
    train_base(out / "model", data, 0, steps=30)
    train_base(out / "retrained", data, 1, steps=20)
    asked = lines(out / "data" / "retain.jsonl")[:4]
    pairs = [(x["prompt"], x["completion"]) for x in asked]
    others = [a for _, a in pairs]
    for name in TOFU_SETS:
        rows = [
            {
                "question": f"{q} {name}",
                "answer": a,
                "perturbed_answer": others[:k] + others[k + 1 :],
            }
            | ({"paraphrased_answer": a + " ."} if name in ("forget", "retain") else {})
            for k, (q, a) in enumerate(pairs)
        ]
        write(out / f"tofu_{name}.jsonl", rows)
    write(out / "holdout.jsonl", [{"prompt": q + " ?", "completion": a} for q, a in pairs])
    write(out / "muse.jsonl", [{"prompt": q, "completion": a} for q, a in pairs])
    tree = {
        "model": {"name": "./model"},
        "data": {n: {"path": f"data/{n}.jsonl"} for n in SETS},
        "lora": {"r": 2, "alpha": 2, "targets": ["o_proj"], "train": "b"},
        "select": {"method": "uniform", "budget": 4, "blocks": 1, "total_weight": 0.2},
        "unlearn": {"loss": "npo", "anchor": 0.1, "lr": 0.03, "steps": 3, "retain_rows": 4},
        "solve": {"method": "identity"},
        "eval": {
            "bootstrap": 100, "baselines": [], "generate": 3, "max_new_tokens": 6,
            "holdout": {"path": "holdout.jsonl"},
            "tofu": {n: {"path": f"tofu_{n}.jsonl"} for n in TOFU_SETS},
            "muse": {n: {"path": "muse.jsonl"} for n in ("forget_verbmem", "retain_knowmem")},
        },
    }  # fmt: skip
    (out / "run.yaml").write_text(json.dumps(tree))
    (out / "run").mkdir()
    work = Workspace(load_config(out / "run.yaml"), out)
    with torch.no_grad():
        for name, p in work.model.named_parameters():
            if "lora_B" in name:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    work.save_adapter(out / "adapter")
    return out


def u2a(folder, *args, out="run"):
    given = [str(a) for a in ("eval", folder / "run.yaml", "--out", folder / out, *args)]
    result = CliRunner().invoke(app, given)
    return result.exit_code, result.output
