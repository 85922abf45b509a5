"""The scan: exact gains, in order, one bad row alone, and no gradient or host copy on the way."""

import subprocess
import sys

import pytest
import torch
from tiny_models import direction, make, rows, two_batches

from u2a.batch import row_batches
from u2a.products import gradient, jvp_scores
from u2a.scan import scan
from u2a.tree import dot, scaled

SHAPES = tuple((1 + i % 3, 1 + (5 * i) % 7) for i in range(23))


def ga(lp):
    return lp.mean()


def test_gains_equal_gradients_row_by_row():
    model, data = make("llama", lora=True), rows(1, SHAPES)
    v = direction(model, 1)
    got = scan(model, data, v, ga, batch_tokens=24, progress=False)
    batches = row_batches(data, 24)
    assert len(batches) > 3
    want = -jvp_scores(model, batches, ga, v)
    assert torch.allclose(got.gain, want, rtol=1e-10)
    for i in (0, 7, 22):
        g = gradient(model, row_batches([data[i]], 24), ga)
        # gradient runs Hugging Face's own forward, whose norms are float32 inside
        assert got.gain[i].item() == pytest.approx(-dot(g, v).item(), rel=1e-4)
    assert got.finite.all() and got.uid == [r.uid for r in data]
    assert got.gain.device.type == "cpu" and not got.gain.requires_grad


def test_batches_and_scale_of_the_direction():
    model = make("gpt2")
    v = direction(model, 1)
    got = scan(model, two_batches(), v, ga, progress=False)
    assert got.uid == ["0", "1", "2", "3", "4"]
    assert torch.allclose(got.gain, -jvp_scores(model, two_batches(), ga, v), rtol=1e-10)
    tiny = scan(model, two_batches(), scaled(v, 1e-140), ga, progress=False)
    assert torch.allclose(tiny.gain * 1e140, got.gain, rtol=1e-10)


def test_one_bad_row_is_flagged_and_alone():
    model, data = make("llama"), rows(1, SHAPES)
    poison = data[4].prompt_ids[0]
    data = [r for i, r in enumerate(data) if i == 4 or poison not in r.prompt_ids + r.answer_ids]
    at = next(i for i, r in enumerate(data) if poison in r.prompt_ids)
    v = direction(model, 1)
    good = scan(model, data, v, ga, batch_tokens=64, progress=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    bad = scan(model, data, v, ga, batch_tokens=64, progress=False)
    others = torch.arange(len(data)) != at
    assert torch.equal(bad.finite, others) and others.sum() > 5
    assert torch.equal(bad.gain[others], good.gain[others])


def test_no_backward_and_no_host_copy_per_batch(monkeypatch):
    model, data = make("llama", lora=True), rows(1, SHAPES)
    copies = []
    for name in ("item", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, n=name, o=original: copies.append(n) or o(t, *a)
        )
    v = direction(model, 1)
    seen = []
    for tokens in (16, 1000):
        copies.clear()
        scan(model, row_batches(data, tokens), v, ga, progress=False)
        seen.append(copies.count("cpu") + copies.count("numpy"))
    assert seen == [1, 1]
    assert all(p.grad is None for p in model.parameters())


def test_progress_goes_to_stderr(capsys):
    model, data = make("llama"), rows(1, SHAPES)
    scan(model, data, direction(model, 1), ga, batch_tokens=64)
    out, err = capsys.readouterr()
    assert out == "" and "scan  23/23 ex" in err and "ex/s" in err


def test_wrong_input():
    model, data = make("llama"), rows(1, SHAPES)
    v = direction(model, 1)
    with pytest.raises(ValueError, match="at least one row"):
        scan(model, [], v, ga)
    with pytest.raises(ValueError, match="finite norm above 0, got 0.0"):
        scan(model, data, scaled(v, 0.0), ga)
    with pytest.raises(TypeError, match="Row or Batch throughout"):
        scan(model, [data[0], two_batches()[0]], v, ga)


def test_the_package_is_light_and_its_functions_win_over_its_modules():
    code = (
        "import sys, u2a; assert not {'torch', 'transformers'} & sys.modules.keys(); "
        "import u2a.scan; from u2a.solve import Solution; "
        "print(all(callable(f) for f in (u2a.dual, u2a.scan, u2a.solve, u2a.jvp_scores)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
