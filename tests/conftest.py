"""Interpreter switch (before triton is first imported), quiet threads, NaN-poisoned allocations."""

import json
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HAS_CUDA = os.path.exists("/dev/nvidiactl")
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and friends return NaN (integers: max), in Python and in the C++ kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    return write
