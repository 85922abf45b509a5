"""A whole run on a tiny model: every stage, continuing, refusing what changed, exit codes."""

import itertools
import json

import pytest
import torch

from u2a import run as stages
from u2a.config import make_config
from u2a.demo.base_model import train_base
from u2a.demo.corpus import Sizes, write_corpus
from u2a.errors import ConfigError, CorruptError, GuardError, MismatchError
from u2a.inner import sub_optimality
from u2a.tree import trainable
from u2a.workspace import Workspace

SIZES = Sizes(
    pa=8, validation=6, test=8, harmful=10, mislabelled=4, duplicate=4, duplicated=2, unrelated=4,
    retain=8, retain_test=8, people=28,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    out = tmp_path_factory.mktemp("inputs")
    data = write_corpus(out / "data", 0, SIZES)
    train_base(out / "model", data, 0, steps=30)
    return out


def settings(inputs, **changes):
    sets = ("forget", "pa", "validation", "test", "retain", "retain_test")
    tree = {
        "schema": 1,
        "model": {"name": str(inputs / "model")},
        "data": {n: {"path": str(inputs / "data" / f"{n}.jsonl")} for n in sets},
        "lora": {"r": 2, "alpha": 2, "targets": ["o_proj"], "train": "b"},
        "solve": {"damping": 0.0},
        "select": {"budget": 6, "blocks": 2, "total_weight": 0.2, "updates": 1},
        "unlearn": {
            "loss": "npo", "beta": 0.5, "anchor": 0.1, "solver": "lbfgs", "lr": 0.03, "steps": 6,
        },
        "validate": {"candidates": 4, "weights": [0.01]},
        "eval": {"bootstrap": 100},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value}
    return make_config(tree)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    return stages.run(settings(inputs), tmp_path_factory.mktemp("run") / "x")


def test_a_run_leaves_what_it_promises(finished, inputs):
    found = json.loads((finished / "metrics.json").read_text())
    names = [m["name"] for m in found["methods"]]
    assert names == ["base", "start", "u2a", "uniform", "random", "low-likelihood"]
    totals = [m["total_weight"] for m in found["methods"][2:]]
    assert all(t == pytest.approx(totals[0], rel=1e-5) for t in totals) and totals[0] > 0
    lines = [json.loads(line) for line in (finished / "selection.jsonl").read_text().splitlines()]
    assert sum(x["weight"] for x in lines) == pytest.approx(totals[0], rel=1e-5)
    assert [x["rank"] for x in lines] == list(range(len(lines)))
    assert set(found["class_weight"]) == {"pool", "u2a", "uniform", "random", "low-likelihood"}
    assert len(found["validation"]["points"]) == 4 * len(found["validation"]["weights"])
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page
    heads = page.partition("Rounds of the outer loop")[2].partition("</thead>")[0]
    said = ("effective", "predicted", "realised", "gains &gt; 0", "residual", "slope")
    assert all(f"<th>{word}</th>" in heads for word in said)
    assert (finished / "adapter" / "adapter_model.safetensors").exists()
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["data"]["forget"]["rows"] == 22


def test_the_unlearned_adapter_differs_from_the_start_and_loads_with_peft(finished, inputs):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    logits = []
    for name in ("adapters/start", "adapter"):
        base = AutoModelForCausalLM.from_pretrained(inputs / "model")
        model = PeftModel.from_pretrained(base, finished / name)
        logits.append(model(torch.arange(8)[None]).logits)
    assert not torch.allclose(logits[0], logits[1])


def test_the_same_command_again_is_complete(finished, inputs, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*.done")}
    stages.run(settings(inputs), finished)
    assert "already complete, every file verified" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in finished.glob("*.done")}


def test_an_interrupted_run_continues_to_the_same_result(finished, inputs, capsys):
    selection = (finished / "selection.jsonl").read_bytes()
    (finished / "select.done").unlink()
    stages.run(settings(inputs), finished)
    said = capsys.readouterr().err
    assert "scan: done before" in said and "unlearn ..." in said
    assert (finished / "selection.jsonl").read_bytes() == selection


def test_other_settings_and_changed_files_are_refused(finished, inputs):
    with pytest.raises(MismatchError, match=r"select\.budget: was 6, now 5"):
        stages.run(settings(inputs, select__budget=5), finished)
    path = finished / "metrics.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"u2a", b"u2b", 1))
    with pytest.raises(CorruptError, match=r"metrics\.json"):
        stages.run(settings(inputs), finished)
    path.write_bytes(good)


def test_a_tripped_guard_ends_with_exit_6_after_the_report(inputs, tmp_path):
    tight = settings(
        inputs, guard__max_kl=0.02, unlearn__lr=0.3, validate__candidates=0, eval__baselines=[]
    )
    with pytest.raises(GuardError, match="guard tripped at step"):
        stages.run(tight, tmp_path / "x")
    assert (tmp_path / "x" / "report.html").exists()


def test_scan_only_stops_at_the_scores(inputs, tmp_path, capsys):
    out = stages.scan_only(settings(inputs), tmp_path / "x")
    assert not (out / "selection.jsonl").exists()
    assert f"{26 - 4} scores in" in capsys.readouterr().out


def test_rows_that_are_not_written_any_more_leave_early(inputs, tmp_path):
    """A model that has hardly been trained writes no answer of its support."""
    cfg = settings(inputs, select__early_exit=1.0, select__tolerance=1.0, validate__candidates=0)
    out = stages.run(cfg, tmp_path / "x", until="select")
    rounds = json.loads((out / "rounds.json").read_text())
    assert rounds[1]["left"] == rounds[1]["support"] == 3
    assert rounds[2]["added"] == 3, "others take their place"


def test_every_delivered_model_is_mixed_back_to_the_bound_on_retain_perplexity(inputs, tmp_path):
    bound = 1.0005
    cfg = settings(
        inputs, select__method="topk", select__max_retain_ratio=bound, unlearn__lr=0.3,
        validate__candidates=0, eval__baselines=["uniform"],
    )  # fmt: skip
    out = stages.run(cfg, tmp_path / "x", until="unlearn")
    facts = json.loads((out / "unlearn.json").read_text())
    work = Workspace(cfg, tmp_path / "w")
    ratio = {}
    for name in ("adapters/start", "adapter", "adapters/uniform"):
        work.load_adapter(out / name)
        ratio[name] = work.outer.retain_perplexity() / ratio.get("adapters/start", 1.0)
    for name, at in (("u2a", "adapter"), ("uniform", "adapters/uniform")):
        assert 0 < facts[name]["mix"] < 1
        assert 1 + (bound - 1) / 2 < ratio[at] <= bound * (1 + 1e-6)


@pytest.mark.parametrize("solver", ["lbfgs", "trainer"])
def test_every_round_says_how_far_it_can_be_trusted(inputs, tmp_path, solver):
    cfg = settings(
        inputs, unlearn__solver=solver, select__tolerance=9.0, select__max_retain_ratio=9.0,
        validate__candidates=0,
    )  # fmt: skip
    out = stages.run(cfg, tmp_path / "x", until="select")
    rounds = json.loads((out / "rounds.json").read_text())
    assert len(rounds) > 2
    for before, row in itertools.pairwise(rounds):
        assert row["residual"] >= 0 and row["damping"] > 0 and row["iterations"] >= 0
        assert row["realised"] == pytest.approx(row["J"] - before["J"])
        assert 1 < row["effective_support"] <= row["support"] * (1 + 1e-6)
        if row["round"].startswith("block"):
            assert row["effective_support"] == pytest.approx(row["support"]), "equal weights"
        assert 0 < row["positive"] <= 1 and row["predicted"] > 0
        near = row["inner_gradient"] < 1e-3
        assert near == (solver == "lbfgs"), "a few steps of training end away from the optimum"


def test_sub_optimality_is_the_largest_slope(inputs, tmp_path):
    work = Workspace(settings(inputs), tmp_path)
    problem = work.problem.with_weights(torch.full((len(work.data.forget),), 0.01))
    params = trainable(work.model)
    terms = [part.value(work.model).double() for part in problem.parts()]
    slope = torch.autograd.grad(
        sum(terms) + problem.anchor_value(work.model), list(params.values())
    )  # fmt: skip
    want = max(float(g.abs().max()) for g in slope)
    assert sub_optimality(work.model, problem) == pytest.approx(want, rel=1e-5)
    assert all(p.grad is None for p in params.values())
    facts = work.resolve(problem)
    assert sub_optimality(work.model, problem) == pytest.approx(facts["inner_gradient"], rel=1e-3)


def test_harmonised_unlearning_by_configuration(inputs, tmp_path):
    ends = []
    for on in (False, True):
        work = Workspace(settings(inputs, unlearn__harmonise=on), tmp_path / str(on))
        weights = torch.full((len(work.data.forget),), 0.05)
        work.unlearn(work.problem.with_weights(weights))
        ends.append(torch.cat([p.detach().flatten() for p in trainable(work.model).values()]))
    assert (ends[0] - ends[1]).norm() > 1e-3 * ends[0].norm() > 0
    with pytest.raises(ConfigError, match="unlearn.harmonise: .*retain_weight 0"):
        settings(inputs, unlearn__harmonise=True, unlearn__retain_weight=0.0)
