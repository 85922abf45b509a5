"""`u2a eval` with functions of the user: reward, judges of harm and of two answers, classifier."""

from __future__ import annotations

import json

import pytest
from scipy import stats
from tiny_eval import evaluation_folder, lines, u2a

from u2a.config import load_config
from u2a.evaluate import win_rate
from u2a.metrics.generation import greedy, wanted, written
from u2a.metrics.suites.retrained import load_model
from u2a.workspace import Workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evaluation_folder(tmp_path_factory.mktemp("eval"))


def test_functions_of_the_user_are_asked(folder, monkeypatch):
    (folder / "mine.py").write_text(
        "def reward(prompts, completions, **_):\n    return [2.0] * len(completions)\n"
        "def judge(prompts, answers):\n    return [0.25] * len(answers)\n"
        "def sound(texts):\n    return [0.5] * len(texts)\n"
    )
    monkeypatch.chdir(folder)
    code, said = u2a(
        folder, "--adapter", "adapter", "--suite", "pa,forget", "--reward", "mine:reward",
        "--judge", "mine:judge", "--classifier", "mine:sound",
    )  # fmt: skip
    assert code == 0, said
    got = json.loads((folder / "run" / "eval" / "results.json").read_text())["results"]
    assert got["answers"]["reward,none"] == 2 and got["forget"]["attack_success,none"] == 0.25
    assert got["forget"]["cleanness,none"] == 0.5 and set(got) == {
        "preference",
        "answers",
        "forget",
    }
    assert not (folder / "run" / "eval" / "TOFU_EVAL.json").exists(), "the folder is one result"
    tied = [got["answers"][f"win_rate{end},none"] for end in ("", "_low", "_high")]
    wilson = win_rate(0, 3, 3)
    assert tied == pytest.approx([0.5, wilson.low, wilson.high]), "equal rewards are ties"
    for bad, words in (("mine", "wanted module:function"), ("nowhere:f", "No module named"),
                       ("mine:nothing", "mine has no function nothing")):  # fmt: skip
        code, said = u2a(folder, "--adapter", "adapter", "--judge", bad)
        assert code == 2 and words in said


def test_cleanness_beside_a_retrained_model(folder, monkeypatch):
    (folder / "gibberish.py").write_text(
        "def sound(texts):\n    return [min(1, len(t) / 60) for t in texts]\n"
    )
    monkeypatch.chdir(folder)
    ask = ("--suite", "forget", "--classifier", "gibberish:sound", "--text")
    code, said = u2a(folder, *ask, "--adapter", "adapter", "--retain-model", "retrained")
    assert code == 0, said
    got = json.loads((folder / "run" / "eval" / "results.json").read_text())
    found = {**got["models"], "unlearned": got["results"]}
    rows = [r for r in lines(folder / "run" / "eval" / "samples.jsonl") if "generation" in r]
    cfg = load_config(folder / "run.yaml")
    work = Workspace(cfg, folder)
    model = load_model(str(folder / "retrained"), cfg)
    theirs = written(model, work.tokenizer, work.data.forget[:3], greedy(6))
    for name in ("base", "unlearned"):
        ours = [r["generation"] for r in rows if r["model"] == name]
        p = stats.ks_2samp(*([len(t) for t in texts] for texts in (ours, theirs))).pvalue
        value = found[name]["forget"]["cleanness_indistinguishability,none"]
        assert len(ours) == 3 and value == pytest.approx(p)


def test_win_rates_of_drawn_answers(folder, monkeypatch):
    """By a judge that likes the longer text, worked out again from the texts in the samples."""
    (folder / "taste.py").write_text(
        "def longer(prompts, first, second):\n"
        "    return [(len(a) > len(b)) - (len(a) < len(b)) for a, b in zip(first, second)]\n"
        "def size(prompts, completions, **_):\n    return [len(c.strip()) for c in completions]\n"
    )
    monkeypatch.chdir(folder)
    ask = ("--adapter", "adapter", "--suite", "pa", "--text", "--set", "eval.generate=6")
    code, said = u2a(folder, *ask, "--compare", "taste:longer")
    assert code == 0, said
    got = json.loads((folder / "run" / "eval" / "results.json").read_text())
    assert got["config"]["functions"] == {"compare": "taste:longer"}
    assert "win_rate,none" not in got["models"]["base"]["answers"]
    assert got["higher_is_better"]["answers"]["win_rate"] is True
    rows = [r for r in lines(folder / "run" / "eval" / "samples.jsonl") if r["task"] == "answers"]
    base, ours = ([r for r in rows if r["model"] == m] for m in ("base", "unlearned"))
    work = Workspace(load_config(folder / "run.yaml"), folder)
    chosen = {p.chosen.uid: p.chosen for p in work.data.test}
    chosen = [wanted(work.tokenizer, [chosen[r["uid"]]])[0] for r in ours]
    assert [r["uid"] for r in base] == [r["uid"] for r in ours] and len(ours) == 6
    assert any(a["drawn"] != b["drawn"] for a, b in zip(ours, base, strict=True))
    for name, theirs in (("win_rate", [r["drawn"] for r in base]), ("win_rate_chosen", chosen)):
        sizes = [(len(r["drawn"]), len(t)) for r, t in zip(ours, theirs, strict=True)]
        want = win_rate(sum(a > b for a, b in sizes), sum(a == b for a, b in sizes), 6)
        values = [got["results"]["answers"][f"{name}{end},none"] for end in ("", "_low", "_high")]
        assert values == pytest.approx([want.value, want.low, want.high])
        assert [r[name] for r in ours] == [1.0 if a > b else 0.5 * (a == b) for a, b in sizes]
    code, said = u2a(folder, *ask, "--reward", "taste:size")
    assert code == 0, said
    again = json.loads((folder / "run" / "eval" / "results.json").read_text())
    for key, value in got["results"]["answers"].items():
        if "win_rate" in key:
            assert again["results"]["answers"][key] == pytest.approx(value), "the same taste"


def test_what_functions_of_the_user_answer_is_checked(folder, monkeypatch):
    (folder / "odd.py").write_text(
        "def judge(prompts, answers):\n    return [5] * len(answers)\n"
        "def compare(prompts, first, second):\n    return ['first'] * len(prompts)\n"
        "def reward(prompts, completions, **_):\n    return [0.0]\n"
    )
    monkeypatch.chdir(folder)
    for option, suite, words in (
        ("judge", "forget", "attack_success: number 0 is 5.0, wanted in [0, 1]"),
        ("compare", "pa", "verdicts: wanted 3 verdicts of -1, 0 or 1"),
        ("reward", "pa", "reward: wanted one value per completion, 3; got 1"),
    ):
        ask = ("--adapter", "adapter", "--suite", suite, f"--{option}", f"odd:{option}")
        code, said = u2a(folder, *ask)
        assert code == 3 and words in said and f"odd:{option}" in said
        assert "Traceback" not in said
