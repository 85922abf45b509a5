"""Special about grad_sketch: fixed hashes, their variance, `out`, equal instruction sets."""

import pytest
import torch
from isa import assert_same_bits, needs_cpp

import u2a_kernels
from cases.grad_sketch import (
    KINDS,
    philox,
    rademacher_matrix,
    sign_matrix,
    sjlt_matrix,
    words,
)
from u2a_kernels.ops import grad_sketch as op
from u2a_kernels.testing import assert_within_budget, offsets_of, randn

IMPLEMENTATIONS = {
    "op": torch.ops.u2a.grad_sketch.default,
    "reference": op.reference,
    "triton": op.forward_triton,
}


def test_philox_of_the_oracle_gives_the_published_vectors():
    """Known answers of the Random123 distribution for philox4x32, 10 rounds."""
    ones = [0xFFFFFFFF] * 4
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox([0] * 4, [0, 0]) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, ones[:2]) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


FIXED = {
    (0, 0): [0x7E558224, 0xCB574F9D, 0x84A459D3, 0x8AE7A534],
    (0, 1): [0xAEFA7954, 0x31080E1F, 0x2CC733B0, 0x89FE7094],
    (0x0123456789ABCDEF, 0): [0xEA9DB3F3, 0x91B2A1A1, 0x7777E151, 0x8DD3102A],
    (0x0123456789ABCDEF, 1): [0x52C23125, 0x2EFF95B5, 0x05016077, 0x4DB0B1CB],
}


@pytest.mark.parametrize("seed, stream", FIXED)
def test_hashes_are_fixed(seed, stream):
    assert op.sketch_hash(seed, stream, 4).tolist() == FIXED[seed, stream]
    assert words(seed, stream, 4) == FIXED[seed, stream]
    assert op.sketch_hash(seed, stream, 300).tolist() == words(seed, stream, 300)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, 0x0123456789ABCDEF])
def test_unit_vectors_show_every_hash_and_sign(name, seed):
    """e_o e_i^T has the features s(o) s(i) (-1)^popcount(j & (h(o) ^ h(i))) / sqrt(k), exactly."""
    k, d = 64, 24
    x = torch.cat([torch.eye(d), torch.eye(d)[:1].expand(d, d)])
    g = torch.cat([torch.eye(d)[:1].expand(d, d), torch.eye(d)])
    offsets = torch.arange(2 * d + 1)
    p_out, p_in = sign_matrix(seed, 0, d, k), sign_matrix(seed, 1, d, k)
    want = torch.cat([p_out[:, :1] * p_in, p_out * p_in[:, :1]], 1).T / k**0.5
    assert torch.equal(IMPLEMENTATIONS[name](x, g, offsets, k, seed), want.float())


ENTRIES = {
    0: [0x4A0B4A78, 0xCB5E38DE, 0x50B0C8D6, 0x489702D9],
    0x0123456789ABCDEF: [0x1E0B2A4F, 0xC8FD602F, 0xB5F74BC4, 0xC5A06818],
}
FEATURES_128 = {
    0: [0xE52BE418, 0xCDDD3C65, 0xF0C1DE79, 0x4756C452],
    0x0123456789ABCDEF: [0x77303282, 0xCC676144, 0x90F65CA7, 0x5127B111],
}


@pytest.mark.parametrize("seed", ENTRIES)
def test_hashes_of_entries_are_fixed(seed):
    """Words 0 of the first two rows and columns, and the signs of features 128 .. 255 at (1, 2)."""
    o, i = torch.arange(2)[:, None], torch.arange(2)
    assert op.philox(seed, i, o, 4)[0].flatten().tolist() == ENTRIES[seed]
    one, two = torch.tensor(1), torch.tensor(2)
    assert [int(w) for w in op.philox(seed, two, one, 20)] == FEATURES_128[seed]
    signs = rademacher_matrix(seed, 2, 3, 256)[128:, 1, 2]
    bits = [w >> b & 1 for w in FEATURES_128[seed] for b in range(32)]
    assert (signs < 0).int().tolist() == bits


@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 1])
@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
@pytest.mark.parametrize("name", ["op", "reference", "triton"])
@pytest.mark.parametrize("rows", [False, True], ids=["dense", "one-hot"])
def test_unit_vectors_show_every_entry(name, rows, kind, seed):
    """e_o e_i^T has the entry's column of the sketch, exactly: k = 256 are two blocks of signs."""
    k, d_in, d_out = 256, 5, 4
    x, g = torch.eye(d_in).repeat(d_out, 1), torch.arange(d_out).repeat_interleave(d_in)
    offsets = torch.arange(d_in * d_out + 1)
    g = g if rows else torch.nn.functional.one_hot(g).float()
    matrix = sjlt_matrix if kind == "sjlt" else rademacher_matrix
    want = matrix(seed, d_out, d_in, k).flatten(1).T.float()
    last = KINDS.index(kind) if rows else kind == "rademacher"
    sketch = {
        "op": torch.ops.u2a.grad_sketch_rows if rows else torch.ops.u2a.grad_sketch_entries,
        "reference": op.reference_rows if rows else op.reference_entries,
        "triton": op.rows_triton if rows else op.entries_triton,
    }[name]
    assert torch.equal(sketch(x, g, offsets, k, seed, last), want)


@pytest.mark.parametrize("name", ["op", "reference", "triton"])
@pytest.mark.parametrize("seed", [1, 0x0123456789ABCDEF])
def test_row_numbers_show_every_hash_and_sign(name, seed):
    """Beyond any table's size: the features of row o and input i, for o up to 2^31 - 1."""
    k, d = 64, 6
    numbers = torch.tensor([0, 5, 128_255, (1 << 31) - 1])
    x, g = torch.eye(d).repeat(4, 1), numbers.repeat_interleave(d)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    word = [philox((int(o), 0, 0, 0x55324153), key)[0] for o in numbers]
    out = [[(-1) ** ((w >> 31) + (j & w & (k - 1)).bit_count()) for j in range(k)] for w in word]
    p_in = sign_matrix(seed, 1, d, k).T
    want = (torch.tensor(out)[:, None] * p_in / k**0.5).flatten(0, 1).float()
    sketch = {
        "op": torch.ops.u2a.grad_sketch_rows,
        "reference": op.reference_rows,
        "triton": op.rows_triton,
    }[name]
    assert torch.equal(sketch(x, g, torch.arange(4 * d + 1), k, seed, 0), want)


@pytest.mark.parametrize("kind", KINDS)
def test_row_numbers_equal_unit_vectors(kind):
    x, numbers, offsets = randn(60, 21, seed=1), torch.arange(60) * 5 % 17, offsets_of([40, 0, 20])
    unit = torch.nn.functional.one_hot(numbers, 17).float()
    got = u2a_kernels.grad_sketch(x, numbers, offsets, 256, 3, kind=kind)
    want = u2a_kernels.grad_sketch(x, unit, offsets, 256, 3, kind=kind)
    exact = u2a_kernels.grad_sketch(x.double(), unit.double(), offsets, 256, 3, kind=kind)
    assert_within_budget(got, exact, want)


def variance(u, v, k):
    """Of <sketch(u), sketch(v)> over independent uniform hashes and signs, exactly.

    Products of signs survive where the four row indices pair up, and the four column indices too:
    rows of the two factors equal (weight 1), or both row pairs the same or crossed, which needs
    equal buckets (weight 1/k).
    """
    rows, columns = 1 - torch.eye(u.shape[0]).double(), 1 - torch.eye(u.shape[1]).double()
    a, b = u.T @ v, u @ v.T
    total = ((a**2 + a * a.T) * columns).sum() + ((b**2 + b * b.T) * rows).sum()
    for cross in ("oi,pj,oi,pj", "oi,pj,oj,pi", "oi,pj,pi,oj", "oi,pj,pj,oi"):
        total += torch.einsum(f"{cross},op,ij->", u, v, u, v, rows, columns)
    return total / k


def variance_of_entries(u, v, k):
    """The same where every entry has signs (and a bucket) of its own: no pair shares a row."""
    return ((u**2).sum() * (v**2).sum() + (u * v).sum() ** 2 - 2 * (u**2 * v**2).sum()) / k


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_with_the_predicted_variance(kind):
    k, seeds = 16, 4000
    x, g = randn(5, 6, seed=1, dtype=torch.float64), randn(5, 4, seed=2, dtype=torch.float64)
    offsets = offsets_of([3, 2])
    u, v = g[:3].T @ x[:3], g[3:].T @ x[3:]
    features = torch.stack(
        [u2a_kernels.grad_sketch(x, g, offsets, k, s, kind=kind) for s in range(seeds)]
    )
    for other, exact in ((1, v), (0, u)):
        draws = (features[:, 0] * features[:, other]).sum(1)
        predicted = (variance if kind == "tensorsketch" else variance_of_entries)(u, exact, k)
        sigma = (predicted / seeds).sqrt()
        assert (draws.mean() - (u * exact).sum()).abs() < 4 * sigma
        squares = (draws - (u * exact).sum()) ** 2
        assert (squares.mean() - predicted).abs() < 4 * squares.std() / seeds**0.5


def test_integer_sums_of_sjlt_keep_the_range_of_float32():
    """Examples of sizes from 1e-36 to 1e36, each as exact as the reference, and one that is not
    finite: it alone is NaN, as is one whose bound overflows though its gradient is finite."""
    x, g = randn(12, 33, seed=1), randn(12, 9, seed=2)
    size = torch.tensor([1e-18, 1.0, 1e18, 1e-10, 1e17, 1e3]).repeat_interleave(2)[:, None]
    x, g = x * size, g * size
    offsets = offsets_of([2] * 6)
    got = op.entries_triton(x, g, offsets, 64, 3, False)
    exact = op.reference_entries(x.double(), g.double(), offsets, 64, 3, False)
    own = op.reference_entries(x, g, offsets, 64, 3, False)
    for b in range(6):
        assert_within_budget(got[b], exact[b], own[b], f"example {b}")
    for bad in (float("inf"), float("nan"), 3e38):
        x[4] = bad
        spoiled = op.entries_triton(x, g, offsets, 64, 3, False)
        assert spoiled[2].isnan().all()
        keep = [0, 1, 3, 4, 5]
        assert torch.equal(spoiled[keep], got[keep])


def test_modules_with_their_own_seeds_add_in_place():
    x, g, offsets = randn(6, 8, seed=1), randn(6, 5, seed=2), offsets_of([4, 2])
    total = torch.zeros(2, 32)
    for seed in (3, 4):
        assert u2a_kernels.grad_sketch(x, g, offsets, 32, seed, out=total) is total
    want = u2a_kernels.grad_sketch(x, g, offsets, 32, 3) + u2a_kernels.grad_sketch(
        x, g, offsets, 32, 4
    )
    assert torch.equal(total, want)


def test_gradient_flows_through_out():
    x, g, offsets = randn(6, 8, seed=1).requires_grad_(), randn(6, 5, seed=2), offsets_of([4, 2])
    direct = torch.autograd.grad(u2a_kernels.grad_sketch(x, g, offsets, 8, 3).square().sum(), x)[0]
    summed = u2a_kernels.grad_sketch(x, g, offsets, 8, 3, out=torch.zeros(2, 8))
    assert torch.equal(torch.autograd.grad(summed.square().sum(), x)[0], direct)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_offsets(name):
    x, g, offsets = randn(6, 8, seed=1), randn(6, 5, seed=2), offsets_of([4, 2])
    strided = torch.stack([offsets, offsets + 100], 1)[:, 0]
    sketch = IMPLEMENTATIONS[name]
    assert torch.equal(sketch(x, g, strided, 8, 3), sketch(x, g, offsets, 8, 3))


@pytest.mark.parametrize("k", [4096, 65536])
def test_large_k(k):
    """Strides of every size in the transform, against the sign matrix in torch integers."""
    x, g, offsets = randn(3, 70, seed=1), randn(3, 50, seed=2), offsets_of([2, 1])
    features = torch.arange(k)[:, None]

    def factor(stream, rows):
        word = op.sketch_hash(9, stream, rows.shape[1])
        bits = features & word & (k - 1)
        for shift in (8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return (1 - 2 * ((bits ^ (word >> 31)) & 1)).double() @ rows.double().T

    tokens = (factor(0, g) * factor(1, x)).T / k**0.5
    want = torch.stack([tokens[:2].sum(0), tokens[2]])
    for name in ("op", "reference"):
        got = IMPLEMENTATIONS[name](x, g, offsets, k, 9).double()
        assert (got - want).abs().max() < 1e-6 * want.abs().max(), name


ISA_PROGRAM = """
x, g, offsets = randn(40, 97, seed=1), randn(40, 61, seed=2), offsets_of([13, 0, 27])
v = randn(2, 61, 97, seed=3)
for t in (torch.float32, torch.float64, torch.bfloat16):
    xt, gt = x.to(t), g.to(t)
    parts += [u2a_kernels.grad_sketch(xt, gt, offsets, k, 5) for k in (2, 64, 256, 2048)]
    parts.append(u2a_kernels.grad_sketch(xt, gt, offsets, 65536, 5))
    for kind in ("tensorsketch", "sjlt", "rademacher"):
        parts.append(u2a_kernels.grad_sketch(xt, torch.arange(40) % 7, offsets, 256, 5, kind=kind))
        parts.append(u2a_kernels.grad_sketch(xt, gt, offsets, 256, 5, kind=kind))
    parts.append(u2a_kernels.grad_dot(xt, gt, offsets, v.to(t)))
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
