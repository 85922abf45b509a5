"""Tangents, Hessian and Gauss-Newton products against float64 double backward on real HF models."""

import pytest
import torch
from tiny_models import (
    FAMILIES,
    checkpointed,
    direction,
    make,
    oracle_logits,
    oracle_logps,
    plain,
    relative,
    rows,
    two_batches,
)
from torch.autograd import grad

from u2a.batch import collate
from u2a.losses import LOSSES
from u2a.products import (
    answer_logps,
    dual_answer_logps,
    ggnvp,
    gradient,
    hvp,
    jvp_scores,
    quadratic,
)
from u2a.tree import dot, norm, trainable

TIGHT = 1e-8
REF = torch.tensor([-9.0, -4.0, -3.0, -11.0, -14.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.3], dtype=torch.float64)
CASES = [(f, lora) for f in FAMILIES for lora in (False, True)]
IDS = [f"{f}-{'lora' if lora else 'full'}" for f, lora in CASES]


def nll(lp):
    return -lp.mean()


def npo(lp):
    """Nonlinear in the log-probabilities: its Hessian has an outer-product term."""
    return 2 / 0.3 * torch.nn.functional.softplus(0.3 * (lp.sequence() - lp.ref))


def oracle_loss(model, batches, loss, weights):
    total = 0.0
    for b in batches:
        total = total + (loss(oracle_logps(model, b, REF[b.index])) * weights[b.index]).sum()
    return total


def oracle_gradient(model, batches, loss, weights, create_graph=False):
    params = trainable(model)
    total = oracle_loss(model, batches, loss, weights)
    found = grad(total, list(params.values()), create_graph=create_graph, allow_unused=True)
    zero = (
        torch.zeros_like(p) if g is None else g for g, p in zip(found, params.values(), strict=True)
    )
    return dict(zip(params, zero, strict=True))


def oracle_hvp(model, batches, loss, v, weights):
    params = trainable(model)
    g = oracle_gradient(model, batches, loss, weights, create_graph=True)
    along = sum((g[n] * v[n]).sum() for n in params)
    found = grad(along, list(params.values()), allow_unused=True)
    zero = (
        torch.zeros_like(p) if h is None else h for h, p in zip(found, params.values(), strict=True)
    )
    return dict(zip(params, zero, strict=True))


def oracle_ggnvp(model, batches, loss, v, weights):
    """sum_t |dL/dlogp_t| J_t' (diag p - p p') J_t v; J v by differentiating u -> J'u."""
    params = trainable(model)
    out = {n: torch.zeros_like(p) for n, p in params.items()}
    for b in batches:
        lp = oracle_logps(model, b, REF[b.index])
        leaf = lp.logp.detach().requires_grad_()
        token = grad((loss(lp.with_logp(leaf)) * weights[b.index]).sum(), leaf)[0].abs()
        z, _, _ = oracle_logits(model, b)
        dummy = torch.zeros_like(z, requires_grad=True)
        pulled = grad(z, list(params.values()), dummy, create_graph=True, allow_unused=True)
        pairs = zip(params, pulled, strict=True)
        z_t = grad(sum((g * v[n]).sum() for n, g in pairs if g is not None), dummy)[0]
        p = torch.softmax(z.detach(), -1)
        u = p * (z_t - (p * z_t).sum(-1, keepdim=True)) * token[:, None]
        z, _, _ = oracle_logits(model, b)
        for n, g in zip(params, grad(z, list(params.values()), u, allow_unused=True), strict=True):
            out[n] += 0 if g is None else g
    return out


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
def test_products_equal_double_backward(family, lora):
    model, batches = make(family, lora), two_batches()
    v = direction(model, 1)
    for loss, w in ((nll, None), (npo, WEIGHTS)):
        weights = torch.full((5,), 0.2, dtype=torch.float64) if w is None else w
        args = (model, batches, loss)
        with plain(model):  # theirs rounds to float32 inside RMSNorm
            g = gradient(*args, weights=w, ref=REF)
        assert relative(g, oracle_gradient(*args, weights)) < TIGHT
        h = hvp(*args, v, weights=w, ref=REF)
        assert relative(h, oracle_hvp(*args, v, weights)) < TIGHT
        assert norm(h) > 1e-2
        c = ggnvp(*args, v, weights=w, ref=REF)
        assert relative(c, oracle_ggnvp(*args, v, weights)) < TIGHT
        vgv = quadratic(*args, v, weights=w, ref=REF)
        assert vgv == pytest.approx(dot(v, c).item(), rel=TIGHT) and vgv > 0


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
@pytest.mark.parametrize("loss", [nll, npo])
def test_scores_equal_a_loop_of_gradients(family, lora, loss):
    model, batches = make(family, lora), two_batches()
    v = direction(model, 2)
    got = jvp_scores(model, batches, loss, v, ref=REF)
    one = torch.eye(5, dtype=torch.float64)
    want = torch.stack([dot(oracle_gradient(model, batches, loss, one[i]), v) for i in range(5)])
    assert (got - want).norm() / want.norm() < TIGHT
    assert not got.requires_grad


@pytest.mark.parametrize(
    "family, lora",
    [("llama", False), ("llama", True), ("gpt2", True), ("gemma2", False), ("opt", True),
     ("qwen2_moe", False)],
)  # fmt: skip
def test_under_activation_checkpointing(family, lora):
    model, batches = make(family, lora), two_batches()
    v = direction(model, 1)
    want = [f(model, batches, npo, v, ref=REF) for f in (hvp, ggnvp)]
    want_scores = jvp_scores(model, batches, npo, v, ref=REF)
    checkpointed(model)
    calls = []
    first = next(m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func"))
    inner = first._gradient_checkpointing_func
    for m in model.modules():
        if hasattr(m, "_gradient_checkpointing_func"):
            m._gradient_checkpointing_func = lambda *a, **k: calls.append(1) or inner(*a, **k)
    for f, w in zip((hvp, ggnvp), want, strict=True):
        assert relative(f(model, batches, npo, v, ref=REF), w) < 1e-12
    assert len(calls) == 2 * 2 * len(batches)
    assert torch.equal(jvp_scores(model, batches, npo, v, ref=REF), want_scores)


@pytest.mark.parametrize("family, lora", CASES, ids=IDS)
def test_symmetry(family, lora):
    model, batches = make(family, lora), two_batches()
    u, v = direction(model, 3), direction(model, 4)
    for f in (hvp, ggnvp):
        hv, hu = (f(model, batches, npo, x, ref=REF) for x in (v, u))
        assert abs(dot(u, hv) - dot(v, hu)) < 1e-9 * norm(u) * norm(hv)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_logps_equal_the_model_itself(family):
    model, batch = make(family), two_batches()[0]
    model.config._experts_implementation = "eager"  # their grouped kernel takes no float64
    with torch.no_grad():
        logits = model(input_ids=batch.ids, use_cache=False).logits
    row, t = batch.answer.nonzero(as_tuple=True)
    want = torch.log_softmax(logits[row, t - 1], -1).gather(1, batch.ids[row, t, None])[:, 0]
    got, (dual, _, _) = answer_logps(model, batch), dual_answer_logps(model, batch, {})
    # Hugging Face's RMSNorm, softmax and router run in float32 inside.
    assert (got.logp - want).abs().max() < 1e-5
    assert (dual.logp - want).abs().max() < 1e-5
    assert torch.equal(got.row, row) and torch.equal(got.count, batch.answer.sum(1))
    got.sequence().sum().backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0


def test_dual_answer_logps():
    model, batch = make("qwen2"), two_batches()[0]
    v = direction(model, 1)
    lp, logp_t, curvature = dual_answer_logps(model, batch, v)
    with torch.no_grad():
        want = oracle_logps(model, batch).logp
    assert (lp.logp - want).abs().max() < 1e-10
    scores = jvp_scores(model, [batch], lambda lp: lp.sequence(), v)
    order = batch.index.argsort()
    assert torch.allclose(lp.with_logp(logp_t).sequence()[order], scores, rtol=1e-12)
    assert (curvature > 0).all()


@pytest.mark.parametrize("family", ["gemma2", "phi", "mixtral", "qwen2_moe"])
def test_in_float32(family):
    """The grouped kernel of the experts takes no float64."""
    model, batches = make(family).float(), two_batches()
    exact, v = make(family).float().double(), direction(model, 1)
    wide = {n: t.double() for n, t in v.items()}
    for f in (hvp, ggnvp):
        got = {n: t.double() for n, t in f(model, batches, nll, v).items()}
        assert relative(got, f(exact, batches, nll, wide)) < 2e-5
    got, want = jvp_scores(model, batches, nll, v), jvp_scores(exact, batches, nll, wide)
    assert (got - want).norm() / want.norm() < 2e-5


def test_padding_and_batching_do_not_matter():
    model, all_rows = make("mistral"), rows()
    v = direction(model, 1)
    together = jvp_scores(model, two_batches(), nll, v)
    alone = [jvp_scores(model, collate([r]), nll, v)[0] for r in all_rows]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-11)
    per_batch = [REF[b.index] for b in two_batches()]
    by_index = hvp(model, two_batches(), npo, v, ref=REF)
    assert relative(hvp(model, two_batches(), npo, v, ref=per_batch), by_index) == 0


def test_a_scalar_objective_is_a_mean_over_rows():
    model, batches = make("llama"), two_batches()
    v = direction(model, 1)
    for f in (gradient, hvp, ggnvp):
        args = () if f is gradient else (v,)
        scalar = f(model, batches, lambda lp: nll(lp).mean(), *args)
        assert relative(scalar, f(model, batches, nll, *args)) < 1e-12


def test_rows_without_answer_tokens_give_zero():
    model = make("llama")
    batch = collate(rows(shapes=((3, 0), (2, 2))))
    scores = jvp_scores(model, batch, nll, direction(model, 1))
    assert scores[0] == 0 and scores[1].abs() > 1e-3


def test_wrong_losses_and_batches_are_named():
    model, batches = make("llama"), two_batches()
    v = direction(model, 1)
    with pytest.raises(ValueError, match=r"loss must return \[B\] = \[3\], got \[\]"):
        jvp_scores(model, batches, lambda lp: lp.mean().sum(), v)
    with pytest.raises(ValueError, match=r"loss must return \[B\] = \[3\]"):
        hvp(model, batches, lambda lp: lp.logp, v)
    with pytest.raises(ValueError, match="at least one Batch"):
        gradient(model, [], nll)
    with pytest.raises(ValueError, match="one tensor per batch"):
        gradient(model, batches, npo, ref=[REF])
    with pytest.raises(ValueError, match="ref"):
        gradient(model, batches, LOSSES["npo"])
