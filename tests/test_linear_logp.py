"""linear_logp: memory, soft cap before temperature, extreme logits, chunks, instruction sets."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from isa import assert_same_bits, needs_cpp
from torch.utils._python_dispatch import TorchDispatchMode

from cases.linear_logp import inputs, oracle
from u2a_kernels import linear_cross_entropy, linear_logp
from u2a_kernels.ops import linear_logp as op
from u2a_kernels.ops.linear_logp import triton as kernels
from u2a_kernels.testing import assert_within_budget, randn


def problem(n, d, v, dtype=torch.float32):
    targets = torch.arange(n) * 7919 % v
    targets[::5] = -100
    return dict(
        h=randn(n, d, seed=1, dtype=dtype),
        weight=randn(v, d, seed=2, dtype=dtype),
        targets=targets,
        bias=randn(v, seed=3, dtype=dtype),
    )


def gradients(function, args):
    leaves = {
        k: t.clone().requires_grad_()
        for k, t in args.items()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    out = function(**{**args, **leaves})
    cotangent = torch.cos(torch.arange(len(out), dtype=torch.float64))
    return out, torch.autograd.grad((out.double() * cotangent).sum(), list(leaves.values()))


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():  # not the interpreter's bytes
                self.elements = max(self.elements, t.numel())
        return out


def test_reference_makes_no_full_logits():
    n, d, v = 300, 8, 20000
    args = problem(n, d, v)
    plain = (args["h"], args["weight"], args["targets"], args["bias"], 5.0, 0.5)
    with Largest() as largest:
        _, lse, _ = op.reference(*plain, True)
        op.reference_bwd(torch.ones(n), *plain[:4], lse, *plain[4:])
    assert 0 < largest.elements <= op.CHUNK_ELEMENTS < n * v


def test_triton_gradients_hold_an_eighth_of_the_logits():
    n, d, v = 24, 3, 160
    args = problem(n, d, v)
    plain = (args["h"], args["weight"], args["targets"], args["bias"])
    with Largest() as largest:
        _, lse, _ = kernels.forward(*plain, 5.0, 0.5, True)
        kernels.backward(torch.ones(n), *plain, lse, 5.0, 0.5)
    assert largest.elements == n * v // 8


RSS = """
import sys, torch
import torch.nn.functional as F
import u2a_kernels
def peak():
    status = open("/proc/self/status").read()  # ru_maxrss would start at the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
def run(n):
    h, w = torch.randn(n, 32, requires_grad=True), torch.randn(16000, 32, requires_grad=True)
    t = torch.arange(n)
    if sys.argv[1] == "u2a": out = u2a_kernels.linear_logp(h, w, t)
    else: out = F.log_softmax(h @ w.T, -1).gather(1, t[:, None])
    out.sum().backward()
torch.set_num_threads(1)
run(8); before = peak(); run(2048); print(peak() - before)
"""


def rss(name):
    out = subprocess.run([sys.executable, "-c", RSS, name], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return float(out.stdout)


def test_peak_memory_is_a_fraction_of_the_logits():
    """[2048, 16000] fp32 is 125 MB; the op may use a tenth, plain torch shows the meter works."""
    assert rss("torch") > 200
    assert rss("u2a") < 12.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_several_row_chunks_and_tiles(dtype):
    """More rows than a chunk of the C++ kernel and more tokens than a tile."""
    args = problem(1500, 9, 1300, dtype)
    exact, exact_grads = gradients(oracle, {k: _double(t) for k, t in args.items()})
    torch_own, torch_grads = gradients(oracle, args)
    got, grads = gradients(linear_logp, args)
    assert_within_budget(got, exact, torch_own)
    for g, e, b in zip(grads, exact_grads, torch_grads, strict=True):
        assert_within_budget(g, e, b)


def _double(t):
    return t.double() if t.is_floating_point() else t


def test_triton_scratch_size_does_not_matter(monkeypatch):
    args = inputs("ragged", torch.float32)
    flat = (args["h"], args["weight"], args["targets"], args["bias"], 2.0, 0.7)
    want = kernels.forward(*flat, True)
    grad = torch.linspace(-1, 1, len(args["h"]))
    want_head = kernels.backward(grad, *flat[:4], want[1], *flat[4:])
    monkeypatch.setattr(kernels, "SCRATCH_ELEMENTS", 200)  # 5 rows of 37 tokens
    for a, b in zip(kernels.forward(*flat, True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(kernels.backward(grad, *flat[:4], want[1], *flat[4:]), want_head, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_soft_cap_comes_before_temperature():
    """At logits far beyond the cap, the spread left is 2 cap / temperature."""
    h, w = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1e3], [-1e3]], dtype=torch.float64)
    got = linear_logp(h, w, torch.tensor([1]), softcap=3.0, temperature=0.5)
    assert abs(got.item() + 2 * 3.0 / 0.5) < 1e-4  # log sigmoid(-12) = -12 - 6e-6


IMPLEMENTATIONS = {
    "op": lambda *a: linear_logp(*a[:3], bias=a[3]),
    "triton": lambda *a: kernels.forward(*a, 0.0, 1.0, False)[0],
    "triton rows": lambda *a: kernels.forward(*a, 0.0, 1.0, True)[0],
    "reference": lambda *a: op.reference(*a, 0.0, 1.0, False)[0],
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_are_exact(name, scale):
    """Logits +-scale in the first and the last tile, -inf biases, a row of -inf but one token."""
    v = 1300
    weight, bias = torch.zeros(v, 2), torch.zeros(v)
    weight[0, 0], weight[v - 1, 0] = scale, -scale
    bias[5:600] = -torch.inf
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    targets = torch.tensor([0, v - 1, v - 1, 5])
    got = IMPLEMENTATIONS[name](h, weight, targets, bias)
    want = F.log_softmax(h @ weight.T + bias, -1).gather(1, targets[:, None])[:, 0]
    assert torch.equal(got, want)
    assert got[:3].tolist() == [0.0, 0.0, -2 * torch.tensor(scale).item()]
    assert got[3].item() == -torch.inf


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_token_left(name):
    """All tokens but one of a late tile masked: earlier tiles hold only -inf."""
    bias = torch.full((1300,), -torch.inf)
    bias[1200] = 0.5
    got = IMPLEMENTATIONS[name](torch.ones(1, 2), torch.ones(1300, 2), torch.tensor([1200]), bias)
    assert got.tolist() == [0.0]


def test_gradient_at_extreme_logits_is_finite():
    args = problem(6, 4, 1300)
    args["h"] *= 1e4
    args["bias"][3:700] = -torch.inf
    _, grads = gradients(linear_logp, args)
    _, want = gradients(oracle, {k: _double(t) for k, t in args.items()})
    for g, w in zip(grads, want, strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5 * w.abs().max().item())


def test_targets_out_of_range_give_nan_on_a_gpu():
    """There the door cannot look at values; no memory out of bounds is read."""
    args = problem(4, 3, 7)
    bad = torch.tensor([1, 7, -1, -100])
    for grad_h in (False, True):
        got = kernels.forward(args["h"], args["weight"], bad, None, 0.0, 1.0, grad_h)[0]
        assert got.isnan().tolist() == [False, True, True, False] and got[3] == 0


def test_ignored_rows_are_never_read():
    args = problem(12, 3, 7)
    args["h"][args["targets"] == -100] = torch.nan
    _, grads = gradients(linear_logp, args)
    assert all(torch.isfinite(g).all() for g in grads)
    _, lse, _ = kernels.forward(*args.values(), 0.0, 1.0, True)
    for head in (op.reference_bwd, kernels.backward):
        got = head(torch.ones(12), *args.values(), lse, 0.0, 1.0)
        assert all(torch.isfinite(g).all() for g in got)


def test_second_order_is_refused_with_a_frozen_head():
    """Also for a loss linear in logp, whose cotangent needs no gradient itself."""
    args = problem(4, 3, 7)
    h = args["h"].requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logp(h, args["weight"], args["targets"]).sum(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad((grad**2).sum(), h)


def test_token_weights_pick_a_reduction():
    args = problem(10, 3, 7)
    del args["bias"]
    used = args["targets"] != -100
    mean = linear_cross_entropy(**args)
    weights = used / used.sum()
    torch.testing.assert_close(linear_cross_entropy(**args, token_weights=weights), mean)
    want = F.cross_entropy(args["h"] @ args["weight"].T, args["targets"])
    torch.testing.assert_close(mean, want, rtol=1e-6, atol=0)


ISA_PROGRAM = """
torch.set_num_threads(1)
for softcap in (None, 2.0):
    h, w, b = (torch.randn(*s, requires_grad=True) for s in ((37, 16), (1300, 16), (1300,)))
    out = u2a_kernels.linear_logp(h, w, torch.arange(37), bias=b, softcap=softcap, temperature=0.7)
    out.sum().backward()
    parts += [out, h.grad, w.grad, b.grad]
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
