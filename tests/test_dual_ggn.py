"""Gauss-Newton products and Hessian products of a small network built from every dual op.

Oracles in float64: J^T H_L J v by jvp, loss Hessian at the logits, vjp; H v by jvp of the gradient.
"""

import pytest
import torch
import torch.nn.functional as F

import u2a_kernels as u2a
from u2a_kernels.testing import randn

B, T, D, V, HEADS = 2, 5, 8, 11, 2
TARGETS = (torch.arange(B * T) * 3) % V
TARGETS[4] = -100
EPS = 1e-3
SHAPES = dict(
    qkv=(3 * D, D), qkv_b=(3 * D,), out=(D, D), rms=(D,), gate=(D, D), up=(D, D),
    ln=(D,), ln_b=(D,), mlp=(D, D), head=(V, D),
)  # fmt: skip
X = randn(B, T, D, seed=1, dtype=torch.float64)
PARAMS = {
    n: randn(*s, seed=10 + i, dtype=torch.float64) / 2 for i, (n, s) in enumerate(SHAPES.items())
}
DIRECTION = {
    n: randn(*s, seed=30 + i, dtype=torch.float64) for i, (n, s) in enumerate(SHAPES.items())
}


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def logits(p):
    q, k, v = (heads(t) for t in F.linear(X, p["qkv"], p["qkv_b"]).chunk(3, -1))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    mixed = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v
    x = X + F.linear(mixed.transpose(1, 2).flatten(2), p["out"])
    n = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * p["rms"]
    x = x + F.silu(F.linear(n, p["gate"])) * F.linear(n, p["up"])
    c = x - x.mean(-1, keepdim=True)
    n = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + EPS) * p["ln"] + p["ln_b"]
    x = x + F.gelu(F.linear(n, p["mlp"]))
    return F.linear(x, p["head"]).flatten(0, 1)


def losses(z):
    return F.cross_entropy(z, TARGETS, ignore_index=-100, reduction="none")


def dual_losses(p, v, mode):
    """(loss, loss_t, curvature) per token through the dual ops."""
    x = torch.cat([X, torch.zeros_like(X)])
    qkv = u2a.dual_linear(x, p["qkv"], v["qkv"], p["qkv_b"], v["qkv_b"], mode=mode)
    mixed = u2a.dual_attention(*(heads(t) for t in qkv.chunk(3, -1)), mode=mode)
    x = x + u2a.dual_linear(mixed.transpose(1, 2).flatten(2), p["out"], v["out"], mode=mode)
    n = u2a.dual_rms_norm(x, p["rms"], v["rms"], EPS)
    gate = u2a.dual_linear(n, p["gate"], v["gate"], mode=mode)
    x = x + u2a.dual_swiglu(gate, u2a.dual_linear(n, p["up"], v["up"], mode=mode))
    n = u2a.dual_layer_norm(x, p["ln"], p["ln_b"], v["ln"], v["ln_b"], EPS)
    x = x + u2a.dual_gelu(u2a.dual_linear(n, p["mlp"], v["mlp"], mode=mode))
    return u2a.dual_linear_cross_entropy(x.flatten(0, 1), p["head"], TARGETS, v["head"], mode=mode)


def product(mode, weights, frozen=()):
    leaves = {n: t.clone().requires_grad_(n not in frozen) for n, t in PARAMS.items()}
    v = {n: torch.zeros_like(t) if n in frozen else t for n, t in DIRECTION.items()}
    _, loss_t, _ = dual_losses(leaves, v, mode)
    names = [n for n in leaves if n not in frozen]
    total = (weights * loss_t).sum()
    return v, dict(zip(names, torch.autograd.grad(total, [leaves[n] for n in names]), strict=True))


@pytest.mark.parametrize("frozen", [(), ("head",), ("head", "rms", "ln", "ln_b", "qkv", "qkv_b")])
@pytest.mark.parametrize("mode", ["ggn", "hvp"])
def test_second_order_product(mode, frozen):
    weights = 0.5 + torch.arange(B * T, dtype=torch.float64) / 7
    v, got = product(mode, weights, frozen)

    def loss(p):
        return (weights * losses(logits(p))).sum()

    if mode == "hvp":
        want = torch.func.jvp(torch.func.grad(loss), (PARAMS,), (v,))[1]
    else:
        z, z_t = torch.func.jvp(logits, (PARAMS,), (v,))
        gradient = torch.func.grad(lambda z: (weights * losses(z)).sum())
        u = torch.func.jvp(gradient, (z,), (z_t,))[1]
        want = torch.func.vjp(logits, PARAMS)[1](u)[0]
    for name, value in got.items():
        scale = want[name].abs().max()
        assert scale > 1e-3, name
        torch.testing.assert_close(value, want[name], rtol=0, atol=1e-12 * float(scale), msg=name)


def test_curvature_is_the_quadratic_form():
    """sum curvature = v^T G v, and per token it equals the variance of z_t under p."""
    loss, loss_t, curvature = dual_losses(PARAMS, DIRECTION, "jvp")
    z, z_t = torch.func.jvp(logits, (PARAMS,), (DIRECTION,))
    p = torch.softmax(z, -1)
    mean = (p * z_t).sum(-1, keepdim=True)
    kept = TARGETS >= 0
    variance = (p * (z_t - mean) ** 2).sum(-1) * kept
    torch.testing.assert_close(curvature, variance, rtol=1e-12, atol=0)
    want = torch.func.jvp(lambda p: losses(logits(p)), (PARAMS,), (DIRECTION,))
    torch.testing.assert_close((loss, loss_t), want, rtol=1e-11, atol=1e-13)
    _, got = product("ggn", torch.ones(B * T, dtype=torch.float64))
    quadratic = sum((got[n] * DIRECTION[n]).sum() for n in got)
    torch.testing.assert_close(curvature.sum(), quadratic, rtol=1e-12, atol=0)


def test_attention_ggn_is_the_plain_backward_of_the_primal_half():
    """Whatever arrives on the tangent half is ignored, and nothing leaves on it."""
    q, k, v = (randn(4, h, T, 3, seed=h, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    cotangent = randn(4, 4, T, 3, seed=9, dtype=torch.float64)
    out = u2a.dual_attention(q, k, v, softcap=2.0, window=3, mode="ggn")
    got = torch.autograd.grad(out, (q, k, v), cotangent)
    rows, keys = torch.arange(T)[:, None], torch.arange(T)
    seen = (keys <= rows) & (keys > rows - 3)
    scores = q[:2] @ k[:2].repeat_interleave(2, 1).mT * 3**-0.5
    scores = (2 * torch.tanh(scores / 2)).masked_fill(~seen, float("-inf"))
    plain = torch.softmax(scores, -1) @ v[:2].repeat_interleave(2, 1)
    want = torch.autograd.grad(plain, (q, k, v), cotangent[:2])
    for a, b in zip(got, want, strict=True):
        assert not a[2:].any() and a[:2].any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_linear_ggn_is_the_plain_backward_of_the_primal_half():
    x, w, b = (randn(*s, seed=1, dtype=torch.float64) for s in ((4, 3), (5, 3), (5,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    cotangent = randn(4, 5, seed=2, dtype=torch.float64)
    out = u2a.dual_linear(x, w, torch.ones(5, 3, dtype=x.dtype), b, mode="ggn")
    got = torch.autograd.grad(out, leaves, cotangent)
    want = torch.autograd.grad(F.linear(x[:2], w, b), leaves, cotangent[:2])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_softmax_ggn_is_the_plain_backward_of_the_primal_half():
    z, cotangent = (randn(6, 2, 5, seed=s, dtype=torch.float64) for s in (1, 2))
    z.requires_grad_()
    (got,) = torch.autograd.grad(u2a.dual_softmax(z, mode="ggn"), z, cotangent)
    (want,) = torch.autograd.grad(torch.softmax(z[:3], -1), z, cotangent[:3])
    assert not got[3:].any() and got[:3].any()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_head_ggn_ignores_the_cotangent_of_the_loss():
    h = randn(6, 4, seed=1, dtype=torch.float64).requires_grad_()
    for trainable in (False, True):
        w = randn(7, 4, seed=2, dtype=torch.float64).requires_grad_(trainable)
        loss, loss_t, _ = u2a.dual_linear_cross_entropy(h, w, torch.tensor([1, 6, 0]), mode="ggn")
        assert not torch.autograd.grad(loss.sum(), h, retain_graph=True)[0].any()
        (dh,) = torch.autograd.grad(loss_t.sum(), h)
        assert dh[:3].any() and not dh[3:].any()


def test_capped_head_ggn_is_the_curvature_at_the_capped_logits():
    """loss_t's cotangent gives J^T (diag p - p p^T) J v, J through the soft cap and the bias."""
    n, v, d = 3, 7, 4
    h, h_t = (randn(n, d, seed=s, dtype=torch.float64) for s in (1, 2))
    w, w_t = (randn(v, d, seed=s, dtype=torch.float64) for s in (3, 4))
    b, b_t = (randn(v, seed=s, dtype=torch.float64) for s in (5, 6))
    targets, weights = torch.tensor([1, 6, 0]), torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)

    def logits(h, w, b):
        return 2 * torch.tanh((h @ w.mT + b) / 2)

    z, z_t = torch.func.jvp(logits, (h, w, b), (h_t, w_t, b_t))
    p = torch.softmax(z, -1)
    u = weights[:, None] * p * (z_t - (p * z_t).sum(-1, keepdim=True))
    want = torch.func.vjp(logits, h, w, b)[1](u)
    leaves = [torch.cat([h, h_t]).requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    for trained in (leaves, leaves[:1]):
        head = [t if any(t is x for x in trained) else t.detach() for t in leaves]
        _, loss_t, _ = u2a.dual_linear_cross_entropy(
            head[0], head[1], targets, w_t, bias=head[2], bias_t=b_t, softcap=2.0, mode="ggn"
        )
        got = torch.autograd.grad((weights * loss_t).sum(), trained)
        assert not got[0][n:].any()
        for one, other in zip((got[0][:n], *got[1:]), want, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
