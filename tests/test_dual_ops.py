"""What is special about the dual ops: modes, memory, pieces, precision inside, NaN rows."""

import pytest
import torch

import u2a_kernels as u2a
from cases import all_cases, cast, outputs
from u2a_kernels.ops.dual_attention import reference as attention
from u2a_kernels.testing import offsets_of, randn

CASES = {c.name: c for c in all_cases() if c.name.startswith("dual_")}


def leaves(args, names):
    return [args[n].requires_grad_() for n in names if args.get(n) is not None]


MODES = ["dual_attention", "dual_linear", "dual_linear_cross_entropy", "dual_lora_linear"]
MODES += ["dual_softmax"]


@pytest.mark.parametrize("name", MODES)
def test_jvp_is_forward_only(name):
    case = CASES[name]
    args = case.inputs(case.variants[0], torch.float32)
    inputs = leaves(args, case.differentiable)
    out = outputs(case.public(**{**args, "mode": "jvp"}))
    for a, b in zip(out, outputs(case.public(**{**args, "mode": "hvp"})), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=f"{name}: mode='jvp' is forward only"):
        torch.autograd.grad(out[0].sum(), inputs)


ROWWISE = ["dual_attention", "dual_act", "dual_glu", "dual_layer_norm", "dual_rms_norm"]
ROWWISE += ["dual_softmax"]


@pytest.mark.parametrize("name", [*ROWWISE, "dual_linear_cross_entropy"])
def test_narrow_types_are_fp32_inside(name):
    """bf16 in and out is one rounding of the float32 result: the values exactly, by definition."""
    case = CASES[name]
    for variant in case.variants[:3]:
        args = case.inputs(variant, torch.bfloat16)
        wide = cast(args, torch.float32)
        for a, b in zip(outputs(case.public(**args)), outputs(case.public(**wide)), strict=True):
            assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("name", [*ROWWISE, "dual_linear", "dual_lora_linear"])
def test_nan_cotangent_stays_in_its_row(name):
    """Only the row itself goes bad, in the primal half, the tangent half or both."""
    case = CASES[name]
    args = case.inputs(case.variants[0], torch.float32)
    x = args[case.differentiable[0]].requires_grad_()
    out = case.public(**args)
    clean_g, bad_g = torch.ones_like(out), torch.ones_like(out)
    bad_g[0, 0] = float("nan")
    clean, bad = (torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (clean_g, bad_g))
    half = x.shape[0] // 2
    keep = [i for i in range(2 * half) if i % half]
    assert torch.isnan(bad[0]).any() and torch.equal(bad[keep], clean[keep])


def packed_example(lengths):
    n = sum(lengths)
    q = randn(2 * n, 4, 3, seed=1, dtype=torch.float64)
    k, v = (randn(2 * n, 2, 3, seed=s, dtype=torch.float64) for s in (2, 3))
    return q, k, v


def test_packed_segments_equal_separate_batches():
    lengths = [3, 0, 5, 1]
    q, k, v = packed_example(lengths)
    got = u2a.dual_attention(q, k, v, offsets=offsets_of(lengths), window=3).chunk(2)
    for s, e in zip([0, 3, 3, 8], [3, 3, 8, 9], strict=True):
        one = [torch.stack([t.chunk(2)[i][s:e] for i in (0, 1)]).transpose(1, 2) for t in (q, k, v)]
        want = u2a.dual_attention(*one, window=3).transpose(1, 2)
        for half, expected in zip(got, want, strict=True):
            torch.testing.assert_close(half[s:e], expected, rtol=1e-12, atol=1e-13)


def test_nan_stays_in_its_packed_segment():
    q, k, v = packed_example([3, 5, 1])
    clean = u2a.dual_attention(q, k, v, offsets=offsets_of([3, 5, 1]))
    k[4, 0, 0] = float("nan")
    spoiled = u2a.dual_attention(q, k, v, offsets=offsets_of([3, 5, 1]))
    others = [0, 1, 2, 8, 9, 10, 11, 17]
    assert torch.isnan(spoiled).any() and torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("variant", ["grouped", "window-cache-cap", "packed"])
def test_attention_pieces_change_nothing(monkeypatch, variant):
    """One key head of one row at a time gives what everything at once gives."""
    args = CASES["dual_attention"].inputs(variant, torch.float64)
    inputs = leaves(args, ("q", "k", "v"))

    def both():
        out = u2a.dual_attention(**args)
        return out, *torch.autograd.grad((out**2).sum(), inputs)

    want = both()
    monkeypatch.setattr(attention, "PIECE", 1)
    for a, b in zip(both(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_queries_without_keys_give_zeros():
    args = CASES["dual_attention"].inputs("blind", torch.float32)
    inputs = leaves(args, ("q", "k", "v"))
    out = u2a.dual_attention(**args)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not out[:, :, :4].any() and out[:, :, 4:].all()
    assert not grads[0][:, :, :4].any() and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0), (0, 0)])
def test_attention_without_queries_or_keys(causal, queries, keys):
    q = torch.ones(2, 2, queries, 3, requires_grad=True)
    k, v = (torch.ones(2, 1, keys, 3, requires_grad=True) for _ in range(2))
    out = u2a.dual_attention(q, k, v, causal=causal)
    assert out.shape == q.shape and not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))
