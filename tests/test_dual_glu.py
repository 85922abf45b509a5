"""What is special about gated activations: accuracy everywhere, layouts, kinks, equal bits."""

import pytest
import torch
from isa import assert_same_bits, needs_cpp

import u2a_kernels
from cases.dual_glu import PLAIN
from u2a_kernels._triton import INTERPRET
from u2a_kernels.ops.dual_glu import reference
from u2a_kernels.ops.dual_glu import triton as launch
from u2a_kernels.testing import randn

EPS = torch.finfo(torch.float32).eps


def points():
    """float32 values of every size up to 128, both signs, and the edges."""
    dense = torch.arange(0, 0x43000000, 9973, dtype=torch.int32).view(torch.float32)
    return torch.cat([dense, -dense, torch.tensor([0.0, -0.0, 100.0, -100.0, 1e-45, -1e-38])])


def by_op(a, name):
    x = torch.stack([a, torch.ones_like(a)]).requires_grad_()
    y = u2a_kernels.dual_act(x, name)
    g = torch.stack([torch.zeros_like(a), torch.ones_like(a)])
    return y[0], y[1], torch.autograd.grad(y, x, g)[0][0]


def by_triton(a, name):
    x = torch.stack([a, torch.ones_like(a)])
    y = launch.forward(x, None, name, False)
    g = torch.stack([torch.zeros_like(a), torch.ones_like(a)])
    return y[0], y[1], launch.backward(g, x, None, name, False)[0][0]


def by_autograd(a, name):
    a = a.clone().requires_grad_()
    f = PLAIN[name](a)
    (f1,) = torch.autograd.grad(f.sum(), a, create_graph=True)
    f2 = torch.autograd.grad(f1.sum(), a)[0] if f1.requires_grad else torch.zeros_like(a)
    return f, f1, f2


@pytest.mark.parametrize("way", [by_op, by_triton])
@pytest.mark.parametrize("name", PLAIN)
def test_curves_in_every_octave(name, way):
    """f, f' and f'' against float64, each octave of each sign on its own: at most 2x torch's error
    there, or 8 roundings of the octave's largest value. Nothing below float32's normal numbers."""
    if way is by_triton and not INTERPRET:
        pytest.skip("tests/test_cuda.py runs the compiled kernels")
    a = points()
    exact = reference.CURVES[name](a.double())
    own, got = by_autograd(a, name), way(a, name)
    octave = torch.frexp(a)[1].clamp(-8) * 2 + (a < 0)
    for order, (f, want, plain) in enumerate(zip(got, exact, own, strict=True)):
        for k in octave.unique():
            here = octave == k
            error = (f[here].double() - want[here]).abs().max()
            torchs = (plain[here].double() - want[here]).abs().max()
            bound = 2 * torchs + 8 * EPS * want[here].abs().max() + 1e-37
            assert error <= bound, f"{name}, derivative {order}, near {a[here][0]}: {error}"


@pytest.mark.parametrize("name", PLAIN)
def test_reference_curves_are_derivatives(name):
    a = torch.cat([randn(200, seed=1), torch.tensor([0.0])]).double()
    for f, want in zip(reference.CURVES[name](a), by_autograd(a, name), strict=True):
        torch.testing.assert_close(f, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_overflows(name):
    """Values whose squares overflow have the slopes of their limits, and a NaN stays a NaN."""
    a = torch.tensor([1e38, -1e38, float("nan")])
    ways = [by_op, by_triton] if INTERPRET else [by_op]
    linear = name not in ("sigmoid", "tanh")
    for f, f1, f2 in (way(a, name) for way in ways):
        assert torch.isnan(f[2])
        if name != "relu2":
            assert torch.isfinite(f[:2]).all()
            assert f1[:2].tolist() == [float(linear), float(name == "identity")]
            assert f2[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["relu", "relu2"])
def test_kinks_are_torchs(name):
    a = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    for got, want in zip(by_op(a, name), by_autograd(a, name), strict=True):
        assert torch.equal(got, want)


def test_named_forms():
    gate, up = randn(4, 3, 8, seed=1), randn(4, 3, 8, seed=2)
    for one, other in [
        (u2a_kernels.dual_swiglu(gate, up), u2a_kernels.dual_glu(gate, up)),
        (u2a_kernels.dual_geglu(gate, up), u2a_kernels.dual_glu(gate, up, "gelu")),
        (
            u2a_kernels.dual_geglu(gate, approximate="tanh"),
            u2a_kernels.dual_glu(gate, None, "gelu_tanh"),
        ),
        (u2a_kernels.dual_gelu(gate), u2a_kernels.dual_act(gate, "gelu")),
        (u2a_kernels.dual_gelu(gate, "tanh"), u2a_kernels.dual_act(gate, "gelu_tanh")),
        (u2a_kernels.dual_silu(gate), u2a_kernels.dual_act(gate, "silu")),
        (u2a_kernels.dual_relu2(gate), u2a_kernels.dual_act(gate, "relu2")),
    ]:
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="dual_geglu: approximate must be 'none' or 'tanh'"):
        u2a_kernels.dual_geglu(gate, up, "fast")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_packed_projection_is_the_pair(dtype):
    """Side by side, as halves of it, and apart: the same bits, gradients side by side."""
    both = randn(4, 5, 2 * 301, seed=1, dtype=dtype).requires_grad_()
    g = randn(4, 5, 301, seed=2, dtype=dtype)
    halves = both.chunk(2, -1)
    apart = [h.detach().contiguous().requires_grad_() for h in halves]
    outs = [u2a_kernels.dual_glu(both), u2a_kernels.dual_glu(*halves), u2a_kernels.dual_glu(*apart)]
    assert all(torch.equal(outs[0], o) for o in outs[1:])
    grads = [torch.autograd.grad(o, both, g)[0] for o in outs[:2]]
    grads.append(torch.cat(torch.autograd.grad(outs[2], apart, g), -1))
    assert all(torch.equal(grads[0], d) for d in grads[1:])


def test_rows_are_read_in_place():
    """Halves of a projection and a column for all are no copies; a column stride is one."""
    x = torch.zeros(4, 3, 10)
    for view, stride, step in [(x[..., 5:], 10, 1), (x[..., :1].expand(4, 3, 7), 10, 0)]:
        rows = launch.Rows.of(view)
        assert (rows.data.data_ptr(), rows.stride, rows.step) == (view.data_ptr(), stride, step)
    assert launch.Rows.of(x[..., ::2]).data.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_twice_and_with_threads(threads):
    gate, up = (randn(4, 3, 9001, seed=s).requires_grad_() for s in (1, 2))
    want = u2a_kernels.dual_glu(gate, up)
    grads = torch.autograd.grad(want.square().sum(), (gate, up))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = u2a_kernels.dual_glu(gate, up)
        again = torch.autograd.grad(got.square().sum(), (gate, up))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip((want, *grads), (got, *again), strict=True))


ISA_PROGRAM = """
for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for name in {names!r}:
        gate, up = (5 * randn(4, 3, 301, seed=s, dtype=t) for s in (1, 2))
        gate[0, 0, :3] = torch.tensor([100.0, -100.0, 0.0])
        gate.requires_grad_(), up.requires_grad_()
        pair, one = u2a_kernels.dual_glu(gate, up, name), u2a_kernels.dual_act(gate, name)
        parts += [pair, one, *torch.autograd.grad(pair, (gate, up), up.detach())]
        parts += torch.autograd.grad(one, gate, up.detach())
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM.format(names=list(PLAIN)))
