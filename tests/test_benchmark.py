"""The validation benchmark on a model that has hardly been trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch

from u2a.benchmark import run as benchmark
from u2a.benchmark import task as tasks
from u2a.benchmark.predicted import Prediction, designs
from u2a.benchmark.references import reference
from u2a.benchmark.selectors import SELECTORS, chosen, politeness
from u2a.benchmark.tables import tuned
from u2a.benchmark.task import Task, sizes
from u2a.demo import base_model
from u2a.rewards import rewards
from u2a.select import uniform
from u2a.tree import trainable


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        preset = tasks.Preset(tasks.Shape(hidden=32, layers=1, heads=2), 25, 4e-3)
        patch.setitem(tasks.PRESETS, "small", preset)
        yield Task(tmp_path_factory.mktemp("task"), loss="npo", seed=0, noise=0.2)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2])
def test_noise_is_the_share_of_mislabelled_candidates(noise):
    found = sizes(noise)
    pool = found.harmful + found.mislabelled + found.duplicate + found.unrelated
    assert pool == 216 and found.mislabelled == round(noise * 216)


def test_designs_are_drawn_once_and_without_repetition():
    found = designs(50, 3, 6, {8: 4, 32: 2})
    assert found == designs(50, 3, 6, {8: 4, 32: 2}) != designs(50, 4, 6, {8: 4, 32: 2})
    assert Counter({k: len(v) for k, v in found.items()}) == {
        "single": 6, "group of 8": 4, "group of 32": 2,
    }  # fmt: skip
    assert all(len(set(s)) == 32 for s in found["group of 32"])


def test_a_prediction_with_interactions():
    w = torch.tensor([0.5, 2.0])
    gain, q = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1.0], [1.0, 0.0]]).double()
    assert Prediction(gain).of(w) == pytest.approx(-1.5)
    assert Prediction(gain, q).of(w) == pytest.approx(-1.5 + 0.25 + 1.0)


def test_outcome_is_mixed_back_to_the_utility_bound(task, monkeypatch):
    start = {n: t.clone() for n, t in task.start.items()}
    assert task.outcome().gain == pytest.approx(0, abs=1e-6)
    task.solve(uniform(task.n, 40.0))
    moved = {n: p.detach().clone() for n, p in task.model.named_parameters() if n in start}
    raw = task._perplexity() / task.ppl
    bound = 1 + (raw - 1) / 2
    assert raw > 1
    monkeypatch.setattr(tasks, "UTILITY", bound)
    found = task.outcome()
    assert found.raw_ratio == pytest.approx(raw) and 0 < found.mix < 1
    assert bound * 0.99 < found.ratio <= bound
    for name, p in task.model.named_parameters():
        if name in start:
            assert torch.equal(p, start[name]) and not torch.equal(moved[name], start[name])


@pytest.mark.parametrize("name", [n for n in SELECTORS if not n.startswith("u2a")])
def test_baselines_spend_the_total_on_at_most_the_budget(task, name):
    weights, seconds = chosen(task, name, 0.5, 20)
    assert float(weights.sum()) == pytest.approx(0.5, rel=1e-4) and seconds > 0
    everybody = name in ("uniform", "TRACE weights", "UPCORE")
    assert everybody or int((weights > 0).sum()) == 20
    if name == "oracle class":
        assert task.shares(weights)["harmful"] == pytest.approx(1.0)
    assert sum(task.shares(weights).values()) == pytest.approx(1.0)


def test_references_train_on_the_pairs_or_without_the_candidates(task):
    found = {name: reference(task, name, pulls=(1.0, 4.0)) for name in ("DPO", "SFT")}
    for name, row in found.items():
        assert row["selector"] == name and row["gain"] > 0.002 and row["pull"] == 4.0
        assert row["ratio"] <= tasks.UTILITY
    assert found["DPO"]["gain"] > found["SFT"]["gain"]
    for p, start in zip(trainable(task.model).values(), task.start.values(), strict=True):
        assert torch.equal(p, start)
    row = reference(task, "retrain")
    again = reference(task, "retrain")
    assert row == again and row["gain"] == row["raw_gain"] and row["mix"] == 1.0
    with pytest.raises(ValueError, match="one of DPO, SFT, retrain; got 'PPO'"):
        reference(task, "PPO")


def test_retraining_leaves_the_candidates_out(task, monkeypatch):
    shutil.rmtree(task.inputs / "retrained", ignore_errors=True)
    learnt = []
    encode = base_model._encode

    def spied(tokenizer, rows):
        learnt.extend((r["prompt"], r["completion"]) for r in rows)
        return encode(tokenizer, rows)

    monkeypatch.setattr(base_model, "_encode", spied)
    reference(task, "retrain")
    data = [json.loads(line) for line in (task.inputs / "data" / "forget.jsonl").open()]
    gone = {(r["prompt"], r["completion"]) for r in data}
    base = [json.loads(line) for line in (task.inputs / "data" / "base.jsonl").open()]
    kept = [(r["prompt"], r["completion"]) for r in base]
    assert learnt == [pair for pair in kept if pair not in gone] and len(learnt) < len(kept)
    vocabulary, theirs = (
        (task.inputs / f / "tokenizer.json").read_text() for f in ("model", "retrained")
    )
    assert vocabulary == theirs


def test_politeness_knows_the_words_of_the_corpus(task):
    found = rewards(task.work.data.forget, task.work.tokenizer, politeness)
    worth = {"harmful": -1.0, "duplicate": -1.0, "mislabelled": 1.0, "unrelated": 0.0}
    assert found.tolist() == [worth[k] for k in task.planted]


def test_rows_are_kept_and_tables_written(tmp_path, monkeypatch):
    asked = []

    def fake(name):
        def measure(task, *args):
            asked.append(name)
            base = {"seed": 0, "loss": "npo", "noise": 0.2}
            rows = {
                "predicted": base | {"design": "single", "weight": 0.1, "estimator": "ggn",
                                     "rho": 0.5, "low": 0.1, "high": 0.9},
                "alignment": base | {"total": 0.72, "selector": "uniform", "gain": 0.25,
                                     "validation": 0.2, "epochs": 1.0, "shares": {"harmful": 1.0}},
                "detection": base | {"estimator": "ggn", "auroc": 0.75},
                "upper": base | {"selector": (*args, "")[0], "gain": 0.5, "ratio": 1.2},
            }[name]  # fmt: skip
            return rows if name == "upper" else [rows]

        return measure

    monkeypatch.setattr(benchmark, "Task", lambda *a, **k: None)
    monkeypatch.setattr(benchmark, "predicted_against_realised", fake("predicted"))
    monkeypatch.setattr(benchmark, "alignment", fake("alignment"))
    monkeypatch.setattr(benchmark, "detection", fake("detection"))
    monkeypatch.setattr(benchmark, "reference", fake("upper"))
    benchmark.validate(tmp_path, quick=True)
    first = len(asked)
    assert Counter(asked) == {"predicted": 1, "alignment": 4, "detection": 1, "upper": 3}
    text = (tmp_path / "validation.md").read_text()
    for words in (
        "| npo | single | 0.1 | 0.500 |",
        "**+0.250** (+0.25)",
        "| uniform | +0.250 (+0.25) |",
        "| ggn | 0.750 |",
    ):
        assert words in text, words
    assert (tmp_path / "predicted.png").read_bytes()[:4] == b"\x89PNG"
    kept = [json.loads(line) for line in (tmp_path / "upper.jsonl").read_text().splitlines()]
    assert [row["selector"] for row in kept] == ["DPO", "SFT", "retrain"]
    assert "| SFT on the chosen answers | +0.500 (x 1.20) |" in text
    benchmark.validate(tmp_path, quick=True)
    assert len(asked) == first, "what is kept is not measured again"
    with pytest.raises(ValueError, match="size must be one of small, medium, large; got 'tiny'"):
        benchmark.validate(tmp_path, size="tiny")


def test_the_total_weight_is_chosen_on_validation_pairs_alone():
    measured = [(0, 1, 0.1, 0.3), (0, 2, 0.2, 0.05), (1, 1, 0.4, 0.1), (1, 2, 0.3, 0.9)]
    keys = "seed", "total", "validation", "gain"
    rows = [
        {"loss": "npo", "selector": "uniform"} | dict(zip(keys, m, strict=True)) for m in measured
    ]
    assert tuned(rows) == {("npo", "uniform"): [0.05, 0.1]}


def test_predictions_are_made_and_realised_in_float64(task):
    exact = Task(task.inputs.parent, loss="npo", seed=0, noise=0.2, exact=True)
    assert {p.dtype for p in exact.model.parameters()} == {torch.float64}
    assert exact.J == pytest.approx(task.J, abs=1e-4)
