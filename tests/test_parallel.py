"""DDP and FSDP2 on two processes: the numbers of one process with all rows.

One pair of processes does everything and leaves its results in a folder.
"""

import datetime
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_products import REF, WEIGHTS, npo
from tiny_models import checkpointed, direction, make, relative, rows
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import u2a
from u2a.batch import collate
from u2a.curvature import EmpiricalFisher
from u2a.curvature.base import Curvature
from u2a.dual import UnsupportedModel
from u2a.parallel import is_parallel, placed_like, whole
from u2a.products import quadratic
from u2a.tree import trainable

SECONDS = 300
CASES = {
    "ddp": ("gpt2", True),
    "fsdp": ("llama", False),
    "fsdp-tied": ("gpt2", False),
    "fsdp-lora": ("llama", True),
    "fsdp-capped": ("gemma2", True),
    "fsdp-checkpointed": ("llama", False),
}
PARTS = [[[3, 0], [4]], [[2], [1]]]  # row numbers by rank and batch: 3 rows and 2


def batches(ranks):
    all_rows = rows()
    return [collate([all_rows[i] for i in b], b) for rank in ranks for b in PARTS[rank]]


def sharded(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.transformer.h if hasattr(base, "transformer") else base.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def wrapped(case):
    model = make(*CASES[case])
    if "checkpointed" in case:
        checkpointed(model)
    return DistributedDataParallel(model) if case.startswith("ddp") else sharded(model)


def products(model, v, found):
    """Everything that sums over all rows, and the scores of the rows in `found`."""
    args, options = (model, found, npo), dict(weights=WEIGHTS, ref=REF)
    g = u2a.gradient(*args, **options)
    curvature = u2a.GaussNewton(*args, ref=REF, probes=2)
    # one process deals its batches into groups, ranks do not
    mean = Curvature.mean_eigenvalue(curvature)
    if is_parallel(model):
        assert curvature.mean_eigenvalue() == mean
    return {
        "mean eigenvalue": {"": torch.tensor([mean], dtype=torch.float64)},
        "gradient": g,
        "hvp": u2a.hvp(*args, v, **options),
        "ggnvp": u2a.ggnvp(*args, v, ref=REF),
        "quadratic": {"": torch.tensor([quadratic(*args, v, **options)], dtype=torch.float64)},
        "solve": u2a.solve(curvature, g, damping=mean / 2, tol=1e-10, max_iter=4).x,
        "scores": {"": u2a.jvp_scores(*args, v, ref=REF)},
        "scan": {"": u2a.scan(model, found, v, npo, ref=REF, progress=False).gain},
    }


def raised(f, *args):
    try:
        f(*args)
    except (ValueError, UnsupportedModel) as error:
        return str(error)
    return ""


def one_case(case, rank):
    v = direction(make(*CASES[case]), 1)
    model = wrapped(case)
    params = trainable(model)
    if case != "fsdp":  # whole directions do as well
        v = {n: placed_like(t, params[n]) for n, t in v.items()}
    mark = torch.zeros_like(next(iter(params.values())))
    next(iter(params.values())).grad = mark
    found = products(model, v, batches([rank]))
    assert next(iter(trainable(model).values())).grad is mark
    found = {k: {n: whole(t) for n, t in tree.items()} for k, tree in found.items()}
    found["linearize"] = raised(u2a.linearize, model, batches([rank]), npo)
    fisher = EmpiricalFisher(model, batches([rank]), npo, ref=REF)
    found["fisher"] = raised(fisher.matvec, v)
    found["unequal"] = raised(
        u2a.jvp_scores, model, batches([rank])[rank:], lambda lp: lp.mean(), v
    )
    if case == "fsdp-tied":
        found["trained"] = trained(model, rank)
    return found


def trained(model, rank):
    """A step's gradient by torch alone, after all of the above."""
    for p in model.parameters():
        p.grad = None
    u2a.answer_logps(model, batches([rank])[0]).logp.sum().backward()
    return {n: whole(p.grad) for n, p in model.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=120), 2, rank
    )
    torch.save({case: one_case(case, rank) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(work, (str(folder),), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"no result after {SECONDS} s"
    finally:
        for p in processes.processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_products_of_two_ranks(case, results):
    model = make(*CASES[case])
    want = products(model, direction(model, 1), batches([0, 1]))
    own = [[0, 3, 4], [1, 2]]
    for rank in range(2):
        got = results[rank][case]
        for name in ("gradient", "hvp", "ggnvp", "quadratic", "mean eigenvalue"):
            assert relative(got[name], want[name]) < 1e-11, name
        assert relative(got["solve"], want["solve"]) < 1e-9
        for name in ("scores", "scan"):
            torch.testing.assert_close(got[name][""], want[name][""][own[rank]], rtol=1e-11, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(case, results):
    for rank in range(2):
        got = results[rank][case]
        kind = "DistributedDataParallel" if case.startswith("ddp") else "sharded by FSDP2"
        for name in ("linearize", "fisher"):
            assert f"{kind}, which this does not support; see u2a.parallel" in got[name]
        if case.startswith("ddp"):
            assert got["unequal"] == ""
        else:
            assert f"got {2 - rank} on this one, 1.5 in the mean" in got["unequal"]


def test_training_goes_on(results):
    model = make(*CASES["fsdp-tied"])
    for found in batches([0])[0], batches([1])[0]:
        u2a.answer_logps(model, found).logp.sum().backward()
    want = {n: p.grad / 2 for n, p in model.named_parameters()}  # FSDP2 takes the mean over ranks
    for rank in range(2):
        assert relative(results[rank]["fsdp-tied"]["trained"], want) < 1e-12
