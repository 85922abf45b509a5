"""The dual loss head: chunks and memory, modes, ignored rows, extreme logits, instruction sets."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import u2a_kernels as u2a
from cases.dual_linear_cross_entropy import inputs
from u2a_kernels.ops.dual_linear_cross_entropy import reference as plain
from u2a_kernels.testing import randn


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
