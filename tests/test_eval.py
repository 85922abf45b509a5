"""`u2a eval` on a tiny model: every suite, the files it writes."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from tiny_eval import evaluation_folder, lines, u2a

from u2a.config import load_config
from u2a.evaluate import forget_nll
from u2a.metrics import describe
from u2a.workspace import Workspace

TOFU_KEYS = {
    *(f"{p}_Q_A_{k}" for p in ("forget", "retain", "ra", "wf") for k in ("Prob", "ROUGE")),
    *(f"{p}_Q_A_PERT_Prob" for p in ("forget", "retain", "ra", "wf")),
    *("forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob", "ra_Q_A_Prob_normalised"),
    *("wf_Q_A_Prob_normalised", "forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio"),
    *("wf_Truth_Ratio", "exact_memorization", "extraction_strength", "model_utility"),
    *(f"{p}_Truth_Ratio_arithmetic" for p in ("retain", "ra", "wf")),
    *("forget_truth_ratio_arithmetic", "model_utility_arithmetic"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evaluation_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def found(folder):
    code, said = u2a(folder, "--adapter", folder / "adapter", "--text")
    assert code == 0, said
    return folder / "run" / "eval"


def test_results_have_the_shape_of_lm_eval(found, folder):
    got = json.loads((found / "results.json").read_text())
    tasks = {"preference", "answers", "forget", "retain", "mia", "tofu", "muse"}
    assert set(got["results"]) == set(got["models"]["base"]) == tasks
    for task, values in (*got["results"].items(), *got["models"]["base"].items()):
        assert values.pop("alias") == task
        names = {k.split(",")[0] for k in values}
        assert all(k.endswith(",none") for k in values)
        for name in (n for n in names if "_stderr" not in n):
            assert isinstance(values[f"{name},none"], float)
            assert values[f"{name}_stderr,none"] == "N/A" or values[f"{name}_stderr,none"] >= 0
    assert got["n-samples"]["forget"] == {"original": 12, "effective": 12}
    assert got["higher_is_better"]["forget"]["prob"] is False
    assert got["higher_is_better"]["retain"]["prob"] is True
    assert got["config"]["adapter"] == str(folder / "adapter")
    wants = {f"{k}: privleak, mia_reference" for k in ("mia", "tofu")}
    wants |= {"forget_quality", "forget_quality_arithmetic"}
    assert set(got["absent"]) == wants and "privleak,none" not in got["results"]["mia"]


def test_base_stands_beside_the_unlearned_model(found, folder):
    got = json.loads((found / "results.json").read_text())
    base, after = got["models"]["base"], got["results"]
    assert base["preference"]["objective,none"] == pytest.approx(-math.log(2), abs=1e-6)
    assert base["preference"]["margin_accuracy,none"] == 0
    assert after["preference"]["objective,none"] != base["preference"]["objective,none"]
    assert (
        after["answers"]["kl_to_reference,none"] > 0
        and "kl_to_reference,none" not in (base["answers"])
    )
    work = Workspace(load_config(folder / "run.yaml"), folder)
    work.load_adapter(folder / "adapter")
    nll = forget_nll(work.model, work.data.forget)
    assert after["forget"]["perplexity,none"] == pytest.approx(math.exp(nll), rel=1e-5)
    samples = {
        r["uid"]: r
        for r in lines(found / "samples.jsonl")
        if (r["model"], r["task"]) == ("unlearned", "forget")
    }
    for row in work.data.forget:
        assert row.answer_ids[-1] == work.tokenizer.eos_token_id
        ids, n = torch.tensor([row.prompt_ids + row.answer_ids[:-1]]), len(row.answer_ids) - 1
        with torch.no_grad():
            hit = work.model(input_ids=ids).logits[0, :-1].argmax(-1)[-n:] == ids[0, -n:]
        k = next(k for k in range(n + 1) if bool(hit[k:].all()))
        assert samples[row.uid]["exact_memorisation"] == pytest.approx(int(hit.sum()) / n)
        assert samples[row.uid]["extraction_strength"] == pytest.approx(1 - k / n)


def test_samples_are_one_line_a_row(found):
    rows = lines(found / "samples.jsonl")
    per = {}
    for row in rows:
        per.setdefault((row["model"], row["task"]), []).append(row)
    assert {k: len(v) for k, v in per.items() if k[0] == "unlearned"} == {
        ("unlearned", "preference"): 6, ("unlearned", "answers"): 3, ("unlearned", "forget"): 12,
        ("unlearned", "retain"): 6, ("unlearned", "mia"): 16,
    }  # fmt: skip
    got = json.loads((found / "results.json").read_text())["results"]["forget"]
    each = [r["prob"] for r in per["unlearned", "forget"]]
    assert sum(each) / 12 == pytest.approx(got["prob,none"])
    assert got["prob_stderr,none"] == pytest.approx(stats.sem(each))
    asked = [r for r in per["unlearned", "forget"] if "rougeL_recall" in r]
    assert len(asked) == 3 and all(isinstance(r["generation"], str) for r in asked)
    assert all(r["source"].startswith(str(found.parents[1])) and r["uid"] for r in rows)
    mia = per["unlearned", "mia"]
    assert [r["member"] for r in mia] == [True] * 12 + [False] * 4
    inside, outside = ([r["mia_zlib"] for r in mia if r["member"] is m] for m in (True, False))
    above = stats.mannwhitneyu(outside, inside).statistic / (12 * 4)
    auc = json.loads((found / "results.json").read_text())["results"]["mia"]["mia_zlib,none"]
    assert auc == pytest.approx(above)


def test_tofu_files_have_the_shape_of_openunlearning(found):
    whole = json.loads((found / "TOFU_EVAL.json").read_text())
    summary = json.loads((found / "TOFU_SUMMARY.json").read_text())
    assert set(whole) == set(summary) == TOFU_KEYS
    assert list(whole) == sorted(whole)
    assert all(whole[k]["agg_value"] == v for k, v in summary.items())
    rows = whole["forget_Q_A_Prob"]["value_by_index"]
    assert list(rows) == ["0", "1", "2", "3"] and set(rows["0"]) == {"prob", "avg_loss"}
    assert rows["0"]["prob"] == pytest.approx(math.exp(-rows["0"]["avg_loss"]))
    wrong = whole["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]
    assert len(wrong["prob"]) == len(wrong["avg_loss"]) == 3
    right = whole["forget_Q_A_PARA_Prob"]["value_by_index"]["0"]["avg_loss"]
    ratio = whole["forget_truth_ratio"]["value_by_index"]["0"]["score"]
    assert ratio == pytest.approx(math.exp(right - sum(wrong["avg_loss"]) / 3))
    ratios = [r["score"] for r in whole["forget_truth_ratio"]["value_by_index"].values()]
    closer = sum(min(r, 1 / r) for r in ratios) / 4
    assert whole["forget_truth_ratio"]["agg_value"] == pytest.approx(closer)
    # the mean of the wrong answers' probabilities instead of that of their losses
    ratio = whole["forget_truth_ratio_arithmetic"]["value_by_index"]["0"]["score"]
    assert ratio == pytest.approx(sum(wrong["prob"]) / 3 / math.exp(-right))
    nine = [f"{p}_Q_A_ROUGE" for p in ("retain", "ra", "wf")] + ["retain_Q_A_Prob"]
    nine += [f"{p}_Q_A_Prob_normalised" for p in ("ra", "wf")]
    for end in ("", "_arithmetic"):
        of = [summary[n] for n in nine + [f"{p}_Truth_Ratio{end}" for p in ("retain", "ra", "wf")]]
        want = stats.hmean(of) if min(of) else 0.0
        assert summary[f"model_utility{end}"] == pytest.approx(want)
    share = whole["ra_Q_A_Prob_normalised"]["value_by_index"]["0"]["prob"]
    p, q = whole["ra_Q_A_Prob"], whole["ra_Q_A_PERT_Prob"]
    p, q = p["value_by_index"]["0"]["prob"], q["value_by_index"]["0"]["prob"]
    assert share == pytest.approx(p / (p + sum(q)))
    text = whole["forget_Q_A_ROUGE"]["value_by_index"]["0"]
    assert set(text) == {"rougeL_recall", "rougeL_f1", "input", "ground_truth", "generation"}
    attack = whole["mia_min_k"]
    assert attack["auc"] == attack["agg_value"] and set(attack["forget"]) == {
        "agg_value", "value_by_index"
    }  # fmt: skip
    muse = json.loads((found / "MUSE_SUMMARY.json").read_text())
    assert {"forget_verbmem_ROUGE", "retain_knowmem_ROUGE", "mia_min_k"} <= set(muse)


def test_a_retrained_model_and_its_logs_agree(folder, found):
    ask = ("--adapter", folder / "adapter", "--suite", "mia,tofu", "--set", "eval.generate=0")
    code, said = u2a(folder, *ask, "--retain-model", folder / "retrained", out="run2")
    assert code == 3 and "run2: no run directory; make one by `u2a run`" in said
    assert not (folder / "run2").exists()
    (folder / "run2").mkdir()
    code, said = u2a(folder, *ask, "--retain-model", folder / "retrained", out="run2")
    assert code == 0, said
    got = json.loads((folder / "run2" / "eval" / "results.json").read_text())
    assert got["absent"] == {} and set(got["results"]) == {"mia", "tofu"}
    assert {"privleak,none", "mia_reference,none"} <= set(got["results"]["mia"])
    for end in ("", "_arithmetic"):
        assert 0 <= got["results"]["tofu"][f"forget_quality{end},none"] <= 1
    assert "generation" not in said
    # the logs that another tool would have written for the same retrained model
    ours = json.loads((folder / "run2" / "eval" / "TOFU_EVAL.json").read_text())
    (folder / "logs.json").write_text(json.dumps(ours))
    code, said = u2a(folder, *ask, "--retain-model", folder / "logs.json", out="run2")
    assert code == 0, said
    again = json.loads((folder / "run2" / "eval" / "TOFU_SUMMARY.json").read_text())
    assert again["forget_quality"] == pytest.approx(1), "compared with itself"
    assert again["forget_quality_arithmetic"] == pytest.approx(1)
    assert again["privleak"] == pytest.approx(0, abs=1e-9)
    got = json.loads((folder / "run2" / "eval" / "results.json").read_text())
    assert set(got["absent"]) == {"mia: privleak, mia_reference", "tofu: mia_reference"}
    for name in ("forget_Q_A_PERT_Prob", "forget_truth_ratio_arithmetic"):
        ours.pop(name)
    (folder / "logs.json").write_text(json.dumps(ours))
    code, said = u2a(folder, *ask, "--retain-model", folder / "logs.json", out="run2")
    assert code == 0 and "no forget_quality_arithmetic: wants --retain-model" in said


def test_the_page_of_metrics_is_current():
    page = Path(__file__).parents[1] / "docs" / "metrics.md"
    want = "python -m u2a.metrics.describe > docs/metrics.md"
    assert page.read_text() == describe.markdown(), want
    for metric in (m for group in describe.GROUPS.values() for m in group):
        module, _, name = metric.function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
