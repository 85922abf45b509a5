"""Linearised products against the stacked ones, which double backward checks elsewhere."""

import sys

import pytest
import torch
from test_products import CASES, IDS, REF, WEIGHTS, nll, npo, oracle_hvp
from tiny_models import checkpointed, direction, make, relative, rows, two_batches

from u2a.batch import collate
from u2a.curvature import EmpiricalFisher, GaussNewton, Hessian
from u2a.dual import dual
from u2a.dual_modules import UnsupportedModel
from u2a.dual_table import TABLE
from u2a.linearize import attention as attention_module
from u2a.linearize import head as head_module
from u2a.linearize import linearize
from u2a.linearize.table import TWINS
from u2a.products import ggnvp, hvp, jvp_scores
from u2a.solve import solve
from u2a.tree import dot, norm, trainable

STACKED = {"ggn": ggnvp, "hvp": hvp}
ROUNDING = 1e-12


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
def test_products_equal_the_stacked_ones(family, lora):
    model, batches = make(family, lora), two_batches()
    vs = [direction(model, s) for s in (1, 2, 3)]
    for mode, stacked in STACKED.items():
        for loss, w in ((nll, None), (npo, WEIGHTS)):
            lin = linearize(model, batches, loss, weights=w, ref=REF, mode=mode)
            want = [stacked(model, batches, loss, v, weights=w, ref=REF) for v in vs]
            for got, right in zip(lin.matmat(vs), want, strict=True):
                assert relative(got, right) < ROUNDING
            assert relative(lin.matvec(vs[1]), want[1]) < ROUNDING
            quadratics = [dot(v, right).item() for v, right in zip(vs, want, strict=True)]
            scale = max(map(abs, quadratics))
            assert lin.quadratics(vs) == pytest.approx(quadratics, abs=ROUNDING * scale)
    assert all(p.grad is None for p in model.parameters())


def test_against_double_backward():
    model, batches, v = make("llama-tied"), two_batches(), direction(make("llama-tied"), 1)
    got = linearize(model, batches, npo, weights=WEIGHTS, ref=REF, mode="hvp").matvec(v)
    assert relative(got, oracle_hvp(model, batches, npo, v, WEIGHTS)) < 1e-8


@pytest.mark.parametrize("family", ["llama-tied", "phi"])
@pytest.mark.parametrize("mode", ["ggn", "hvp"])
def test_a_head_in_pieces(family, mode, monkeypatch):
    """No probabilities held, 16 of 18 tokens at a time; seven directions in sweeps of three."""
    model, batches = make(family), [collate(rows()), *two_batches()]
    monkeypatch.setattr(head_module, "HELD", 0)
    monkeypatch.setitem(head_module.LOGITS, "cpu", 1)
    monkeypatch.setitem(sys.modules["u2a.linearize"].TOGETHER, "cpu", 3)
    vs = [direction(model, s) for s in range(7)]
    lin = linearize(model, batches, npo, ref=REF, mode=mode)
    for got, v in zip(lin.matmat(vs), vs, strict=True):
        assert relative(got, STACKED[mode](model, batches, npo, v, ref=REF)) < ROUNDING


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "stacked"])
def test_attention_in_pieces(family, held, monkeypatch):
    """Two queries and one key head at a time; and the dual kernel where P is not held."""
    model, batches = make(family), two_batches()
    monkeypatch.setattr(attention_module, "QUERIES", 2)
    monkeypatch.setattr(attention_module, "SCORES", 1)
    if not held:
        monkeypatch.setattr(attention_module, "HELD", 0)
    vs = [direction(model, s) for s in (1, 2)]
    for mode, stacked in STACKED.items():
        lin = linearize(model, batches, npo, ref=REF, mode=mode)
        kinds = {type(op) for h in lin._held for op in h.calls}
        assert (attention_module.Attention in kinds) == held
        for got, v in zip(lin.matmat(vs), vs, strict=True):
            assert relative(got, stacked(model, batches, npo, v, ref=REF)) < ROUNDING
        assert lin.quadratics(vs[:1])[0] == pytest.approx(
            dot(vs[0], lin.matvec(vs[0])).item(), rel=1e-9
        )


def test_every_module_kind_of_the_dual_table_has_a_sweep():
    assert {getattr(h, "func", h) for h in TABLE.values()} <= TWINS.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_training_mode_and_checkpointing_change_nothing(family):
    model, batches, v = make(family), two_batches(), direction(make(family), 1)
    want = linearize(model, batches, nll, mode="hvp").matvec(v)
    checkpointed(model)
    lin = linearize(model, batches, nll, mode="hvp")
    assert relative(lin.matvec(v), want) == 0
    model.eval()
    assert relative(lin.matvec(v), want) == 0
    assert not any("training" in vars(m) and vars(m)["training"] for m in model.modules())


def test_the_model_is_put_back():
    model, batches, v = make("gemma2", lora=True), two_batches(), direction(make("gemma2", True), 1)
    before = [dict(vars(m)) for m in model.modules()]
    implementation = model.config._attn_implementation
    lin = linearize(model, batches, nll, mode="hvp")
    lin.matvec(v)
    want = jvp_scores(model, batches, nll, v)
    assert [dict(vars(m)) for m in model.modules()] == before
    assert model.config._attn_implementation == implementation
    with dual(model, v), pytest.raises(RuntimeError, match="inside u2a.dual"):
        lin.matvec(v)
    assert torch.equal(jvp_scores(model, batches, nll, v), want)


def test_changed_parameters_are_refused():
    model, batches, v = make("llama", lora=True), two_batches(), direction(make("llama", True), 1)
    lin = linearize(model, batches, nll)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad).mul_(1.5)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        lin.matvec(v)


def test_partial_and_wrong_directions():
    model, batches, v = make("llama", lora=True), two_batches(), direction(make("llama", True), 1)
    lin = linearize(model, batches, nll, mode="hvp")
    name, t = next(iter(v.items()))
    assert relative(lin.matvec({name: t}), hvp(model, batches, nll, {name: t})) < ROUNDING
    with pytest.raises(ValueError, match="'nothing' is no trainable parameter"):
        lin.matvec({"nothing": t})
    with pytest.raises(ValueError, match="must be like its parameter"):
        lin.matvec({name: t.float()})
    with pytest.raises(ValueError, match="mode must be"):
        linearize(model, batches, nll, mode="jvp")
    model.get_base_model().lm_head = torch.nn.Identity()
    with pytest.raises(UnsupportedModel):
        linearize(model, batches, nll)


def test_one_trainable_part():
    """A head alone, and a last norm alone: everything before is constant."""
    for keep in ("lm_head.weight", "model.norm.weight"):
        model, batches = make("llama"), two_batches()
        for name, p in model.named_parameters():
            p.requires_grad_(name == keep)
        v = direction(model, 1)
        for mode, stacked in STACKED.items():
            got = linearize(model, batches, npo, ref=REF, mode=mode).matvec(v)
            want = stacked(model, batches, npo, v, ref=REF)
            assert relative(got, want) < ROUNDING and norm(want) > 1e-3


def test_twice_the_same_bits():
    model, batches, v = make("mixtral"), two_batches(), direction(make("mixtral"), 1)
    for mode in STACKED:
        lin = linearize(model, batches, nll, mode=mode)
        a, b = lin.matvec(v), lin.matvec(v)
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family, lora", [("llama", True), ("gemma2", False), ("qwen2_moe", False)])
def test_in_bfloat16(family, lora):
    """As near to float64 as the stacked product is."""
    model, batches = make(family, lora).to(torch.bfloat16), two_batches()
    exact = make(family, lora)
    exact.load_state_dict(model.state_dict())
    v = direction(model, 1)
    wide = {n: t.double() for n, t in v.items()}

    def error(tree, want):
        gap = {n: t.double() - want[n] for n, t in tree.items()}
        return (norm(gap) / norm(want)).item()

    for mode, stacked in STACKED.items():
        want = stacked(exact, batches, nll, wide)
        got = error(linearize(model, batches, nll, mode=mode).matvec(v), want)
        assert got < 1.5 * error(stacked(model, batches, nll, v), want) + 1e-3


def test_a_narrow_head_in_tiles():
    """A bfloat16 weight is widened some rows at a time."""
    model, batches = make("phi").to(torch.bfloat16), two_batches()
    v = direction(model, 1)
    for mode in STACKED:
        want = linearize(model, batches, nll, mode=mode).matvec(v)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head_module, "TILE", 7)
            got = linearize(model, batches, nll, mode=mode).matvec(v)
        gap = {n: t.double() - want[n].double() for n, t in got.items()}
        assert norm(gap) < 0.02 * norm(want)


def test_held_bytes():
    model, batches = make("llama", lora=True), two_batches()
    ggn, full = (linearize(model, batches, nll, mode=m).nbytes for m in ("ggn", "hvp"))
    hidden = sum(b.ids.numel() for b in batches) * 16 * 8
    assert 10 * hidden < ggn < full < 200 * hidden


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_operators(kind):
    model, batches = make("llama", lora=True), two_batches()
    plain, lin = (
        kind(model, batches, npo, weights=WEIGHTS, ref=REF, linearize=x) for x in (False, True)
    )
    vs = [direction(model, s) for s in (1, 2)]
    for a, b in zip(plain.matmat(vs), lin.matmat(vs), strict=True):
        assert relative(b, a) < ROUNDING
    assert lin.quadratic(vs[0]) == pytest.approx(plain.quadratic(vs[0]), rel=1e-9)
    assert lin.mean_eigenvalue() == pytest.approx(plain.mean_eigenvalue(), rel=1e-9)
    part, same = (op.sampled(3, seed=1) for op in (plain, lin))
    assert same.linearize and relative(same.matvec(vs[0]), part.matvec(vs[0])) < ROUNDING
    drawn, again = (op.stream(2).matvec(vs[0]) for op in (plain, lin))
    assert relative(again, drawn) == 0
    held = lin.held()
    lin.release()
    assert lin.held() is not held


def test_solve_with_several_right_hand_sides():
    model, batches = make("llama", lora=True), two_batches()
    rhs = [direction(model, s) for s in (1, 2)]
    found = []
    for lin in (False, True):
        op = GaussNewton(model, batches, nll, linearize=lin)
        found.append(solve(op, rhs, damping=0.5, tol=1e-8))
    for a, b in zip(*found, strict=True):
        assert b.residual < 1e-7 and relative(b.x, a.x) < 1e-7 and a.iterations == b.iterations


def test_the_fisher_takes_none():
    model = make("llama", lora=True)
    with pytest.raises(ValueError, match="linearize goes with GaussNewton and Hessian"):
        EmpiricalFisher(model, two_batches(), nll, linearize=True)
    assert trainable(model)
