"""The features of one data set made on the CPU and on a GPU: the same signs and hashes, values
within the error budget of the features themselves. Skipped without a GPU."""

import pytest
import tiny_index
import torch

from u2a.index import Kronecker, Settings, Sketch, features
from u2a.index.spec import Full

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SPECS = [Full(), Kronecker(3, 2, seed=5), Sketch(512, seed=5), Sketch(512, kind="sjlt")]


def nll(lp):
    return -lp.mean()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: type(s).__name__ + getattr(s, "kind", ""))
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3"])
def test_cpu_and_gpu_agree(family, spec):
    """At most twice as far from float64 as the CPU's own float32 features, plus one rounding."""
    data = tiny_index.rows()
    exact = features(tiny_index.make(family), data, nll, spec)
    model = tiny_index.make(family, torch.float32)
    on_cpu = features(model, data, nll, spec)
    on_gpu = features(model.cuda(), data, nll, spec).cpu()
    own = (on_cpu - exact).norm()
    assert (on_gpu - exact).norm() <= 2 * own + torch.finfo(torch.float32).eps * exact.norm()


def test_no_synchronisation_per_batch():
    model, data = tiny_index.make("llama", torch.float32).cuda(), tiny_index.rows()
    settings = Settings(batch_tokens=10)
    features(model, data, nll, Sketch(512), settings=settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        features(model, data, nll, Sketch(512), settings=settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
