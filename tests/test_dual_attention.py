"""What the contract does not ask: ggn through the kernels, memory, blocks without a full row."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import u2a_kernels as u2a
from cases import cast
from cases import dual_attention as case
from u2a_kernels._triton import INTERPRET
from u2a_kernels.ops.dual_attention import reference
from u2a_kernels.ops.dual_attention import triton as kernels
from u2a_kernels.testing import assert_within_budget, offsets_of, randn


def gradients(function, args, mode):
    leaves = {n: args[n].detach().clone().requires_grad_() for n in "qkv"}
    out = function(**{**args, **leaves}, mode=mode)
    weights = torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape)
    return torch.autograd.grad((out.double() * weights).sum(), list(leaves.values()))


@pytest.mark.skipif(not INTERPRET, reason="the launchers run on CPU tensors when interpreted")
@pytest.mark.parametrize("variant", ["grouped", "window-cache-cap", "blind", "widest", "packed"])
def test_ggn_kernels(variant):
    """The kernels' plain backward within the budget of the reference's, zero on the tangents."""
    args = case.inputs(variant, torch.float32)
    exact = gradients(u2a.dual_attention, cast(args, torch.float64), "ggn")
    baseline = gradients(u2a.dual_attention, args, "ggn")
    for got, want, own in zip(gradients(case.triton, args, "ggn"), exact, baseline, strict=True):
        assert want[: len(want) // 2].any()
        assert_within_budget(got, want, own)
        assert not got[len(got) // 2 :].any()


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0, 4], [7], [4, 4], [1, 9, 0]])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_spans_cover_every_token_once(lengths, block):
    n = sum(lengths)
    tiles = -(-n // block) + len(lengths)
    seen = torch.zeros(n, dtype=torch.int64)
    for start, length, rank in kernels.spans(offsets_of(lengths), tiles, block).tolist():
        for i in range(rank * block, min((rank + 1) * block, length)):
            seen[start + i] += 1
    assert (seen == 1).all()


def scaled(scale, q, k):
    return q @ k.mT * scale


@pytest.mark.parametrize("piece", [reference.PIECE, 1])
def test_statistics(piece, monkeypatch):
    """What the reference hands to a fused backward: max S, lse - max S and mu, [3, B, H, T]."""
    monkeypatch.setattr(reference, "PIECE", piece)
    for variant in ("grouped", "blind"):
        q, k, v, *options = case.op_args(case.inputs(variant, torch.float64))
        got = reference.forward(q, k, v, *options)[1]
        queries, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = keys <= queries + k.shape[2] - q.shape[2]
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        halves = zip(q.chunk(2), k.chunk(2), strict=True)
        s, s_t = torch.func.jvp(partial(scaled, options[1]), *halves)
        s.masked_fill_(~seen, float("-inf"))
        mu = (torch.softmax(s, -1).nan_to_num(0.0) * s_t).sum(-1)
        top, some = s.amax(-1), seen.any(1)
        rest = torch.where(some, s.logsumexp(-1) - top, float("-inf"))
        want = torch.stack([top.masked_fill(~some, 0.0), rest, mu])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


class Peak(TorchDispatchMode):
    """The largest number of elements of any tensor made under it."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel())
        return out


def test_reference_holds_pieces_only(monkeypatch):
    """No tensor is near T x S, forward or backward."""
    monkeypatch.setattr(reference, "PIECE", 1 << 10)
    t, d = 160, 2
    q, k, v = (randn(2, 1, t, d, seed=s).requires_grad_() for s in (1, 2, 3))
    with Peak() as peak:
        out = u2a.dual_attention(q, k, v)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert peak.size <= max(1 << 10, 2 * t * d) < t * t / 10


@pytest.mark.parametrize("window", [None, 5])
def test_one_visible_key_has_no_gradient(window):
    """Softmax over one key is constant: exactly zero for q and k, as autograd says."""
    q, k, v = (randn(2, 2, 1, 16, seed=s) for s in (1, 2, 3))
    args = dict(q=q, k=k, v=v, **{**case.DEFAULTS, "window": window})
    functions = [u2a.dual_attention, *([case.triton] if INTERPRET else [])]
    for function in functions:
        dq, dk, dv = gradients(function, args, "hvp")
        assert not dq.any() and not dk.any() and dv.any()
