"""The configuration is strict, replayable, and names every fault with the nearest valid key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from u2a import config as config_module
from u2a import strict_yaml
from u2a.config import Config, load_config, make_config
from u2a.errors import ConfigError

GOOD = """
schema: 1
model: {name: org/model, revision: abc123}
data:
  forget: {path: forget.jsonl}
  pa: {path: org/preferences, split: no, columns: {prompt: question}}
  retain: {path: ./retain.csv, limit: 5}
unlearn: {lr: 1e-5}
"""


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "forget.jsonl").write_text("{}\n")
    (tmp_path / "retain.csv").write_text("a\n")

    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def faults(call) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_values_defaults_and_paths(write, tmp_path):
    cfg = load_config(write(GOOD))
    assert cfg.unlearn.lr == 1e-5 and isinstance(cfg.unlearn.lr, float)
    assert cfg.data.pa.split == "no" and cfg.data.pa.path == "org/preferences"
    assert cfg.data.forget.path == str(tmp_path / "forget.jsonl")
    assert cfg.data.retain.path == str(tmp_path / "retain.csv") and cfg.data.retain.limit == 5
    assert (cfg.objective.beta, cfg.solve.damping, cfg.data.test) == (0.3, "rel:0.1", None)


def test_resolved_yaml_replays_from_elsewhere(write, tmp_path):
    cfg = load_config(write(GOOD), {"model.revision": "1e10", "solve.damping": "1e-3"})
    other = tmp_path / "sub"
    other.mkdir()
    (other / "config.resolved.yaml").write_text(cfg.to_yaml())
    again = load_config(other / "config.resolved.yaml")
    assert again == cfg and again.model.revision == "1e10" and again.solve.damping == 1e-3


@pytest.mark.parametrize(
    "solve",
    [
        "{damping: auto}",
        "{method: minres, curvature: hessian, damping: 'auto:0.5', precond: jacobi}",
        "{method: cg, precond: 'nystrom:64'}",
        "{method: woodbury, curvature: fisher}",
        "{method: datainf, curvature: fisher}",
        "{method: ekfac}",
        "{method: neumann, precond: ekfac}",
    ],
)
def test_solvers_that_can_be_configured(write, solve):
    assert load_config(write(GOOD + f"\nsolve: {solve}\n")).solve.method


@pytest.mark.parametrize(
    "solve, message",
    [
        ("{method: woodbury}", "solve.curvature: 'ggn', wanted fisher, which .* woodbury needs"),
        ("{method: ekfac, precond: jacobi}", "solve.precond: 'jacobi', wanted none beside .*ekfac"),
        ("{precond: 'nystrom:0'}", "solve.precond: 'nystrom:0', wanted none, jacobi, kfac, ekfac"),
        ("{damping: 'auto:x'}", "solve.damping: 'auto:x', wanted a number >= 0, 'auto'"),
        ("{method: newton}", "solve.method: 'newton', wanted one of cg, minres, neumann, woodbury"),
    ],
)
def test_solvers_that_cannot(write, solve, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(GOOD + f"\nsolve: {solve}\n"))


def test_weight_updates_that_can_be_configured_and_one_that_cannot(write):
    chosen = "select: {updates: 3, penalty: l1, penalty_weight: 0.2, update: proximal}"
    found = load_config(write(GOOD + f"\n{chosen}\n")).select
    assert (found.update, found.penalty, found.weight_cap) == ("proximal", "l1", 4.0)
    with pytest.raises(ConfigError, match="select.update: 'proximal', wanted penalty l1 beside it"):
        load_config(write(GOOD + "\nselect: {updates: 3, update: proximal}\n"))


def test_every_fault_at_once_with_the_nearest_name(write):
    path = write(
        """
schema: 2
model: {nmae: x, dtype: float31, trust_remote_code: true}
data:
  forget: {path: ./forgot.jsonl, limit: 0}
  pa: {path: org/set, columns: {prompt: 3}}
  max_tokens: "12"
lora: {r: 1.5, targets: [1]}
solve: {damping: "rel:x", tol: .nan}
unlearn: {lr: 1, lr: yes}
validate: {weights: [0.1, -1]}
slect: {}
"""
    )
    found = faults(lambda: load_config(path))
    by_path = {f.split(": ")[0]: f for f in found}
    assert len(found) == 18, "\n".join(found)
    assert "nearest 'name'" in by_path["model.nmae"]
    assert "nearest 'float32'" in by_path["model.dtype"]
    assert "pinned model.revision" in by_path["model.trust_remote_code"]
    assert "nearest 'forget.jsonl'" in by_path["data.forget.path"]
    assert by_path["data.forget.limit"].endswith("0, wanted greater than or equal to 1")
    assert "'12'" in by_path["data.max_tokens"] and "integer" in by_path["data.max_tokens"]
    assert "missing" in by_path["data.retain"] and "path" in by_path["data.retain"]
    assert "finite" in by_path["solve.tol"] and "'rel:0.1'" in by_path["solve.damping"]
    assert "nearest 'select'" in by_path["slect"]
    assert by_path["validate.weights.1"].endswith("-1, wanted greater than 0")
    assert any("line 10: unlearn.lr: duplicate key, first on line 10" == f for f in found)


def test_overrides_are_typed_and_checked(write):
    path = write(GOOD)
    cfg = load_config(
        path,
        {
            "unlearn.lr": "2e-5",
            "lora.targets": "[q_proj, v_proj]",
            "model.revision": "null",
            "data.pa.columns.completion": "answer",
            "run.threads": "2",
            "data.pa.split": "1234",
        },
    )
    assert (cfg.unlearn.lr, cfg.lora.targets) == (2e-5, ["q_proj", "v_proj"])
    assert (cfg.model.revision, cfg.run.threads, cfg.data.pa.split) == (None, 2, "1234")
    assert cfg.data.pa.columns == {"prompt": "question", "completion": "answer"}
    found = faults(lambda: load_config(path, {"unlearn.rl": "1", "select.budget": "many"}))
    assert found == [
        "select.budget: 'many', wanted a valid integer",
        "unlearn.rl: unknown key, wanted one of loss, beta, options, retain_weight, harmonise, "
        "anchor, lr, steps, batch_tokens, batch_rows, retain_rows, optimizer, solver, tol, "
        "max_iter, nearest 'lr'",
    ]
    assert "is not a section" in faults(lambda: load_config(path, {"unlearn.lr.x": "1"}))[0]


def test_override_of_a_shared_anchor_changes_one_place(write):
    text = GOOD.replace("{path: forget.jsonl}", "&s {path: org/x}").replace(
        "{path: ./retain.csv, limit: 5}", "*s"
    )
    cfg = load_config(write(text), {"data.forget.limit": "3"})
    assert (cfg.data.forget.limit, cfg.data.retain.limit) == (3, None)


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    assert "nearest 'run.yaml'" in faults(lambda: load_config(tmp_path / "runn.yaml"))[0]
    assert "empty file" in faults(lambda: load_config(tmp_path / "run.yaml"))[0]
    (tmp_path / "run.yaml").write_bytes(b"a: \xff")
    assert faults(lambda: load_config(tmp_path / "run.yaml")) == ["byte 3: not UTF-8"]
    (tmp_path / "run.yaml").write_text("- 1\n")
    assert "wanted a mapping" in faults(lambda: load_config(tmp_path / "run.yaml", {"a": "1"}))[0]


def test_frozen():
    cfg = make_config(
        {"model": {"name": "m"}, "data": {k: {"path": "d"} for k in ("forget", "pa", "retain")}}
    )
    with pytest.raises(ValueError, match="frozen"):
        cfg.run.seed = 1  # type: ignore[misc]
    assert isinstance(cfg, Config) and cfg.run.seed == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("off", "off"),
        ("on", "on"),
        ("true", True),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("'1e-5'", "1e-5"),
        ("<<", "<<"),
    ],
)
def test_scalars_are_yaml_1_2(text, value):
    data, found = strict_yaml.parse(f"k: {text}")
    assert found == [] and data == {"k": value} and type(data["k"]) is type(value)
    assert strict_yaml.parse(strict_yaml.dump(data)) == (data, [])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: b.c: duplicate key, first on line 3"),
        ("a: !!python/object/apply:os.system [x]", "line 1: a: tag"),
        ("a: !!timestamp 2020-01-01", "line 1: a: tag"),
        ("a: &x [1]\nb: [" + "*x, " * 21 + "]", "line 2: more than 20 aliases"),
        ("[" * 60, "line 1: more than 50 levels"),
        ("a:\n\t- 1", "line 2: while scanning"),
        ("a: 1\n---\nb: 1", "line 2: expected a single document"),
        ("a: !!int x", "line 1: invalid literal"),
        ("? [a]\n: 1", "line 1: : key is a"),
    ],
)
def test_yaml_faults_name_the_line(text, fault):
    _, found = strict_yaml.parse(text)
    assert len(found) >= 1 and found[0].startswith(fault), found


def test_every_field_is_read_somewhere():
    folder = Path(config_module.__file__).parent
    sources = [p.read_text() for p in folder.rglob("*.py") if not p.name.startswith("config")]
    text = "\n".join(sources)

    def leaves(model, path=()):
        for name, field in model.model_fields.items():
            kind = field.annotation
            inner = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
            section = next((k for k in inner if issubclass(k, config_module.Section)), None)
            yield from leaves(section, (*path, name)) if section else [(*path, name)]

    found = {
        ".".join(p) for p in leaves(config_module.Config) if not re.search(rf"\.{p[-1]}\b", text)
    }
    assert found == {"schema_version"}
