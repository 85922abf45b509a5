"""Objectives of drawn answers and one-shot selectors, as a configuration names them."""

from __future__ import annotations

import json

import pytest
import torch
from test_run import inputs, settings

from u2a.errors import ConfigError, DataError
from u2a.one_shot import one_shot
from u2a.rewards import Reward, ToTarget, load_reward
from u2a.workspace import Workspace

__all__ = ["inputs"]

REWARD = "test_objective_names:shorter"
METHODS = (
    "uniform", "random", "topk", "low-likelihood", "low-reward", "grad-norm", "cosine",
    "threshold", "g-effect", "trak", "upcore", "worst-case", "easiest",
)  # fmt: skip


def shorter(prompts, completions, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def faults(inputs, **changes):
    with pytest.raises(ConfigError) as caught:
        settings(inputs, **changes)
    return caught.value.faults


@pytest.fixture(scope="module")
def work(inputs, tmp_path_factory):
    cfg = settings(
        inputs, select__reward=REWARD, solve__method="identity", solve__damping=1.0,
        unlearn__max_iter=5,
    )  # fmt: skip
    return Workspace(cfg, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("method", METHODS)
def test_every_selector_spends_the_total_on_at_most_the_budget(work, method):
    n, total = len(work.data.forget), 0.3
    gain = torch.linspace(-1, 1, n)
    before = {k: p.detach().clone() for k, p in work.model.named_parameters()}
    weights = one_shot(work, gain, method, total)
    assert weights.shape == (n,) and float(weights.sum()) == pytest.approx(total, rel=1e-5)
    everybody = method in ("uniform", "threshold")
    assert everybody or int((weights > 0).sum()) == work.cfg.select.budget
    assert all(torch.equal(p, before[k]) for k, p in work.model.named_parameters())
    if method == "low-reward":
        length = torch.tensor([len(r.answer_ids) for r in work.data.forget])
        assert length[weights > 0].min() >= length[weights == 0].max()
    if method == "threshold":
        torch.testing.assert_close(weights, total * gain.clamp_min(0) / gain.clamp_min(0).sum())


def test_every_selector_may_be_a_baseline(inputs):
    cfg = settings(inputs, select__reward=REWARD, eval__baselines=list(METHODS))
    assert cfg.eval.baselines == list(METHODS)


def test_a_column_of_the_forget_file_is_a_reward(inputs, tmp_path):
    lines = (inputs / "data" / "forget.jsonl").read_text().splitlines()
    data = [json.loads(line) | {"score": float(i % 7)} for i, line in enumerate(lines)]
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in data) + "\n")
    given = {"data__forget": {"path": str(path)}, "select__reward": "score"}
    work = Workspace(settings(inputs, **given), tmp_path)
    weights = one_shot(work, torch.zeros(0), "low-reward", 1.0)
    score = torch.tensor([r.meta["score"] for r in work.data.forget])
    assert score[weights > 0].max() <= score[weights == 0].min()
    other = Workspace(settings(inputs, **given | {"select__reward": "planted"}), tmp_path)
    with pytest.raises(DataError, match="column 'planted' is not a number in 22 forget rows"):
        one_shot(other, torch.zeros(0), "low-reward", 1.0)


@pytest.mark.parametrize(("name", "kind"), [("reward", Reward), ("divergence", ToTarget)])
def test_objectives_of_drawn_answers(inputs, tmp_path, name, kind):
    work = Workspace(
        settings(
            inputs, objective__name=name, objective__reward=REWARD, objective__samples=2,
            objective__max_new_tokens=3, objective__divergence="reverse_kl", objective__beta=2.0,
        ), tmp_path,
    )  # fmt: skip
    J = work.outer.objective
    assert type(J) is kind and J.how.samples == 2 and J.how.max_new_tokens == 3
    assert [r.uid for r in J.prompts] == [p.chosen.uid for p in work.data.pa]
    assert J.reward is shorter
    if kind is ToTarget:
        assert (J.divergence, J.target, J.beta) == ("reverse_kl", "rlhf", 2.0)
    gain = work.outer.gains(torch.zeros(len(work.data.forget)))[0].gain
    assert bool(gain.isfinite().all()) and bool(gain.any())


def test_faults_say_what_is_missing(inputs):
    (line,) = faults(inputs, objective__name="reward")
    assert line == ("objective.reward: None, wanted 'module:function' beside objective.name reward")
    (line,) = faults(inputs, objective__reward="nowhere")
    assert line == (
        "objective.reward: 'nowhere', wanted 'module:function' with the signature of TRL's reward "
        "functions"
    )
    (line,) = faults(inputs, select__method="low-reward")
    assert line.startswith("select.reward: None, wanted 'module:function' or a column of data.")
    (line,) = faults(inputs, eval__baselines=["low-reward"])
    assert line.startswith("select.reward: None")
    (line,) = faults(
        inputs, objective__name="divergence", objective__reward=REWARD, select__method="quadratic"
    )
    assert line.startswith("select.method: 'quadratic', wanted another beside objective.name div")
    (line,) = faults(inputs, objective__divergence="kl")
    assert "wanted one of js, forward_kl" in line
    settings(inputs, select__method="low-reward", objective__reward=REWARD)


def test_a_reward_that_is_not_there():
    assert load_reward(REWARD)([], [], [[1, 2]]) == [-2.0]
    with pytest.raises(ConfigError, match=r"select\.reward: 'no_such_module:f', wanted a module"):
        load_reward("no_such_module:f", "select.reward")
    with pytest.raises(ConfigError, match="wanted a function of test_objective_names, nearest 'sh"):
        load_reward("test_objective_names:short")
