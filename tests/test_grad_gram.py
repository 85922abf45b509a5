"""Special about grad_gram: both forms agree, a set with itself, raggedness, bounded scratch."""

import pytest
import torch

import u2a_kernels
from u2a_kernels.ops import grad_gram as op
from u2a_kernels.ops.grad_gram import triton as launchers
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

IMPLEMENTATIONS = {
    "op": torch.ops.u2a.grad_gram.default,
    "reference": op.reference,
    "triton": op.forward_triton,
}
SETS = {
    "ragged": ([0, 1, 1, 0, 37, 1, 0, 5, 1], [18, 1, 0, 0, 3, 1]),
    "one-long": ([300], [1] * 9),
    "long-and-short": ([1, 270, 0, 2], [140, 1, 131]),
    "many-short": ([1, 0, 2] * 30, [1] * 70),
}


def problem(lengths, d_in, d_out, seed=1, dtype=torch.float32):
    n = sum(lengths)
    x, g = (randn(n, d, seed=seed + i, dtype=dtype) for i, d in enumerate((d_in, d_out)))
    return x, g, offsets_of(lengths)


def gradients(x, g, offsets):
    bounds = offsets.tolist()
    pairs = zip(bounds, bounds[1:], strict=False)
    return torch.stack([(g[s:e].T @ x[s:e]).flatten() for s, e in pairs])


def baseline_of(exact, first, second):
    """Torch's own error in fp32, of three plain ways the one that is furthest off."""
    first, second = ([x.float(), g.float(), o] for x, g, o in (first, second))
    ways = [gradients(*first) @ gradients(*second).T]
    ways += [op.reference(*first, *second, False, by_tokens) for by_tokens in (True, False)]
    return max(ways, key=lambda way: (way.double() - exact).abs().max().item())


def exact_of(first, second):
    first, second = (gradients(x.double(), g.double(), o) for x, g, o in (first, second))
    return first @ second.T


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms(name, sets, by_tokens, dtype):
    first, second = (problem(s, 23, 41, i, dtype) for i, s in enumerate(SETS[sets]))
    exact = exact_of(first, second)
    got = IMPLEMENTATIONS[name](*first, *second, False, by_tokens)
    assert_within_budget(got, exact, baseline_of(exact, first, second), name)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("lengths", [[0, 1, 1, 0, 37, 1, 0, 5, 1], [1, 270, 0, 2], [1] * 80])
def test_a_set_with_itself_is_the_general_gram(monkeypatch, name, by_tokens, lengths):
    """Also where strips cut an example in pieces: on CUDA by a scratch of a few dozen tokens."""
    monkeypatch.setattr(launchers, "SCRATCH", 64 * sum(lengths))
    a = problem(lengths, 23, 41)
    exact = exact_of(a, a)
    got = IMPLEMENTATIONS[name](*a, *a, True, by_tokens)
    if name != "reference":
        assert torch.equal(got, got.T)
    assert_within_budget(got, exact, baseline_of(exact, a, a), name)


@pytest.mark.parametrize("by_tokens", [True, False])
def test_small_scratch_gives_the_same(monkeypatch, by_tokens):
    """Many blocks and strips of the Triton launcher, rows and columns both cut."""
    first, second = problem([70, 1, 0, 20], 150, 70), problem([3, 44, 30], 150, 70, 5)
    exact = exact_of(first, second)
    monkeypatch.setattr(launchers, "SCRATCH", 1 << 12)
    got = op.forward_triton(*first, *second, False, by_tokens)
    assert_within_budget(got, exact, baseline_of(exact, first, second))


def test_wide_layers_cut_columns_on_the_cpu():
    """2^21 entries over 600 gradients: fewer than a row of 4000."""
    first, second = problem([1, 0, 2] * 150, 4000, 3), problem([1] * 150, 4000, 3, 5)
    exact = exact_of(first, second)
    got = torch.ops.u2a.grad_gram(*first, *second, False, False)
    assert_within_budget(got, exact, baseline_of(exact, first, second))


def test_same_tensors_are_recognised_and_choose_by_shape(monkeypatch):
    seen = []
    monkeypatch.setattr(op, "_grad_gram", lambda *a: seen.append(a[6:]))
    short, long = problem([2] * 4, 64, 64), problem([200] * 4, 64, 64)
    u2a_kernels.grad_gram(*short, *short)
    u2a_kernels.grad_gram(*long, *long)
    u2a_kernels.grad_gram(*long, long[0].clone(), *long[1:])
    assert seen == [(True, True), (True, False), (False, False)]


def test_the_gradient_of_a_set_with_itself():
    a = problem([5, 0, 17, 1], 13, 7, dtype=torch.float64)
    x, g = (t.clone().requires_grad_() for t in a[:2])
    weight = randn(4, 4, seed=9, dtype=torch.float64)
    got = torch.autograd.grad(
        (u2a_kernels.grad_gram(x, g, a[2], x, g, a[2]) * weight).sum(), (x, g)
    )
    whole = gradients(x, g, a[2])
    want = torch.autograd.grad(((whole @ whole.T) * weight).sum(), (x, g))
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() < 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("by_tokens", [True, False])
def test_threads_give_the_same_bits(by_tokens):
    first, second = problem([300, 1, 0, 40, 200], 65, 33), problem([60] * 9, 65, 33, 5)
    one = torch.ops.u2a.grad_gram(*first, *second, False, by_tokens)
    torch.set_num_threads(2)
    try:
        two = torch.ops.u2a.grad_gram(*first, *second, False, by_tokens)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)
