"""The command line: quick help, exit codes, messages without traceback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types

import pytest
from typer.testing import CliRunner

from u2a import errors
from u2a.cli import app
from u2a.progress import line, track

HEAVY = ("torch", "transformers", "pydantic", "datasets", "peft", "numpy", "yaml", "pyarrow")


def u2a(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "u2a", *args], capture_output=True, text=True)


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from u2a.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
    assert out.stdout.splitlines()[-1] == "[]", out.stdout + out.stderr
    assert all(name in out.stdout for name in ("demo", "run", "scan", "env"))
    assert best < 0.5, f"--help took {best:.2f} s"


def test_config_faults_exit_2_with_the_nearest_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: org/m}\nunlern: {}\n")
    out = u2a("run", str(path), "--set", "lora.rank=8")
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.splitlines() == [
        f"u2a: {path}: 3 faults",
        "  data: missing, wanted a section (forget, pa, retain, retain_test, validation, test, "
        "alternates, holdout, max_tokens, template, disjoint)",
        "  lora.rank: unknown key, wanted one of r, alpha, targets, train, nearest 'train'",
        "  unlern: unknown key, wanted one of schema, model, data, lora, objective, solve, select, "
        "unlearn, guard, validate, eval, log, run, nearest 'unlearn'",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["run", "x.yaml", "--outt", "y"], "--outt"),
        (["run"], "CONFIG"),
        (["run", "x.yaml", "--set", "lr"], "wanted A.B=C"),
        (["scan", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_bad_commands_exit_2(args, words):
    out = u2a(*args)
    assert out.returncode == 2 and words in out.stderr and "Traceback" not in out.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError(["a: b"]), 2),
        (errors.DataError("x.jsonl: bad", ["x.jsonl:3: NUL byte"]), 3),
        (errors.EnvironmentError_("no GPU"), 4),
        (errors.GuardError("collapse"), 6),
        (errors.CorruptError("flipped"), 7),
        (errors.LockError("held"), 8),
        (errors.MismatchError("other"), 8),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_failure_has_its_exit_code(monkeypatch, tmp_path, error, code):
    def fail(out, seed):
        assert (out, seed) == (tmp_path, 4)
        raise error

    package, module = types.ModuleType("u2a.demo"), types.ModuleType("u2a.demo.app")
    module.demo = fail  # type: ignore[attr-defined]
    package.app = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "u2a.demo", package)
    monkeypatch.setitem(sys.modules, "u2a.demo.app", module)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--seed", "4"])
    assert result.exit_code == code
    assert (str(error) or "interrupted") in result.stderr and result.stdout == ""


def test_several_processes_are_refused(tmp_path):
    args, launched = ["scan", str(tmp_path / "run.yaml")], {"WORLD_SIZE": "2", "RANK": "1"}
    found = CliRunner().invoke(app, args, env=launched)
    assert found.exit_code == 2 and "take one process, got several (torchrun" in found.stderr


def test_env_is_json_and_survives_a_closed_pipe():
    found = json.loads(u2a("env", "--json").stdout)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"] and "kernels" in found
    command = f"{sys.executable} -m u2a env | true"
    out = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in out.stderr


def test_progress_off_a_terminal(capsys):
    assert list(track([[1, 2], [3]], 3, "scan", size=len, every=0.0)) == [[1, 2], [3]]
    err = capsys.readouterr().err.splitlines()
    assert [e.split()[:3] for e in err] == [["scan", f"{n}/3", "ex"] for n in (2, 3, 3)]
    assert "ETA" in err[0] and " in 0:00" in err[2]
    assert line("scan", 120, 400, 2.0, "ex") == "scan  120/400 ex  60.0 ex/s  ETA 0:05"
    assert list(track(iter("ab"), None, "x")) == ["a", "b"]
