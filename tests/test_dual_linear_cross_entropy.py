"""The dual loss head: chunks and memory, modes, ignored rows, extreme logits, instruction sets."""

import pytest
import torch
from isa import assert_same_bits, needs_cpp
from torch.utils._python_dispatch import TorchDispatchMode

import u2a_kernels as u2a
from cases.dual_linear_cross_entropy import inputs, launched, oracle
from u2a_kernels.ops.dual_linear_cross_entropy import reference as plain
from u2a_kernels.ops.dual_linear_cross_entropy import triton as kernels
from u2a_kernels.testing import assert_within_budget, randn


def problem(n, d, vocab, dtype=torch.float64):
    """Every optional argument given, softcap 2; every fifth target ignored."""
    y = torch.arange(n) * 7919 % vocab
    y[::5] = -100
    h = randn(2 * n, d, seed=1, dtype=dtype)
    w, w_t = (randn(vocab, d, seed=s, dtype=dtype) for s in (2, 3))
    b, b_t = (randn(vocab, seed=s, dtype=dtype) for s in (4, 5))
    return h, w, y, w_t, b, b_t, 2.0


class Largest(TorchDispatchMode):
    """The largest number of elements of any floating tensor made under it."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.size = max(self.size, t.numel())
        return out


@pytest.mark.parametrize("mode", ["hvp", "ggn"])
def test_chunks_change_nothing_and_bound_the_memory(monkeypatch, mode):
    n, d, vocab = 128, 3, 97
    args = problem(n, d, vocab)
    a, b = args[0][:n, 0].clone(), args[0][:n, 1].clone()

    def both():
        out = plain.forward(*args, mode, True)
        return *out, *plain.backward(a, b, *args[:6], out[3], 2.0, mode)

    want = both()
    monkeypatch.setattr(plain, "chunk_rows", lambda vocab, device: 7)
    with Largest() as largest:
        got = both()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert largest.size <= max(2 * n * d, 7 * vocab) < n * vocab / 10


def test_ignored_tokens_are_never_read():
    """NaN in the hidden state of an ignored token reaches no result and no gradient."""
    args = inputs("capped", torch.float32)
    args["h"][[2, 7]] = float("nan")
    leaves = [args[k].requires_grad_() for k in ("h", "weight", "bias")]
    values = u2a.dual_linear_cross_entropy(**args)
    got = torch.autograd.grad((values[0] + values[1]).sum(), leaves)
    assert all(torch.isfinite(t).all() for t in (*values, *got))
    assert not any(t[2] for t in values) and not got[0][[2, 7]].any()


def test_curvature_survives_a_common_shift():
    """A tangent that moves all logits by 1000 has no curvature; E[z^2] - E[z]^2 would lose it."""
    h = torch.tensor([[1.0, 0.3, -0.2], [0.0, 0.7, 1000.0]])  # primal, tangent
    w = torch.cat([randn(9, 2, seed=1), torch.ones(9, 1)], 1)
    y = torch.tensor([4])
    exact = u2a.dual_linear_cross_entropy(h.double(), w.double(), y)[2]
    torch.testing.assert_close(
        u2a.dual_linear_cross_entropy(h, w, y)[2].double(), exact, rtol=1e-3, atol=0
    )


def test_rows_are_demanded_where_h_needs_a_gradient():
    h = torch.ones(2, 3, requires_grad=True)
    op = torch.ops.u2a.dual_linear_cross_entropy.default
    out = op(h, torch.ones(4, 3), torch.tensor([1]), None, None, None, 0.0, "hvp", False)
    with pytest.raises(RuntimeError, match="h needs a gradient, so rows must be True"):
        out[0].sum().backward()


NAMES = ("h", "weight", "targets", "weight_t", "bias", "bias_t", "softcap")
LAUNCHED = {
    "op": u2a.dual_linear_cross_entropy,
    "triton": launched(kernels),
    "reference": launched(plain),
}


def products(function, args, mode="hvp"):
    """Values, and gradients of h, weight and bias for cotangents of both signs."""
    args = dict(zip(NAMES, args, strict=True))
    leaves = {k: args[k].clone().requires_grad_() for k in ("h", "weight", "bias")}
    options = {} if function is oracle else dict(mode=mode)
    loss, loss_t, curvature = function(**{**args, **leaves}, **options)
    x = torch.arange(len(loss), dtype=torch.float64)
    total = (loss.double() * x.cos()).sum() + (loss_t.double() * x.sin()).sum()
    return loss, loss_t, curvature, *torch.autograd.grad(total, list(leaves.values()))


def typed(args, dtype):
    return [
        t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_several_row_chunks_and_tiles(dtype):
    """More rows than a chunk of the C++ kernel and more tokens than a tile of it."""
    args = problem(1100, 9, 1300, dtype)
    exact = products(oracle, typed(args, torch.float64))
    own = products(oracle, args)
    for got, e, b in zip(products(u2a.dual_linear_cross_entropy, args), exact, own, strict=True):
        assert_within_budget(got, e, b)


@pytest.mark.parametrize("name", ["op", "triton"])
def test_gauss_newton_equals_the_reference(name):
    args = problem(1100 if name == "op" else 13, 9, 1300 if name == "op" else 37)
    want = products(LAUNCHED["reference"], args, "ggn")
    own = products(LAUNCHED["reference"], typed(args, torch.float32), "ggn")
    got = products(LAUNCHED[name], typed(args, torch.float32), "ggn")
    for g, w, o in zip(got, want, own, strict=True):
        assert_within_budget(g, w, o)
    assert not want[3][len(args[2]) :].any() and not got[3][len(args[2]) :].any()


def test_triton_scratch_size_does_not_matter(monkeypatch):
    args = typed(problem(29, 5, 131), torch.float32)
    want = products(LAUNCHED["triton"], args)
    monkeypatch.setattr(kernels, "SCRATCH_ELEMENTS", 700)
    for got, w in zip(products(LAUNCHED["triton"], args), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAUNCHED)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("v", [1, 1297])
def test_extreme_logits(name, softcap, v):
    """Logits of +-1e4, exact in float32, and biases of -inf: finite, within the budget."""
    args = list(problem(6, 4, v, torch.float32))
    args[0][:6] = args[0][:6].round() * 1e4
    args[1].round_()
    args[4][700:] = -torch.inf if softcap is None else -1e4
    args[6] = softcap
    exact = products(LAUNCHED["reference"], typed(args, torch.float64))
    own = products(LAUNCHED["reference"], args)
    for got, e, o in zip(products(LAUNCHED[name], args), exact, own, strict=True):
        assert_within_budget(got, e, o)


def test_targets_out_of_range_give_nan_on_a_gpu():
    """There the door cannot look at values; no memory out of bounds is read."""
    args = typed(problem(4, 3, 7), torch.float32)
    args[2] = torch.tensor([1, 7, -1, -100])
    loss, loss_t, curvature = kernels.forward(*args, "hvp", True)[:3]
    for t in (loss, loss_t, curvature):
        assert t.isnan().tolist() == [False, True, True, False] and t[3] == 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_nan_rows_and_their_products_stay_apart(name):
    """A NaN hidden state spoils its own token and the sums over tokens, no other token."""
    args = typed(problem(9, 4, 37), torch.float32)
    clean = products(LAUNCHED[name], args)
    args[0] = args[0].clone()
    args[0][2, 1] = torch.nan
    spoiled = products(LAUNCHED[name], args)
    keep = [i for i in range(18) if i not in (2, 11)]
    assert torch.isnan(spoiled[0][2]) and torch.isnan(spoiled[3][2]).any()
    for i in range(3):
        assert torch.equal(
            spoiled[i][[j for j in keep if j < 9]], clean[i][[j for j in keep if j < 9]]
        )
    assert torch.equal(spoiled[3][keep], clean[3][keep])


def test_tied_embedding_gets_both_gradients():
    """Weight as embedding and as head: autograd adds the head's part to the lookup's."""
    ids, y = torch.tensor([1, 3, 0]), torch.tensor([3, 0, 2])
    w, w_t = randn(5, 4, seed=1, dtype=torch.float64), randn(5, 4, seed=2, dtype=torch.float64)

    def tied(function):
        leaf = w.clone().requires_grad_()
        out = function(torch.cat([leaf[ids], w_t[ids]]), leaf, y, w_t)
        return torch.autograd.grad((out[1] * torch.tensor([1.0, -2.0, 3.0])).sum(), leaf)[0]

    torch.testing.assert_close(tied(u2a.dual_linear_cross_entropy), tied(oracle))


ISA_PROGRAM = """
torch.set_num_threads(1)
for softcap in (None, 2.0):
    for mode in ("hvp", "ggn"):
        h, w, b = (torch.randn(*s, requires_grad=True) for s in ((74, 16), (1300, 16), (1300,)))
        out = u2a_kernels.dual_linear_cross_entropy(
            h, w, torch.arange(37), torch.randn(1300, 16), bias=b, softcap=softcap, mode=mode)
        (out[0] + 2 * out[1]).sum().backward()
        parts += [*out, h.grad, w.grad, b.grad]
"""


@needs_cpp
def test_instruction_sets_agree_to_the_bit():
    assert_same_bits(ISA_PROGRAM)
