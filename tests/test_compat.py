"""compat: every way to the second order equals eager torch in float64; a third order raises."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from u2a_kernels import compat


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_attention(q, k, v, causal=False, window=None, softcap=None):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    at, key = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    hidden = torch.zeros(s.shape[-2:], dtype=torch.bool)
    if causal:
        hidden = key > at
    if window is not None:
        hidden = hidden | (key <= at - window)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ v


def attention(**options):
    def ours(q, k, v):
        given = dict(options)
        return compat.scaled_dot_product_attention(
            q, k, v, is_causal=given.pop("causal", False), enable_gqa=True, **given
        )

    shapes = ((2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3))
    return ours, lambda q, k, v: plain_attention(q, k, v, **options), shapes


def plain_rms(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def plain_layer(x, w, b):
    xc = x - x.mean(-1, keepdim=True)
    return xc * torch.rsqrt((xc * xc).mean(-1, keepdim=True) + 1e-5) * w + b


def plain_gelu(x):
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def plain_silu(x):
    return x * torch.sigmoid(x)


TARGETS = torch.tensor([3, -100, 0, 6])


def plain_head(h, w):
    logp = torch.log_softmax(h @ w.mT, -1).gather(1, TARGETS.clamp_min(0)[:, None])[:, 0]
    return torch.where(TARGETS >= 0, -logp, 0)


CASES = {
    "attention": attention(),
    "causal": attention(causal=True),
    "window and cap": attention(causal=True, window=2, softcap=3.0),
    "rms_norm": (compat.rms_norm, plain_rms, ((3, 2, 5), (5,))),
    "layer_norm": (compat.layer_norm, plain_layer, ((3, 5), (5,), (5,))),
    "silu": (compat.silu, plain_silu, ((3, 7),)),
    "gelu": (compat.gelu, plain_gelu, ((3, 7),)),
    "swiglu": (compat.swiglu, lambda a, b: plain_silu(a) * b, ((3, 7), (3, 7))),
    "geglu": (compat.geglu, lambda a, b: plain_gelu(a) * b, ((3, 7), (3, 7))),
    "head": (lambda h, w: compat.linear_cross_entropy(h, w, TARGETS), plain_head, ((4, 3), (7, 3))),
}  # fmt: skip


class Problem:
    def __init__(self, name):
        self.ours, self.plain, shapes = CASES[name]
        self.xs = tuple(rand(*s, seed=i) for i, s in enumerate(shapes))
        self.ts = tuple(rand(*s, seed=10 + i) for i, s in enumerate(shapes))
        self.c = rand(*self.plain(*self.xs).shape, seed=20)

    def loss(self, f):
        """Not linear in f, so that its own second derivative takes part."""
        return lambda *xs: (torch.sin(f(*xs)) * self.c).sum()


@pytest.fixture(params=CASES)
def problem(request):
    return Problem(request.param)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def where(p):
    return tuple(range(len(p.xs)))


def test_value_and_gradient(problem):
    p = problem
    close(p.ours(*p.xs), p.plain(*p.xs))
    close(*(torch.func.grad(p.loss(f), where(p))(*p.xs) for f in (p.ours, p.plain)))


def double_backward(p, f):
    xs = [x.clone().requires_grad_() for x in p.xs]
    first = torch.autograd.grad(p.loss(f)(*xs), xs, create_graph=True)
    return torch.autograd.grad(first, xs, p.ts)


def jvp_of_grad(p, f):
    return torch.func.jvp(torch.func.grad(p.loss(f), where(p)), p.xs, p.ts)[1]


def grad_of_jvp(p, f):
    return torch.func.grad(
        lambda *xs: torch.func.jvp(p.loss(f), xs, p.ts)[1], where(p)
    )(*p.xs)  # fmt: skip


def jvp_of_jacrev(p, f):
    return torch.func.jvp(torch.func.jacrev(p.loss(f), where(p)), p.xs, p.ts)[1]


def vmap_over_directions(p, f):
    many = tuple(torch.stack([t, -2 * t, t.flip(0)]) for t in p.ts)
    return torch.func.vmap(
        lambda *ts: torch.func.jvp(torch.func.grad(p.loss(f), where(p)), p.xs, ts)[1]
    )(*many)


ROUTES = (double_backward, jvp_of_grad, grad_of_jvp, jvp_of_jacrev, vmap_over_directions)


@pytest.mark.parametrize("route", ROUTES)
def test_second_order(problem, route):
    close(route(problem, problem.ours), double_backward_like(route, problem))


def double_backward_like(route, p):
    """The truth by eager double backward alone, for the directions of the route."""
    if route is not vmap_over_directions:
        return double_backward(p, p.plain)
    rows = []
    for change in (lambda t: t, lambda t: -2 * t, lambda t: t.flip(0)):
        other = Problem.__new__(Problem)
        other.__dict__ = {**p.__dict__, "ts": tuple(map(change, p.ts))}
        rows.append(double_backward(other, p.plain))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def test_tangents(problem):
    p = problem
    close(*(torch.func.jvp(f, p.xs, p.ts) for f in (p.ours, p.plain)))


def test_per_example_gradients(problem):
    p = problem
    batch = tuple(torch.stack([x, x.flip(0), 2 * x]) for x in p.xs)
    got, want = (
        torch.func.vmap(torch.func.grad(p.loss(f), where(p)))(*batch) for f in (p.ours, p.plain)
    )
    close(got, want)


@pytest.mark.parametrize("name", ["causal", "rms_norm", "head"])
def test_a_third_derivative_raises(name):
    p = Problem(name)
    xs = [x.clone().requires_grad_() for x in p.xs]
    first = torch.autograd.grad(p.loss(p.ours)(*xs), xs, create_graph=True)
    second = torch.autograd.grad(first, xs, p.ts, create_graph=True)
    with pytest.raises(RuntimeError, match=r"compat\.\w+: this is right to second order"):
        torch.autograd.grad(second, xs, p.ts)
    with pytest.raises(RuntimeError, match="forward mode over forward mode"):
        torch.func.jvp(lambda *xs: torch.func.jvp(p.loss(p.ours), xs, p.ts)[1], p.xs, p.ts)


def test_it_is_what_torch_calls_attention():
    q, k, v = (rand(1, 2, 4, 3, seed=i) for i in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    close(compat.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), want)


def test_refusals():
    q = rand(1, 2, 4, 3)
    with pytest.raises(ValueError, match="attn_mask, dropout_p must be none"):
        compat.scaled_dot_product_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal must be as many keys as queries, 4"):
        compat.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3], is_causal=True)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'"):
        compat.gelu(q, "exact")


def test_compiled_first_order():
    x, w = rand(3, 5).requires_grad_(), rand(5, seed=1)

    def loss(x):
        return compat.rms_norm(x, w).sin().sum()

    f = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(f(x), x)
    (want,) = torch.autograd.grad(plain_rms(x, w).sin().sum(), x)
    close(got, want)


def test_double_backward_holds_no_scores():
    """The largest tensor that autograd keeps for a double backward is as large as the inputs."""
    t, kept = 64, []
    q, k, v = (rand(1, 1, t, 4, seed=i).requires_grad_() for i in range(3))

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = compat.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
        first = torch.autograd.grad(y, (q, k, v), create_graph=True)
        torch.autograd.grad(sum((g * g).sum() for g in first), (q, k, v))
    assert max(kept) <= 2 * q.numel() < t * t / 4, "stacked rows at most"
