"""Special about grad_project: fixed bits, unbiased projections, one-hot rows, equal results of
instruction sets and whatever shares the batch."""

import pytest
import torch
from isa import assert_same_bits, needs_cpp

import u2a_kernels
from cases.grad_project import arguments, sign_matrix, through
from u2a_kernels import Rademacher, grad_project, rademacher
from u2a_kernels.ops import grad_project as op
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

IMPLEMENTATIONS = {
    "op": grad_project,
    "reference": through(op.reference),
    "triton": through(op.forward_triton),
}
SEEDS = [0, 1, 0xFFFFFFFF, 0x0123456789ABCDEF]

# Bits of rows 0-31, 32-63, ... of columns 0 and 1, as the docstring defines them.
FIXED = {
    (0, "out"): [
        [0x51F1154C, 0xAB77E443, 0x73DC8B1D, 0x91D075B7, 0xE8E5A1A0],
        [0x7CE22439, 0xC2916FC7, 0x9D505149, 0x1DA446C8, 0xA87FA3BC],
    ],
    (0, "in"): [
        [0x012840B8, 0xF8CB71D7, 0x1F7DDB6A, 0x2DDE00EE, 0x1E01C912],
        [0x05250BAD, 0xCD9982E4, 0x1D97D82C, 0xC3F0749D, 0x5C4CE5AB],
    ],
    (0x0123456789ABCDEF, "out"): [
        [0xC64EF763, 0x8DD8816F, 0xC366EBCB, 0x3F20B4AB, 0xEABEE3AD],
        [0x6AC59DAD, 0x197A72F8, 0x5E7A52DF, 0x19F60EE4, 0x036164C3],
    ],
    (0x0123456789ABCDEF, "in"): [
        [0x7291DFD6, 0x338D1785, 0x60E3EECD, 0x08A48B6B, 0x2F659D63],
        [0x0E78A4A0, 0xADB84F09, 0x2C7273EF, 0xA05BF708, 0x9D446AB1],
    ],
}


@pytest.mark.parametrize("seed, side", FIXED)
def test_bits_are_fixed(seed, side):
    bits = (rademacher(160, 2, seed, side) < 0).T.reshape(2, 5, 32)
    words = (bits.long() << torch.arange(32)).sum(-1)
    assert words.tolist() == FIXED[seed, side]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rademacher_is_the_documented_matrix(dtype):
    for k, seed, side, stream in ((5, 3, "in", 3), (257, 9 << 33, "out", 2)):
        want = (sign_matrix(k, 21, seed, stream) / k**0.5).to(dtype)
        assert torch.equal(rademacher(k, 21, seed, side, dtype), want)


@pytest.mark.parametrize(
    "args, exception, message",
    [
        ((0, 3, 1), ValueError, "rademacher: argument k must be an integer from 1"),
        ((4, 3, -1), ValueError, "rademacher: argument seed must be an integer from 0"),
        ((4, -3, 1), ValueError, "rademacher: argument d must be an integer from 0"),
        ((4, 3, 1, "left"), ValueError, 'rademacher: side must be "in" or "out", got \'left\''),
        ((4, 3, 1, "in", torch.int32), TypeError, "rademacher: dtype must be float32"),
    ],
)
def test_rademacher_names_wrong_input(args, exception, message):
    with pytest.raises(exception, match=message):
        rademacher(*args)


@pytest.mark.parametrize("hot", [False, True], ids=["vectors", "ids"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_unit_vectors_show_every_sign(name, seed, hot):
    """e_o e_i^T has the features P_out[:, o] P_in[:, i]^T, exactly; four words and a fifth."""
    k_in, k_out, d = 144, 64, 20
    x = torch.cat([torch.eye(d), torch.eye(d)[:1].expand(d, d)])
    g = torch.cat([torch.eye(d)[:1].expand(d, d), torch.eye(d)])
    p_out, p_in = sign_matrix(k_out, d, seed, 2), sign_matrix(k_in, d, seed, 3)
    left, right = g.double() @ p_out.T, x.double() @ p_in.T
    want = left[:, :, None] * right[:, None] / (k_out * k_in) ** 0.5
    got = IMPLEMENTATIONS[name](
        x=x,
        g=g.argmax(1) if hot else g,
        offsets=torch.arange(2 * d + 1),
        p_in=Rademacher(k_in, seed),
        p_out=Rademacher(k_out, seed),
    )
    assert torch.equal(got, want.float())


def test_inner_products_are_unbiased_with_the_predicted_variance():
    """Of <P_out G P_in^T, P_out H P_in^T> over signs: exactly, from the fourth moments of signs.

    With E (P^T P)_ab (P^T P)_cd = S_ab S_cd + (1/k)(S_ac S_bd + S_ad S_bc - 2 S_abcd), S = delta.
    """
    k_in, k_out, seeds = 3, 5, 4000
    x, g = randn(5, 6, seed=1, dtype=torch.float64), randn(5, 4, seed=2, dtype=torch.float64)
    offsets = offsets_of([3, 2])
    u, v = g[:3].T @ x[:3], g[3:].T @ x[3:]
    draws = []
    for s in range(seeds):
        f = grad_project(x, g, offsets, Rademacher(k_in, s), Rademacher(k_out, s))
        draws.append((f[0] * f[1]).sum())
    draws = torch.stack(draws)

    def moments(d, k):
        """The tensor E (P^T P)_ab (P^T P)_cd."""
        i = torch.eye(d, dtype=torch.float64)
        pairs = torch.einsum("ac,bd->abcd", i, i) + torch.einsum("ad,bc->abcd", i, i)
        same = torch.einsum("ab,ac,ad->abcd", i, i, i)
        return torch.einsum("ab,cd->abcd", i, i) + (pairs - 2 * same) / k

    exact = (u * v).sum()
    second = torch.einsum(
        "oi,pj,qk,rl,opqr,ijkl->", u, v, u, v, moments(4, k_out), moments(6, k_in)
    )
    predicted = second - exact**2
    assert (draws.mean() - exact).abs() < 4 * (predicted / seeds).sqrt()
    squares = (draws - exact) ** 2
    assert (squares.mean() - predicted).abs() < 4 * squares.std() / seeds**0.5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_seed_equals_its_matrix(name):
    x, g, offsets = randn(40, 30, seed=1), randn(40, 21, seed=2), offsets_of([13, 27])
    p_in, p_out = rademacher(12, 30, 5, "in"), rademacher(130, 21, 6, "out")
    project = IMPLEMENTATIONS[name]
    got = project(x=x, g=g, offsets=offsets, p_in=Rademacher(12, 5), p_out=Rademacher(130, 6))
    want = project(x=x, g=g, offsets=offsets, p_in=p_in, p_out=p_out)
    assert (got - want).abs().max() < 4e-6 * want.abs().max()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=["x", "g"])
def test_mixed_dtypes(name, wide):
    """x projected to fp32 beforehand beside bf16 gradients, and the other way round."""
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[wide]
    args = dict(x=randn(40, 16, seed=1, dtype=wide), g=randn(40, 33, seed=2, dtype=other))
    args |= dict(offsets=offsets_of([13, 27]), p_in=None, p_out=randn(8, 33, seed=3, dtype=other))
    plain = through(op.reference)
    double = {k: v.double() if k in ("x", "g", "p_out") else v for k, v in args.items()}
    single = {k: v.float() if k in ("x", "g", "p_out") else v for k, v in args.items()}
    got = IMPLEMENTATIONS[name](**args)
    assert_within_budget(got, plain(**double), plain(**single))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_strided_offsets_and_ids(name, kind):
    x, offsets = randn(6, 8, seed=1), offsets_of([4, 2])
    g = randn(6, 5, seed=2) if kind == torch.float32 else torch.tensor([3, 1, 4, 1, 0, 2])
    strided = torch.stack([offsets, offsets + 100], 1)[:, 0]
    spread = torch.stack([g, g + 100], -1)[..., 0]
    args = dict(x=x, p_in=None, p_out=randn(3, 5, seed=3))
    project = IMPLEMENTATIONS[name]
    got = project(g=spread, offsets=strided, **args)
    assert torch.equal(got, project(g=g, offsets=offsets, **args))


def test_large_gradients_are_formed_by_one_product_each():
    x, g = randn(5, 1030, seed=1, dtype=torch.bfloat16), randn(5, 1025, seed=2).bfloat16()
    got = grad_project(x, g, offsets_of([3, 0, 2]), None, None)
    want = torch.stack([g[s:e].float().T @ x[s:e].float() for s, e in ((0, 3), (3, 3), (3, 5))])
    assert torch.equal(got, want)


@pytest.mark.parametrize("d_out, p_out", [(45, Rademacher(33, 1)), (300, None)])
def test_results_do_not_depend_on_the_batch(d_out, p_out):
    """Alone, after others and with one or two threads: the same bits."""
    lengths = [3, 500, 60, 1, 129]
    x, g = randn(sum(lengths), 270, seed=1), randn(sum(lengths), d_out, seed=2)
    offsets = offsets_of(lengths)
    together = grad_project(x, g, offsets, Rademacher(17, 2), p_out)
    torch.set_num_threads(2)
    try:
        assert torch.equal(grad_project(x, g, offsets, Rademacher(17, 2), p_out), together)
    finally:
        torch.set_num_threads(1)
    for b, (s, e) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = grad_project(x[s:e], g[s:e], offsets_of([e - s]), Rademacher(17, 2), p_out)
        assert torch.equal(alone[0], together[b])


def test_maps_equal_single_calls():
    """x is projected once; its values do not change by that."""
    x, offsets = randn(40, 30, seed=1), offsets_of([13, 27])
    gs, ps = [randn(40, d, seed=d) for d in (7, 20)], [randn(4, 7, seed=3), Rademacher(9, 1)]
    for function in (grad_project, IMPLEMENTATIONS["reference"]):
        many = function(x=x, g=gs, offsets=offsets, p_in=Rademacher(6, 2), p_out=ps)
        for got, g, p in zip(many, gs, ps, strict=True):
            single = function(x=x, g=g, offsets=offsets, p_in=Rademacher(6, 2), p_out=p)
            assert torch.equal(got, single)


def test_unused_maps_have_no_gradient():
    x = randn(6, 8, seed=1).requires_grad_()
    gs = [randn(6, d, seed=d).requires_grad_() for d in (5, 3)]
    ps = [randn(2, 5, seed=3).requires_grad_(), Rademacher(2, 1)]
    first, _ = grad_project(x, gs, offsets_of([4, 2]), None, ps)
    got = torch.autograd.grad(first.square().sum(), [x, gs[0], ps[0]])
    alone = grad_project(x, gs[0], offsets_of([4, 2]), None, ps[0])
    for a, b in zip(got, torch.autograd.grad(alone.square().sum(), [x, gs[0], ps[0]]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "g, p_out, exception, message",
    [
        (2, 1, ValueError, r"p_out must be a list of 2, one a map, got 1"),
        (2, "single", TypeError, r"p_out must be a list where g is, got Rademacher"),
    ],
)
def test_lists_must_match(g, p_out, exception, message):
    x, gs = randn(3, 4, seed=1), [randn(3, 5, seed=2)] * g
    ps = Rademacher(2, 1) if p_out == "single" else [Rademacher(2, 1)] * p_out
    with pytest.raises(exception, match=f"grad_project: {message}"):
        grad_project(x, gs, offsets_of([3]), None, ps)


def test_wrong_ids_do_not_read_elsewhere():
    """The operator itself, without the door: an error on the CPU, NaN in the kernel of a GPU."""
    g = torch.tensor([0, 5, 1])
    args = arguments(randn(3, 4, seed=1), g, offsets_of([2, 1]), None, randn(2, 5, seed=2))
    if u2a_kernels._C is not None:
        with pytest.raises(RuntimeError, match=r"grad_project: g must be in \[0, 5\), got 5 at 1"):
            torch.ops.u2a.grad_project(*args)
    (out,) = op.forward_triton(*args)
    assert out[0].isnan().all() and out[1].isfinite().all()


ISA_PROGRAM = """
from u2a_kernels import Rademacher, grad_project
offsets = offsets_of([13, 0, 147])
for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    x, g = randn(160, 597, seed=1).to(t), randn(160, 61, seed=2).to(t)
    tiny = torch.full_like(x, 1e-6)
    ids = torch.arange(160) % 61
    for p_in, p_out in (
        (randn(16, 597, seed=3).to(t), randn(40, 61, seed=4).to(t)),
        (Rademacher(70, 1), Rademacher(150, 2)),
        (None, randn(16, 61, seed=4).to(t)),
        (randn(7, 597, seed=3).to(t), None),
    ):
        parts.append(grad_project(x, g, offsets, p_in, p_out))
        parts.append(grad_project(x * tiny, g, offsets, p_in, p_out))
        if p_out is not None:
            parts.append(grad_project(x, ids, offsets, p_in, p_out))
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
