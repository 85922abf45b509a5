"""README.md is run: its Python, its configuration, its table of who serves which op."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import direction, make, rows
from torch.testing import assert_close

import u2a
import u2a_kernels
from u2a.batch import Pair, collate
from u2a.config import load_config
from u2a.losses import dpo_objective, get_loss
from u2a.tree import dot

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language, holding):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    (found,) = [b for b in blocks if holding in b]
    return found


def test_before_and_after_agree():
    names = {"u2a_kernels": u2a_kernels}
    exec(block("python", "def before"), names)
    h, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    args = h, weight, torch.arange(5)
    assert_close(names["after"](*args), names["before"](*args))


def test_scan_ranks_what_hurts():
    """Each gain is minus the inner product of the row's own gradient with the solution."""
    model = make("llama", lora=True)
    data = rows()
    names = dict(
        model=model,
        rows=data,
        pair_batches=[collate(rows(1)[:4], [0, 1, 2, 3])],
        retain_batches=[collate(rows(2), [0, 1, 2, 3, 4])],
        ref=torch.full((4,), -9.0, dtype=torch.float64),
    )
    exec(block("python", "u2a.solve"), names)
    v, gain = names["v"], names["gain"]
    assert set(v) == set(direction(model, 0))
    assert names["worst"].tolist() == gain.argsort(descending=True)[:3].tolist()
    batch, loss = collate(data, range(len(data))), names["get_loss"]("ga")
    for weight, found in zip(torch.eye(len(data), dtype=torch.float64), gain, strict=True):
        exact = names["u2a"].gradient(model, [batch], loss, weights=weight)
        assert_close(found, -dot(exact, v), rtol=1e-5, atol=1e-5 * float(gain.abs().max()))


def test_index_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = make("llama", lora=True), rows()
    pairs = [Pair(str(i), data[i], data[i + 1]) for i in range(3)]
    names = dict(
        model=model, rows=data, pairs=pairs, pair_ref=torch.full((6,), -9.0), u2a=u2a,
        get_loss=get_loss, dpo_objective=dpo_objective,
    )  # fmt: skip
    exec(block("python", "u2a.index"), names)
    index, q = names["index"], names["q"]
    assert names["hurtful"].shape == (len(data),) and index.dim == 4096
    worst = (index.features() @ q.float()).argsort()[:3]
    assert sorted(names["at"].tolist()) == sorted(worst.tolist())


def test_configuration_is_accepted(tmp_path):
    text = block("yaml", "forget")
    for name in re.findall(r"path: (\S+?)}", text):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", {})
    assert config.data.retain.path.endswith("retain.jsonl")


ENTRIES = {"linear_cross_entropy": "linear_logp"} | dict.fromkeys(
    ("dual_act", "dual_geglu", "dual_gelu", "dual_relu2", "dual_silu", "dual_swiglu"), "dual_glu"
)


def test_table_says_who_serves():
    command = [sys.executable, "-m", "u2a_kernels", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    served = facts["ops"]
    if facts["compiler"] is None or facts["triton"] is None:
        served = {name: {d: "" for d in who} for name, who in served.items()}  # names only
    found = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([^|]+) \|$", README, re.M)
    assert [name for name, _, _ in found if name not in u2a_kernels.__all__] == []
    helpers = {"Rademacher", "rademacher"}
    assert {name for name, _, _ in found} == set(u2a_kernels.__all__) - helpers
    for name, cpu, cuda in found:
        op = ENTRIES.get(name, name)
        who = served.get(op) or served[f"{op}_fwd"]
        assert who["CPU"] in cpu and who["CUDA"] in cuda, f"{name}: {who}"
