"""Special about grad_sq_norm: both forms agree, on every implementation and any raggedness."""

import pytest
import torch
from isa import assert_same_bits, needs_cpp

import u2a_kernels
from u2a_kernels import _segments
from u2a_kernels.ops import grad_sq_norm as op
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

IMPLEMENTATIONS = {
    "op": torch.ops.u2a.grad_sq_norm.default,
    "reference": op.reference,
    "triton": op.forward_triton,
}
RAGGED = [0, 1, 1, 0, 37, 1, 0, 5, 1, 18, 19, 0, 64, 1]


def problem(lengths, d_in, d_out, dtype=torch.float32):
    n = sum(lengths)
    x, g = randn(n, d_in, seed=1, dtype=dtype), randn(n, d_out, seed=2, dtype=dtype)
    return x, g, offsets_of(lengths)


def exact(x, g, offsets):
    x, g, bounds = x.double(), g.double(), offsets.tolist()
    rows = [(g[s:e].T @ x[s:e]).square().sum() for s, e in zip(bounds, bounds[1:], strict=False)]
    return torch.stack(rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("limit", [0, 1, 18, 36, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_switch_gives_the_norm(name, limit, dtype):
    """0: all formed; 1000: all ghost; between: both in one call, with 0 to 9 long examples."""
    x, g, offsets = problem(RAGGED, 23, 41, dtype)
    want = exact(x, g, offsets)
    baseline = op.reference(x, g, offsets, 0)
    assert_within_budget(IMPLEMENTATIONS[name](x, g, offsets, limit), want, baseline, name)


@pytest.mark.parametrize("limit", [0, 1000])
def test_forced_forms_have_the_same_gradient(monkeypatch, limit):
    monkeypatch.setattr(op, "ghost_limit", lambda d_in, d_out: limit)
    x, g, offsets = problem(RAGGED, 7, 5, torch.float64)
    x.requires_grad_()
    got = torch.autograd.grad(u2a_kernels.grad_sq_norm(x, g, offsets).sum(), x)[0]
    want = torch.autograd.grad(exact(x, g, offsets).sum(), x)[0]
    assert (got - want).abs().max() < 1e-11 * want.abs().max()


def test_limit_is_where_the_multiplications_cross():
    for d_in, d_out in ((1, 1), (768, 768), (768, 3072), (8, 4096)):
        limit = _segments.ghost_limit(d_in, d_out)
        for tokens, cheaper in ((limit, True), (limit + 1, False)):
            ghost, formed = tokens**2 * (d_in + d_out) / 2, tokens * d_in * d_out
            assert (ghost <= formed) == cheaper
    assert _segments.ghost_limit(0, 0) == 0


@pytest.mark.parametrize("tokens", [159, 160, 161, 288, 513, 1100])
def test_strips_and_loops_of_long_ghosts(tokens):
    """Around the CPU's own switch and past its strips and column tiles; a short example beside."""
    x, g, offsets = problem([tokens, 3], 33, 17)
    want, baseline = exact(x, g, offsets), op.reference(x, g, offsets, 0)
    for limit in (0, 10**6):
        got = torch.ops.u2a.grad_sq_norm(x, g, offsets, limit)
        assert_within_budget(got, want, baseline, f"limit {limit}")


def test_wide_layers_form_rows_at_a_time():
    x, g, offsets = problem([40, 0, 25], 9000, 75)
    want, baseline = exact(x, g, offsets), op.reference(x, g, offsets, 0)
    for limit in (0, 30, 100):
        got = torch.ops.u2a.grad_sq_norm(x, g, offsets, limit)
        assert_within_budget(got, want, baseline, f"limit {limit}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_thousands_of_short_segments(name):
    lengths = [0, 1, 2, 1] * (16 if name == "triton" else 1000)
    x, g, offsets = problem(lengths, 19, 6)
    baseline = op.reference(x, g, offsets, 0)
    got = IMPLEMENTATIONS[name](x, g, offsets, 10)
    assert_within_budget(got, exact(x, g, offsets), baseline, name)
    assert torch.equal(got, IMPLEMENTATIONS[name](x, g, offsets, 10))


def test_threads_give_the_same_bits():
    x, g, offsets = problem([300, 1, 0, 40, 200, 7], 65, 33)
    calls = [lambda n=n: torch.ops.u2a.grad_sq_norm(x, g, offsets, n) for n in (0, 50, 1000)]
    one = [c() for c in calls]
    torch.set_num_threads(2)
    try:
        two = [c() for c in calls]
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, two))


# Only what no GEMM computes: examples short enough for own loops. GEMM picks its own instructions.
ISA_PROGRAM = """
x, g, offsets = randn(80, 97, seed=1), randn(80, 61, seed=2), offsets_of([13, 0, 27, 1, 39])
parts = [torch.ops.u2a.grad_sq_norm(x.to(t), g.to(t), offsets, 1000)
         for t in (torch.float32, torch.float64, torch.bfloat16)]
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
