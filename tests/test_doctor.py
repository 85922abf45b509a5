"""u2a doctor: passes what is right, names what is wrong, exit code by kind."""

import json

import pytest
import tiny_models
import torch
from test_run import inputs, settings  # noqa: F401
from tiny_models import FAMILIES, make
from typer.testing import CliRunner

import u2a.dual_mlp
from u2a import doctor
from u2a.cli import app
from u2a.doctor import Check, exit_code, layer, subject


def wrong(checks):
    return [c.name for c in checks if c.state == "FAIL"]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_of_every_family_agrees_with_double_backward(family):
    found = layer.compare(layer.build(make(family).config))
    assert len(found) == 5 and all(v < 1e-5 for v in found.values()), found


def test_a_cut_keeps_the_kinds_of_layers_and_what_is_no_size():
    made = layer.cut(make("gemma2").config)
    assert made.layer_types == ["sliding_attention", "full_attention"]
    assert made.num_hidden_layers == 2 and made.final_logit_softcapping == 3.0
    llama = layer.cut(make("llama-tied").config)
    assert llama.num_hidden_layers == 1 and llama.tie_word_embeddings and llama.attention_bias
    assert (llama.num_attention_heads, llama.num_key_value_heads) == (2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make("llama", dtype=torch.float32).save_pretrained(path)
    return path


def test_a_model_by_path(folder):
    result = CliRunner().invoke(app, ["doctor", "--model", str(folder), "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"] == 0, result.stdout
    names = [c["name"] for c in found["checks"]]
    assert {"torch", "kernels", "llama layer: Hessian product", "model: symmetry of Hessian",
            "model: rows alone"} <= set(names)  # fmt: skip


def test_a_wrong_formula_is_found(folder, monkeypatch):
    """A tangent that is a tenth too small."""
    right = u2a.dual_mlp.dual_glu

    def halved(gate, up, activation):
        y, y_t = right(gate, up, activation).chunk(2)
        return torch.cat([y, 0.9 * y_t])

    monkeypatch.setattr(u2a.dual_mlp, "dual_glu", halved)
    ward = subject.Subject(None, str(folder), None)
    found = list(subject.layers(ward))
    assert "llama layer: Hessian product" in wrong(found) and exit_code(found) == 6
    monkeypatch.setattr(u2a.dual_mlp, "dual_glu", right)
    assert not wrong(subject.layers(ward))


def test_an_unknown_model_is_a_fault_of_the_configuration(tmp_path):
    from transformers import BloomConfig

    BloomConfig(vocab_size=29, hidden_size=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)])
    assert result.exit_code == 2 and "BloomForCausalLM is not a known causal LM" in result.stdout
    assert "skip  model" in result.stdout
    nowhere = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "none")])
    assert nowhere.exit_code == 2 and "FAIL  layer" in nowhere.stdout


def test_a_configuration_with_its_data(inputs):  # noqa: F811
    found = doctor.examine(settings(inputs))
    assert not wrong(found), doctor.table(found)
    names = {c.name for c in found}
    assert {"data: an answer's end is learnt", "data: read and disjoint", "model: rows alone",
            "llama layer, LoRA: Hessian product"} <= names  # fmt: skip


def test_bad_data_exits_3(inputs, tmp_path):  # noqa: F811
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": 3, "rejected": "c"}\n')
    found = doctor.examine(settings(inputs, data__pa={"path": str(bad)}))
    assert exit_code(found) == 3 and "bad.jsonl:1" in doctor.table(found)
    assert "llama layer: Hessian product" not in wrong(found)


def test_a_broken_environment_exits_4(monkeypatch):
    monkeypatch.setattr(doctor.env, "_kernels", lambda: "u2a_kernels is not importable: no torch")
    monkeypatch.setitem(doctor.OLDEST, "peft", "99.0")
    result = CliRunner().invoke(app, ["doctor", "--model", "anything"])
    assert result.exit_code == 4
    assert "FAIL  peft" in result.stdout and "u2a_kernels is not importable" in result.stdout
    assert "2 of " in result.stdout.splitlines()[-1]


def test_rows_that_meet_are_found(folder, monkeypatch):
    """Scores that depend on the width of the batch."""
    ward = subject.Subject(None, str(folder), None)
    right = subject.jvp_scores
    monkeypatch.setattr(
        subject, "jvp_scores", lambda m, b, *a: right(m, b, *a) * (1 + 1e-3 * b.ids.shape[1])
    )
    found = list(subject.independence(ward))
    assert wrong(found) == ["model: rows alone", "model: rows with more padding"]


def test_codes_and_both_arguments(tmp_path):
    def bad(code):
        return Check("x", "FAIL", "", code)

    assert exit_code([Check("x", "ok", "")]) == 0
    assert exit_code([bad(6), bad(3), bad(2)]) == 2 and exit_code([bad(6), bad(4)]) == 4
    path = tmp_path / "run.yaml"
    result = CliRunner().invoke(app, ["doctor", str(path), "--model", "x"])
    assert result.exit_code == 2 and "wanted one of them" in result.stderr
    nan = doctor.measured("x", float("nan"), 1.0)
    assert nan.state == "FAIL" and nan.code == 6
    assert tiny_models.VOCAB
