"""`u2a eval` on a tiny model: every suite, the files it writes, what it refuses."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from typer.testing import CliRunner

from u2a import run as stages
from u2a.cli import app
from u2a.config import load_config
from u2a.demo.base_model import train_base
from u2a.demo.corpus import Sizes, write_corpus
from u2a.errors import ConfigError
from u2a.evaluate import forget_nll
from u2a.metrics import describe
from u2a.workspace import Workspace

SIZES = Sizes(
    pa=8, validation=6, test=6, harmful=6, mislabelled=2, duplicate=2, duplicated=2, unrelated=2,
    retain=8, retain_test=6, people=28,
)  # fmt: skip
SETS = ("forget", "pa", "validation", "test", "retain", "retain_test")
TOFU_SETS = ("forget", "retain", "real_authors", "world_facts")
TOFU_KEYS = {
    *(f"{p}_Q_A_{k}" for p in ("forget", "retain", "ra", "wf") for k in ("Prob", "ROUGE")),
    *(f"{p}_Q_A_PERT_Prob" for p in ("forget", "retain", "ra", "wf")),
    *("forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob", "ra_Q_A_Prob_normalised"),
    *("wf_Q_A_Prob_normalised", "forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio"),
    *("wf_Truth_Ratio", "exact_memorization", "extraction_strength", "model_utility"),
    *("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm"),
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, found):
    path.write_text("".join(json.dumps(x) + "\n" for x in found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
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
    wants = {f"{k}: privleak, mia_reference" for k in ("mia", "tofu")} | {"forget_quality"}
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
    quality = got["results"]["tofu"]["forget_quality,none"]
    assert 0 <= quality <= 1 and "generation" not in said
    # the logs that another tool would have written for the same retrained model
    ours = json.loads((folder / "run2" / "eval" / "TOFU_EVAL.json").read_text())
    (folder / "logs.json").write_text(json.dumps(ours))
    code, said = u2a(folder, *ask, "--retain-model", folder / "logs.json", out="run2")
    assert code == 0, said
    again = json.loads((folder / "run2" / "eval" / "TOFU_SUMMARY.json").read_text())
    assert again["forget_quality"] == pytest.approx(1), "compared with itself"
    assert again["privleak"] == pytest.approx(0, abs=1e-9)
    got = json.loads((folder / "run2" / "eval" / "results.json").read_text())
    assert set(got["absent"]) == {"mia: privleak, mia_reference", "tofu: mia_reference"}


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
    for bad, words in (("mine", "wanted module:function"), ("nowhere:f", "No module named"),
                       ("mine:nothing", "mine has no function nothing")):  # fmt: skip
        code, said = u2a(folder, "--adapter", "adapter", "--judge", bad)
        assert code == 2 and words in said


def test_the_adapter_of_a_finished_run(folder):
    cfg = load_config(folder / "run.yaml")
    code, said = u2a(folder, "--suite", "retain")
    assert code == 3 and "no finished unlearning; end it by `u2a run`" in said
    stages.run(cfg, folder / "whole", until="unlearn")
    code, said = u2a(folder, "--suite", "retain", out="whole")
    assert code == 0, said
    assert "retain" in said and (folder / "whole" / "eval" / "results.json").exists()
    code, said = u2a(folder, "--suite", "retain", "--set", "unlearn.lr=0.1", out="whole")
    assert code == 8 and "unlearn.lr: was 0.03, now 0.1" in said
    stages.run(
        load_config(folder / "run.yaml", {"eval.generate": "1"}), folder / "whole", until="eval"
    )
    weights = folder / "whole" / "adapter" / "adapter_model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    code, said = u2a(folder, "--suite", "retain", out="whole")
    assert code == 7 and "adapter_model.safetensors: blake2b" in said


def test_what_is_refused(folder, tmp_path):
    adapter = ("--adapter", folder / "adapter")
    code, said = u2a(folder, *adapter, "--suite", "pa,tufo", "--set", "eval.holdout=null")
    assert code == 2 and "suite: 'tufo', wanted one of pa, forget" in said
    code, said = u2a(folder, *adapter, "--suite", "mia", "--set", "eval.holdout=null")
    assert code == 2 and "eval.holdout: missing, wanted rows never trained on" in said
    code, said = u2a(folder, "--adapter", tmp_path)
    assert code == 3 and "no adapter_model.safetensors" in said
    code, said = u2a(folder, *adapter, "--retain-model", tmp_path)
    assert code == 3 and "no .safetensors weights" in said
    code, said = u2a(folder, *adapter, "--set", f"eval.holdout.path={tmp_path / 'none.jsonl'}")
    assert code == 2 and "eval.holdout.path" in said and "no such file" in said
    first = lines(folder / "data" / "forget.jsonl")[0]
    same = {"prompt": first["prompt"], "completion": first.get("rejected", first.get("completion"))}
    write(tmp_path / "seen.jsonl", [same])
    code, said = u2a(folder, *adapter, "--set", f"eval.holdout.path={tmp_path / 'seen.jsonl'}")
    assert code == 3 and "seen.jsonl: 1 holdout rows are forget rows" in said
    assert f"seen.jsonl:1: also {folder / 'data' / 'forget.jsonl'}:1" in said


def test_missing_files_of_the_eval_section_are_config_faults(folder, tmp_path):
    tree = json.loads((folder / "run.yaml").read_text())
    tree["model"]["name"] = str(folder / "model")
    for source in tree["data"].values():
        source["path"] = str(folder / source["path"])
    (tmp_path / "bad.yaml").write_text(json.dumps(tree))
    with pytest.raises(ConfigError) as e:
        load_config(tmp_path / "bad.yaml")
    named = [fault.split(":")[0] for fault in e.value.faults]
    assert named == ["eval.holdout.path", *(f"eval.tofu.{n}.path" for n in TOFU_SETS),
                     "eval.muse.forget_verbmem.path", "eval.muse.retain_knowmem.path"]  # fmt: skip


def test_faults_in_tofu_rows_are_named(folder, tmp_path):
    path = tmp_path / "t.jsonl"
    good = {"question": "q", "answer": "a", "paraphrased_answer": "a", "perturbed_answer": ["b"]}
    bad = [good, good | {"perturbed_answer": []}, good | {"perturbed_answer": ["b", " "]},
           good | {"paraphrased_answer": 3}]  # fmt: skip
    write(path, bad)
    ask = (
        "--adapter",
        folder / "adapter",
        "--suite",
        "tofu",
        "--set",
        f"eval.tofu.forget.path={path}",
    )
    code, said = u2a(folder, *ask)
    assert code == 3
    assert f"{path}:2: perturbed_answer: [], wanted an answer or a list of answers" in said
    assert f"{path}:3: perturbed_answer[1]: ' ', wanted text" in said
    assert f"{path}:4: paraphrased_answer: 3, wanted" in said
    write(path, [{"question": "q", "answer": "a"}])
    code, said = u2a(folder, *ask)
    assert code == 3 and "perturbed_answer: column missing, wanted a list of answers" in said


def test_faults_in_retrained_logs_are_named(folder, tmp_path):
    path = tmp_path / "logs.json"
    ask = ("--adapter", folder / "adapter", "--suite", "tofu", "--retain-model", path)
    for text, words in (
        ("{", "not readable as JSON"),
        ("[]", "list, wanted an object of metrics"),
        ("{}", "forget_truth_ratio: missing"),
        ('{"forget_truth_ratio": {"value_by_index": {"0": {"score": "x"}}}}', "score: 'x', wanted"),
        ('{"forget_truth_ratio": {"value_by_index": {"0": {"score": 1}}}}', "mia_min_k: missing"),
    ):
        path.write_text(text)
        code, said = u2a(folder, *ask)
        assert code == 3 and words in said and str(path) in said


def test_a_broken_model_exits_6(found, folder, tmp_path):
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, t in tensors.items():
        tensors[name] = t.fill_(math.nan) if "lora_B" in name else t
    (tmp_path / "adapter_config.json").write_bytes(
        (folder / "adapter" / "adapter_config.json").read_bytes()
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = (found / "results.json").read_bytes()
    code, said = u2a(folder, "--adapter", tmp_path, "--suite", "forget")
    assert code == 6 and "the unlearned model gives a non-finite log-probability to uid" in said
    assert (found / "results.json").read_bytes() == before


def test_the_page_of_metrics_is_current():
    page = Path(__file__).parents[1] / "docs" / "metrics.md"
    want = "python -m u2a.metrics.describe > docs/metrics.md"
    assert page.read_text() == describe.markdown(), want
    for metric in (m for group in describe.GROUPS.values() for m in group):
        module, _, name = metric.function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
