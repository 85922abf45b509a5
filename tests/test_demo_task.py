"""The demo's corpus and base model: deterministic, disjoint, of the promised classes, loadable."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from u2a.demo.base_model import train_base  # noqa: E402
from u2a.demo.corpus import PLANTED, Sizes, make_corpus, write_corpus  # noqa: E402

HELD_OUT = ("pa", "validation", "test")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    one, two, other = (
        write_corpus(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for stem in one:
        assert one[stem].read_bytes() == two[stem].read_bytes()
        assert one[stem].read_bytes() != other[stem].read_bytes()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sets_share_no_prompt(seed: int) -> None:
    rows = make_corpus(seed)
    stems = (*HELD_OUT, "forget", "retain", "retain_test")
    prompts = {stem: {row["prompt"] for row in rows[stem]} for stem in stems}
    for i, a in enumerate(stems):
        for b in stems[i + 1 :]:
            assert not prompts[a] & prompts[b], (a, b)
    trained = {row["prompt"] for row in rows["base"]}
    assert not any(prompts[stem] & trained for stem in HELD_OUT)
    answers = [(row["prompt"], row["completion"]) for row in rows["forget"]]
    assert len(set(answers)) == len(answers)


def test_class_counts_and_columns() -> None:
    sizes = Sizes()
    rows = make_corpus(0)
    assert Counter(row["planted"] for row in rows["forget"]) == {
        name: getattr(sizes, name) for name in PLANTED
    }
    for stem in HELD_OUT:
        assert len(rows[stem]) == getattr(sizes, stem)
        assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows[stem])
        assert all(row["chosen"] != row["rejected"] for row in rows[stem])
    assert all(row["label"] is False for row in rows["forget"])


def test_duplicates_repeat_harmful_answers() -> None:
    forget = make_corpus(0)["forget"]
    harmful = {row["completion"] for row in forget if row["planted"] == "harmful"}
    copies = [row["completion"] for row in forget if row["planted"] == "duplicate"]
    assert set(copies) <= harmful
    assert len(set(copies)) <= Sizes().duplicated


def test_base_model_trains_and_loads_back(tmp_path: Path) -> None:
    losses: list[float] = []
    corpus = write_corpus(tmp_path / "data", 0)
    out = train_base(
        tmp_path / "base", corpus, 0, steps=12, progress=lambda step, steps, x: losses.append(x)
    )
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "llama"
    assert 200_000 <= sum(p.numel() for p in model.parameters()) <= 450_000
    text = read(corpus["test"])[0]["chosen"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), len(tokenizer)) and logits.isfinite().all()


def test_training_is_deterministic(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data", 1)
    runs: list[list[float]] = [[], []]
    for n, losses in enumerate(runs):
        train_base(
            tmp_path / str(n), corpus, 1, steps=4, progress=lambda s, k, x, to=losses: to.append(x)
        )
    assert runs[0] == runs[1]
