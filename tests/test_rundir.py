"""The run directory: atomic, locked, verified; a test for each way it can be wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from u2a import env
from u2a.errors import CorruptError, DataError, LockError, MismatchError, U2AError
from u2a.rundir import RunDir, file_hash

PRINT = {"solve": {"method": "cg", "tol": 1e-4}, "weights": [0.1, 0.2]}


@pytest.fixture
def run(tmp_path):
    with RunDir(tmp_path / "läufe x") as run:
        yield run


def done(run):
    run.write_atomic("scores/part-00000.parquet", b"12345")
    run.write_jsonl("selection.jsonl", [{"uid": "a", "weight": 0.5}])
    run.mark_done("scan", ["scores", "selection.jsonl"], PRINT)


def test_marker_verifies_files_and_fingerprint(run):
    assert run.is_done("scan", PRINT) is False
    done(run)
    assert run.is_done("scan", PRINT) is True
    marker = run.read_json("scan.done")
    entry = marker["files"]["scores/part-00000.parquet"]
    assert entry == {"bytes": 5, "blake2b": file_hash(run.file("scores/part-00000.parquet"))}
    assert marker["fingerprint"]["solve.tol"] == 1e-4
    assert run.read_jsonl("selection.jsonl") == [{"uid": "a", "weight": 0.5}]


def test_one_flipped_bit_and_a_truncated_file_are_corrupt(run):
    done(run)
    path = run.file("scores/part-00000.parquet")
    was = file_hash(path)
    path.write_bytes(b"12344")
    with pytest.raises(CorruptError, match="part-00000.parquet: blake2b") as caught:
        run.is_done("scan", PRINT)
    assert was in str(caught.value) and file_hash(path) in str(caught.value)
    assert caught.value.exit_code == 7
    path.write_bytes(b"123")
    with pytest.raises(CorruptError, match="3 bytes, expected 5"):
        run.is_done("scan", PRINT)
    path.unlink()
    assert run.is_done("scan", PRINT) is False


def test_other_settings_are_a_mismatch_with_the_keys(run):
    done(run)
    other = {"solve": {"method": "cg", "tol": 1e-3}, "weights": [0.1, 0.2], "new": None}
    with pytest.raises(MismatchError) as caught:
        run.is_done("scan", other)
    lines = str(caught.value).splitlines()[1:]
    assert lines == ["  new: was (none), now None", "  solve.tol: was 0.0001, now 0.001"]
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 5000])
def test_an_unreadable_marker_is_not_done(run, text):
    done(run)
    run.file("scan.done").write_text(text)
    assert run.is_done("scan", PRINT) is False


def test_a_marker_of_a_newer_schema_says_so(run):
    done(run)
    marker = run.read_json("scan.done") | {"schema": 99}
    run.write_json("scan.done", marker)
    with pytest.raises(MismatchError, match="schema 99"):
        run.is_done("scan", PRINT)


def test_a_failed_write_keeps_the_old_file(run, monkeypatch):
    run.write_atomic("a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(U2AError, match="cannot write 3 bytes: No space"):
        run.write_atomic("a.txt", "new")
    assert run.file("a.txt").read_text() == "old"
    assert sorted(p.name for p in run.path.iterdir()) == ["LOCK", "a.txt"]


def test_atomic_dir_replaces_as_a_whole(run):
    for text in ("one", "two"):
        with run.atomic_dir("adapter") as folder:
            (folder / "w").write_text(text)
    with pytest.raises(RuntimeError), run.atomic_dir("adapter") as folder:
        (folder / "w").write_text("three")
        raise RuntimeError
    assert run.file("adapter/w").read_text() == "two"
    assert sorted(p.name for p in run.path.iterdir()) == ["LOCK", "adapter"]


def test_a_kill_between_the_two_renames_loses_no_copy(tmp_path):
    with RunDir(tmp_path) as run:
        with run.atomic_dir("adapter") as folder:
            (folder / "w").write_text("good")
    os.rename(tmp_path / "adapter", tmp_path / ".adapter.u2a-old")
    (tmp_path / ".adapter.u2a-tmp").mkdir()
    (tmp_path / ".b.u2a-tmp").write_text("half")
    with RunDir(tmp_path) as run:
        assert run.file("adapter/w").read_text() == "good"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["LOCK", "adapter"]


HOLD = """
import sys, time
from u2a.rundir import RunDir
with RunDir(sys.argv[1]) as run:
    run.event("start")
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_dead_one_replaced(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=rf"pid {child.pid} on ") as caught, RunDir(tmp_path):
            pass
        assert caught.value.exit_code == 8
        text = (tmp_path / "LOCK").read_text()
        (tmp_path / "LOCK").write_text("")
        with pytest.raises(LockError), RunDir(tmp_path):
            pass
        (tmp_path / "LOCK").write_text(text)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == child.pid
    with RunDir(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "LOCK").exists()


def test_lock_text_decides_where_flock_cannot_see(tmp_path):
    lock = tmp_path / "LOCK"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "start": "then"}))
    with pytest.raises(LockError, match="pid 1 on elsewhere since then"), RunDir(tmp_path):
        pass
    assert json.loads(lock.read_text())["host"] == "elsewhere"
    lock.write_text("not json")
    with RunDir(tmp_path), pytest.raises(LockError), RunDir(tmp_path):
        pass


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "."])
def test_names_may_not_leave_the_directory(run, name):
    with pytest.raises(U2AError, match="outside the run directory"):
        run.write_atomic(name, b"")


def test_a_symlink_may_not_lead_out(run, tmp_path):
    (run.path / "link").symlink_to(tmp_path)
    with pytest.raises(U2AError, match="outside the run directory"):
        run.write_atomic("link/x", b"")


def test_a_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(DataError, match="not usable as a run directory"), RunDir(tmp_path / "f"):
        pass


def test_parquet_and_events(tmp_path):
    columns = {"uid": ["a", "b"], "score": [0.5, -1.0], "finite": [True, True]}
    with RunDir(tmp_path) as run:
        run.write_parquet("scores/part-00000.parquet", columns)
        assert run.read_parquet("scores/part-00000.parquet") == columns
        run.event("stage_start", stage="scan", loss=float("nan"))
        with run.file("events.jsonl").open("a") as f:
            f.write('{"half')
    with RunDir(tmp_path) as run:
        run.event("stage_start", stage="select")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) | {"time": 0} == {
        "time": 0, "event": "stage_start", "stage": "scan", "loss": "nan",
    }  # fmt: skip
    assert lines[1] == '{"half' and json.loads(lines[2])["stage"] == "select"


def test_manifest_has_versions_and_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_value")
    run.write_manifest(seed=3, data={"pa": {"digest": "00"}}, stage="scan")
    text = run.file("manifest.json").read_text()
    found = json.loads(text)
    assert (found["seed"], found["data"]["pa"]["digest"], found["stage"]) == (3, "00", "scan")
    assert found["versions"]["torch"] == env.versions()["versions"]["torch"] is not None
    assert "hf_very_secret_value" not in text and "TOKEN" not in text


DIE = """
import os, sys
from u2a.rundir import RunDir
left = int(sys.argv[2])
def counted(call):
    def wrapped(*args):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args)
    return wrapped
with RunDir(sys.argv[1]) as run:
    for name in ("replace", "rename", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    with run.atomic_dir("adapter") as folder:
        (folder / "w").write_text("new")
    run.write_atomic("metrics.json", "new")
    run.mark_done("stage", ["adapter", "metrics.json"], {"v": 2})
"""


def test_death_at_any_step_leaves_old_or_new_never_a_part(tmp_path):
    """The child dies before its n-th sync or rename, for every n until it gets through."""
    for n in range(40):
        path = tmp_path / str(n)
        with RunDir(path) as run:
            with run.atomic_dir("adapter") as folder:
                (folder / "w").write_text("old")
            run.write_atomic("metrics.json", "old")
        code = subprocess.run([sys.executable, "-c", DIE, str(path), str(n)]).returncode
        with RunDir(path) as run:
            state = (run.file("adapter/w").read_text(), run.file("metrics.json").read_text())
            assert state in {("old", "old"), ("new", "old"), ("new", "new")}
            finished = run.is_done("stage", {"v": 2})
            assert not finished or state == ("new", "new")
            assert finished or code == 9
            left = {p.name for p in path.iterdir()} - {"LOCK", "stage.done"}
            assert left == {"adapter", "metrics.json"}
        if code == 0:
            assert n == 5 + 3 + 3, f"{n} syncs and renames"
            return
    raise AssertionError("never got through")
