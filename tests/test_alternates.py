"""Alternates and splices: made, continued, refused; matched to rows; a run on them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from u2a import run as stages
from u2a.alternates import Writer, alternates, defaults, items
from u2a.batch import Row
from u2a.cli import app
from u2a.config import load_config, make_config
from u2a.data import prepare
from u2a.demo.base_model import train_base
from u2a.demo.corpus import Sizes, write_corpus
from u2a.errors import ConfigError, DataError, MismatchError
from u2a.generate import Sampling, continuations
from u2a.partners import match_partners
from u2a.rewrite import REFUSALS, Item, Rewriter, chosen, random_of, refusal, text_of
from u2a.schemas import Example
from u2a.workspace import Workspace

SIZES = Sizes(
    pa=8, validation=6, test=8, harmful=6, mislabelled=2, duplicate=2, duplicated=2, unrelated=2,
    retain=8, retain_test=8, people=28,
)  # fmt: skip
SETS = ("forget", "pa", "validation", "test", "retain", "retain_test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("inputs")
    data = write_corpus(out / "data", 0, SIZES)
    train_base(out / "model", data, 0, steps=30)
    tree = {
        "model": {"name": "model"},
        "data": {n: {"path": f"data/{n}.jsonl"} for n in SETS}
        | {"alternates": {"path": "alternates.jsonl"}},
        "lora": {"r": 2, "alpha": 2, "targets": ["o_proj"], "train": "b"},
        "solve": {"damping": 0.01},
        "select": {"budget": 4, "blocks": 1, "total_weight": 0.2},
        "unlearn": {"loss": "altpo", "anchor": 0.1, "lr": 0.03, "steps": 3},
        "eval": {"bootstrap": 100, "baselines": []},
    }
    tree["model"]["name"] = "./model"
    (out / "run.yaml").write_text(json.dumps(tree))
    return out


def u2a(*args):
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(folder, **sets):
    return load_config(
        folder / "run.yaml", {"unlearn.loss": "ga", "data.alternates": "null"} | sets
    )


@pytest.fixture(scope="module")
def work(folder):
    return Workspace(loaded(folder), folder)


def test_altpo_by_the_model_is_cached_with_provenance(folder, work):
    path = folder / "alternates.jsonl"
    ask = ("prep", folder / "run.yaml", "--alternates", "altpo", "--out", path, "--batch", 4,
           "--max-new-tokens", 12)  # fmt: skip
    code, said = u2a(*ask)
    assert code == 0, said
    assert f"data: {{alternates: {{path: {path}}}}}" in said
    found = lines(path)
    forget = {r.uid: r for r in work.data.forget}
    assert {x["uid"] for x in found} == set(forget)
    first = found[0]["provenance"]
    assert all(x["provenance"] == first and x["sample"] == 0 for x in found)
    assert first["kind"] == "altpo" and first["sampling"]["max_new_tokens"] == 12
    assert first["model"].endswith("model") and len(first["hash"]) == 32
    assert "safetensors" in first["model_hash"] and first["sampling"]["seed"] == 0
    assert len({str(x["completion"]) for x in found}) > len(found) // 2
    whole = path.read_bytes()
    u2a(*ask)  # complete: nothing is generated
    assert path.read_bytes() == whole
    cut = whole.split(b"\n")
    path.write_bytes(b"\n".join(cut[:4]) + b"\n" + cut[4][:20])  # a group whole, then a torn line
    u2a(*ask)
    assert path.read_bytes() == whole
    code, said = u2a(*ask, "--temperature", 0.5)
    assert code == 8 and "alternates.jsonl:1: made with another sampling" in said
    path.write_bytes(b'{"prompt": "p"}\n')
    code, said = u2a(*ask)
    assert code == 3 and "alternates.jsonl:1: not a line of `u2a prep`" in said
    path.write_bytes(whole)


def test_prep_alone_prepares_the_data(folder):
    code, said = u2a("prep", folder / "run.yaml", "--out", folder / "prepared",
                     "--set", "unlearn.loss=ga", "--set", "data.alternates=null")  # fmt: skip
    assert code == 0, said
    assert json.loads((folder / "prepared" / "prep.json").read_text())["forget"]["rows"] == 12
    assert not (folder / "prepared" / "start.json").exists()


def test_a_run_on_alternates_of_every_source(folder):
    for kind in ("refusal", "random"):
        path = folder / f"{kind}.jsonl"
        assert u2a("prep", folder / "run.yaml", "--alternates", kind)[0] == 0
        assert len(lines(path)) == 12
    for loss, name in (("idkpo", "refusal"), ("flat_tv", "refusal"), ("llmu", "random")):
        cfg = load_config(folder / "run.yaml", {
            "unlearn.loss": loss, "data.alternates.path": str(folder / f"{name}.jsonl"),
            "select.method": "uniform",
        })  # fmt: skip
        out = stages.run(cfg, folder / f"run-{loss}", until="unlearn")
        facts = json.loads((out / "unlearn.json").read_text())["u2a"]
        assert facts["steps"] == 3 and facts["guard"] == ""
        stats = json.loads((out / "prep.json").read_text())
        assert stats["alternates"]["rows"] == stats["forget"]["rows"] == 12


def test_a_run_with_a_reference_per_token(folder):
    cfg = loaded(folder, **{"unlearn.loss": "tnpo", "select.method": "uniform"})
    out = stages.run(cfg, folder / "run-tnpo", until="unlearn")
    assert json.loads((out / "unlearn.json").read_text())["u2a"]["steps"] == 3


def test_pairs_lower_the_answer_against_the_partner(folder):
    cfg = load_config(folder / "run.yaml", {
        "unlearn.loss": "idkpo", "data.alternates.path": str(folder / "refusal.jsonl"),
        "unlearn.steps": "10", "unlearn.retain_weight": "0", "unlearn.anchor": "0",
    })  # fmt: skip
    work = Workspace(cfg, folder)
    n = len(work.data.forget)
    problem = work.problem.with_weights(torch.full((n,), 1 / n))

    def margin():
        from u2a.adapter import sequence_logps

        rows = [*problem.forget, *problem.partners]
        gain = sequence_logps(work.model, rows) - problem.reference
        return (gain[n:] - gain[:n]).mean().item()

    assert margin() == pytest.approx(0, abs=1e-4)
    work.unlearn(problem, guard=False)
    assert margin() > 0.5


def test_splices_are_a_forget_file(folder, work):
    path = folder / "sapo.jsonl"
    ask = ("prep", folder / "run.yaml", "--alternates", "sapo", "--max-new-tokens", 3)
    code, said = u2a(*ask)
    assert code == 0 and f"data: {{forget: {{path: {path}}}}}" in said
    found = lines(path)
    assert {x["uid"] for x in found} == {r.uid for r in work.data.retain}
    for x in found:
        a, b = text_of(x["chosen"]), text_of(x["rejected"])
        assert a != b and abs(len(a) - len(b)) < len(a)
    cfg = loaded(folder, **{"data.forget.path": str(path), "data.disjoint": "drop"})
    assert len(prepare(cfg, work.tokenizer).forget) == len(found)


def test_continuations_are_those_of_each_prompt_alone(work):
    """Padding on the left changes nothing: nearly greedy draws agree with single prompts."""
    how = Sampling(temperature=1e-3, max_new_tokens=5)
    prompts = [r.prompt_ids for r in work.data.forget[:3]] + [work.data.forget[0].prompt_ids[:2]]
    together = continuations(work.model, work.tokenizer, prompts, how, 0)
    state = torch.random.get_rng_state()
    alone = [continuations(work.model, work.tokenizer, [p], how, 1)[0] for p in prompts]
    assert together == alone and torch.equal(state, torch.random.get_rng_state())
    free = Sampling(max_new_tokens=8)
    draws = [continuations(work.model, work.tokenizer, prompts, free, s) for s in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="at least one token"):
        continuations(work.model, work.tokenizer, [()], how, 0)
    for bad in ({"temperature": 0}, {"top_p": 0}, {"samples": 0}, {"top_k": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)
    with pytest.raises(ConfigError, match="temperature: wanted > 0"):
        defaults("altpo", temperature=-1.0)
    with pytest.raises(ConfigError, match="--alternates: 'x', wanted one of altpo"):
        defaults("x")


def item(uid="u", prompt="p", answer=" a", **known):
    example = Example(prompt, (answer,), (False,), None, "f.jsonl:1")
    return Item(uid, prompt, answer, known.get("example", example))


def test_draws_without_a_model():
    chat = [{"role": "user", "content": "q"}]
    said = [{"role": "assistant", "content": "bad"}]
    plain, talk = item(), item("v", chat, said)
    first = refusal([plain, talk], 0)
    assert first == refusal([plain, talk], 0) and first[0][1:] in REFUSALS and first[0][0] == " "
    assert first[1][0]["role"] == "assistant" and first[1][0]["content"] in REFUSALS
    pair = Example("p", ("good", "bad"), (True, False), 0, "f:2")
    assert chosen([item(example=pair), plain], 0) == ["good", None]
    others = [item("r", "p", "same prompt"), item("s", "other", "fine")]
    assert random_of(others)([plain, talk], 0)[0] == "fine"
    assert random_of(others[:1])([plain], 0) == [None]


def test_empty_and_equal_draws_are_drawn_again(tmp_path):
    seeds = []

    def draw(group, seed):
        seeds.append(seed)
        return [["", " a ", "b"][len(seeds) - 1] for _ in group]

    path = tmp_path / "a.jsonl"
    alternates([item()], draw, Writer(path, {"kind": "x"}), Sampling())
    assert len(set(seeds)) == 3 and lines(path)[0]["completion"] == "b"
    with pytest.raises(DataError, match="no alternate for 1 answers\n  f.jsonl:1: uid w"):
        alternates([item("w")], lambda g, s: [None], Writer(path, {"kind": "x"}), Sampling())
    with pytest.raises(MismatchError, match="made with another kind"):
        Writer(path, {"kind": "y"})
    two = tmp_path / "b.jsonl"
    alternates([item(), item("w")], lambda g, s: [f"t{s}" for _ in g], Writer(two, {}),
               Sampling(samples=2, batch=1))  # fmt: skip
    assert len({x["completion"] for x in lines(two)}) == 4
    assert [(x["uid"], x["sample"]) for x in lines(two)] == [("u", 0), ("w", 0), ("u", 1), ("w", 1)]


def test_altpo_prompt_and_stops(folder, work, monkeypatch):
    cfg = loaded(folder)
    rewriter = Rewriter(work.model, work.tokenizer, cfg, Sampling())
    asked = []

    def said(model, tokenizer, prompts, how, seed):
        asked.extend(tokenizer.decode(p) for p in prompts)
        return [tuple(tokenizer("new facts Q: again", add_special_tokens=False)["input_ids"])]

    monkeypatch.setattr("u2a.rewrite.continuations", said)
    one = items(cfg, "forget", [r.uid for r in work.data.forget])[0]
    (found,) = rewriter.altpo([one], 0)
    assert text_of(found).strip() == "new facts"
    assert text_of(one.answer).strip() in asked[0]


def test_partners_by_uid_then_by_prompt():
    def row(uid, prompt, answer, *of):
        meta = {"prompt_uid": prompt} | dict(zip(["uid"], of, strict=False))
        return Row(uid, (1,), answer, f"{uid}:1", meta)

    forget = [row("a", "p", (1, 2)), row("b", "q", (3,)), row("c", "p", (1, 2))]
    found = [row("x", "q", (3,)), row("y", "q", (4,)), row("z", "p", (5,)),
             row("w", "p", (6,), "a")]  # fmt: skip
    assert [r.uid for r in match_partners("f", forget, found)] == ["w", "y", "z"]
    with pytest.raises(DataError, match="f: no alternate for 1 of 3 .*\n  b:1: uid b the same"):
        match_partners("f", forget, [found[0], found[2]])


def test_configuration_refuses_impossible_combinations():
    data = {k: {"path": "org/d"} for k in ("forget", "pa", "retain")}

    def faults(loss, alternates=None, **sections):
        tree = {"model": {"name": "m"}, "data": data | {"alternates": alternates}}
        unlearn = {"loss": loss, **sections.pop("unlearn", {})}
        with pytest.raises(ConfigError) as e:
            make_config(tree | {"unlearn": unlearn} | sections)
        return e.value.faults

    made = {"path": "org/a"}
    assert faults("altpo") == [
        "data.alternates: None, wanted a file beside unlearn.loss altpo, as "
        "`u2a prep CONFIG --alternates KIND` writes it"
    ]
    assert "wanted none beside unlearn.loss npo" in faults("npo", made)[0]
    assert "'lbfgs', wanted trainer" in faults("wtnpo", unlearn={"solver": "lbfgs"})[0]
    assert faults("simnpo", unlearn={"options": {"delta": 1}}) == [
        "unlearn.options.delta: unknown, wanted one of those of loss simnpo: margin"
    ]
    both = faults("flat_js", made, solve={"curvature": "fisher", "method": "woodbury"})
    assert [f.split(":")[0] for f in both] == ["solve.curvature", "solve.method"]
    assert "(undial needs whole-vocabulary logits: u2a.losses.vocabulary)" in faults("undial")[0]
    assert faults("simpo")[0].endswith("nearest 'simnpo'")
