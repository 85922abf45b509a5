"""The index on disk: what is written, read back, queried, and how damage is met."""

import json

import pytest
import tiny_index
import torch
from safetensors.torch import load_file

import u2a
from u2a.batch import Row
from u2a.errors import CorruptError, DataError, GuardError, MismatchError
from u2a.index import Full, Index, Kronecker, Sketch, features
from u2a.index.store import uid_bytes

SHAPES = tuple((1 + i % 3, 1 + (5 * i) % 7) for i in range(23))


def nll(lp):
    return -lp.mean()


@pytest.fixture(scope="module")
def data():
    return [*tiny_index.rows(SHAPES), Row("f" * 32, (3, 4), ())]


@pytest.fixture(scope="module")
def model():
    return tiny_index.make("llama", torch.float32)


@pytest.fixture
def index(model, data, tmp_path):
    return u2a.scan(
        model, data, loss=nll, mode="index", out=tmp_path / "index", spec=Kronecker(3, 3),
        dtype="float32", shard_rows=10, progress=False,
    )  # fmt: skip


@pytest.fixture
def exact(model, data):
    return features(model, data, nll, Kronecker(3, 3))


def test_rows_come_back_in_order(index, exact, data):
    assert len(index) == len(data) == 24 and index.dim == exact.shape[1]
    assert (index.features() - exact).abs().max() < 1e-6 * exact.abs().max()
    assert torch.allclose(index.norm, exact.norm(dim=1), rtol=1e-6)
    assert index.uid == [uid_bytes(r.uid).hex() for r in data] and index.uid[-1] == "f" * 32
    assert index.flag.tolist() == [1] * 23 + [1 + 4], "the last row has no answer"
    assert index.spec == Kronecker(3, 3)
    assert [s.stop for s, _ in index.blocks()] == [10, 20, 24]


def test_layout_of_the_folder(index):
    names = sorted(p.name for p in index.folder.path.iterdir() if p.name != "LOCK")
    shards = [f"shard-0000{i}.{end}" for i in range(3) for end in ("done", "safetensors")]
    assert names == ["meta.json", *sorted(shards)]
    tensors = load_file(index.folder.path / "shard-00002.safetensors")
    shapes = {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}
    assert shapes == {
        "g": ((4, index.dim), torch.float32),
        "norm": ((4,), torch.float32),
        "uid": ((4, 16), torch.uint8),
        "flag": ((4,), torch.uint8),
    }


@pytest.mark.parametrize("metric", ["dot", "cosine", "preconditioned"])
@pytest.mark.parametrize("block_rows", [3, 8192])
def test_scores_and_top_rows(index, exact, metric, block_rows):
    index.block_rows = block_rows
    f = exact.double()
    q = torch.randn(4, index.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if metric == "dot":
        want = f @ q.T
    elif metric == "cosine":
        unit = torch.nn.functional.normalize
        want = unit(f, dim=1) @ unit(q, dim=1).T
    else:
        moment = f.T @ f / 24
        damped = moment + 0.3 * moment.trace() / min(24, index.dim) * torch.eye(index.dim).double()
        want = f @ torch.linalg.solve(damped, q.T)
    got = index.scores(q, metric, damping="rel:0.3")
    assert got.shape == (24, 4) and (got - want).abs().max() < 2e-5 * want.abs().max()
    one = index.scores(q[0], metric, damping="rel:0.3")
    torch.testing.assert_close(one, got[:, 0], rtol=1e-4, atol=1e-6)
    values, rows = index.topk(q, 5, metric, damping="rel:0.3")
    assert torch.equal(rows, got.T.argsort(dim=1, descending=True, stable=True)[:, :5])
    assert torch.equal(values, got.T.gather(1, rows))
    assert index.topk(q[1], 1, metric, damping="rel:0.3")[1].tolist() == rows[1, :1].tolist()


@pytest.mark.parametrize("dtype, bound", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_store(model, data, exact, tmp_path, dtype, bound):
    """Unit length in the store: neither large nor small gradients leave the range of 16 bits."""
    scaled = lambda lp: nll(lp) * 1e7  # noqa: E731
    got = u2a.scan(
        model, data, loss=scaled, mode="index", out=tmp_path / "i", spec=Kronecker(3, 3),
        dtype=dtype, progress=False,
    )  # fmt: skip
    error = (got.features() / 1e7 - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-9)
    assert error[:-1].max() < bound and error[-1] == 0


def test_a_bad_row_is_flagged_alone_and_never_scored(model, data, exact, tmp_path):
    bad = 7
    loss = lambda lp: torch.where(torch.arange(len(lp.count)) == 0, nll(lp) * torch.nan, nll(lp))  # noqa: E731
    alone = u2a.scan(
        model, [data[bad], *data[:5]], loss=loss, mode="index", out=tmp_path / "i",
        spec=Kronecker(3, 3), dtype="float32", batch_tokens=1, progress=False,
    )  # fmt: skip
    assert alone.flag.tolist() == [3] * 6, "with one row a batch each is the first"
    poisoned = lambda lp: nll(lp) * torch.where(lp.index == bad, torch.nan, 1.0)  # noqa: E731
    got = u2a.scan(
        model, data, loss=poisoned, mode="index", out=tmp_path / "j", spec=Kronecker(3, 3),
        dtype="float32", progress=False,
    )  # fmt: skip
    assert got.flag.tolist() == [3 if i == bad else 1 for i in range(23)] + [5]
    others = torch.arange(24) != bad
    q = exact[0]
    assert torch.equal(got.features()[others], Index(got.folder.path).features()[others])
    assert (got.features()[others] - exact[others]).abs().max() < 1e-6 * exact.abs().max()
    assert torch.isnan(got.scores(q)[bad]) and got.scores(q)[others].isfinite().all()
    assert bad not in got.topk(q, 23)[1].tolist()
    assert got.scores(q, "preconditioned")[others].isfinite().all()


def test_spec_of_every_kind_is_read_back(model, data, tmp_path):
    specs = [Sketch(32, seed=3), Sketch(16, kind="sjlt"), Kronecker(2, 4, seed=9), Full()]
    for i, spec in enumerate(specs):
        got = u2a.scan(
            model, data[:3], loss=nll, mode="index", out=tmp_path / str(i), spec=spec,
            exclude=["*embed*", "lm_head*"], progress=False,
        )  # fmt: skip
        assert got.spec == spec
        assert not any("embed" in name or "lm_head" in name for name in got.layout)


def test_damage_is_met_by_name(index, tmp_path):
    folder = index.folder.path
    shard, done = folder / "shard-00001.safetensors", folder / "shard-00001.done"
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[-40] ^= 1
    for damaged in (bytes(flipped), good[:-1], good + b"x", b""):
        shard.write_bytes(damaged)
        with pytest.raises(CorruptError, match="shard-00001.safetensors"):
            Index(folder)
    shard.unlink()
    with pytest.raises(CorruptError, match="shard-00001 is missing"):
        Index(folder)
    shard.write_bytes(good)
    Index(folder)
    marker = done.read_bytes()
    for damaged in (marker[:20], b"{}"):
        done.write_bytes(damaged)
        with pytest.raises(CorruptError, match="shard-00001"):
            Index(folder)
    done.write_bytes(marker)
    other = folder / "shard-00000.safetensors"
    first = other.read_bytes()
    other.write_bytes(good)
    with pytest.raises(CorruptError, match="shard-00000"):
        Index(folder)
    other.write_bytes(first)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"rows": 99}))
    with pytest.raises(CorruptError, match="24 rows in shards, 99 in meta.json"):
        Index(folder)
    (folder / "meta.json").write_text(json.dumps(meta | {"schema": 9}))
    with pytest.raises(DataError, match="schema 9"):
        Index(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match="no finished index"):
        Index(folder)


def test_refusals(index, model, data, tmp_path):
    folder = index.folder.path
    options = dict(loss=nll, mode="index", progress=False)
    with pytest.raises(MismatchError, match="already holds an index"):
        u2a.scan(model, data, out=folder, **options)
    with pytest.raises(ValueError, match="needs out"):
        u2a.scan(model, data, **options)
    with pytest.raises(ValueError, match="takes no direction"):
        u2a.scan(model, data, {}, out=tmp_path / "x", **options)
    with pytest.raises(ValueError, match="dtype must be one of"):
        u2a.scan(model, data, out=tmp_path / "x", dtype="int8", **options)
    with pytest.raises(ValueError, match="mode must be 'exact' or 'index'"):
        u2a.scan(model, data, loss=nll, mode="both")
    with pytest.raises(TypeError, match="out belong to mode='index'"):
        u2a.scan(model, data, {}, nll, out=folder)
    q = torch.zeros(index.dim)
    with pytest.raises(ValueError, match="metric must be one of"):
        index.scores(q, "euclid")
    with pytest.raises(ValueError, match="dim = "):
        index.scores(q[1:])
    with pytest.raises(ValueError, match="k must be from 1 to n = 24, got 25"):
        index.topk(q, 25)
    with pytest.raises(ValueError, match="damping must be"):
        index.scores(q, "preconditioned", damping=0.0)


def test_a_fresh_adapter_indexed_by_a_alone_is_refused(data, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_index.make("llama", torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    options = dict(loss=nll, mode="index", progress=False, spec=Full())
    with pytest.raises(GuardError, match=r"fresh LoRA \(B = 0\)"):
        u2a.scan(model, data, out=tmp_path / "a", exclude=["*lora_B*"], **options)
    assert not list((tmp_path / "a").glob("*.safetensors")) + list((tmp_path / "a").glob("meta*"))
    both = u2a.scan(model, data, out=tmp_path / "b", **options)
    assert both.norm[:-1].min() > 0
