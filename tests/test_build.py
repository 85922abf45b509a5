"""The package without its compiled library and without triton, the pure wheel, what the libraries
link against, and the bans of .pre-commit-config.yaml."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import u2a_kernels

ROOT = Path(__file__).parent.parent
ANSWERS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked} or name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path[:] = [f for f in sys.meta_path if {editable} or "Editable" not in str(f)]
sys.meta_path.insert(0, Absent())
import torch, u2a_kernels
assert {where!r} in u2a_kernels.__file__, u2a_kernels.__file__
from u2a_kernels.__main__ import report
from u2a_kernels.testing import assert_within_budget
from cases import all_cases, cast, outputs
served = report()["ops"]
assert {served}, served
for case in all_cases():
    args = case.inputs(case.variants[0], torch.float32)
    exact, plain = (outputs(case.oracle(**a)) for a in (cast(args, torch.float64), args))
    for i, out in enumerate(outputs(case.public(**args))):
        assert_within_budget(out, exact[i], plain[i], f"{{case}} output {{i}}")
    print(case)
"""
NO_CPP = "{who['CPU'] for who in served.values()} == {'reference'}"
NO_TRITON = "all(who['CUDA'] in ('reference', 'CUDA', 'cuBLAS') for who in served.values())"


def python(code: str, *paths: Path, **variables: str) -> str:
    """Runs code in a fresh interpreter whose kernels are not interpreted; its standard output."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def answers(served: str, blocked: set[str], *paths: Path) -> None:
    """Every case of the package found first on `paths`, by default the installed one."""
    where, editable = str(paths[0] if paths else ""), not paths
    code = ANSWERS.format(blocked=blocked, served=served, where=where, editable=editable)
    out = python(code, *paths)
    shared = 6  # five named activations have the cases of dual_glu, some op may have another's
    assert len(out.split()) >= len(u2a_kernels.__all__) - shared


@pytest.mark.parametrize(
    "blocked, served",
    [({"u2a_kernels._C"}, NO_CPP), ({"triton"}, NO_TRITON)],
    ids=["without-C++", "without-triton"],
)
def test_every_op_answers(blocked, served):
    answers(served, blocked)


def test_import_brings_no_model_library():
    banned = {"transformers", "peft", "datasets", "u2a"}
    out = python("import sys, u2a_kernels; print(*{m.split('.')[0] for m in sys.modules})")
    assert not banned & set(out.split())


def test_pure_wheel(tmp_path):
    """U2A_BUILD=none: one wheel for every platform; its ops answer and it holds the app too."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("u2a_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    env = os.environ | {"U2A_BUILD": "none"}
    subprocess.run([*pip, "-w", tmp_path, source], env=env, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "u2a/cli.py").exists() and (site / "u2a_kernels/py.typed").exists()
    assert not any(p.suffix in (".cpp", ".cu", ".so") for p in site.rglob("*"))
    answers(NO_CPP, set(), site)


def test_wrong_build_variable_is_refused():
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"U2A_BUILD": "gpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "U2A_BUILD: want auto, cpu, cuda or none, got 'gpu'" in done.stderr


def library(stem: str) -> Path:
    path = next((ROOT / "u2a_kernels").glob(f"{stem}.*so"), None)
    if path is None:
        pytest.skip(f"{stem} was not built (U2A_BUILD, or no nvcc)")
    return path


@pytest.mark.parametrize("stem", ["_C", "_C_cuda"])
def test_only_the_stable_abi_is_linked(stem):
    """No ATen or c10 symbol: that is what lets one binary serve torch 2.11 and later."""
    out = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", library(stem)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split(" U ", 1)[1] for line in out.splitlines() if " U " in line]
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
    assert [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)] == []


def bans():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [h for repo in config["repos"] for h in repo["hooks"] if h["language"] == "pygrep"]
    return [pytest.param(h, id=h["id"]) for h in hooks]


@pytest.mark.parametrize("hook", bans())
def test_bans(hook):
    files = [p for p in ROOT.rglob("*.py") if re.search(hook["files"], str(p.relative_to(ROOT)))]
    assert files
    for path in files:
        found = re.search(hook["entry"], path.read_text(), re.M)
        assert not found, f"{path.relative_to(ROOT)}: {hook['name']}: {found[0].strip()!r}"
