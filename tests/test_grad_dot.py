"""Special about grad_dot: both forms and the factors agree, raggedness, strided offsets."""

import pytest
import torch

import u2a_kernels
from u2a_kernels.ops import grad_dot as op
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

IMPLEMENTATIONS = {
    "op": torch.ops.u2a.grad_dot.default,
    "reference": op.reference,
    "triton": op.forward_triton,
}
LOW_RANK = {
    "op": torch.ops.u2a.grad_dot_low_rank.default,
    "reference": op.reference_low_rank,
    "triton": op.low_rank_triton,
}
LENGTHS = {
    "ragged": [0, 1, 1, 0, 37, 1, 0, 5, 1],
    "one-long": [300],
    "short": [1, 0] * 30,
    "few": [2, 1],
}


def problem(lengths, d_in, d_out, dtype=torch.float32):
    n = sum(lengths)
    x, g = randn(n, d_in, seed=1, dtype=dtype), randn(n, d_out, seed=2, dtype=dtype)
    return x, g, offsets_of(lengths)


def worst(exact, *results):
    """Torch's own error, of several plain ways the one that is furthest off."""
    return max(results, key=lambda r: (r.double() - exact).abs().max().item() if r.numel() else 0)


def dots(x, g, offsets, v):
    bounds = offsets.tolist()
    whole = [g[s:e].T @ x[s:e] for s, e in zip(bounds, bounds[1:], strict=False)]
    return torch.stack([(v * w).sum((-2, -1)) for w in whole])


def products(x, g, offsets, v):
    bounds = offsets.tolist()
    whole = [(g[s:e].T @ x[s:e]).flatten() for s, e in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(whole) @ v.flatten(1).T


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("q", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forms(name, lengths, by_tokens, q, dtype):
    args = problem(LENGTHS[lengths], 23, 41, dtype)
    v = randn(q, 41, 23, seed=3, dtype=dtype)
    exact = dots(args[0].double(), args[1].double(), args[2], v.double())
    single = [args[0].float(), args[1].float(), args[2], v.float()]
    ways = [dots(*single), products(*single), op.reference(*single, True)]
    baseline = worst(exact, *ways)
    assert_within_budget(IMPLEMENTATIONS[name](*args, v, by_tokens), exact, baseline, name)


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("q, rank", [(1, 1), (3, 2), (5, 16), (70, 1), (1, 64), (2, 130)])
def test_factors_are_the_dense_direction(name, lengths, q, rank):
    args = problem(LENGTHS[lengths], 23, 41)
    left, right = randn(q, 41, rank, seed=3), randn(q, 23, rank, seed=4)
    v = left.double() @ right.double().mT
    exact = dots(args[0].double(), args[1].double(), args[2], v)
    baseline = worst(exact, dots(*args, left @ right.mT), op.reference_low_rank(*args, left, right))
    assert_within_budget(LOW_RANK[name](*args, left, right), exact, baseline, name)


def test_wide_layers_cut_columns_on_the_cpu():
    """2^21 entries over 600 gradients: fewer than a row of 4000."""
    args = problem([1, 0, 2] * 200, 4000, 3)
    v = randn(2, 3, 4000, seed=3)
    exact = dots(args[0].double(), args[1].double(), args[2], v.double())
    got = torch.ops.u2a.grad_dot(*args, v, False)
    assert_within_budget(got, exact, dots(*args, v))


def test_the_form_is_chosen_by_shape():
    assert op.tokens_are_cheaper(4096, 32, 1)
    assert not op.tokens_are_cheaper(4096, 32, 4)
    assert op.tokens_are_cheaper(32, 32, 4)


def test_rank_zero_is_zero():
    args = problem([2, 3], 6, 5)
    for function in LOW_RANK.values():
        assert torch.equal(
            function(*args, torch.ones(1, 5, 0), torch.ones(1, 6, 0)), torch.zeros(2, 1)
        )


@pytest.mark.parametrize(
    "v, message",
    [
        ((torch.ones(5, 2),), r"grad_dot: v must be a tensor or two factors"),
        ((torch.ones(5), torch.ones(6)), r"grad_dot: v\[0\] must be \[d_out, rank\] or \[Q"),
        ((torch.ones(2, 5, 3), torch.ones(6, 3)), r"grad_dot: v\[1\] must be .* = \[2, 6, 3\]"),
        ((torch.ones(5, 2), 3), r"grad_dot: v\[1\] must be a torch.Tensor, got int"),
    ],
)
def test_wrong_factors_are_named(v, message):
    with pytest.raises((ValueError, TypeError), match=message):
        u2a_kernels.grad_dot(*problem([2, 3], 6, 5), v)


@pytest.mark.parametrize("function", [torch.ops.u2a.grad_dot.default, op.forward_triton])
@pytest.mark.parametrize("by_tokens", [True, False])
def test_strided_offsets(function, by_tokens):
    x, g, v = randn(6, 8, seed=1), randn(6, 5, seed=2), randn(1, 5, 8, seed=3)
    offsets = offsets_of([4, 2])
    strided = torch.stack([offsets, offsets + 100], 1)[:, 0]
    want = function(x, g, offsets, v, by_tokens)
    assert torch.equal(function(x, g, strided, v, by_tokens), want)
