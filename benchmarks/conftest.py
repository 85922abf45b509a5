"""Quiet threads before torch is imported; compiled kernels, never the interpreter."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("TRITON_INTERPRET", None)

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="torch threads (default 1)")


@pytest.fixture(autouse=True)
def seeded(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
