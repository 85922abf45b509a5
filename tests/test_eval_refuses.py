"""`u2a eval`: the adapter it takes, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file, save_file
from tiny_eval import TOFU_SETS, evaluation_folder, lines, u2a, write

from u2a import run as stages
from u2a.config import load_config
from u2a.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evaluation_folder(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def found(folder):
    code, said = u2a(folder, "--adapter", folder / "adapter", "--suite", "retain")
    assert code == 0, said
    return folder / "run" / "eval"


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
